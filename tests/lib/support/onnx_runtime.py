"""An ONNX folder as its runtimes compute it: ONNX Runtime, onnxruntime-genai; and its graph as the onnx package reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def logits(folder: Path, ids: Sequence[int], prefill: int) -> F32:
    """Float32 [T, V]: the first `prefill` tokens at once, then one at a time, with keys and values carried over."""
    return logits_in_pieces(folder, [ids], [prefill, *[1] * (len(ids) - prefill)])[0]


def logits_in_pieces(folder: Path, ids: Sequence[Sequence[int]], sizes: Sequence[int]) -> F32:
    """ids [B, T] in pieces of these sizes, keys and values carried over → float32 [B, T, V]."""
    import onnxruntime

    config = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    window = config.get("sliding_window") or {}
    past: dict[str, Any] = {}
    for layer in range(config["num_hidden_layers"]):
        length = window["window_size"] if layer in window.get("layers", ()) else 0
        empty = np.zeros((len(ids), config["num_key_value_heads"], length, config["head_size"]), np.float32)
        past |= {f"past_key_values.{layer}.{part}": empty for part in ("key", "value")}
    names, made, seen = [output.name for output in session.get_outputs()], [], 0
    for size in sizes:
        piece = np.array([row[seen : seen + size] for row in ids])
        seen += size
        found = session.run(None, {"input_ids": piece, "attention_mask": np.ones((len(ids), seen), np.int64), **past})
        made.append(found[0])
        past = {name.replace("present", "past_key_values"): v for name, v in zip(names[1:], found[1:], strict=True)}
    return np.concatenate(made, axis=1)


def genai_logits(folder: Path, ids: Sequence[int], prefill: int) -> F32:
    """Float32 [T − prefill + 1, V]: what onnxruntime-genai gives after the prefill and after each further token."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(ids) + 1)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([ids[:prefill]], np.int32))
    made = [generator.get_logits()[0, -1].copy()]
    for token in ids[prefill:]:
        generator.append_tokens(np.array([[token]], np.int32))
        made.append(generator.get_logits()[0, -1].copy())
    return np.array(made)


def genai_greedy(folder: Path, ids: Sequence[int], count: int) -> list[int]:
    """The `count` likeliest next tokens, one after another, as onnxruntime-genai chooses them."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(ids) + count)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([list(ids)], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(ids) :]]


def initializers(folder: Path) -> dict[str, NDArray[Any]]:
    """Every initializer, as the onnx package reads it."""
    import onnx
    from onnx.numpy_helper import to_array

    return {tensor.name: to_array(tensor) for tensor in onnx.load(folder / "model.onnx").graph.initializer}


def with_float_activations(folder: Path) -> Path:
    """Set accuracy_level 1 in every MatMulNBits: activations stay floats, so that only the weights' rounding is left."""
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(model, folder / "model.onnx")
    return folder
