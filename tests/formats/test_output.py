"""Output: nothing under the target's name before all is there; a killed run is taken up; runs keep off each other."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gptoss_convert.errors import BadInput, CannotWrite, TargetExists
from gptoss_convert.formats import output as module
from gptoss_convert.formats.output import JOURNAL, Output, write_atomically

MARKER = "gptoss-certificate.json"
FILES = [("a.gguf", 1000), ("b.gguf", 0), ("c.gguf", 70)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(output: Output) -> None:
    output.write("a.gguf", 0, b"1" * 600)
    output.write("a.gguf", 600, memoryview(b"2" * 400))
    output.write("c.gguf", 0, b"3" * 70)


def killed(target: Path, plan: str = "plan", records: int = 3) -> None:
    """What a run leaves that was killed after some steps."""
    output = Output(target, folder=True)
    output.open(plan, FILES)
    fill(output)
    for i in range(records):
        output.record({"step": i, "digest": "d"})
    output.close()


def test_a_folder_appears_at_once_and_whole(tmp_path: Path) -> None:
    with Output(tmp_path / "out", folder=True) as output:
        assert output.open("plan", FILES) == []
        assert names(tmp_path) == [".out.partial"]
        assert {n: output.path(n).stat().st_size for n, _ in FILES} == dict(FILES)
        fill(output)
        output.write_small("small.json", b"{}")
        output.publish()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a.gguf", "b.gguf", "c.gguf", "small.json"]
    assert (tmp_path / "out" / "a.gguf").read_bytes() == b"1" * 600 + b"2" * 400


def test_a_file_appears_at_once_with_its_certificate_beside_it(tmp_path: Path) -> None:
    with Output(tmp_path / "out.gguf", folder=False) as output:
        output.open("plan", [("out.gguf", 5)])
        output.write("out.gguf", 0, b"whole")
        assert output.read("out.gguf", 1, 3) == b"hol"
        output.publish({"out.gguf.certificate.json": b"{}"})
    assert names(tmp_path) == ["out.gguf", "out.gguf.certificate.json"]
    assert (tmp_path / "out.gguf").read_bytes() == b"whole"


def test_folders_above_are_made(tmp_path: Path) -> None:
    with Output(tmp_path / "a" / "b" / "out", folder=True) as output:
        output.open("plan", FILES)
        output.publish()
    assert (tmp_path / "a" / "b" / "out" / "c.gguf").stat().st_size == 70


@pytest.mark.parametrize("kind", ["a file", "a folder", "a dangling link"])
@pytest.mark.parametrize("folder", [True, False])
def test_what_exists_is_not_replaced_unasked(kind: str, folder: bool, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if kind == "a file":
        target.write_bytes(b"mine")
    elif kind == "a folder":
        target.mkdir()
        (target / "mine").write_bytes(b"mine")
    else:
        target.symlink_to("nowhere")
    with pytest.raises(TargetExists, match="exists") as error:
        Output(target, folder=folder)
    assert "--overwrite" in str(error.value.remedy)
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with Output(tmp_path / "out", folder=True) as output:
        output.open("plan", FILES)
        output.publish()
    assert names(tmp_path) == ["out"]
    assert len(names(tmp_path / "out")) == 3


def test_a_target_that_appears_meanwhile_is_not_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    with pytest.raises(TargetExists), Output(tmp_path / "out", folder=True) as output:
        output.open("plan", FILES)
        (tmp_path / "out").write_bytes(b"somebody's")
        output.publish()
    assert (tmp_path / "out").read_bytes() == b"somebody's"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("before", ["a file", "a link", "somebody's folder"])
def test_overwriting_a_folder_replaces_only_one_of_ours(before: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if before == "a file":
        target.write_bytes(b"old")
    else:
        folder = target if before == "somebody's folder" else tmp_path / "elsewhere"
        folder.mkdir()
        (folder / "thesis").write_bytes(b"old")
        if before == "a link":
            target.symlink_to(folder)
    with pytest.raises(TargetExists):
        Output(target, folder=True, overwrite=True)
    assert os.path.lexists(target)


def test_a_hidden_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "letter").write_text("dear")
    (tmp_path / ".out.partial").symlink_to(precious)
    with pytest.raises(TargetExists, match="did not write"), Output(tmp_path / "out", folder=True) as output:
        output.open("plan", FILES)
    (tmp_path / ".out.partial").unlink()
    precious.rename(tmp_path / ".out.partial")
    with pytest.raises(TargetExists, match="did not write"), Output(tmp_path / "out", folder=True) as output:
        output.open("plan", FILES)
    assert (tmp_path / ".out.partial" / "letter").read_text() == "dear"
    (tmp_path / ".out.partial" / "letter").unlink()
    (tmp_path / "victim").write_text("dear")
    (tmp_path / ".out.partial" / JOURNAL).symlink_to(tmp_path / "victim")
    with pytest.raises(TargetExists, match="did not write"), Output(tmp_path / "out", folder=True) as output:
        output.open("plan", FILES)
    assert (tmp_path / "victim").read_text() == "dear"


def test_overwriting_replaces_a_folder_when_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / MARKER).write_bytes(b"{}")
    with Output(target, folder=True, overwrite=True) as output:
        output.open("plan", FILES)
        assert names(target) == [MARKER]
        output.publish()
    assert names(tmp_path) == ["out"]
    assert names(target) == ["a.gguf", "b.gguf", "c.gguf"]


def test_overwriting_with_a_failure_keeps_the_old(tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"old")
    with pytest.raises(BadInput), Output(tmp_path / "out.gguf", folder=False, overwrite=True) as output:
        output.open("plan", [("out.gguf", 5)])
        raise BadInput("corrupt")
    assert names(tmp_path) == ["out.gguf"]
    assert (tmp_path / "out.gguf").read_bytes() == b"old"


def test_a_folder_is_never_overwritten_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "out.gguf").mkdir()
    with pytest.raises(TargetExists, match="stands in the target's place"):
        Output(tmp_path / "out.gguf", folder=False, overwrite=True)
    assert names(tmp_path) == ["out.gguf"]


def test_a_run_killed_while_replacing_does_not_block_the_next(tmp_path: Path) -> None:
    for left in ([".out.replaced"], [".out.replaced", "out"]):
        for name in left:
            (tmp_path / name).mkdir()
            (tmp_path / name / MARKER).write_bytes(b"old")
        with Output(tmp_path / "out", folder=True, overwrite=True) as output:
            output.open("plan", FILES)
            output.publish()
        assert names(tmp_path) == ["out"]
        assert names(tmp_path / "out") == ["a.gguf", "b.gguf", "c.gguf"]
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        (tmp_path / "out").rmdir()


# --- taking up ---------------------------------------------------------------------------------------------------------


def test_a_killed_runs_records_come_back_for_the_same_plan(tmp_path: Path) -> None:
    killed(tmp_path / "out")
    with Output(tmp_path / "out", folder=True) as output:
        assert output.open("plan", FILES) == [{"step": i, "digest": "d"} for i in range(3)]
        assert output.read("a.gguf", 599, 2) == b"12"
        output.close()


def test_another_plan_starts_clean(tmp_path: Path) -> None:
    killed(tmp_path / "out")
    (tmp_path / ".out.partial" / "other.gguf").write_bytes(b"x")
    with Output(tmp_path / "out", folder=True) as output:
        assert output.open("other plan", FILES) == []
        assert output.read("a.gguf", 0, 1000) == bytes(1000)
        output.publish()
    assert names(tmp_path / "out") == ["a.gguf", "b.gguf", "c.gguf"]


@pytest.mark.parametrize(
    ("tail", "kept"),
    [(b'{"step": 3, "dig', 3), (b"\x00" * 40 + b"\n", 3), (b"\xff\xfe\n", 3), (b"[1]\n", 3), (b"[" * 9999 + b"\n", 3)],
)
def test_a_torn_or_spoiled_end_of_the_journal_costs_only_that(tail: bytes, kept: int, tmp_path: Path) -> None:
    killed(tmp_path / "out")
    with (tmp_path / ".out.partial" / JOURNAL).open("ab") as file:
        file.write(tail)
    with Output(tmp_path / "out", folder=True) as output:
        assert len(output.open("plan", FILES)) == kept
        output.record({"step": 7, "digest": "e"})  # must not join the torn line
        output.close()
    with Output(tmp_path / "out", folder=True) as output:
        assert [record["step"] for record in output.open("plan", FILES)] == [0, 1, 2, 7]
        output.close()


@pytest.mark.parametrize(
    "text", [b"", b"\n", b"null\n", b'{"plan": "pl', b"\x00" * 100, b'{"step": 0, "digest": "d"}\n']
)
def test_a_journal_that_does_not_name_the_plan_is_worth_nothing(text: bytes, tmp_path: Path) -> None:
    killed(tmp_path / "out")
    (tmp_path / ".out.partial" / JOURNAL).write_bytes(text)
    with Output(tmp_path / "out", folder=True) as output:
        assert output.open("plan", FILES) == []
        output.record({"step": 0, "digest": "d"})
        output.close()
    lines = (tmp_path / ".out.partial" / JOURNAL).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"plan": "plan"}, {"step": 0, "digest": "d"}]


def test_files_of_a_wrong_size_are_brought_to_theirs(tmp_path: Path) -> None:
    killed(tmp_path / "out")
    partial = tmp_path / ".out.partial"
    (partial / "a.gguf").write_bytes(b"9" * 5000)
    (partial / "c.gguf").write_bytes(b"9")
    with Output(tmp_path / "out", folder=True) as output:
        output.open("plan", FILES)
        assert {n: (partial / n).stat().st_size for n, _ in FILES} == dict(FILES)
        output.close()


def test_a_planted_link_in_the_hidden_folder_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    killed(tmp_path / "out")
    (tmp_path / ".out.partial" / "a.gguf").unlink()
    (tmp_path / ".out.partial" / "a.gguf").symlink_to(tmp_path / "precious")
    with pytest.raises(TargetExists), Output(tmp_path / "out", folder=True) as output:
        output.open("plan", FILES)
    assert (tmp_path / "precious").read_bytes() == b"precious"


# --- keeping apart -----------------------------------------------------------------------------------------------------


def test_a_second_run_is_told_and_does_no_harm(tmp_path: Path) -> None:
    with Output(tmp_path / "out", folder=True) as first:
        first.open("plan", FILES)
        fill(first)
        for plan in ("plan", "another"):
            with pytest.raises(TargetExists, match="another run"), Output(tmp_path / "out", folder=True) as second:
                second.open(plan, FILES)
        first.publish()
    assert (tmp_path / "out" / "a.gguf").read_bytes() == b"1" * 600 + b"2" * 400


def test_a_run_that_fails_before_it_begins_leaves_anothers_work_alone(tmp_path: Path) -> None:
    """Another's that is going on, and one's own that was killed: a mistyped option must not cost hours of work."""
    with Output(tmp_path / "out", folder=True) as first:
        first.open("plan", FILES)
        fill(first)
        with pytest.raises(BadInput), Output(tmp_path / "out", folder=True):
            raise BadInput("a source that does not open")
        assert first.path("a.gguf").stat().st_size == 1000
        first.publish()
    killed(tmp_path / "later")
    with pytest.raises(BadInput), Output(tmp_path / "later", folder=True):
        raise BadInput("an option that does not fit")
    with Output(tmp_path / "later", folder=True) as output:
        assert len(output.open("plan", FILES)) == 3
        output.close()


def test_a_journal_that_its_run_has_removed_meanwhile_is_not_taken_for_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run ends between our opening of its journal and our locking it."""
    first = Output(tmp_path / "out", folder=True)
    first.open("plan", FILES)
    true = module.fcntl.flock

    def late(fd: int, how: int) -> None:
        first.discard()
        true(fd, how)

    monkeypatch.setattr(module.fcntl, "flock", late)
    with pytest.raises(TargetExists), Output(tmp_path / "out", folder=True) as second:
        second.open("plan", FILES)


# --- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [BadInput, CannotWrite, RuntimeError, MemoryError])
def test_a_failure_leaves_nothing_behind(error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error), Output(tmp_path / "out", folder=True) as output:
        output.open("plan", FILES)
        fill(output)
        raise error("failed")
    assert names(tmp_path) == []


def test_an_interruption_keeps_the_work(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Output(tmp_path / "out", folder=True) as output:
        output.open("plan", FILES)
        output.record({"step": 0})
        raise KeyboardInterrupt
    assert names(tmp_path) == [".out.partial"]
    with Output(tmp_path / "out", folder=True) as output:  # the lock is free again
        assert output.open("plan", FILES) == [{"step": 0}]
        output.close()


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    test_an_interruption_keeps_the_work(tmp_path)
    for i, end in enumerate((BadInput, TargetExists)):
        with pytest.raises(end), Output(tmp_path / f"out{i}", folder=True) as output:
            output.open("plan", FILES)
            raise end("end")
    assert len(os.listdir("/proc/self/fd")) == before


def failing(code: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_each_failure_of_the_system_is_cannot_write_and_leaves_nothing(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.os, call, failing(code))
    with pytest.raises(CannotWrite) as error, Output(tmp_path / "out", folder=True) as output:
        output.open("plan", FILES)
        fill(output)
        output.write_small("small", b"x")
        output.publish()
    full = code in (errno.ENOSPC, errno.EDQUOT)
    assert ("not enough space" in str(error.value)) == full
    assert error.value.found == os.strerror(code)
    assert names(tmp_path) == []


def test_a_system_that_cannot_reserve_still_looks_for_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    with Output(tmp_path / "out", folder=True) as output:
        output.open("plan", FILES)
        output.publish()
    assert (tmp_path / "out" / "a.gguf").stat().st_size == 1000
    with pytest.raises(CannotWrite, match="not enough space"), Output(tmp_path / "huge", folder=True) as output:
        output.open("plan", [("a.gguf", 1 << 55)])
    assert names(tmp_path) == ["out"]


def test_a_file_where_the_hidden_folder_belongs_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").write_bytes(b"mine")
    with pytest.raises(TargetExists), Output(tmp_path / "out", folder=True) as output:
        output.open("plan", FILES)
    assert (tmp_path / ".out.partial").read_bytes() == b"mine"


def test_a_whole_small_file_is_written_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "list", b"one")
    write_atomically(tmp_path / "list", b"two")
    assert (tmp_path / "list").read_bytes() == b"two"
    monkeypatch.setattr(module.os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(CannotWrite):
        write_atomically(tmp_path / "list", b"three")
    assert (tmp_path / "list").read_bytes() == b"two"
    assert names(tmp_path) == ["list"]
