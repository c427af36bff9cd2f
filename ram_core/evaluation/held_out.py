"""How probable wanted answers are under an aligned model, in closed form: nothing is drawn.

The wanted answers are fed to the engine's own models, which say p and q at each of their tokens, and the step
that serves makes π of them. A token outside the nucleus has no mass under π, and one such token makes a whole
text impossible. So perplexity is that of the law without any cut, and beside it stands how many of the wanted
tokens the cut leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ram_core.engine.bank import PROPOSAL, ModelBank
from ram_core.evaluation.answering import Bench, Setting
from ram_core.models.packing import Row, pack
from ram_core.params import AlignmentParams, Resampling, SamplingParams
from ram_core.progress import OnProgress, Progress, ignore_progress
from ram_core.resampling import AlignerLogits, StepFeatures, StepParams
from ram_core.resampling.step import draw_with_tensors
from ram_core.training.examples import Example

# Numbers of a table of logits, and of the step's own tables, that are in memory at once.
_MAX_LOGITS = 1 << 25
_MAX_STEP_NUMBERS = 1 << 22
_MAX_TOKENS = 2048


@dataclass(frozen=True)
class HeldOut:
    """How a setting's law fits `num_tokens` wanted tokens, ends of answers among them.

    `perplexity` is that of the law without any cut, `proposal_top_p` and `top_p` at 1, `top_k` and `min_p`
    off; None for `candidates`, whose law has no closed form. `supported` is the share of wanted tokens that
    the setting as it is can draw at all; for `candidates`, if it draws long enough.
    """

    perplexity: float | None
    supported: float
    num_tokens: int


def score_held_out(
    bench: Bench,
    examples: Sequence[Example],
    settings: Sequence[Setting],
    on_progress: OnProgress = ignore_progress,
) -> list[HeldOut]:
    """How each of `settings` fits the answers of `examples`; every model reads every answer once.

    At temperature 0 the law is that of temperature 1. The bench must not be answering meanwhile.

    Raises:
        RamError: an aligner that is not there.
        ValueError: an example that is longer than the context, or none at all.
    """
    bank = bench.engine.engine.bank
    laws = [_Law.of(setting.sampling, bench.resolved(setting.alignment)) for setting in settings]
    sums = [[0.0, 0.0] for _ in laws]
    num_tokens = num_done = 0
    for batch in _batches(examples, bank):
        targets = torch.tensor([token for example in batch for token in example.answer])
        num_tokens += len(targets)
        logits = _Logits(bank, batch)
        for law, sum_ in zip(laws, sums, strict=True):
            log_probs, is_supported = law.look_up(logits, targets.to(bank.proposal.device))
            sum_[0] += log_probs.sum().item()
            sum_[1] += is_supported.sum().item()
        num_done += len(batch)
        on_progress(Progress("reading wanted answers", num_done, len(examples)))
    return [
        HeldOut(law.perplexity_of(log_prob / num_tokens), supported / num_tokens, num_tokens)
        for law, (log_prob, supported) in zip(laws, sums, strict=True)
    ]


@dataclass(frozen=True)
class _Law:
    """The parameters of a setting's step: as they are, and without any cut."""

    cut: tuple[SamplingParams, AlignmentParams]
    whole: tuple[SamplingParams, AlignmentParams]
    is_closed: bool

    @classmethod
    def of(cls, sampling: SamplingParams, alignment: AlignmentParams) -> _Law:
        is_closed = alignment.is_identity or alignment.resampling is not Resampling.CANDIDATES
        if not is_closed:
            # What many candidates tend to, and the same support.
            alignment = replace(alignment, resampling=Resampling.PRODUCT)
        whole = (
            replace(sampling, top_p=1.0, top_k=0, min_p=0.0),
            replace(alignment, proposal_top_p=1.0, proposal_top_k=0),
        )
        return cls((sampling, alignment), whole, is_closed)

    def look_up(
        self, logits: _Logits, targets: Int64[Tensor, " answer_token"]
    ) -> tuple[Float[Tensor, " answer_token"], Tensor]:
        """Each target's log-probability under the whole law, and whether the cut law has it."""
        log_probs = logits.log_probs(self.whole, targets).double()
        return log_probs, logits.log_probs(self.cut, targets) > -torch.inf

    def perplexity_of(self, mean_log_prob: float) -> float | None:
        if not self.is_closed:
            return None
        return math.exp(-mean_log_prob) if mean_log_prob > -700 else math.inf


class _Logits:
    """What the models say of each answer token of a few examples; an aligner is asked when it is needed."""

    def __init__(self, bank: ModelBank, examples: Sequence[Example]) -> None:
        self._bank = bank
        self._examples = examples
        self._of_model: dict[str, Float[Tensor, "answer_token padded_vocab"]] = {}

    @torch.inference_mode()
    def log_probs(
        self, asked: tuple[SamplingParams, AlignmentParams], targets: Int64[Tensor, " answer_token"]
    ) -> Float[Tensor, " answer_token"]:
        """The log-probability of each target where it stands, under what was asked."""
        size = self._bank.vocab_size
        rows = max(_MAX_STEP_NUMBERS // size, 1)
        found = [
            self._step(asked, slice(start, start + rows), targets[start : start + rows])
            for start in range(0, len(targets), rows)
        ]
        return torch.cat(found)

    def _step(
        self,
        asked: tuple[SamplingParams, AlignmentParams],
        part: slice,
        targets: Int64[Tensor, " answer_token"],
    ) -> Float[Tensor, " answer_token"]:
        size, device, num_rows = self._bank.vocab_size, self._bank.proposal.device, len(targets)
        alignment = asked[1]
        places = torch.arange(num_rows, device=device)
        terms = [
            AlignerLogits(
                places,
                self._logits(term.aligner)[part],
                torch.full((num_rows,), term.strength, device=device),
            )
            for term in (() if alignment.is_identity else alignment.terms)
        ]
        # In tensors: rows that are compiled look for one token after the other, and all are asked for here.
        draws = draw_with_tensors(
            self._logits(PROPOSAL)[part],
            terms,
            StepParams.of([asked] * num_rows, seeds=[0] * num_rows, positions=[0] * num_rows).to(device),
            # Told of all tokens, the step tells of the wanted one.
            replace(StepFeatures.of([asked]), max_top_log_probs=size),
            vocab_size=size,
            eos_ids=torch.tensor(sorted(self._bank.eos_ids), device=device),
        )
        by_token = torch.empty_like(draws.top_log_prob).scatter_(1, draws.top_token, draws.top_log_prob)
        return by_token.gather(1, targets[:, None])[:, 0]

    def _logits(self, model: str) -> Float[Tensor, "answer_token padded_vocab"]:
        if model not in self._of_model:
            self._of_model[model] = self._read(model)
        return self._of_model[model]

    def _read(self, model: str) -> Float[Tensor, "answer_token padded_vocab"]:
        """A model's logits where an answer token is predicted, as it reads all examples in one forward."""
        bank = self._bank
        group = None if model == PROPOSAL else bank.group_of[model]
        pool = bank.pools[bank.proposal_pool if group is None else bank.pool_of[model]]
        rows: list[Row] = []
        places: list[int] = []
        first, page = 0, 1
        for example in self._examples:
            token_ids = (*example.prompt, *example.answer[:-1])
            num_pages = _pages_for(example, bank)
            rows.append(Row(token_ids, 0, range(page, page + num_pages)))
            places += range(first + len(example.prompt) - 1, first + len(token_ids))
            first, page = first + len(token_ids), page + num_pages
        batch = pack(rows, page_size=bank.page_size, device=bank.proposal.device)
        batch = replace(batch, logit_tokens=torch.tensor(places, device=bank.proposal.device))
        slots = None
        if group is not None and group.is_stacked:
            slots = torch.full_like(batch.input_ids, group.lane(model)[1])
        return bank.forward(PROPOSAL if group is None else group.name, batch, pool, slots)


def _pages_for(example: Example, bank: ModelBank) -> int:
    return -(-(example.num_tokens - 1) // bank.page_size)


def _batches(examples: Sequence[Example], bank: ModelBank) -> Iterator[list[Example]]:
    """Examples in batches of alike ones that fit into memory together, or are alone."""
    if not examples:
        raise ValueError("there are no examples to score")
    max_pages = min(pool.num_pages for pool in bank.pools.values()) - 1
    max_answer_tokens = _MAX_LOGITS // bank.vocab_size
    batch: list[Example] = []
    for example in sorted(examples, key=lambda example: example.num_tokens):
        if example.num_tokens > bank.max_model_len or _pages_for(example, bank) > max_pages:
            raise ValueError(f"an example has {example.num_tokens} tokens, the context {bank.max_model_len}")
        grown = [*batch, example]
        is_full = (
            sum(each.num_tokens for each in grown) > _MAX_TOKENS
            or sum(len(each.answer) for each in grown) > max_answer_tokens
            or sum(_pages_for(each, bank) for each in grown) > max_pages
        )
        if batch and is_full:
            yield batch
            grown = [example]
        batch = grown
    yield batch
