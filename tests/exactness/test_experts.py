"""Both ways of running experts give what transformers' own loop over them gives."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.moe import ExpertsInterface

from ram_core.models.experts import EXPERTS_NAME, choose_experts
from tests.models import make_model


@pytest.mark.parametrize(("num_tokens", "way"), [(1, "batched_mm"), (2, "batched_mm"), (3, "grouped_mm")])
def test_few_tokens_are_run_another_way_than_many_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, way: str
) -> None:
    """Each of 4 experts has weights; a token takes 2."""
    model = make_model("gpt_oss")
    ids = torch.arange(num_tokens)[None] + 7
    model.set_experts_implementation("eager")
    wanted = model(ids).logits
    model.set_experts_implementation(EXPERTS_NAME)
    taken = []
    for name in ("batched_mm", "grouped_mm"):
        run = ExpertsInterface()[name]
        noted = lambda *args, name=name, run=run: taken.append(name) or run(*args)  # noqa: E731
        monkeypatch.setitem(ExpertsInterface._global_mapping, name, noted)
    torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=1e-4)
    assert taken == [way, way]


def test_models_on_cpu_keep_their_way() -> None:
    for family in ("llama", "gpt_oss"):
        model = make_model(family)
        before = model.config._experts_implementation
        choose_experts(model)
        assert model.config._experts_implementation == before
