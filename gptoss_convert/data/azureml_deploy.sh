#!/bin/bash
# Registers the model and its environment, and deploys them. Run again after an interruption: what exists with the same content, as its
# tag `content` tells, is left as it is; what exists with another is named, and nothing is done with it.
set -euo pipefail

if [ "$#" -ne 3 ]; then
  echo "usage: $0 SUBSCRIPTION RESOURCE_GROUP WORKSPACE" >&2
  exit 64
fi
cd "$(dirname "$0")"
name="@NAME@"
environment="@ENVIRONMENT@"
version="@VERSION@"
where=(--subscription "$1" --resource-group "$2" --workspace-name "$3")
blue=(--name blue --endpoint-name "$name")

problem() {
  echo "deploy.sh: $1" >&2
  exit 1
}

check() {
  if command -v sha256sum >/dev/null; then
    sha256sum --quiet --strict -c -
  else
    shasum -a 256 --quiet --strict -c -
  fi
}

digest() {
  if command -v sha256sum >/dev/null; then
    sha256sum
  else
    shasum -a 256
  fi | cut -c1-32
}

# ensure WHAT FILE CONTENT HOW-IT-IS-NAMED... -- FURTHER-ARGUMENTS-OF-CREATE...
ensure() {
  local what=$1 file=$2 content=$3 found named=()
  shift 3
  while [ "$1" != -- ]; do
    named+=("$1")
    shift
  done
  shift
  if found=$(az ml "$what" show "${named[@]}" "${where[@]}" --query tags.content --output tsv 2>/dev/null); then
    if [ "$found" != "$content" ]; then
      problem "another $what is called so (${named[*]}): its tag content is ${found:-missing}, not $content. \
Export again with another --name, or delete it: az ml $what --help"
    fi
  else
    az ml "$what" create --file "$file" --set "tags.content=$content" "$@" "${where[@]}"
  fi
}

grep '  model/' SHA256SUMS | check

ensure model model.yml "$(grep '  model/' SHA256SUMS | digest)" --name "$name" --version "$version" --
if [ -n "$environment" ]; then
  ensure environment environment.yml "$(cat environment.yml environment/* | digest)" --name "$environment" --version "$version" --
fi
az ml online-endpoint show --name "$name" "${where[@]}" --output none 2>/dev/null ||
  az ml online-endpoint create --file endpoint.yml "${where[@]}"
ensure online-deployment deployment.yml "$(digest <deployment.yml)" "${blue[@]}" -- --all-traffic

state=$(az ml online-deployment show "${blue[@]}" "${where[@]}" --query provisioning_state --output tsv)
if [ "$state" != Succeeded ]; then
  problem "the deployment blue is $state, not Succeeded. While it is made, wait and run this again; if it failed, \
az ml online-deployment get-logs tells why: mend that, delete it, and run this again"
fi
# --all-traffic is done after the deployment: an interruption leaves it without any
traffic=$(az ml online-endpoint show --name "$name" "${where[@]}" --query traffic.blue --output tsv)
case "$traffic" in
  "" | 0 | None) az ml online-endpoint update --name "$name" --traffic "blue=100" "${where[@]}" ;;
esac
az ml online-endpoint show --name "$name" "${where[@]}" --query scoring_uri --output tsv
