"""Trains the small gpt-oss of tests/data/trained: real routing, real activations, experts that are natively MXFP4.

    python -P benchmarks/train_small_model.py OUT [--steps N] [--batch N] [--seed N] [--text FOLDER]

OUT gets a checkpoint in the release's layout (Hugging Face, MXFP4 experts), its tokenizer, PROVENANCE.json, and two texts that
the model has not seen: `calibration.txt` and `heldout.txt`. Everything is learned from the standard library of the Python
that runs this (PSF licence): its modules, and its manual's topics (pydoc_data). Files are dealt out by the digest of their
name: one in 12 is held out, one in 12 is for calibration. Half of the documents are told as harmony conversations.

The widths, 416 and 352, divide by 32 and not by 256, as the release's 2880 does. No loss balances the experts but a faint
one, so that they are loaded unevenly. Over the last 30 % of the steps the experts' weights pass through MXFP4 in the forward
pass, gradients straight through; what is saved are those very values. 2500 steps of 1536 tokens take 35 to 60 minutes on two
cores. Threads change the order of sums, so a second run gives another model of the same quality.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as fn

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "lib"))

from support.checkpoints import Model, Spec, write_hf
from support.tokenizer import SPLIT, byte_symbols, harmony_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from gptoss_convert.kernels import layer as maths
from gptoss_convert.kernels import mxfp4

SPEC = Spec(
    layers=3, experts=12, experts_per_token=2, hidden=416, intermediate=352, heads=4, kv_heads=2, vocab=1536, spare_rows=11,
    sliding_window=128, max_position=131072, initial_context=4096, rope_theta=150000, rope_factor=32.0,
)  # fmt: skip
LENGTH = 256
BALANCE = 0.003
QUANTIZED_SHARE = 0.3
TEST_PARTS = {"train": range(2, 12), "heldout": range(1), "calibration": range(1, 2)}


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of the library's modules and of the manual's topics, in the order of their names."""
    from pydoc_data.topics import topics

    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if not any(
            part in name for part in ("site-packages", "test/", "tests/", "topics.py", "encodings/", "idlelib/")
        ):
            yield name, path.read_text(encoding="utf-8", errors="ignore")
    for name, text in sorted(topics.items()):
        yield f"topic {name}", text


def split(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """The documents of each part, by the digest of their names."""
    parts: dict[str, list[tuple[str, str]]] = {name: [] for name in TEST_PARTS}
    for name, text in documents(folder):
        share = hashlib.sha256(name.encode()).digest()[0] % 12
        next(parts[part] for part, shares in TEST_PARTS.items() if share in shares).append((name, text))
    return parts


def conversation(name: str, text: str) -> str:
    """A document as the answer to a question, in harmony's tokens."""
    kind = "topic" if name.startswith("topic") else "module"
    return (
        "<|start|>system<|message|>You know Python's library.<|end|>"
        f"<|start|>user<|message|>Show me the {kind} {name.removeprefix('topic ')}.<|end|>"
        f"<|start|>assistant<|channel|>analysis<|message|>They ask for a {kind}.<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{text}<|return|>"
    )


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of SPEC's size, in the release's structure."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SPEC.text_tokens, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    byte_of = {symbol: byte for byte, symbol in byte_symbols().items()}
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return harmony_tokenizer({bytes(byte_of[c] for c in text): i for i, (text, _) in enumerate(ordered)})


class Through(torch.autograd.Function):
    """The values that MXFP4 holds, with the gradient of the identity."""

    @staticmethod
    def forward(_: Any, weight: Tensor) -> Tensor:  # type: ignore[override]
        values = weight.detach().reshape(-1, weight.shape[-1]).numpy()
        return torch.from_numpy(mxfp4.decode(*mxfp4.encode(values))).reshape(weight.shape)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class Layer(nn.Module):
    """One layer, in the original layout's shapes."""

    def __init__(self, index: int) -> None:
        super().__init__()
        s, d, f, e = SPEC, SPEC.hidden, SPEC.intermediate, SPEC.experts
        self.window = s.sliding_window if index % 2 == 0 else None
        self.attn_norm, self.mlp_norm = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        self.qkv = nn.Linear(d, s.query_width + 2 * s.kv_width)
        self.out = nn.Linear(s.query_width, d)
        self.sinks = nn.Parameter(torch.zeros(s.heads))
        self.router = nn.Linear(d, e)
        self.gate_up = nn.Parameter(torch.randn(e, 2 * f, d) * d**-0.5)
        self.gate_up_bias = nn.Parameter(torch.zeros(e, 2 * f))
        self.down = nn.Parameter(torch.randn(e, d, f) * (2 * f * SPEC.layers) ** -0.5)
        self.down_bias = nn.Parameter(torch.zeros(e, d))

    def forward(self, x: Tensor, frequencies: Tensor, quantized: bool) -> tuple[Tensor, Tensor]:
        """x [B, T, D] → the next x, and how unbalanced the experts are (1 where even)."""
        s = SPEC
        batch, length, _ = x.shape
        qkv = self.qkv(maths.rms_norm(x, self.attn_norm, s.rms_eps))
        q, k, v = qkv.split([s.query_width, s.kv_width, s.kv_width], dim=-1)
        q, k, v = (t.reshape(batch, length, -1, s.head_dim) for t in (q, k, v))
        magnitude = maths.yarn_magnitude(s.rope_factor)
        q, k = maths.rotate(q, frequencies, magnitude), maths.rotate(k, frequencies, magnitude)
        x = x + self.out(maths.attention(q, k, v, self.sinks, self.window))
        flat = maths.rms_norm(x, self.mlp_norm, s.rms_eps).reshape(batch * length, -1)
        experts, shares = maths.route(flat, self.router.weight, self.router.bias, s.experts_per_token)
        probabilities = (flat @ self.router.weight.T + self.router.bias).softmax(-1).mean(0)
        load = torch.bincount(experts.reshape(-1), minlength=s.experts) / experts.numel()
        gate_up = Through.apply(self.gate_up) if quantized else self.gate_up
        down = Through.apply(self.down) if quantized else self.down
        out = torch.zeros_like(flat)
        for expert in range(s.experts):
            token, place = torch.where(experts == expert)
            if len(token):
                h = maths.swiglu(flat[token] @ gate_up[expert].T + self.gate_up_bias[expert], s.swiglu_limit)
                y = h @ down[expert].T + self.down_bias[expert]
                out = out.index_add(0, token, y * shares[token, place, None])
        return x + out.reshape(x.shape), s.experts * (probabilities * load).sum()


class Network(nn.Module):
    """The whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SPEC.vocab, SPEC.hidden)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.layers = nn.ModuleList(Layer(n) for n in range(SPEC.layers))
        self.norm = nn.Parameter(torch.ones(SPEC.hidden))
        self.head = nn.Linear(SPEC.hidden, SPEC.vocab, bias=False)
        s = SPEC
        self.frequencies = maths.yarn_frequencies(
            theta=s.rope_theta, factor=s.rope_factor, width=s.head_dim, original=s.initial_context,
            beta_fast=s.beta_fast, beta_slow=s.beta_slow, truncate=s.truncate,
        )  # fmt: skip

    def forward(self, ids: Tensor, quantized: bool) -> tuple[Tensor, Tensor]:
        """ids [B, T] → logits [B, T, V] and the mean imbalance."""
        x, imbalance = self.embedding(ids), []
        for layer in self.layers:
            x, uneven = layer(x, self.frequencies, quantized)
            imbalance.append(uneven)
        return self.head(maths.rms_norm(x, self.norm, SPEC.rms_eps)), torch.stack(imbalance).mean()


def tokens_of(tokenizer: Tokenizer, documents: list[tuple[str, str]], seed: int) -> Tensor:
    """All documents one after the other, shuffled, every second one as a conversation."""
    chosen = random.Random(seed).sample(documents, len(documents))
    ids: list[int] = []
    for index, (name, text) in enumerate(chosen):
        ids += tokenizer.encode(conversation(name, text) if index % 2 else text + "<|endoftext|>").ids
    return torch.tensor(ids)


def loss_of(network: Network, ids: Tensor, quantized: bool) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood of ids [B, T + 1], and the imbalance."""
    logits, imbalance = network(ids[:, :-1], quantized)
    return fn.cross_entropy(logits.reshape(-1, SPEC.vocab), ids[:, 1:].reshape(-1)), imbalance


def train(network: Network, ids: Tensor, heldout: Tensor, steps: int, batch: int, seed: int) -> list[dict[str, float]]:
    """AdamW with a warm-up and a cosine; returns what was logged."""
    draw = np.random.default_rng(seed)
    matrices = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.97))
    log, started = [], time.monotonic()
    for step in range(steps):
        rate = min((step + 1) / 100, 1) * (0.05 + 0.95 * (1 + np.cos(np.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        quantized = step >= steps * (1 - QUANTIZED_SHARE)
        starts = draw.integers(0, len(ids) - LENGTH - 1, batch)
        loss, imbalance = loss_of(network, torch.stack([ids[s : s + LENGTH + 1] for s in starts]), quantized)
        optimizer.zero_grad(set_to_none=True)
        (loss + BALANCE * imbalance).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            with torch.no_grad():
                found = float(loss_of(network, heldout, quantized)[0])
            entry = {
                "step": step,
                "loss": float(loss.detach()),
                "heldout": found,
                "imbalance": float(imbalance.detach()),
            }
            log.append(entry)
            print(f"{time.monotonic() - started:6.0f} s", json.dumps(entry), file=sys.stderr, flush=True)
    return log


def as_model(network: Network) -> Model:
    """The trained values in the original layout."""
    model = Model(SPEC)

    def put(name: str, value: Tensor) -> None:
        assert model.tensors[name].shape == value.shape, name
        model.tensors[name] = value.detach().to(torch.bfloat16).contiguous()

    put("embedding.weight", network.embedding.weight)
    put("unembedding.weight", network.head.weight)
    put("norm.scale", network.norm)
    for n, layer in enumerate(network.layers):
        prefix = f"block.{n}."
        for name, value in {
            "attn.norm.scale": layer.attn_norm, "attn.qkv.weight": layer.qkv.weight, "attn.qkv.bias": layer.qkv.bias,
            "attn.sinks": layer.sinks, "attn.out.weight": layer.out.weight, "attn.out.bias": layer.out.bias,
            "mlp.norm.scale": layer.mlp_norm, "mlp.gate.weight": layer.router.weight, "mlp.gate.bias": layer.router.bias,
            "mlp.mlp1_bias": layer.gate_up_bias, "mlp.mlp2_bias": layer.down_bias,
        }.items():  # fmt: skip
            put(prefix + name, value)
        for name, weight in (("mlp1", layer.gate_up), ("mlp2", layer.down)):
            blocks, scales = mxfp4.encode(weight.detach().reshape(-1, weight.shape[-1]).numpy())
            there = prefix + f"mlp.{name}_weight."
            model.tensors[there + "blocks"] = torch.from_numpy(blocks).reshape(model.tensors[there + "blocks"].shape)
            model.tensors[there + "scales"] = torch.from_numpy(scales).reshape(model.tensors[there + "scales"].shape)
    return model


def excerpt(documents: list[tuple[str, str]], limit: int) -> str:
    """The first characters of every document in turn, conversations and plain ones, until `limit` bytes."""
    share = max(limit // max(len(documents), 1), 1200)
    parts, size = [], 0
    for index, (name, text) in enumerate(documents):
        part = text[:share].rpartition("\n")[0] + "\n"
        part = conversation(name, part) if index % 2 else part + "<|endoftext|>"
        if size + len(part.encode()) > limit:
            break
        parts.append(part)
        size += len(part.encode())
    return "".join(parts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    parts = split(options.text)
    tokenizer = train_tokenizer([text for _, text in parts["train"]])
    ids = tokens_of(tokenizer, parts["train"], options.seed)
    unseen = tokens_of(tokenizer, parts["heldout"], options.seed)
    heldout = unseen[: 8 * (LENGTH + 1)].reshape(8, LENGTH + 1)
    print(f"{len(ids)} tokens of training text, {len(unseen)} held out", file=sys.stderr)
    network = Network()
    log = train(network, ids, heldout, options.steps, options.batch, options.seed)
    shutil.rmtree(options.out, ignore_errors=True)
    write_hf(as_model(network), options.out, tokenizer=tokenizer)
    for part, limit in (("calibration", 600_000), ("heldout", 160_000)):
        (options.out / f"{part}.txt").write_text(excerpt(parts[part], limit), encoding="utf-8")
    digest = hashlib.sha256("\0".join(f"{n}\0{t}" for part in parts.values() for n, t in part).encode()).hexdigest()
    provenance = {
        "made_by": "benchmarks/train_small_model.py", "steps": options.steps, "tokens_a_step": options.batch * LENGTH,
        "seed": options.seed, "text": f"standard library of CPython {platform.python_version()}", "licence": "PSF-2.0",
        "text_sha256": digest, "training_tokens": len(ids), "torch": torch.__version__, "log": log,
    }  # fmt: skip
    (options.out / "PROVENANCE.json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main()
