"""On CPU, the memory of an aligner that went is the next one's; what that one says does not show it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.messages import AlignerFailed, AlignerLoaded
from ram_core.models import stacked, stored
from ram_core.models.packed_linear import PackedLinear
from ram_core.models.stacked import StackedModel
from ram_core.models.stored import StoredWeights
from tests.exactness.test_hot_loading import SMALL, bring, let_go, said
from tests.models import save_model, save_pair

WIDE = SMALL | {"hidden": 24}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A proposal, its aligner, two more of that architecture, two of a wider one and one of a third."""
    root = tmp_path_factory.mktemp("models")
    proposal, aligners = save_pair(root, vocab_size=320)
    found = {"proposal": proposal, "begun": aligners["polite"]}
    for name, seed, kind in (("a", 21, SMALL), ("b", 22, SMALL), ("wide a", 23, WIDE), ("wide b", 24, WIDE)):
        found[name] = save_model(root / name, "llama", seed=seed, **kind)
    found["other"] = save_model(root / "other", "qwen3", seed=25, **SMALL)
    found["broken"] = save_model(root / "broken", "llama", seed=26, std=float("nan"), **WIDE)
    return found


@pytest.fixture
def engine(sources: dict[str, Path]) -> Engine:
    return Engine.load(config_of(sources))


def config_of(sources: dict[str, Path], *names: str, dtype: str = "float32") -> EngineConfig:
    begun = (AlignerSource("begun@1", str(sources["begun"])),)
    asked = tuple(AlignerSource(name, str(sources[name])) for name in names)
    proposal, models = str(sources["proposal"]), begun + asked
    return EngineConfig(proposal, models, device="cpu", dtype=dtype, max_batch=4, aligner_slots=2)


def from_the_start(sources: dict[str, Path], name: str) -> list[int]:
    return said(Engine.load(config_of(sources, name)), name)


def places(engine: Engine, name: str) -> set[int]:
    """Where a model's packed weights and embeddings lie."""
    model = engine.bank.group_of[name].model.model
    slot = engine.bank.group_of[name].lane(name)[1]
    layers = [layer._layers[slot] for layer in model.modules() if isinstance(layer, stacked.SlotLinear)]
    packed: list[Tensor] = [layer._panels for layer in layers if isinstance(layer, PackedLinear)]
    assert packed
    return {each.data_ptr() for each in [*packed, *(each[slot] for each in model.parameters())]}


def bring_all(engine: Engine, sources: dict[str, Path], *names: str) -> None:
    for name in names:
        assert isinstance(bring(engine, name, sources[name]), AlignerLoaded)


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("wide a", "wide b")], ids=["slot", "group"])
def test_the_next_of_a_kind_lies_where_the_last_one_lay(
    engine: Engine, sources: dict[str, Path], first: str, second: str
) -> None:
    bring_all(engine, sources, first)
    before, text = places(engine, first), said(engine, first)
    let_go(engine, first)
    bring_all(engine, sources, second)
    assert places(engine, second) == before
    assert said(engine, second) == from_the_start(sources, second) != text
    let_go(engine, second)
    bring_all(engine, sources, first)
    assert said(engine, first) == text


def kept(engine: Engine, sources: dict[str, Path], *names: str) -> weakref.ref[StackedModel]:
    """The stack of aligners that come, all of one group, and then go."""
    bring_all(engine, sources, *names)
    [stack] = {engine.bank.group_of[name].served for name in names}
    assert isinstance(stack, StackedModel)
    found = weakref.ref(stack)
    del stack
    for name in names:
        let_go(engine, name)
    gc.collect()
    return found


def test_no_more_is_kept_than_one_of_the_last_kind(engine: Engine, sources: dict[str, Path]) -> None:
    stack = kept(engine, sources, "wide a")
    assert stack() is not None
    bring_all(engine, sources, "a")
    assert stack() is not None, "who takes a slot that is there needs no memory"
    let_go(engine, "a")
    bring_all(engine, sources, "other")
    gc.collect()
    assert stack() is None


def test_what_has_the_same_shapes_but_another_config_is_another_kind(
    engine: Engine, sources: dict[str, Path], tmp_path: Path
) -> None:
    turned = save_model(tmp_path / "turned", "llama", seed=23, rms_norm_eps=0.5, **WIDE)
    wanted = from_the_start(sources | {"turned": turned}, "turned")
    bring_all(engine, sources, "wide a")
    assert said(engine, "wide a") != wanted
    let_go(engine, "wide a")
    bring_all(engine, sources | {"turned": turned}, "turned")
    assert said(engine, "turned") == wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_are_tied_to_the_embeddings_of_their_own_slot(
    sources: dict[str, Path], tmp_path: Path, dtype: str
) -> None:
    tied = {
        name: save_model(tmp_path / name, "llama", seed=seed, tie_word_embeddings=True, **WIDE)
        for name, seed in (("first", 27), ("second", 28))
    }
    everything = sources | tied
    engine = Engine.load(config_of(everything, dtype=dtype))
    bring_all(engine, everything, *tied)
    for name in tied:
        alone = Engine.load(config_of(everything, name, dtype=dtype))
        assert said(engine, name) == said(alone, name)
    assert said(engine, "first") != said(engine, "second")


def test_what_held_several_at_once_is_not_kept(engine: Engine, sources: dict[str, Path]) -> None:
    assert kept(engine, sources, "wide a", "wide b")() is None


def test_what_is_large_is_not_kept(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "_KEPT_BYTES", 1000)
    engine = Engine.load(config_of(sources))
    assert kept(engine, sources, "wide a")() is None
    bring_all(engine, sources, "a")
    group = engine.bank.group_of["a"]
    layers = [layer for layer in group.model.model.modules() if isinstance(layer, stacked.SlotLinear)]
    let_go(engine, "a")
    assert not any(layer._empty for layer in layers)


def test_one_that_fails_leaves_the_next_as_it_would_be(engine: Engine, sources: dict[str, Path]) -> None:
    kept(engine, sources, "wide a")
    assert isinstance(bring(engine, "broken", sources["broken"]), AlignerFailed)
    bring_all(engine, sources, "wide b")
    assert said(engine, "wide b") == from_the_start(sources, "wide b")


def test_a_spare_takes_no_more_memory_than_is_allowed(engine: Engine, sources: dict[str, Path]) -> None:
    kept(engine, sources, "wide a")
    assert isinstance(bring(engine, "wide b", sources["wide b"], max_bytes=1000), AlignerFailed)


@pytest.mark.parametrize("piece_bytes", [1, 1000, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_are_lent_in_whole_multiples(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch, piece_bytes: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(stored, "_PIECE_BYTES", max(piece_bytes, 8))
    with StoredWeights(sources["a"]) as files:
        weight = files.tensors["model.embed_tokens.weight"]
        parts = [part.clone() for part in weight.rows(dtype, 48)]
        whole = weight.read(torch.float32)
        assert torch.equal(torch.cat(parts), whole.to(dtype))
    sizes = [len(part) for part in parts]
    assert all(size % 48 == 0 for size in sizes[:-1])
    assert sizes[-1] <= sizes[0]
    assert len(sizes) == (1 if piece_bytes > 1000 else 7)
