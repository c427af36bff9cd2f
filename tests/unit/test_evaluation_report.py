"""An evaluation as a whole, on random models: rows, notes, failing judges, sweeps, curves and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from ram_core.aligners.manifest import Manifest
from ram_core.engine.messages import StepTelemetry
from ram_core.errors import InvalidRequest
from ram_core.evaluation.answering import Answers, Bench, Setting
from ram_core.evaluation.frontier import Point, quality_name, strength_curves, threshold_curves, undominated
from ram_core.evaluation.judges import PythonJudge
from ram_core.evaluation.plots import write_plots
from ram_core.evaluation.preferences import Interval
from ram_core.evaluation.report import EvaluationReport, evaluate, summarise_steps
from ram_core.evaluation.sweep import Sweep, settings_of
from ram_core.params import Resampling, SamplingParams
from ram_core.progress import Progress
from ram_core.training.errors import DataError, TrainingError
from ram_core.training.records import Message, Record
from tests.models import save_pair

SAMPLING = SamplingParams(seed=3, max_tokens=8)
WANTED = ("Thank you.", "", "The dog does not mind.")
RECORDS = [
    Record(({"role": "user", "content": text},), wanted)
    for text, wanted in zip(("the dog", "the fox", "please"), WANTED, strict=True)
]
SWEEP = Sweep(strengths=(0.0, 1.0, 2.0), kl_thresholds=(2.0, math.inf))


def num_letters(messages: Sequence[Message], answer: str, wanted: str) -> float:
    return sum(letter.isalpha() for letter in answer)


LETTERS = PythonJudge("letters", score=num_letters)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    proposal, aligners = save_pair(tmp_path_factory.mktemp("pair"), std=0.2)
    return Bench(str(proposal), {name: str(path) for name, path in aligners.items()}, RECORDS, device="cpu")


@pytest.fixture(scope="module")
def report(bench: Bench) -> EvaluationReport:
    return evaluate(bench, settings_of({"polite": bench.manifests["polite"]}, SWEEP, SAMPLING), LETTERS)


def test_the_proposal_comes_first_and_every_row_is_measured(report: EvaluationReport) -> None:
    first, *rest = report.rows
    assert (first.label, first.aligner, first.steps) == ("proposal", "", None)
    assert [row.label for row in rest][:2] == ["polite × 0 gate 2", "polite × 0"]
    assert len(rest) == 6
    for row in rest:
        assert row.steps is not None
        assert row.held_out is not None
        assert row.steps.num_at[0] == report.num_prompts == 3
        assert row.mean_tokens * 3 == row.num_tokens
        assert row.tokens_per_s > 0
        assert row.text.num_texts == 3


def test_strength_zero_ties_with_the_proposal_and_fits_as_it_does(report: EvaluationReport) -> None:
    proposal, nothing = report.rows[0], next(row for row in report.rows if row.label == "polite × 0")
    assert nothing.judged is not None
    assert nothing.judged.preferences == (0.5, 0.5, 0.5)
    assert nothing.judged.scores == (proposal.judged and proposal.judged.scores)
    assert nothing.held_out is not None
    assert proposal.held_out is not None
    assert nothing.held_out.perplexity == pytest.approx(proposal.held_out.perplexity, rel=1e-5)
    strong = next(row for row in report.rows if row.label == "polite × 2")
    assert strong.judged is not None
    assert strong.judged.preferences != nothing.judged.preferences


def test_a_gate_falls_back_more_than_none_does(report: EvaluationReport) -> None:
    by_label = {row.label: row.steps for row in report.rows}
    gated, free = by_label["polite × 1 gate 2"], by_label["polite × 1"]
    assert gated is not None
    assert free is not None
    assert free.fallback_rate < gated.fallback_rate


def test_missing_wanted_answers_are_told_once(report: EvaluationReport, bench: Bench) -> None:
    assert [note for note in report.notes if "wanted answer" in note] == [
        "1 of 3 records have no wanted answer: no perplexity there"
    ]
    assert report.rows[0].held_out is not None
    assert report.rows[0].held_out.num_tokens > 10


def test_wanted_answers_that_do_not_fit_are_left_out_and_told(bench: Bench) -> None:
    long = Record(RECORDS[0].messages, "the dog " * 200)
    report = evaluate(bench.with_records([RECORDS[0], long]), [Setting("again", sampling=SAMPLING)])
    assert report.notes == ("1 wanted answers do not fit into the context: left out",)
    none = evaluate(bench.with_records([RECORDS[1]]), [Setting("again", sampling=SAMPLING)])
    assert [row.held_out for row in none.rows] == [None, None]


def test_the_report_is_json_without_what_json_does_not_know(report: EvaluationReport) -> None:
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert plain["judge"] == "letters"
    last = plain["rows"][-1]
    assert (last["label"], last["aligner"], last["strength"]) == ("polite × 2", "polite", 2.0)
    assert last["setting"]["alignment"]["kl_threshold"] is None
    assert len(last["judged"]["preferences"]) == 3


def test_answers_are_told_before_the_judge_is_asked_and_survive_it(bench: Bench) -> None:
    heard: list[str] = []

    def score(messages: Sequence[Message], answer: str, wanted: str) -> float:
        assert heard == ["proposal", "polite × 1", "terse × 1"]
        heard.append("judge")
        raise RuntimeError("no more")

    def hear(answers: Answers) -> None:
        heard.append(answers.setting.label)

    settings = settings_of(bench.manifests, Sweep(), SAMPLING)
    report = evaluate(bench, settings, PythonJudge("tired", score=score), on_answers=hear)
    assert heard[-1] == "judge"
    assert report.failure == "the judge `tired` failed on record 1: RuntimeError: no more"
    assert [row.judged for row in report.rows] == [None] * 3
    assert all(row.num_tokens for row in report.rows)


def test_what_was_judged_before_a_failure_stays(bench: Bench) -> None:
    num_calls = 0

    def score(messages: Sequence[Message], answer: str, wanted: str) -> float:
        nonlocal num_calls
        num_calls += 1
        return 1 / (7 - num_calls)

    report = evaluate(bench, settings_of(bench.manifests, Sweep(), SAMPLING), PythonJudge("", score=score))
    assert "ZeroDivisionError" in report.failure
    assert [row.judged is not None for row in report.rows] == [True, True, False]


def test_what_the_judge_leaves_open_is_not_counted_and_told(bench: Bench) -> None:
    def compare(messages: Sequence[Message], a: str, b: str) -> float | None:
        return None if messages[-1]["content"] == "the fox" else 1.0

    settings = settings_of({"polite": bench.manifests["polite"]}, Sweep(), SAMPLING)
    report = evaluate(bench, settings, PythonJudge("first", compare=compare))
    judged = report.rows[1].judged
    assert judged is not None
    assert judged.preferences == (0.5, None, 0.5)
    assert judged.win_rate is not None
    assert judged.win_rate.value == 0.5
    assert report.rows[0].judged is not None
    assert report.rows[0].judged.win_rate is None
    assert any("1 of 3 pairs have no verdict" in note for note in report.notes)
    assert any("100% of decided verdicts went to the answer shown first" in note for note in report.notes)


def test_progress_names_the_setting_that_is_judged(bench: Bench) -> None:
    stages: list[str] = []

    def note(progress: Progress) -> None:
        if progress.stage not in stages:
            stages.append(progress.stage)

    evaluate(bench, settings_of(bench.manifests, Sweep(), SAMPLING)[:1], LETTERS, on_progress=note)
    assert stages == [
        "reading wanted answers",
        "answering, proposal",
        "answering, polite × 1",
        "scoring, proposal",
        "scoring, polite × 1",
    ]


def test_candidates_have_no_perplexity_and_that_is_said(bench: Bench) -> None:
    sweep = Sweep(resampling=(Resampling.CANDIDATES,), candidates=(2,))
    report = evaluate(bench, settings_of(bench.manifests, sweep, SAMPLING))
    assert report.rows[1].held_out is not None
    assert report.rows[1].held_out.perplexity is None
    assert sum("closed form" in note for note in report.notes) == 1
    assert report.judge == ""
    with pytest.raises(DataError, match="no setting"):
        evaluate(bench, [])


def test_steps_are_averaged_over_tokens_and_along_answers() -> None:
    def step(kl: float, is_fallback: bool = False) -> StepTelemetry:
        return StepTelemetry(kl, 2 * kl, 0.5, 0.25, is_fallback)

    steps = summarise_steps([[step(1.0), step(2.0, True)], [step(3.0)], []])
    assert steps is not None
    assert (steps.kl_p_q, steps.kl_pi_p, steps.fallback_rate) == (2.0, 4.0, pytest.approx(1 / 3))
    assert (steps.kl_p_q_at, steps.kl_pi_p_at, steps.num_at) == ((2.0, 2.0), (4.0, 4.0), (2, 1))
    assert summarise_steps([[], []]) is None


def test_a_sweep_has_each_combination_once_and_takes_the_manifest_where_nothing_is_said() -> None:
    manifest = Manifest(name="polite", version="1", strength=1.5, kl_threshold=0.4)
    [alone] = settings_of({"polite": manifest}, Sweep(), SAMPLING)
    assert (alone.label, alone.alignment.kl_threshold) == ("polite × 1.5 gate 0.4", 0.4)
    modes = Sweep((1.0, 2.0), (Resampling.PRODUCT, Resampling.CANDIDATES, Resampling.NUCLEUS), (5, 10))
    plain = Manifest(name="polite", version="1")
    labels = [setting.label for setting in settings_of({"polite": plain}, modes, SAMPLING)]
    assert labels == [
        *("polite × 1", "polite × 2"),
        *("polite × 1 candidates 5", "polite × 1 candidates 10"),
        *("polite × 2 candidates 5", "polite × 2 candidates 10"),
        *("polite × 1 nucleus", "polite × 2 nucleus"),
    ]
    with pytest.raises(InvalidRequest, match="strength"):
        settings_of({"polite": manifest}, Sweep(strengths=(1000.0,)), SAMPLING)


def test_curves_follow_strength_from_the_proposal_on_and_thresholds_to_no_gate(
    report: EvaluationReport,
) -> None:
    assert quality_name(report) == "mean score"
    curves = {curve.name: curve.points for curve in strength_curves(report)}
    assert set(curves) == {"polite", "polite gate 2"}
    assert [point.label for point in curves["polite"]] == [
        "proposal",
        "polite × 0",
        "polite × 1",
        "polite × 2",
    ]
    assert curves["polite"][0].kl_pi_p == 0
    gates = {curve.name: [point.kl_threshold for point in curve.points] for curve in threshold_curves(report)}
    assert gates == {f"polite × {strength}": [2.0, math.inf] for strength in (0, 1, 2)}


def test_the_frontier_has_no_point_that_another_one_beats() -> None:
    def point(label: str, kl_pi_p: float, quality: float) -> Point:
        return Point(label, 1.0, math.inf, kl_pi_p, Interval(quality, quality, quality), 0.0)

    points = [point("dear", 0.9, 0.8), point("best", 0.5, 0.8), point("cheap", 0.1, 0.4)]
    points += [point("worse", 0.1, 0.3), point("worst", 0.7, 0.2), point("proposal", 0.0, 0.1)]
    assert [each.label for each in undominated(points)] == ["proposal", "cheap", "best"]


def test_without_scores_quality_is_the_win_rate_and_the_proposal_wins_half(bench: Bench) -> None:
    judge = PythonJudge("longer", compare=lambda messages, a, b: float(len(a) >= len(b)))
    settings = settings_of({"polite": bench.manifests["polite"]}, Sweep(), SAMPLING)
    report = evaluate(bench, settings, judge)
    assert quality_name(report) == "win rate"
    [curve] = strength_curves(report)
    assert curve.points[0].quality.value == 0.5


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pictures_are_written(report: EvaluationReport, tmp_path: Path, suffix: str) -> None:
    written = write_plots(report, tmp_path / "plots", suffix)
    assert [path.name for path in written] == [
        f"{name}.{suffix}" for name in ("frontier", "kl_by_position", "thresholds")
    ]
    magic = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    assert all(path.read_bytes().startswith(magic) and path.stat().st_size > 5000 for path in written)


def test_pictures_need_something_to_show_and_a_known_form(bench: Bench, tmp_path: Path) -> None:
    report = evaluate(bench, [Setting("proposal again", sampling=SAMPLING)])
    assert write_plots(report, tmp_path) == []
    with pytest.raises(TrainingError, match="png or svg, got `gif`"):
        write_plots(report, tmp_path, "gif")
