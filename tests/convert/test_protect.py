"""What a command reads it does not write over, and what stands there only where it was told to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from gptoss_convert.convert.protect import files_given, files_read, protect_inputs, require_place
from gptoss_convert.convert.source import open_source
from gptoss_convert.errors import CannotWrite, TargetExists, UsageError


def test_a_target_that_is_an_input_or_holds_one_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "folder" / "model.gguf"
    source.parent.mkdir()
    source.touch()
    (tmp_path / "link").symlink_to(source)
    for target in (source, source.parent, tmp_path, tmp_path / "link"):
        with pytest.raises(UsageError, match="take the place of what it is made from") as error:
            protect_inputs(target, [Path("/elsewhere"), source])
        assert error.value.found == str(source)
    protect_inputs(source.parent / "beside.html", [source])


def test_a_link_in_circles_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "a")
    protect_inputs(tmp_path / "a", [tmp_path / "model.gguf"])


def test_of_a_folder_every_file_but_pages_is_an_input(hf_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(hf_folder, folder)
    (folder / "report.html").touch()
    given = set(files_given(folder, None, tmp_path / "nothing"))
    assert given == {folder, *folder.iterdir()} - {folder / "report.html"}
    with open_source(folder) as source:
        assert set(files_read(source, None)) < given


def test_a_taken_name_is_free_with_overwrite_only(tmp_path: Path) -> None:
    place = tmp_path / "report.html"
    require_place(place, overwrite=False)
    place.write_text("mine")
    with pytest.raises(TargetExists, match="the target exists"):
        require_place(place, overwrite=False)
    require_place(place, overwrite=True)
    assert place.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("kind", ["link", "folder", "special file"])
def test_what_is_no_file_is_never_overwritten(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "report.html"
    if kind == "link":
        place.symlink_to(tmp_path / "nowhere")
    elif kind == "folder":
        place.mkdir()
    else:
        os.mkfifo(place)
    with pytest.raises(TargetExists, match="something else") as error:
        require_place(place, overwrite=True)
    assert error.value.found == f"a {kind}"


@pytest.mark.parametrize("name", ["missing/report.html", "file/report.html", "r" * 250 + ".html"])
def test_a_place_where_nothing_can_be_written_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite) as error:
        require_place(tmp_path / name, overwrite=False)
    assert error.value.file == str(tmp_path / name)
    assert error.value.remedy is not None
