"""The bank and LoRA on CUDA: the kernel compiled, captured for any mix, and swaps beside running steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.messages import Request, TokenEvent
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.grouped_linear import RowGroups, grouped_linear, grouped_linear_reference
from ram_core.models.loading import load_model
from ram_core.models.paged import PagedModel
from ram_core.models.stacked import plain_weights
from ram_core.params import SamplingParams
from tests.exactness.test_engine import (
    ALIGNED,
    GREEDY,
    PROMPTS,
    TERSE,
    cases,
    make_config,
    plain_greedy,
    plain_models,
    run_together,
)
from tests.exactness.test_lora import ADAPTERS, aligned, oracle, save_adapter
from tests.exactness.test_lora import make_config as make_lora_config
from tests.models import save_model

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

CUDA = torch.device("cuda")
# One step in each dtype's last digits, of sums of a few hundred products of about 1.
TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 0.3, torch.float16: 0.05}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    on_cpu = make_config(tmp_path_factory.mktemp("llama"), "llama")
    return replace(on_cpu, device="cuda", dtype="float32")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "num_columns", "depth"),
    [(1, 64, 64), (16, 512, 256), (64, 2048, 300), (100, 40_000, 64), (700, 96, 512), (64, 512, 16)],
)
@pytest.mark.parametrize("is_added", [False, True])
def test_the_compiled_kernel_gives_the_references_products(
    dtype: torch.dtype, num_rows: int, num_columns: int, depth: int, is_added: bool
) -> None:
    torch.manual_seed(0)
    slots = torch.randint(0, 5, (num_rows,))
    slots[slots == 1] = 3
    x, weight, bias = (
        torch.randn(num_rows, depth),
        torch.randn(6, num_columns, depth),
        torch.randn(6, num_columns),
    )
    weight[[1, 5]] = torch.nan
    x, weight, bias = (each.to(dtype) for each in (x, weight, bias))
    before = torch.randn(num_rows, num_columns).to(dtype)
    ours = grouped_linear(
        x.cuda(),
        weight.cuda(),
        bias.cuda(),
        RowGroups.of(slots.cuda(), 6),
        add_to=before.cuda() if is_added else None,
    )
    wanted = grouped_linear_reference(
        x.float(),
        weight.float(),
        bias.float(),
        RowGroups.of(slots, 6),
        add_to=before.float() if is_added else None,
    )
    torch.testing.assert_close(ours.cpu().float(), wanted, rtol=1e-2, atol=TOLERANCES[dtype])


def test_one_captured_product_serves_any_mix() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(32, 128, device=CUDA), torch.randn(8, 256, 128, device=CUDA)
    slots = torch.zeros(32, dtype=torch.int64, device=CUDA)
    grouped_linear(x, weight, None, RowGroups.of(slots, 8))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = grouped_linear(x, weight, None, RowGroups.of(slots, 8))
    for seed in range(4):
        mix = torch.randint(0, 8, (32,), generator=torch.Generator().manual_seed(seed))
        slots.copy_(mix)
        graph.replay()
        wanted = grouped_linear_reference(x.cpu(), weight.cpu(), None, RowGroups.of(mix, 8))
        torch.testing.assert_close(out.cpu(), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@torch.inference_mode()
def test_a_mix_of_aligners_on_cuda_gives_the_plain_forwards_greedy_tokens(
    config: EngineConfig, cuda_graphs: bool
) -> None:
    models = plain_models(config)
    engine = Engine.load(replace(config, cuda_graphs=cuda_graphs))
    assert [group.is_stacked for group in engine.bank.groups] == [True]
    kinds = [*cases(PROMPTS), (PROMPTS[2], TERSE), (PROMPTS[4], TERSE)]
    asked = [Request(str(at), prompt, GREEDY, alignment) for at, (prompt, alignment) in enumerate(kinds)]
    told = run_together(engine, asked)
    for request in asked:
        drawn = tuple(event.token_id for event in told[request.request_id])
        assert drawn == plain_greedy(models, request.prompt_ids, request.alignment, engine.limits.vocab_size)


@torch.inference_mode()
def test_adapters_on_cuda_give_pefts_greedy_tokens(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", std=0.15)
    adapters = {name: save_adapter(base, name, **options) for name, options in ADAPTERS.items()}
    engine = Engine.load(make_lora_config(base, adapters, device="cuda", dtype="float32"))
    models = {name: oracle(base, path) for name, path in adapters.items()}
    models["proposal"] = plain_models(EngineConfig(str(base)))["proposal"]
    asked = [Request(name, PROMPTS[at], GREEDY, aligned(name)) for at, name in enumerate(adapters)]
    told = run_together(engine, asked)
    for request in asked:
        drawn = tuple(event.token_id for event in told[request.request_id])
        assert drawn == plain_greedy(models, request.prompt_ids, request.alignment, engine.limits.vocab_size)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_swap_beside_running_steps_changes_none_of_them(
    config: EngineConfig, tmp_path: Path, cuda_graphs: bool
) -> None:
    """Weights arrive on a stream of their own while every step runs; recordings stay good."""
    path = save_model(tmp_path / "new", "llama", hidden=16, layers=1, vocab_size=320, seed=11)
    on_host = load_model(
        str(path), device=torch.device("cpu"), dtype=torch.float32, attn_implementation=ATTENTION_NAME
    )
    newcomer = {
        name: each.pin_memory() for name, each in plain_weights(PagedModel(on_host, name="new").model).items()
    }
    engine = Engine.load(replace(config, aligner_slots=3, cuda_graphs=cuda_graphs, prefix_cache=False))
    group = engine.bank.group_of["polite"]
    sampling = SamplingParams(seed=5, max_tokens=24, ignore_eos=True)
    before, after = (Request(name, PROMPTS[3], sampling, ALIGNED) for name in ("before", "after"))
    old = [event.token_id for event in run_together(engine, [before])["before"]]
    told: dict[str, list[int]] = {"before": [], "after": []}
    engine.handle(before)
    step = 0
    while engine.has_work:
        if step == 3:
            assert group.stage(newcomer) == 2
        if step == 8:
            group.remove("polite")
            group.add("polite", 2)
            engine.handle(after)
        for event in engine.step():
            if isinstance(event, TokenEvent):
                told[event.request_id].append(event.token_id)
        step += 1
    assert told["before"] == old
    swapped = AlignerSource("polite", str(path))
    fresh = Engine.load(replace(config, aligners=(swapped, config.aligners[1])))
    assert told["after"] == [event.token_id for event in run_together(fresh, [after])["after"]]
