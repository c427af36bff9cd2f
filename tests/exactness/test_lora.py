"""LoRA adapters of one base, served in one forward, against PEFT's own models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.messages import Request
from ram_core.errors import CheckpointError
from ram_core.models import lora_stack
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.kv import KvPool
from ram_core.models.loading import load_model
from ram_core.models.lora import load_lora, read_lora_config
from ram_core.models.lora_stack import LoraStack, StackedLora, linear_shapes
from ram_core.models.packing import Row, pack
from ram_core.models.paged import PagedModel
from ram_core.params import AlignerTerm, AlignmentParams
from tests.exactness.test_aligner_bank import by_kernel
from tests.exactness.test_engine import GREEDY, PROMPTS, TERSE, plain_greedy, run_together
from tests.exactness.test_prefix_cache import CountedTokens
from tests.models import save_model

# PEFT's own use of what transformers will drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CPU = torch.device("cpu")
LAST_LAYER = "model.layers.1.mlp.down_proj"
ADAPTERS: dict[str, dict[str, Any]] = {
    "narrow": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 8, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear"},
    "odd": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["o_proj", "down_proj", "lm_head"],
        "rank_pattern": {LAST_LAYER: 5},
        "alpha_pattern": {"down_proj": 7},
    },
}
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("lora") / "base", "llama", std=0.08, attention_bias=True)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    return {name: save_adapter(base, name, **options) for name, options in ADAPTERS.items()}


def save_adapter(base: Path, name: str, *, seed: int = 0, **options: Any) -> Path:
    """An adapter as PEFT saves it, of random weights, whose base is named by a relative path."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    noise = torch.Generator().manual_seed(seed + sum(name.encode()))
    with torch.no_grad():
        for key, weight in tuned.named_parameters():
            if "lora_" in key:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=noise))
    directory = base.parent / name
    # Else a head that is adapted is saved once more, as the base has it.
    tuned.save_pretrained(directory, save_embedding_layers=False)
    edit_json(directory / "adapter_config.json", base_model_name_or_path=f"../{base.name}")
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def oracle(base: Path, adapter: Path) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return PeftModel.from_pretrained(model, adapter).eval()


def load_stack(base: Path, adapters: dict[str, Path]) -> LoraStack:
    model = load_model(str(base), device=CPU, dtype=torch.float32, attn_implementation=ATTENTION_NAME)
    paged = PagedModel(model, name="base")
    shapes = linear_shapes(paged.model)
    loaded = [load_lora(read_lora_config(str(path)), shapes) for path in adapters.values()]
    modules = dict.fromkeys(module for layers in loaded for module in layers)
    stack = LoraStack(paged, len(loaded) + 1, modules, 8)
    for slot, layers in enumerate(loaded):
        stack.stage(slot, layers)
    # A slot without an adapter is the base.
    stack.stage(len(loaded), {})
    return stack


@torch.inference_mode()
def mixed_logits(stack: LoraStack, ids: list[list[int]]) -> torch.Tensor:
    """Two rows of each slot: prompts together, then one more token of all, in another order."""
    count = 2 * stack.num_slots
    pool = KvPool(stack.paged.geometry, 4 * count + 1, 4, CPU)
    pages = [list(range(1 + 4 * row, 5 + 4 * row)) for row in range(count)]
    heads = [Row(ids[row][:-1], 0, pages[row], False) for row in range(count)]
    owners = [row // 2 for row, head in enumerate(heads) for _ in head.token_ids]
    stack.forward(pack(heads, page_size=4, device=CPU), pool, torch.tensor(owners))
    order = list(range(0, count, 2)) + list(range(1, count, 2))
    tails = [Row(ids[row][-1:], len(ids[row]) - 1, pages[row]) for row in order]
    owners = [row // 2 for row in order]
    logits = stack.forward(pack(tails, page_size=4, device=CPU), pool, torch.tensor(owners))
    return logits[torch.tensor(order).argsort()]


@pytest.mark.parametrize("is_on_device", [False, True])
@torch.inference_mode()
def test_logits_of_a_mixed_batch_are_those_of_pefts_models(
    base: Path, adapters: dict[str, Path], is_on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_on_device:
        monkeypatch.setattr(lora_stack, "SlotLora", StackedLora)
        by_kernel(monkeypatch)
    stack = load_stack(base, adapters)
    ids = [[(31 * row + 7 * at) % 300 for at in range(5 + row % 3)] for row in range(2 * stack.num_slots)]
    ours = mixed_logits(stack, ids)
    for slot, path in enumerate(adapters.values()):
        tuned = oracle(base, path)
        for way in (tuned, tuned.merge_and_unload()):
            for row in (2 * slot, 2 * slot + 1):
                logits = way(input_ids=torch.tensor([ids[row]]), use_cache=False).logits[0, -1]
                torch.testing.assert_close(ours[row], logits, **TOLERANCE)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    logits = plain(input_ids=torch.tensor([ids[-1]]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(ours[-1], logits, **TOLERANCE)


def make_config(base: Path, adapters: dict[str, Path], **options: Any) -> EngineConfig:
    sources = tuple(AlignerSource(name, str(path)) for name, path in adapters.items())
    options = {"device": "cpu", "page_size": 4, "max_batch": 8} | options
    return EngineConfig(str(base), sources, **options)


def aligned(*names: str) -> AlignmentParams:
    return AlignmentParams(tuple(AlignerTerm(name, 1.5 / len(names)) for name in names))


@torch.inference_mode()
def test_requests_for_adapters_and_full_models_together_give_the_plain_forwards_greedy_tokens(
    base: Path, adapters: dict[str, Path]
) -> None:
    full = save_model(base.parent / "full", "llama", seed=3)
    sources = adapters | {"terse": full}
    engine = Engine.load(make_config(base, sources))
    assert [group.names for group in engine.bank.groups] == [("terse",), tuple(adapters)]
    models = {name: oracle(base, path) for name, path in adapters.items()}
    for name, source in {"proposal": base, "terse": full}.items():
        models[name] = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    kinds = [
        aligned("narrow"),
        aligned("all"),
        TERSE,
        aligned("odd"),
        aligned("odd", "all"),
        AlignmentParams(),
    ]
    asked = [Request(str(at), PROMPTS[at], GREEDY, kind) for at, kind in enumerate(kinds)]
    told = run_together(engine, asked)
    for request in asked:
        drawn = tuple(event.token_id for event in told[request.request_id])
        assert drawn == plain_greedy(models, request.prompt_ids, request.alignment, engine.limits.vocab_size)


def test_no_page_of_one_adapter_is_found_by_another(
    base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(make_config(base, adapters))
    prompt = tuple(range(30, 59))
    run_together(engine, [Request("a", prompt, GREEDY, aligned("narrow"))])
    counted = CountedTokens(monkeypatch, engine, "all")
    run_together(engine, [Request("b", prompt, GREEDY, aligned("all"))])
    whole = counted.num_tokens
    assert whole == len(prompt) + GREEDY.max_tokens - 1
    run_together(engine, [Request("c", prompt, GREEDY, aligned("all"))])
    assert counted.num_tokens - whole == whole - 28, "its own pages are found"


@torch.inference_mode()
def test_an_adapter_is_changed_while_the_others_are_served(base: Path, adapters: dict[str, Path]) -> None:
    engine = Engine.load(make_config(base, adapters, aligner_slots=4))
    [group] = engine.bank.groups
    layers = load_lora(read_lora_config(str(adapters["odd"])), linear_shapes(plain(base)))
    assert group.stage(layers) == 3
    left = group.remove("narrow")
    group.add("narrow", 3)
    names = ("narrow", "all", "odd")
    told = run_together(engine, [Request(name, PROMPTS[2], GREEDY, aligned(name)) for name in names])
    drawn = {name: [event.token_id for event in told[name]] for name in names}
    assert drawn["narrow"] == drawn["odd"] != drawn["all"]
    group.free(left)
    assert group.free_slots == (left,)
    own, of_base = group.served.slot_bytes, group.model.weight_bytes
    assert list(group.weight_bytes.values()) == [own, own, own, of_base, own]
    assert of_base == sum(weight.nbytes for weight in plain(base).parameters())


def plain(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Engine.load(make_config(base, {"bad": adapter}))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 65}, "must be 1 to 64, got [65]"),
        ({"rank_pattern": {"q_proj": 128}}, "must be 1 to 64, got [4, 128]"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` is ['lm_head']"),
        ({"use_dora": True}, "`use_dora` is True"),
        ({"lora_bias": True}, "`lora_bias` is True"),
        ({"bias": "all"}, "`bias` is 'all'"),
        ({"fan_in_fan_out": True}, "`fan_in_fan_out` is True"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` 'pissa'"),
        ({"alora_invocation_tokens": [1, 2]}, "`alora_invocation_tokens` is [1, 2]"),
        ({"some_later_option": 3}, "`some_later_option` is 3"),
        ({"peft_type": "IA3"}, "`peft_type` is 'IA3'"),
        ({"lora_alpha": "high"}, "must be numbers, got ['high']"),
        ({"base_model_name_or_path": None}, "`base_model_name_or_path`"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(base: Path, changes: dict[str, Any], words: str) -> None:
    adapter = save_adapter(base, "changed", r=4, target_modules=["q_proj"])
    edit_json(adapter / "adapter_config.json", **changes)
    said = refusal(base, adapter)
    assert words in said
    assert f"`{adapter}`" in said


def drop_half(weights: dict[str, torch.Tensor]) -> None:
    del weights[next(name for name in weights if "lora_B" in name)]


def widen(weights: dict[str, torch.Tensor]) -> None:
    name = next(name for name in weights if "lora_A" in name)
    weights[name] = weights[name].new_zeros(4, 7)


def bring_embeddings(weights: dict[str, torch.Tensor]) -> None:
    weights["base_model.model.model.embed_tokens.weight"] = torch.zeros(2, 2)


def change_a_norm(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if "layers.0" in name]:
        weights[name.replace("self_attn.q_proj", "input_layernorm")] = weights.pop(name)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (drop_half, "half of what it adds to `model.layers.0.self_attn.q_proj` is missing"),
        (widen, "[4, 7], but its config and its base"),
        (bring_embeddings, "`base_model.model.model.embed_tokens.weight` is no weight of LoRA"),
        (change_a_norm, "it changes `model.layers.0.input_layernorm`, which is no linear layer of its base"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    base: Path, edit: Callable[[dict[str, torch.Tensor]], None], words: str
) -> None:
    adapter = save_adapter(base, "edited", r=4, target_modules=["q_proj"])
    weights = load_file(adapter / "adapter_model.safetensors")
    edit(weights)
    save_file(weights, adapter / "adapter_model.safetensors")
    said = refusal(base, adapter)
    assert words in said
    assert f"`{adapter}`" in said


def test_an_adapter_is_no_proposal_and_pickled_weights_are_not_read(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, "lone", r=4, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match="LoRA adapter"):
        Engine.load(EngineConfig(str(adapter), device="cpu"))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "has no adapter_model.safetensors" in refusal(base, adapter)


def test_an_adapter_that_a_stack_has_no_room_for_is_refused(base: Path, adapters: dict[str, Path]) -> None:
    shapes = linear_shapes(AutoModelForCausalLM.from_pretrained(base))
    stack = load_stack(base, {"narrow": adapters["narrow"]})
    with pytest.raises(CheckpointError, match="`lm_head`, for which the bank has no room"):
        stack.stage(0, load_lora(read_lora_config(str(adapters["odd"])), shapes))
    wide = save_adapter(base, "wide", r=9, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"rank 9 on `.*`; the bank has room for rank 8"):
        stack.stage(0, load_lora(read_lora_config(str(wide)), shapes))
