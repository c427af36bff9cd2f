"""Coverage of synthetic data: shares by hand, and what is thin is said in words."""

import itertools
import json

import msgspec
import pytest
from typer.testing import CliRunner

from ram_core.evaluation.coverage import measure_coverage
from ram_core.training.records import Record
from ram_core.training.synthesis import Answer
from server.cli import app


def prompt(text):
    return ({"role": "user", "content": text},)


def answers_of(*texts, reason="stop", prompts=None):
    return [
        Answer(index, prompt(prompts[index] if prompts else f"ask {index}"), text, (1, 2, 3), reason)
        for index, text in enumerate(texts)
    ]


def records_of(*texts, prompts=None):
    return [
        Record(prompt(prompts[index] if prompts else f"ask {index}"), text)
        for index, text in enumerate(texts)
    ]


def varied(count, start="the"):
    return [f"{start} answer {word * 3} is {word}" for word in map(str, range(count))]


def test_shares_that_are_held_by_hand():
    """Wanted: a a b, a c, d d. Held: a (3 of 7 words, 1 of 4 kinds) and c; only a is in two of them."""
    report = measure_coverage(answers_of("a x", "c a", "z"), records_of("a a b", "a c", "d d"))
    words, pairs, *longer = report.comparison.held
    assert (words.different, words.occurrences, words.among_wanted) == pytest.approx((2 / 4, 4 / 7, 3 / 7))
    assert (pairs.different, pairs.occurrences, pairs.among_wanted) == (0, 0, 0)
    assert [each.order for each in longer] == [3, 4]
    assert (
        measure_coverage(answers_of("a b", "c"), records_of("b", "a b")).comparison.held[1].occurrences == 1
    )


def test_only_wanted_answers_whose_prompt_was_answered_are_compared():
    records = [*records_of("a", "b"), Record(prompt("never asked"), "z z z"), Record(prompt("no answer"))]
    report = measure_coverage(answers_of("a", "b"), records)
    assert report.comparison.prompts_answered == pytest.approx(2 / 3)
    assert report.comparison.wanted.num_texts == 2
    assert report.comparison.held[0].occurrences == 1
    assert any("33.3% of the prompts have no synthetic answer" in warning for warning in report.warnings)


def test_data_that_covers_gives_no_warning():
    texts = varied(100)
    report = measure_coverage(answers_of(*texts), records_of(*texts))
    assert report.warnings == ()
    assert report.synthetic == report.comparison.wanted


def test_without_wanted_answers_only_the_answers_themselves_are_measured():
    report = measure_coverage(answers_of("a b", "a b"), [Record(prompt("ask 0"))])
    assert report.comparison is None
    assert report.synthetic.duplicates == 0.5
    assert report.warnings == ()
    with pytest.raises(ValueError, match="no synthetic answers"):
        measure_coverage([])


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (answers_of(*varied(100), reason="length"), "cut off at the limit"),
        (answers_of(*varied(90), *[""] * 10), "10.0% of the synthetic answers are empty"),
        (answers_of(*["the answer 0 is 0"] * 100), "repeat another one"),
        (answers_of(*["the answer 0 is 0"] * 100), "few different pairs of words"),
        (answers_of(*(f"the very long answer to say is only {n % 7}" for n in range(100))), "more alike"),
        (answers_of(*(f"{text} {'so on ' * 20}" for text in varied(100))), "words in the median"),
        (answers_of(*varied(100, start="no")), "stand in no synthetic answer"),
    ],
)
def test_what_is_thin_is_said_in_words(answers, words):
    wanted = [f"the answer {word * 3} is {word} and that it stays" for word in map(str, range(100))]
    if "median" in words:
        wanted = varied(100)
    report = measure_coverage(answers, records_of(*wanted))
    assert any(words in warning for warning in report.warnings)


def test_prompts_of_a_length_that_is_covered_badly_are_named():
    """Long prompts get answers of other words than are wanted there; short ones do not."""
    prompts = [f"ask {'on ' * (index // 10)}{index}" for index in range(100)]
    texts = varied(100)
    strange = [text if index < 75 else "quite other words here" for index, text in enumerate(texts)]
    report = measure_coverage(answers_of(*strange, prompts=prompts), records_of(*texts, prompts=prompts))
    buckets = report.comparison.buckets
    assert [bucket.num_wanted for bucket in buckets] == [bucket.num_synthetic for bucket in buckets]
    assert sum(bucket.num_wanted for bucket in buckets) == 100
    assert all(low.max_words + 1 == high.min_words for low, high in itertools.pairwise(buckets))
    assert buckets[0].held_words == 1
    assert buckets[-1].held_words < 0.5
    last = buckets[-1]
    name = f"prompts of {last.min_words} to {last.max_words} words are thin"
    assert any(warning.startswith(name) for warning in report.warnings)


def test_the_command_reads_a_synthesis_and_prints_or_tells_in_json(tmp_path):
    synthesis, data = tmp_path / "synthesis.jsonl", tmp_path / "train.jsonl"
    texts = varied(30)
    answers = answers_of(*texts[:20]) + answers_of(*texts[20:], reason="length")
    lines = [msgspec.to_builtins(answer) | {"index": at, "prompt": prompt(f"ask {at}")}
             for at, answer in enumerate(answers)]  # fmt: skip
    synthesis.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data.write_text("".join(json.dumps({"prompt": f"ask {at}", "completion": text}) + "\n"
                            for at, text in enumerate(texts)))  # fmt: skip
    runner = CliRunner()
    printed = runner.invoke(app, ["coverage", str(synthesis), "--data", str(data)])
    assert printed.exit_code == 0
    assert "33.3% of the synthetic answers were cut off" in " ".join(printed.output.split())
    told = runner.invoke(app, ["coverage", str(synthesis), "--data", str(data), "--json"])
    report = json.loads(told.stdout)
    assert (report["cut_off"], report["comparison"]["held"][0]["occurrences"]) == (pytest.approx(1 / 3), 1.0)
    missing = runner.invoke(app, ["coverage", str(tmp_path / "none.jsonl")])
    assert (missing.exit_code, "has no answers" in missing.output) == (1, True)
