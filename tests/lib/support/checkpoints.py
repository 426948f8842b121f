"""An independent generator of gpt-oss checkpoints in every layout: what the product is judged by.

Written from the description of the formats with numpy and torch; it imports nothing of the product, and neither may any
module beside it. One `Model` holds the truth; each `write_*` puts it on disk in one layout.
"""

from __future__ import annotations

from support.finetunes import write_bf16, write_bf16_bug, write_per_expert, write_unsloth_linear
from support.gguf_files import ggml_mxfp4, write_gguf
from support.metal import write_metal
from support.model import (
    AWKWARD,
    RELEASE_20B,
    RELEASE_120B,
    SMALL,
    SQUARE,
    STEADY,
    TRUE_LAYER,
    WIDE,
    Model,
    Spec,
    dequantize,
    original_shapes,
)
from support.release import write_hf, write_original

__all__ = [
    "AWKWARD",
    "RELEASE_20B",
    "RELEASE_120B",
    "SMALL",
    "SQUARE",
    "STEADY",
    "TRUE_LAYER",
    "WIDE",
    "Model",
    "Spec",
    "dequantize",
    "ggml_mxfp4",
    "original_shapes",
    "write_bf16",
    "write_bf16_bug",
    "write_gguf",
    "write_hf",
    "write_metal",
    "write_original",
    "write_per_expert",
    "write_unsloth_linear",
]
