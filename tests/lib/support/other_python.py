"""A second interpreter for packages that do not go together with ours (azure-ai-ml wants marshmallow 3), and what runs in it.

`make suite` makes it in .cache/azureml.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class NoOtherPython(Exception):
    """Why there is none."""


def other_python(root: Path, modules: str) -> Path:
    """The interpreter that has these modules: $AZUREML_PYTHON, .cache/azureml, or our own."""
    given = os.environ.get("AZUREML_PYTHON")
    places = [Path(given)] if given else [root / ".cache/azureml/bin/python", Path(sys.executable)]
    said = []
    for place in places:
        if place.exists():
            found = subprocess.run([place, "-c", f"import {modules}"], capture_output=True, text=True, check=False)
            if found.returncode == 0:
                return place
            said.append(f"{place}: {found.stderr.strip().rpartition(chr(10))[2]}")
    raise NoOtherPython(f"no interpreter has {modules} ({'; '.join(said)}): see tests/lib/support/other_python.py")


def run_there(python: Path, code: str, given: Any) -> Any:
    """What `code` prints as the last line of JSON; it finds `given` as JSON in argv[1]."""
    found = subprocess.run(
        [python, "-c", code, json.dumps(given)], capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])
