"""What lies beside an integer artifact's weights: the modeling file for transformers, and the model card, which says what loads
the artifact, from which version on, with which flags, and what loads it wrongly.

Each line says how it is known: *run* (the runtime's own loading code was executed on a CPU with a small model and every
parameter compared) or *read* (in the runtime's source). Nothing about a GPU was run, and the card says so. Of the source's
card the licence and its kin are put through; the card itself travels under SOURCE_CARD.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from gptoss_convert import __version__
from gptoss_convert.convert.model_card import front_matter

SOURCE_CARD = "SOURCE_README.md"
CARD = "README.md"
MODELING = "modeling_gptoss_int"  # the module that config.json's auto_map names

# What of a source's front matter is as true of what is made from it.
_KEPT = ("license", "license_name", "license_link", "base_model", "language", "datasets", "pipeline_tag")
_LOADER_TAGS = ("vllm", "compressed-tensors")

_STOCK = (
    "**loads it wrongly**: transformers takes its own class, does not find the experts under its names, starts them from random "
    "numbers and prints no more than a table of missing and unexpected keys. Check `output_loading_info` as below"
)
_STOCK_INT8 = (
    "**does not run**: transformers' own class takes codes for weights and ignores the scales; the forward pass fails"
)
_TRUSTED = (
    "loads, no key missing or unexpected, every weight exactly what file and dtype say; experts are decoded to the load's "
    "dtype, so they take bf16's memory"
)
_TRUSTED_INT8 = (
    _TRUSTED + ". compressed-tensors also rounds the activations of attention, as vLLM does; 5.23 leaves that out with "
    "`CompressedTensorsConfig(dequantize=True)`, 5.20 does not"
)
_OTHERS = (
    "no. SGLang 0.5.23 knows bf16, MXFP4 and Quark names and silently skips others; TensorRT-LLM knows bf16 and MXFP4"
)
_AUTO = (
    "**may compute wrongly**, without an error: the kernel TRITON, which `auto` takes on GPUs before sm90, is not given the "
    "experts' biases, and neither is FlashInfer's for sm100"
)
_OLD = "**loads it wrongly**: integer experts have no biases there (0.29, 0.30), or their names are passed over"
_LOADED, _READ, _RUN = "loading of 0.33.0 run, the rest read", "read", "run"

Row = tuple[str, str, str]  # runtime and flags, verdict, how it is known
_EVERYWHERE: tuple[Row, ...] = (("SGLang, TensorRT-LLM", _OTHERS, _READ),)
_TRANSFORMERS: tuple[Row, ...] = (
    ("transformers 5.20 to 5.23, compressed-tensors 0.17 to 0.20, `trust_remote_code=True`", _TRUSTED, _RUN),
    ("transformers without `trust_remote_code`", _STOCK, _RUN),
    *_EVERYWHERE,
)
_ROWS: dict[str, tuple[Row, ...]] = {
    "int4": (
        ("vLLM 0.31 to 0.33, `--moe-backend humming`", "loads; biases used; compute capability 7.5 or later", _LOADED),
        ("vLLM 0.31 to 0.33, `--moe-backend emulation`", "loads; decoded to bf16, which saves no memory", _LOADED),
        ("vLLM 0.31 to 0.33, `--moe-backend auto`", _AUTO, _READ),
        ("vLLM, tensor parallel", "the experts' width on each rank must divide by 32: of 2880, 2 ranks do, 4 do not", _READ),
        ("vLLM before 0.31", _OLD, _READ),
        *_TRANSFORMERS,
    ),
    "int8-g32": (
        ("vLLM 0.31 to 0.33, `--moe-backend humming`", "loads; that its kernel takes 8 bits here was not tried", _LOADED),
        ("vLLM 0.31 to 0.33, `--moe-backend auto`", _AUTO, _READ),
        ("vLLM 0.31 to 0.33, `--moe-backend emulation`", "no: it is for 4 bits", _READ),
        ("vLLM, tensor parallel", "the experts' width on each rank must divide by 32: of 2880, 2 ranks do, 4 do not", _READ),
        ("vLLM before 0.31", _OLD, _READ),
        *_TRANSFORMERS,
    ),
    "int8": (
        ("vLLM 0.29 to 0.33, one GPU", "loads; int8 × int8 with biases; compute capability 7.5 or later", _LOADED),
        ("vLLM, `--enable-expert-parallel`", "loads", _READ),
        ("vLLM, tensor parallel without it", "**computes wrongly**, silently: all ranks but the first keep scales of 1", _RUN),
        ("vLLM before 0.29", "no: int8 experts with biases are not known", _READ),
        ("transformers 5.20 to 5.23, compressed-tensors 0.17 to 0.20, `trust_remote_code=True`", _TRUSTED_INT8, _RUN),
        ("transformers without `trust_remote_code`", _STOCK_INT8, _RUN),
        *_EVERYWHERE,
    ),
}  # fmt: skip
_WHAT = {
    "int4": "W4A16: experts and attention as 4-bit integers in groups of 32 with a bf16 scale (4.5 bits a weight)",
    "int8-g32": "W8A16: experts as 8-bit integers in groups of 32 with a bf16 scale; MXFP4 experts are held exactly",
    "int8": "W8A8: experts and attention as 8-bit integers with a scale for each output; the runtime rounds activations to int8, "
    "a scale for each token",
}  # fmt: skip
_SERVE = {
    "int4": "vllm serve FOLDER --moe-backend humming",
    "int8-g32": "vllm serve FOLDER --moe-backend humming",
    "int8": "vllm serve FOLDER",
}


def modeling_file() -> bytes:
    """The code that travels with the weights."""
    return resources.files("gptoss_convert").joinpath(f"data/{MODELING}.py").read_bytes()


def artifact_card(target: str, source_card: bytes | None) -> bytes:
    """README.md of an int4, int8-g32 or int8 folder."""
    table = "\n".join(f"| {runtime} | {verdict} | {known} |" for runtime, verdict, known in _ROWS[target])
    kept = f"The card of the model that it was made from is {SOURCE_CARD}." if source_card else ""
    text = f"""---
{_front_matter(front_matter(source_card) if source_card else {})}---
# gpt-oss, {target}

{_WHAT[target]}.
What is not named is bf16. Written by gptoss-convert {__version__}; `gptoss-certificate.json` names the source, its digests, and
for every tensor what the conversion cost. {kept}

## What loads it

| runtime | verdict | known by |
| --- | --- | --- |
{table}

*run*: the runtime's own code was executed on a CPU with a small model of this layout, every parameter compared with the file.
*read*: in the runtime's source. **Nothing was verified on a GPU**: neither that a kernel takes these widths, nor its accuracy or
speed. Versions that are not named were not looked at.

    {_SERVE[target]}

    model, loading = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True, output_loading_info=True)
    assert not any(loading.values())

`trust_remote_code=True` runs `modeling_gptoss_int.py` of this folder, which renames and decodes tensors and does nothing else;
its digest is in the certificate. For a layout that every runtime loads without further code take gpt-oss's own MXFP4 (`--to hf`).
"""
    return text.encode()


def _front_matter(theirs: Mapping[str, str | list[str]]) -> str:
    import yaml

    table: dict[str, Any] = {key: theirs[key] for key in _KEPT if key in theirs}
    tags = theirs.get("tags", [])
    named = [tags] if isinstance(tags, str) else tags
    table["tags"] = list(dict.fromkeys([*named, *_LOADER_TAGS]))
    return str(yaml.safe_dump(table, sort_keys=False, allow_unicode=True, width=1000))
