"""What whoever runs an ONNX folder must know, for the exports' READMEs: which runtime loads it, and what that does otherwise."""

from __future__ import annotations

from gptoss_convert.convert.onnx_layout import Variant
from gptoss_convert.convert.target_onnx import oldest_runtime

SLASHES = (
    "onnxruntime-genai's tokenizer (0.14 to 0.18) parts slashes from a line's end before them, where OpenAI's keeps them "
    "together: a tool's definition in the prompt is the same text in other tokens"
)


def version_text(version: tuple[int, int]) -> str:
    """1.32."""
    return ".".join(map(str, version))


def loaded_by(variant: Variant) -> str:
    """A sentence."""
    return f"ONNX Runtime {version_text(oldest_runtime(variant))} or later loads it, on processors; no GPU was tried."


def resident(variant: Variant) -> str:
    """A sentence on the memory that the weights take."""
    if variant.experts == "mxfp4":
        return "MXFP4 experts stay mapped from the file."
    older = (
        "leaves int8 experts mapped from the file"
        if variant.experts == "int8"
        else "unpacks int4 experts to 2.5 times as much"
    )
    return f"ONNX Runtime before 1.31 {older}; from 1.31 on it copies them into memory, all of them."


def caveats(variant: Variant) -> list[str]:
    """Sentences without a full stop: what of the numbers is not the source's when it runs."""
    found = [SLASHES]
    if variant.experts == "mxfp4":
        found.insert(0, "MXFP4 experts are very slow on processors without AVX-512")
    if variant.experts == "int8":
        found.insert(
            0,
            "ONNX Runtime from 1.31 on rounds the activations of int8 experts to int8 (of a small random model's logits 1.7 % of "
            "their spread), unless ORT_QMOE_CPU_QNBIT_GEMM=0 is in its environment",
        )
    if {"int4", "int8"} & {variant.attention, variant.router, variant.head}:
        found.insert(0, "ONNX Runtime rounds the activations of integer attention, router and head to int8")
    return found
