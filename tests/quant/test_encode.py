"""What becomes of a chunk in each codec: exact where it can be, rounded by a named rule, or refused with its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import ggml

from gptoss_convert.errors import BadInput, Refused
from gptoss_convert.kernels import mxfp4
from gptoss_convert.kernels.chunks import Chunk, Mxfp4, Rows
from gptoss_convert.kernels.codecs import CODECS, encode_float
from gptoss_convert.quant.encode import DENSE_CODECS, EXPERT_CODECS, encode, encode_packed, fate

RNG = np.random.default_rng(8)
PACKED = Mxfp4(RNG.integers(0, 256, (130, 3, 16), np.uint8), RNG.integers(112, 128, (130, 3), np.uint8))
PLAIN = RNG.standard_normal((130, 96), np.float32)


def rows(encoding: str, values: np.ndarray = PLAIN) -> Rows:
    return Rows(encoding, encode_float(values, encoding))


def decoded(data: np.ndarray, codec: str) -> np.ndarray:
    assert data.shape[1] == CODECS[codec].row_bytes(96)
    return CODECS[codec].decode(data)


@pytest.mark.parametrize("codec", EXPERT_CODECS)
def test_mxfp4_goes_into_every_expert_codec_without_loss(codec: str) -> None:
    # Scales of 112 to 127 keep every value within float16, too.
    assert np.array_equal(decoded(encode(PACKED, codec, "t"), codec), PACKED.values())


@pytest.mark.parametrize("codec", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("source", ["bf16", "f16", "f32"])
def test_floats_are_rounded_to_the_nearest_as_torch_rounds(source: str, codec: str) -> None:
    chunk = rows(source)
    kind = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[codec]
    expected = torch.from_numpy(chunk.values()).to(kind).float().numpy()
    assert np.array_equal(decoded(encode(chunk, codec, "t"), codec), expected)


@pytest.mark.parametrize("source", ["bf16", "f16", "f32", "q8_0", "q5_0", "mxfp4"])
def test_the_same_codec_keeps_the_bytes(source: str) -> None:
    data = RNG.integers(0, 60, (7, CODECS[source].row_bytes(96)), np.uint8)
    chunk: Chunk = Mxfp4(*mxfp4.from_ggml(data)) if source == "mxfp4" else Rows(source, data)
    assert np.array_equal(encode(chunk, source, "t"), data)


def test_floats_that_are_mxfp4_values_come_back_to_mxfp4() -> None:
    for source in ("bf16", "f32"):
        chunk = rows(source, PACKED.values())
        assert np.array_equal(encode_packed(chunk).values(), PACKED.values())
        assert np.array_equal(decoded(encode(chunk, "mxfp4", "t"), "mxfp4"), PACKED.values())
        assert np.array_equal(decoded(encode(chunk, "q5_0", "t"), "q5_0"), PACKED.values())


def test_packed_chunks_are_passed_through_as_they_are() -> None:
    assert encode_packed(PACKED) is PACKED


def test_q8_0_is_exact_in_rows_of_mxfp4_values_and_no_worse_than_ggmls_in_the_others() -> None:
    values = PLAIN.copy()
    values[40:90] = PACKED.values()[40:90]
    chunk = rows("f32", values)
    data = encode(chunk, "q8_0", "t")
    assert np.array_equal(decoded(data, "q8_0")[40:90], values[40:90])
    theirs = ggml.encode("q8_0", values)
    for part in (slice(0, 40), slice(90, None)):
        errors = [np.square(decoded(made[part], "q8_0") - values[part]).sum() for made in (data, theirs)]
        assert errors[0] <= errors[1]
    assert not np.array_equal(decoded(theirs[40:90], "q8_0"), values[40:90])  # ggml's own rule loses something


def test_q5_0_is_exact_in_every_block_of_mxfp4_values_and_rounded_in_the_others() -> None:
    values = PACKED.values().copy()
    values[101, 50] = np.pi
    made = decoded(encode(rows("f32", values), "q5_0", "t"), "q5_0")
    off = np.argwhere(made != values)
    assert set(off[:, 0]) == {101}
    assert set(off[:, 1] // 32) == {50 // 32}


@pytest.mark.parametrize("codec", ["q8_0", "q5_0"])
def test_an_mxfp4_block_outside_float16_is_refused_with_its_place(codec: str) -> None:
    chunk = Mxfp4(np.full((70, 3, 16), 0x17, np.uint8), np.full((70, 3), 120, np.uint8))
    chunk.scales[66, 2] = 40
    with pytest.raises(Refused) as error:
        encode(chunk, codec, "t", first_row=2048)
    assert error.value.found == "scale byte 40 at row 2114, column 64"


def test_a_value_beyond_float16_is_refused_with_its_place() -> None:
    values = PLAIN.copy()
    values[99, 31] = 70000
    with pytest.raises(Refused, match="too large for f16") as error:
        encode(rows("f32", values), "f16", "t", first_row=5)
    assert error.value.found == "70000 at row 104, column 31"


def test_a_float32_that_rounds_beyond_bfloat16_is_refused() -> None:
    values = PLAIN.copy()
    values[3, 4] = np.finfo(np.float32).max
    with pytest.raises(Refused, match="too large for bf16"):
        encode(rows("f32", values), "bf16", "t")


def test_a_block_whose_q8_0_scale_overflows_float16_is_refused_with_its_place() -> None:
    values = PLAIN.copy()
    values[77, 64] = 1e7  # d = 1e7 / 127 > 65504
    with pytest.raises(Refused, match="too large for q8_0") as error:
        encode(rows("bf16", values), "q8_0", "output.weight", first_row=2048)
    assert "row 2125, column 64" in str(error.value.found)


@pytest.mark.parametrize("codec", ["mxfp4", "q8_0", "q5_0"])
def test_rows_that_are_not_whole_blocks_are_refused(codec: str) -> None:
    with pytest.raises(Refused, match="do not divide"):
        encode(Rows("f32", np.zeros((2, 4 * 90), np.uint8)), codec, "t")


def test_results_do_not_depend_on_how_rows_are_divided() -> None:
    for chunk in (PACKED, rows("f32"), rows("bf16")):
        for codec in ("mxfp4", "q8_0", "bf16", "f32"):
            whole = encode(chunk, codec, "t")
            cuts = [slice(0, 1), slice(1, 65), slice(65, 130)]
            parts = [encode(chunk.select(cut), codec, "t", cut.start) for cut in cuts]
            assert np.array_equal(whole, np.concatenate(parts))


def test_the_fate_in_the_plan_is_what_happens() -> None:
    chunks: dict[str, Chunk] = {"mxfp4": PACKED}
    chunks |= {name: rows(name, PLAIN * np.float32(1e-4)) for name in ("bf16", "f16", "f32")}  # f16: subnormal
    for source, chunk in chunks.items():
        for codec in {*EXPERT_CODECS, *DENSE_CODECS}:
            if codec == "q5_0" and source != "mxfp4":
                continue
            exact = np.array_equal(decoded(encode(chunk, codec, "t"), codec), chunk.values())
            said = fate(source, codec)
            if "rounded" in said:
                assert not exact or (source, codec) == ("mxfp4", "f16"), (source, codec)
            else:
                assert exact, (source, codec, said)


@pytest.mark.parametrize("scale", [118, 124, 135])
def test_mxfp4_goes_into_nvfp4_without_loss_within_its_scales(scale: int) -> None:
    chunk = Mxfp4(RNG.integers(0, 256, (70, 4, 16), np.uint8), np.full((70, 4), scale, np.uint8))
    data = encode(chunk, "nvfp4", "t")
    assert np.array_equal(CODECS["nvfp4"].decode(data), chunk.values())
    assert fate("mxfp4", "nvfp4") == "transcoded exactly"


@pytest.mark.parametrize(("scale", "found"), [(117, "2^-10"), (112, "2^-15"), (104, "2^-23"), (136, "2^9")])
def test_an_mxfp4_block_outside_nvfp4s_scales_is_refused_with_its_place(scale: int, found: str) -> None:
    """117: codes ½ and 1½ need a scale below 2^-9; 136: codes 4 and 6 one above 448."""
    chunk = Mxfp4(np.full((70, 4, 16), 0x71, np.uint8), np.full((70, 4), 120, np.uint8))
    chunk.scales[66, 2] = scale
    with pytest.raises(Refused, match=r"llama\.cpp's gpt-oss does not read") as error:
        encode(chunk, "nvfp4", "t", first_row=2048)
    assert error.value.found == f"scale {found} at row 2114, column 64"
    assert error.value.remedy == "keep the experts as mxfp4"


@pytest.mark.parametrize("scale", [117, 136])
def test_codes_that_another_scale_holds_are_exact_beyond_nvfp4s_scales_too(scale: int) -> None:
    code = 0x64 if scale == 117 else 0x53  # 2 and 4, or 1½ and 3
    chunk = Mxfp4(np.full((2, 4, 16), code, np.uint8), np.full((2, 4), scale, np.uint8))
    assert np.array_equal(CODECS["nvfp4"].decode(encode(chunk, "nvfp4", "t")), chunk.values())


def test_floats_too_small_for_nvfp4_are_refused_and_a_few_small_ones_are_not() -> None:
    values = RNG.standard_normal((130, 128), np.float32) * np.float32(1e-4)
    with pytest.raises(Refused, match="too small for NVFP4") as error:
        encode(rows("bf16", values), "nvfp4", "t", first_row=7)
    assert "in the 130 rows from row 7" in str(error.value.found)
    values[::2] *= 1000
    read = CODECS["nvfp4"].decode(encode(rows("f32", values), "nvfp4", "t"))
    assert np.linalg.norm(read - values) < 0.15 * np.linalg.norm(values)


@pytest.mark.parametrize("codec", ["q8_0", "iq3_xxs", "int8_g32", "mxfp4", "bf16", "f16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_refused_with_its_place(codec: str, bad: float) -> None:
    values = np.ones((130, 256), np.float32)
    values[100, 77] = bad
    with pytest.raises(BadInput, match="not a finite number") as error:
        encode(rows("f32", values), codec, "t", first_row=1000)
    assert error.value.found == f"{bad:g} at row 1100, column 77"
