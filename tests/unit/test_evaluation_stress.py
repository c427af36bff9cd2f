"""Stress: ladders that are read and made, rungs on the demo's pair, and the first that breaks."""

import json
import string

import pytest
from typer.testing import CliRunner

from ram_core.demo import bundle_path
from ram_core.demo.judging import held_out_records
from ram_core.evaluation.answering import Bench
from ram_core.evaluation.judges import load_judge
from ram_core.evaluation.ladders import (
    TARGETS,
    Rung,
    Target,
    likeness,
    load_targets,
    read_ladder,
    strength_rungs,
    write_ladder,
)
from ram_core.evaluation.stress import Criterion, RungResult, StressReport, climb
from ram_core.params import SamplingParams
from ram_core.training.errors import ConfigError, DataError, TrainingError
from ram_core.training.records import Record, read_records
from server.cli import app
from tests.models import save_pair

SAMPLING = SamplingParams(seed=1, max_tokens=32)
QUESTION = ({"role": "user", "content": "Why?"},)


# Ladders.


def test_a_ladder_is_read_and_its_paths_are_relative_to_it(tmp_path):
    (tmp_path / "near.jsonl").write_text("")
    (tmp_path / "polite").mkdir()
    path = tmp_path / "ladder.toml"
    path.write_text(
        '[[rung]]\nname = "near"\ndata = "near.jsonl"\naligner = "polite"\nstrength = 2.0\njudge = "a:b"\n'
        '[[rung]]\nname = "far"\ndata = "hf:some/data"\n'
    )
    near, far = read_ladder(path)
    assert near == Rung(
        name="near",
        data=str(tmp_path / "near.jsonl"),
        aligner=str(tmp_path / "polite"),
        strength=2.0,
        judge="a:b",
    )
    assert far == Rung(name="far", data="hf:some/data")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no [[rung]]"),
        ("[[rung]", "ladder.toml"),
        ('[[rung]]\nname = "a"', "data"),
        ('[[rung]]\nname = "a"\ndata = "d"\nstrong = 1', "strong"),
        ('[[rung]]\nname = "a"\ndata = "d"\n[[rung]]\nname = "a"\ndata = "e"', "one name"),
    ],
)
def test_what_is_no_ladder_is_refused(tmp_path, text, complaint):
    path = tmp_path / "ladder.toml"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_ladder(path)
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_ladder(path)
    assert complaint in str(refused.value)


def test_a_ladder_is_made_of_any_data_and_is_read_again(tmp_path):
    records = [Record(QUESTION, "Yes, it is."), Record(QUESTION)]
    rungs = read_ladder(write_ladder(records, tmp_path / "made"))
    assert [rung.name for rung in rungs] == list(TARGETS)
    wanted = {rung.name: [record.wanted for record in read_records(rung.data)] for rung in rungs}
    assert wanted == {
        "as-it-is": ["Yes, it is."],
        "lower-case": ["yes, it is."],
        "upper-case": ["YES, IT IS."],
        "words-turned": [",seY ti .si"],
        "letters-shifted": ["Lrf, vg vf."],
        "another-alphabet": ["Ξεσ, ιτ ισ."],
    }
    targets, aligners = load_targets(rungs)
    assert aligners == {}
    assert all(target.judge is not None for target in targets)
    with pytest.raises(DataError, match="no record has a wanted answer"):
        write_ladder(records[1:], tmp_path / "none")


def test_another_alphabet_has_none_of_the_first():
    turned = TARGETS["another-alphabet"](string.ascii_letters)
    assert not set(turned) & set(string.ascii_letters)


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [("a b c", "a b c", 1.0), ("a a b", "a b b", 2 / 3), ("x", "a b", 0.0), ("", "a", 0.0), ("a", "", None)],
)
def test_likeness_is_the_f1_of_common_words(answer, wanted, score):
    assert likeness(QUESTION, answer, wanted) == (score if score is None else pytest.approx(score))


def test_each_source_is_read_once_and_aligners_share_names(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Why?", "completion": "So."}\n')
    rungs = strength_rungs("here/polite", str(data), [1.0, 2.0])
    targets, aligners = load_targets([*rungs, Rung(name="far", data=str(data))], judge="")
    assert aligners == {"aligner-1": "here/polite"}
    assert [target.aligner for target in targets] == ["aligner-1", "aligner-1", ""]
    assert targets[0].records is targets[2].records
    assert [target.rung.name for target in targets] == ["strength 1", "strength 2", "far"]


# The criterion.


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"aligner_mass": 0.49, "ess": 0.9, "supported": 1.0}, "aligner mass"),
        ({"aligner_mass": 0.9, "ess": 0.09, "supported": 1.0}, "ESS"),
        ({"aligner_mass": 0.9, "ess": 0.9, "supported": 0.89}, "wanted tokens"),
        ({"aligner_mass": 0.5, "ess": 0.1, "supported": 0.9}, ""),
        ({}, ""),
    ],
)
def test_support_has_broken_where_a_figure_is_below_its_bar(found, words):
    failures = Criterion().failures(RungResult("rung", 1.0, 1, **found))
    assert [words in failure for failure in failures] == [True] * bool(words)


def test_the_first_rung_that_breaks_is_named():
    rungs = [
        RungResult(name, None, 1, failures=why) for name, why in (("a", ()), ("b", ("x",)), ("c", ("y",)))
    ]
    assert StressReport(Criterion(), tuple(rungs)).first_broken.name == "b"
    assert StressReport(Criterion(), tuple(rungs[:1])).first_broken is None


# On models.


@pytest.fixture(scope="module")
def report():
    """A target that the demo's proposal offers, one that it never saw, and one without wanted answers."""
    near = tuple(held_out_records("polite", max_records=10))
    far = tuple(Record(each.messages, TARGETS["another-alphabet"](each.wanted)) for each in near)
    polite = load_judge("ram_core.demo.judging:polite")
    targets = [
        Target(Rung(name="near", data=""), near, "aligner-1", polite),
        Target(Rung(name="hard", data="", strength=8.0), near, "aligner-1"),
        Target(Rung(name="far", data=""), far, judge=load_judge("ram_core.evaluation.ladders:likeness")),
        Target(Rung(name="open", data=""), tuple(Record(each.messages) for each in near), "aligner-1"),
    ]
    aligners = {"aligner-1": str(bundle_path() / "aligners" / "polite")}
    bench = Bench(str(bundle_path() / "proposal"), aligners, near, device="cpu")
    with pytest.raises(DataError, match="no wanted answer"):
        climb(bench, [Target(Rung(name="void", data=""), targets[-1].records)])
    return climb(bench, targets, sampling=SAMPLING)


def test_what_the_proposal_offers_is_supported_and_another_alphabet_is_not(report):
    near, _, far, _ = report.rungs
    assert near.supported > 0.95
    assert near.aligner_mass > 0.8
    assert near.quality > 0.9 > 0.6 > near.quality_alone
    assert near.perplexity < near.perplexity_alone
    assert far.supported < 0.3
    assert far.perplexity_alone > 100
    assert (far.aligner_mass, far.perplexity, far.quality, far.strength) == (None, None, None, None)
    assert far.quality_alone is not None
    assert report.first_broken is far


def test_a_harder_pull_has_a_smaller_ess_and_a_larger_shift(report):
    near, hard, *_ = report.rungs
    assert (near.strength, hard.strength) == (1.0, 8.0)
    assert hard.ess < near.ess
    assert hard.kl_pi_p > near.kl_pi_p
    assert hard.supported == near.supported
    assert hard.quality is None


def test_without_wanted_answers_support_is_not_known(report):
    assert report.rungs[-1].supported is None
    assert report.rungs[-1].aligner_mass is not None
    assert not report.rungs[-1].has_broken


def test_a_ladder_is_drawn(report, tmp_path):
    pytest.importorskip("matplotlib")
    from ram_core.evaluation.stress_plot import plot_ladder

    plot_ladder(report, tmp_path / "ladder.svg")
    assert "<svg" in (tmp_path / "ladder.svg").read_text()
    with pytest.raises(TrainingError, match="ends with"):
        plot_ladder(report, tmp_path / "ladder.gif")


# The command.


def run(*words):
    return CliRunner().invoke(app, ["stress", *map(str, words)])


def test_the_command_makes_a_ladder_and_climbs_one(tmp_path):
    proposal, aligners = save_pair(tmp_path / "pair")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": text, "completion": "the dog"}) + "\n" for text in "abc"))
    made = run("--write-ladder", tmp_path / "ladder", "--data", data)
    assert (made.exit_code, "ladder.toml" in made.output) == (0, True)
    common = ["--proposal", proposal, "--device", "cpu", "--max-tokens", "4"]
    offered = run("--ladder", tmp_path / "ladder" / "ladder.toml", *common, "--json")
    assert offered.exit_code == 0, offered.output
    assert [rung["name"] for rung in json.loads(offered.stdout)["rungs"]] == list(TARGETS)
    words = [f"polite={aligners['polite']}", "--data", data, *common]
    pulled = run(*words, "--strengths", "0.5,4", "--min-mass", "1.1")
    assert pulled.exit_code == 0, pulled.output
    assert "Support breaks at strength 0.5: aligner mass in the nucleus" in pulled.output
    both = run(
        f"terse={aligners['terse']}", *words, "--min-mass", "0", "--min-supported", "0", "--min-ess", "0"
    )
    assert both.exit_code == 0, both.output
    assert "Support holds on every rung" in both.output


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "or a --ladder"),
        (["polite=here"], "--data"),
        (["polite"], "--data"),
        (["polite", "--data", "d"], "polite"),
        (["polite=here", "--data", "d"], "--proposal"),
        (["a=b", "c=d", "--data", "d", "--strengths", "1"], "of one aligner"),
        (["polite=here", "--ladder", "l.toml"], "names its aligners"),
        (["--ladder", "l.toml"], "cannot be read"),
        (["--write-ladder", "w"], "--data"),
        (["a=b", "--data", "d", "--proposal", "p", "--plot", "x.gif"], "ends with"),
        (["a=b", "--data", "d", "--proposal", "p", "--strengths", "much"], "numbers"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(words, complaint):
    refused = run(*words)
    assert (refused.exit_code, complaint in refused.output) == (1, True), refused.output
