"""The steps of a run, without a model: what is skipped, what is done again, whose files are replaced, who may work at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gptoss_convert.convert.pipeline_steps import MANIFEST, STATE, Steps
from gptoss_convert.errors import BadInput, CannotWrite, TargetExists, UsageError

Events = list[Mapping[str, Any]]


class Folder:
    """An OUT, and its steps run one at a time, each in a run of its own."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.events: Events = []

    def steps(self, recipe: str = "r.toml") -> Steps:
        return Steps(self.out, recipe, self.events.append)

    def do(
        self, name: str = "make", inputs: object = 1, *, files: str = "a.gguf", work: Callable[[], None] | None = None
    ) -> str:
        """The last event. files: what the step makes, in the folder `a` where they are several."""
        names = files.split()
        places = [self.out / names[0]] if len(names) == 1 else [self.out / "a"]

        def write() -> None:
            for file in names:
                path = self.out / file
                path.parent.mkdir(exist_ok=True)
                path.write_text(f"{file} from {inputs}")

        with self.steps() as steps:
            steps.do(name, "r.toml, line 7", inputs, places, work or write)
        return str(self.events[-1]["event"])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "out")


def test_a_step_is_done_once_and_again_when_its_inputs_change(folder: Folder) -> None:
    assert [folder.do(), folder.do(), folder.do(inputs=2), folder.do(inputs=2)] == [
        "done",
        "skipped",
        "done",
        "skipped",
    ]
    assert (folder.out / "a.gguf").read_text() == "a.gguf from 2"


def test_what_is_damaged_or_gone_is_made_again(folder: Folder) -> None:
    folder.do()
    (folder.out / "a.gguf").write_text("damaged")
    assert folder.do() == "done"
    (folder.out / "a.gguf").unlink()
    assert folder.do() == "done"
    assert (folder.out / "a.gguf").read_text() == "a.gguf from 1"


def test_a_file_of_the_users_in_a_folder_of_ours_is_not_replaced(folder: Folder) -> None:
    folder.do(files="a/one a/two")
    (folder.out / "a" / "notes.txt").write_text("mine")
    with pytest.raises(TargetExists, match="no run of this recipe") as error:
        folder.do(files="a/one a/two")
    assert str(error.value.file).endswith("a/notes.txt")
    (folder.out / "a" / "notes.txt").unlink()
    assert folder.do(files="a/one a/two") == "skipped"


def test_a_step_that_makes_something_else_now_does_not_take_a_place_of_the_users(folder: Folder) -> None:
    folder.do(files="a.gguf")
    (folder.out / "a").mkdir()
    (folder.out / "a" / "notes.txt").write_text("mine")
    with pytest.raises(TargetExists):
        folder.do(inputs=2, files="a/one a/two")
    assert (folder.out / "a" / "notes.txt").read_text() == "mine"


def test_a_step_may_go_back_to_what_it_made_before(folder: Folder) -> None:
    folder.do(files="a.gguf")
    folder.do(inputs=2, files="a/one a/two")
    assert (folder.out / "a.gguf").exists()
    assert folder.do(files="a.gguf") == "done"
    assert folder.do(inputs=2, files="a/one a/two") == "done"


def test_a_place_that_was_given_up_may_become_the_users(folder: Folder) -> None:
    folder.do(files="a.gguf")
    (folder.out / "a.gguf").unlink()
    folder.do(inputs=2, files="a/one a/two")
    (folder.out / "a.gguf").write_text("mine")
    with pytest.raises(TargetExists):
        folder.do(files="a.gguf")


def test_what_a_killed_step_has_left_is_its_own(folder: Folder) -> None:
    def killed() -> None:
        (folder.out / "a.gguf").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.do(work=killed)
    assert folder.do() == "done"
    with pytest.raises(KeyboardInterrupt):
        folder.do(inputs=2, work=killed)
    assert folder.do(inputs=1) == "done"
    assert (folder.out / "a.gguf").read_text() == "a.gguf from 1"


def test_the_manifest_goes_before_anything_that_it_names_changes(folder: Folder) -> None:
    folder.do()
    (folder.out / MANIFEST).write_text("{}")
    folder.do()
    assert (folder.out / MANIFEST).exists()

    def look() -> None:
        assert not (folder.out / MANIFEST).exists()
        (folder.out / "a.gguf").write_text("new")

    assert folder.do(inputs=2, work=look) == "done"


def test_a_failure_is_told_with_its_step_its_code_and_its_line(folder: Folder) -> None:
    def fail() -> None:
        raise UsageError("no such type", found="q44")

    with pytest.raises(UsageError) as error:
        folder.do("convert a", work=fail)
    assert folder.events[-1] == {"event": "failed", "step": "convert a", "exit_code": 2}
    assert error.value.file == "r.toml, line 7"


def test_what_a_step_made_is_removed_unless_somebody_has_changed_it(folder: Folder) -> None:
    folder.do(files="a/one a/two")
    (folder.out / "a" / "two").write_text("changed")
    with folder.steps() as steps:
        steps.remove("make")
        steps.remove("never made")
    assert [path.name for path in (folder.out / "a").iterdir()] == ["two"]
    assert folder.events[-1] == {"event": "removed", "step": "make"}


def test_a_folder_that_is_empty_then_is_removed_as_well(folder: Folder) -> None:
    folder.do(files="a/one a/two")
    (folder.out / MANIFEST).write_text("{}")
    with folder.steps() as steps:
        steps.remove("make")
    assert sorted(path.name for path in folder.out.iterdir()) == [STATE], "and the manifest that names it"


def test_two_runs_are_not_at_work_at_once(folder: Folder) -> None:
    with folder.steps(), pytest.raises(TargetExists, match="another run"), folder.steps():
        pass
    assert folder.do() == "done"


def test_two_recipes_do_not_share_a_folder(folder: Folder) -> None:
    folder.do()
    with pytest.raises(TargetExists, match="another recipe") as error, folder.steps("other.toml"):
        pass
    assert (error.value.found, error.value.expected) == ("r.toml", "other.toml")


def test_a_file_where_the_folder_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(CannotWrite, match="cannot write"), Folder(tmp_path / "out").steps():
        pass


@pytest.mark.parametrize(
    "spoil",
    [
        {"schema": "other"},
        {"steps": []},
        {"steps": {"make": 3}},
        {"steps": {"make": {"key": "x"}}},
        {"steps": {"make": {"key": "x", "made": {"a": 1}, "before": {}, "claims": []}}},
        {"steps": {"make": {"key": "x", "made": {}, "before": {}, "claims": "a"}}},
    ],
)
def test_a_state_that_is_none_is_bad_input(folder: Folder, spoil: dict[str, Any]) -> None:
    folder.do()
    state = json.loads((folder.out / STATE).read_text())
    (folder.out / STATE).write_text(json.dumps({**state, **spoil}))
    with pytest.raises(BadInput, match="not the state of a run"):
        folder.do()
