"""What `ram check` says is what loading would find: counted twice, in two ways."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from ram_core.errors import CheckpointError
from ram_core.models.inspection import PairReport, inspect_pair
from tests.models import FAMILIES, make_model, make_tokenizer, save_model, save_pair


@pytest.fixture(autouse=True)
def _without_progress_bars():
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def inspect(proposal, aligners, **options) -> PairReport:
    return inspect_pair(str(proposal), {name: str(path) for name, path in aligners.items()}, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_pair_can_be_served_and_its_numbers_are_those_of_the_real_models(tmp_path, family):
    report = inspect(*save_pair(tmp_path, family))
    assert report.can_serve
    assert report.problems == ()
    assert report.max_model_len == 256
    assert [each.model.name for each in report.aligners] == ["polite", "terse"]
    assert all(each.is_vocabulary_shared for each in report.aligners)
    model = make_model(family)
    assert report.proposal.num_parameters == sum(each.numel() for each in model.parameters())
    assert report.proposal.weight_bytes == sum(each.nbytes for each in model.parameters())
    assert report.proposal.kv_bytes_per_token == cached_bytes(model, 5) // 5
    assert report.proposal.architecture == type(model).__name__
    assert report.proposal.num_rows == 300


def cached_bytes(model: torch.nn.Module, num_tokens: int) -> int:
    """What transformers' own cache keeps of some tokens (fewer than a window)."""
    cache = model(torch.zeros(1, num_tokens, dtype=torch.long), use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_keys_count_by_the_explicit_size_of_a_head(tmp_path):
    report = inspect(save_model(tmp_path, "qwen3", layers=3, kv_heads=2, head_dim=16), {})
    assert report.proposal.kv_bytes_per_token == 3 * 2 * (16 + 16) * 4


def test_layers_that_differ_count_each(tmp_path):
    config = CONFIG_MAPPING["deepseek_v3"](
        hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, vocab_size=300, kv_lora_rank=8, q_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    report = inspect(tmp_path, {})
    assert report.problems == ()
    assert report.proposal.kv_bytes_per_token == 2 * 2 * (12 + 6) * 4


def test_memory_is_weights_and_tokens_of_every_model(tmp_path):
    report = inspect(*save_pair(tmp_path))
    weights = sum(model.weight_bytes for model in report.models)
    keys = sum(model.kv_bytes_per_token for model in report.models)
    assert len(report.models) == 3
    assert report.memory_bytes(1000) == weights + 1000 * keys
    assert report.aligners[0].model.memory_bytes(0) == report.aligners[0].model.weight_bytes


def test_a_dtype_of_half_the_bytes_halves_weights_and_keys(tmp_path):
    pair = save_pair(tmp_path, aligners=["polite"])
    full, half = inspect(*pair), inspect(*pair, dtype="bfloat16")
    assert half.memory_bytes(100) * 2 == full.memory_bytes(100)
    assert half.proposal.dtype == "bfloat16"


def test_another_vocabulary_is_a_problem_of_that_aligner_only(tmp_path):
    proposal, aligners = save_pair(tmp_path)
    make_tokenizer(301).save_pretrained(aligners["terse"])
    report = inspect(proposal, aligners)
    polite, terse = report.aligners
    assert polite.is_vocabulary_shared
    assert "it has 301" in terse.vocabulary_problem
    assert report.problems == (terse.vocabulary_problem,)
    assert not report.can_serve


def test_a_broken_aligner_is_a_problem_and_the_rest_is_still_counted(tmp_path):
    proposal, aligners = save_pair(tmp_path)
    path = aligners["polite"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    report = inspect(proposal, aligners)
    assert len(report.problems) == 1
    assert "model.safetensors is cut off" in report.problems[0]
    assert report.aligners[1].model.problems == ()
    assert report.aligners[0].model.num_parameters > 0


def test_a_missing_proposal_is_said_once(tmp_path):
    _, aligners = save_pair(tmp_path, aligners=["polite"])
    report = inspect("/no/such/place", aligners, max_model_len=100)
    assert report.problems == ("`/no/such/place`: no such directory",)
    assert not report.aligners[0].is_vocabulary_shared


def test_a_length_beyond_a_context_is_a_problem_that_names_the_model(tmp_path):
    proposal = save_model(tmp_path / "proposal", "llama")
    short = save_model(tmp_path / "short", "llama", max_position_embeddings=64)
    assert inspect(proposal, {"short": short}).max_model_len == 64
    report = inspect(proposal, {"short": short}, max_model_len=100)
    assert report.problems == ("`max_model_len` 100 exceeds the 64 tokens of `short`",)


def test_an_unsupported_family_is_a_problem_with_its_reason(tmp_path):
    CONFIG_MAPPING["bloom"](vocab_size=300).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    report = inspect(tmp_path, {})
    assert len(report.problems) == 1
    assert "ALiBi" in report.problems[0]


def test_no_weight_is_read(tmp_path, monkeypatch):
    proposal, aligners = save_pair(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    assert inspect(proposal, aligners).can_serve


def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="`device`"):
        inspect(tmp_path, {}, device="tpu")
