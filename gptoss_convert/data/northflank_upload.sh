#!/bin/bash
# Puts the model onto the service's volume, the digests last: the service starts when they are there and every file has them.
set -euo pipefail

if [ "$#" -ne 1 ]; then
  echo "usage: $0 PROJECT" >&2
  exit 64
fi
cd "$(dirname "$0")"

upload() {
  northflank upload service file --projectId "$project" --serviceId "@NAME@" --localPath "$1" --remotePath "/models/$1"
}

project="$1"
grep -E '  (model|encodings)/' SHA256SUMS | sha256sum --quiet --strict -c -
upload model
if [ -d encodings ]; then
  upload encodings
fi
upload SHA256SUMS
