"""One small model in every kind, exported by the tests of every platform."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gptoss_convert.convert.conversion import Options, convert
from gptoss_convert.convert.progress import silent


@pytest.fixture(scope="session")
def kinds(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The artifact of a kind, converted when it is first asked for."""
    folder = tmp_path_factory.mktemp("kinds")
    targets = {"mxfp4": "hf"}

    def artifact(kind: str) -> Path:
        path = folder / (f"{kind}.gguf" if kind == "gguf" else kind)
        if not path.exists():
            convert(hf_folder, path, Options(targets.get(kind, kind)), silent)
        return path

    return artifact
