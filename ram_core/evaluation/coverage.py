"""Does the synthetic data cover what is wanted? The check that arXiv 2505.19700 asks for before training.

The proposal's answers are sampled once. An aligner learns only against what was sampled, so answers that are
few, alike, cut off, or of other words than the wanted ones leave it without a contrast.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles

from ram_core.evaluation.measures import (
    MAX_COMPARED,
    Lengths,
    TextMeasures,
    measure_lengths,
    measure_texts,
    ngrams,
    words_of,
)
from ram_core.training.records import Message, Record
from ram_core.training.synthesis import Answer

HELD_ORDERS = (1, 2, 3, 4)
NUM_BUCKETS = 4

MAX_CUT_OFF = 0.02
MAX_EMPTY = 0.01
MIN_PROMPTS_ANSWERED = 0.95
MAX_MORE_DUPLICATES = 0.1
MAX_MORE_SELF_BLEU = 0.1
MIN_DISTINCT_RATIO = 0.5
MIN_LENGTH_RATIO, MAX_LENGTH_RATIO = 0.5, 2.0
MIN_HELD_WORDS = 0.9
MIN_BUCKET_ANSWERS = 20
MIN_BUCKET_RATIO = 0.75

Gram = tuple[Hashable, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """How much of the wanted answers' n-grams of one order stands in some synthetic answer.

    `different` counts each n-gram once, `occurrences` as often as it is wanted. The yardstick is
    `among_wanted`: the occurrences that stand in another wanted answer, too.
    """

    order: int
    different: float
    occurrences: float
    among_wanted: float


@dataclass(frozen=True, slots=True)
class Bucket:
    """Prompts of `min_words` to `max_words` words, and the answers to them.

    Of wanted words, `held_words` is the share of occurrences that a synthetic answer of this bucket holds.
    """

    min_words: int
    max_words: int
    num_wanted: int
    num_synthetic: int
    distinct_2: float
    mean_synthetic_words: float
    mean_wanted_words: float
    held_words: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The synthetic answers beside the wanted ones, where wanted ones were given.

    `prompts_answered` is the share of records with a wanted answer whose prompt has a synthetic one; of
    wanted answers, only theirs are looked at.
    """

    prompts_answered: float
    wanted: TextMeasures
    held: tuple[Held, ...]
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, slots=True)
class CoverageReport:
    """What `measure_coverage` found; `warnings` are in words, worst first, and empty where nothing is thin.

    `cut_off` is the share of answers that ended at a limit; `tokens` are their lengths in tokens.
    """

    synthetic: TextMeasures
    cut_off: float
    tokens: Lengths
    comparison: Comparison | None
    warnings: tuple[str, ...]


def measure_coverage(
    answers: Sequence[Answer],
    records: Sequence[Record] = (),
    *,
    max_compared: int = MAX_COMPARED,
    seed: int = 0,
) -> CoverageReport:
    """Measure synthetic answers, and compare them with the wanted answers of `records`, if there are any.

    `max_compared` and `seed` are those of `self_bleu`.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("there are no synthetic answers")
    synthetic = measure_texts([answer.completion for answer in answers], max_compared=max_compared, seed=seed)
    cut_off = fmean(answer.finish_reason == "length" for answer in answers)
    wanted = [record for record in records if record.wanted]
    comparison = _compare(answers, wanted, max_compared, seed) if wanted else None
    return CoverageReport(
        synthetic=synthetic,
        cut_off=cut_off,
        tokens=measure_lengths([len(answer.token_ids) for answer in answers]),
        comparison=comparison,
        warnings=tuple(_warn(synthetic, cut_off, comparison)),
    )


def _compare(answers: Sequence[Answer], wanted: Sequence[Record], max_compared: int, seed: int) -> Comparison:
    answered = {_key(answer.prompt) for answer in answers}
    both = [record for record in wanted if _key(record.messages) in answered]
    synthetic_words = [words_of(answer.completion) for answer in answers]
    wanted_words = [words_of(record.wanted) for record in both]
    return Comparison(
        prompts_answered=len(both) / len(wanted),
        wanted=measure_texts([record.wanted for record in both], max_compared=max_compared, seed=seed),
        held=tuple(_held(synthetic_words, wanted_words, order) for order in HELD_ORDERS) if both else (),
        buckets=tuple(_buckets(answers, both)),
    )


def _key(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in messages)


def _held(synthetic: Sequence[list[str]], wanted: Sequence[list[str]], order: int) -> Held:
    offered = {gram for words in synthetic for gram in ngrams(words, order)}
    occurrences: Counter[Gram] = Counter()
    num_texts: Counter[Gram] = Counter()
    for words in wanted:
        grams = list(ngrams(words, order))
        occurrences.update(grams)
        num_texts.update(set(grams))
    num_all = max(occurrences.total(), 1)
    return Held(
        order=order,
        different=sum(gram in offered for gram in occurrences) / max(len(occurrences), 1),
        occurrences=sum(count for gram, count in occurrences.items() if gram in offered) / num_all,
        among_wanted=sum(count for gram, count in occurrences.items() if num_texts[gram] > 1) / num_all,
    )


def _buckets(answers: Sequence[Answer], wanted: Sequence[Record]) -> Iterator[Bucket]:
    """Prompts in groups by their length, as even as whole numbers of words let them be."""
    lengths = [_num_words(record.messages) for record in wanted]
    if len(lengths) < 2:
        return
    bounds = sorted({int(bound) for bound in quantiles(lengths, n=NUM_BUCKETS, method="inclusive")})
    edges = [min(lengths) - 1, *bounds, max(lengths)]
    for low, high in itertools.pairwise(edges):
        its_wanted = [
            record.wanted for record, length in zip(wanted, lengths, strict=True) if low < length <= high
        ]
        its_answers = [answer.completion for answer in answers if low < _num_words(answer.prompt) <= high]
        if its_wanted:
            yield _bucket(low + 1, high, its_answers, its_wanted)


def _bucket(min_words: int, max_words: int, synthetic: Sequence[str], wanted: Sequence[str]) -> Bucket:
    ours, theirs = ([words_of(text) for text in texts] for texts in (synthetic, wanted))
    return Bucket(
        min_words=min_words,
        max_words=max_words,
        num_wanted=len(theirs),
        num_synthetic=len(ours),
        distinct_2=measure_texts(synthetic).distinct_2,
        mean_synthetic_words=fmean(map(len, ours)) if ours else 0.0,
        mean_wanted_words=fmean(map(len, theirs)),
        held_words=_held(ours, theirs, 1).occurrences,
    )


def _num_words(messages: Sequence[Message]) -> int:
    return sum(len(words_of(message["content"])) for message in messages)


def _warn(synthetic: TextMeasures, cut_off: float, comparison: Comparison | None) -> Iterator[str]:
    if synthetic.empty > MAX_EMPTY:
        yield (
            f"{synthetic.empty:.1%} of the synthetic answers are empty: look at the proposal's chat template"
        )
    if cut_off > MAX_CUT_OFF:
        yield (
            f"{cut_off:.1%} of the synthetic answers were cut off at the limit: "
            "raise `synthesize.max_answer_tokens`, or `data.max_tokens` if that is the limit"
        )
    if comparison is not None:
        yield from _warn_of_prompts(comparison)
        if comparison.held:
            yield from _warn_of_variety(synthetic, comparison.wanted)
            yield from _warn_of_words(synthetic, comparison)


def _warn_of_prompts(comparison: Comparison) -> Iterator[str]:
    if comparison.prompts_answered < MIN_PROMPTS_ANSWERED:
        yield (
            f"{1 - comparison.prompts_answered:.1%} of the prompts have no synthetic answer: "
            "the synthesis is not finished, or was made from other data"
        )


def _warn_of_variety(synthetic: TextMeasures, wanted: TextMeasures) -> Iterator[str]:
    if synthetic.duplicates > wanted.duplicates + MAX_MORE_DUPLICATES:
        yield (
            f"{synthetic.duplicates:.1%} of the synthetic answers repeat another one, of the wanted ones "
            f"{wanted.duplicates:.1%}: raise `synthesize.temperature`"
        )
    if synthetic.distinct_2 < MIN_DISTINCT_RATIO * wanted.distinct_2:
        yield (
            "the synthetic answers have few different pairs of words (distinct-2 "
            f"{synthetic.distinct_2:.3f}, wanted {wanted.distinct_2:.3f}): raise `synthesize.temperature`, "
            "`top_p` or `top_k`"
        )
    if synthetic.self_bleu > wanted.self_bleu + MAX_MORE_SELF_BLEU:
        yield (
            f"the synthetic answers are more alike than the wanted ones (self-BLEU {synthetic.self_bleu:.2f} "
            f"against {wanted.self_bleu:.2f}): raise `synthesize.temperature`"
        )
    if wanted.lengths.median and not (
        MIN_LENGTH_RATIO <= synthetic.lengths.median / wanted.lengths.median <= MAX_LENGTH_RATIO
    ):
        yield (
            f"the synthetic answers have {synthetic.lengths.median:g} words in the median, the wanted ones "
            f"{wanted.lengths.median:g}: sums of log-probabilities weigh the longer ones more"
        )


def _warn_of_words(synthetic: TextMeasures, comparison: Comparison) -> Iterator[str]:
    words = comparison.held[0].occurrences
    if words < MIN_HELD_WORDS:
        yield (
            f"{1 - words:.1%} of the wanted words stand in no synthetic answer: the proposal may not support "
            "the target; look with `ram stress`, or warm it up"
        )
    for bucket in comparison.buckets:
        name = f"prompts of {bucket.min_words} to {bucket.max_words} words"
        if bucket.num_synthetic < MIN_BUCKET_ANSWERS <= synthetic.num_texts:
            yield f"{name} have only {bucket.num_synthetic} synthetic answers"
        elif bucket.held_words < MIN_BUCKET_RATIO * words:
            yield (
                f"{name} are thin: their synthetic answers hold {bucket.held_words:.1%} of the wanted words, "
                f"overall {words:.1%}"
            )
