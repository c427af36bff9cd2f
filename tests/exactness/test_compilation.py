"""Compiled layers give the plain forward's tokens, are compiled at load only, or give way with a reason."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo import OptimizedModule
from torch._inductor import config as inductor

from ram_core.engine.engine import Engine
from ram_core.engine.messages import Request
from ram_core.models.compilation import compile_layers
from tests.exactness.test_broken_numbers import ask, assert_fail_alone, spoilt_proposal
from tests.exactness.test_engine import (
    GREEDY,
    IDENTITY,
    PROMPTS,
    TWICE,
    anew,
    cases,
    make_config,
    plain_greedy,
    plain_models,
    run_together,
)

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:dynamo_pgo"),
]


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiled_layers_draw_the_plain_forwards_tokens_and_compile_nothing_while_they_serve(
    tmp_path: Path,
) -> None:
    # It has windows, caps, and norms of its own.
    config = make_config(tmp_path, "gemma2")
    lines: list[str] = []
    engine = Engine.load(replace(config, compile=True), lines.append)
    assert any("compiled layers" in line and "1 of 1 models" in line for line in lines)
    models = plain_models(config)
    requests = [
        Request(str(index), prompt, GREEDY, alignment)
        for index, (prompt, alignment) in enumerate(cases(PROMPTS))
    ]
    expected = [plain_greedy(models, *case, engine.limits.vocab_size) for case in cases(PROMPTS)]
    with torch.compiler.set_stance("fail_on_recompile"):
        for each in (engine, anew(engine, max_step_tokens=9), anew(engine, max_batch=1)):
            told = run_together(each, requests)
            assert [tuple(event.token_id for event in told[each.request_id]) for each in requests] == expected


def test_numbers_that_break_in_compiled_layers_are_told(tmp_path: Path) -> None:
    engine = Engine.load(replace(make_config(tmp_path, "llama"), compile=True))
    assert isinstance(engine.bank.proposal.model.base_model, OptimizedModule)
    assert_fail_alone(engine, spoilt_proposal(engine), ask("broken"), sound=(IDENTITY, TWICE))


def test_layers_that_say_something_else_once_compiled_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(make_config(tmp_path, "llama"))
    plain = engine.bank.proposal.model.base_model
    monkeypatch.setattr(plain.layers[0].mlp, "act_fn", Deceitful())
    before = greedy(engine)
    reason = compile_layers(engine.bank.proposal, engine.limits.vocab_size)
    assert reason is not None
    assert reason.startswith("compiled, it gives other logits (difference")
    assert engine.bank.proposal.model.base_model is plain
    assert greedy(engine) == before


# The last one: PyTorch remembers a compiler that it did not find.
def test_without_a_compiler_a_model_runs_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor.cpp, "cxx", (None, str(tmp_path / "no-compiler")))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    engine = Engine.load(make_config(tmp_path, "llama"))
    before = greedy(engine)
    reason = compile_layers(engine.bank.proposal, engine.limits.vocab_size)
    assert reason is not None
    assert "no-compiler" in reason
    assert type(engine.bank.proposal.model.base_model).__name__ == "LlamaModel"
    assert greedy(engine) == before


class Deceitful(torch.nn.Module):
    """An activation that a compiler sees otherwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sigmoid() if torch.compiler.is_compiling() else torch.nn.functional.silu(x)


def greedy(engine: Engine) -> list[int]:
    request = Request("a", PROMPTS[0], GREEDY)
    return [event.token_id for event in run_together(engine, [request])["a"]]
