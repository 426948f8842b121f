"""verify: what is verified, mismatched, missing or unknown, and on whose word."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.hub import git_sha1, pinned, sha256, small_safetensors, table

from gptoss_convert.cli.verify import command
from gptoss_convert.convert import official
from gptoss_convert.convert import verify as engine
from gptoss_convert.convert.official import Table
from gptoss_convert.convert.verify import manifest_document, verify, write_manifest
from gptoss_convert.convert.verify_report import FileResult, Report, Status
from gptoss_convert.errors import BadInput, ExitCode, InputChanged, Refused, TargetExists
from gptoss_convert.formats.digests import format_sums, hash_file

REPO, COMMIT = "openai/gpt-oss-20b", "6" * 40
SHARDS = [f"model-0000{i}-of-00001.safetensors" for i in range(2)]
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()
ROOT = {
    SHARDS[0]: small_safetensors(0),
    SHARDS[1]: small_safetensors(1, 5000),
    "model.safetensors.index.json": INDEX,
    "config.json": b'{"model_type": "gpt_oss"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "chat_template.jinja": b"{{ messages }} as of now",
    "generation_config.json": b'{"do_sample": true}',
    "README.md": b"# read me, newest",
    "LICENSE": b"license",
}
ORIGINAL = {"original/model.safetensors": small_safetensors(3, 7000), "original/config.json": b'{"n": 1}'}
METAL = {"metal/model.bin": b"GPT-OSS v1.0\0" + bytes(range(200))}
OLD_TEMPLATE, LOST_TEMPLATE = b"{{ messages }} on release day", b"{{ messages }} at upload"
PREFIX = {"name": "chat_template.jinja", "size": None, "sha256_prefix": sha256(LOST_TEMPLATE)[:8], "seen": "upload"}
PINS = table(
    pinned(
        REPO,
        COMMIT,
        ROOT | ORIGINAL | METAL,
        older={"chat_template.jinja": ("@old", OLD_TEMPLATE)},
        prefixes=[PREFIX],
        without_digest=("metal/model.bin",),
    ),
    pinned(
        "openai/gpt-oss-120b", "7" * 40, {"config.json": b'{"layers": 36}', "model-0.safetensors": small_safetensors(9)}
    ),
)


def put(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def check(source: Path, **options: Any) -> Report:
    return verify(source, **{"table": PINS, "threads": 2, **options})


def of(report: Report, name: str) -> FileResult:
    (result,) = [result for result in report.results if result.name == name]
    return result


def flip(content: bytes, at: int = -1) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


def tree_record(path: Path, files: dict[str, bytes]) -> None:
    entries: dict[str, dict[str, object]] = {}
    for name, content in files.items():
        entries[name] = {"size": len(content), "blob_id": git_sha1(content)}
        if name.endswith(".safetensors"):
            entries[name] |= {"lfs_sha256": sha256(content), "lfs_size": len(content)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format_version": 1, "files": entries}))


# --- the official model ----------------------------------------------------------------------------------------------


def test_a_complete_official_download_is_verified_and_called_official(tmp_path: Path) -> None:
    report = check(put(tmp_path, ROOT))
    assert {r.status for r in report.results} == {Status.VERIFIED}
    assert (report.repo, report.official, report.exit_code()) == (REPO, True, ExitCode.OK)
    assert report.answer.startswith("yes: openai/gpt-oss-20b, HF layout")
    shard = of(report, SHARDS[0])
    assert (shard.authority, shard.grade, shard.algorithm) == (f"official {REPO} @66666666", "A", "sha256")
    assert shard.expected == shard.found == sha256(ROOT[SHARDS[0]])


def test_layouts_that_were_not_downloaded_are_named_and_not_missing(tmp_path: Path) -> None:
    report = check(put(tmp_path, ROOT))
    assert {layout.title: layout.state for layout in report.layouts} == {
        "HF layout": "complete",
        "original/": "not downloaded",
        "metal/": "not downloaded",
    }


def test_an_original_folder_with_the_roots_small_files_lacks_no_shards(tmp_path: Path) -> None:
    files = ORIGINAL | {name: ROOT[name] for name in ("tokenizer.json", "config.json")}
    report = check(put(tmp_path, files))
    assert (report.official, report.exit_code()) == (True, ExitCode.OK)
    assert [layout.state for layout in report.layouts] == ["not downloaded", "complete", "not downloaded"]


def test_the_contents_of_original_alone_are_recognised_in_their_place(tmp_path: Path) -> None:
    report = check(put(tmp_path, {name.removeprefix("original/"): content for name, content in ORIGINAL.items()}))
    assert (report.official, report.exit_code()) == (True, ExitCode.OK)


def test_missing_documents_do_not_matter_and_a_missing_shard_does(tmp_path: Path) -> None:
    files = {name: content for name, content in ROOT.items() if name not in ("README.md", "LICENSE")}
    report = check(put(tmp_path, files))
    assert report.exit_code() == ExitCode.OK
    assert report.layouts[0].absent_documents == ("LICENSE", "README.md")
    (tmp_path / SHARDS[1]).unlink()
    report = check(tmp_path)
    assert of(report, SHARDS[1]).status is Status.MISSING
    assert (report.layouts[0].state, report.official, report.exit_code()) == ("incomplete", False, ExitCode.MISMATCH)


@pytest.mark.parametrize("name", [SHARDS[0], "config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"])
def test_one_changed_bit_is_a_mismatch(tmp_path: Path, name: str) -> None:
    report = check(put(tmp_path, ROOT | {name: flip(ROOT[name])}))
    result = of(report, name)
    assert (result.status, result.stage, report.exit_code()) == (Status.MISMATCHED, "digest", ExitCode.MISMATCH)
    assert (result.expected, result.found) == (sha256(ROOT[name]), sha256(flip(ROOT[name])))
    assert not report.official
    assert report.answer == "no: 1 mismatched"


def test_changed_tensors_and_another_model_are_told_apart(tmp_path: Path) -> None:
    put(tmp_path, ROOT | {SHARDS[0]: flip(ROOT[SHARDS[0]])})
    assert "header agrees" in of(check(tmp_path), SHARDS[0]).reason
    other = ROOT[SHARDS[0]].replace(b"model.weight", b"other.weight")
    put(tmp_path, {SHARDS[0]: other})
    assert of(check(tmp_path), SHARDS[0]).reason == "another model"


def test_zeros_at_the_end_of_a_file_are_mentioned(tmp_path: Path) -> None:
    content = ROOT[SHARDS[1]][:900] + bytes(len(ROOT[SHARDS[1]]) - 900)
    assert "zero bytes" in of(check(put(tmp_path, ROOT | {SHARDS[1]: content})), SHARDS[1]).reason


def test_an_older_official_version_of_a_small_file_is_verified_as_such(tmp_path: Path) -> None:
    report = check(put(tmp_path, ROOT | {"chat_template.jinja": OLD_TEMPLATE}))
    result = of(report, "chat_template.jinja")
    assert (result.status, result.authority) == (Status.VERIFIED, f"official, older revision, {REPO} @old")
    assert (result.grade, report.exit_code()) == ("C", ExitCode.OK)


def test_a_digest_known_by_its_first_digits_is_named_and_not_verified(tmp_path: Path) -> None:
    report = check(put(tmp_path, ROOT | {"chat_template.jinja": LOST_TEMPLATE}))
    result = of(report, "chat_template.jinja")
    assert result.status is Status.UNKNOWN
    assert "upload" in result.reason
    assert report.exit_code() == ExitCode.UNKNOWN


def test_another_readme_is_unknown_and_never_verified(tmp_path: Path) -> None:
    report = check(put(tmp_path, ROOT | {"README.md": b"# an older one"}))
    assert of(report, "README.md").status is Status.UNKNOWN
    assert (report.official, report.exit_code()) == (True, ExitCode.UNKNOWN)


def test_a_file_whose_digest_nobody_published_is_unknown_and_refuted_by_its_size(tmp_path: Path) -> None:
    report = check(put(tmp_path, METAL), repo=REPO)
    result = of(report, "metal/model.bin")
    assert (result.status, report.official, report.exit_code()) == (Status.UNKNOWN, False, ExitCode.UNKNOWN)
    assert "never been published" in result.reason
    report = check(put(tmp_path, {"metal/model.bin": METAL["metal/model.bin"][:-1]}), repo=REPO)
    assert of(report, "metal/model.bin").status is Status.MISMATCHED


def test_a_stray_file_is_unknown_unless_it_is_allowed_by_name(tmp_path: Path) -> None:
    report = check(put(tmp_path, ROOT | {"notes.txt": b"mine", "extra.safetensors": small_safetensors(8, 111)}))
    assert {r.name for r in report.results if r.status is Status.UNKNOWN} == {"notes.txt", "extra.safetensors"}
    assert report.exit_code() == ExitCode.UNKNOWN
    assert report.exit_code(["*.txt"]) == ExitCode.UNKNOWN
    assert report.exit_code(["*.txt", "extra.*"]) == ExitCode.OK


@pytest.mark.parametrize(
    ("name", "is_official"), [("photo.png", True), ("modeling.py", False), ("m.safetensors", False)]
)
def test_a_stray_file_that_a_loader_might_take_makes_a_folder_unofficial(
    tmp_path: Path, name: str, is_official: bool
) -> None:
    report = check(put(tmp_path, ROOT | {name: small_safetensors(8)}))
    assert (report.official, report.exit_code()) == (is_official, ExitCode.UNKNOWN)
    assert report.answer.startswith("yes" if is_official else "only in part")


def test_allowing_everything_does_not_verify_anything(tmp_path: Path) -> None:
    assert check(put(tmp_path, {"model.gguf": b"GGUF1234"})).exit_code(["*"]) == ExitCode.UNKNOWN


def test_another_official_models_file_in_the_wrong_place_is_a_mismatch(tmp_path: Path) -> None:
    report = check(put(tmp_path, ROOT | {"config.json": b'{"layers": 36}'}))
    assert of(report, "config.json").status is Status.MISMATCHED


def test_an_official_file_under_another_name_is_recognised_by_its_digest(tmp_path: Path) -> None:
    report = check(put(tmp_path, {"renamed.safetensors": ROOT[SHARDS[0]], "tokenizer.json": ROOT["tokenizer.json"]}))
    result = of(report, "renamed.safetensors")
    assert (result.status, result.official) == (Status.VERIFIED, True)
    assert f"{SHARDS[0]} under another name" in result.reason
    assert (report.repo, report.official) == (None, False)
    assert report.answer.startswith("only in part")


def test_a_single_official_file_is_verified_by_its_digest(tmp_path: Path) -> None:
    put(tmp_path, {"model.safetensors": ORIGINAL["original/model.safetensors"], "stray": b"x"})
    report = check(tmp_path / "model.safetensors")
    assert [(r.name, r.status) for r in report.results] == [("model.safetensors", Status.VERIFIED)]
    assert report.exit_code() == ExitCode.OK


def test_a_single_file_that_claims_to_be_official_is_held_to_it(tmp_path: Path) -> None:
    put(tmp_path, {"model.safetensors": flip(ORIGINAL["original/model.safetensors"])})
    assert check(tmp_path / "model.safetensors").exit_code() == ExitCode.UNKNOWN
    assert check(tmp_path / "model.safetensors", repo=REPO).exit_code() == ExitCode.MISMATCH


def test_a_republished_file_is_verified_but_not_official(tmp_path: Path) -> None:
    gguf = b"GGUF" + bytes(range(64))
    pins = table(pinned("ggml-org/gpt-oss-20b-GGUF", "1" * 40, {"m.gguf": gguf}, publisher="ggml-org, not OpenAI"))
    put(tmp_path, {"m.gguf": gguf})
    report = check(tmp_path, table=pins)
    assert (report.exit_code(), report.official) == (ExitCode.OK, False)
    assert "not OpenAI" in str(of(report, "m.gguf").authority)
    assert check(tmp_path, table=pins, require_official=True).exit_code() == ExitCode.UNKNOWN


def test_a_model_that_only_resembles_the_official_one_can_say_so(tmp_path: Path) -> None:
    files = ROOT | {SHARDS[0]: flip(ROOT[SHARDS[0]])}
    put(tmp_path, files | {"SHA256SUMS": format_sums({n: sha256(c) for n, c in files.items()}).encode()})
    assert check(tmp_path).exit_code() == ExitCode.MISMATCH
    report = check(tmp_path, repo="none")
    assert (report.repo, report.exit_code(), report.official) == (None, ExitCode.OK, False)
    assert of(report, SHARDS[0]).authority == "SHA256SUMS SHA256SUMS"


# --- what a file is ---------------------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3000\n"
PAGE = b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (POINTER, "git-LFS pointer"),
        (PAGE, "HTML page"),
        (b"", "empty"),
        (bytes(100), "zero bytes"),
        (b"Not Found", "text"),
    ],
)
def test_what_stands_where_a_shard_should_be_is_named(tmp_path: Path, content: bytes, named: str) -> None:
    for options in ({}, {"repo": "none"}):
        report = check(put(tmp_path, ROOT | {SHARDS[0]: content}), **options)
        result = of(report, SHARDS[0])
        assert result.status is Status.MISMATCHED
        assert named in result.reason


def test_a_pointer_of_the_right_size_is_still_named(tmp_path: Path) -> None:
    padded = PAGE + b" " * (len(ROOT[SHARDS[0]]) - len(PAGE))
    result = of(check(put(tmp_path, ROOT | {SHARDS[0]: padded})), SHARDS[0])
    assert (result.status, result.stage) == (Status.MISMATCHED, "header")
    assert "HTML" in result.reason


def test_a_pointer_that_a_list_vouches_for_is_no_model_file(tmp_path: Path) -> None:
    put(tmp_path, {"m.gguf": POINTER, "SHA256SUMS": format_sums({"m.gguf": sha256(POINTER)}).encode()})
    assert of(check(tmp_path), "m.gguf").status is Status.MISMATCHED


def test_a_truncated_file_is_caught_by_its_size_before_it_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, {SHARDS[0]: ROOT[SHARDS[0]][:-7]})
    monkeypatch.setattr(engine, "hash_files", lambda paths, **_: pytest.fail("hashed") if paths else {})
    result = of(check(tmp_path, repo=REPO), SHARDS[0])
    assert (result.stage, result.found) == ("size", f"{len(ROOT[SHARDS[0]]) - 7} bytes")
    assert "7 bytes short" in result.reason


def test_a_truncated_file_that_nobody_knows_is_caught_by_its_own_header(tmp_path: Path) -> None:
    put(tmp_path, {"mine.safetensors": small_safetensors(8)[:-7]})
    result = of(check(tmp_path), "mine.safetensors")
    assert (result.status, result.authority) == (Status.MISMATCHED, "its own header")
    assert "truncated" in result.reason


def test_a_pickle_is_unknown_and_named_and_not_opened(tmp_path: Path) -> None:
    put(tmp_path, {"pytorch_model.bin": b"\x80\x02}q\x00."})
    assert "pickle" in of(check(tmp_path), "pytorch_model.bin").reason


def test_a_published_header_that_differs_saves_the_hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = table(pinned(REPO, COMMIT, ROOT, header_grade="published"))
    put(tmp_path, {SHARDS[0]: ROOT[SHARDS[0]].replace(b"model.weight", b"other.weight")})
    monkeypatch.setattr(engine, "hash_files", lambda paths, **_: pytest.fail("hashed") if paths else {})
    result = of(check(tmp_path, repo=REPO, table=pins), SHARDS[0])
    assert (result.status, result.stage) == (Status.MISMATCHED, "header")


def test_a_derived_header_digest_never_refutes_what_the_full_digest_proves(tmp_path: Path) -> None:
    entry = pinned(REPO, COMMIT, ROOT)
    entry[REPO]["files"][SHARDS[0]]["header_sha256"] = "0" * 64
    assert check(put(tmp_path, ROOT), table=table(entry)).exit_code() == ExitCode.OK


# --- quick -----------------------------------------------------------------------------------------------------------


def test_a_quick_look_never_verifies(tmp_path: Path) -> None:
    report = check(put(tmp_path, ROOT), quick=True)
    assert {r.status for r in report.results} == {Status.UNKNOWN}
    assert (of(report, SHARDS[0]).stage, of(report, "config.json").stage) == ("header", "size")
    assert "contents not hashed" in of(report, SHARDS[0]).reason
    assert (report.official, report.exit_code(), report.exit_code(["*"])) == (False, ExitCode.UNKNOWN, ExitCode.UNKNOWN)
    assert report.answer.startswith("not established")


def test_a_quick_look_finds_wrong_sizes_and_wrong_headers(tmp_path: Path) -> None:
    other = ROOT[SHARDS[1]].replace(b"model.weight", b"other.weight")
    report = check(put(tmp_path, ROOT | {SHARDS[0]: b"short", SHARDS[1]: other}), quick=True)
    assert [of(report, name).status for name in SHARDS] == [Status.MISMATCHED] * 2
    assert [of(report, name).stage for name in SHARDS] == ["size", "header"]
    assert report.exit_code() == ExitCode.MISMATCH


def test_a_quick_look_at_one_file_says_what_its_header_is_like(tmp_path: Path) -> None:
    put(tmp_path, {"m.safetensors": flip(ROOT[SHARDS[1]]), "n.safetensors": small_safetensors(5, 77), "n.txt": b"x"})
    assert "header agrees with official" in check(tmp_path / "m.safetensors", quick=True).results[0].reason
    assert "no authority" in check(tmp_path / "n.safetensors", quick=True).results[0].reason
    assert check(tmp_path / "n.txt", quick=True).results[0].status is Status.UNKNOWN


# --- lists -----------------------------------------------------------------------------------------------------------

MINE = {"model.gguf": b"GGUF" + bytes(300), "sub/vocab.txt": b"words"}


def test_a_sums_file_in_the_folder_verifies_on_its_own_word(tmp_path: Path) -> None:
    put(tmp_path, MINE | {"SHA256SUMS": format_sums({n: sha256(c) for n, c in MINE.items()}).encode()})
    report = check(tmp_path)
    assert [(r.name, r.status) for r in report.results] == [(name, Status.VERIFIED) for name in sorted(MINE)]
    assert (report.exit_code(), report.official) == (ExitCode.OK, False)
    assert "proves no origin" in str(report.records[0]["trust"])
    assert report.answer.startswith("not by official digests")
    assert check(tmp_path, require_official=True).exit_code() == ExitCode.UNKNOWN


def test_a_listed_file_that_is_absent_is_missing_and_an_unlisted_one_unknown(tmp_path: Path) -> None:
    sums = format_sums({"model.gguf": sha256(MINE["model.gguf"]), "gone": "0" * 64})
    report = check(put(tmp_path, MINE | {"SHA256SUMS": sums.encode()}))
    assert {r.name: r.status for r in report.results} == {
        "gone": Status.MISSING,
        "model.gguf": Status.VERIFIED,
        "sub/vocab.txt": Status.UNKNOWN,
    }


def test_a_list_found_in_the_folder_does_not_excuse_a_contradiction_of_the_pins(tmp_path: Path) -> None:
    files = ROOT | {SHARDS[0]: flip(ROOT[SHARDS[0]])}
    put(tmp_path, files | {"SHA256SUMS": format_sums({n: sha256(c) for n, c in files.items()}).encode()})
    result = of(check(tmp_path), SHARDS[0])
    assert (result.status, result.authority) == (Status.MISMATCHED, f"official {REPO} @66666666")


def test_not_even_a_list_that_the_user_names_excuses_it(tmp_path: Path) -> None:
    put(tmp_path / "m", ROOT | {"config.json": b"changed"})
    sums = put(tmp_path, {"S": format_sums({"config.json": sha256(b"changed")}).encode()}) / "S"
    assert of(check(tmp_path / "m", sums=sums), "config.json").status is Status.MISMATCHED


def test_a_stale_list_beside_official_files_is_only_noted(tmp_path: Path) -> None:
    report = check(put(tmp_path, ROOT | {"SHA256SUMS": format_sums({"config.json": "0" * 64}).encode()}))
    assert of(report, "config.json").status is Status.VERIFIED
    assert "SHA256SUMS lists another digest" in of(report, "config.json").reason


def test_the_list_that_the_user_names_must_agree_even_with_official_files(tmp_path: Path) -> None:
    put(tmp_path / "m", ROOT)
    sums = put(tmp_path, {"S": format_sums({"config.json": "0" * 64}).encode()}) / "S"
    report = check(tmp_path / "m", sums=sums)
    assert (of(report, "config.json").status, report.exit_code()) == (Status.MISMATCHED, ExitCode.MISMATCH)


def test_a_named_list_replaces_the_one_found_in_the_folder(tmp_path: Path) -> None:
    put(tmp_path / "m", MINE | {"SHA256SUMS": format_sums(dict.fromkeys(MINE, "0" * 64)).encode()})
    put(tmp_path, {"S": format_sums({n: sha256(c) for n, c in MINE.items()}).encode()})
    assert check(tmp_path / "m").exit_code() == ExitCode.MISMATCH
    report = check(tmp_path / "m", sums=tmp_path / "S")
    assert report.exit_code(("SHA256SUMS",)) == ExitCode.OK
    assert [result.name for result in report.results if result.status is Status.UNKNOWN] == ["SHA256SUMS"]


def test_a_hostile_list_is_noted_when_found_and_refused_when_named(tmp_path: Path) -> None:
    put(tmp_path, MINE | {"SHA256SUMS": f"{'0' * 64}  ../../etc/passwd\n".encode()})
    report = check(tmp_path)
    assert of(report, "SHA256SUMS").status is Status.UNKNOWN
    assert "outside its folder" in report.notes[0]
    with pytest.raises(BadInput, match="outside"):
        check(tmp_path, sums=tmp_path / "SHA256SUMS")


def test_an_index_promises_its_shards(tmp_path: Path) -> None:
    put(tmp_path, {"model.safetensors.index.json": INDEX, SHARDS[0]: small_safetensors(7)})
    report = check(tmp_path, repo="none")
    assert of(report, SHARDS[1]).status is Status.MISSING
    put(tmp_path, {"model.safetensors.index.json": b"{nonsense"})
    assert "not valid JSON" in check(tmp_path, repo="none").notes[0]


# --- the hub's tree record -------------------------------------------------------------------------------------------

OTHER = {"config.json": b"{}", "m.safetensors": small_safetensors(4), "unfetched.safetensors": small_safetensors(5)}


def snapshot(tmp_path: Path, repo: str, commit: str, files: dict[str, bytes]) -> Path:
    folder = tmp_path / f"models--{repo.replace('/', '--')}"
    root = folder / "snapshots" / commit
    for name, content in files.items():
        blob = put(folder / "blobs", {sha256(content): content}) / sha256(content)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(os.path.relpath(blob, (root / name).parent))
    return root


def test_a_snapshot_is_verified_by_the_hubs_own_note_with_the_algorithm_named(tmp_path: Path) -> None:
    here = {name: OTHER[name] for name in ("config.json", "m.safetensors")}
    root = snapshot(tmp_path, "someone/finetune", "5" * 40, here)
    assert check(root).exit_code() == ExitCode.UNKNOWN
    tree_record(tmp_path / "models--someone--finetune" / "trees" / f"{'5' * 40}.json", OTHER)
    report = check(root)
    assert (report.repo, report.revision, report.exit_code()) == ("someone/finetune", "5" * 40, ExitCode.OK)
    assert [r.algorithm for r in report.results] == ["git-sha1", "sha256"]
    assert of(report, "config.json").expected == git_sha1(b"{}")
    assert "proves no origin" in str(report.records[0]["trust"])
    blob = root / "m.safetensors"
    blob.resolve().write_bytes(flip(OTHER["m.safetensors"]))
    assert check(root).exit_code() == ExitCode.MISMATCH


def test_an_official_snapshot_is_held_to_the_pins(tmp_path: Path) -> None:
    root = snapshot(tmp_path, REPO, COMMIT, ROOT | ORIGINAL)
    assert check(root).official
    assert check(root / "original").official
    assert check(root / SHARDS[0]).exit_code() == ExitCode.OK
    (root / SHARDS[0]).resolve().write_bytes(flip(ROOT[SHARDS[0]]))
    assert check(root / SHARDS[0]).exit_code() == ExitCode.MISMATCH


def test_a_newer_official_commit_may_change_small_files_but_no_weights(tmp_path: Path) -> None:
    newer = ROOT | {"chat_template.jinja": b"{{ newer }}"}
    root = snapshot(tmp_path, REPO, "9" * 40, newer)
    record = tmp_path / f"models--{REPO.replace('/', '--')}" / "trees" / f"{'9' * 40}.json"
    report = check(root)
    assert of(report, "chat_template.jinja").status is Status.UNKNOWN
    tree_record(record, newer)
    report = check(root)
    assert of(report, "chat_template.jinja").authority == "hub tree record @99999999"
    assert (report.exit_code(), report.official) == (ExitCode.OK, False)
    tampered = newer | {SHARDS[0]: flip(ROOT[SHARDS[0]])}
    (root / SHARDS[0]).resolve().write_bytes(tampered[SHARDS[0]])
    tree_record(record, tampered)
    assert of(check(root), SHARDS[0]).status is Status.MISMATCHED


def test_a_folder_filled_by_the_hub_client_is_verified_by_any_of_its_tree_records(tmp_path: Path) -> None:
    put(tmp_path, OTHER)
    tree_record(tmp_path / ".cache/huggingface/trees" / f"{'1' * 40}.json", {"m.safetensors": small_safetensors(6)})
    tree_record(tmp_path / ".cache/huggingface/trees" / f"{'2' * 40}.json", OTHER)
    report = check(tmp_path)
    assert report.exit_code() == ExitCode.OK
    assert of(report, "m.safetensors").authority == "hub tree record @22222222"


def test_a_malformed_tree_record_is_noted_and_believed_in_nothing(tmp_path: Path) -> None:
    put(tmp_path, OTHER | {".cache/huggingface/trees/x.json": b"{}"})
    report = check(tmp_path)
    assert (report.exit_code(), len(report.notes)) == (ExitCode.UNKNOWN, 1)


# --- manifests and certificates --------------------------------------------------------------------------------------


def test_a_manifest_that_was_written_verifies_the_same_files_and_nothing_else(tmp_path: Path) -> None:
    report = check(put(tmp_path / "m", MINE))
    assert report.exit_code() == ExitCode.UNKNOWN
    write_manifest(report, tmp_path / "mine.json")
    document = json.loads((tmp_path / "mine.json").read_text())
    assert document["schema"] == "gptoss-convert/manifest/1"
    assert [file["name"] for file in document["files"]] == sorted(MINE)
    assert check(tmp_path / "m", manifest=tmp_path / "mine.json").exit_code() == ExitCode.OK
    (tmp_path / "m" / "model.gguf").write_bytes(flip(MINE["model.gguf"]))
    assert check(tmp_path / "m", manifest=tmp_path / "mine.json").exit_code() == ExitCode.MISMATCH
    with pytest.raises(TargetExists):
        write_manifest(report, tmp_path / "mine.json")
    assert list(tmp_path.glob(".*")) == []


def test_a_manifest_in_the_folder_is_found_and_is_no_file_of_the_model(tmp_path: Path) -> None:
    write_manifest(check(put(tmp_path, MINE)), tmp_path / "gptoss-manifest.json")
    report = check(tmp_path)
    assert (len(report.results), report.exit_code()) == (len(MINE), ExitCode.OK)


def test_no_manifest_is_written_of_a_corrupt_or_unhashed_source(tmp_path: Path) -> None:
    with pytest.raises(Refused):
        manifest_document(check(put(tmp_path, ROOT), quick=True))
    with pytest.raises(Refused, match=r"config\.json"):
        manifest_document(check(put(tmp_path, {"config.json": b"changed"})))


def test_the_certificate_of_a_conversion_is_found_in_a_folder_and_beside_a_file(tmp_path: Path) -> None:
    files = [{"name": n, "size": len(c), "sha256": sha256(c)} for n, c in MINE.items()]
    certificate = json.dumps({"schema": "gptoss-convert/certificate/1", "artifact": {"files": files}}).encode()
    put(tmp_path / "folder", MINE | {"gptoss-certificate.json": certificate})
    assert check(tmp_path / "folder").exit_code() == ExitCode.OK
    put(tmp_path, {"model.gguf": MINE["model.gguf"], "model.gguf.certificate.json": certificate})
    report = check(tmp_path / "model.gguf")
    assert (report.exit_code(), of(report, "model.gguf").authority) == (
        ExitCode.OK,
        "manifest model.gguf.certificate.json",
    )
    (tmp_path / "model.gguf").write_bytes(flip(MINE["model.gguf"]))
    assert check(tmp_path / "model.gguf").exit_code() == ExitCode.MISMATCH
    other = put(tmp_path, {"copy.json": certificate}) / "copy.json"
    # Against a list that the user names, the one found in the folder is a file like any other.
    against = check(tmp_path / "folder", manifest=other)
    assert against.exit_code() == ExitCode.UNKNOWN
    assert against.exit_code(("*certificate.json",)) == ExitCode.OK


def test_a_json_file_that_only_ends_like_a_manifest_is_an_ordinary_file(tmp_path: Path) -> None:
    put(tmp_path, {"web.manifest.json": b'{"name": "app"}'})
    assert of(check(tmp_path), "web.manifest.json").status is Status.UNKNOWN


# --- the rest --------------------------------------------------------------------------------------------------------


def test_every_byte_is_reported_once_whatever_the_outcome(tmp_path: Path) -> None:
    put(tmp_path, ROOT | {SHARDS[0]: b"short", "notes.txt": b"x"})
    seen: list[int] = []
    check(tmp_path, progress=seen.append)
    assert sum(seen) == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_digests_taken_before_are_reused_only_while_the_file_is_the_same(tmp_path: Path) -> None:
    put(tmp_path, ROOT)
    known = {tmp_path / SHARDS[0]: hash_file(tmp_path / SHARDS[0], git_sha1=True)}
    assert check(tmp_path, known=known).exit_code() == ExitCode.OK
    (tmp_path / SHARDS[0]).write_bytes(flip(ROOT[SHARDS[0]]))
    os.utime(tmp_path / SHARDS[0], ns=(1, 1))
    assert check(tmp_path, known=known).exit_code() == ExitCode.MISMATCH


def test_a_file_that_changes_meanwhile_is_an_error_and_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, ROOT)

    def touch(count: int) -> None:
        os.utime(tmp_path / SHARDS[1], ns=(1, 1))

    with pytest.raises(InputChanged):
        check(tmp_path, progress=touch)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no files"):
        check(tmp_path)


def test_an_unpinned_repository_is_said_to_be_unpinned(tmp_path: Path) -> None:
    report = check(put(tmp_path, MINE), repo="someone/model")
    assert "no digests of someone/model" in report.notes[0]


def test_the_package_s_own_table_is_the_default(tmp_path: Path) -> None:
    report = verify(put(tmp_path, {"USAGE_POLICY": b"x" * 200}), repo=REPO)
    assert of(report, "USAGE_POLICY").expected == official.load().repos[REPO].files["USAGE_POLICY"].sha256


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_pins(monkeypatch: pytest.MonkeyPatch) -> Table:
    monkeypatch.setattr(official, "load", lambda: PINS)
    return PINS


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


@pytest.mark.usefixtures("small_pins")
def test_the_command_prints_one_json_document_and_exits_by_the_answer(tmp_path: Path) -> None:
    code, out = run(put(tmp_path, ROOT), "--json")
    document = json.loads(out)
    assert (code, document["exit_code"], document["official"]) == (0, 0, True)
    assert document["schema"] == "gptoss-convert/verify/1"
    assert document["counts"] == {"verified": len(ROOT), "mismatched": 0, "missing": 0, "unknown": 0}
    assert {file["status"] for file in document["files"]} == {"verified"}
    put(tmp_path, {"notes.txt": b"x"})
    assert run(tmp_path, "--json")[0] == 5
    assert run(tmp_path, "--json", "--allow-unknown", "notes.txt")[0] == 0
    assert run(tmp_path, "--quick")[0] == 5
    put(tmp_path, {"config.json": b"changed"})
    assert run(tmp_path, "--json")[0] == 4


@pytest.mark.usefixtures("small_pins")
def test_the_command_s_table_escapes_names_and_shows_grade_and_answer(tmp_path: Path) -> None:
    code, out = run(put(tmp_path, ROOT | {"evil\x1b[31m\u202e.txt": b"x"}))
    assert code == 5
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "evidence A" in out
    assert "official? yes" in out


@pytest.mark.usefixtures("small_pins")
def test_the_command_writes_a_manifest_and_reads_it_again(tmp_path: Path) -> None:
    put(tmp_path / "m", MINE)
    assert run(tmp_path / "m", "--write-manifest", tmp_path / "x.json")[0] == 5
    assert run(tmp_path / "m", "--manifest", tmp_path / "x.json")[0] == 0
    assert run(tmp_path / "m", "--manifest", tmp_path / "x.json", "--official")[0] == 5
