"""Measures of texts: against values by hand, and self-BLEU against every pair compared."""

import math
import random
from collections import Counter

import pytest

from ram_core.evaluation.measures import (
    Lengths,
    distinct,
    measure_lengths,
    measure_texts,
    repetition,
    self_bleu,
    words_of,
)


def slow_self_bleu(texts):
    """BLEU as its definition reads: every text against every other one."""
    total = 0.0
    for index, text in enumerate(texts):
        others = texts[:index] + texts[index + 1 :]
        log_precisions = []
        for order in range(1, min(4, len(text)) + 1):
            own, *theirs = (
                Counter(tuple(each[at : at + order]) for at in range(len(each) - order + 1))
                for each in (text, *others)
            )
            matches = sum(min(count, max(their[gram] for their in theirs)) for gram, count in own.items())
            log_precisions.append(math.log(max(matches, 0.1) / sum(own.values())))
        if not log_precisions:
            continue
        length = min((abs(len(other) - len(text)), len(other)) for other in others)[1]
        total += math.exp(min(0, 1 - length / len(text)) + sum(log_precisions) / len(log_precisions))
    return total / len(texts)


def random_texts(seed, count=12):
    noise = random.Random(seed)
    return [[noise.choice("aabc") for _ in range(noise.randrange(9))] for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_self_bleu_is_what_comparing_every_pair_gives(seed):
    texts = random_texts(seed)
    assert self_bleu(texts) == pytest.approx(slow_self_bleu(texts))


def test_self_bleu_by_hand():
    """Of the first: 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, no run of four: smoothed to a tenth."""
    first, second = list("abcd"), list("abcef")
    log_first = (math.log(3 / 4) + math.log(2 / 3) + math.log(1 / 2) + math.log(0.1)) / 4
    log_second = (math.log(3 / 5) + math.log(2 / 4) + math.log(1 / 3) + math.log(0.1 / 2)) / 4
    expected = (math.exp(log_first + 1 - 5 / 4) + math.exp(log_second)) / 2
    assert self_bleu([first, second]) == pytest.approx(expected)


def test_equal_texts_resemble_each_other_wholly_and_strange_ones_hardly():
    assert self_bleu([["a", "b"]] * 3) == pytest.approx(1)
    assert self_bleu([list("abcd"), list("efgh")]) < 0.1
    assert self_bleu([["a"]]) == self_bleu([]) == 0


def test_only_so_many_texts_are_compared_drawn_by_a_seed():
    texts = random_texts(1, count=60)
    drawn = random.Random(5).sample(texts, 10)
    assert self_bleu(texts, max_compared=10, seed=5) == pytest.approx(slow_self_bleu(drawn))
    assert self_bleu(texts, max_compared=10, seed=6) != self_bleu(texts, max_compared=10, seed=5)


def test_distinct_counts_over_all_texts_together():
    texts = [list("abab"), list("ab")]
    assert distinct(texts, 1) == pytest.approx(2 / 6)
    assert distinct(texts, 2) == pytest.approx(2 / 4)
    assert distinct([[]], 1) == 0


def test_repetition_is_within_one_text():
    assert repetition(list("abcdefgh")) == 0
    assert repetition(list("abcdabcd")) == pytest.approx(1 / 5)
    assert repetition(list("aaaaaaa")) == pytest.approx(3 / 4)
    assert repetition(list("abc")) == 0
    # Two texts that say the same are duplicates, not repetition.
    assert measure_texts(["a b c d e", "a b c d e"]).repetition == 0


def test_lengths_are_what_they_are_called():
    assert measure_lengths([*range(1, 101)]) == Lengths(50.5, 1, 50.5, 95, 100)
    assert measure_lengths([7]) == Lengths(7, 7, 7, 7, 7)
    assert measure_lengths([]) == Lengths(0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Isn't it 12%?", ["Isn", "'", "t", "it", "12", "%", "?"]),
        ("año über", ["año", "über"]),
        ("你好 world", ["你", "好", "world"]),
        (" \n", []),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


def test_a_set_is_measured_as_a_whole():
    measures = measure_texts(["Yes.", "Yes.", "", "No, not now."])
    assert measures.num_texts == 4
    assert measures.duplicates == pytest.approx(1 / 4)
    assert measures.empty == pytest.approx(1 / 4)
    assert measures.lengths == Lengths(9 / 4, 0, 2, 5, 5)
    assert measures.distinct_1 == pytest.approx(6 / 9)
    assert measures.distinct_2 == pytest.approx(5 / 6)


def test_an_empty_text_does_not_hide_that_the_others_are_all_alike():
    assert measure_texts(["a b c", "a b c", ""]).self_bleu == pytest.approx(1)


def test_no_texts_measure_nothing():
    measures = measure_texts([])
    assert (measures.num_texts, measures.distinct_1, measures.self_bleu, measures.empty) == (0, 0, 0, 0)
