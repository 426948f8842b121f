"""`calibrate`: one streamed pass of text through the model → the statistics of every matrix's inputs.

    layer by layer:  inputs of q, k, v ─ inputs of the output projection ─ router ─ each expert: its own tokens' inputs of
        gate/up and
                     of down, and where they are too few, others of the layer sent through that same expert (quant/shrinkage.py)

A layer's statistics are written and journalled when it is done, with the residual stream after it; a run that was killed goes on
after the last layer whose bytes have their digest. Same input, same bytes for any number of threads (kernels/products.py);
another processor's instructions may add up in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import torch
from torch import Tensor

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.calibration import facts_of
from gptoss_convert.convert.forward import Walk, Weights, choose_device
from gptoss_convert.convert.hessians import MARKER, Writer
from gptoss_convert.convert.moments import F64, Moments, Sums
from gptoss_convert.convert.names import DOWN, FINAL_NORM, GATE_UP, HEAD, layer_name
from gptoss_convert.convert.progress import ShowProgress
from gptoss_convert.convert.protect import files_given, files_read, protect_inputs
from gptoss_convert.convert.source import Source, open_source
from gptoss_convert.convert.statistics import Inputs, Layout, Statistics, lay_out, read_statistics, tensors_of
from gptoss_convert.convert.texts import Texts
from gptoss_convert.convert.walk_memory import TOKENS_AT_ONCE
from gptoss_convert.convert.workers import cores
from gptoss_convert.errors import BadInput, UsageError
from gptoss_convert.formats.output import Output
from gptoss_convert.kernels import layer as maths
from gptoss_convert.kernels.products import use_threads
from gptoss_convert.quant.shrinkage import evenly, others_wanted, own_weight

CONTEXT = 2048


Keep = Callable[[int | None, str, int, int, Tensor], None]
"""Takes a matrix's Hessian: layer (None: the head), name, expert, own tokens, mean of x xᵀ [C, C]."""


def collect_layer(walk: Walk, layer: int, keep: Keep | None = None) -> dict[str, Inputs]:
    """Run one layer; returns the Inputs of its matrices. keep: where their Hessians go, if they are wanted."""
    config, device, full = walk.config, walk.weights.device, keep is not None
    attention, output = Moments(config.hidden, device, full), Moments(config.q_rows, device, full)
    for _, _, h in walk.attention_inputs(layer):
        attention.add(h)
    for span, a in walk.attention_outputs(layer):
        output.add(a)
        walk.add_attention(span, layer, a)
    walk.choose(layer)
    o = layer_name(layer, "self_attn.o_proj.weight")
    found = {layer_name(layer, f"self_attn.{p}_proj.weight"): _single(attention.squares) for p in "qkv"}
    found[o] = _single(output.squares)
    for name, moments in ((next(iter(found)), attention), (o, output)):
        _keep(keep, layer, name, 0, moments.count, moments.mean()[1])
    gate_up, down = _experts(walk, layer, keep)
    walk.weights.forget()
    return {**found, layer_name(layer, GATE_UP): gate_up, layer_name(layer, DOWN): down}


def _keep(keep: Keep | None, layer: int | None, name: str, expert: int, own: int, hessian: Tensor | None) -> None:
    if keep is not None and hessian is not None:
        keep(layer, name, expert, own, hessian)


def _single(sums: Sums) -> Inputs:
    return Inputs(sums.mean.astype(np.float32)[None], np.array([sums.count]), np.ones(1, np.float32))


def _experts(walk: Walk, layer: int, keep: Keep | None) -> tuple[Inputs, Inputs]:
    config = walk.config
    moments = partial(Moments, device=walk.weights.device, full=keep is not None)
    names = [layer_name(layer, name) for name in (GATE_UP, DOWN)]
    everything = moments(config.hidden)
    for _, u in walk.inputs(torch.arange(walk.tokens)):
        everything.add(u)
    means: tuple[list[F64], list[F64]] = ([], [])
    own = []
    for expert in range(config.experts):
        tokens, shares = walk.chosen(expert)
        seen, acted, others = moments(config.hidden), moments(config.intermediate), moments(config.intermediate)
        gate_up, down = (walk.weights.expert(name, expert) for name in names)
        for part, u in walk.inputs(tokens):
            seen.add(u)
            activation = walk.activate(layer, expert, gate_up, u)
            acted.add(activation)
            walk.add(tokens[part], shares[part], walk.project(layer, expert, down, activation))
        for _, u in walk.inputs(other_tokens(walk, expert, others_wanted(len(tokens), config.intermediate))):
            others.add(walk.activate(layer, expert, gate_up, u))
        for name, mean, mine, rest in zip(names, means, (seen, acted), (everything.without(seen), others), strict=True):
            squares, hessian = mine.shrunk(rest)
            mean.append(squares)
            _keep(keep, layer, name, expert, len(tokens), hessian)
        own.append(len(tokens))
    into, out = (
        Inputs(np.array(mean, np.float32), np.array(own), _weights(own, columns))
        for mean, columns in zip(means, (config.hidden, config.intermediate), strict=True)
    )
    return into, out


def _weights(own: list[int], columns: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array([own_weight(n, columns) for n in own], np.float32)


def other_tokens(walk: Walk, expert: int, count: int) -> Tensor:
    """At most `count` tokens that the router did not send to this expert, evenly spaced over the text."""
    rest = torch.nonzero((walk.experts != expert).all(dim=1))[:, 0]
    return rest[torch.from_numpy(evenly(count, len(rest)))]


def final_inputs(walk: Walk, keep: Keep | None = None) -> Inputs:
    """Of the head: the normed stream after the last layer."""
    moments = Moments(walk.config.hidden, walk.weights.device, keep is not None)
    gain = walk.weights.dense(FINAL_NORM)
    for start in range(0, walk.tokens, TOKENS_AT_ONCE):
        x = walk.x[start : start + TOKENS_AT_ONCE].to(gain.device)
        moments.add(maths.rms_norm(x, gain, walk.config.rms_eps))
    _keep(keep, None, HEAD, 0, moments.count, moments.mean()[1])
    return _single(moments.squares)


def collect(
    source: Source,
    texts: Texts,
    *,
    context: int,
    device: str,
    threads: int,
    advance: Callable[[int], None],
    folder: Path | None = None,
) -> Statistics:
    """The statistics in memory, for `convert --method importance` with a text."""
    statistics = Statistics(facts=facts_of(source, texts, context))
    use_threads(threads)
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
    threads: int = 0,
    hessians: Path | None = None,
    overwrite: bool = False,
    gate_proj: str | None = None,
    tokenizer: Path | None = None,
    reads: Sequence[Path] = (),
    show: ShowProgress,
) -> tuple[Statistics, ModelConfig]:
    """Run the text that `read` makes for the source through it and write the statistics file, and the folder of Hessians.

    reads: further files that are read, and therefore not written over: the text's.
    """
    target = target.absolute()
    with (
        Output(target, folder=False, overwrite=overwrite) as output,
        _folder(hessians, target, overwrite) as folder,
        open_source(path, gate_proj=gate_proj, tokenizer=tokenizer) as source,
    ):
        for place in (target, *([] if hessians is None else [hessians.absolute()])):
            protect_inputs(place, [path, *reads, *files_given(tokenizer), *files_read(source)])
        source.require_sound()
        texts = read(source)
        facts = facts_of(source, texts, context)
        layout = lay_out(source.config, facts, source.wide)
        digest = _digest(source, layout, device, gate_proj)
        writer = None if folder is None else Writer(folder, source.config, facts)
        whole = source.config.layers if writer is None else writer.open(digest)
        keep = None if writer is None else writer.put
        journal = output.open(digest, [(target.name, layout.size)])
        output.write(target.name, 0, layout.head)
        use_threads(threads or cores())
        walk = Walk(Weights(source, choose_device(device)), texts.sequences, output.partial)
        first = _resume(walk, journal, output, layout, whole)
        with show("calibrate", source.config.layers) as advance:
            advance(first)
            if not first:
                walk.embed()
            for layer in range(first, source.config.layers):
                digest = _write(output, layout, collect_layer(walk, layer, keep))
                if writer is not None:
                    writer.finish(layer)
                state = _save(walk, output, layer)
                output.record({"layer": layer, "digest": digest, "state": state})
                advance(1)
        _write(output, layout, {HEAD: final_inputs(walk, keep)})
        source.check_unchanged()
        config = source.config
        if writer is not None:
            writer.publish()
        output.publish()
    return read_statistics(target, config), config


def _folder(hessians: Path | None, target: Path, overwrite: bool) -> AbstractContextManager[Output | None]:
    if hessians is None:
        return nullcontext()
    if hessians.absolute() == target:
        raise UsageError("the statistics and the Hessians need names of their own", found=hessians)
    return Output(hessians.absolute(), folder=True, overwrite=overwrite, marker=MARKER)


def _digest(source: Source, layout: Layout, device: str, gate_proj: str | None) -> str:
    files = [[f.name, f.size, f.identity.mtime_ns] for f in source.files]
    return blake3.blake3(repr((files, device, gate_proj)).encode() + layout.head).hexdigest()


def _write(output: Output, layout: Layout, inputs: dict[str, Inputs]) -> str:
    """Write some matrices' statistics; returns the digest of their bytes."""
    hasher = blake3.blake3()
    for name, found in inputs.items():
        _require_finite(name, found)
        for tensor, values in tensors_of(name, found, layout.columns(name)).items():
            data = np.ascontiguousarray(values, "<f4").tobytes()
            output.write(output.target.name, layout.places[tensor].offset, data)
            hasher.update(data)
    return hasher.hexdigest()


def _require_finite(name: str, found: Inputs) -> None:
    if not np.isfinite(found.mean).all():
        expert = int(np.argmin(np.isfinite(found.mean).all(axis=1)))
        raise BadInput(
            "the model computes what is not a number, or not finite", tensor=name,
            found=f"inputs of expert {expert}" if len(found.mean) > 1 else "its inputs", expected="finite activations",
            remedy="look for values that are not finite with gptoss-convert inspect",
        )  # fmt: skip


def _state(output: Output, layer: int) -> str:
    """Where the residual stream after a layer lies: two files in turn, so that one is whole at any moment."""
    return f"stream-{layer % 2}.json"


def _save(walk: Walk, output: Output, layer: int) -> str:
    data = walk.x.numpy().reshape(-1).view(np.uint8)
    output.write_small(_state(output, layer), data.data)
    return blake3.blake3(data.data).hexdigest()


def _resume(walk: Walk, journal: list[dict[str, Any]], output: Output, layout: Layout, most: int) -> int:
    """Take up after the last layer whose statistics, all layers' before it and stream are as journalled; returns how many,
    at most as many as there are Hessians of.
    """
    done = 0
    for record in journal[:most]:
        if record.get("layer") != done or record.get("digest") != _digest_of(done, output, layout, walk.config):
            break
        done += 1
    while done:
        path = output.path(_state(output, done - 1))
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
