"""Each way a conversion can fail has its exit code and its sentence, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import SMALL, Model, write_hf

from gptoss_convert import cli
from gptoss_convert.convert import conversion, run
from gptoss_convert.errors import InputChanged
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.output import Output

COMMAND = [sys.executable, "-P", "-m", "gptoss_convert", "convert"]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def in_process(capfd: pytest.CaptureFixture[str]) -> Cli:
    """The command in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            cli.main(["convert", *map(str, arguments)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        else:
            code = 0
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """A source that the test may change."""
    write_hf(Model(SMALL), tmp_path / "in")
    return tmp_path / "in"


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- the target --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["gguf", "hf"])
def test_a_target_that_exists_is_8_and_stays(to: str, hf_folder: Path, tmp_path: Path, in_process: Cli) -> None:
    target = tmp_path / "m.gguf"
    target.write_bytes(b"mine")
    code, out, err = in_process(hf_folder, target, "--to", to)
    assert (code, out) == (8, "")
    assert "the target exists" in err
    assert "--overwrite" in err
    assert (target.read_bytes(), left(tmp_path)) == (b"mine", {"m.gguf"})
    # A folder takes the place of a folder only, a file of a file.
    assert in_process(hf_folder, target, "--to", to, "--overwrite")[0] == (8 if to == "hf" else 0)
    assert left(tmp_path) == ({"m.gguf"} if to == "hf" else {"m.gguf", "m.gguf.certificate.json"})


def test_a_second_run_on_the_same_target_is_8_and_does_not_disturb_the_first(
    hf_folder: Path, tmp_path: Path, in_process: Cli
) -> None:
    target = tmp_path / "m.gguf"
    with Output(target, folder=False) as first:
        first.open("a plan", [("m.gguf", 1000)])
        first.write("m.gguf", 0, b"first")
        for more in ([], ["--dense", "f32"], ["--experts", "q8_0"], ["--no-proof"]):
            code, _, err = in_process(hf_folder, target, "--to", "gguf", *more)
            assert code == 8
            assert "another run is writing" in err
        # A second run that fails for a reason of its own must not take the first one's work with it.
        assert in_process(tmp_path / "nothing", target, "--to", "gguf")[0] == 3
        assert in_process(hf_folder, target, "--to", "gguf", "--tokenizer", tmp_path / "nothing")[0] == 3
        assert first.path("m.gguf").read_bytes() == b"first" + bytes(995)
        first.publish()
    assert target.read_bytes().startswith(b"first")


def test_two_runs_at_once_make_one_artifact(hf_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    runs = [
        subprocess.Popen([*COMMAND, str(hf_folder), str(target), "--to", "gguf"], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    codes = [process.wait(120) for process in runs]
    errors = [process.stderr.read() for process in runs if process.stderr]
    assert sorted(codes) in ([0, 8, 8],), errors
    assert left(tmp_path) == {"m.gguf", "m.gguf.certificate.json"}


# --- the disk ----------------------------------------------------------------------------------------------------------


def can_unshare() -> bool:
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True, timeout=10, check=False).returncode == 0
    except OSError:
        return False


unshared = pytest.mark.skipif(not can_unshare(), reason="mounts of one's own are not allowed here")
MOUNT = """
set -e
mount -t tmpfs -o size={size} tmpfs "$1"
{then}
shift
set +e
"$@"
echo "code $?"
ls -A "{folder}"
df --output=used "{folder}" | tail -1
"""


def in_mount(folder: Path, size: str, then: str, *command: str) -> tuple[int, list[str], str]:
    """A command with a file system of its own on `folder`: exit code, what it left there, stderr."""
    folder.mkdir()
    script = MOUNT.format(size=size, then=then, folder=folder)
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", str(folder), *command],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    lines = result.stdout.splitlines()
    assert len(lines) >= 2, result.stderr
    return int(lines[0].removeprefix("code ")), lines[1:-1], result.stderr


@unshared
@pytest.mark.parametrize("size", ["64k", "1m"])
def test_a_full_disk_is_7_before_anything_is_read(size: str, hf_folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    code, names, err = in_mount(disk, size, ":", *COMMAND, str(hf_folder), str(disk / "m.gguf"), "--to", "gguf")
    assert code == 7, err
    assert "not enough space on the target's disk" in err
    assert "free some space" in err
    assert names == []


@unshared
def test_a_disk_that_is_full_of_an_earlier_attempt_is_freed(hf_folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    fill = f'head -c 900000 /dev/zero > "{disk}/other"'
    code, names, err = in_mount(disk, "2m", fill, *COMMAND, str(hf_folder), str(disk / "m.gguf"), "--to", "gguf")
    assert (code, names) == (7, ["other"]), err


@unshared
def test_a_read_only_target_is_7(hf_folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    for to in ("gguf", "hf"):
        target = disk / ("m.gguf" if to == "gguf" else "m")
        code, names, err = in_mount(
            disk, "9m", 'mount -o remount,ro "$1"', *COMMAND, str(hf_folder), str(target), "--to", to
        )
        assert code == 7, err
        assert "Read-only file system" in err
        assert "may be written" in err
        assert names == []
        disk.rmdir()


def test_a_limit_on_file_sizes_is_7(hf_folder: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [*COMMAND, str(hf_folder), str(tmp_path / "m.gguf"), "--to", "gguf", "--json"],
        capture_output=True, text=True, timeout=120, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )  # fmt: skip
    assert result.returncode == 7, result.stderr
    assert json.loads(result.stdout)["exit_code"] == 7
    assert left(tmp_path) == set()


@pytest.mark.parametrize("after", [0, 17, 60])
def test_a_write_that_fails_midway_is_7(
    after: int, hf_folder: Path, tmp_path: Path, in_process: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, calls = os.pwrite, 0

    def fail(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(28, "No space left on device")
        return true(*arguments)

    monkeypatch.setattr("gptoss_convert.formats.output.os.pwrite", fail)
    code, out, err = in_process(hf_folder, tmp_path / "m.gguf", "--to", "gguf")
    monkeypatch.undo()
    assert (code, out) == (7, "")
    assert "not enough space" in err
    assert left(tmp_path) == set()


def test_a_target_below_a_file_is_7(hf_folder: Path, tmp_path: Path, in_process: Cli) -> None:
    (tmp_path / "file").write_bytes(b"")
    code, _, err = in_process(hf_folder, tmp_path / "file" / "m.gguf", "--to", "gguf")
    assert code == 7, err
    assert left(tmp_path) == {"file"}


# --- the source --------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def modify(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x3c")


def replace_by_copy(path: Path) -> None:
    shutil.copyfile(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "modified": modify,
    "replaced": replace_by_copy,
    "removed": Path.unlink,
    "appended to": lambda path: path.open("ab").write(b"more") and None,
}


@pytest.fixture(params=["at the first step", "at the last step", "during the proof"])
def moment(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Have something done once at a moment of the run."""

    def at(action: Callable[[], Any]) -> None:
        if request.param == "during the proof":
            prove = conversion.prove

            def later(*arguments: Any, **options: Any) -> Any:
                action()
                return prove(*arguments, **options)

            monkeypatch.setattr(conversion, "prove", later)
            return
        step, wanted, calls = run.do_step, {"at the first step": 1, "at the last step": 84}[request.param], 0

        def counted(*arguments: Any) -> str:
            nonlocal calls
            calls += 1
            if calls == wanted:
                action()
            return step(*arguments)

        monkeypatch.setattr(run, "do_step", counted)

    return at


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_under_the_run_is_9(
    change: str, moment: Callable[[Callable[[], Any]], None], own_folder: Path, tmp_path: Path, in_process: Cli
) -> None:
    path = sorted(own_folder.glob("*.safetensors"))[-1]
    moment(lambda: CHANGES[change](path))
    code, out, err = in_process(own_folder, tmp_path / "m.gguf", "--to", "gguf", "--threads", "1")
    assert (code, out) == (9, ""), err
    assert path.name in err
    assert left(tmp_path) == {"in"}


def test_a_source_that_is_truncated_beforehand_is_3_and_named(
    own_folder: Path, tmp_path: Path, in_process: Cli
) -> None:
    path = sorted(own_folder.glob("*.safetensors"))[1]
    truncate(path)
    code, _, err = in_process(own_folder, tmp_path / "m.gguf", "--to", "gguf")
    assert code == 3
    assert path.name in err
    assert "truncated" in err
    assert left(tmp_path) == {"in"}


def test_a_read_that_fails_is_no_traceback(
    own_folder: Path, tmp_path: Path, in_process: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, calls = os.preadv, 0

    def fail(*arguments: Any) -> int:
        nonlocal calls
        # Of the source alone: the unfinished output is read back by the same call.
        of_source = str(Path(f"/proc/self/fd/{arguments[0]}").readlink()).startswith(str(own_folder))
        calls += of_source
        if of_source and calls > 60:
            raise OSError(5, "Input/output error")
        return true(*arguments)

    monkeypatch.setattr("gptoss_convert.formats.files.os.preadv", fail)
    code, _, err = in_process(own_folder, tmp_path / "m.gguf", "--to", "gguf")
    monkeypatch.undo()
    assert code in (3, 9), err
    assert "Traceback" not in err
    assert "Input/output error" in err
    assert left(tmp_path) == {"in"}


# --- the rest ----------------------------------------------------------------------------------------------------------


def test_a_missing_source_is_3_and_a_missing_tokenizer_10(
    hf_folder: Path, tmp_path: Path, in_process: Cli, layouts: Any
) -> None:
    assert in_process(tmp_path / "nothing", tmp_path / "m.gguf", "--to", "gguf")[0] == 3
    code, _, err = in_process(layouts["original"], tmp_path / "m.gguf", "--to", "gguf")
    assert code == 10
    assert "--tokenizer" in err
    assert left(tmp_path) == set()


def test_a_failed_proof_is_11(
    hf_folder: Path, tmp_path: Path, in_process: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = run.piece_bytes

    def spoil(*arguments: Any) -> Any:
        data = true(*arguments).copy()
        data.reshape(-1).view("u1")[0] ^= 4
        return data

    monkeypatch.setattr(run, "piece_bytes", spoil)
    code, out, err = in_process(hf_folder, tmp_path / "m.gguf", "--to", "gguf", "--json")
    assert code == 11
    assert json.loads(out)["error"] == "ProofFailed"
    assert "nothing was written" in err
    assert left(tmp_path) == set()


def test_a_mistake_of_the_program_is_70_and_asks_for_a_report(
    hf_folder: Path, tmp_path: Path, in_process: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(*_: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(run, "do_step", mistake)
    code, out, err = in_process(hf_folder, tmp_path / "m.gguf", "--to", "gguf", "--json")
    assert code == 70
    assert json.loads(out)["exit_code"] == 70
    assert "please report it" in err
    assert left(tmp_path) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--to", "ggml"],
        ["--to", "gguf", "--experts", "q9"],
        ["--to", "gguf", "--split-size", "-4"],
        [],
        ["--to", "gguf", "--split-size", "4XB"],
        ["--to", "gguf", "--threads", "-1"],
        ["--to", "hf", "--experts", "mxfp4"],
        ["--to", "hf", "--nonsense"],
    ],
)
def test_a_wrong_command_is_2(arguments: list[str], hf_folder: Path, tmp_path: Path, in_process: Cli) -> None:
    code, _, err = in_process(hf_folder, tmp_path / "m.gguf", *arguments)
    assert code == 2
    assert "Traceback" not in err
    assert left(tmp_path) == set()


def test_a_source_file_tells_each_kind_of_change(tmp_path: Path) -> None:
    for name, change in CHANGES.items():
        path = tmp_path / name
        path.write_bytes(bytes(1000))
        with SourceFile(path) as file:
            file.check_unchanged()
            change(path)
            with pytest.raises(InputChanged):
                file.check_unchanged()
