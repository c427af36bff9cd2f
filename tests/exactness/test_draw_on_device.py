"""The kernel that draws a row against the step in tensors; without CUDA, in Triton's interpreter."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from ram_core.params import AlignerTerm, AlignmentParams, Resampling, SamplingParams
from ram_core.resampling import AlignerLogits, Draws, StepFeatures, StepParams, draw_on_device
from ram_core.resampling.draw_on_device import draw_with_kernel, has_kernel_for
from ram_core.resampling.step import draw_with_tensors
from ram_core.resampling.telemetry import Telemetry

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ONE = (AlignerTerm("a"),)
IDENTITY = AlignmentParams()
# The interpreter computes both sides of a choice, and NumPy tells of the one that nobody takes.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
Asked = tuple[SamplingParams, AlignmentParams]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_on_device, "_BLOCK", 256)


def both(
    proposal: Tensor,
    aligner: Tensor | None,
    rows: list[int],
    strengths: list[float],
    asked: list[Asked],
    size: int,
) -> tuple[Draws, Draws]:
    """The kernel's draws and the tensors'; `aligner` has logits for `rows`, the last perhaps padding."""
    params = StepParams.of(asked, seeds=[7 * i - 3 for i in range(len(asked))], positions=[5] * len(asked))
    params, features = params.to(DEVICE), StepFeatures.of(asked)
    terms = []
    if aligner is not None:
        index, strength = torch.tensor(rows, device=DEVICE), torch.tensor(strengths, device=DEVICE)
        terms.append(AlignerLogits(index, aligner.to(DEVICE), strength))
    assert has_kernel_for(terms, features, size)
    proposal = proposal.to(DEVICE)
    tensors = draw_with_tensors(
        proposal, terms, params, features, vocab_size=size, eos_ids=torch.tensor([1], device=DEVICE)
    )
    return draw_with_kernel(proposal, terms, params, vocab_size=size), tensors


def assert_equal(kernel: Draws, tensors: Draws, *, tolerance: float = 2e-5) -> None:
    assert kernel.is_bad.tolist() == tensors.is_bad.tolist()
    good = ~tensors.is_bad
    assert kernel.token[good].tolist() == tensors.token[good].tolist()
    close = {"rtol": 10 * tolerance, "atol": tolerance, "equal_nan": True}
    assert torch.allclose(kernel.log_prob[good], tensors.log_prob[good], **close)
    for field in fields(Telemetry):
        told, wanted = (getattr(draws.telemetry, field.name)[good] for draws in (kernel, tensors))
        assert torch.allclose(told.float(), wanted.float(), **close), field.name
    assert kernel.top_token.shape == tensors.top_token.shape


@pytest.mark.parametrize("scale", [0.3, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_all_kinds_are_drawn_as_in_tensors(scale: float, dtype: torch.dtype) -> None:
    """bfloat16 has equal logits by the dozen, some of them where the nucleus is cut."""
    noise = torch.Generator().manual_seed(1)
    size, num_rows = 700, 12
    proposal, aligner = (torch.randn(2, num_rows, size + 9, generator=noise) * scale).to(dtype)
    asked: list[Asked] = []
    for row in range(num_rows):
        sampling = SamplingParams(temperature=(1.0, 0.0, 0.7)[row % 3])
        top_p = (0.95, 0.5, 1.0, 0.01)[row % 4]
        threshold = 0.01 if row == 5 else math.inf
        alignment = AlignmentParams(ONE, proposal_top_p=top_p, kl_threshold=threshold)
        asked.append((sampling, IDENTITY if row in (3, 8) else alignment))
    rows = [row for row in range(num_rows) if row not in (3, 8)]
    strengths = [0.0 if row == 9 else 1 + row / 10 for row in rows]
    # Two rows of padding.
    kernel, tensors = both(
        proposal, aligner, [*rows, num_rows, num_rows], [*strengths, 0.0, 0.0], asked, size
    )
    assert_equal(kernel, tensors)
    assert kernel.telemetry.is_fallback.tolist() == [row == 5 for row in range(num_rows)]
    assert (kernel.telemetry.kl_pi_p > 0).sum() >= 6


def test_the_proposal_alone_is_drawn_as_in_tensors() -> None:
    proposal = torch.randn(6, 1000, generator=torch.Generator().manual_seed(2)) * 4
    asked = [(SamplingParams(temperature=row / 4), IDENTITY) for row in range(6)]
    assert_equal(*both(proposal, None, [], [], asked, 1000))


def test_an_aligner_without_mass_in_the_nucleus_leaves_the_choice_to_the_proposal() -> None:
    """But not one of strength 0, which has no say anyway."""
    proposal, aligner = torch.zeros(3, 300), torch.zeros(3, 300)
    proposal[:, 7] = 20.0
    aligner[::2, 7] = -math.inf
    asked = [(SamplingParams(), AlignmentParams(ONE, proposal_top_p=0.9))] * 3
    kernel, tensors = both(proposal, aligner, [0, 1, 2], [1.0, 1.0, 0.0], asked, 300)
    assert_equal(kernel, tensors)
    assert kernel.telemetry.is_fallback.tolist() == [True, False, False]
    assert kernel.token.tolist() == [7, 7, 7]


def test_a_cold_row_takes_the_first_of_equal_tokens() -> None:
    proposal = torch.zeros(1, 1000)
    proposal[0, 300:900] = 1.0
    kernel, tensors = both(proposal, None, [], [], [(SamplingParams(temperature=0), IDENTITY)], 1000)
    assert kernel.token.tolist() == tensors.token.tolist() == [300]


@pytest.mark.parametrize("spoilt", ["proposal", "aligner"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_row_is_told_and_harms_no_other(spoilt: str, value: float) -> None:
    logits = dict(zip(("proposal", "aligner"), torch.randn(2, 4, 400), strict=True))
    asked = [(SamplingParams(), AlignmentParams(ONE))] * 4
    good, _ = both(logits["proposal"], logits["aligner"], [0, 1, 2, 3], [1.0] * 4, asked, 400)
    logits[spoilt][1, 333] = value
    logits["proposal"][2] = -math.inf
    kernel, tensors = both(logits["proposal"], logits["aligner"], [0, 1, 2, 3], [1.0] * 4, asked, 400)
    assert kernel.is_bad.tolist() == tensors.is_bad.tolist() == [False, True, True, False]
    assert kernel.token[[0, 3]].tolist() == good.token[[0, 3]].tolist()


def test_equal_tokens_are_cut_by_their_number() -> None:
    """Of equal tokens a tenth is the nucleus: the first ones."""
    asked = [(SamplingParams(), AlignmentParams(ONE, proposal_top_p=0.1))] * 12
    zeros = torch.zeros(12, 600)
    kernel, tensors = both(zeros, zeros, list(range(12)), [1.0] * 12, asked, 600)
    assert_equal(kernel, tensors)
    assert 40 < max(kernel.token.tolist()) < 60


@pytest.mark.parametrize(
    ("sampling", "alignment"),
    [
        (SamplingParams(top_p=0.9), IDENTITY),
        (SamplingParams(top_k=3), IDENTITY),
        (SamplingParams(min_p=0.1), IDENTITY),
        (SamplingParams(num_top_log_probs=1), IDENTITY),
        (SamplingParams(), AlignmentParams(ONE, resampling=Resampling.NUCLEUS)),
        (SamplingParams(), AlignmentParams(ONE, resampling=Resampling.CANDIDATES)),
        (SamplingParams(), AlignmentParams((AlignerTerm("a", -1.0),))),
        (SamplingParams(), AlignmentParams(ONE, eos_priority=True)),
        (SamplingParams(), AlignmentParams(ONE, proposal_top_k=3)),
        (SamplingParams(), AlignmentParams(ONE, proposal_temperature=2.0)),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_do_is_left_to_the_tensors(
    sampling: SamplingParams, alignment: AlignmentParams
) -> None:
    assert not has_kernel_for([], StepFeatures.of([(sampling, alignment)]), 300)


def test_two_aligners_or_a_huge_vocabulary_are_left_to_the_tensors_too() -> None:
    term = AlignerLogits(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2), torch.ones(1))
    features = StepFeatures.of([(SamplingParams(), AlignmentParams(ONE))])
    assert has_kernel_for([term], features, 300)
    assert not has_kernel_for([term, term], features, 300)
    assert not has_kernel_for([term], features, 300_000)


def test_the_kernel_compiles_for_a_device_that_is_not_there() -> None:
    """In a process of its own: where there is no CUDA, this one's Triton only interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == ["compiled"] * 2, done.stderr


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ram_core.resampling.draw_kernel import draw_rows

KINDS = {
    "aligner_row mode seeds positions token_out": "*i64",
    "strengths temperatures top_ps kl_thresholds floats_out": "*fp32",
    "is_bad_out is_fallback_out": "*i1",
    "proposal_stride aligner_stride size num_rows": "i32",
    "purpose block": "constexpr",
}
kinds = {name: kind for names, kind in KINDS.items() for name in names.split()}
for logits in ("*bf16", "*fp32"):
    kinds |= {"proposal": logits, "aligner": logits}
    signature = {name: kinds[name] for name in draw_rows.arg_names}
    source = ASTSource(draw_rows, signature, {"purpose": 1, "block": 4096})
    options = {"num_warps": 16, "enable_fp_fusion": False}
    compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print("compiled")
"""
