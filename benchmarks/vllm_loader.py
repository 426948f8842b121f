"""Does vLLM's own gpt-oss class load our integer artifacts? Construction, load_weights, and every parameter, on a CPU.

    python benchmarks/vllm_loader.py FOLDER      # made by convert --to int4, int8 or int8-g32; a small model will do

Run it in an environment with vLLM (0.33.0 was used, with torch for CPUs). vLLM's config, model class, quantization classes and
weight loaders are the real ones; only the choice of a MoE kernel is replaced, because none of them runs on this machine. Every
parameter is poisoned before the load and compared with the files afterwards, read by the safetensors library and by the words of
the layout, not by this project. Prints one line a kind of parameter and exits 1 if any differs or was not written.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["VLLM_TARGET_DEVICE"] = "cpu"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

MOE = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
POISON = 0x5A


def stored(folder: Path) -> dict[str, Any]:
    """Every tensor of the folder."""
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def expected(files: dict[str, Any], layers: int, experts: int) -> Iterator[tuple[str, Any]]:
    """vLLM's parameter → what it must hold."""
    import torch

    yield "model.embedding.weight", files["model.embed_tokens.weight"]
    yield "model.norm.weight", files["model.norm.weight"]
    yield "lm_head.weight", files["lm_head.weight"]
    for layer in range(layers):
        here = f"model.layers.{layer}."
        attention = here + "self_attn."
        for part in ("weight", "weight_packed", "weight_scale", "bias"):
            if f"{attention}o_proj.{part}" in files:
                qkv = torch.cat([files[f"{attention}{p}_proj.{part}"] for p in "qkv"])
                yield f"{here}attn.qkv_proj.{part}", qkv
                yield f"{here}attn.o_proj.{part}", files[f"{attention}o_proj.{part}"]
        for name in (
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            "mlp.router.weight",
            "mlp.router.bias",
        ):
            yield here + name, files[here + name]
        yield here + "attn.sinks", files[attention + "sinks"]
        for theirs, ours in (("w13", "gate_up_proj"), ("w2", "down_proj")):
            stem = here + "mlp.experts."
            parameter = f"{stem}routed_experts.{theirs}_"
            yield parameter + "bias", files[f"{stem}{ours}_bias"]
            if stem + ours in files:
                yield parameter + "weight", files[stem + ours].transpose(1, 2)
                yield parameter + "weight_scale", files[f"{stem}{ours}.weight_scale"].transpose(1, 2)
            else:
                for part in ("weight_packed", "weight_scale"):
                    one = [files[f"{stem}{expert}.{theirs}_{part}"] for expert in range(experts)]
                    yield parameter + part, torch.stack(one)


def kind_of(name: str) -> str:
    """A parameter's name, whatever the layer."""
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


def build(folder: Path) -> Any:
    """vLLM's model of the folder, weights not loaded."""
    import importlib

    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.model_loader.utils import initialize_model

    for module, select in (("wna16", "select_wna16_moe_backend"), ("w8a8_int8", "select_int8_moe_backend")):
        there = importlib.import_module(f"{MOE}.compressed_tensors_moe_{module}")
        setattr(there, select, lambda **_: (WNA16MoEBackend.EMULATION, None))
    engine = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=64
    )
    config = engine.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29577", 0, "gloo")
        initialize_model_parallel(1, 1)
        torch.set_default_dtype(torch.bfloat16)
        return initialize_model(config)


def main() -> int:
    """See the module's docstring."""
    import torch
    import vllm

    folder = Path(sys.argv[1])
    files = stored(folder)
    model = build(folder)
    print(f"vLLM {vllm.__version__}, {type(model).__module__}.{type(model).__name__}, {folder.name}")
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.data.view(torch.uint8).fill_(POISON) if parameter.dim() else parameter.data.zero_()
    model.load_weights(iter(files.items()))
    wanted = dict(expected(files, model.config.num_hidden_layers, model.config.num_local_experts))
    kinds: dict[str, list[bool]] = {}
    for name, want in wanted.items():
        got = parameters.get(name)
        form = "there is none" if got is None else f"{got.dtype} {list(got.shape)}"
        # Rows beyond the vocabulary are vLLM's own padding.
        same = got is not None and torch.equal(got.data[: len(want)].to(torch.float64), want.to(torch.float64))
        kinds.setdefault(f"{kind_of(name)}: {form}", []).append(same)
    for kind, same in kinds.items():
        print(f"{'equal' if all(same) else 'DIFFERENT'}  {len(same)} × {kind}")
    others = sorted({kind_of(name) for name in parameters if name not in wanted})
    print(f"other parameters: {', '.join(others) or 'none'}")
    return 0 if all(all(same) for same in kinds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
