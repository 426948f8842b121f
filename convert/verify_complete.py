"""What should be there: the layouts of the recognised repository, and what somebody promises and the source lacks."""

from __future__ import annotations

from gptoss_convert.convert import official
from gptoss_convert.convert.verify_report import FileResult, Layout, Status
from gptoss_convert.convert.verify_sources import Subject
from gptoss_convert.errors import BadInput
from gptoss_convert.formats.files import read_json
from gptoss_convert.formats.tree import TreeFile


def completeness(subject: Subject) -> tuple[list[Layout], list[FileResult]]:
    """The layouts of the recognised repository, and a MISSING result for every promised file that is absent."""
    if subject.single:
        return [], []
    present = {file.name for file in subject.files}
    layouts, missing = _layouts(subject, present)
    for record in subject.records:
        for name, claims in record.files.items() if record.promises else ():
            if name not in present and not (subject.root / name).is_file():
                missing.append(_missing(name, claims[0].authority, claims[0].digest, "listed, but not there"))
    for file in subject.files:
        if file.name.endswith(".safetensors.index.json"):
            missing += _missing_shards(file, present, subject.notes)
    return layouts, missing


def _layouts(subject: Subject, present: set[str]) -> tuple[list[Layout], list[FileResult]]:
    repo = subject.repo
    if repo is None:
        return [], []
    inside = {name: pin for name, pin in repo.files.items() if name.startswith(subject.prefix)}
    here = {name for name in inside if name.removeprefix(subject.prefix) in present}
    groups = list(dict.fromkeys(pin.layout for pin in sorted(inside.values(), key=lambda pin: pin.name.count("/"))))
    with_weights = {inside[name].layout for name in here if inside[name].is_weights or "index" in name}
    at_hand = with_weights or {inside[name].layout for name in here if name not in official.DOCUMENTS}
    layouts, missing = [], []
    for group in groups:
        members = [pin for pin in inside.values() if pin.layout == group and pin.size is not None]
        absent = sorted(pin.name for pin in members if pin.name not in here)
        needed = tuple(name for name in absent if name not in official.DOCUMENTS)
        documents = tuple(name for name in absent if name in official.DOCUMENTS)
        state = "not downloaded" if group not in at_hand else "incomplete" if needed else "complete"
        title = official.layout_title(group, repo)
        layouts.append(Layout(title, state, () if group not in at_hand else needed, documents))
        for name in needed if group in at_hand else ():
            pin = inside[name]
            reason = f"belongs to the {title} of {repo.repo}"
            missing.append(_missing(name.removeprefix(subject.prefix), pin.authority, pin.sha256, reason))
    return layouts, missing


def _missing_shards(index: TreeFile, present: set[str], notes: list[str]) -> list[FileResult]:
    """The files that an index sends its reader to and that are not there."""
    try:
        weights = read_json(index.path).get("weight_map")
    except BadInput as error:
        notes.append(f"{index.name}: {error.what}")
        return []
    folder = index.name[: index.name.rfind("/") + 1]
    names = {name for name in weights.values() if isinstance(name, str)} if isinstance(weights, dict) else set()
    absent = sorted(folder + name for name in names if folder + name not in present)
    return [_missing(name, index.name, None, f"{index.name} sends its reader to this file") for name in absent]


def _missing(name: str, authority: str, digest: str | None, reason: str) -> FileResult:
    return FileResult(name, None, Status.MISSING, reason, "size", authority=authority, expected=digest)
