#!/bin/bash
# Entry point: finds the model below MODEL_ROOT and starts vLLM on it with SERVE_ARGUMENTS (deployment.yml sets both).
set -euo pipefail

root="${MODEL_ROOT:?MODEL_ROOT is not set: where the model is mounted}"
found=()
for depth in 1 2 3 4 5 6; do # the topmost: folders of the model may hold further ones
  mapfile -t found < <(find -L "$root" -mindepth "$depth" -maxdepth "$depth" -name config.json -type f)
  if [ "${#found[@]}" -gt 0 ]; then
    break
  fi
done
if [ "${#found[@]}" -ne 1 ]; then
  echo "serve.sh: ${#found[@]} files config.json below $root, expected one" >&2
  printf '  %s\n' "${found[@]}" >&2
  exit 2
fi

arguments=()
if [ -n "${SERVE_ARGUMENTS:-}" ]; then
  read -r -a arguments <<<"$SERVE_ARGUMENTS"
fi
exec vllm serve "$(dirname "${found[0]}")" "${arguments[@]}" "$@"
