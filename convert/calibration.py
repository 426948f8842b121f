"""What `convert --method importance|gptq --calibration …` adds to a conversion: where it comes from, and what it puts into the
plan.

    --calibration TEXT | default ─► importance: one pass (calibrate.collect) ─► column weights in the plan
                                 └► gptq: a stage of its own before the runner (rounding.Stage)
    --calibration STATS          ─► importance, read (statistics.read_statistics)
    --calibration HESSIANS       ─► gptq by what calibrate --hessians wrote (rounding.FromHessians)

The artifact says what it was calibrated with: method, text, its digest, tokens, and of every expert how many tokens it saw and
how far its own were trusted. GPTQ knows the last two only when it is through, so a GGUF's header is planned with zeros in their
place, and built again with the numbers; it has the same length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptoss_convert import __version__
from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.names import DOWN, GATE_UP, layer_name
from gptoss_convert.convert.plan import OutFile, Plan
from gptoss_convert.convert.progress import ShowProgress
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.statistics import Statistics, read_statistics
from gptoss_convert.convert.walk_memory import walk_bytes
from gptoss_convert.errors import UsageError
from gptoss_convert.formats.gguf import Value, ValueType, array, build_header, header_bytes, string
from gptoss_convert.quant.shrinkage import own_weight, tokens_wanted

if TYPE_CHECKING:
    from gptoss_convert.convert.rounding_matrix import Rounder
    from gptoss_convert.convert.texts import Texts

DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")
METHODS = ("round", "importance", "gptq")
CONTEXT = 2048
TOKENS = 131_072  # of a text, at most, unless asked for more
FILE = "gptoss-calibration.json"
KEY = "gptoss-convert.rounding."
EMPTY_HEADER = header_bytes([], [])


@dataclass(frozen=True)
class Wish:
    """What was asked for. text: "default", a .txt, a .jsonl, or a statistics file (.gguf)."""

    method: str = "round"
    text: str | None = None
    device: str = "cpu"
    context: int = CONTEXT
    tokens: int = TOKENS

    def check(self) -> None:
        """Raise UsageError for what does not fit together."""
        if self.method not in METHODS:
            raise UsageError("no such method", found=self.method, expected=", ".join(METHODS))
        if self.method == "round" and self.text is not None:
            raise UsageError("plain rounding uses no calibration", remedy="give --method importance or --method gptq")
        if self.method != "round" and self.text is None:
            raise UsageError(
                f"--method {self.method} needs --calibration",
                expected="TEXT.txt, CONVERSATIONS.jsonl, STATISTICS.gguf or default",
            )
        if self.method == "gptq" and self.from_statistics:
            raise UsageError(
                "gptq needs the text itself, or whole Hessians", found=self.text,
                remedy="give the text, or the folder that calibrate --hessians wrote, or --method importance",
            )  # fmt: skip
        if self.method == "importance" and self.from_hessians:
            raise UsageError(
                "importance takes a text or a statistics file", found=self.text,
                remedy="give the .gguf that calibrate wrote with the Hessians, or --method gptq",
            )  # fmt: skip
        if not DEVICE.fullmatch(self.device):
            raise UsageError("no such device", found=self.device, expected="cpu, cuda or cuda:N")

    def memory(self, config: ModelConfig) -> int:
        """Bytes that calibration holds at most; 0 where nothing is computed."""
        if self.method == "round" or self.from_statistics:
            return 0
        return walk_bytes(config, self.tokens, self.context, gptq=self.method == "gptq")

    @property
    def path(self) -> Path | None:
        """The text's file, or what calibrate wrote; None for "default" or nothing."""
        return None if self.text in (None, "default") else Path(str(self.text))

    @property
    def from_hessians(self) -> bool:
        """Whether a folder of Hessians is given."""
        return self.text is not None and Path(self.text).is_dir()

    @property
    def from_statistics(self) -> bool:
        """Whether a statistics file is given and not a text."""
        return self.text is not None and Path(self.text).suffix.lower() == ".gguf"


def facts_of(source: Source, texts: Texts, context: int) -> dict[str, Any]:
    """What a statistics file says of itself."""
    return {
        "text": texts.name,
        "text_digest": texts.digest,
        "tokens": texts.tokens,
        "context": context,
        "layout": str(source.layout),
        "version": __version__,
    }


def require_torch() -> None:
    """UsageError where torch is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "this needs torch, which is not installed", remedy="pip install 'gptoss-convert[calibrate]'"
        ) from error


@dataclass
class Calibration:
    """A wish fulfilled as far as it can be before the plan: the statistics, or the text for the stage."""

    wish: Wish
    facts: dict[str, Any]
    config: ModelConfig
    statistics: Statistics | None = None
    texts: Texts | None = None
    hessians: Path | None = None

    def options(self) -> dict[str, Any]:
        """As it enters the plan's options, and with them the certificate and the digest of the work."""
        return {"method": self.wish.method, **self.facts}

    def keys(self, own: Sequence[Sequence[int]] | None = None) -> list[tuple[str, Value]]:
        """Metadata of a GGUF; own: tokens of every expert, layer by layer (of the statistics if left out, else zeros)."""
        if own is None:
            own = self.own()
        keys: list[tuple[str, Value]] = [(KEY + "method", string(self.wish.method))]
        keys += [(KEY + name, string(str(value))) for name, value in sorted(self.facts.items())]
        flat = [int(count) for row in own for count in row]
        keys.append((KEY + "experts_own_tokens", array(ValueType.UINT32, flat)))
        for name, columns in (("gate_up", self.config.hidden), ("down", self.config.intermediate)):
            weights = [float(np.float32(own_weight(count, columns))) for count in flat]
            keys.append((KEY + f"experts_own_weight_{name}", array(ValueType.FLOAT32, weights)))
        return keys

    def own(self) -> list[list[int]]:
        """Tokens of every expert, layer by layer; zeros before they are known."""
        layers, experts = self.config.layers, self.config.experts
        if self.statistics is None:
            return [[0] * experts for _ in range(layers)]
        found = (self.statistics.inputs.get(layer_name(n, GATE_UP)) for n in range(layers))
        return [[0] * experts if inputs is None else [int(n) for n in inputs.own] for inputs in found]

    def document(self, own: Sequence[Sequence[int]], report: Mapping[str, Any] | None) -> bytes:
        """FILE, for folders: the same facts, and what the stage reported."""
        weights = {
            name: [[round(own_weight(n, columns), 6) for n in row] for row in own]
            for name, columns in ((GATE_UP, self.config.hidden), (DOWN, self.config.intermediate))
        }
        document = {**self.options(), "experts_own_tokens": own, "experts_own_weight": weights, "report": report}
        return (json.dumps(document, indent=1) + "\n").encode()

    def put_into(self, plan: Plan) -> None:
        """Column weights into the plan, and the facts into its options."""
        plan.options["calibration"] = self.options()
        if plan.target != "gguf":
            plan.small[FILE] = self.document(self.own(), None)
        if self.statistics is not None:
            plan.notes.extend(self.statistics.notes)
            known = {name: self.statistics.importance(name) for name in self.statistics.inputs}
            plan.importance = {name: found for name, found in known.items() if found is not None}
            plan.rounding = {"coverage": coverage(self.own(), self.config)}

    def finish(self, plan: Plan, stage: Rounder) -> None:
        """After the stage: its numbers into the plan."""
        own = [stage.report.own[layer] for layer in sorted(stage.report.own)]
        plan.rounding = {**stage.report.as_dict(), "coverage": coverage(own, self.config)}
        if plan.target == "gguf":
            planned, known = _packed(self.keys()), _packed(self.keys(own))
            first = plan.files[0]
            assert first.head.count(planned) == 1
            assert len(planned) == len(known)
            plan.files[0] = OutFile(first.name, first.head.replace(planned, known), first.size)
        else:
            plan.small[FILE] = self.document(own, stage.report.as_dict())


def coverage(own: Sequence[Sequence[int]], config: ModelConfig) -> dict[str, int]:
    """How many experts the text has given the tokens that they want."""
    needed = tokens_wanted(max(config.hidden, config.intermediate))
    counts = [count for row in own for count in row]
    return {
        "experts": len(counts), "tokens_wanted": needed, "short": sum(count < needed for count in counts),
        "unseen": counts.count(0), "least": min(counts, default=0),
    }  # fmt: skip


def _packed(keys: list[tuple[str, Value]]) -> bytes:
    """Metadata as they lie in a header."""
    return build_header(keys, [])[0][EMPTY_HEADER : header_bytes(keys, [])]


def calibration(
    source: Source, wish: Wish, threads: int, show: ShowProgress, *, dry: bool = False, folder: Path | None = None
) -> Calibration:
    """Read the text, the statistics or the Hessians, or make the statistics. dry: make none, only say what they would be of."""
    assert wish.text is not None
    if not dry:
        require_torch()
    if wish.from_statistics:
        statistics = read_statistics(Path(wish.text), source.config)
        facts = {k: v for k, v in statistics.facts.items() if k != "worth"}
        return Calibration(wish, facts, source.config, statistics=statistics)
    if wish.from_hessians:
        from gptoss_convert.convert.hessians import Reader

        reader = Reader(Path(wish.text), source.config)
        facts = {**reader.facts, "inputs": "of the source's own layers"}
        return Calibration(wish, facts, source.config, hessians=reader.folder)
    from gptoss_convert.convert import calibrate
    from gptoss_convert.convert.texts import read_texts

    texts = read_texts(wish.text, source, wish.context, wish.tokens)
    facts = facts_of(source, texts, wish.context)
    if wish.method == "gptq" or dry:
        return Calibration(wish, facts, source.config, texts=texts)
    with show("calibrate", source.config.layers) as advance:
        statistics = calibrate.collect(
            source, texts, context=wish.context, device=wish.device, threads=threads, advance=advance, folder=folder
        )
    return Calibration(wish, facts, source.config, statistics=statistics)
