"""One forward for any mix of aligners, against a forward of each."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PhiConfig, Qwen3MoeConfig

from ram_core.engine.aligner_groups import AlignerGroup
from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.messages import Request, TokenEvent
from ram_core.errors import CheckpointError
from ram_core.models import grouped_linear, paged, stacked
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.grouped_linear import RowGroups, grouped_linear_reference
from ram_core.models.kv import KvPool
from ram_core.models.loading import load_model
from ram_core.models.packing import Row, pack
from ram_core.models.paged import PagedModel
from ram_core.models.stacked import StackedModel, plain_weights
from ram_core.params import SamplingParams
from tests.exactness.test_engine import ALIGNED, GREEDY, IDENTITY, PROMPTS, TERSE, TWICE, anew, run_together
from tests.exactness.test_engine import make_config as make_pair
from tests.exactness.test_prefix_cache import CountedTokens
from tests.exactness.test_steps import mixed_requests, serve
from tests.models import FAMILIES, make_tokenizer, save_model

CPU = torch.device("cpu")
# The sinks of gpt_oss' attention are weights that no leaf has.
STACKED_FAMILIES = [family for family in FAMILIES if family != "gpt_oss"]
ODD_FAMILIES = {"phi": PhiConfig, "gpt_neox": GPTNeoXConfig, "qwen3_moe": Qwen3MoeConfig}


def save_any(directory: Path, family: str, *, seed: int) -> Path:
    if family in FAMILIES:
        return save_model(directory, family, seed=seed, std=0.2)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "qwen3_moe":
        sizes |= {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "num_key_value_heads": 2,
        }
    config = ODD_FAMILIES[family](**sizes, vocab_size=300, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model = AutoModelForCausalLM.from_config(config)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=noise))
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def load(path: Path) -> PagedModel:
    model = load_model(str(path), device=CPU, dtype=torch.float32, attn_implementation=ATTENTION_NAME)
    return PagedModel(model, name=path.name)


def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped products on CPU are made by the kernel, in Triton's interpreter."""
    if torch.cuda.is_available():
        pytest.skip("the kernel is compiled here, and tested in tests/gpu")
    from ram_core.models.triton_grouped_linear import grouped_linear_triton

    monkeypatch.setattr(grouped_linear, "grouped_linear_reference", grouped_linear_triton)


# What a product is.


@pytest.mark.parametrize("slots", [[2] * 5, [0, 3, 1, 3, 0, 0, 3], [1] * 40 + [0] * 3 + [1] * 30, []])
def test_each_row_is_multiplied_by_its_own_weight(slots: list[int]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(len(slots), 24), torch.randn(4, 10, 24), torch.randn(4, 10)
    out = grouped_linear_reference(x, weight, bias, RowGroups.of(torch.tensor(slots, dtype=torch.int64), 4))
    assert out.shape == (len(slots), 10)
    for row, slot in enumerate(slots):
        torch.testing.assert_close(out[row], weight[slot] @ x[row] + bias[slot], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_rows", "num_columns", "depth"), [(5, 10, 24), (33, 70, 40), (300, 33, 70)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_added", [False, True])
def test_the_kernel_gives_the_references_products_and_reads_no_slot_without_rows(
    num_rows: int, num_columns: int, depth: int, has_bias: bool, is_added: bool
) -> None:
    triton_grouped = pytest.importorskip("ram_core.models.triton_grouped_linear")
    if torch.cuda.is_available():
        pytest.skip("the kernel is compiled here, and tested in tests/gpu")
    torch.manual_seed(num_rows)
    slots = torch.randint(0, 4, (num_rows,))
    slots[slots == 1] = 3
    x, weight = torch.randn(num_rows, depth), torch.randn(5, num_columns, depth)
    weight[[1, 4]] = torch.nan
    bias = torch.randn(5, num_columns) if has_bias else None
    before = torch.randn(num_rows, num_columns) if is_added else None
    groups = RowGroups.of(slots, 5)
    ours, wanted = (
        product(x, weight, bias, groups, add_to=None if before is None else before.clone())
        for product in (triton_grouped.grouped_linear_triton, grouped_linear_reference)
    )
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-5)


def test_the_kernel_compiles_for_devices_that_are_not_here(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.bank_kernel_compiler"],
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        | {"TRITON_CACHE_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        check=True,
    )
    compiled = json.loads(ran.stdout)
    assert len(compiled) == 4
    for each in compiled:
        assert each["shared_bytes"] <= 99 * 1024
        assert each["has_async_copies"]
    assert [each["has_matrix_units"] for each in compiled] == [True, True, True, False]


def test_on_a_device_nobody_asks_which_slots_rows_take() -> None:
    with FakeTensorMode():
        groups = RowGroups.of(torch.zeros(7, dtype=torch.int64, device="cuda"), 4)
    assert groups.spans is None
    assert groups.offsets.shape == (5,)


# What a module of several models says.


@torch.inference_mode()
def logits_of(
    forward: Callable[[object, KvPool, Sequence[int]], Tensor], model: PagedModel, mix: Sequence[int]
) -> Tensor:
    """Prompts and, in a second batch, single tokens before chunks; `mix` names each row's model."""
    pool = KvPool(model.geometry, 4 * len(mix) + 1, 4, CPU)
    pages = [list(range(1 + 4 * row, 5 + 4 * row)) for row in range(len(mix))]
    ids = [[(37 * row + 11 * at) % 300 for at in range(12)] for row in range(len(mix))]
    first = [Row(ids[row][: 3 + row % 4], 0, pages[row], row % 2 == 0) for row in range(len(mix))]
    second = []
    for row, head in enumerate(first):
        start = len(head.token_ids)
        end = start + (1 if row < len(mix) // 2 else 2 + row % 3)
        second.append(Row(ids[row][start:end], start, pages[row]))
    parts = []
    for rows in (first, second):
        owners = [slot for slot, row in zip(mix, rows, strict=True) for _ in row.token_ids]
        parts.append(forward(pack(rows, page_size=4, device=CPU), pool, owners))
    return torch.cat(parts)


MACHINES = [(family, "CPU") for family in (*STACKED_FAMILIES, "phi", "gpt_neox")]
MACHINES += [("gemma3", "device"), ("gpt_neox", "device")]
MIXES = [[0, 1, 2, 0, 1, 2, 0, 1], [0, 0, 0, 1, 1, 2, 2, 2], [2, 2, 1], [1, 1], [2]]


@pytest.mark.parametrize(("family", "machine"), MACHINES)
def test_a_module_of_several_models_gives_the_logits_of_each(
    tmp_path: Path, family: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device's way goes through the kernel, interpreted."""
    is_on_device = machine == "device"
    if is_on_device:
        monkeypatch.setattr(stacked, "_is_on_cpu", lambda layer: False)
        monkeypatch.setattr(paged, "pack_linears", lambda model: None)
        by_kernel(monkeypatch)
    paths = [save_any(tmp_path / str(seed), family, seed=seed) for seed in range(3)]
    alone = [load(path) for path in paths]
    stack = StackedModel(load(paths[0]), 4)
    for slot, model in enumerate(alone):
        stack.stage(slot, plain_weights(model.model))
    for mix in MIXES[:1] if is_on_device else MIXES:
        ours = logits_of(lambda b, p, owners: stack.forward(b, p, torch.tensor(owners)), stack.paged, mix)
        separate = [logits_of(lambda b, p, _, m=model: m.forward(b, p), model, mix) for model in alone]
        wanting = [row for row in range(len(mix)) if row % 2 == 0] + list(range(len(mix)))
        expected = torch.stack([separate[mix[row]][at] for at, row in enumerate(wanting)])
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        assert (separate[0] - separate[1]).abs().max() > 0.1, (
            "the models must differ for this to mean anything"
        )


# What an engine makes of it.


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return make_pair(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def loaded(config: EngineConfig) -> Engine:
    return Engine.load(config)


@pytest.mark.parametrize("changes", [{}, {"max_step_tokens": 9}, {"has_static_shapes": True}], ids=str)
def test_the_bank_draws_what_a_forward_for_each_aligner_draws(
    config: EngineConfig, loaded: Engine, changes: dict[str, object]
) -> None:
    loop = Engine.load(replace(config, aligner_bank=False))
    assert [group.is_stacked for group in loop.bank.groups] == [False, False]
    assert [group.is_stacked for group in loaded.bank.groups] == [True]
    assert serve(anew(loaded, **changes), mixed_requests()) == serve(anew(loop, **changes), mixed_requests())


def test_recorded_steps_serve_any_mix(loaded: Engine) -> None:
    engine = anew(loaded, cuda_graphs=True)
    engine.capture()
    assert serve(engine, mixed_requests()) == serve(anew(loaded), mixed_requests())


def test_a_step_has_one_forward_for_all_aligners(loaded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = anew(loaded)
    asked = [ALIGNED, TERSE, IDENTITY, TERSE, ALIGNED, TWICE]
    for index, alignment in enumerate(asked):
        engine.handle(Request(str(index), PROMPTS[index], GREEDY, alignment))
    engine.step()
    sizes: list[int] = []
    served = engine.bank.group_of["polite"].served
    forward = served.forward

    def watch(batch: object, pool: object, slots: Tensor) -> Tensor:
        sizes.append(len(slots))
        assert slots.tolist() == sorted(slots.tolist())
        return forward(batch, pool, slots)

    monkeypatch.setattr(served, "forward", watch)
    engine.step()
    # A row of two aligners is in two forwards, as a term knows a row once.
    assert sizes == [5, 1]


def group_names(engine: Engine) -> list[tuple[str, ...]]:
    return [group.names for group in engine.bank.groups]


def test_architectures_that_differ_are_groups_of_their_own(config: EngineConfig, tmp_path: Path) -> None:
    more = {
        "third": save_model(tmp_path / "third", "llama", hidden=16, layers=1, vocab_size=320, seed=7),
        "wide": save_model(tmp_path / "wide", "llama", hidden=24, layers=1, vocab_size=320, seed=8),
    }
    sources = (*config.aligners, *(AlignerSource(name, str(path)) for name, path in more.items()))
    engine = Engine.load(replace(config, aligners=sources))
    assert group_names(engine) == [("polite", "terse", "third"), ("wide",)]
    assert [group.is_stacked for group in engine.bank.groups] == [True, False]


@pytest.mark.parametrize(
    ("family", "kind"), [("qwen3_moe", "Qwen3MoeExperts"), ("gpt_oss", "GptOssAttention")]
)
def test_models_with_weights_outside_known_leaves_take_a_forward_each(
    tmp_path: Path, family: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [save_any(tmp_path / str(seed), family, seed=seed) for seed in range(2)]
    proposal = save_model(tmp_path / "proposal", "llama")
    sources = tuple(AlignerSource(path.name, str(path)) for path in paths)
    with caplog.at_level(logging.WARNING):
        engine = Engine.load(EngineConfig(str(proposal), sources, device="cpu"))
    assert group_names(engine) == [("0",), ("1",)]
    assert "0, 1 take a forward each" in caplog.text
    assert kind in caplog.text


def test_models_that_say_something_else_together_take_a_forward_each(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A norm that takes another slot's weights, as a module might whose code we do not know."""
    monkeypatch.setattr(stacked, "_token_weights", lambda name: lambda module: module._parameters[name][0])
    stacked._stacked_class.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            engine = Engine.load(config)
    finally:
        stacked._stacked_class.cache_clear()
    assert group_names(engine) == [("polite",), ("terse",)]
    assert "standard deviations in one module" in caplog.text


def test_the_plan_counts_every_slot_of_a_bank(config: EngineConfig) -> None:
    loop = Engine.load(replace(config, aligner_bank=False)).bank
    [polite, terse] = [group.model.weight_bytes for group in loop.groups]
    engine = Engine.load(replace(config, aligner_slots=4))
    [group] = engine.bank.groups
    assert group.weight_bytes == {
        "polite": polite,
        "terse": terse,
        "the free slots of aligners-polite": 2 * polite,
    }


# How weights change while the engine runs.


@pytest.fixture
def roomy(config: EngineConfig) -> Engine:
    return Engine.load(replace(config, aligner_slots=3))


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    directory = tmp_path_factory.mktemp("newcomer")
    path = save_model(directory / "new", "llama", hidden=16, layers=1, vocab_size=320, seed=11)
    return plain_weights(load(path).model)


def replace_with(group: AlignerGroup, name: str, weights: dict[str, Tensor]) -> int:
    """Another aligner of the same name in a slot of its own; returns the slot that it had."""
    slot, left = group.stage(weights), group.remove(name)
    assert slot is not None
    group.add(name, slot)
    return left


def test_a_swap_leaves_running_sequences_alone_and_serves_new_ones(
    roomy: Engine, config: EngineConfig, newcomer: dict[str, Tensor]
) -> None:
    group = roomy.bank.group_of["polite"]
    sampling = SamplingParams(seed=5, max_tokens=12, ignore_eos=True)
    before, after = (Request(name, PROMPTS[3], sampling, ALIGNED) for name in ("before", "after"))
    old = run_together(roomy, [before])["before"]
    roomy = anew(roomy)
    roomy.handle(before)
    told: dict[str, list[TokenEvent]] = {"before": [], "after": []}
    for step in range(100):
        if step == 3:
            slot = group.stage(newcomer)
            assert group.is_settled(slot)
        if step == 5:
            left = group.remove("polite")
            group.add("polite", slot)
            roomy.handle(after)
        for event in roomy.step():
            if isinstance(event, TokenEvent):
                told[event.request_id].append(event)
        if not roomy.has_work:
            break
    assert told["before"] == old
    fresh = Engine.load(replace(config, aligner_slots=3))
    own = fresh.bank.group_of["polite"]
    own.remove("polite")
    own.add("polite", own.stage(newcomer))
    [new] = run_together(fresh, [after]).values()
    assert [event.token_id for event in told["after"]] == [event.token_id for event in new]
    kls = [torch.tensor([event.telemetry.kl_p_q for event in events]) for events in (told["after"], new, old)]
    torch.testing.assert_close(kls[0], kls[1], rtol=1e-4, atol=1e-5)
    assert (kls[0] - kls[2]).abs().max() > 0.01
    group.free(left)
    assert group.free_slots == (left,)


def test_after_a_swap_no_old_page_is_found(
    roomy: Engine, newcomer: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request("a", PROMPTS[3], GREEDY, ALIGNED)
    group = roomy.bank.group_of["polite"]
    run_together(roomy, [request])
    group.free(replace_with(group, "polite", newcomer))
    counted = CountedTokens(monkeypatch, roomy, "polite")
    run_together(roomy, [request])
    assert counted.num_tokens == len(PROMPTS[3]) + GREEDY.max_tokens - 1
    # Nor is one of the version before last, though it had the same slot.
    assert group.stage(newcomer) == 0
    group.remove("polite")
    group.add("polite", 0)
    run_together(roomy, [request])
    assert counted.num_tokens == 2 * (len(PROMPTS[3]) + GREEDY.max_tokens - 1)


def test_a_slot_in_use_is_neither_filled_nor_freed(roomy: Engine, newcomer: dict[str, Tensor]) -> None:
    group = roomy.bank.group_of["polite"]
    for slot in (0, 2, 3):
        with pytest.raises(ValueError, match=f"slot {slot} of .* holds nothing"):
            group.add("new", slot)
    assert group.stage(newcomer) == 2
    assert group.stage(newcomer) is None
    with pytest.raises(ValueError, match="has an aligner `terse` already"):
        group.add("terse", 2)
    with pytest.raises(ValueError, match=r"slot 1 of .* is in use"):
        group.free(1)
    assert group.remove("terse") == 1
    assert group.stage(newcomer) is None, "steps may still read what was removed"
    group.free(1)
    assert group.free_slots == (1,)


def test_weights_of_another_architecture_leave_the_slot_free(
    roomy: Engine, newcomer: dict[str, Tensor]
) -> None:
    group = roomy.bank.group_of["polite"]
    short = dict(list(newcomer.items())[1:])
    other = {name: weight[:4] for name, weight in newcomer.items()}
    for weights in (short, newcomer | {"extra": torch.zeros(1)}, other):
        with pytest.raises(CheckpointError, match="another architecture"):
            group.stage(weights)
    assert group.free_slots == (2,)
    assert [len(events) for events in run_together(roomy, [Request("a", PROMPTS[0], GREEDY, TWICE)]).values()]


def test_a_model_by_itself_has_no_slots(config: EngineConfig) -> None:
    [group, _] = Engine.load(replace(config, aligner_bank=False)).bank.groups
    assert isinstance(group, AlignerGroup)
    assert group.free_slots == ()
    assert group.stage({}) is None
    with pytest.raises(ValueError, match="holds nothing"):
        group.add("new", 0)
    assert not group.is_empty
    group.free(group.remove("polite"))
    assert group.is_empty
