"""The proof: planted faults fail it, whether only the writer has them or the reader undoes them; what it says is true."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import blake3
import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.canonical import canonical_values
from support.checkpoints import SMALL, SQUARE, Model, write_bf16, write_hf

from gptoss_convert.convert import proof as proof_module
from gptoss_convert.convert import run, target_gguf, views
from gptoss_convert.convert.certificate import FOLDER_NAME, file_name
from gptoss_convert.errors import ProofFailed
from gptoss_convert.kernels import mxfp4
from gptoss_convert.kernels.chunks import Chunk, Mxfp4, Rows
from gptoss_convert.kernels.codecs import CODECS, encode_float
from gptoss_convert.kernels.experts import probes
from gptoss_convert.quant import encode as encode_module
from gptoss_convert.quant.encode import encode_packed

Patch = pytest.MonkeyPatch
F32 = NDArray[np.float32]
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
TENSORS = "does not hold the source's values"
EXPERTS = "does not compute what the source's computes"


def target_of(to: str, folder: Path) -> Path:
    return folder / ("out.gguf" if to == "gguf" else "out")


def assert_fails(source: Path, to: str, folder: Path, convert: Any, words: str, **options: Any) -> None:
    """The conversion fails its proof, for the reason given, and leaves nothing on the disk."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(ProofFailed, match=words):
        convert(source, target_of(to, folder), to, **options)
    assert sorted(folder.rglob("*")) == before


def again(chunk: Chunk, values: F32) -> Chunk:
    """Other values in the chunk's own encoding."""
    values = np.ascontiguousarray(values)
    if isinstance(chunk, Mxfp4):
        return encode_packed(Rows("f32", values.view(np.uint8)))
    return Rows(chunk.encoding, np.ascontiguousarray(encode_float(values, chunk.encoding)).view(np.uint8))


def rows_reordered(order: Callable[[int], NDArray[np.intp]]) -> Callable[[Chunk], Chunk]:
    return lambda chunk: chunk.select(order(chunk.shape[0]))


def other_nibbles(chunk: Chunk) -> Chunk:
    """Each byte's two elements exchanged."""
    if isinstance(chunk, Mxfp4):
        return Mxfp4((chunk.blocks >> 4 | chunk.blocks << 4).astype(np.uint8), chunk.scales)
    values = chunk.values()
    return again(chunk, values.reshape(len(values), -1, 2)[:, :, ::-1].reshape(values.shape))


# tensor it befalls, what happens to a chunk of it
FAULTS: dict[str, tuple[str, Callable[[Chunk], Chunk]]] = {
    "a square matrix transposed": (DOWN, lambda chunk: again(chunk, chunk.values().T)),
    "gate and up exchanged": (GATE_UP, rows_reordered(lambda n: np.arange(n).reshape(-1, 2)[:, ::-1].reshape(-1))),
    "halves for alternating rows": (GATE_UP, rows_reordered(lambda n: np.arange(n).reshape(2, -1).T.reshape(-1))),
    "alternating rows for halves": (GATE_UP, rows_reordered(lambda n: np.arange(n).reshape(-1, 2).T.reshape(-1))),
    "nibbles exchanged in gate and up": (GATE_UP, other_nibbles),
    "nibbles exchanged in down": (DOWN, other_nibbles),
    "gate's and up's biases exchanged": (
        GATE_UP + "_bias",
        lambda chunk: again(chunk, chunk.values().reshape(len(chunk.values()), -1, 2)[:, :, ::-1].reshape(chunk.shape)),
    ),
    "one row lost": (DOWN, rows_reordered(lambda n: np.minimum(np.arange(n) + (np.arange(n) == 7), n - 1))),
}


@pytest.mark.parametrize("to", ["gguf", "hf", "original", "bf16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_writer_fails_the_proof(
    fault: str, to: str, square_folder: Path, tmp_path: Path, convert: Any, monkeypatch: Patch
) -> None:
    tensor, spoil = FAULTS[fault]
    true_read, true_prove = views.Packed.read, proof_module.prove
    true_stored = views.Stored.read
    writing = True

    def spoiled(read: Any, wanted: bool) -> Any:
        def wrapped(self: Any, expert: int, start: int, stop: int) -> Chunk:
            chunk = read(self, expert, start, stop)
            if not (writing and wanted and isinstance(self, views.Packed)):
                return chunk
            is_gate_up = self.stack[1] == 2 * SQUARE.intermediate
            return spoil(chunk) if is_gate_up == tensor.startswith(GATE_UP) else chunk

        return wrapped

    def spoil_step(step: Any, plan: Any, output: Any, true: Any = run.do_step) -> str:
        nonlocal writing
        if "bias" in tensor and step.tensor.endswith(tensor):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(views.Stored, "read", lambda *a: spoil(true_stored(*a)))
                return str(true(step, plan, output))
        return str(true(step, plan, output))

    def prove(*arguments: Any, **options: Any) -> Any:
        nonlocal writing
        writing = False
        return true_prove(*arguments, **options)

    from gptoss_convert.convert import conversion

    monkeypatch.setattr(views.Packed, "read", spoiled(true_read, "bias" not in tensor))
    monkeypatch.setattr(run, "do_step", spoil_step)
    monkeypatch.setattr(conversion, "prove", prove)
    assert_fails(square_folder, to, tmp_path, convert, TENSORS, threads=1)


# --- faults that reading back undoes -----------------------------------------------------------------------------------


def transposed_in_reader_and_writer(patch: Patch) -> None:
    """bf16: [out, in] written where [in, out] belongs, and read back as it was written."""

    def write(chunk: Chunk, codec: str, step: Any, *_: Any) -> NDArray[Any]:
        return np.ascontiguousarray(encode_float(chunk.values(), codec))

    def read(self: views.Transposed, expert: int, start: int, stop: int) -> Rows:
        _, rows, _columns = self.stack
        whole = self.base.read(expert, 0, self.base.stack[1])
        assert isinstance(whole, Rows)
        return Rows(whole.encoding, whole.data.reshape(rows, -1)[start:stop])

    patch.setattr(run, "_transposed", write)
    patch.setattr(views.Transposed, "read", read)


def exchanged_in_reader_and_writer(patch: Patch) -> None:
    """GGUF: up's rows in ffn_gate_exps and gate's in ffn_up_exps, biases too, and read back exchanged."""
    true = target_gguf._slots
    patch.setattr(
        target_gguf,
        "_slots",
        lambda *a: [replace(s, part={"gate": "up", "up": "gate", "": ""}[s.part]) for s in true(*a)],
    )
    read = views.Alternating.read
    patch.setattr(
        views.Alternating,
        "read",
        lambda self, expert, start, stop: read(replace(self, gate=self.up, up=self.gate), expert, start, stop),
    )


def halved_in_reader_and_writer(patch: Patch) -> None:
    """GGUF: ffn_gate_exps holds the first half of the alternating rows, ffn_up_exps the second; read back as halves."""
    true = run.piece_bytes

    def write(chunk: Chunk, piece: Any, step: Any, *more: Any) -> Any:
        if not piece.part:
            return true(chunk, piece, step, *more)
        count = chunk.shape[1 if piece.columns else 0]
        first = np.arange(count).reshape(2, -1)
        order = np.stack([first[0], first[1]], axis=1).reshape(-1)  # so that even ones are the first half
        if piece.columns:
            chunk = again(chunk, chunk.values()[:, order])
        else:
            chunk = chunk.select(order)
        return true(chunk, piece, step, *more)

    def read(self: views.Alternating, expert: int, start: int, stop: int) -> Chunk:
        if self.columns:
            both = [view.read(expert, start, stop) for view in (self.gate, self.up)]
            return again(both[0], np.concatenate([part.values() for part in both], axis=1))
        both = [view.read(expert, 0, view.stack[1]) for view in (self.gate, self.up)]
        if isinstance(both[0], Mxfp4):
            blocks, scales = (np.concatenate([getattr(part, name) for part in both]) for name in ("blocks", "scales"))
            return Mxfp4(blocks[start:stop], scales[start:stop])
        return Rows(both[0].encoding, np.concatenate([part.data for part in both])[start:stop])  # type: ignore[union-attr]

    patch.setattr(run, "piece_bytes", write)
    patch.setattr(views.Alternating, "read", read)


def nibbles_of_the_release_in_reader_and_writer(patch: Patch) -> None:
    """GGUF: element 2j low and 2j+1 high, as in the release, where ggml has j and j+16; read back the same way."""

    def to_ggml(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.concatenate([scales[..., None], blocks], axis=-1).reshape(len(scales), -1)

    def from_ggml(rows: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        whole = rows.reshape(len(rows), -1, 17)
        return np.ascontiguousarray(whole[:, :, 1:]), np.ascontiguousarray(whole[:, :, 0])

    patch.setattr(mxfp4, "to_ggml", to_ggml)
    patch.setattr(mxfp4, "from_ggml", from_ggml)


def nibbles_exchanged_in_the_decoder(patch: Patch) -> None:
    """MXFP4 → bf16: source and artifact are compared through the same wrong decoder."""
    true, true_bf16 = mxfp4.decode, mxfp4.decode_bf16

    def swap(blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return (blocks >> 4 | blocks << 4).astype(np.uint8)

    patch.setattr(mxfp4, "decode", lambda blocks, scales: true(swap(blocks), scales))
    patch.setattr(mxfp4, "decode_bf16", lambda blocks, scales: true_bf16(swap(blocks), scales))


def codes_misread(patch: Patch) -> None:
    """MXFP4 → bf16: 4 and 6 taken for 3 and 4, by the same decoder for both sides."""
    table = mxfp4._PAIR.copy()
    table[table == 8], table[table == 12] = 6, 8
    patch.setattr(mxfp4, "_PAIR", table)


def experts_reversed_in_reader_and_writer(patch: Patch) -> None:
    """GGUF: the last expert's matrices first, and read back reversed."""
    true, read = run.do_step, views.Alternating.read

    def write(step: Any, plan: Any, output: Any) -> Any:
        if step.tensor.endswith((GATE_UP,)):
            step = replace(step, expert=SQUARE.experts - 1 - step.expert)
        return true(step, plan, output)

    def back(self: views.Alternating, expert: int, start: int, stop: int) -> Chunk:
        return read(self, expert if self.columns else SQUARE.experts - 1 - expert, start, stop)

    patch.setattr(run, "do_step", write)
    patch.setattr(views.Alternating, "read", back)


HIDDEN: dict[str, tuple[Callable[[Patch], None], str, dict[str, str]]] = {
    "a square matrix transposed": (transposed_in_reader_and_writer, "bf16", {}),
    "gate and up exchanged": (exchanged_in_reader_and_writer, "gguf", {}),
    "gate and up exchanged, in bf16": (exchanged_in_reader_and_writer, "gguf", {"experts": "bf16"}),
    "half-split gate and up": (halved_in_reader_and_writer, "gguf", {}),
    "half-split gate and up, in f32": (halved_in_reader_and_writer, "gguf", {"experts": "f32"}),
    "the release's nibble order": (nibbles_of_the_release_in_reader_and_writer, "gguf", {}),
    "nibbles exchanged in the decoder": (nibbles_exchanged_in_the_decoder, "bf16", {}),
    "codes misread": (codes_misread, "bf16", {}),
    "codes misread, into a GGUF": (codes_misread, "gguf", {"experts": "f16"}),
    "experts reversed": (experts_reversed_in_reader_and_writer, "gguf", {}),
}


@pytest.mark.parametrize("fault", HIDDEN)
def test_a_fault_that_reading_back_undoes_fails_the_proof(
    fault: str, square_folder: Path, tmp_path: Path, convert: Any, monkeypatch: Patch
) -> None:
    plant, to, options = HIDDEN[fault]
    plant(monkeypatch)
    assert_fails(square_folder, to, tmp_path, convert, EXPERTS, **options)


@pytest.mark.parametrize("fault", HIDDEN)
def test_that_fault_is_one_which_comparing_tensors_does_not_find(
    fault: str, square_folder: Path, tmp_path: Path, convert: Any, monkeypatch: Patch
) -> None:
    plant, to, options = HIDDEN[fault]
    plant(monkeypatch)
    monkeypatch.setattr(proof_module, "_prove_experts", lambda *_: None)
    outcome = convert(square_folder, target_of(to, tmp_path), to, **options)
    assert outcome.proof.lossless


def test_a_source_read_transposed_fails_the_proof(
    square_model: Model, tmp_path: Path, convert: Any, monkeypatch: Patch
) -> None:
    """The fault is the source's reader's alone: what it reads is written and read back faithfully."""
    write_bf16(square_model, tmp_path / "in")
    read = views.Transposed.read

    def unturned(self: views.Transposed, expert: int, start: int, stop: int) -> Rows:
        if self.stack[1] != self.stack[2]:
            return read(self, expert, start, stop)
        return self.base.read(expert, start, stop)  # type: ignore[return-value]

    monkeypatch.setattr(views.Transposed, "read", unturned)
    assert_fails(tmp_path / "in", "hf", tmp_path, convert, EXPERTS)


# --- faults that are no permutation ------------------------------------------------------------------------------------


def writer_changes(patch: Patch, tensor: str, change: Callable[[NDArray[Any]], Any]) -> None:
    """Let `change` alter the bytes that are written for a tensor, in place."""
    true = run.piece_bytes

    def write(chunk: Chunk, piece: Any, step: Any, *more: Any) -> Any:
        data = true(chunk, piece, step, *more).copy()
        if step.tensor.endswith(tensor):
            change(data)
        return data

    patch.setattr(run, "piece_bytes", write)


def test_one_bit_in_any_tensor_fails_the_proof(
    square_folder: Path, tmp_path: Path, convert: Any, monkeypatch: Patch
) -> None:
    def flip(data: NDArray[Any]) -> None:
        data.reshape(-1).view(np.uint8)[-2] ^= 1

    for tensor in (
        "layers.1.self_attn.sinks",
        "layers.2.mlp.router.weight",
        "layers.0.mlp.experts.down_proj_bias",
        "norm.weight",
    ):
        for to in ("gguf", "hf"):
            with monkeypatch.context() as patch:
                writer_changes(patch, tensor, flip)
                assert_fails(square_folder, to, tmp_path, convert, TENSORS)


def test_a_widened_vector_that_is_somewhat_off_is_no_rounding(
    square_folder: Path, tmp_path: Path, convert: Any, monkeypatch: Patch
) -> None:
    """bf16 → f32 is exact: a fifth too large is a fault, though bf16 and f32 are different encodings."""

    def scale(data: NDArray[Any]) -> None:
        data.view(np.float32)[...] *= np.float32(1.2)

    writer_changes(monkeypatch, "post_attention_layernorm.weight", scale)
    assert_fails(square_folder, "gguf", tmp_path, convert, TENSORS)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_rounded_tensor_with_a_value_that_is_no_number_fails(
    bad: float, square_folder: Path, tmp_path: Path, convert: Any, monkeypatch: Patch
) -> None:
    def spoil(data: NDArray[Any]) -> None:
        data.reshape(-1).view(np.uint8)[:2] = np.array([bad], "<f2").view(np.uint8)

    writer_changes(monkeypatch, "lm_head.weight", spoil)
    assert_fails(square_folder, "gguf", tmp_path, convert, TENSORS, dense="q8_0")


def test_a_rounded_tensor_that_is_half_lost_fails(
    square_folder: Path, tmp_path: Path, convert: Any, monkeypatch: Patch
) -> None:
    def clear(data: NDArray[Any]) -> None:
        data.reshape(len(data), -1)[: len(data) // 3] = 0

    writer_changes(monkeypatch, "lm_head.weight", clear)
    assert_fails(square_folder, "gguf", tmp_path, convert, TENSORS, dense="q8_0")


@pytest.mark.parametrize(
    ("key", "value"), [("rope.freq_base", 10000.0), ("attention.sliding_window", 128), ("expert_used_count", 1)]
)
def test_an_artifact_that_describes_another_model_fails(
    key: str, value: Any, square_folder: Path, tmp_path: Path, convert: Any, monkeypatch: Patch
) -> None:
    from gptoss_convert.formats.gguf import f32, u32

    true = target_gguf._model
    changed = f32(value) if isinstance(value, float) else u32(value)
    monkeypatch.setattr(
        target_gguf, "_model", lambda *a: [(k, changed if k == f"gpt-oss.{key}" else v) for k, v in true(*a)]
    )
    assert_fails(square_folder, "gguf", tmp_path, convert, "another model")


def test_without_the_proof_faults_are_not_found_and_the_certificate_says_so(
    square_folder: Path, tmp_path: Path, convert: Any, monkeypatch: Patch
) -> None:
    exchanged_in_reader_and_writer(monkeypatch)
    outcome = convert(square_folder, tmp_path / "out.gguf", "gguf", proof=False)
    assert outcome.proof is None
    document = json.loads((tmp_path / file_name("out.gguf")).read_text())
    assert (document["proof"], document["lossless"], document["lost"]) == (None, None, None)


# --- what it says ------------------------------------------------------------------------------------------------------

TALL = replace(SMALL, layers=2, experts=3, hidden=64, intermediate=608, vocab=1100, spare_rows=711, heads=18)


def digest(values: F32, dtype: str) -> str:
    """By the words of proof.py: BLAKE3 over the BLAKE3 digests of leaves of 1024 rows; values [E, R, C]."""
    leaves = []
    for matrix in values + np.float32(0):
        for start in range(0, len(matrix), 1024):
            leaf = torch.from_numpy(np.ascontiguousarray(matrix[start : start + 1024]))
            stored = leaf.to(torch.bfloat16).view(torch.int16) if dtype == "bf16" else leaf
            leaves.append(blake3.blake3(stored.numpy().tobytes()).digest())
    return blake3.blake3(b"".join(leaves)).hexdigest()


@pytest.fixture(scope="module")
def tall(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A model in which matrices have more rows than a leaf."""
    model, folder = Model(TALL), tmp_path_factory.mktemp("tall") / "in"
    write_hf(model, folder)
    return model, folder


@pytest.mark.parametrize(("to", "options"), [("gguf", {}), ("bf16", {}), ("gguf", {"experts": "q8_0", "dense": "f32"})])
def test_the_digests_in_the_certificate_are_those_of_the_documented_formula(
    to: str, options: dict[str, str], tall: tuple[Model, Path], tmp_path: Path, convert: Any
) -> None:
    model, folder = tall
    outcome = convert(folder, target_of(to, tmp_path), to, **options)
    values = canonical_values(model)
    told = {tensor["name"]: tensor for tensor in outcome.document["proof"]["tensors"]}
    assert told.keys() == values.keys()
    for name, tensor in told.items():
        assert tensor["values_dtype"] == "bf16"
        assert tensor["values_digest"] == digest(values[name], "bf16"), name
        assert "artifact_digest" not in tensor
        assert "rms_error" not in tensor


def test_the_files_in_the_certificate_are_the_ones_on_the_disk(
    tall: tuple[Model, Path], tmp_path: Path, convert: Any
) -> None:
    _, folder = tall
    for to, options in (("hf", {"split_bytes": 400_000}), ("gguf", {}), ("gguf", {"split_bytes": 400_000})):
        target = tmp_path / ("out.gguf" if to == "gguf" and not options else f"out-{to}")
        outcome = convert(folder, target, to, **options)
        beside = tmp_path / file_name(target.name) if target.suffix else target / FOLDER_NAME
        document = json.loads(beside.read_text())
        assert document == json.loads(json.dumps(outcome.document))
        made = {target.name: target} if target.suffix else {p.name: p for p in target.iterdir() if p != beside}
        assert {file["name"] for file in document["artifact"]["files"]} == made.keys()
        for entries, where in ((document["artifact"]["files"], made), (document["source"]["files"], None)):
            for file in entries:
                data = (where[file["name"]] if where else folder / file["name"]).read_bytes()
                assert file["size"] == len(data)
                assert file["sha256"] == hashlib.sha256(data).hexdigest()
        assert document["lossless"] is True
        assert document["source"]["official"] is False
        assert (
            document["source"]["tokenizer"]["sha256"]
            == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
        )
        for text in (str(tmp_path), str(folder)):
            assert text not in beside.read_text()


def test_verdicts_tell_bytes_from_values(tall: tuple[Model, Path], tmp_path: Path, convert: Any) -> None:
    _, folder = tall
    gguf_proof = convert(folder, tmp_path / "m.gguf", "gguf").document["proof"]
    # MXFP4 comes back bit for bit; embedding, head and attention matrices are bf16 still; what is f32 now has the values.
    assert gguf_proof["byte_equal"] == 2 + TALL.layers * (4 + 2)
    assert gguf_proof["value_equal"] == len(gguf_proof["tensors"]) - gguf_proof["byte_equal"]
    assert gguf_proof["different"] == 0
    bf16_proof = convert(folder, tmp_path / "bf16", "bf16").document["proof"]
    assert bf16_proof["value_equal"] == 2 * TALL.layers


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, F32]]]:
    """A fine-tune in bf16 whose experts are no MXFP4 values any more, and its values."""
    folder, model = tmp_path_factory.mktemp("noisy") / "in", Model(SMALL)
    write_bf16(model, folder)
    generator = torch.Generator().manual_seed(3)
    values = canonical_values(model)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith((GATE_UP, DOWN)):
                noise = 1 + 0.05 * torch.randn(tensor.shape, generator=generator)
                tensors[name] = (tensor.float() * noise).to(torch.bfloat16)
                values[name] = tensors[name].float().transpose(1, 2).contiguous().numpy()
        save_file(tensors, path, metadata={"format": "pt"})
    return folder, values


def expert(values: dict[str, F32], layer: int, number: int, x: F32) -> NDArray[np.float64]:
    stem = f"model.layers.{layer}.mlp.experts."
    weights = {n: values[stem + n][number].astype(np.float64) for n in ("gate_up_proj", "down_proj")}
    biases = {n: values[f"{stem}{n}_bias"][0, number].astype(np.float64) for n in weights}
    h = x.astype(np.float64) @ weights["gate_up_proj"].T + biases["gate_up_proj"]
    gate, up = np.minimum(h[:, 0::2], 7), np.clip(h[:, 1::2], -7, 7)
    act = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    return act @ weights["down_proj"].T + biases["down_proj"]


def gguf_values(path: Path, values: dict[str, F32]) -> dict[str, F32]:
    """What gguf-py reads of the experts of a GGUF, beside the other values."""
    found = dict(values)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def read(name: str) -> F32:
        tensor = tensors[name]
        return np.asarray(gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type), np.float32)

    for layer in range(SMALL.layers):
        stem = f"model.layers.{layer}.mlp.experts."
        gate, up = (read(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up"))
        found[stem + "gate_up_proj"] = np.stack([gate, up], axis=2).reshape(SMALL.experts, -1, gate.shape[-1])
        found[stem + "down_proj"] = read(f"blk.{layer}.ffn_down_exps.weight")
    return found


@pytest.mark.parametrize(("experts", "low", "high"), [("mxfp4", 0.03, 0.2), ("q8_0", 0.001, 0.02)])
def test_what_a_lossy_codec_loses_is_measured(
    experts: str, low: float, high: float, noisy: tuple[Path, dict[str, F32]], tmp_path: Path, convert: Any
) -> None:
    folder, values = noisy
    outcome = convert(folder, tmp_path / "m.gguf", "gguf", experts=experts)
    made = gguf_values(tmp_path / "m.gguf", values)
    document = outcome.document
    assert document["lossless"] is False
    assert document["lost"] == [
        f"{2 * SMALL.layers} tensors rounded from bf16 to {experts}: relative error at most "
        f"{max(t.rms_error for t in outcome.proof.tensors):.3g}"
    ]
    for tensor in outcome.proof.tensors:
        if not tensor.name.endswith((GATE_UP, DOWN)):
            assert tensor.verdict != "different"
            continue
        want, got = values[tensor.name].astype(np.float64), made[tensor.name].astype(np.float64)
        assert tensor.verdict == "different"
        assert tensor.different == int((want != got).sum())
        assert tensor.rms_error == pytest.approx(math.sqrt(((want - got) ** 2).sum() / (want**2).sum()), rel=1e-5)
        assert low < tensor.rms_error < high
        assert tensor.largest_error == pytest.approx(np.abs(want - got).max(), rel=1e-5)
        assert tensor.values_digest == digest(values[tensor.name], "bf16")
        dtype = "bf16" if experts == "mxfp4" else "f32"
        assert (tensor.artifact_dtype, tensor.artifact_digest) == (dtype, digest(made[tensor.name], dtype))
    for layer in outcome.proof.layers:
        for number, error in enumerate(layer.expert_errors):
            x = probes(SMALL.hidden, 2, seed=layer.layer * SMALL.experts + number)
            want, got = (expert(v, layer.layer, number, x) for v in (values, made))
            true = (np.linalg.norm(want - got, axis=1) / np.linalg.norm(want, axis=1)).max()
            assert error == pytest.approx(true, rel=1e-2)
            assert 0 < error <= layer.allowed <= 0.5


@pytest.mark.parametrize("fault", ["gate and up exchanged", "half-split gate and up"])
def test_a_lossy_codec_does_not_hide_a_fault(
    fault: str, noisy: tuple[Path, dict[str, F32]], tmp_path: Path, convert: Any, monkeypatch: Patch
) -> None:
    HIDDEN[fault][0](monkeypatch)
    for experts in ("mxfp4", "q8_0"):
        assert_fails(noisy[0], "gguf", tmp_path, convert, EXPERTS, experts=experts)


def test_a_noisy_fine_tune_into_hf_is_rounded_to_the_nearest_and_told(
    noisy: tuple[Path, dict[str, F32]], tmp_path: Path, convert: Any
) -> None:
    outcome = convert(noisy[0], tmp_path / "out", "hf")
    assert outcome.proof.count("different") == 2 * SMALL.layers
    assert 0 < outcome.proof.worst_output < 0.5
    with safe_open(next((tmp_path / "out").glob("*.safetensors")), "pt") as file:
        assert any(name.endswith("_blocks") for name in file.keys())  # noqa: SIM118


def test_a_codec_that_errs_alike_in_writing_and_reading_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convert: Any
) -> None:
    # Nibbles exchanged by encoder and decoder alike: tensor by tensor all is well, but nobody else reads the file so.
    write_hf(Model(SQUARE), tmp_path / "source")
    q5 = CODECS["q5_0"]
    body = slice(6, 22)

    def swapped(rows: Any) -> Any:
        blocks = rows.reshape(len(rows), -1, 22).copy()
        blocks[:, :, body] = blocks[:, :, body] << 4 | blocks[:, :, body] >> 4
        return blocks.reshape(len(rows), -1)

    wrong = replace(q5, decode=lambda rows: q5.decode(swapped(rows)), encode=lambda v, i: swapped(q5.encode(v, i)))  # type: ignore[misc]
    monkeypatch.setitem(CODECS, "q5_0", wrong)
    real = encode_module._transcode
    monkeypatch.setattr(encode_module, "_transcode", lambda *given: swapped(real(*given)))
    with pytest.raises(ProofFailed, match="read a tensor differently"):
        convert(tmp_path / "source", tmp_path / "m.gguf", "gguf", experts="q5_0")
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_codec_without_a_second_decoder_is_named(hf_folder: Path, tmp_path: Path, convert: Any) -> None:
    done = convert(hf_folder, tmp_path / "a.gguf", "gguf", type="q2_0", allow_larger=True)
    assert done.document["proof"]["codecs_without_second_decoder"] == ["q2_0"]
    done = convert(hf_folder, tmp_path / "b.gguf", "gguf", experts="q5_0")
    assert done.document["proof"]["codecs_without_second_decoder"] == []
