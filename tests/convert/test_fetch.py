"""fetch: against a hub on loopback that corrupts, truncates, dies and lies."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.hub import Hub, git_sha1, pinned, serve, sha256, small_safetensors, table

from gptoss_convert.convert import fetch as engine
from gptoss_convert.convert import official
from gptoss_convert.convert.official import Table
from gptoss_convert.convert.verify import verify
from gptoss_convert.convert.verify_report import Report, Status
from gptoss_convert.errors import (
    BadInput,
    CannotWrite,
    DigestMismatch,
    ExitCode,
    NetworkError,
    TargetExists,
    UsageError,
)

REPO, COMMIT = "openai/gpt-oss-20b", "6" * 40
SHARD = "model-00000-of-00000.safetensors"
FILES = {
    SHARD: small_safetensors(0, 60_000),
    "tokenizer.json": b'{"version": "1.0"}' * 50,
    "config.json": b'{"model_type": "gpt_oss"}',
    "README.md": b"# newest",
    "original/config.json": b"{}",
    "original/model.safetensors": small_safetensors(1, 70_000),
    "metal/model.bin": b"GPT-OSS v1.0\0" + bytes(range(100)),
}
ROOT = [name for name in FILES if "/" not in name]
PINS = table(pinned(REPO, COMMIT, FILES))
NO_PINS = table()


@pytest.fixture(autouse=True)
def _no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the hub client away from the user's cache and token, and let its retries not wait."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf-home" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(Hub(REPO, COMMIT, dict(FILES), branches={"main": COMMIT})) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def get(target: Path, repo: str = REPO, **options: Any) -> Report:
    return engine.fetch(repo, target, **{"table": PINS, **options})


def names(target: Path) -> list[str]:
    """The files of the target, without bookkeeping."""
    paths = (path.relative_to(target) for path in target.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if path.parts[0] != ".cache")


def test_the_pinned_revision_of_an_official_model_is_fetched_and_verified(hub: Hub, tmp_path: Path) -> None:
    seen: list[int] = []
    report = get(tmp_path / "m", progress=seen.append)
    assert (report.exit_code(), report.official, report.revision) == (ExitCode.OK, True, COMMIT)
    assert names(tmp_path / "m") == sorted(ROOT)
    assert all((tmp_path / "m" / name).read_bytes() == FILES[name] for name in ROOT)
    assert sum(seen) == sum(len(FILES[name]) for name in ROOT)
    assert not (tmp_path / "hf-home" / "hub").exists()


def test_what_was_fetched_is_verified_offline_afterwards(hub: Hub, tmp_path: Path) -> None:
    get(tmp_path / "m", repo=REPO, table=NO_PINS, revision=COMMIT, layout="all")
    report = verify(tmp_path / "m", table=NO_PINS)
    assert report.exit_code() == ExitCode.OK
    assert {r.algorithm for r in report.results} == {"sha256", "git-sha1"}
    assert {r.authority for r in report.results} == {"hub tree record @66666666"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layout": "original"}, ["original/config.json", "original/model.safetensors"]),
        ({"layout": "metal"}, ["metal/model.bin"]),
        ({"layout": "all"}, sorted(FILES)),
        ({"layout": "metal", "include": ["tok*.json"]}, ["metal/model.bin", "tokenizer.json"]),
    ],
)
def test_a_layout_or_some_files_alone_are_fetched(
    hub: Hub, tmp_path: Path, options: dict[str, Any], expected: list[str]
) -> None:
    report = get(tmp_path / "m", **options)
    assert names(tmp_path / "m") == [result.name for result in report.results] == expected
    assert report.exit_code() == ExitCode.OK


@pytest.mark.parametrize("pins", [PINS, NO_PINS])
@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_corrupt_download_is_named_and_deleted_and_a_rerun_gets_the_good_bytes(
    hub: Hub, tmp_path: Path, name: str, pins: Table
) -> None:
    hub.corrupt.add(name)
    report = get(tmp_path / "m", revision=COMMIT, table=pins)
    (bad,) = [result for result in report.results if result.name == name]
    assert (bad.status, report.exit_code(), report.official) == (Status.MISMATCHED, ExitCode.MISMATCH, False)
    assert bad.found != bad.expected
    assert "deleted" in bad.reason
    assert names(tmp_path / "m") == sorted(set(ROOT) - {name})
    hub.corrupt.clear()
    hub.requests.clear()
    report = get(tmp_path / "m", revision=COMMIT, table=pins)
    assert report.exit_code() == ExitCode.OK
    assert (tmp_path / "m" / name).read_bytes() == FILES[name]
    assert [hub.downloads(other) > 0 for other in ROOT] == [other == name for other in ROOT]


def test_when_every_file_is_corrupt_none_is_left(hub: Hub, tmp_path: Path) -> None:
    hub.corrupt |= set(FILES)
    report = get(tmp_path / "m")
    assert report.counts["mismatched"] == len(ROOT)
    assert names(tmp_path / "m") == []


def test_a_truncated_download_is_a_network_error_and_leaves_nothing_under_the_name(hub: Hub, tmp_path: Path) -> None:
    hub.short.add(SHARD)
    with pytest.raises(NetworkError) as caught:
        get(tmp_path / "m")
    assert "run the same command again" in str(caught.value.remedy)
    assert SHARD not in names(tmp_path / "m")
    hub.short.clear()
    assert get(tmp_path / "m").exit_code() == ExitCode.OK
    assert names(tmp_path / "m") == sorted(ROOT)


def test_a_server_that_dies_midway_loses_only_what_was_under_way(hub: Hub, tmp_path: Path) -> None:
    hub.dies_after = 30_000
    ready = engine.plan(REPO, tmp_path / "m", table=PINS)
    with pytest.raises(NetworkError) as caught:
        engine.run(ready, workers=1)
    assert SHARD in str(caught.value.file)
    assert names(tmp_path / "m") == sorted(set(ROOT) - {SHARD})
    hub.dies_after, hub.dead = None, False
    hub.requests.clear()
    kept = names(tmp_path / "m")
    assert get(tmp_path / "m").exit_code() == ExitCode.OK
    assert [hub.downloads(name) for name in kept] == [0] * len(kept)
    assert list(tmp_path.rglob("*.incomplete")) == []


def test_leftovers_of_a_killed_run_are_swept_and_a_complete_one_is_checked_before_it_is_used(
    hub: Hub, tmp_path: Path
) -> None:
    staging = tmp_path / "m" / engine.PRIVATE / "fetch"
    bookkeeping = staging / ".cache" / "huggingface" / "download"
    bookkeeping.mkdir(parents=True)
    (bookkeeping / "half.incomplete").write_bytes(b"x" * 100)
    for name, content in {SHARD: FILES[SHARD], "config.json": b"{corrupt on the disk!!!!}"}.items():
        (staging / name).write_bytes(content)
        # As the hub client leaves it behind: from now on it takes the staged file for the right one.
        (bookkeeping / f"{name}.metadata").write_text(f"{COMMIT}\n{'e' * 64}\n{time.time() + 10}\n")
    report = get(tmp_path / "m")
    assert {r.name for r in report.results if r.status is Status.MISMATCHED} == {"config.json"}
    assert (hub.downloads(SHARD), (tmp_path / "m" / SHARD).read_bytes()) == (0, FILES[SHARD])
    assert list(tmp_path.rglob("*.incomplete")) == []
    assert get(tmp_path / "m").exit_code() == ExitCode.OK


def test_a_corrupt_blob_in_the_users_hub_cache_is_not_taken_up(hub: Hub, tmp_path: Path) -> None:
    snapshot = tmp_path / "hf-home/hub/models--openai--gpt-oss-20b/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / SHARD).write_bytes(b"x" * len(FILES[SHARD]))
    assert get(tmp_path / "m").exit_code() == ExitCode.OK
    assert hub.downloads(SHARD) > 0


def test_a_hub_that_offers_another_file_than_the_pinned_one_is_refused_before_the_download(
    hub: Hub, tmp_path: Path
) -> None:
    hub.files[SHARD] = small_safetensors(9, 60_000)
    with pytest.raises(DigestMismatch) as caught:
        get(tmp_path / "m")
    assert (caught.value.found, caught.value.expected) == (sha256(hub.files[SHARD]), sha256(FILES[SHARD]))
    assert not (tmp_path / "m").exists()
    assert hub.downloads(SHARD) == 0


def test_a_hub_whose_listing_is_right_and_whose_bytes_are_not_is_caught(hub: Hub, tmp_path: Path) -> None:
    hub.listed_otherwise[SHARD] = FILES[SHARD]
    hub.files[SHARD] = small_safetensors(9, 60_000)
    assert get(tmp_path / "m").exit_code() == ExitCode.MISMATCH
    assert SHARD not in names(tmp_path / "m")


def test_a_listing_that_names_files_outside_the_folder_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files["../evil"] = b"x"
    with pytest.raises(BadInput, match="outside its folder"):
        get(tmp_path / "m", layout="all")
    assert not (tmp_path / "m").exists()


def test_files_of_the_target_with_other_contents_are_replaced_only_on_request(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes(b"mine")
    (tmp_path / "m" / "notes.txt").write_bytes(b"kept")
    with pytest.raises(TargetExists, match=r"config\.json"):
        get(tmp_path / "m")
    assert (tmp_path / "m" / "config.json").read_bytes() == b"mine"
    report = get(tmp_path / "m", repair=True)
    assert (report.exit_code(), (tmp_path / "m" / "config.json").read_bytes()) == (ExitCode.OK, FILES["config.json"])
    assert (tmp_path / "m" / "notes.txt").read_bytes() == b"kept"


def test_a_corrupt_replacement_leaves_the_file_that_was_there(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes(b"mine")
    hub.corrupt.add("config.json")
    assert get(tmp_path / "m", repair=True).exit_code() == ExitCode.MISMATCH
    assert (tmp_path / "m" / "config.json").read_bytes() == b"mine"


def test_two_runs_into_one_folder_do_not_mix(hub: Hub, tmp_path: Path) -> None:
    with engine._locked(tmp_path / "m"), pytest.raises(TargetExists, match="another run"):
        get(tmp_path / "m")


def test_a_full_disk_is_found_out_before_the_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = engine.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(engine.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CannotWrite, match="not enough space"):
        get(tmp_path / "m")
    assert hub.downloads(SHARD) == 0


# --- revisions and repositories --------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", ["main", "v1.0", "66666666", COMMIT.replace("6", "G")])
def test_anything_but_a_commit_is_refused_with_the_way_to_pin(hub: Hub, tmp_path: Path, revision: str) -> None:
    with pytest.raises(UsageError) as caught:
        get(tmp_path / "m", revision=revision)
    assert "git ls-remote" in str(caught.value.remedy)
    assert hub.requests == []


def test_an_unpinned_repository_needs_a_revision(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no revision"):
        get(tmp_path / "m", table=NO_PINS)


def test_a_moving_name_that_is_allowed_is_resolved_once_and_reported(hub: Hub, tmp_path: Path) -> None:
    report = get(tmp_path / "m", revision="main", allow_moving=True)
    assert (report.exit_code(), report.revision) == (ExitCode.OK, COMMIT)
    assert any(f"--revision {COMMIT}" in note for note in report.notes)


def test_an_unpinned_commit_of_an_official_model_may_have_other_small_files(tmp_path: Path, hub: Hub) -> None:
    hub.commit = "9" * 40
    hub.files["config.json"] = b'{"newer": true}'
    report = get(tmp_path / "m", revision="9" * 40)
    assert (report.exit_code(), report.official) == (ExitCode.OK, False)
    (config,) = [result for result in report.results if result.name == "config.json"]
    assert (config.authority, config.expected) == ("hub tree record @99999999", git_sha1(hub.files["config.json"]))


@pytest.mark.parametrize(
    ("repo", "options", "error"),
    [
        ("not-a-repo", {}, UsageError),
        ("../evil", {}, UsageError),
        ("someone/unheard-of", {"revision": COMMIT}, NetworkError),
        (REPO, {"revision": "1" * 40}, NetworkError),
        (REPO, {"layout": "gguf"}, UsageError),
    ],
)
def test_a_wrong_name_is_told_from_a_broken_network(
    hub: Hub, tmp_path: Path, repo: str, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        get(tmp_path / "m", repo=repo, **options)


def test_a_private_repository_asks_for_a_login(hub: Hub, tmp_path: Path) -> None:
    hub.private = True
    with pytest.raises(NetworkError) as caught:
        get(tmp_path / "m")
    assert "log in" in str(caught.value.remedy)


def test_no_server_at_all_is_a_network_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(NetworkError):
            get(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_selection_that_fits_nothing_is_an_error(hub: Hub, tmp_path: Path) -> None:
    for name in list(hub.files):
        if name.startswith("metal/"):
            del hub.files[name]
    with pytest.raises(UsageError, match="fits no file"):
        get(tmp_path / "m", layout="metal")


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    from gptoss_convert.cli.fetch import command

    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_the_command_exits_by_the_answer_and_prints_one_json_document(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(official, "load", lambda: PINS)
    hub.corrupt.add(SHARD)
    result = run(REPO, tmp_path / "m", "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["exit_code"], document["counts"]["mismatched"]) == (4, 4, 1)
    hub.corrupt.clear()
    result = run(REPO, tmp_path / "m")
    assert result.exit_code == 0, result.output
    assert "official? yes" in result.stdout


def test_the_command_hands_a_network_error_to_the_one_handler(hub: Hub, tmp_path: Path) -> None:
    hub.dead = True
    result = run(REPO, tmp_path / "m", "--revision", COMMIT)
    assert isinstance(result.exception, NetworkError)
    assert result.exception.code == ExitCode.NETWORK
    assert os.environ["HF_ENDPOINT"] == hub.url
