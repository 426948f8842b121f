#!/bin/bash
# Registers the model and its environment, and deploys them. Run again after an interruption: what exists is left as it is.
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

exists() { az ml "$@" "${where[@]}" --output none 2>/dev/null; }

grep '  model/' SHA256SUMS | sha256sum --quiet --strict -c -

exists model show --name "$name" --version "$version" || az ml model create --file model.yml "${where[@]}"
if [ -n "$environment" ]; then
  exists environment show --name "$environment" --version "$version" ||
    az ml environment create --file environment.yml "${where[@]}"
fi
exists online-endpoint show --name "$name" || az ml online-endpoint create --file endpoint.yml "${where[@]}"
exists online-deployment show --name blue --endpoint-name "$name" ||
  az ml online-deployment create --file deployment.yml --all-traffic "${where[@]}"
az ml online-endpoint show --name "$name" "${where[@]}" --query scoring_uri --output tsv
