"""The ONNX target: a folder for ONNX Runtime, onnxruntime-genai and Foundry Local, written in one stream.

    model.onnx          the graph (`onnx_graph`), which names every tensor's place in
    model.onnx.data     the rotary tables, then the weights (`onnx_layout`)
    genai_config.json   and config.json, tokenizer, template: as in the source
    inference_model.json   where --name gives Foundry Local a name for it

`--onnx-runtime` names the oldest runtime that must load the folder, which decides the attributes that the graph may have:

    from 1.24   int4 and int8 experts; before it no runtime has blocks, sinks and the window right together (1.23 keeps one key
                too many in a sliding window, 1.22 has no sinks)
    from 1.31   layers that slide keep only their window (an attribute since 1.29, a genai_config key since genai 0.18), unless
                the window is longer than the context: genai's caches must hold it
    from 1.32   MXFP4 experts, the release's own bytes; older runtimes refuse them
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.companions import TEMPLATE
from gptoss_convert.convert.genai_config import genai_config
from gptoss_convert.convert.names import is_expert_matrix
from gptoss_convert.convert.onnx_graph import build
from gptoss_convert.convert.onnx_layout import (
    DATA_FILE,
    DENSE,
    EXPERTS,
    MODEL_FILE,
    Variant,
    cache_tensors,
    homes,
    placed,
    require_runnable,
    yarn,
)
from gptoss_convert.convert.plan import OutFile, Place, Plan
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.source_safetensors import INDEX
from gptoss_convert.convert.target_safetensors import plan_bf16
from gptoss_convert.errors import UsageError
from gptoss_convert.formats.onnx import model_bytes
from gptoss_convert.kernels.rotary import table_rows

AUTO = "auto"
NEWEST, OLDEST = (1, 32), (1, 24)
WINDOW_CACHE, MXFP4 = (1, 31), (1, 32)


@dataclass(frozen=True)
class Wanted:
    """What is asked for; "auto": what loses nothing, and for embedding, router and head what `dense` says as the builder does."""

    experts: str = AUTO
    dense: str = AUTO
    embedding: str = AUTO
    router: str = AUTO
    head: str = AUTO
    runtime: str | None = None
    name: str | None = None


def plan_onnx(source: Source, wanted: Wanted) -> Plan:
    """The plan of an ONNX folder."""
    config = source.config
    require_runnable(config, source.path)
    variant = choose_variant(source, wanted)
    found = homes(config, variant)
    slots = {name: list(home.slots) for name, home in found.items()}
    version = ".".join(map(str, _version(wanted.runtime)))
    plan = Plan("onnx", source, {**vars(variant), "onnx_runtime": version, "name": wanted.name}, slots)
    tensors = placed(config, found)
    names = {tensor.name for tensor in cache_tensors(config)}
    plan.places = {t.name: Place(0, t.offset, t.nbytes) for t in tensors if t.name not in names}
    plan.files = [OutFile(DATA_FILE, _head(config), max(t.offset + t.nbytes for t in tensors))]
    plan.small = {MODEL_FILE: model_bytes(build(config, variant, tensors), DATA_FILE)}
    base = plan_bf16(source)
    plan.small |= {name: data for name, data in base.small.items() if name != INDEX}
    plan.small["genai_config.json"], notes = genai_config(source, variant)
    if wanted.name is not None:
        _require_name(wanted.name)
        card = {"Name": wanted.name, "PromptTemplate": None}  # genai applies the template in the folder
        plan.small["inference_model.json"] = (json.dumps(card, indent=2) + "\n").encode()
    if TEMPLATE not in plan.small:
        notes.append(
            f"no {TEMPLATE} is written, the source has none: genai and Foundry Local cannot lay out a conversation"
        )
    plan.notes = [*base.notes, *notes, f"for ONNX Runtime {version} or later", *_notes(variant, config)]
    return plan


def oldest_runtime(variant: Variant) -> tuple[int, int]:
    """The oldest ONNX Runtime that loads and rightly computes a variant."""
    if variant.experts == "mxfp4":
        return MXFP4
    return WINDOW_CACHE if variant.window_cache else OLDEST


def _head(config: ModelConfig) -> bytes:
    """The data file's beginning: the rotary tables."""
    cosines, sines = cache_tensors(config)
    head = bytearray(sines.offset + sines.nbytes)
    for first, *parts in table_rows(yarn(config), config.max_positions):
        for table, rows in zip((cosines, sines), parts, strict=True):
            at = table.offset + first * config.head_dim // 2 * 4
            head[at : at + rows.nbytes] = rows.tobytes()
    return bytes(head)


def choose_variant(source: Source, wanted: Wanted) -> Variant:
    """The variant for these wishes; UsageError for what does not exist or what the runtime would not load."""
    version = _version(wanted.runtime)
    experts = wanted.experts
    if experts == AUTO:
        experts = _lossless(source)
        if experts == "mxfp4" and version < MXFP4:
            experts = "int8"
    dense = "f32" if wanted.dense == AUTO else wanted.dense
    chosen = Variant(
        experts, dense,
        router=dense if wanted.router == AUTO else wanted.router,
        embedding="f32" if wanted.embedding == AUTO else wanted.embedding,
        head=dense if wanted.head == AUTO else wanted.head,
        window_cache=version >= WINDOW_CACHE and source.config.sliding_window <= source.config.max_positions,
    )  # fmt: skip
    _check("--experts", experts, EXPERTS)
    for option, part in (("dense", "attention"), ("router", "router"), ("embedding", "embedding"), ("head", "head")):
        _check(f"--{option}", getattr(chosen, part), DENSE)
    if experts == "mxfp4" and version < MXFP4:
        raise UsageError(
            "no ONNX Runtime before 1.32 reads MXFP4 experts on a processor", found=f"--onnx-runtime {wanted.runtime}",
            remedy="--experts int8 holds every MXFP4 value exactly",
        )  # fmt: skip
    return chosen


def _lossless(source: Source) -> str:
    """The form that loses nothing of the source's experts."""
    held = {view.encoding for name, view in source.views.items() if is_expert_matrix(name)}
    own = {"mxfp4": "mxfp4", "int8_moe": "int8", "int4_moe": "int4"}
    if len(held) > 1 or not held <= set(own):
        raise UsageError(
            "ONNX has no form of these experts that loses nothing", found=f"experts in {', '.join(sorted(held))}",
            remedy="say what to round them to: --experts mxfp4, int8 or int4",
        )  # fmt: skip
    return own[held.pop()]


def _check(option: str, asked: str, known: tuple[str, ...]) -> None:
    if asked not in known:
        raise UsageError(f"{option} cannot be {asked} in ONNX", expected=", ".join((AUTO, *known)))


def _require_name(name: str) -> None:
    if not name.strip() or not name.isprintable():
        raise UsageError(
            "--name is not a name", found=repr(name[:60]), expected="characters that can be seen, as in my-finetune-20b"
        )


def _version(text: str | None) -> tuple[int, int]:
    if text is None:
        return NEWEST
    match = re.fullmatch(r"(\d{1,3})\.(\d{1,3})(?:\.\d{1,6})?", text)
    if match is None:
        raise UsageError("--onnx-runtime is not a version", found=text, expected="such as 1.28")
    version = (int(match[1]), int(match[2]))
    if version < OLDEST:
        raise UsageError(
            "this ONNX Runtime cannot compute gpt-oss rightly", found=text, expected="1.24 or later",
            remedy="1.23 keeps one key too many in a sliding window, 1.22 has no attention sinks: take a later one",
        )  # fmt: skip
    return min(version, NEWEST)


def _notes(variant: Variant, config: ModelConfig) -> list[str]:
    notes = []
    if variant.window_cache and any(config.sliding):
        notes.append(f"onnxruntime-genai's max_length must be {config.sliding_window} at least, the sliding window")
    if variant.experts == "mxfp4":
        notes.append("MXFP4 experts: correct on every processor, and very slow on those without AVX-512")
    if variant.experts == "int8":
        notes.append(
            "ONNX Runtime from 1.31 on rounds the activations of int8 experts to int8, unless "
            "ORT_QMOE_CPU_QNBIT_GEMM=0 is set in its environment"
        )
    if {"int4", "int8"} & {variant.attention, variant.router, variant.head}:
        notes.append("ONNX Runtime rounds the activations of integer matrices to int8 (accuracy_level 4)")
    return notes
