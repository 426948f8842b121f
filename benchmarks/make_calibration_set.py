"""Write the default calibration set, `gptoss_convert/data/calibration.jsonl`: always the same bytes.

    python benchmarks/make_calibration_set.py [FILE]

Its first part is written by hand, in `calibration_texts/*.txt`: conversations that begin with `=== DOMAIN LANGUAGE key=value…`
and consist of sections that begin with `--- KIND`: developer, user, analysis, commentary, final, `call TOOL`, `result TOOL`.
The second part is computed, see calibration_exercises.py. All of it is this project's own text, under its licence.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from calibration_exercises import computed
from calibration_tools import TOOLS, Conversation, as_harmony

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "gptoss_convert" / "data" / "calibration.jsonl"
KINDS = ("developer", "user", "analysis", "commentary", "final", "call", "result")
SECTION = re.compile(rf"^--- ({'|'.join(KINDS)})(?: (\S+))?$", re.MULTILINE)


def handwritten() -> Iterator[Conversation]:
    """The conversations of every file, in the order of the files' names."""
    for path in sorted((HERE / "calibration_texts").glob("*.txt")):
        for block in re.split(r"^=== ", path.read_text("utf-8"), flags=re.MULTILINE)[1:]:
            head, _, body = block.partition("\n")
            yield from_sections(head.split(), body, path)


def from_sections(head: Sequence[str], body: str, path: Path) -> Conversation:
    domain, language, *settings = head
    keys = dict(setting.split("=", 1) for setting in settings)
    parts = SECTION.split(body)
    if parts[0].strip() or len(parts) < 4:
        raise ValueError(f"{path}: text before the first section of {' '.join(head)}")
    sections = [(parts[i], parts[i + 1], parts[i + 2].strip("\n")) for i in range(1, len(parts), 3)]
    tools = [TOOLS[name] for name in keys.get("tools", "").split(",") if name]
    result: Conversation = {"domain": domain, "language": language, "reasoning_effort": keys.get("effort", "medium")}
    result |= {key: keys[key] for key in ("date",) if key in keys} | ({"tools": tools} if tools else {})
    result |= {"builtin_tools": keys["builtin"].split(",")} if "builtin" in keys else {}
    simple = [kind for kind, _, _ in sections if kind not in ("developer", "analysis")] == ["user", "final"]
    return result | (as_chat(sections) if simple else as_harmony(sections))


def as_chat(sections: Sequence[tuple[str, str | None, str]]) -> Conversation:
    texts = {kind: text for kind, _, text in sections}
    messages = [{"role": role, "content": texts[role]} for role in ("developer", "user") if role in texts]
    thinking = {"thinking": texts["analysis"]} if "analysis" in texts else {}
    return {"messages": [*messages, {"role": "assistant", **thinking, "content": texts["final"]}]}


def spread(part: Sequence[Conversation]) -> list[tuple[float, Conversation]]:
    """Every conversation with a place between 0 and 1, neighbours far apart."""
    count = len(part)
    stride = next(step for step in range(int(count * 0.618), count + 2) if math.gcd(step, count) == 1)
    return [((i * stride % count + 0.5) / count, one) for i, one in enumerate(part)]


def made() -> bytes:
    """The whole set, its parts mixed so that the beginning of the file is as diverse as the whole."""
    placed = [*spread(list(handwritten())), *spread(list(computed()))]
    lines = [one for _, one in sorted(placed, key=lambda item: item[0])]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET).write_bytes(made())
