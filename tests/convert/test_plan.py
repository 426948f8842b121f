"""The plan, from headers alone: the official files to the digest, every byte owned once, sizes and memory foretold."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import SMALL, Model, write_hf, write_original

from gptoss_convert.config import ModelConfig, release_config
from gptoss_convert.convert import conversion, dry_run, official
from gptoss_convert.convert.conversion import Options
from gptoss_convert.convert.names import as_stack, canonical_shapes, is_expert_matrix
from gptoss_convert.convert.plan import LEAF_ROWS, Plan, greedy_shards, rows_per_step
from gptoss_convert.convert.source import Layout, Source, open_source
from gptoss_convert.errors import Refused, UsageError

RELEASES = {"openai/gpt-oss-20b": (24, 32), "openai/gpt-oss-120b": (36, 128)}
GIB = 1 << 30


@dataclass(frozen=True)
class Unread:
    """A view of which only headers are known."""

    encoding: str
    stack: tuple[int, int, int]

    def read(self, expert: int, start: int, stop: int) -> Any:
        raise AssertionError("a plan read tensor data")


def headers_only(
    config: ModelConfig, layout: Layout = Layout.ORIGINAL, experts: str = "mxfp4", dense: str = "bf16"
) -> Source:
    views: dict[str, Any] = {
        name: Unread(experts if is_expert_matrix(name) else dense, as_stack(shape))
        for name, shape in canonical_shapes(config).items()
    }
    return Source(Path("nowhere"), layout, config, views, [])


def planned(source: Source, to: str, **options: Any) -> Plan:
    target = Path("/nowhere") / ("out.gguf" if to == "gguf" and not options.get("split_bytes") else "out")
    return conversion.make_plan(source, target, Options(to, **options))


@pytest.mark.parametrize("repo", RELEASES)
@pytest.mark.parametrize(("to", "prefix"), [("hf", ""), ("original", "original/")])
def test_the_plan_of_a_release_has_the_official_headers_sizes_index_and_configuration(
    repo: str, to: str, prefix: str
) -> None:
    pins = official.load().repos[repo].files
    plan = planned(headers_only(release_config(*RELEASES[repo])), to)
    shards = {name for name in pins if name.startswith(f"{prefix}model") and name.endswith(".safetensors")}
    assert {prefix + file.name for file in plan.files} == {n for n in shards if prefix or "/" not in n}
    for file in plan.files:
        pin = pins[prefix + file.name]
        assert file.size == pin.size, file.name
        assert hashlib.sha256(file.head[8:]).hexdigest() == pin.header_sha256, file.name
        assert int.from_bytes(file.head[:8], "little") == len(file.head) - 8
    compared = set()
    for name, data in plan.small.items():
        pin = pins.get(prefix + name)
        if pin is None:
            assert (to, name) == ("original", "generation_config.json"), name
        elif pin.sha256 is not None:  # nobody has published the digests of original/'s small files of 120b
            assert (len(data), hashlib.sha256(data).hexdigest()) == (pin.size, pin.sha256), name
            compared.add(name)
    expected = {
        "hf": {"config.json", "generation_config.json", "model.safetensors.index.json"},
        "original": {"config.json", "dtypes.json"} if repo.endswith("-20b") else set(),
    }
    assert compared == expected[to]


@pytest.mark.parametrize("repo", RELEASES)
def test_the_official_tensor_ranges_fill_each_file_exactly(repo: str) -> None:
    for to in ("hf", "original", "bf16"):
        assert_owned_once(planned(headers_only(release_config(*RELEASES[repo])), to))


def assert_owned_once(plan: Plan) -> None:
    """Headers and steps' pieces cover every file without overlap; only GGUF has gaps, of less than its alignment."""
    gap = 31 if plan.target == "gguf" else 0
    for index, file in enumerate(plan.files):
        ranges = sorted(
            (piece.offset, piece.nbytes) for step in plan.steps for piece in step.pieces if piece.file == index
        )
        at = len(file.head)
        for offset, nbytes in ranges:
            assert 0 <= offset - at <= gap
            assert nbytes > 0
            at = offset + nbytes
        assert 0 <= file.size - at <= gap


@pytest.fixture(scope="module", params=["hf", "bf16", "per expert", "metal", "gguf", "gguf split"])
def opened(request: pytest.FixtureRequest, layouts: dict[str, Path]) -> Any:
    with open_source(layouts[request.param]) as source:
        yield source


@pytest.mark.parametrize("to", ["gguf", "hf", "original", "bf16"])
def test_steps_own_every_byte_once_and_take_every_row_once(opened: Source, to: str) -> None:
    for options in ({}, {"split_bytes": 300_000}):
        plan = planned(opened, to, **options)
        assert_owned_once(plan)
        rows: dict[tuple[str, int], int] = {}
        for step in sorted(plan.steps, key=lambda step: (step.tensor, step.expert, step.start)):
            assert rows.get((step.tensor, step.expert), 0) == step.start
            assert step.start % LEAF_ROWS == 0
            rows[step.tensor, step.expert] = step.stop
        for name, shape in canonical_shapes(opened.config).items():
            experts, count, _ = as_stack(shape)
            assert [rows[name, expert] for expert in range(experts)] == [count] * experts
        assert [step.pieces[0].file for step in plan.steps] == sorted(step.pieces[0].file for step in plan.steps)


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_no_conversion_of_a_release_is_forecast_to_need_more_than_a_gibibyte_and_a_half(threads: int) -> None:
    config = release_config(4, 128)  # more layers only make longer headers
    sources = {
        "gguf": [
            {"experts": "mxfp4"},
            {"experts": "q8_0", "dense": "q8_0"},
            {"experts": "f32"},
            {"split_bytes": 4 * 10**9},
        ],
        "hf": [{}],
        "original": [{}],
        "bf16": [{}],
    }
    for to, choices in sources.items():
        for experts in ("mxfp4", "bf16"):
            for options in choices:
                source = headers_only(config, Layout.GGUF, experts)
                plan = planned(source, to, threads=threads, **options)
                told = dry_run.forecast(source, plan, Options(to, threads=threads, **options))
                assert told["peak_memory_bytes"] < 1.5 * GIB, (to, experts, options)
                assert 1 <= told["threads"] <= threads
                assert told["output_bytes"] == sum(file["size"] for file in told["files"])
    source = headers_only(release_config(36, 128))
    plan = planned(source, "hf", threads=threads)
    assert dry_run.forecast(source, plan, Options("hf", threads=threads))["peak_memory_bytes"] < 1.5 * GIB


def test_a_step_is_bounded_whatever_the_rows() -> None:
    for columns in (32, 64, 96, 2880, 4096, 11520, 201088):
        rows = rows_per_step(columns)
        assert rows % LEAF_ROWS == 0
        assert rows == LEAF_ROWS or rows * columns <= 6 << 20


@pytest.mark.parametrize("limit", [1, 10, 11, 15, 100])
def test_shards_are_filled_greedily_and_in_order(limit: int) -> None:
    sizes = [("a", 5), ("b", 5), ("c", 1), ("d", 20), ("e", 4), ("f", 6), ("g", 11)]
    parts = list(greedy_shards(sizes, limit))
    assert [name for part in parts for name in part] == [name for name, _ in sizes]
    size = dict(sizes)
    for part, following in zip(parts, [*parts[1:], ["none"]], strict=True):
        total = sum(size[name] for name in part)
        assert total <= limit or len(part) == 1
        assert following == ["none"] or total + size[following[0]] > limit


def test_an_empty_list_has_no_shards() -> None:
    assert list(greedy_shards([], 10)) == []


def digest(path: Path, to: str = "hf", **options: Any) -> str:
    source_options = {"gate_proj": options.get("gate_proj")}
    with open_source(path, **source_options) as source:
        return planned(source, to, **options).digest()


def test_a_plan_is_named_by_what_decides_its_bytes(hf_folder: Path, tmp_path: Path) -> None:
    once = digest(hf_folder)
    assert digest(hf_folder) == once
    others = [
        digest(hf_folder, "original"),
        digest(hf_folder, split_bytes=300_000),
        digest(hf_folder, "gguf"),
        digest(hf_folder, "gguf", experts="bf16"),
        digest(hf_folder, "gguf", dense="f32"),
        digest(hf_folder, "gguf", name="another/name-1B"),
    ]
    assert len({once, *others}) == 7
    write_hf(Model(SMALL), tmp_path / "copy", shard_limit=200_000)
    assert (
        digest(tmp_path / "copy") != once
    )  # another file on the disk: nothing of the work on one is taken for the other


def test_a_plan_is_not_that_of_the_other_meaning_of_gate_proj(layouts: dict[str, Path]) -> None:
    path = layouts["per expert"]
    assert digest(path, gate_proj="halves") != digest(path, gate_proj="deinterleaved")
    assert digest(path) == digest(path, gate_proj="deinterleaved")


def test_threads_and_proof_do_not_enter_a_plan(hf_folder: Path) -> None:
    assert digest(hf_folder, threads=7, proof=False) == digest(hf_folder, threads=1)


def test_the_fate_of_every_tensor_is_listed(hf_folder: Path) -> None:
    with open_source(hf_folder) as source:
        plan = planned(source, "gguf")
        told = dry_run.forecast(source, plan, Options("gguf"))
    assert {row["source"] for row in told["tensors"]} == set(source.views)
    fates = {row["fate"] for row in told["tensors"]}
    assert fates == {"bits moved", "bits kept", "widened exactly"}
    assert sum(row["bytes"] for row in told["tensors"]) < told["output_bytes"]
    json.dumps(told)


@pytest.mark.parametrize(
    ("to", "options"),
    [
        ("hf", {"experts": "mxfp4"}),
        ("bf16", {"dense": "f16"}),
        ("original", {"name": "some/name"}),
        ("hf", {"type": "q4_k"}),
        ("bf16", {"recipe": Path("recipe.toml")}),
        ("original", {"widen": "none"}),
        ("gguf", {"experts": "q4_9"}),
        ("gguf", {"dense": "mxfp5"}),
    ],
)
def test_options_that_do_not_fit_the_target_are_usage_errors(to: str, options: dict[str, Any], hf_folder: Path) -> None:
    with open_source(hf_folder) as source, pytest.raises(UsageError):
        planned(source, to, **options)


@pytest.mark.parametrize(
    ("name", "split"), [("model", None), ("model.bin", None), ("parts.gguf", 10**6), ("model.GGUF", None)]
)
def test_a_name_that_misleads_about_a_gguf_is_a_usage_error(name: str, split: int | None, hf_folder: Path) -> None:
    with open_source(hf_folder) as source, pytest.raises(UsageError):
        conversion.make_plan(source, Path("/nowhere") / name, Options("gguf", split_bytes=split))


@pytest.mark.parametrize("to", ["hf", "original"])
@pytest.mark.parametrize("width", ["hidden", "intermediate"])
def test_widths_that_blocks_do_not_divide_are_refused(to: str, width: str) -> None:
    config = replace(release_config(2, 4), **{width: 2896})  # 16 more than a multiple of 32
    with pytest.raises(Refused, match="do not divide"):
        planned(headers_only(config, experts="bf16"), to)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"swiglu_limit": 6.0}, "swiglu_limit"),
        ({"beta_fast": 31.0}, "beta_fast"),
        ({"beta_slow": 2.0}, "beta_slow"),
        ({"attention_factor": 1.5}, "attention_factor"),
    ],
)
def test_what_llama_cpp_has_built_in_is_refused_for_gguf_and_kept_for_hf(change: dict[str, float], words: str) -> None:
    source = headers_only(replace(release_config(2, 4), **change), Layout.GGUF)
    with pytest.raises(Refused, match=words):
        planned(source, "gguf")
    assert planned(source, "hf").files


def test_the_attention_factor_that_everyone_computes_is_no_obstacle() -> None:
    config = replace(release_config(2, 4), attention_factor=1.3465735902799727)
    assert planned(headers_only(config, Layout.GGUF), "gguf").files


@pytest.mark.parametrize(
    "change", [{"sliding": (True, True)}, {"rms_eps": 1e-6}, {"truncate": True}, {"max_positions": 4096}]
)
def test_what_the_reference_code_has_built_in_is_refused_for_original(change: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="cannot express"):
        planned(headers_only(replace(release_config(2, 4), **change)), "original")


def test_a_gguf_without_a_tokenizer_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    write_original(Model(SMALL), tmp_path)
    with open_source(tmp_path) as source, pytest.raises(Refused, match="no tokenizer") as error:
        planned(source, "gguf")
    assert "--tokenizer" in str(error.value.remedy)
