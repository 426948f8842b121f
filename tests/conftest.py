"""Checkpoints that many tests read, made once a session; nobody writes into them (`copied` gives one to spoil)."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores already: torch's threads would wait in turns

import base64
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import tokenizer
from support.checkpoints import AWKWARD, SMALL, SQUARE, Model, write_hf
from support.layouts import written
from support.template import no_template, official_template
from support.tokenizer import small_tokenizer

CACHE = Path(__file__).parents[1] / ".cache"


@pytest.fixture(scope="session")
def small_model() -> Model:
    """No two widths alike."""
    return Model(SMALL)


@pytest.fixture(scope="session")
def awkward_model() -> Model:
    """With rare but legal MXFP4 groups."""
    return Model(SMALL, AWKWARD)


@pytest.fixture(scope="session")
def square_model() -> Model:
    """Hidden and expert width alike, so that no shape gives a transposition away."""
    return Model(SQUARE)


@pytest.fixture(scope="session")
def hf_folder(small_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_model` as released, in shards of 200 kB."""
    folder = tmp_path_factory.mktemp("small") / "hf"
    write_hf(small_model, folder, shard_limit=200_000)
    return folder


@pytest.fixture(scope="session")
def square_folder(square_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`square_model` as released."""
    folder = tmp_path_factory.mktemp("square") / "hf"
    write_hf(square_model, folder)
    return folder


@pytest.fixture(scope="session")
def layouts(awkward_model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`awkward_model` in every layout that is read."""
    return written(awkward_model, tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer for models of SMALL's vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer(folder, SMALL.vocab, SMALL.spare_rows)
    return folder


@pytest.fixture(scope="session")
def true_file() -> Path:
    """The release's tokenizer.json, rebuilt, or a skip."""
    found = tokenizer.true_tokenizer(CACHE / "tokenizer")
    if found is None:
        pytest.skip(tokenizer.no_true_tokenizer)
    return found


@pytest.fixture(scope="session")
def release_template() -> Path:
    """The release's chat template, or a skip."""
    found = official_template(CACHE / "template")
    if found is None:
        pytest.skip(no_template)
    return found


@pytest.fixture(scope="session")
def harmony(true_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """openai-harmony and its encoding of gpt-oss, the vocabulary from the package that the tokenizer is rebuilt from."""
    library = pytest.importorskip("openai_harmony", reason="openai-harmony is not installed")
    folder = tmp_path_factory.mktemp("harmony")
    ranks = tokenizer.true_ranks(true_file.parent / "js-tiktoken-1.0.21.tgz")
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (folder / "o200k_base.tiktoken").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(folder))
        return library, library.load_harmony_encoding(library.HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a checkpoint that a test may spoil."""

    def copy(path: Path) -> Path:
        target = tmp_path / "copy" / path.name
        target.parent.mkdir(exist_ok=True)
        return Path(shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target))

    return copy


@pytest.fixture(scope="session")
def convert() -> Callable[..., Any]:
    """`conversion.convert(path, target, Options(to, **options))`, silently."""
    from gptoss_convert.convert import conversion
    from gptoss_convert.convert.progress import silent

    def run(path: Path, target: Path, to: str, **options: Any) -> conversion.Outcome:
        return conversion.convert(path, target, conversion.Options(to, **options), silent)

    return run
