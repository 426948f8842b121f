"""Packages from npm for tests: one pinned file each with its published digest, unpacked into `.cache/`; nothing is installed."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path


class NoNpm(Exception):
    """Why a package cannot be had."""


def npm_package(cache: Path, name: str, version: str, integrity: str) -> Path:
    """The folder of a package, fetched into `cache` at the first call on a machine. integrity: as npm prints it, sha512-…"""
    cache.mkdir(parents=True, exist_ok=True)
    stem = f"{name.removeprefix('@').replace('/', '-')}-{version}"
    folder = cache / stem
    with (cache / "lock").open("w") as lock:  # of two test workers one downloads and the other waits
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            packed = cache / f"{stem}.tgz"
            _download(packed, f"{name}@{version}", integrity)
            part = Path(tempfile.mkdtemp(dir=cache))
            with tarfile.open(packed) as archive:
                archive.extractall(part, filter="data")
            packed.unlink()
            (part / "package").rename(folder)
            shutil.rmtree(part)
    return folder


def _download(packed: Path, package: str, integrity: str) -> None:
    if not packed.exists():
        for program in ("npm", "node"):
            if shutil.which(program) is None:
                raise NoNpm(f"{program} is not installed")
        command = ["npm", "pack", package, "--pack-destination", str(packed.parent.resolve())]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        except (subprocess.SubprocessError, OSError) as error:
            raise NoNpm(f"npm pack failed: {getattr(error, 'stderr', None) or error}") from error
    with packed.open("rb") as file:
        found = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if f"sha512-{found}" != integrity:
        packed.unlink()
        raise AssertionError(f"{package} has sha512-{found}, not the published {integrity}")
