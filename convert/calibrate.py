"""`calibrate`: one streamed pass of text through the model → the statistics of every matrix's inputs.

    layer by layer:  inputs of q, k, v ─ inputs of the output projection ─ router ─ each expert: its own tokens' inputs of
        gate/up and
                     of down, and where they are too few, others of the layer sent through that same expert (quant/shrinkage.py)

A layer's statistics are written and journalled when it is done, with the residual stream after it; a run that was killed goes on
after the last layer whose bytes have their digest. Same input, same bytes on the same machine with the same number of threads:
matrix products may add up in another order elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import torch
from torch import Tensor

from gptoss_convert import __version__
from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.forward import Walk, Weights, choose_device
from gptoss_convert.convert.names import DOWN, FINAL_NORM, GATE_UP, HEAD, layer_name
from gptoss_convert.convert.progress import ShowProgress
from gptoss_convert.convert.source import Source, open_source
from gptoss_convert.convert.statistics import Inputs, Layout, Statistics, lay_out, read_statistics, tensors_of
from gptoss_convert.convert.texts import Texts
from gptoss_convert.formats.output import Output
from gptoss_convert.kernels import layer as maths
from gptoss_convert.quant.shrinkage import evenly, others_wanted, own_weight, shrink

CONTEXT = 2048


class Sums:
    """Sums of squares f64 [C] and the count of some tokens' inputs."""

    def __init__(self, columns: int) -> None:
        self.total, self.count = np.zeros(columns, np.float64), 0

    def add(self, inputs: Tensor) -> None:
        """inputs: [T, C]."""
        self.total += inputs.double().square().sum(0).cpu().numpy()
        self.count += len(inputs)

    @property
    def mean(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """f64 [C]; zeros where nothing was counted."""
        return self.total / max(self.count, 1)


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


def collect_layer(walk: Walk, layer: int) -> dict[str, Inputs]:
    """Run one layer; returns the Inputs of its matrices."""
    config = walk.config
    attention, output = Sums(config.hidden), Sums(config.q_rows)
    for _, _, h in walk.attention_inputs(layer):
        attention.add(h)
    for span, a in walk.attention_outputs(layer):
        output.add(a)
        walk.add_attention(span, layer, a)
    walk.choose(layer)
    found = {layer_name(layer, f"self_attn.{p}_proj.weight"): _single(attention) for p in "qkv"}
    found[layer_name(layer, "self_attn.o_proj.weight")] = _single(output)
    gate_up, down = _experts(walk, layer)
    walk.weights.forget()
    return {**found, layer_name(layer, GATE_UP): gate_up, layer_name(layer, DOWN): down}


def _single(sums: Sums) -> Inputs:
    return Inputs(sums.mean.astype(np.float32)[None], np.array([sums.count]), np.ones(1, np.float32))


def _experts(walk: Walk, layer: int) -> tuple[Inputs, Inputs]:
    config = walk.config
    everything = Sums(config.hidden)
    for _, u in walk.inputs(torch.arange(walk.tokens)):
        everything.add(u)
    into, out, own = [], [], []
    for expert in range(config.experts):
        tokens, shares = walk.chosen(expert)
        seen, acted = Sums(config.hidden), Sums(config.intermediate)
        gate_up, down = (walk.weights.expert(layer_name(layer, name), expert) for name in (GATE_UP, DOWN))
        for part, u in walk.inputs(tokens):
            seen.add(u)
            activation = walk.activate(layer, expert, gate_up, u)
            acted.add(activation)
            walk.add(tokens[part], shares[part], walk.project(layer, expert, down, activation))
        rest = Sums(config.hidden)
        rest.total, rest.count = everything.total - seen.total, everything.count - seen.count
        into.append(shrink(seen.mean, rest.mean, seen.count, config.hidden) if rest.count else seen.mean)
        others = Sums(config.intermediate)
        for _, u in walk.inputs(other_tokens(walk, expert, others_wanted(len(tokens), config.intermediate))):
            others.add(walk.activate(layer, expert, gate_up, u))
        out.append(shrink(acted.mean, others.mean, acted.count, config.intermediate) if others.count else acted.mean)
        own.append(len(tokens))
    return (
        Inputs(np.array(into, np.float32), np.array(own), _weights(own, config.hidden)),
        Inputs(np.array(out, np.float32), np.array(own), _weights(own, config.intermediate)),
    )


def _weights(own: list[int], columns: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array([own_weight(n, columns) for n in own], np.float32)


def other_tokens(walk: Walk, expert: int, count: int) -> Tensor:
    """At most `count` tokens that the router did not send to this expert, evenly spaced over the text."""
    rest = torch.nonzero((walk.experts != expert).all(dim=1))[:, 0]
    return rest[torch.from_numpy(evenly(count, len(rest)))]


def final_inputs(walk: Walk) -> Inputs:
    """Of the head: the normed stream after the last layer."""
    sums = Sums(walk.config.hidden)
    gain = walk.weights.dense(FINAL_NORM)
    for start in range(0, walk.tokens, 2048):
        sums.add(maths.rms_norm(walk.x[start : start + 2048].to(gain.device), gain, walk.config.rms_eps))
    return _single(sums)


def collect(
    source: Source,
    texts: Texts,
    *,
    context: int,
    device: str,
    advance: Callable[[int], None],
    folder: Path | None = None,
) -> Statistics:
    """The statistics in memory, for `convert --method importance` with a text."""
    statistics = Statistics(facts=facts_of(source, texts, context))
    walk = Walk(Weights(source, choose_device(device)), texts.sequences, folder)
    walk.embed()
    for layer in range(source.config.layers):
        statistics.inputs.update(collect_layer(walk, layer))
        advance(1)
    statistics.inputs[HEAD] = final_inputs(walk)
    return statistics


def calibrate(
    path: Path,
    target: Path,
    read: Callable[[Source], Texts],
    *,
    context: int = CONTEXT,
    device: str = "cpu",
    overwrite: bool = False,
    gate_proj: str | None = None,
    tokenizer: Path | None = None,
    show: ShowProgress,
) -> tuple[Statistics, ModelConfig]:
    """Run the text that `read` makes for the source through it and write the statistics file."""
    target = target.absolute()
    with (
        Output(target, folder=False, overwrite=overwrite) as output,
        open_source(path, gate_proj=gate_proj, tokenizer=tokenizer) as source,
    ):
        source.require_sound()
        texts = read(source)
        layout = lay_out(source.config, facts_of(source, texts, context), source.wide)
        journal = output.open(_digest(source, layout, device), [(target.name, layout.size)])
        output.write(target.name, 0, layout.head)
        walk = Walk(Weights(source, choose_device(device)), texts.sequences, output.partial)
        first = _resume(walk, journal, output, layout)
        with show("calibrate", source.config.layers) as advance:
            advance(first)
            if not first:
                walk.embed()
            for layer in range(first, source.config.layers):
                digest = _write(output, layout, collect_layer(walk, layer))
                state = _save(walk, output, layer)
                output.record({"layer": layer, "digest": digest, "state": state})
                advance(1)
        _write(output, layout, {HEAD: final_inputs(walk)})
        source.check_unchanged()
        config = source.config
        output.publish()
    return read_statistics(target, config), config


def _digest(source: Source, layout: Layout, device: str) -> str:
    files = [[f.name, f.size, f.identity.mtime_ns] for f in source.files]
    return blake3.blake3(repr((files, device, torch.get_num_threads())).encode() + layout.head).hexdigest()


def _write(output: Output, layout: Layout, inputs: dict[str, Inputs]) -> str:
    """Write some matrices' statistics; returns the digest of their bytes."""
    hasher = blake3.blake3()
    for name, found in inputs.items():
        for tensor, values in tensors_of(name, found, layout.columns(name)).items():
            data = np.ascontiguousarray(values, "<f4").tobytes()
            output.write(output.target.name, layout.places[tensor].offset, data)
            hasher.update(data)
    return hasher.hexdigest()


def _state(output: Output, layer: int) -> Path:
    """Where the residual stream after a layer lies: two files in turn, so that one is whole at any moment."""
    return output.path(f"stream-{layer % 2}.json")


def _save(walk: Walk, output: Output, layer: int) -> str:
    data = walk.x.numpy().reshape(-1).view(np.uint8)
    _state(output, layer).write_bytes(data.data)
    return blake3.blake3(data.data).hexdigest()


def _resume(walk: Walk, journal: list[dict[str, Any]], output: Output, layout: Layout) -> int:
    """Take up after the last layer whose statistics, all layers' before it and stream are as journalled; returns how many."""
    done = 0
    for record in journal:
        if record.get("layer") != done or record.get("digest") != _digest_of(done, output, layout, walk.config):
            break
        done += 1
    while done:
        path = _state(output, done - 1)
        data = path.read_bytes() if path.exists() else b""
        if blake3.blake3(data).hexdigest() == journal[done - 1].get("state") and len(data) == walk.x.nbytes:
            walk.x[:] = torch.from_numpy(np.frombuffer(data, np.float32).reshape(walk.x.shape).copy())
            return done
        done -= 1
    return 0


def _digest_of(layer: int, output: Output, layout: Layout, config: ModelConfig) -> str:
    """The digest of a layer's bytes as they lie on disk, in the order in which `_write` took them."""
    inner = [f"self_attn.{p}_proj.weight" for p in "qkvo"] + [GATE_UP, DOWN]
    hasher = blake3.blake3()
    for name in (layer_name(layer, i) for i in inner):
        empty = Inputs(np.zeros((1, 1), np.float32), np.zeros(1, np.int64), np.zeros(1, np.float32))
        for tensor in tensors_of(name, empty):
            place = layout.places[tensor]
            hasher.update(output.read(output.target.name, place.offset, place.nbytes))
    return hasher.hexdigest()
