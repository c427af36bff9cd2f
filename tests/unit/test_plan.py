"""Memory at start: what fits is shared out with reasons, and what does not is refused with what would."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.plan import (
    KvPlan,
    Needs,
    StartPlan,
    check_fits,
    describe,
    plan_kv,
    size_text,
    tell_plan,
)
from ram_core.engine.room import expected_needs, naming_what_was_tried, needs_of
from ram_core.errors import CheckpointError
from ram_core.models.loading import load_config
from tests.exactness.test_engine import make_config

GIB = 2**30
# 1 MiB a page of 16 tokens.
NEEDS = Needs({"proposal": 6 * GIB, "polite": GIB}, 2**16, {"int8": 4 * GIB, "int4": 3 * GIB})
CONFIG = EngineConfig("proposal", max_batch=4)


def plan(config: EngineConfig = CONFIG, *, max_model_len: int = 4096, free: int | None = 10 * GIB) -> KvPlan:
    return plan_kv(config, NEEDS, max_model_len, free)


def refusal(config: EngineConfig, *, free: int) -> str:
    """Of a device that has so much free before the weights are read."""
    with pytest.raises(CheckpointError) as caught:
        check_fits(config, NEEDS, config.max_model_len or 4096, free)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refusal_once_loaded(config: EngineConfig, *, free: int | None) -> str:
    with pytest.raises(CheckpointError) as caught:
        plan_kv(config, NEEDS, config.max_model_len or 4096, free)
    return str(caught.value)


def test_there_are_pages_for_every_sequence_where_memory_allows() -> None:
    kv = plan()
    assert (kv.num_pages, kv.num_tokens, kv.max_model_len) == (1024, 4 * 4096, 4096)
    assert kv.num_bytes == 1025 * 2**20
    assert kv.pages_reason == "enough for `max_batch` 4 full contexts"
    assert kv.context_reason == "the models' own"


@pytest.mark.parametrize(
    ("asked", "free", "pages", "reason"),
    [
        (0, GIB, int(0.6 * 1024) - 1, "limited by KV memory: default, 60% of 1 GiB free"),
        (0, None, 1023, "limited by KV memory: default, 1 GiB"),
        (GIB // 2, GIB, 511, "limited by KV memory: asked, 512 MiB"),
        (GIB // 2, None, 511, "limited by KV memory: asked, 512 MiB"),
    ],
)
def test_memory_limits_pages_and_the_plan_says_whose_limit_it_is(asked, free, pages, reason) -> None:
    kv = plan(replace(CONFIG, kv_memory_bytes=asked), free=free)
    assert (kv.num_pages, kv.pages_reason) == (pages, reason)
    assert kv.num_bytes <= (asked or int(0.6 * (free or GIB / 0.6 + 1)))


def test_a_context_that_nobody_asked_for_is_cut_to_what_fits() -> None:
    kv = plan(max_model_len=10**6, free=GIB)
    assert kv.max_model_len == kv.num_tokens == 613 * 16
    assert kv.context_reason == "limited by KV memory; the models' own: 1000000"


def test_a_context_that_was_asked_for_is_never_cut() -> None:
    asked = replace(CONFIG, max_model_len=613 * 16)
    kv = plan(asked, max_model_len=613 * 16, free=GIB)
    assert (kv.max_model_len, kv.context_reason) == (613 * 16, "asked")
    said = refusal_once_loaded(replace(CONFIG, max_model_len=613 * 16 + 1), free=GIB)
    assert "KV for 1 sequence of 9809 tokens 615 MiB > 8 GiB free" in said
    assert "lower `max_model_len` to 9808, or raise `kv_memory` to 615 MiB" in said


def test_what_is_advised_fits() -> None:
    """Everything that a refusal names is tried, and the next larger is not enough."""
    config = replace(CONFIG, max_model_len=16 * 1000)
    said = refusal(config, free=8 * GIB)
    length = int(said.split("lower `max_model_len` to ")[1].split(",")[0])
    check_fits(replace(config, max_model_len=length), NEEDS, length, 8 * GIB)
    refusal(replace(config, max_model_len=length + 1), free=8 * GIB)
    assert "raise `kv_memory` to 1001 MiB" in said
    check_fits(replace(config, kv_memory_bytes=1001 * 2**20), NEEDS, 16000, 8 * GIB)
    assert "set `quantization` to int8 (weights 4 GiB)" in said
    check_fits(config, Needs({"all": 4 * GIB}, NEEDS.kv_bytes_per_token), 16000, 8 * GIB)


def test_weights_that_do_not_fit_are_refused_with_the_mildest_quantization_that_would() -> None:
    assert refusal(CONFIG, free=5 * GIB) == (
        "weights 7 GiB > 5 GiB free on the device; set `quantization` to int8 (weights 4 GiB)"
    )
    assert "set `quantization` to int4 (weights 3 GiB)" in refusal(CONFIG, free=4 * GIB)
    assert refusal(CONFIG, free=2 * GIB) == "weights 7 GiB > 2 GiB free on the device"


def test_more_kv_memory_than_is_free_is_refused() -> None:
    said = refusal(replace(CONFIG, kv_memory_bytes=4 * GIB), free=10 * GIB)
    assert (
        said == "`kv_memory` 4 GiB > 3 GiB free beside 7 GiB of weights; lower `kv_memory` to at most 3 GiB"
    )


def test_on_cpu_the_budget_is_what_limits() -> None:
    said = refusal_once_loaded(replace(CONFIG, kv_memory_bytes=4 * 2**20, max_model_len=64), free=None)
    assert said == (
        "KV for 1 sequence of 64 tokens 5 MiB > 4 MiB of `kv_memory`, which hold 48 tokens; "
        "lower `max_model_len` to 48, or raise `kv_memory` to 5 MiB"
    )
    assert "hold 0 tokens" in refusal_once_loaded(replace(CONFIG, kv_memory_bytes=2**20), free=None)


def test_the_table_has_a_row_for_everything_and_the_log_a_line(caplog) -> None:
    aligners = (AlignerSource("polite", "…"),)
    config = replace(CONFIG, aligners=aligners, device="cuda", quantization="int8", tensor_parallel=2)
    told = describe(config, NEEDS, plan(config), device="cuda:0", dtype="bfloat16")
    told = told.with_row("captured steps", "12", "of one token a row").with_row("left free", "2 GiB")
    lines: list[str] = []
    with caplog.at_level("INFO", logger="ram_core.engine.plan"):
        tell_plan(told, lines.append)
    assert lines[0] == "start-up plan"
    table = {" ".join(line.split()) for line in lines[1:]}
    assert table == {
        "device cuda:0 asked",
        "dtype bfloat16 default (auto)",
        "weights of proposal 6 GiB asked: int8, asked: one of 2 shares",
        "weights of aligners 1 GiB 1 in all",
        "KV memory 1.001 GiB 65536 bytes a token",
        "KV pages 1024 of 16 tokens enough for `max_batch` 4 full contexts",
        "tokens that fit 16384 4 full contexts",
        "longest context 4096 tokens the models' own",
        "captured steps 12 of one token a row",
        "left free 2 GiB",
    }
    [record] = caplog.records
    assert "KV pages 1024 of 16 tokens, tokens that fit 16384" in record.getMessage()


def test_sizes_are_for_people() -> None:
    assert [size_text(n) for n in (0, 1023, 1536, 5 * 2**20, 3 * 2**41)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5 MiB",
        "6 TiB",
    ]


def test_out_of_memory_tells_what_was_tried() -> None:
    with (
        pytest.raises(CheckpointError) as caught,
        naming_what_was_tried("reserving 9 GiB", torch.device("cpu")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert str(caught.value) == "reserving 9 GiB failed: unknown on CPU free on `cpu`"


def test_an_engine_tells_its_plan_and_was_expected_to_need_just_that(tmp_path) -> None:
    config = make_config(tmp_path, "llama")
    lines: list[str] = []
    engine = Engine.load(config, lines.append)
    start = lines.index("start-up plan")
    assert any("tokens that fit" in line for line in lines[start:])
    assert isinstance(engine.bank.plan, StartPlan)
    sources = {"proposal": config.proposal} | {each.name: each.source for each in config.aligners}
    configs = {name: load_config(source) for name, source in sources.items()}
    needs = expected_needs(config, configs, torch.float32)
    models = {"proposal": engine.bank.proposal, **engine.bank.aligners}
    geometries = [pool.geometry for pool in engine.bank.pools.values()]
    assert needs_of(models, geometries) == replace(needs, quantized_bytes={})
    assert 0 < needs.quantized_bytes["int4"] < needs.quantized_bytes["int8"] < needs.total_weight_bytes
    assert set(needs.quantized_bytes) == {"int8", "int4", "fp8"}
    smaller = expected_needs(replace(config, quantization="int8"), configs, torch.float32)
    assert set(smaller.quantized_bytes) == {"int4"}, "nothing else would be smaller still"
    halved = expected_needs(replace(config, tensor_parallel=2), configs, torch.float32)
    assert halved.weight_bytes["proposal"] == needs.weight_bytes["proposal"] // 2
    assert halved.weight_bytes["polite"] == needs.weight_bytes["polite"]
