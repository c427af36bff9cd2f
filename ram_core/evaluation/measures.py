"""What a set of texts is like, whoever wrote them: variety, repetition, lengths. Plain Python.

Words are runs of letters and digits; every other sign, and every character of a script that sets no spaces
between words, is a word of its own. Case counts: two styles may differ in nothing else.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

BLEU_ORDER = 4
REPEATED_ORDER = 4
MAX_COMPARED = 1000

# Thai to Khmer, Japanese, Chinese.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
# What a precision of 0 counts as, in matches, so that one missing order does not make the whole BLEU 0.
_SMOOTHED_MATCHES = 0.1

Tokens = Sequence[Hashable]


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long some texts are, in whatever was counted; all 0 for no texts. `p95`: 19 of 20 are no longer."""

    mean: float
    shortest: int
    median: float
    p95: int
    longest: int


@dataclass(frozen=True, slots=True)
class TextMeasures:
    """What `measure_texts` found. All but `num_texts` and `lengths` (in words) are fractions.

    `distinct_1` and `distinct_2` compare words and pairs of neighbours with their number in all texts
    together, so they fall as texts are added: compare sets of one size. `self_bleu` is how much a text
    resembles the others, `repetition` how much of a text repeats itself. `duplicates` are texts equal to an
    earlier one, `empty` those without a word.
    """

    num_texts: int
    distinct_1: float
    distinct_2: float
    self_bleu: float
    repetition: float
    duplicates: float
    empty: float
    lengths: Lengths


def measure_texts(texts: Sequence[str], *, max_compared: int = MAX_COMPARED, seed: int = 0) -> TextMeasures:
    """Measure texts together. `max_compared` and `seed` are `self_bleu`'s. No texts measure 0 throughout."""
    words = [words_of(text) for text in texts]
    spoken = [each for each in words if each]
    num_texts = max(len(texts), 1)
    return TextMeasures(
        num_texts=len(texts),
        distinct_1=distinct(words, 1),
        distinct_2=distinct(words, 2),
        self_bleu=self_bleu(spoken, max_compared=max_compared, seed=seed),
        repetition=fmean(map(repetition, words)) if words else 0.0,
        duplicates=1 - len(set(texts)) / num_texts if texts else 0.0,
        empty=1 - len(spoken) / num_texts if texts else 0.0,
        lengths=measure_lengths([len(each) for each in words]),
    )


def words_of(text: str) -> list[str]:
    """The words of a text, as this module counts them."""
    return _WORD.findall(text)


def ngrams(tokens: Tokens, order: int) -> Iterator[tuple[Hashable, ...]]:
    """All runs of `order` tokens, in their order."""
    return zip(*(tokens[start:] for start in range(order)), strict=False)


def distinct(texts: Sequence[Tokens], order: int) -> float:
    """Different n-grams over all n-grams of all texts together (distinct-n, arXiv 1510.03055)."""
    seen: set[tuple[Hashable, ...]] = set()
    num_all = 0
    for tokens in texts:
        seen.update(ngrams(tokens, order))
        num_all += max(0, len(tokens) - order + 1)
    return len(seen) / num_all if num_all else 0.0


def repetition(tokens: Tokens, order: int = REPEATED_ORDER) -> float:
    """How many n-grams of one text stood in it before (seq-rep-n, arXiv 1908.04319); 0 if it has none."""
    num_all = len(tokens) - order + 1
    return 1 - len(set(ngrams(tokens, order))) / num_all if num_all > 0 else 0.0


def measure_lengths(lengths: Sequence[int]) -> Lengths:
    """The distribution of some lengths."""
    if not lengths:
        return Lengths(0.0, 0, 0.0, 0, 0)
    ordered = sorted(lengths)
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return Lengths(fmean(ordered), ordered[0], float(median(ordered)), p95, ordered[-1])


def self_bleu(
    texts: Sequence[Tokens],
    *,
    max_order: int = BLEU_ORDER,
    max_compared: int = MAX_COMPARED,
    seed: int = 0,
) -> float:
    """Mean BLEU of each text with all the others as its references (arXiv 1802.01886).

    n-grams up to `max_order`, but no longer than the text; an order without any match counts as a tenth of
    one match. It rises with the number of texts, so at most `max_compared` are compared, drawn by `seed`:
    figures of larger sets can be compared with one another. Time and memory are linear in the tokens.
    Fewer than two texts measure 0; an empty text counts as resembling nothing.
    """
    if len(texts) > max_compared:
        texts = random.Random(seed).sample(texts, max_compared)
    if len(texts) < 2:
        return 0.0
    counts = [[Counter(ngrams(tokens, order)) for order in range(1, max_order + 1)] for tokens in texts]
    most = [_Most([each[order] for each in counts]) for order in range(max_order)]
    references = _ReferenceLengths([len(tokens) for tokens in texts])
    return fmean(
        _bleu(index, len(tokens), counts[index], most, references) for index, tokens in enumerate(texts)
    )


class _Most:
    """Of each n-gram, how often it stands in the text that has it most often, whichever one is left out.

    The two largest counts tell this for every text, without comparing all pairs.
    """

    def __init__(self, counts: Sequence[Counter[tuple[Hashable, ...]]]) -> None:
        self._owner: dict[tuple[Hashable, ...], tuple[int, int]] = {}
        self._second: dict[tuple[Hashable, ...], int] = {}
        for index, each in enumerate(counts):
            for gram, count in each.items():
                largest, _ = self._owner.get(gram, (0, index))
                if count > largest:
                    self._owner[gram] = (count, index)
                    self._second[gram] = largest
                elif count > self._second[gram]:
                    self._second[gram] = count

    def elsewhere(self, gram: tuple[Hashable, ...], index: int) -> int:
        largest, owner = self._owner[gram]
        return self._second[gram] if owner == index else largest


class _ReferenceLengths:
    """Of each text, the length among the other texts that is closest to its own; of two, the shorter."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._counts = Counter(lengths)
        self._ordered = sorted(self._counts)

    def closest(self, length: int) -> int:
        if self._counts[length] > 1:
            return length
        at = bisect_left(self._ordered, length)
        others = self._ordered[max(0, at - 1) : at] + self._ordered[at + 1 : at + 2]
        # In order, so that of two the shorter is found first.
        return min(others, key=lambda other: abs(other - length))


def _bleu(
    index: int,
    length: int,
    counts: Sequence[Counter[tuple[Hashable, ...]]],
    most: Sequence[_Most],
    references: _ReferenceLengths,
) -> float:
    log_precisions = []
    for own, others in zip(counts, most, strict=True):
        if num_all := own.total():
            num_matches = sum(min(count, others.elsewhere(gram, index)) for gram, count in own.items())
            log_precisions.append(math.log((num_matches or _SMOOTHED_MATCHES) / num_all))
    if not log_precisions:
        return 0.0
    log_brevity = min(0.0, 1 - references.closest(length) / length)
    return math.exp(log_brevity + fmean(log_precisions))
