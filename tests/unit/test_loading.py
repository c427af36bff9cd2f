"""Every broken checkpoint gives one clear line, early; a sound one gives the model that was saved."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ram_core.errors import CheckpointError
from ram_core.models import loading
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.loading import (
    context_limit,
    load_config,
    load_model,
    resolve_device,
    resolve_dtype,
    unsupported_reason,
)
from tests.models import FAMILIES, make_config, make_model, save_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _without_progress_bars():
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", "llama")


def load(source: Path | str, **options: Any) -> PreTrainedModel:
    return load_model(
        str(source), **({"device": CPU, "dtype": None, "attn_implementation": ATTENTION_NAME} | options)
    )


def refusal(source: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(source)
    assert "\n" not in str(caught.value)
    assert f"`{source}`" in str(caught.value)
    return str(caught.value)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_is_the_saved_one_frozen_and_in_eval_mode(tmp_path, family):
    loaded = load(save_model(tmp_path, family, seed=3, max_shard_size="20KB"))
    saved = dict(make_model(family, seed=3).named_parameters())
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, saved[name], rtol=0, atol=0)
        assert not parameter.requires_grad
    assert not loaded.training
    assert loaded.config._attn_implementation == ATTENTION_NAME


@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_weights_are_not_missed(tmp_path, is_tied):
    loaded = load(save_model(tmp_path, "qwen3", is_tied=is_tied))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == is_tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_the_checkpoints_own_unless_one_is_asked_for(tmp_path, dtype):
    source = save_model(tmp_path, "llama", dtype=dtype)
    assert load(source).dtype == dtype
    assert load(source, dtype=torch.float32).dtype == torch.float32


def test_a_missing_directory_is_named():
    assert "no such directory" in refusal("/no/such/place")


def test_a_file_is_no_directory(checkpoint):
    assert "is a file" in refusal(checkpoint / "config.json")


def test_a_directory_without_a_config_says_so(tmp_path):
    assert "has no config.json" in refusal(tmp_path)


def test_a_lora_adapter_is_recognised(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "LoRA adapter" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{ broken", "[]", "\xff"])
def test_a_broken_config_says_so(checkpoint, text):
    (checkpoint / "config.json").write_text(text, encoding="latin-1")
    assert "config.json is broken" in refusal(checkpoint)


def test_a_senseless_config_is_refused(checkpoint):
    edit_config(checkpoint, hidden_size="wide")
    assert "config.json is refused" in refusal(checkpoint)
    edit_config(checkpoint, hidden_size=-4)
    assert "config.json" in refusal(checkpoint)


def test_an_unknown_architecture_is_named(checkpoint):
    edit_config(checkpoint, model_type="foo")
    assert "unknown architecture `foo`" in refusal(checkpoint)


def test_code_of_a_checkpoints_own_does_not_run_unasked(checkpoint):
    edit_config(checkpoint, model_type="foo", auto_map={"AutoConfig": "evil.FooConfig"})
    (checkpoint / "evil.py").write_text("raise SystemExit('ran')")
    assert "`trust_remote_code`" in refusal(checkpoint)


def test_a_model_of_another_kind_is_no_language_model(checkpoint):
    edit_config(checkpoint, model_type="t5")
    assert "a `t5` model is no causal language model" in refusal(checkpoint)


def test_missing_weights_are_counted_and_named_without_loading(checkpoint, monkeypatch):
    def drop(weights: dict[str, torch.Tensor]) -> None:
        weights["model.rotary_emb.inv_freq"] = torch.ones(4)  # A buffer, as old checkpoints have it.
        for layer in range(2):
            del weights[f"model.layers.{layer}.self_attn.q_proj.weight"]

    edit_weights(checkpoint, drop)
    monkeypatch.setattr(loading, "_load_checked", never)
    assert "2 weights are missing" in (said := refusal(checkpoint))
    assert "`model.layers.0.self_attn.q_proj.weight`" in said


def test_missing_weights_are_found_after_loading_where_names_do_not_tell(checkpoint):
    def rename(weights: dict[str, torch.Tensor]) -> None:
        weights["extra"] = weights.pop("model.layers.0.self_attn.q_proj.weight")

    edit_weights(checkpoint, rename)
    assert "1 weight is missing" in refusal(checkpoint)


def test_weights_of_another_shape_are_refused_without_loading(checkpoint, monkeypatch):
    edit_config(checkpoint, vocab_size=310)
    monkeypatch.setattr(loading, "_load_checked", never)
    assert "has the shape [300, 32] in the checkpoint, but [310, 32]" in refusal(checkpoint)


def test_weights_of_another_shape_are_found_after_loading_too(checkpoint):
    edit_weights(checkpoint, lambda weights: weights.update(extra=torch.ones(1)))
    edit_config(checkpoint, vocab_size=310)
    assert "but [310, 32] by config.json" in refusal(checkpoint)


def test_surplus_weights_do_no_harm(checkpoint):
    edit_weights(checkpoint, lambda weights: weights.update(extra=torch.ones(1)))
    load(checkpoint)


def test_integers_without_a_quantization_are_refused(checkpoint):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(checkpoint, lambda weights: weights.update({name: weights[name].to(torch.int8)}))
    assert f"`{name}` is I8" in refusal(checkpoint)


def test_only_pickles_are_refused(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    assert "pickled (pytorch_model.bin)" in refusal(checkpoint)


def test_no_weights_at_all_is_said(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "it has no weights" in refusal(checkpoint)


@pytest.mark.parametrize("cut", [1, 1000, 10**9])
def test_a_file_that_is_cut_off_is_found(checkpoint, cut):
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: max(0, len(data) - cut)])
    assert "model.safetensors is cut off" in refusal(checkpoint)


def test_a_file_with_bytes_to_spare_is_corrupt(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    assert "is too long" in refusal(checkpoint)


@pytest.mark.parametrize(
    "header",
    [b"not json", b"[1, 2]", b'{"w": 1}', b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'],
)
def test_a_corrupt_header_is_found(checkpoint, header):
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (checkpoint / "model.safetensors").write_bytes(data)
    assert "model.safetensors is corrupt" in refusal(checkpoint)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", "llama", max_shard_size="20KB")


def test_a_missing_shard_is_named(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[1].unlink()
    assert f"1 of {len(shards)} shards are missing, the first is {shards[1].name}" in refusal(sharded)


def test_a_shard_that_is_cut_off_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-8])
    assert f"{shard.name} is cut off" in refusal(sharded)


@pytest.mark.parametrize(
    ("index", "reason"),
    [("{", "is broken"), ("{}", "is broken"), ('{"weight_map": {"w": "../../w.safetensors"}}', "beside it")],
)
def test_a_senseless_index_is_refused(sharded, index, reason):
    (sharded / "model.safetensors.index.json").write_text(index)
    assert reason in refusal(sharded)


def test_too_little_memory_is_said_in_gib(checkpoint, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(PreTrainedModel, "to", full)
    assert "GiB, which `cpu` has not free" in refusal(checkpoint)


def test_a_refusal_logs_nothing_and_leaves_the_logger_as_it_was(checkpoint, caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    edit_weights(checkpoint, lambda weights: weights.update(extra=weights.pop("model.norm.weight")))
    refusal(checkpoint)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.records == []
    assert transformers_logging.get_verbosity() == transformers_logging.INFO
    transformers_logging.set_verbosity(before)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("mamba", {}, "softmax attention"),
        ("jamba", {}, "softmax attention"),
        ("minimax", {}, "(linear_attention)"),
        ("qwen3_next", {}, "(linear_attention)"),
        ("llama4_text", {}, "(chunked_attention)"),
        ("recurrent_gemma", {}, "softmax attention"),
        ("rwkv", {}, "softmax attention"),
        ("bloom", {}, "ALiBi"),
        ("mpt", {}, "ALiBi"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("gptj", {}, "attention interface"),
        ("bert", {}, "later tokens"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "later tokens"),
        ("bart", {}, "has an encoder"),
    ],
)
def test_families_that_cannot_be_paged_are_known_by_their_config(family, options, reason):
    said = unsupported_reason(CONFIG_MAPPING[family](**options))
    assert reason in said
    assert f"`{family}`" in said


@pytest.mark.parametrize(
    "rope", [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope", "factor": 2.0}]
)
def test_a_rope_that_reads_the_whole_batch_is_refused(rope):
    half = {"short_factor": [1.0] * 64, "long_factor": [1.0] * 64, "original_max_position_embeddings": 128}
    rope = {"rope_theta": 1e4} | rope | (half if rope["rope_type"] == "longrope" else {})
    config = LlamaConfig(rope_parameters=rope)
    assert f"`{rope['rope_type']}` RoPE" in unsupported_reason(config)


def test_a_rope_of_one_kind_of_layer_is_looked_at_too():
    plain, dynamic = {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "dynamic", "factor": 2.0}
    ropes = {"sliding_attention": plain, "full_attention": plain | dynamic}
    assert "`dynamic` RoPE" in unsupported_reason(make_config("gemma3", rope_parameters=ropes))


@pytest.mark.parametrize(
    "family",
    [
        "gpt2",
        "gpt_neox",
        "phi",
        "olmo2",
        "cohere2",
        "granite",
        "starcoder2",
        "gemma2",
        "vaultgemma",
        "gpt_oss",
    ],
)
def test_common_decoders_are_not_refused(family):
    assert unsupported_reason(CONFIG_MAPPING[family]()) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_of_our_tests_are_not_refused(family):
    assert unsupported_reason(make_config(family)) is None


def test_an_unsupported_model_is_refused_over_pages_only(tmp_path):
    config = CONFIG_MAPPING["falcon"](
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=300, alibi=True
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert "ALiBi" in refusal(tmp_path)
    load(tmp_path, attn_implementation="eager")


def test_the_context_limit_is_the_configs():
    assert context_limit(make_config("gemma3", max_position_embeddings=64)) == 64
    assert context_limit(CONFIG_MAPPING["gpt2"](n_positions=77)) == 77
    with pytest.raises(CheckpointError, match="max_position_embeddings"):
        context_limit(CONFIG_MAPPING["mamba"]())


def test_devices_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(CheckpointError, match="PyTorch sees 0 CUDA devices"):
        resolve_device("cuda")
    with pytest.raises(CheckpointError, match="must be auto, cpu, cuda"):
        resolve_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(CheckpointError, match="'cuda:2', but PyTorch sees 2"):
        resolve_device("cuda:2")


def test_dtypes_by_name(tmp_path):
    config = load_config(str(save_model(tmp_path, "llama", dtype=torch.bfloat16)))
    assert resolve_dtype("auto", torch.device("cuda"), config) == torch.bfloat16
    assert resolve_dtype("auto", CPU, config) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda"), make_config("llama")) == torch.float32
    assert resolve_dtype("float16", CPU, config) == torch.float16
    with pytest.raises(CheckpointError, match="got 'int8'"):
        resolve_dtype("int8", CPU, config)


def test_phi3_with_a_long_context_is_refused_for_its_rope():
    factors = {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096} | factors
    config = Phi3Config(rope_parameters=rope, max_position_embeddings=131072)
    assert "`longrope` RoPE" in unsupported_reason(config)


def never(*_: object) -> None:
    raise AssertionError("the weights must not be read")
