"""Aligners that come and go while the engine serves: what they say, and that nobody else notices."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ram_core.engine import newcomers
from ram_core.engine.aligner_groups import AlignerGroup
from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.local import LocalEngine
from ram_core.engine.messages import (
    AlignerFailed,
    AlignerFreed,
    AlignerLoaded,
    AlignerOutcome,
    AlignerProgress,
    FailedEvent,
    FreeAligner,
    LoadAligner,
    Request,
    TokenEvent,
)
from ram_core.engine.pace import Pace
from ram_core.engine.room import without_weights
from ram_core.errors import AlignerUnavailable, CheckpointError
from ram_core.models import stored
from ram_core.models.attention import ATTENTION_NAME
from ram_core.models.kv import KvPool
from ram_core.models.loading import load_model
from ram_core.models.outline import buffers_of, make_shell, outline_of
from ram_core.models.packed_linear import PackedLinear
from ram_core.models.paged import PagedModel
from ram_core.models.stacked import StackedModel, plain_weights
from ram_core.models.stored import StoredWeights
from ram_core.params import AlignerTerm, AlignmentParams, Resampling, SamplingParams
from tests.exactness.test_aligner_bank import STACKED_FAMILIES, load, logits_of, save_any
from tests.exactness.test_engine import GREEDY, PROMPTS, anew, run_together
from tests.exactness.test_lora import ADAPTERS, save_adapter
from tests.exactness.test_prefix_cache import CountedTokens
from tests.models import make_tokenizer, save_model, save_pair

# PEFT's own use of what transformers will drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SEEDED = SamplingParams(seed=5, max_tokens=16, ignore_eos=True)
LONG = replace(SEEDED, max_tokens=120)
ENOUGH = 1 << 30
SMALL = {"hidden": 16, "layers": 1, "vocab_size": 320}
PATIENCE_S = 60


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A proposal, and aligners by what is special about them."""
    root = tmp_path_factory.mktemp("models")
    proposal, aligners = save_pair(root, vocab_size=320)
    found = {"proposal": proposal, **aligners}
    found["third"] = save_model(root / "third", "llama", seed=11, **SMALL)
    found["fourth"] = save_model(root / "fourth", "llama", seed=12, **SMALL)
    found["wide"] = save_model(root / "wide", "llama", seed=13, **SMALL | {"hidden": 24})
    found["other"] = save_model(root / "other", "gpt_oss", seed=14, **SMALL)
    base = save_model(root / "base", "llama", seed=15, std=0.08, attention_bias=True)
    return found | {name: save_adapter(base, name, **options) for name, options in ADAPTERS.items()}


@pytest.fixture(scope="module")
def config(sources: dict[str, Path]) -> EngineConfig:
    """A bank of three slots, of which two are taken, and adapters that leave one slot free."""
    begun = tuple(AlignerSource(f"{name}@1", str(sources[name])) for name in ("polite", "terse", "all"))
    return EngineConfig(str(sources["proposal"]), begun, device="cpu", max_batch=8, aligner_slots=3)


@pytest.fixture
def engine(config: EngineConfig) -> Engine:
    return Engine.load(config)


def order(aligner: str, *places: Path, max_bytes: int = ENOUGH) -> LoadAligner:
    """An aligner of one model, or of several."""
    names = [aligner, *(f"{aligner}/part{index}" for index in range(1, len(places)))]
    return LoadAligner(aligner, tuple(zip(names, map(str, places), strict=True)), max_bytes)


def outcomes(engine: Engine, wanted: int = 1) -> list[AlignerOutcome]:
    """The next outcomes but progress; steps go on meanwhile."""
    found: list[AlignerOutcome] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < wanted:
        assert time.monotonic() < deadline, "no outcome"
        if engine.has_work:
            engine.step()
        else:
            time.sleep(0.001)
        found += [told for told in engine.tend() if not isinstance(told, AlignerProgress)]
    return found


def bring(engine: Engine, aligner: str, *places: Path, max_bytes: int = ENOUGH) -> AlignerOutcome:
    engine.handle(order(aligner, *places, max_bytes=max_bytes))
    [outcome] = outcomes(engine)
    return outcome


def let_go(engine: Engine, aligner: str) -> None:
    engine.handle(FreeAligner(aligner))
    assert outcomes(engine) == [AlignerFreed(aligner)]


def using(*names: str) -> AlignmentParams:
    return AlignmentParams(tuple(AlignerTerm(name) for name in names))


def said(engine: Engine, *names: str, prompt: int = 3, sampling: SamplingParams = SEEDED) -> list[int]:
    [events] = run_together(engine, [Request("r", PROMPTS[prompt], sampling, using(*names))]).values()
    return [event.token_id for event in events]


# What a newcomer says.


KINDS = {
    # Where it goes: into a free slot, into a group of its own, to a geometry of its own.
    "slot": "third",
    "alone": "other",
    "geometry": "wide",
    "adapter": "narrow",
    "odd adapter": "odd",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_newcomer_says_what_it_says_when_it_is_there_from_the_start(
    config: EngineConfig, sources: dict[str, Path], engine: Engine, kind: str
) -> None:
    source = sources[KINDS[kind]]
    begun = Engine.load(replace(config, aligners=(*config.aligners, AlignerSource("new@2", str(source)))))
    before = [(group.names, group.free_slots) for group in engine.bank.groups]
    loaded = bring(engine, "new@2", source)
    assert isinstance(loaded, AlignerLoaded)
    assert (loaded.num_bytes > 0, loaded.device) == (True, "cpu")
    has_slot = kind in ("slot", "adapter")
    assert len(engine.bank.groups) == len(before) + (not has_slot)
    assert engine.bank.group_of["new@2"] is engine.bank.groups[0 if kind == "slot" else -1]
    for names in (["new@2"], ["polite@1", "new@2"], ["new@2", "all@1"]):
        for sampling in (GREEDY, SEEDED):
            assert said(engine, *names, sampling=sampling) == said(begun, *names, sampling=sampling)
    assert said(engine, "new@2") != said(engine, "polite@1")


@pytest.mark.parametrize("family", [*STACKED_FAMILIES, "phi"])
def test_what_is_read_straight_into_a_slot_is_what_transformers_would_load(
    tmp_path: Path, family: str
) -> None:
    """Tied and untied heads, biases, norms."""
    paths = [save_any(tmp_path / str(seed), family, seed=seed) for seed in range(2)]
    stack = StackedModel(load(paths[0]), 2)
    stack.stage(0, plain_weights(load(paths[1]).model))
    with StoredWeights(paths[1]) as files:
        straight = stack.weights_in(files)
        assert straight is not None
        stack.stage(1, straight)

    def logits(slot: int) -> Tensor:
        return logits_of(
            lambda b, p, owners: stack.forward(b, p, torch.tensor(owners)), stack.paged, [slot] * 2
        )

    assert torch.equal(logits(0), logits(1))


@pytest.mark.parametrize("family", STACKED_FAMILIES)
def test_the_second_of_an_architecture_needs_no_model_to_become_a_stack(tmp_path: Path, family: str) -> None:
    """A shell with the first one's buffers gives what a loaded model gives, bit by bit."""
    paths = [save_any(tmp_path / str(seed), family, seed=seed) for seed in range(2)]
    first = load_plain(paths[0])
    buffers = buffers_of(first, torch.float32)
    assert buffers is not None
    shell = make_shell(first.config, buffers, device=torch.device("cpu"), dtype=torch.float32)
    assert shell is not None
    logits = []
    for model in (load_plain(paths[1]), shell):
        outline = outline_of(without_weights("skeleton", first.config, torch.float32, EngineConfig("")))
        alone = PagedModel(model, name="new", geometry=outline.geometry)
        stack = StackedModel(alone, 2, outline.axes)
        with StoredWeights(paths[1]) as files:
            straight = stack.weights_in(files)
            assert straight is not None
            stack.stage(1, straight)
        forward = stack.forward
        logits.append(logits_of(lambda b, p, o, f=forward: f(b, p, torch.tensor(o)), alone, [1, 1]))
    plain = load(paths[1])
    assert torch.equal(*logits)
    expected = logits_of(lambda b, p, o: plain.forward(b, p), plain, [0, 0])
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)


def load_plain(path: Path) -> PreTrainedModel:
    return load_model(
        str(path), device=torch.device("cpu"), dtype=torch.float32, attn_implementation=ATTENTION_NAME
    )


def test_an_architecture_is_compared_with_itself_once(
    engine: Engine, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next is of it, whatever became of the first: no model is loaded, and it says the same."""
    second = save_model(tmp_path / "second", "llama", seed=16, **SMALL | {"hidden": 24})
    assert isinstance(bring(engine, "wide@2", second), AlignerLoaded)
    before = said(engine, "wide@2")
    let_go(engine, "wide@2")
    bring(engine, "wide@1", sources["wide"])
    let_go(engine, "wide@1")
    monkeypatch.setattr(newcomers, "load_model", None)
    assert isinstance(bring(engine, "wide@2", second), AlignerLoaded)
    assert said(engine, "wide@2") == before


def test_nothing_is_served_from_files_that_are_mapped_into_memory(
    config: EngineConfig, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Whoever writes to them would change what is said, and whoever cuts them off would end the process."""
    path = Path(shutil.copytree(sources["wide"], tmp_path / "wide"))
    alone = replace(config, aligners=(), aligner_slots=1)
    for bank in (True, False):
        engine = Engine.load(replace(alone, aligner_bank=bank))
        bring(engine, "wide@1", path)
        before = said(engine, "wide@1")
        weights = path / "model.safetensors"
        raw = weights.read_bytes()
        with weights.open("r+b") as file:
            file.seek(len(raw) // 2)
            file.write(bytes(len(raw) - len(raw) // 2))
        assert said(engine, "wide@1", prompt=2)
        assert said(engine, "wide@1") == before
        weights.write_bytes(raw)


def test_a_slot_is_filled_without_a_model_beside_it(
    engine: Engine, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newcomers, "load_model", None)
    assert isinstance(bring(engine, "new@2", sources["third"]), AlignerLoaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_are_rounded_as_transformers_does(
    engine: Engine, config: EngineConfig, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces that are smaller than a weight."""
    monkeypatch.setattr(stored, "_PIECE_BYTES", 1 << 10)
    path = save_model(tmp_path / "new", "llama", seed=11, dtype=dtype, max_shard_size="5KB", **SMALL)
    begun = Engine.load(replace(config, aligners=(AlignerSource("new@2", str(path)),)))
    assert isinstance(bring(engine, "new@2", path), AlignerLoaded)
    assert engine.bank.group_of["new@2"].is_stacked
    assert said(engine, "new@2") == said(begun, "new@2")


def test_weights_of_other_names_go_the_way_of_transformers(
    engine: Engine, config: EngineConfig, sources: dict[str, Path], tmp_path: Path
) -> None:
    path = edited(sources["third"], tmp_path, lambda w: {f"transformer.{n}": each for n, each in w.items()})
    renamed = bring(engine, "odd@1", path)
    assert isinstance(renamed, AlignerFailed), "neither can make sense of these"
    path = edited(sources["third"], tmp_path / "more", lambda w: w | {"model.extra.inv_freq": torch.ones(2)})
    assert isinstance(bring(engine, "new@2", path), AlignerLoaded)
    [polite, *_] = engine.bank.groups
    assert engine.bank.group_of["new@2"] is polite
    begun = Engine.load(replace(config, aligners=(AlignerSource("new@2", str(path)),)))
    assert said(engine, "new@2") == said(begun, "new@2")


def test_an_aligner_of_several_models_comes_and_goes_as_one(engine: Engine, sources: dict[str, Path]) -> None:
    before = state(engine)
    both = bring(engine, "new@2", sources["third"], sources["wide"], sources["narrow"])
    assert isinstance(both, AlignerLoaded)
    assert both.num_bytes == sum(
        engine.bank.group_of[name].weight_bytes[name] for name in ("new@2", "new@2/part1")
    ) + adapter_bytes(sources["narrow"])
    said(engine, "new@2", "new@2/part1", "new@2/part2")
    let_go(engine, "new@2")
    assert state(engine) == before


def adapter_bytes(path: Path) -> int:
    return sum(each.numel() for each in load_file(path / "adapter_model.safetensors").values()) * 4


def test_slots_that_were_asked_for_are_made_for_new_architectures_too(
    engine: Engine, sources: dict[str, Path], tmp_path: Path
) -> None:
    second = save_model(tmp_path / "second", "llama", seed=16, **SMALL | {"hidden": 24})
    for name, path in (("wide@1", sources["wide"]), ("wide@2", second)):
        assert isinstance(bring(engine, name, path), AlignerLoaded)
    group = engine.bank.group_of["wide@1"]
    assert engine.bank.group_of["wide@2"] is group
    assert group.num_slots == 3


def test_adapters_that_fit_no_stack_share_their_bases_weights(
    config: EngineConfig, sources: dict[str, Path]
) -> None:
    """Nor are they counted again; and they stay when the one that brought them goes."""
    engine = Engine.load(replace(config, aligners=config.aligners[:1]))
    first = bring(engine, "all@1", sources["all"])
    assert isinstance(first, AlignerLoaded)
    before = {name: said(engine, name) for name in ("all@1",)}
    own = adapter_bytes(sources["odd"])
    second = bring(engine, "odd@1", sources["odd"], max_bytes=own)
    assert isinstance(second, AlignerLoaded)
    base_bytes = engine.bank.group_of["all@1"].model.weight_bytes
    assert (first.num_bytes, second.num_bytes) == (base_bytes + adapter_bytes(sources["all"]), own)
    groups = [engine.bank.group_of[name] for name in ("all@1", "odd@1")]
    assert groups[0] is not groups[1]
    weights = [{id(each) for each in plain_tensors(group.model)} for group in groups]
    assert weights[0] == weights[1]
    assert said(engine, "all@1") == before["all@1"]
    both = said(engine, "odd@1")
    let_go(engine, "all@1")
    assert said(engine, "odd@1") == both
    # Of the same layers, it takes a slot beside the first.
    assert isinstance(bring(engine, "odd@2", sources["odd"], max_bytes=own), AlignerLoaded)
    assert engine.bank.group_of["odd@2"] is groups[1]
    assert said(engine, "odd@2") == both


def plain_tensors(model: PagedModel) -> list[Tensor]:
    packed = [layer._panels for layer in model.model.modules() if isinstance(layer, PackedLinear)]
    return [*model.model.parameters(), *packed]


# That nobody else notices.


def neighbours() -> list[Request]:
    kinds = [using(), using("polite@1"), using("terse@1"), using("all@1"), using("polite@1", "terse@1")]
    return [Request(str(index), PROMPTS[index], LONG, kind) for index, kind in enumerate(kinds)]


@pytest.mark.parametrize("changes", [{}, {"is_overlapping": True, "has_static_shapes": True}], ids=str)
def test_loads_and_frees_change_nothing_for_those_who_run(
    engine: Engine, sources: dict[str, Path], changes: dict[str, object]
) -> None:
    undisturbed = run_together(anew(engine, **changes), neighbours())
    engine = anew(engine, **changes)
    for request in neighbours():
        engine.handle(request)
    told: dict[str, list[TokenEvent]] = {request.request_id: [] for request in neighbours()}
    names = ["third", "wide", "narrow", "other"]
    engine.handle(order(f"{names[0]}@1", sources[names[0]]))
    num_loaded, deadline = 0, time.monotonic() + PATIENCE_S
    while engine.has_work or len(names) > 0:
        assert time.monotonic() < deadline
        for event in engine.step() if engine.has_work else ():
            assert not isinstance(event, FailedEvent)
            if isinstance(event, TokenEvent):
                told[event.request_id].append(event)
        for outcome in engine.tend():
            if isinstance(outcome, AlignerLoaded):
                num_loaded += 1
                engine.handle(FreeAligner(outcome.aligner))
            elif isinstance(outcome, AlignerFreed) and len(names) > 1:
                names.pop(0)
                engine.handle(order(f"{names[0]}@1", sources[names[0]]))
            elif isinstance(outcome, AlignerFreed):
                names.pop(0)
    assert num_loaded == 4
    # As text, for NaN is not equal to itself.
    assert repr(told) == repr(undisturbed)


def many_wishes() -> list[Request]:
    kinds = [using(), *(replace(using("polite@1"), resampling=way) for way in Resampling)]
    plain = replace(SEEDED, max_tokens=6)
    wishing = replace(plain, top_k=20, top_p=0.9, min_p=0.01, temperature=0.7, num_top_log_probs=3)
    return [
        Request(f"{index} {sampling is plain}", PROMPTS[index], sampling, kind)
        for index, kind in enumerate([*kinds, using("polite@1", "terse@1")])
        for sampling in (plain, wishing)
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_steps_do_not_depend_on_the_default_dtype(tmp_path: Path, family: str) -> None:
    """Which transformers changes for the whole process while it loads a model beside them."""
    proposal, aligners = save_pair(tmp_path, family)  # type: ignore[arg-type]
    begun = tuple(AlignerSource(f"{name}@1", str(path)) for name, path in aligners.items())
    engine = Engine.load(EngineConfig(str(proposal), begun, device="cpu", dtype="bfloat16"))
    before = run_together(anew(engine), many_wishes())
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert repr(run_together(anew(engine), many_wishes())) == repr(before)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_load_leaves_the_process_as_it_was(engine: Engine, sources: dict[str, Path]) -> None:
    def settings() -> list[object]:
        """What holds here, and for a thread that begins now."""
        seen: list[object] = [sys.getswitchinterval(), torch.get_default_dtype()]

        def look() -> None:
            seen.extend([torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, 0)])

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        look()
        return seen

    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        before = settings()
        assert isinstance(bring(engine, "new@2", sources["wide"]), AlignerLoaded)
        assert settings() == before
    finally:
        torch.set_num_threads(num_threads)


def test_a_load_paces_itself_while_sequences_run_and_only_then(
    engine: Engine, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[bool] = []

    class Watched(Pace):
        def rest(self) -> None:
            rests.append(self._is_busy())

    monkeypatch.setattr(newcomers, "Pace", Watched)
    monkeypatch.setattr(stored, "_PIECE_BYTES", 1 << 10)
    assert isinstance(bring(engine, "new@2", sources["third"]), AlignerLoaded)
    # After each piece, so that none is long.
    num_pieces = (sources["third"] / "model.safetensors").stat().st_size >> 10
    assert len(rests) > num_pieces
    assert not any(rests)
    let_go(engine, "new@2")
    engine.handle(Request("r", PROMPTS[3], LONG, using("polite@1")))
    engine.step()
    rests.clear()
    engine.handle(order("new@2", sources["third"]))
    deadline = time.monotonic() + PATIENCE_S
    while not any(isinstance(told, AlignerLoaded) for told in engine.tend()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert len(rests) > num_pieces
    assert all(rests)


def test_freeing_waits_for_the_steps_that_may_still_read(engine: Engine, sources: dict[str, Path]) -> None:
    engine = anew(engine, is_overlapping=True)
    assert isinstance(bring(engine, "new@2", sources["third"]), AlignerLoaded)
    group = engine.bank.group_of["new@2"]
    engine.handle(Request("r", PROMPTS[3], LONG, using("new@2")))
    engine.handle(Request("s", PROMPTS[3], LONG, using("polite@1")))
    for _ in range(3):
        engine.step()
    engine.handle(FreeAligner("new@2"))
    assert engine.tend() == []
    assert group.free_slots == ()
    # What was launched before is collected once the next step is on its way.
    events = engine.step()
    [failed] = [event for event in events if isinstance(event, FailedEvent)]
    assert (failed.request_id, type(failed.error)) == ("r", AlignerUnavailable)
    assert [event.request_id for event in events if isinstance(event, TokenEvent)] == ["s"]
    assert engine.tend() == [AlignerFreed("new@2")]
    assert group.free_slots == (2,)


def test_a_request_for_what_has_just_gone_fails_alone(engine: Engine) -> None:
    """It was admitted before the client could know."""
    engine.handle(FreeAligner("polite@1"))
    engine.handle(Request("r", PROMPTS[3], GREEDY, using("polite@1"), num_choices=2))
    engine.handle(Request("s", PROMPTS[3], GREEDY, using("terse@1")))
    assert "polite@1" not in engine.limits.pools
    events = engine.step()
    failed = [(event.request_id, event.index) for event in events if isinstance(event, FailedEvent)]
    assert failed == [("r", 0), ("r", 1)]
    assert engine.has_work, "the other goes on"


def test_waiting_requests_for_what_goes_fail_too(engine: Engine) -> None:
    engine = anew(engine, max_batch=1)
    for name in "rs":
        engine.handle(Request(name, PROMPTS[3], GREEDY, using("polite@1")))
    engine.step()
    engine.handle(FreeAligner("polite@1"))
    failed = [event.request_id for event in engine.step() if isinstance(event, FailedEvent)]
    assert failed == ["r", "s"]
    assert not engine.has_work


@pytest.mark.parametrize("kind", ["slot", "geometry", "odd adapter"])
def test_pages_of_a_namesake_that_went_are_never_found(
    engine: Engine, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The same name and slot, and other weights."""
    source = sources[KINDS[kind]]
    assert isinstance(bring(engine, "new@2", source), AlignerLoaded)
    first = said(engine, "new@2", sampling=GREEDY)
    num_pages = engine.stats.num_pages
    assert num_idle(engine) > 0
    let_go(engine, "new@2")
    assert num_idle(engine) == 0
    changed = edited(source, tmp_path, lambda weights: {n: each.flip(0) for n, each in weights.items()})
    assert isinstance(bring(engine, "new@2", changed), AlignerLoaded)
    counted = CountedTokens(monkeypatch, engine, "new@2")
    second = said(engine, "new@2", sampling=GREEDY)
    assert counted.num_tokens >= len(PROMPTS[3]) + GREEDY.max_tokens - 1
    assert second != first
    assert engine.stats.num_pages == num_pages
    fresh = anew(engine, prefix_cache=False)
    assert said(fresh, "new@2", sampling=GREEDY) == second


def num_idle(engine: Engine) -> int:
    """Pages of aligners that still hold what somebody may ask for again."""
    return sum(len(book._idle) for name, book in engine._scheduler.books.items() if name != "proposal")


def edited(source: Path, root: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of a model or an adapter with other weights."""
    target = shutil.copytree(source, root / source.name)
    [path] = target.glob("*.safetensors")
    weights = change(load_file(path))
    save_file({name: each.contiguous() for name, each in weights.items()}, path, {"format": "pt"})
    if (config := target / "adapter_config.json").is_file():
        said = json.loads(config.read_text())
        base = (source / said["base_model_name_or_path"]).resolve()
        config.write_text(json.dumps(said | {"base_model_name_or_path": str(base)}))
    return target


# What fails, and what is left behind.


def state(engine: Engine) -> object:
    """All that a load may change, but for KV pools that stay for the next one of their geometry."""
    bank = engine.bank
    return (
        [(group.names, group.free_slots) for group in bank.groups],
        bank.residents,
        bank.bytes_of,
        bank.limits.pools,
        [(book.num_free, book.num_pages) for book in list(engine._scheduler.books.values())[:2]],
    )


def spoil(path: Path, kind: str) -> None:
    weights = next(path.glob("*.safetensors"))
    match kind:
        case "cut off":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "no header":
            weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])
        case "no weights":
            weights.unlink()
        case "not finite":
            data = load_file(weights)
            name = sorted(data)[-1]
            data[name].view(-1)[-1] = torch.nan
            save_file(data, weights, {"format": "pt"})
        case "other words":
            make_tokenizer(sentences=["entirely other words make other tokens"]).save_pretrained(path)
        case "no config":
            (path / "config.json").write_text("{")
        case "unknown":
            (path / "config.json").write_text(json.dumps({"model_type": "nobody_knows"}))
        case "short":
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))


BROKEN = {
    "cut off": "cut off",
    "no header": "cut off, or is no safetensors file",
    "no weights": "no weights",
    "not finite": "no finite numbers|gives other logits",
    "other words": "cannot follow the proposal",
    "no config": "config.json is broken",
    "unknown": "unknown architecture `nobody_knows`",
    "short": "reads at most 8 tokens",
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("source", ["third", "wide"])
def test_what_is_broken_changes_nothing(
    engine_for_failures: Engine, sources: dict[str, Path], tmp_path: Path, source: str, kind: str
) -> None:
    engine = engine_for_failures
    before, words = state(engine), said(engine, "polite@1")
    path = shutil.copytree(sources[source], tmp_path / "broken")
    spoil(path, kind)
    # Whatever its other models are.
    for places in ([path], [sources["third"], path]):
        failed = bring(engine, "new@2", *places)
        assert isinstance(failed, AlignerFailed)
        assert re.search(BROKEN[kind], failed.reason)
        assert "\n" not in failed.reason
        assert state(engine) == before
    assert len(engine.bank.pools) == len(engine.limits.pools)
    assert said(engine, "polite@1") == words


@pytest.fixture(scope="module")
def engine_for_failures(config: EngineConfig) -> Engine:
    return Engine.load(config)


@pytest.mark.parametrize("source", ["third", "wide", "narrow", "odd"])
def test_what_takes_too_much_memory_changes_nothing(
    engine_for_failures: Engine, sources: dict[str, Path], source: str
) -> None:
    engine = engine_for_failures
    before = state(engine)
    failed = bring(engine, "new@2", sources[source], max_bytes=100)
    assert isinstance(failed, AlignerFailed)
    assert "but may take 100 B" in failed.reason
    assert state(engine) == before


def test_a_file_that_is_cut_off_while_it_is_read_is_an_error_and_no_more(
    engine: Engine, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(sources["third"], tmp_path / "third")
    before = state(engine)
    weights_in = StackedModel.weights_in

    def cut(self: StackedModel, files: StoredWeights) -> object:
        with (path / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
        return weights_in(self, files)

    monkeypatch.setattr(StackedModel, "weights_in", cut)
    failed = bring(engine, "new@2", path)
    assert isinstance(failed, AlignerFailed)
    assert "its weights are cut off within" in failed.reason
    assert state(engine) == before


def test_no_memory_is_an_error_and_no_more(
    engine: Engine, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(engine)

    def no_memory(*args: object) -> object:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(newcomers, "KvPool", no_memory)
    failed = bring(engine, "new@2", sources["third"], sources["wide"])
    assert failed == AlignerFailed("new@2", "`cpu` has not enough memory free")
    assert state(engine) == before


def test_orders_may_come_twice_or_for_nothing(engine: Engine, sources: dict[str, Path]) -> None:
    first = bring(engine, "new@2", sources["third"])
    assert isinstance(first, AlignerLoaded)
    assert bring(engine, "new@2", sources["third"]) == first
    assert bring(engine, "polite@1", sources["third"]) != first
    let_go(engine, "nobody@1")
    clash = LoadAligner(
        "clash@1", (("clash@1", str(sources["wide"])), ("new@2", str(sources["wide"]))), ENOUGH
    )
    before = state(engine)
    engine.handle(clash)
    assert outcomes(engine) == [AlignerFailed("clash@1", "there is a model `new@2` already")]
    assert state(engine) == before


def test_one_that_is_to_go_before_it_came_goes(engine: Engine, sources: dict[str, Path]) -> None:
    before = state(engine)
    for _ in range(2):
        engine.handle(order("new@2", sources["third"]))
    engine.handle(order("next@1", sources["fourth"]))
    engine.handle(FreeAligner("new@2"))
    freed, loaded = outcomes(engine, 2)
    assert freed == AlignerFreed("new@2")
    assert isinstance(loaded, AlignerLoaded)
    assert loaded.aligner == "next@1"
    let_go(engine, "next@1")
    assert state(engine) == before


def test_many_that_come_and_go_leave_nothing(engine: Engine, sources: dict[str, Path]) -> None:
    kinds = ["third"] * 8 + ["narrow"] * 3 + ["other", "odd"]
    for kind in ("other", "odd"):
        bring(engine, "new@2", sources[kind])
        let_go(engine, "new@2")
    before, pools = state(engine), len(engine.bank.pools)
    num_alive = count(PagedModel, KvPool, AlignerGroup)
    for turn in range(50):
        loaded = bring(engine, f"new@{turn}", sources[kinds[turn % len(kinds)]])
        assert isinstance(loaded, AlignerLoaded)
        if turn % 5 == 0:
            said(engine, f"new@{turn}", sampling=replace(SEEDED, max_tokens=2))
        let_go(engine, f"new@{turn}")
    assert state(engine) == before
    assert len(engine.bank.pools) == pools
    assert count(PagedModel, KvPool, AlignerGroup) == num_alive


def count(*kinds: type) -> int:
    gc.collect()
    return sum(type(each) in kinds for each in gc.get_objects())


def test_a_group_that_went_takes_its_recorded_steps_along(
    config: EngineConfig, sources: dict[str, Path]
) -> None:
    """Else they would read weights that are gone, once a group has its name."""
    engine = Engine.load(replace(config, aligners=config.aligners[:1], aligner_slots=0, cuda_graphs=True))
    num_recorded = len(engine._runner._graphs)
    engine.handle(FreeAligner("polite@1"))
    assert outcomes(engine) == [AlignerFreed("polite@1")]
    assert 0 < len(engine._runner._graphs) < num_recorded
    assert isinstance(bring(engine, "polite@1", sources["third"]), AlignerLoaded)
    eager = anew(engine, cuda_graphs=False)
    assert said(engine, "polite@1") == said(eager, "polite@1")


def test_scripts_load_and_free_as_well(config: EngineConfig, sources: dict[str, Path]) -> None:
    engine = LocalEngine.load(config)
    assert engine.load_aligner(order("new@2", sources["third"])).aligner == "new@2"
    [choice] = engine.generate([PROMPTS[3]], GREEDY, using("new@2"))
    assert list(choice.token_ids) == said(engine.engine, "new@2", sampling=GREEDY)
    engine.free_aligner("new@2")
    with pytest.raises(CheckpointError, match="/nowhere"):
        engine.load_aligner(order("new@2", Path("/nowhere")))
