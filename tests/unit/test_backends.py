"""Which attention a name means, and what is said where it cannot be had."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.load_bank import load_bank
from ram_core.errors import CheckpointError
from ram_core.models import backends
from ram_core.models.attention import AttentionOptions, PagedAttention
from ram_core.models.backends import can_be_recorded, choose_backend, least_page_size, resolve_attention
from ram_core.models.flashinfer_attention import FlashInferAttention, RowPages
from ram_core.models.kv import KvGeometry, KvPool, LayerShape
from ram_core.models.packing import Row, pack
from tests.models import save_pair

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    packages = {"triton", "flash_attn", "flashinfer"}
    monkeypatch.setattr(backends, "_is_installed", lambda package: package in packages)
    return packages


def test_auto_is_tritons_kernels_on_cuda_where_triton_is(installed: set[str]) -> None:
    assert resolve_attention("auto", CPU, 16) == "torch"
    assert resolve_attention("auto", CUDA, 16) == "triton"
    installed.remove("triton")
    assert resolve_attention("auto", CUDA, 16) == "torch"


@pytest.mark.parametrize(
    ("name", "device", "page_size", "reason"),
    [
        ("flash", CUDA, 16, "`attention` must be auto, triton, torch, flash_attn, flashinfer, got 'flash'"),
        ("triton", CPU, 16, "`attention` is 'triton', which needs CUDA, but `device` is `cpu`"),
        ("flash_attn", CUDA, 16, "a `page_size` that is a multiple of 256, got 16"),
    ],
)
def test_what_cannot_be_had_is_refused(
    installed: set[str], name: str, device: torch.device, page_size: int, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        resolve_attention(name, device, page_size)


@pytest.mark.parametrize("name", ["triton", "flash_attn", "flashinfer"])
def test_a_package_that_is_not_there_is_named(installed: set[str], name: str) -> None:
    assert resolve_attention(name, CUDA, 512) == name
    installed.remove(name)
    with pytest.raises(CheckpointError, match=f"'{name}', but that package is not installed"):
        resolve_attention(name, CUDA, 512)


def test_the_reference_serves_where_nothing_is_said() -> None:
    pool = KvPool(KvGeometry((LayerShape(1, 8, 8),), torch.float32), 2, 16, CPU)
    batch = pack([Row([1], 0, [1])], page_size=16, device=CPU)
    assert isinstance(choose_backend(batch, pool), PagedAttention)
    assert isinstance(choose_backend(batch, pool, "torch"), PagedAttention)
    assert [least_page_size(kind) for kind in ("torch", "triton", "flash_attn")] == [1, 1, 256]


def test_flashinfer_is_told_where_each_rows_pages_are() -> None:
    rows = [Row([1], 16, [5, 3, 9]), Row([1], 0, [7]), Row([1, 2, 3], 29, [2, 4])]
    told = RowPages.of(pack(rows, page_size=16, device=CPU))
    assert told.query_starts.tolist() == [0, 1, 2, 5]
    assert told.page_starts.tolist() == [0, 2, 3, 5]
    assert told.pages.tolist() == [5, 3, 7, 2, 4]
    assert told.last_lens.tolist() == [1, 1, 16]
    assert {each.dtype for each in told} == {torch.int32}


@pytest.mark.parametrize(
    ("query", "options", "reason"),
    [
        (
            torch.ones(1, 1, 64).half(),
            AttentionOptions(sinks=torch.ones(1)),
            "'flashinfer' knows no attention",
        ),
        (torch.ones(1, 1, 64), AttentionOptions(), "'flashinfer' computes in 16 bits, not in torch.float32"),
        (torch.ones(1, 1, 48).half(), AttentionOptions(), "heads of one size, 64, 128, 256, got 48 and 48"),
    ],
)
def test_what_flashinfer_does_not_know_is_refused(
    query: torch.Tensor, options: AttentionOptions, reason: str
) -> None:
    pool = KvPool(KvGeometry((LayerShape(1, 64, 64),), torch.float16), 2, 16, CPU)
    backend = FlashInferAttention(pack([Row([1], 0, [1])], page_size=16, device=CPU), pool)
    with pytest.raises(CheckpointError, match=reason):
        backend.attend(0, query, query, query, options)


def test_what_waits_for_the_device_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proposal, _ = save_pair(tmp_path, "llama", aligners=[])
    config = EngineConfig(str(proposal), device="cpu", cuda_graphs=True)
    assert Engine.load(config)._has_graphs
    monkeypatch.setattr("ram_core.engine.engine.can_be_recorded", lambda kind: kind != "torch")
    assert not Engine.load(config)._has_graphs
    assert [can_be_recorded(kind) for kind in ("triton", "flash_attn", "flashinfer")] == [True, True, False]


def test_an_engine_gives_its_models_the_attention_that_it_was_asked_for(tmp_path: Path) -> None:
    proposal, aligners = save_pair(tmp_path, "llama", aligners=["polite"])
    sources = tuple(AlignerSource(name, str(path)) for name, path in aligners.items())
    config = EngineConfig(str(proposal), sources, device="cpu", attention="torch")
    bank = load_bank(config, lambda _: None)
    assert bank.proposal.attention == bank.group_of["polite"].model.attention == "torch"
    with pytest.raises(CheckpointError, match="`attention` is 'triton', which needs CUDA"):
        load_bank(replace(config, attention="triton"), lambda _: None)
