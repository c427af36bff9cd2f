"""What is sent and when: laws of lengths and arrivals, prompts, and that a seed says it all."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ram_core.errors import RamError
from server.bench.lengths import parse_lengths
from server.bench.load import Load, RequestSource, arrival_times, parse_models
from server.bench.prompts import Vocabulary, count_words, load_vocabulary, read_talks, write_words
from tests.models import make_tokenizer

MODELS = (("big", 1.0),)


def load(**fields) -> Load:
    return Load(**{"models": MODELS, "concurrency": 2, "num_requests": 4, **fields})


def bodies(settings: Load, count: int = 20, phase="measured") -> list[dict]:
    source = RequestSource(settings)
    return [json.loads(source.request(index, phase).body) for index in range(count)]


def texts(settings: Load, count: int = 20, phase="measured") -> list[str]:
    return [body["messages"][0]["content"] for body in bodies(settings, count, phase)]


def draw_many(text: str, count: int = 20_000) -> np.ndarray:
    lengths, noise = parse_lengths(text), np.random.default_rng(0)
    return np.array([lengths.draw(noise) for _ in range(count)])


def test_fixed_and_uniform_lengths():
    assert set(draw_many("7", 50)) == {7}
    drawn = draw_many("uniform:3:6")
    assert set(drawn) == {3, 4, 5, 6}
    assert np.bincount(drawn)[3:] == pytest.approx([5000] * 4, abs=4 * math.sqrt(20_000 * 3 / 16))


@pytest.mark.parametrize("law", ["normal", "lognormal"])
def test_mean_and_deviation_are_those_of_the_length(law):
    drawn = draw_many(f"{law}:200:30")
    assert drawn.mean() == pytest.approx(200, abs=4 * 30 / math.sqrt(len(drawn)))
    assert drawn.std() == pytest.approx(30, rel=0.04)


def test_lengths_stay_within_one_and_the_maximum():
    drawn = draw_many("normal:4:20:9")
    assert drawn.min() == 1
    assert drawn.max() == 9


@pytest.mark.parametrize(
    "text",
    [
        *["", "0", "-3", "2.5", "many", "uniform:5", "uniform:6:5", "uniform:0:5", "normal:5", "normal:0:2"],
        *["normal:5:1:0", "normal:5:1:9:9", "lognormal:nan:2", "lognormal:5:inf", "zipf:3:4", "fixed:0", ":"],
    ],
)
def test_bad_lengths_are_refused_with_the_grammar(text):
    with pytest.raises(RamError, match="uniform:LOW:HIGH"):
        parse_lengths(text)


def test_poisson_gaps_are_exponential():
    """Mean within 4 standard errors; Kolmogorov-Smirnov distance below its 1 % point."""
    rate, count = 5.0, 20_000
    times = np.array(arrival_times(load(rate_per_s=rate, num_requests=count)))
    gaps = np.sort(np.diff(times))
    assert times[0] == 0
    assert gaps.mean() == pytest.approx(1 / rate, abs=4 / rate / math.sqrt(count))
    law = 1 - np.exp(-rate * gaps)
    steps = np.arange(len(gaps) + 1) / len(gaps)
    distance = max(np.abs(law - steps[1:]).max(), np.abs(law - steps[:-1]).max())
    assert distance < 1.63 / math.sqrt(len(gaps))
    assert abs(np.corrcoef(np.diff(times)[:-1], np.diff(times)[1:])[0, 1]) < 4 / math.sqrt(count)


def test_constant_arrivals_and_the_ends_of_a_run():
    assert arrival_times(load(rate_per_s=4, arrivals="constant")) == [0, 0.25, 0.5, 0.75]
    assert len(arrival_times(load(rate_per_s=4, arrivals="constant", num_requests=None, duration_s=2))) == 8
    both = arrival_times(load(rate_per_s=4, arrivals="constant", num_requests=99, duration_s=1))
    assert both == [0, 0.25, 0.5, 0.75]


def test_a_seed_makes_the_load_and_another_seed_another():
    settings = load(prompt_tokens="uniform:5:50", output_tokens="normal:20:5", models=(("a", 1), ("b", 1)))
    assert bodies(settings) == bodies(settings)
    other = load(
        prompt_tokens="uniform:5:50", output_tokens="normal:20:5", models=(("a", 1), ("b", 1)), seed=1
    )
    assert texts(settings) != texts(other)
    assert arrival_times(load(rate_per_s=9)) == arrival_times(load(rate_per_s=9))
    assert arrival_times(load(rate_per_s=9)) != arrival_times(load(rate_per_s=9, seed=1))


def test_a_request_depends_on_its_number_alone():
    """Not on how many come before: a longer run begins with the shorter one."""
    source = RequestSource(load())
    assert source.request(7).body == RequestSource(load(num_requests=999)).request(7).body


def test_prompts_are_unique_and_the_warm_up_has_its_own():
    measured, warm = texts(load(), 200), texts(load(), 200, "warmup")
    assert len({*measured, *warm}) == 400
    assert len({text.split()[0] for text in measured}) > 50


def test_the_shared_prefix_is_shared_and_adds_to_the_length():
    prompts = texts(load(shared_prefix_tokens=12, prompt_tokens="uniform:5:9"))
    assert len({tuple(text.split()[:12]) for text in prompts}) == 1
    assert len({tuple(text.split()[12:]) for text in prompts}) == len(prompts)
    assert {len(text.split()) for text in prompts} <= set(range(17, 22))


def test_prompts_have_the_tokenizers_length_exactly(tmp_path):
    """A vocabulary of 300 splits nearly every word: the hard case."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    settings = load(tokenizer=tmp_path, shared_prefix_tokens=20, prompt_tokens="uniform:1:90")
    lengths = {len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts(settings, 40)}
    assert lengths <= set(range(21, 111))
    asked = load(tokenizer=tmp_path, prompt_tokens="33")
    assert {load_vocabulary(tmp_path).count(text) for text in texts(asked, 40)} == {33}


def test_a_vocabulary_of_words_of_its_own_is_written_in_its_words(tmp_path):
    """To it all of ours are unknown: prompts that differ in text would be one and the same in tokens."""
    words = {"<unk>": 0, **{f"tok{index}": index for index in range(1, 200)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in texts(load(tokenizer=tmp_path, prompt_tokens="12"))]
    assert len({tuple(ids) for ids in prompts}) == len(prompts)
    assert all(len(ids) == 12 and 0 not in ids for ids in prompts)


def test_a_length_that_cannot_be_met_is_missed_by_as_little_as_possible():
    """Every word counts two: an odd number of tokens is out of reach."""
    vocabulary = Vocabulary(lambda text: 2 * count_words(text), ["one", "two"])
    text = write_words(np.random.default_rng(0), 9, vocabulary)
    assert count_words(text) in {4, 5}


def test_models_are_mixed_by_weight():
    names = [body["model"] for body in bodies(load(models=(("polite", 3), ("pirate", 1))), 4000)]
    assert names.count("polite") == pytest.approx(3000, abs=4 * math.sqrt(4000 * 3 / 16))


def test_the_body_is_what_openai_clients_send_and_the_extra_body_wins():
    body = bodies(load(output_tokens="9"))[0]
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert (body["max_tokens"], body["ignore_eos"]) == (9, True)
    extra = {"temperature": 0, "max_tokens": None, "max_completion_tokens": 5}
    body = bodies(load(ignores_eos=False, extra_body=extra))[0]
    assert body.keys() == {"model", "messages", "stream", "stream_options", *extra} - {"max_tokens"}
    assert (body["temperature"], body["max_completion_tokens"]) == (0, 5)


def test_conversations_from_a_file(tmp_path):
    path = tmp_path / "talks.jsonl"
    ask, answer = (
        {"role": "user", "content": "Hi\u2028you"},
        {"role": "assistant", "content": "one two three"},
    )
    lines = [
        {"messages": [ask]},
        {"messages": [ask, answer]},
        {"messages": [ask, answer], "max_tokens": 99},
        {"messages": [ask, answer, ask]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "one two"}]},
        {"prompt": "Hi"},
    ]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    talks = read_talks(path, count=count_words)
    assert [talk.num_answer_tokens for talk in talks] == [None, 3, 99, None, 2, None]
    assert [len(talk.messages) for talk in talks] == [1, 1, 1, 3, 1, 1]
    assert talks[4].messages == talks[5].messages == [{"role": "user", "content": "Hi"}]
    assert [talk.num_answer_tokens for talk in read_talks(path, count=None)] == [
        None,
        None,
        99,
        None,
        None,
        None,
    ]
    settings = load(data=path, output_tokens="7")
    rounds = bodies(settings, 12)
    assert [body["messages"] for body in rounds[:6]] == [body["messages"] for body in rounds[6:]]
    assert sorted(body["max_tokens"] for body in rounds[:6]) == [7, 7, 7, 7, 7, 99]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "a line is"),
        ("[1]", "a line is"),
        ('{"text": "Hi"}', "a line is"),
        ('{"messages": [{"role": "user"}]}', "a line is"),
        ('{"messages": [{"role": "assistant", "content": "Hi"}]}', "nothing is asked"),
        ('{"messages": []}', "nothing is asked"),
        ('{"prompt": "Hi", "max_tokens": 0}', "max_tokens"),
        ('{"prompt": "Hi", "max_tokens": true}', "max_tokens"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = tmp_path / "talks.jsonl"
    path.write_text('{"prompt": "Hi"}\n' + line)
    with pytest.raises(RamError, match=rf"talks.jsonl:2: .*{reason}"):
        read_talks(path, count=None)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(RamError, match="no conversation"):
        read_talks(tmp_path / "empty.jsonl", count=None)
    with pytest.raises(RamError, match="Cannot read conversations"):
        read_talks(tmp_path / "missing.jsonl", count=None)
    with pytest.raises(RamError, match="Cannot read a tokenizer"):
        load_vocabulary(tmp_path)


def test_model_names_may_hold_anything_before_the_weight():
    assert parse_models(["polite=3", "org/terse", "a=b=0.5"]) == (
        ("polite", 3.0),
        ("org/terse", 1.0),
        ("a=b", 0.5),
    )


@pytest.mark.parametrize("words", [["a=0"], ["a=-1"], ["a=x"], ["a=inf"], ["=2"], [""], ["a", "a=2"]])
def test_bad_models_are_refused(words):
    with pytest.raises(RamError, match=r"A model is|named twice"):
        parse_models(words)


@pytest.mark.parametrize(
    "fields",
    [
        {"concurrency": None},
        {"num_requests": None},
        {"rate_per_s": 0.0},
        {"rate_per_s": math.inf},
        {"concurrency": 0},
        {"num_requests": -1},
        {"duration_s": 0.0},
        {"num_warmup": -1},
        {"seed": -1},
        {"shared_prefix_tokens": -1},
        {"shared_prefix_tokens": 1, "data": "x.jsonl"},
    ],
)
def test_impossible_loads_are_refused(fields):
    with pytest.raises(RamError):
        load(**fields)
