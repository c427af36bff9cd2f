"""The compiled step: its own arithmetic, and against the step in tensor operations."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numba import njit

from ram_core.params import AlignerTerm, AlignmentParams, Resampling, SamplingParams
from ram_core.resampling import AlignerLogits, Draws, StepFeatures, StepParams, draw_tokens, kernel, warm_up
from ram_core.resampling.compiled import entry
from ram_core.resampling.fused import covered_rows
from ram_core.resampling.noise import Purpose, uniform_noise
from ram_core.resampling.rows import draw_rows
from ram_core.resampling.step import draw_with_tensors
from ram_core.resampling.threads import in_parallel
from tests.exactness import laws
from tests.exactness.laws import Row

TELEMETRY = ("kl_p_q", "kl_pi_p", "ess", "aligner_mass")


# Arithmetic


@njit
def exps(x: np.ndarray) -> np.ndarray:
    e = np.empty_like(x)
    for i in range(len(x)):
        e[i] = kernel.exp(x[i])
    return e


@njit
def units(e: np.ndarray) -> np.ndarray:
    whole = np.empty(len(e), np.int64)
    for i in range(len(e)):
        whole[i] = kernel.units(e[i])
    return whole


@njit
def noises(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    seen = np.empty(len(seeds))
    for i in range(len(seeds)):
        seen[i] = kernel.token_noise(seeds[i], positions[i])
    return seen


def test_exp_is_within_its_bound_of_float64():
    """Over every 500th float32 from -87.3 to 0, and around every point where the reduction rounds."""
    bits = np.arange(0, np.float32(87.3).view(np.int32), 500, dtype=np.int32)
    ties = (np.arange(126)[:, None] + 0.5) * math.log(2) + np.linspace(-1e-5, 1e-5, 101)
    x = -np.concatenate([bits.view(np.float32), ties.ravel()[ties.ravel() < 87.3].astype(np.float32)])
    expected = np.exp(x.astype(np.float64))
    assert np.abs(exps(x) / expected - 1).max() < 2**-23


def test_exp_is_exact_at_its_ends():
    x = np.array([0, -0.0, -87.31, -88, -104, -1e30, -np.inf], dtype=np.float32)
    assert exps(x).tolist() == [1, 1, 0, 0, 0, 0, 0]


def test_units_are_masses_rounded_to_whole_ones():
    rng = np.random.default_rng(0)
    e = np.exp(-rng.exponential(9, 10_000)).astype(np.float32)
    e[:3] = 0, 1, 2.0**-44
    assert np.array_equal(units(e), np.rint(e.astype(np.float64) * 2.0**44).astype(np.int64))


def test_noise_equals_that_of_the_tensors_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (2, 2000), generator=generator)
    seeds[:4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    positions[:2000:2] %= 4096
    expected = uniform_noise(seeds, positions, Purpose.TOKEN)[:, 0]
    assert np.array_equal(noises(seeds.numpy(), positions.numpy()), expected.numpy())


# Against the tensors


def compare(rows: list[Row]) -> int:
    """Both ways on the same rows; how many of them no rounding could tell apart, and were compared whole."""
    together, num_compared = {}, 0
    for name, draw in laws.WAYS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(laws, "draw_tokens", draw)
            together[name] = laws.draw(rows)
    one, other = together["compiled"], together["tensors"]
    assert torch.equal(one.is_bad, other.is_bad)
    law, other_law = laws.laws(one), laws.laws(other)
    for i, row in enumerate(rows):
        if laws.step(row).margin < 2e-5:
            continue
        num_compared += 1
        assert one.token[i] == other.token[i], row
        assert np.nanmax(np.abs(law[i] - other_law[i]), initial=0) < 1e-5, row
        assert one.telemetry.is_fallback[i] == other.telemetry.is_fallback[i]
        for name in TELEMETRY:
            ours, theirs = (getattr(draws.telemetry, name)[i].item() for draws in (one, other))
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), (name, row)
    return num_compared


LOGIT = st.one_of(st.sampled_from([0.0, 1.0, -math.inf]), st.floats(-30, 30, width=32))


@st.composite
def any_row(draw: Callable[..., object]) -> Row:
    """Whatever a row that is compiled may hold; ties, zeros and one-token vocabularies included."""
    size = draw(st.integers(1, 12))
    logits, other = ([*draw(st.lists(LOGIT, min_size=size - 1, max_size=size - 1)), 0.25] for _ in range(2))
    is_aligned = draw(st.booleans())
    sampling = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.4, 1.0, 1.0, 1.7])),
        top_k=draw(st.integers(0, 5)),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.9, 0.4])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1])),
    )
    alignment = AlignmentParams(
        resampling=draw(st.sampled_from([Resampling.PRODUCT, Resampling.NUCLEUS, Resampling.PROPOSAL])),
        proposal_temperature=draw(st.sampled_from([1.0, 1.0, 0.5, 2.0])),
        proposal_top_p=draw(st.sampled_from([1.0, 0.95, 0.5])),
        proposal_top_k=draw(st.integers(0, 4)),
        kl_threshold=draw(st.sampled_from([math.inf, 0.7])),
        eos_priority=draw(st.booleans()),
    )
    strength = draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    terms = ((np.array(other), strength),) if is_aligned else ()
    return Row(np.array(logits), terms, sampling, alignment, seed=draw(st.integers(0, 2**40)))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(any_row())
def test_any_row_draws_what_the_tensors_draw(row):
    compare([row])


@pytest.mark.parametrize("scale", [0.02, 1.0, 4.0, 12.0])
def test_rows_of_a_real_vocabulary_draw_what_the_tensors_draw(scale):
    """Flat to peaked, several blocks with a last one that is not full."""
    rng = np.random.default_rng(5)
    rows = []
    for seed in range(24):
        logits, other = (rng.normal(size=(2, 5003)) * scale).astype(np.float32)
        alignment = AlignmentParams(resampling=[Resampling.PRODUCT, Resampling.NUCLEUS][seed % 2])
        sampling = SamplingParams(top_k=[0, 40][seed // 2 % 2], top_p=[1.0, 0.9][seed // 4 % 2])
        terms = ((other, 0.7),) if seed % 3 else ()
        rows.append(Row(logits.astype(np.float64), terms, sampling, alignment, seed=seed))
    with_tensors = _whole(draw_with_tensors, rows)
    compiled = _whole(draw_tokens, rows)
    assert (compiled.token == with_tensors.token).sum() >= 22
    for name in TELEMETRY:
        ours, theirs = (getattr(draws.telemetry, name) for draws in (compiled, with_tensors))
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def _whole(draw: Callable[..., Draws], rows: list[Row]) -> Draws:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laws, "draw_tokens", draw)
        return laws.draw(rows)


# A row is its own


def batch(num_rows: int, vocab_size: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(2)
    logits, other = torch.randn(2, num_rows, vocab_size, generator=generator) * 3
    asked = [(SamplingParams(num_top_log_probs=20), AlignmentParams((AlignerTerm("a"),)))] * num_rows
    return {
        "proposal_logits": logits,
        "aligner_logits": [AlignerLogits(torch.arange(num_rows), other, torch.ones(num_rows))],
        "params": StepParams.of(asked, seeds=range(num_rows), positions=[0] * num_rows),
        "features": StepFeatures.of(asked),
        "vocab_size": vocab_size,
        "eos_ids": torch.tensor([1]),
    }


def bits(draws: Draws) -> list[torch.Tensor]:
    own = [getattr(draws, field.name) for field in fields(draws) if field.name != "telemetry"]
    return own + [getattr(draws.telemetry, field.name) for field in fields(draws.telemetry)]


def test_the_number_of_threads_changes_no_bit():
    asked, seen = batch(7, 12_000), []
    before = torch.get_num_threads()
    for num_threads in (1, 2, 3, 16):
        torch.set_num_threads(num_threads)
        seen.append(bits(draw_tokens(**asked)))
    torch.set_num_threads(before)
    for others in seen[1:]:
        assert all(torch.equal(one, other) for one, other in zip(seen[0], others, strict=True))


def test_steps_of_several_callers_at_once_do_not_mix():
    asked = [batch(3, 1000 * size) for size in (1, 2, 3)]
    alone = [bits(draw_tokens(**one)) for one in asked]
    wrong = []

    def draw_often(which: int) -> None:
        for _ in range(30):
            drawn = bits(draw_tokens(**asked[which]))
            if not all(map(torch.equal, drawn, alone[which])):
                wrong.append(which)

    callers = [threading.Thread(target=draw_often, args=(which,)) for which in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_rows_of_different_aligners_draw_what_they_draw_with_one():
    asked = batch(6, 500)
    whole = asked["aligner_logits"][0]
    parts = [
        AlignerLogits(torch.tensor(rows), whole.logits[rows], whole.strength[rows])
        for rows in ([0, 2, 5], [1, 3, 4])
    ]
    one, other = (bits(draw_tokens(**(asked | {"aligner_logits": terms}))) for terms in ([whole], parts))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("draw", laws.WAYS.values(), ids=laws.WAYS)
@pytest.mark.parametrize("num_aligners", [1, 2])
def test_padding_rows_of_a_static_batch_are_ignored(draw, num_aligners):
    """Whatever they hold; also when an aligner then has as many rows as the batch."""
    asked = batch(8, 500)
    whole = asked["aligner_logits"][0]
    of_rows = [[0, 1, 4, 7], [3, 5]][:num_aligners]
    bare = [AlignerLogits(torch.tensor(r), whole.logits[r], whole.strength[r]) for r in of_rows]
    padded = []
    for term in bare:
        num = 8 - len(term.rows)
        padding = torch.tensor([[math.nan], [math.inf], [-math.inf], [1e30]]).repeat(2, 500)[:num]
        padded.append(
            AlignerLogits(
                torch.cat([term.rows, torch.full((num,), 8)]),
                torch.cat([term.logits, padding]),
                torch.cat([term.strength, torch.zeros(num)]),
            )
        )
    identity = torch.tensor([all(row not in used for used in of_rows) for row in range(8)])
    asked["params"] = replace(asked["params"], mode=asked["params"].mode.masked_fill(identity, 0))
    one, other = (bits(draw(**(asked | {"aligner_logits": terms}))) for terms in (bare, padded))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_each_row_goes_the_way_that_its_own_request_asks_for():
    def row(*strengths: float, mode: Resampling = Resampling.PRODUCT, **more: object) -> Row:
        terms = tuple((np.arange(4.0), strength) for strength in strengths)
        return Row(np.arange(4.0), terms, alignment=AlignmentParams(resampling=mode), **more)

    bias, allowed = np.array([0, 0, 1.0, 0]), np.array([True, True, False, True])
    covered = [row(), row(1.0), row(0.5, mode=Resampling.NUCLEUS), row(-1.0, mode=Resampling.PROPOSAL)]
    others = [
        row(1.0, mode=Resampling.CANDIDATES),
        row(1.0, 1.0),
        row(1.0, 1.0, mode=Resampling.PROPOSAL),
        row(-1.0),
        row(1.0, bias=bias),
        row(bias=bias * np.nan),
        row(1.0, allowed=allowed),
    ]
    seen = []

    def spy(_: object, terms: object, params: object, features: object, **more: object) -> Draws:
        seen.append(covered_rows(terms, params, features, more["allowed"], more["bias"]).tolist())
        return draw_tokens(_, terms, params, features, **more)

    _whole(spy, covered + others)
    assert seen.pop() == [True] * len(covered) + [False] * len(others)
    for one in covered + others:
        _whole(spy, [one])
    assert [alone for (alone,) in seen] == [True] * len(covered) + [False] * len(others)


@pytest.mark.parametrize("size", [20, 21, 150, 1500])
def test_the_best_alternatives_are_those_of_a_stable_sort(size):
    """Rounded logits, so that many are equal: lower ids come first."""
    asked = batch(6, size)
    logits = (asked["proposal_logits"] * 2).round()
    logits[0, :] = 1.0
    asked |= {"proposal_logits": logits, "aligner_logits": []}
    draws = draw_tokens(**asked)
    best = logits.sort(dim=-1, descending=True, stable=True).indices[:, :20]
    assert torch.equal(draws.top_token, best)
    expected = logits.log_softmax(-1).gather(-1, best)
    torch.testing.assert_close(draws.top_log_prob, expected, rtol=1e-6, atol=1e-5)


def test_a_nucleus_may_end_among_equals_in_any_block():
    """A flat proposal: half of its mass are the lower half of the ids."""
    asked = batch(1, 3000)
    asked["params"] = replace(asked["params"], proposal_top_p=torch.tensor([0.5]))
    asked["features"] = replace(asked["features"], max_top_log_probs=3000)
    draws = draw_tokens(**(asked | {"proposal_logits": torch.zeros(1, 3000)}))
    kept = draws.top_token[draws.top_log_prob.isfinite()]
    assert kept.sort().values.tolist() == list(range(1500))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_of_either_sign_is_bad(sign):
    asked = batch(3, 700)
    asked["proposal_logits"][1, 600] = math.copysign(math.nan, sign)
    assert draw_tokens(**asked).is_bad.tolist() == [False, True, False]


# Compiling


def test_nothing_is_compiled_after_the_warm_up():
    warm_up()
    before = list(draw_rows.signatures)
    assert len(before) == 1
    asked = batch(2, 40)
    draw_tokens(**asked)
    draw_tokens(**(asked | {"aligner_logits": [], "features": StepFeatures()}))
    strided = torch.randn(2, 80).bfloat16()[:, ::2]
    params = replace(asked["params"], seed=torch.tensor([5]).expand(2))
    draw_tokens(**(asked | {"proposal_logits": strided, "params": params}))
    assert draw_rows.signatures == before


def test_code_that_cannot_be_kept_on_disk_still_compiles():
    """Source that is no file has no place in numba's cache, as a package that cannot be written to."""
    space: dict[str, object] = {}
    exec("def twice(x):\n    return 2 * x", space)
    assert entry(space["twice"])(21) == 42


@njit(nogil=True)
def count_visits(visits: np.ndarray, counts: np.ndarray, first: int, count: int) -> None:
    counts[first] = count
    for i in range(first, len(visits), count):
        visits[i] += 1


@njit(nogil=True)
def visit(visits: np.ndarray, counts: np.ndarray, num_threads: int) -> None:
    in_parallel(count_visits, (visits, counts), num_threads)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_work_in_parallel_is_all_done_and_done_once(num_threads: int):
    visits, counts = np.zeros(101), np.zeros(num_threads)
    visit(visits, counts, num_threads)
    assert (visits == 1).all()
    assert (counts == num_threads).all()


def test_without_torchs_openmp_one_thread_does_all():
    """In a process of its own: symbols are looked up once."""
    code = """
import ctypes
from pathlib import Path
import pytest
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Path, "glob", lambda *_: iter(()))
    from ram_core.resampling import threads
assert threads._torch_openmp() is not None
import numpy as np
from tests.exactness.test_resampling_compiled import visit
visits, counts = np.zeros(101), np.zeros(3)
visit(visits, counts, 3)
assert (visits == 1).all() and counts.tolist() == [1, 0, 0]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
