"""Calibration: the rule by hand, the sweep on the demo's pair, and what is written into a manifest."""

import json
import math
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ram_core.aligners.manifest import read_manifest
from ram_core.aligners.pack import Wishes, pack
from ram_core.demo import bundle_path
from ram_core.demo.judging import held_out_records
from ram_core.engine.messages import StepTelemetry
from ram_core.errors import InvalidRequest
from ram_core.evaluation.answering import ALONE, Bench
from ram_core.evaluation.calibration import calibrate, default_thresholds
from ram_core.evaluation.judges import JudgeError, PythonJudge, load_judge
from ram_core.evaluation.recommendation import NO_GATE, Point, Quality, recommend
from ram_core.params import Resampling, SamplingParams
from ram_core.training.errors import DataError
from server.cli import app
from tests.models import save_pair

SAMPLING = SamplingParams(seed=3, max_tokens=32)
JUDGE = "ram_core.demo.judging:polite"


def point(label, values, kl=0.0, **fields):
    quality = None if values is None else Quality(tuple(values))
    return Point(label, quality, 0.0, 1.0, kl, 1.0, 100.0, **fields)


def gate(threshold, values, kl):
    return point(f"gate {threshold:g}", values, kl, kl_threshold=threshold)


PROPOSAL = point(ALONE, [0, 0, 1, 0])
FREE = point(NO_GATE, [1, 1, 1, 1], 0.5)


def test_a_gate_that_costs_nothing_is_recommended_and_of_several_the_one_with_the_least_kl():
    gates = [FREE, gate(0.1, [1, 0, 0, 0], 0.1), gate(1.0, [1, 1, 1, 1], 0.2), gate(2.0, [1, 1, 1, 1], 0.4)]
    found = recommend(PROPOSAL, gates, [])
    assert found.kl_threshold == 1.0
    assert "Gate at 1 nats" in found.reasons[0]


def test_no_gate_is_recommended_if_all_cost_quality_or_none_acts():
    costly = recommend(PROPOSAL, [FREE, gate(0.1, [1, 0, 0, 0], 0.1), gate(1.0, [0, 0, 1, 1], 0.3)], [])
    idle = recommend(PROPOSAL, [FREE, gate(9.0, [1, 1, 1, 1], 0.5)], [])
    assert costly.kl_threshold == idle.kl_threshold == math.inf
    assert costly.reasons[0].startswith("No gate")


def test_a_loss_within_one_standard_error_of_the_paired_difference_is_none():
    """One of 100 lost: 0.01 is as large as its own error. Three lost: 0.03 against 0.017."""
    best = [1.0] * 100
    one, three = [0.0] + [1.0] * 99, [0.0] * 3 + [1.0] * 97
    assert Quality(tuple(best)).is_matched_by(Quality(tuple(one)))
    assert not Quality(tuple(best)).is_matched_by(Quality(tuple(three)))
    # The spread between prompts is no error: only that of the differences is.
    spread = [float(n) for n in range(100)]
    assert not Quality(tuple(spread)).is_matched_by(Quality(tuple(n - 0.1 for n in spread)))
    assert Quality((1.0, None)).is_matched_by(Quality((1.0, 0.0)))
    assert not Quality((1.0, None)).is_matched_by(Quality((None, 1.0)))


def test_the_error_is_that_of_the_mean():
    quality = Quality((0.0, 1.0, None, 1.0, 0.0))
    assert (quality.mean, quality.error) == (0.5, pytest.approx(math.sqrt(1 / 3) / 2))


def test_the_fewest_candidates_that_are_as_good_as_the_best_are_recommended():
    counts = [
        point("2 candidates", [0, 0, 1, 0], num_candidates=2),
        point("8 candidates", [1, 1, 1, 1], num_candidates=8),
        point("50 candidates", [1, 1, 1, 1], num_candidates=50),
    ]
    found = recommend(PROPOSAL, [FREE], counts)
    assert found.num_candidates == 8
    assert "no worse than the aligner's own mode" in found.reasons[-1]
    few = recommend(PROPOSAL, [FREE], counts[:1])
    assert (few.num_candidates, "worse (0.250) than" in few.reasons[-1]) == (2, True)
    unjudged = recommend(PROPOSAL, [FREE], [point("2 candidates", None, num_candidates=2)])
    assert (unjudged.num_candidates, "give a judge" in unjudged.reasons[-1]) == (None, True)


def test_an_aligner_that_helps_nobody_is_told():
    assert "no better than the proposal" in " ".join(recommend(FREE, [PROPOSAL], []).reasons)


def test_thresholds_are_the_papers_and_quantiles_of_what_was_seen():
    steps = [StepTelemetry(float(kl), 0, 1, 1, False) for kl in range(101)]
    never = StepTelemetry(math.inf, 0, 1, 1, False)
    assert default_thresholds([*steps, never]) == [0.05, 0.1, 0.2, 50, 75, 90, 95, 99]
    assert default_thresholds([]) == [0.05, 0.1, 0.2]


# On models.


@pytest.fixture(scope="module")
def bench():
    records = held_out_records("polite", max_records=24)
    polite = str(bundle_path() / "aligners" / "polite")
    return Bench(str(bundle_path() / "proposal"), {"polite": polite}, records, device="cpu")


def test_the_demos_aligner_needs_no_gate_and_many_candidates(bench):
    found = calibrate(
        bench, "polite", judge=load_judge(JUDGE), thresholds=[1.0, 0.1], candidates=[64, 1], sampling=SAMPLING
    )
    assert [point.label for point in found.gates] == [NO_GATE, "gate 0.1", "gate 1"]
    free, tight, _ = found.gates
    assert free.fallback_rate == 0 < tight.fallback_rate < 1
    assert tight.kl_pi_p < free.kl_pi_p
    assert found.proposal.quality.mean < 0.6 < 0.9 < free.quality.mean
    assert tight.quality.mean < 0.6
    one, many = found.candidates
    assert (one.num_candidates, many.num_candidates) == (1, 64)
    assert one.quality.mean < 0.6 < 0.9 < many.quality.mean
    assert (found.recommendation.kl_threshold, found.recommendation.num_candidates) == (math.inf, 64)
    assert all(each.tokens_per_s > 0 for each in (found.proposal, *found.gates, *found.candidates))


def test_without_a_judge_the_wanted_answers_say_the_same(bench):
    """A gate that always falls back is the proposal; one that never does is no gate."""
    found = calibrate(bench, "polite", thresholds=[0.0, 1e6], candidates=[4], sampling=SAMPLING)
    free, closed, idle = found.gates
    assert closed.fallback_rate == 1
    assert closed.quality.values == pytest.approx(found.proposal.quality.values, abs=1e-4)
    assert idle.quality.values == free.quality.values
    assert free.quality.mean > closed.quality.mean
    assert found.candidates[0].quality is None
    assert (found.recommendation.kl_threshold, found.recommendation.num_candidates) == (math.inf, None)


def test_a_judge_that_only_compares_is_asked_against_the_proposals_own_answers(bench):
    small = bench.with_records(bench.records[:6])
    judge = PythonJudge(
        "longer", compare=lambda messages, a, b: (1 + (len(a) > len(b)) - (len(a) < len(b))) / 2
    )
    found = calibrate(small, "polite", judge=judge, thresholds=[0.0], candidates=[], sampling=SAMPLING)
    assert set(found.proposal.quality.values) == {0.5}
    assert found.recommendation.num_candidates is None


def test_what_cannot_be_calibrated_is_refused(bench):
    small = bench.with_records(bench.records[:2])
    with pytest.raises(InvalidRequest, match="thresholds"):
        calibrate(small, "polite", thresholds=[-1.0])
    silent = PythonJudge("silent", score=lambda messages, answer, wanted: None)
    with pytest.raises(JudgeError, match="no verdict"):
        calibrate(small, "polite", judge=silent, sampling=SAMPLING)
    unanswered = bench.with_records([type(each)(each.messages) for each in bench.records[:2]])
    with pytest.raises(DataError, match="wanted answer"):
        calibrate(unanswered, "polite")


# The command.


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    proposal, aligners = save_pair(tmp_path_factory.mktemp("pair"))
    return proposal, aligners["polite"]


@pytest.fixture
def aligner(pair, tmp_path):
    return shutil.copytree(pair[1], tmp_path / "polite")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "held-out.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "completion": "the dog"}) + "\n" for text in "abcd"))
    return path


def run(pair, aligner, data, *words):
    flags = ["--proposal", str(pair[0]), "--data", str(data), "--max-tokens", "4", "--device", "cpu"]
    return CliRunner().invoke(app, ["calibrate", str(aligner), *flags, *words])


def test_what_is_recommended_is_written_and_the_rest_of_the_manifest_stays(pair, aligner, data):
    before = pack(aligner, Wishes(version="7", strength=0.5, kl_threshold=0.25, provenance={"by": "me"}))
    judge = "ram_core.evaluation.ladders:likeness"
    words = ["--thresholds", "0.1,1e6", "--candidates", "2,8", "--judge", judge]
    told = run(pair, aligner, data, *words, "--json")
    assert told.exit_code == 0, told.output
    assert read_manifest(aligner) == before
    found = json.loads(told.stdout)
    assert [each["label"] for each in found["points"]] == [
        ALONE, NO_GATE, "gate 0.1", "gate 1e+06", "2 candidates", "8 candidates"
    ]  # fmt: skip
    assert (found["points"][1]["kl_threshold"], found["is_written"]) == (None, False)
    printed = run(pair, aligner, data, *words, "--write")
    assert printed.exit_code == 0, printed.output
    after = read_manifest(aligner)
    assert after.kl_threshold == found["recommended"]["kl_threshold"]
    assert after.candidates == found["recommended"]["candidates"]
    assert (after.version, after.strength, after.files) == ("7", 0.5, before.files)
    assert after.provenance["by"] == "me"
    for word in ("held-out.jsonl", "4 prompts", judge, *found["recommended"]["reasons"]):
        assert word in after.provenance["calibration"]
    assert "Wrote" in printed.output


def test_an_aligner_that_is_not_sound_is_not_calibrated_nor_written(pair, aligner, data):
    pack(aligner, Wishes(version="7"))
    before = (aligner / "aligner.json").read_bytes()
    weights = aligner / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    refused = run(pair, aligner, data, "--write")
    assert refused.exit_code == 1
    assert "not what the manifest's SHA-256 says" in refused.output
    assert (aligner / "aligner.json").read_bytes() == before


def test_files_that_change_meanwhile_are_not_blessed(pair, aligner, data, monkeypatch):
    from ram_core.evaluation import calibration

    pack(aligner, Wishes(version="7"))
    before = (aligner / "aligner.json").read_bytes()
    real = calibration.write_recommendation

    def write_late(directory, *words, **names):
        (directory / "late.md").write_text("new")
        return real(directory, *words, **names)

    monkeypatch.setattr(calibration, "write_recommendation", write_late)
    refused = run(pair, aligner, data, "--candidates", "", "--thresholds", "1", "--write")
    assert (refused.exit_code, "late.md appeared" in refused.output) == (1, True)
    assert (aligner / "aligner.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--thresholds", "low"], "`--thresholds` must be numbers"),
        (["--candidates", "1.5"], "`--candidates` must be numbers"),
        (["--candidates", "0"], "`candidates` must be in"),
        (["--judge", "nowhere:judge"], "nowhere"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_line(pair, aligner, data, words, complaint):
    refused = run(pair, aligner, data, *words)
    assert refused.exit_code == 1
    assert complaint in refused.output


def test_an_aligner_whose_own_mode_is_candidates_needs_a_judge(pair, aligner, data):
    pack(aligner, Wishes(resampling=Resampling.CANDIDATES, candidates=3))
    refused = run(pair, aligner, data)
    assert (refused.exit_code, "give a judge" in refused.output) == (1, True)
