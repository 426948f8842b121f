"""Witnesses: what an expert computes when a file is read as its consumer reads it.

The converter's views and the proof's witnesses both read the same files, but a witness goes from the raw tensors, by the
words of each format's specification, straight to the expert's output on a probe. It shares with the views only the header
parsers. A mistake in a view (a transpose that a square matrix hides, gate and up exchanged, halves taken for alternating
rows, nibbles in the wrong order) is therefore not repeated here, and the outputs part.

    y = down · act(gate · x + b_gate, up · x + b_up) + b_down            per layer, expert and probe
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.cut import Kept
from gptoss_convert.convert.source import Layout, Source
from gptoss_convert.errors import ProofFailed
from gptoss_convert.formats.files import SourceFile
from gptoss_convert.formats.gguf import read_header as read_gguf
from gptoss_convert.formats.onnx import TYPE_NAMES
from gptoss_convert.formats.onnx import read_header as read_onnx
from gptoss_convert.formats.safetensors import read_header as read_safetensors
from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.kernels.experts import F64, activation, product
from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.witness import decode_ggml, decode_packed, decode_release, decode_unsigned

ROWS, READ_ROWS = 64, 1024
SAMPLE = 2  # rows of each expert that are also decoded by the gguf package
_WIDTH = {"BF16": "bf16", "F16": "f16", "F32": "f32", "FLOAT": "f32"}


@dataclass(frozen=True)
class Raw:
    """A tensor as the file describes it: dimensions outermost first."""

    file: SourceFile
    offset: int
    kind: str
    shape: tuple[int, ...]

    def rows(self, first: int, count: int, row_bytes: int) -> U8:
        """`count` rows of bytes from row `first` on, the tensor seen as rows of `row_bytes`."""
        return self.file.read_array(self.offset + first * row_bytes, count * row_bytes).reshape(count, row_bytes)


Matrix = Callable[[F32], F64]  # probes f32 [P, C] → products f64 [P, R]
Fetch = Callable[[int, int], tuple[U8, ...]]  # first row, count → the bytes of these rows, as the decoder takes them


@dataclass(frozen=True)
class Expert:
    """The three products and biases of one expert, as its consumer computes them."""

    gate: Matrix
    up: Matrix
    down: Matrix
    gate_bias: F64
    up_bias: F64
    down_bias: F64

    def forward(self, probes: F32, limit: float, keep: NDArray[np.bool_] | None = None) -> F64:
        """probes f32 [P, D] → outputs f64 [P, D]. keep: of the F neurons those that are not dropped."""
        gate = self.gate(probes) + self.gate_bias
        up = self.up(probes) + self.up_bias
        inner = activation(gate, up, limit).astype(np.float32)
        return self.down(inner if keep is None else inner * keep) + self.down_bias


class Witness:
    """Reads experts out of a source's files by their raw tensors."""

    def __init__(self, source: Source) -> None:
        self.config: ModelConfig = source.wide or source.config
        self._true_hidden = source.config.hidden
        self._kept = source.kept
        self.layout = source.layout
        self._meaning = source.gate_meaning
        self.unchecked: set[str] = set()  # codecs that only our own decoder reads
        self._raw = _raw_tensors(source)
        self._end = source.files[-1].size
        self._file = source.files[-1]

    def forward(
        self, layer: int, expert: int, probes: F32, limit: float, kept: Mapping[int, Kept] | None = None
    ) -> F64:
        """One expert's output on probes f32 [P, D] → f64 [P, D]. A wide file gets zeros beyond D, and must give zeros there.

        kept: the neurons of a file that was cut from this one; the others are left out.
        """
        keep = None
        if kept is not None:
            own = np.arange(self.config.intermediate) if self._kept is None else self._kept[layer][expert]
            keep = np.isin(own, kept[layer][expert])
        given = np.zeros((len(probes), self.config.hidden), np.float32)
        given[:, : self._true_hidden] = probes
        output = self.expert(layer, expert).forward(given, limit, keep)
        beyond = output[:, self._true_hidden :]
        if beyond.any():
            output[:, : self._true_hidden] = np.nan  # what reaches the widened stream spoils every later norm
        return output[:, : self._true_hidden]

    def expert(self, layer: int, expert: int) -> Expert:
        """One expert of one layer."""
        if self.layout is Layout.METAL:
            return self._metal(layer, expert)
        if self.layout is Layout.GGUF:
            return self._gguf(layer, expert)
        if self.layout is Layout.ORIGINAL:
            stem = f"block.{layer}.mlp."
            return self._packed(
                [stem + "mlp1_weight", stem + "mlp2_weight"], [stem + "mlp1_bias", stem + "mlp2_bias"], ".", expert
            )
        if self.layout is Layout.ONNX:
            return self._qmoe(f"model.layers.{layer}.moe.experts.", expert)
        stem = f"model.layers.{layer}.mlp.experts."
        if self.layout is Layout.HF:
            names = [stem + "gate_up_proj", stem + "down_proj"]
            return self._packed(names, [name + "_bias" for name in names], "_", expert)
        if self.layout is Layout.COMPRESSED:
            packed = f"{stem}{expert}.w13_weight_packed" in self._raw
            return self._streamed(stem, expert) if packed else self._fused_int8(stem, expert)
        if self.layout is Layout.LINEARISED:
            return self._linearised(stem, expert)
        if self.layout is Layout.PER_EXPERT:
            return self._per_expert(stem, expert)
        return self._fused(stem, expert, "_blocks" if self.layout is Layout.BF16_MISNAMED else "")

    def _packed(self, weights: list[str], biases: list[str], joint: str, expert: int) -> Expert:
        """Release order: [E, out, in/32, 16] and [E, out, in/32]; rows of the first alternate gate, up."""
        products = [self._packed_product(name, joint, expert) for name in weights]
        bias, down_bias = (self._vector(name, expert) for name in biases)
        return Expert(
            gate=lambda x: products[0](x)[:, 0::2], up=lambda x: products[0](x)[:, 1::2], down=products[1],
            gate_bias=bias[0::2], up_bias=bias[1::2], down_bias=down_bias,
        )  # fmt: skip

    def _qmoe(self, stem: str, expert: int) -> Expert:
        """QMoE: fc1 is gate_up_proj with swiglu_fusion=1, rows alternating gate, up; fc2 is down_proj; all [E, out, …]."""
        gate_up, down = (self._qmoe_product(f"{stem}{name}.", expert) for name in ("gate_up_proj", "down_proj"))
        both = _once(gate_up)
        bias, down_bias = (self._vector(f"{stem}{name}.bias", expert) for name in ("gate_up_proj", "down_proj"))
        return Expert(
            gate=lambda x: both(x)[:, 0::2], up=lambda x: both(x)[:, 1::2], down=down,
            gate_bias=bias[0::2], up_bias=bias[1::2], down_bias=down_bias,
        )  # fmt: skip

    def _qmoe_product(self, name: str, expert: int) -> Matrix:
        codes, scales = self._raw[name + "qweight"], self._raw[name + "scales"]
        _, out, size = codes.shape
        groups = scales.shape[2]
        width = 4 if scales.kind == "FLOAT" else 1

        def fetch(first: int, count: int) -> tuple[U8, ...]:
            at = expert * out + first
            return codes.rows(at, count, size), scales.rows(at, count, width * groups)

        def decode(c: U8, s: U8) -> F32:
            """Of FLOAT8E8M0 scales MXFP4, else integers."""
            return decode_release(c, s) if width == 1 else decode_unsigned(c, s, 8 * size // (32 * groups))

        return _product_of(fetch, decode, out)

    def _packed_product(self, name: str, joint: str, expert: int) -> Matrix:
        blocks, scales = self._raw[f"{name}{joint}blocks"], self._raw[f"{name}{joint}scales"]
        _, out, groups, _ = blocks.shape

        def fetch(first: int, count: int) -> tuple[U8, ...]:
            at = expert * out + first
            return blocks.rows(at, count, groups * 16), scales.rows(at, count, groups)

        return _once(_product_of(fetch, decode_release, out))

    def _gguf(self, layer: int, expert: int) -> Expert:
        """ggml: [in, out, expert] with `in` fastest, so each expert's rows are outputs; gate and up are two tensors."""
        parts = {p: f"blk.{layer}.ffn_{p}_exps." for p in ("gate", "up", "down")}
        matrices = {p: self._ggml_product(self._raw[name + "weight"], expert) for p, name in parts.items()}
        biases = {p: self._vector(name + "bias", expert) for p, name in parts.items()}
        return Expert(matrices["gate"], matrices["up"], matrices["down"], biases["gate"], biases["up"], biases["down"])

    def _ggml_product(self, raw: Raw, expert: int) -> Matrix:
        _, out, columns = raw.shape
        codec = CODECS[raw.kind]
        size = codec.row_bytes(columns)
        decode = decode_ggml if raw.kind == "mxfp4" else codec.decode
        if raw.kind != "mxfp4" and codec.block > 1:
            self._require_common_reading(raw, raw.rows(expert * out, min(SAMPLE, out), size))
        return _product_of(lambda first, count: (raw.rows(expert * out + first, count, size),), decode, out)

    def _require_common_reading(self, raw: Raw, rows: U8) -> None:
        """Our decoder and the gguf package's must read some rows of every expert alike: ours alone would not see its mistake.

        A codec newer than the package is noted in `unchecked`, and said in the certificate.
        """
        import gguf

        codec = CODECS[raw.kind]
        if codec.ggml_id not in gguf.GGMLQuantizationType.__members__.values():
            self.unchecked.add(raw.kind)
            return
        try:
            theirs = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(codec.ggml_id))
        except NotImplementedError:
            self.unchecked.add(raw.kind)
            return
        ours = codec.decode(rows)
        if not np.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * float(np.abs(ours).max())):
            raise ProofFailed(
                "our decoder and the gguf package's read a tensor differently", file=raw.file.path, found=raw.kind,
                remedy="this is a fault of this tool; nothing was written. Please report it",
            )  # fmt: skip

    def _metal(self, layer: int, expert: int) -> Expert:
        """Records counted from the end of the file, where the last layer's last expert stops."""
        c = self.config
        sizes = [(2 * c.intermediate, c.hidden), (c.hidden, c.intermediate)]
        record = sum(out * columns * 17 // 32 + 2 * out for out, columns in sizes)
        stride = c.experts * record + -(c.experts * record) % 16384
        at = self._end - (c.layers - 1 - layer) * stride - (c.experts - expert) * record
        products, biases = [], []
        for out, columns in sizes:
            blocks = Raw(self._file, at, "U8", (out, columns // 2))
            scales = Raw(self._file, at + out * columns // 2, "U8", (out, columns // 32))
            bias = Raw(self._file, at + out * columns * 17 // 32, "BF16", (1, out))
            products.append(_once(_product_of(_metal_rows(blocks, scales), decode_release, out)))
            biases.append(_numbers(bias, 0, out))
            at += out * columns * 17 // 32 + 2 * out
        return Expert(
            gate=lambda x: products[0](x)[:, 0::2], up=lambda x: products[0](x)[:, 1::2], down=products[1],
            gate_bias=biases[0][0::2], up_bias=biases[0][1::2], down_bias=biases[1],
        )  # fmt: skip

    def _fused(self, stem: str, expert: int, suffix: str) -> Expert:
        """transformers: x @ gate_up_proj[e] with [in, out]; gate = [..., 0::2], up = [..., 1::2]; then @ down_proj[e]."""
        gate_up = _once(self._right_product(self._raw[f"{stem}gate_up_proj{suffix}"], expert))
        down = self._right_product(self._raw[f"{stem}down_proj{suffix}"], expert)
        return self._alternating(stem, expert, gate_up, down)

    @staticmethod
    def _right_product(raw: Raw, expert: int) -> Matrix:
        _, into, out = raw.shape
        codec = CODECS[_WIDTH[raw.kind]]

        def multiply(x: F32) -> F64:
            total = np.zeros((len(x), out))
            for first in range(0, into, ROWS):
                count = min(ROWS, into - first)
                weights = codec.decode(raw.rows(expert * into + first, count, codec.row_bytes(out)))
                total += x[:, first : first + count] @ weights
            return total

        return multiply

    def _streamed(self, stem: str, expert: int) -> Expert:
        """vLLM: w13 [2F, D] with gate and up rows alternating, w2 [D, F]; the biases fused as in transformers."""
        gate_up, down = (self._packed_integers(f"{stem}{expert}.{name}_weight_") for name in ("w13", "w2"))
        return self._alternating(stem, expert, _once(gate_up), down)

    def _packed_integers(self, name: str) -> Matrix:
        words, scales = self._raw[name + "packed"], self._raw[name + "scale"]
        out, count = words.shape
        groups = scales.shape[1]

        def fetch(first: int, rows: int) -> tuple[U8, ...]:
            return words.rows(first, rows, 4 * count), scales.rows(first, rows, 2 * groups)

        return _product_of(fetch, lambda w, s: decode_packed(w, s, count // groups), out)

    def _fused_int8(self, stem: str, expert: int) -> Expert:
        """vLLM: x @ codes[e] with [in, out], each output then times its scale."""

        def matrix(name: str) -> Matrix:
            """One projection as what multiplies inputs [T, in] to outputs f64 [T, out]."""
            codes, scales = self._raw[stem + name], self._raw[f"{stem}{name}.weight_scale"]
            _, into, out = codes.shape
            scale = _numbers(scales, expert * out, out)

            def multiply(x: F32) -> F64:
                total = np.zeros((len(x), out))
                for first in range(0, into, ROWS):
                    count = min(ROWS, into - first)
                    q = codes.rows(expert * into + first, count, out).view(np.int8)
                    total += x[:, first : first + count].astype(np.float64) @ q.astype(np.float64)
                return total * scale

            return multiply

        return self._alternating(stem, expert, _once(matrix("gate_up_proj")), matrix("down_proj"))

    def _alternating(self, stem: str, expert: int, gate_up: Matrix, down: Matrix) -> Expert:
        bias, down_bias = (self._vector(f"{stem}{name}_bias", expert) for name in ("gate_up_proj", "down_proj"))
        return Expert(
            gate=lambda x: gate_up(x)[:, 0::2], up=lambda x: gate_up(x)[:, 1::2], down=down,
            gate_bias=bias[0::2], up_bias=bias[1::2], down_bias=down_bias,
        )  # fmt: skip

    def _linearised(self, stem: str, expert: int) -> Expert:
        """nn.Linear of the fused rows: [out, in], alternating."""
        names = [f"{stem}{part}_projs.{expert}." for part in ("gate_up", "down")]
        gate_up, down = (self._linear(name + "weight") for name in names)
        both = _once(gate_up)
        bias, down_bias = (self._vector(name + "bias", 0) for name in names)
        return Expert(
            gate=lambda x: both(x)[:, 0::2], up=lambda x: both(x)[:, 1::2], down=down,
            gate_bias=bias[0::2], up_bias=bias[1::2], down_bias=down_bias,
        )  # fmt: skip

    def _per_expert(self, stem: str, expert: int) -> Expert:
        names = {p: f"{stem}{expert}.{p}_proj." for p in ("gate", "up", "down")}
        gate, up, down = (self._linear(name + "weight") for name in names.values())
        biases = {p: self._vector(name + "bias", 0) for p, name in names.items()}
        if self._meaning != "halves":
            return Expert(gate, up, down, biases["gate"], biases["up"], biases["down"])
        bias = np.concatenate([biases["gate"], biases["up"]])
        return Expert(
            gate=lambda x: np.concatenate([gate(x), up(x)], axis=1)[:, 0::2],
            up=lambda x: np.concatenate([gate(x), up(x)], axis=1)[:, 1::2],
            down=down, gate_bias=bias[0::2], up_bias=bias[1::2], down_bias=biases["down"],
        )  # fmt: skip

    def _linear(self, name: str) -> Matrix:
        raw = self._raw[name]
        out, columns = raw.shape
        codec = CODECS[_WIDTH[raw.kind]]
        size = codec.row_bytes(columns)
        return _product_of(lambda first, count: (raw.rows(first, count, size),), codec.decode, out)

    def _vector(self, name: str, row: int) -> F64:
        raw = self._raw[name]
        return _numbers(raw, row * raw.shape[-1], raw.shape[-1])


def _numbers(raw: Raw, first: int, count: int) -> F64:
    codec = CODECS[_WIDTH.get(raw.kind, raw.kind)]
    width = codec.row_bytes(1)
    data = raw.file.read(raw.offset + first * width, count * width)
    numbers: F64 = codec.decode(np.frombuffer(data, np.uint8).reshape(1, -1))[0].astype(np.float64)
    return numbers


def _metal_rows(blocks: Raw, scales: Raw) -> Fetch:
    def fetch(first: int, count: int) -> tuple[U8, ...]:
        # What the kernels do: the stored scale is 14 above, and the codes are decoded 2^14 too small.
        stored = scales.rows(first, count, scales.shape[1]).astype(np.int16) - 14
        return blocks.rows(first, count, blocks.shape[1]), stored.astype(np.uint8)

    return fetch


def _product_of(fetch: Fetch, decode: Callable[..., F32], out: int) -> Matrix:
    """Read READ_ROWS at a time, decode and multiply ROWS of them, which fit a core's cache."""

    def multiply(x: F32) -> F64:
        result = np.empty((len(x), out), np.float64)
        for first in range(0, out, READ_ROWS):
            raw = fetch(first, min(READ_ROWS, out - first))
            for start in range(0, len(raw[0]), ROWS):
                part = product(decode(*(array[start : start + ROWS] for array in raw)), x)
                result[:, first + start : first + start + part.shape[1]] = part
        return result

    return multiply


def _once(matrix: Matrix) -> Matrix:
    """The product of the same probes is asked for twice, for gate and for up; computed once."""
    memory: list[tuple[F32, F64]] = []

    def multiply(x: F32) -> F64:
        if not memory or memory[0][0] is not x:
            memory[:] = [(x, matrix(x))]
        return memory[0][1]

    return multiply


def _raw_tensors(source: Source) -> Mapping[str, Raw]:
    raw: dict[str, Raw] = {}
    for file in source.files:
        if source.layout is Layout.GGUF:
            for info in read_gguf(file).tensors.values():
                raw[info.name] = Raw(file, info.offset, info.type_name.lower(), tuple(reversed(info.shape)))
        elif source.layout is Layout.ONNX:
            if file.name.endswith(".onnx"):
                data = next(other for other in source.files if other is not file)
                for tensor in read_onnx(file).tensors.values():
                    raw[tensor.name] = Raw(data, tensor.offset, TYPE_NAMES[tensor.kind], tensor.shape)
        elif source.layout is not Layout.METAL:
            for entry in read_safetensors(file).entries.values():
                raw[entry.name] = Raw(file, entry.offset, entry.dtype, entry.shape)
    return raw
