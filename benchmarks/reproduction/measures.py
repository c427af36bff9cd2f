"""What is measured of each line: style, facts, divergence from the proposal, and the first token's time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.reproduction.models import STYLE, rewriting
from ram_core.demo.data import draw_held_out_prompts, held_out_conversations
from ram_core.demo.styles import follows, states
from ram_core.evaluation.answering import Answers, Bench, Setting, alone
from ram_core.models.loading import load_model
from ram_core.params import AlignmentParams, SamplingParams
from ram_core.progress import OnProgress
from ram_core.training.examples import Example, collate
from ram_core.training.heads import AnswerHead
from ram_core.training.records import Record

_MAX_ANSWER_TOKENS = 64
_NUM_FIRST_TOKENS = 40
_KL_BATCH = 64


@dataclass(frozen=True)
class Figures:
    """One line of one seed. Rates are fractions of answers, divergences nats a token; NaN is no figure."""

    style: float
    facts: float
    kl_pi_p: float = float("nan")
    kl_p_q: float = float("nan")
    ess: float = float("nan")
    fallback: float = float("nan")
    first_token_s: float = float("nan")


class Exam:
    """Held-out questions of one seed, for every model that is to answer them."""

    def __init__(self, num_prompts: int, seed: int, on_progress: OnProgress) -> None:
        self._prompts = draw_held_out_prompts(num_prompts, seed=seed)
        conversations = held_out_conversations(self._prompts, seed=seed)
        self.records = [Record(messages) for messages in conversations]
        self._sampling = SamplingParams(seed=1000 * seed, max_tokens=_MAX_ANSWER_TOKENS)
        self._on_progress = on_progress

    def bench(self, proposal: Path, aligners: dict[str, Path] | None = None) -> Bench:
        """An engine for a proposal and its aligners."""
        named = {name: str(path) for name, path in (aligners or {}).items()}
        return Bench(str(proposal), named, self.records, device="cpu")

    def aligned(self, bench: Bench, alignment: AlignmentParams) -> Figures:
        """Answers under an aligner of the bench."""
        answers = bench.answer(Setting("aligned", alignment, self._sampling), self._on_progress)
        steps = answers.telemetry
        return Figures(
            *self._quality(answers.texts),
            kl_pi_p=statistics.fmean(step.kl_pi_p for step in steps),
            kl_p_q=statistics.fmean(step.kl_p_q for step in steps),
            ess=statistics.fmean(step.ess for step in steps),
            fallback=statistics.fmean(step.is_fallback for step in steps),
            first_token_s=self.first_token_s(bench, bench.resolved(alignment)),
        )

    def by_itself(self, bench: Bench, reference: Path | None = None) -> Figures:
        """Answers of a model alone, cut to the same nucleus; its divergence from `reference`, if given."""
        answers = bench.answer(alone(self._sampling), self._on_progress)
        kl = float("nan") if reference is None else self._divergence(bench, answers, reference)
        return Figures(*self._quality(answers.texts), kl_pi_p=kl, first_token_s=self.first_token_s(bench))

    def rewritten(self, drafts: Bench, rewriter: Path) -> Figures:
        """Answers of a chain: the proposal drafts a whole answer, and the rewriter writes it anew."""
        drafted = drafts.answer(alone(self._sampling), self._on_progress)
        records = [
            Record(rewriting(record.messages, text or " "))
            for record, text in zip(self.records, drafted.texts, strict=True)
        ]
        bench = Bench(str(rewriter), {}, records, device="cpu")
        answers = bench.answer(alone(self._sampling), self._on_progress)
        first_s = self._draft_s(drafts) + self.first_token_s(bench)
        return Figures(*self._quality(answers.texts), first_token_s=first_s)

    def first_token_s(self, bench: Bench, alignment: AlignmentParams | None = None) -> float:
        """Median seconds from a prompt to its first token, one prompt at a time."""
        return self._median_s(bench, alignment or AlignmentParams(), max_tokens=1)

    def _draft_s(self, bench: Bench) -> float:
        return self._median_s(bench, AlignmentParams(), max_tokens=_MAX_ANSWER_TOKENS)

    def _median_s(self, bench: Bench, alignment: AlignmentParams, max_tokens: int) -> float:
        taken: list[float] = []
        for index, prompt in enumerate(bench.prompts[:_NUM_FIRST_TOKENS]):
            began_s = time.perf_counter()
            bench.engine.generate([prompt], SamplingParams(seed=index, max_tokens=max_tokens), alignment)
            taken.append(time.perf_counter() - began_s)
        return statistics.median(taken)

    def _quality(self, texts: Sequence[str]) -> tuple[float, float]:
        pairs = list(zip(self._prompts, texts, strict=True))
        style = statistics.fmean(follows(STYLE, text) for text in texts)
        facts = statistics.fmean(
            states(prompt.answer, text) for prompt, text in pairs if prompt.answer is not None
        )
        return style, facts

    def _divergence(self, bench: Bench, answers: Answers, reference: Path) -> float:
        """Mean KL(model ‖ reference) over the tokens that the model drew, over the whole vocabulary."""
        examples = [
            Example(prompt, choice.token_ids)
            for prompt, choice in zip(bench.prompts, answers.choices, strict=True)
        ]
        source = bench.engine.engine.config.proposal
        return mean_divergence(_load(Path(source)), _load(reference), examples, len(bench.tokenizer))


def mean_divergence(
    model: PreTrainedModel, reference: PreTrainedModel, examples: Sequence[Example], vocab_size: int
) -> float:
    """Mean KL(model ‖ reference) in nats, over all answer tokens of `examples`."""
    total, count = 0.0, 0
    heads = [(AnswerHead(each), each) for each in (model, reference)]
    for start in range(0, len(examples), _KL_BATCH):
        batch = collate(examples[start : start + _KL_BATCH])
        with torch.no_grad():
            log_pi, log_p = (
                head.logits(each, batch)[:, :vocab_size].float().log_softmax(-1) for head, each in heads
            )
        total += float((log_pi.exp() * (log_pi - log_p)).sum())
        count += len(log_pi)
    for head, _ in heads:
        head.remove()
    return total / count


def _load(directory: Path) -> PreTrainedModel:
    return load_model(
        str(directory), device=torch.device("cpu"), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
