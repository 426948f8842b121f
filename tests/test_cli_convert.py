"""`gptoss-convert convert`: what it prints and where, the dry run, and a group whose help loads nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptoss_convert import cli
from gptoss_convert.cli.convert import Size

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def in_process(capfd: pytest.CaptureFixture[str]) -> Cli:
    """The command in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = 0
        try:
            cli.main(list(map(str, arguments)))
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return call


CHOICES: list[tuple[str, list[str]]] = [
    ("gguf", []),
    ("gguf", ["--experts", "q8_0", "--dense", "f32"]),
    ("gguf", ["--split-size", "300kB"]),
    ("hf", []),
    ("hf", ["--split-size", "0.2MB"]),
    ("original", []),
    ("bf16", []),
]


@pytest.mark.parametrize(("to", "more"), CHOICES, ids=str)
def test_the_dry_run_writes_nothing_and_foretells_the_real_runs_sizes(
    to: str, more: list[str], hf_folder: Path, tmp_path: Path, in_process: Cli
) -> None:
    target = tmp_path / ("m.gguf" if to == "gguf" and "--split-size" not in more else "m")
    code, out, _ = in_process("convert", hf_folder, target, "--to", to, *more, "--dry-run", "--json")
    assert code == 0
    assert list(tmp_path.iterdir()) == []
    told = json.loads(out)
    code, out, _ = in_process("convert", hf_folder, target, "--to", to, *more, "--json")
    assert code == 0
    made = {path.name: path.stat().st_size for path in ([target] if target.is_file() else target.iterdir())}
    made.pop("gptoss-certificate.json", None)
    assert {file["name"]: file["size"] for file in told["files"]} == made
    assert told["output_bytes"] == sum(made.values()) == json.loads(out)["bytes"]


def test_the_dry_run_is_a_table_for_people(hf_folder: Path, tmp_path: Path, in_process: Cli) -> None:
    code, out, err = in_process("convert", hf_folder, tmp_path / "m.gguf", "--to", "gguf", "--dry-run")
    assert (code, err) == (0, "")
    assert "model.layers.2.mlp.experts.down_proj" in out
    assert "bits moved" in out
    assert "bytes in all" in out
    assert "peak memory at most" in out


def test_a_dry_run_refuses_what_the_run_would_refuse(
    hf_folder: Path, layouts: Any, tmp_path: Path, in_process: Cli
) -> None:
    assert in_process("convert", layouts["original"], tmp_path / "m.gguf", "--to", "gguf", "--dry-run")[0] == 10
    assert in_process("convert", hf_folder, tmp_path / "m", "--to", "gguf", "--dry-run")[0] == 2
    assert in_process("convert", tmp_path / "no", tmp_path / "m", "--to", "hf", "--dry-run")[0] == 3


def test_json_is_one_document_on_stdout(hf_folder: Path, tmp_path: Path, in_process: Cli) -> None:
    code, out, err = in_process("convert", hf_folder, tmp_path / "m.gguf", "--to", "gguf", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["target"] == str(tmp_path / "m.gguf")
    assert document["certificate"] == json.loads((tmp_path / "m.gguf.certificate.json").read_text())
    assert out.isascii()


def test_a_result_for_people_says_what_was_proved(hf_folder: Path, tmp_path: Path, in_process: Cli) -> None:
    code, out, _ = in_process("convert", hf_folder, tmp_path / "m.gguf", "--to", "gguf")
    assert code == 0
    assert "byte-equal" in out
    assert "18 experts compute the same" in out
    assert "lost     nothing" in out
    code, out, _ = in_process("convert", hf_folder, tmp_path / "n.gguf", "--to", "gguf", "--no-proof")
    assert "not made (--no-proof)" in out
    code, out, _ = in_process("convert", hf_folder, tmp_path / "o.gguf", "--to", "gguf", "--dense", "q8_0")
    assert "rounded from bf16 to q8_0" in out


def test_an_error_as_json_says_what_where_found_and_expected(hf_folder: Path, tmp_path: Path, in_process: Cli) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    code, out, err = in_process("convert", hf_folder, tmp_path / "m.gguf", "--to", "gguf", "--json")
    assert code == 8
    document = json.loads(out)
    assert set(document) == {"error", "exit_code", "what", "file", "tensor", "found", "expected", "remedy"}
    assert (document["error"], document["exit_code"]) == ("TargetExists", 8)
    assert document["file"] == str(tmp_path / "m.gguf")
    assert err.startswith("error: the target exists\n")
    code, out, _ = in_process("convert", hf_folder, "--json")
    assert (code, json.loads(out)["exit_code"]) == (2, 2)


def test_a_relative_target_is_made_where_the_user_stands(
    hf_folder: Path, tmp_path: Path, in_process: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_process("convert", hf_folder, "sub/m.gguf", "--to", "gguf")[0] == 0
    assert (tmp_path / "sub" / "m.gguf").is_file()


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("4GB", 4 * 10**9), ("4gib", 4 << 30), ("1.5 MB", 1_500_000), ("512KiB", 512 << 10), ("7b", 7)],
)
def test_sizes_have_decimal_and_binary_units(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "GB", "4XB", "1e9", "0.0GB", "٣", "0.1"])
def test_what_is_no_size_is_a_usage_error(text: str) -> None:
    import click

    with pytest.raises(click.BadParameter):
        Size().convert(text, None, None)


HEAVY = ["numpy", "numba", "torch", "gguf", "rich", "tokenizers", "huggingface_hub", "blake3", "yaml"]
LOADED = f"""
import sys
from gptoss_convert.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], []])
def test_the_groups_help_loads_nothing_heavy(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-P", "-c", LOADED, *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    assert result.stderr.splitlines()[-1] == "[]"


def test_the_groups_help_comes_within_half_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-P", "-m", "gptoss_convert", "--help"], capture_output=True, text=True, check=True
        )
        assert "convert" in result.stdout
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.5


def test_the_verbs_help_names_every_option(in_process: Cli) -> None:
    code, out, _ = in_process("convert", "--help")
    assert code == 0
    for option in (
        "--to",
        "--experts",
        "--dense",
        "--split-size",
        "--threads",
        "--dry-run",
        "--no-proof",
        "--overwrite",
        "--gate-proj",
    ):
        assert option in out
