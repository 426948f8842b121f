#!/bin/bash
# Puts the model onto the service's volume, the digests last: the service starts when they are there and every file has them.
# Until then another text lies in their place, so that a container which starts again meanwhile takes no mixture for the model.
set -euo pipefail

if [ "$#" -ne 1 ]; then
  echo "usage: $0 PROJECT" >&2
  exit 64
fi
cd "$(dirname "$0")"
project="$1"

# upload LOCAL REMOTE
upload() {
  northflank upload service file --projectId "$project" --serviceId "@NAME@" --localPath "$1" --remotePath "/models/$2"
}

check() {
  if command -v sha256sum >/dev/null; then
    sha256sum --quiet --strict -c -
  else
    shasum -a 256 --quiet --strict -c -
  fi
}

grep -E '  (model|encodings)/' SHA256SUMS | check
under_way=$(mktemp)
trap 'rm "$under_way"' EXIT
echo 'upload.sh is at work, or was interrupted: run it again' >"$under_way"
upload "$under_way" SHA256SUMS
upload model model
if [ -d encodings ]; then
  upload encodings encodings
fi
upload SHA256SUMS SHA256SUMS
