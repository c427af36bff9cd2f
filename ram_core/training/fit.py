"""Fitting a model from a config: what `ram train` calls for its warm-up and for an aligner."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from torch import Tensor
from transformers import PreTrainedModel

from ram_core.models.loading import context_limit, load_config
from ram_core.models.vocabulary import load_tokenizer, shared_vocabulary_size
from ram_core.progress import OnProgress
from ram_core.training.checkpoints import Starting, content_hash, no_bars, require_packages, write_checkpoint
from ram_core.training.config import FREE_FIELDS, LoopConfig, LoraConfig, TrainConfig
from ram_core.training.errors import ConfigError, DataError
from ram_core.training.examples import TrainingPair
from ram_core.training.job import Job
from ram_core.training.log_probs import LogProbsCache, ProposalLogProbs, fill_cache, pairs_digest
from ram_core.training.objectives import Objective, ProductLikelihood, TokenLikelihood, objective_of
from ram_core.training.saves import Spent, require_same_run, write_aside

if TYPE_CHECKING:
    from ram_core.training.loop import TrainingSummary

MODEL_DIR = "model"
LOG_PROBS_DIR = "proposal_log_probs"
_SUMMARY_FILE = "summary.json"


class FitSummary(msgspec.Struct, frozen=True):
    """What a fit took, on all processes and over all its interruptions, and its last metrics.

    `seconds` are those on the clock; `flops` are estimated from parameters and tokens.
    """

    steps: int
    seconds: float
    cpu_seconds: float
    flops: float
    metrics: dict[str, float]


def warm_up_model(
    config: TrainConfig, pairs: Sequence[TrainingPair], directory: Path, on_progress: OnProgress
) -> FitSummary:
    """Train `config.warmup.model` on the wanted answers, by the mean over answer tokens, as is usual.

    The model lies at `directory/"model"` then. A run that was interrupted goes on from its last save, and one
    that is finished is not repeated. All processes of a launch call this alike.

    Raises:
        CheckpointError: the model cannot be loaded.
        TrainingError: what `train` and the config forbid, or a package is missing.
    """
    return _Fit(config, config.warmup, config.warmup.model, TokenLikelihood(), "warm-up", LoraConfig()).run(
        pairs, directory, on_progress
    )


def fit_model(
    config: TrainConfig, pairs: Sequence[TrainingPair], directory: Path, on_progress: OnProgress
) -> FitSummary:
    """Train `config.fit.model` for its objective; as `warm_up_model` otherwise.

    `directory/"model"` is a model, or with LoRA that is not merged a PEFT adapter.
    """
    fit = config.fit
    return _Fit(config, fit, fit.model, objective_of(fit), "fit", fit.lora).run(pairs, directory, on_progress)


@dataclass(frozen=True)
class _Fit:
    """One model to be trained, of a config's many."""

    config: TrainConfig
    loop: LoopConfig
    source: str
    objective: Objective
    stage: str
    lora: LoraConfig

    def run(self, pairs: Sequence[TrainingPair], directory: Path, on_progress: OnProgress) -> FitSummary:
        require_packages(with_peft=self.lora.rank > 0)
        self._check(pairs)
        fingerprint = self._fingerprint(pairs)
        finished = _read_summary(directory, fingerprint)
        if finished is not None:
            return finished
        with no_bars():
            return self._run(pairs, directory, on_progress, fingerprint)

    def _run(
        self, pairs: Sequence[TrainingPair], directory: Path, on_progress: OnProgress, fingerprint: str
    ) -> FitSummary:
        log_probs, looking_up = self._look_up(pairs, directory, on_progress)
        job = Job(
            self.stage,
            pairs,
            self.objective,
            self.loop,
            self.config.seed,
            self._vocab_size(),
            fingerprint,
            self.config.fit.max_ascent_nats if self.objective.reads_proposed else math.inf,
            log_probs,
        )
        done = self._train(job, directory, on_progress)
        summary = FitSummary(
            done.steps,
            done.spent.seconds + looking_up.seconds,
            done.spent.cpu_seconds + looking_up.cpu_seconds,
            done.spent.flops + looking_up.flops,
            done.metrics,
        )
        _write_summary(directory, fingerprint, summary)
        return summary

    def _train(self, job: Job, directory: Path, on_progress: OnProgress) -> TrainingSummary:
        # What it imports takes seconds, and a finished run needs none of it.
        from ram_core.training.loop import train

        starting = Starting(self.source, self.lora, self.config.trust_remote_code, self.config.seed)

        def write(trained: PreTrainedModel, state: Mapping[str, Tensor] | None) -> None:
            write_checkpoint(trained, state, starting, directory / MODEL_DIR)

        return train(starting.build(), job, directory, on_progress, write)

    def _check(self, pairs: Sequence[TrainingPair]) -> None:
        """Refuse what can be seen before anything is loaded."""
        if not self.source:
            section = "warmup" if self.stage == "warm-up" else "fit"
            raise ConfigError(f"`{section}.model` must name the model to train")
        if self.objective.reads_proposed:
            missing = sum(not pair.proposed for pair in pairs)
            if missing:
                raise DataError(
                    f"{missing} of {len(pairs)} examples have no answer of the proposal's, which "
                    f"`fit.objective` {self.config.fit.objective!r} reads"
                )
        limit = context_limit(load_config(self.source, trust_remote_code=self.config.trust_remote_code))
        longest = max(
            (len(pair.prompt) + max(len(pair.wanted), len(pair.proposed)) for pair in pairs), default=0
        )
        if longest > limit:
            raise ConfigError(
                f"the longest example has {longest} tokens, `{self.source}` was made for {limit}; "
                "lower `data.max_tokens`"
            )

    def _fingerprint(self, pairs: Sequence[TrainingPair]) -> str:
        """A hash of all that decides how the run ends, up to rounding."""
        loop = {
            name: value for name, value in msgspec.to_builtins(self.loop).items() if name not in FREE_FIELDS
        }
        parts = {
            "stage": self.stage,
            "loop": loop,
            "objective": repr(self.objective),
            "lora": self.lora,
            "seed": self.config.seed,
            "model": content_hash(self.source),
            "pairs": pairs_digest(pairs),
        }
        return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()

    def _vocab_size(self) -> int:
        """Ids that can be drawn: of these alone a served model's probabilities are made."""
        sources = [self.source] + [self._proposal] * isinstance(self.objective, ProductLikelihood)
        trust = self.config.trust_remote_code
        rows = [
            load_config(source, trust_remote_code=trust).get_text_config().vocab_size for source in sources
        ]
        tokenizer = load_tokenizer(self.source, trust_remote_code=trust)
        return shared_vocabulary_size(tokenizer, rows[-1], {self.source: rows[0]})

    @property
    def _proposal(self) -> str:
        config = self.config
        return str(Path(config.output) / "warmup" / MODEL_DIR) if config.warmup.model else config.proposal

    def _look_up(
        self, pairs: Sequence[TrainingPair], directory: Path, on_progress: OnProgress
    ) -> tuple[ProposalLogProbs | None, Spent]:
        """What the objective reads of the proposal, computed if it is not there yet, and what that took."""
        if not isinstance(self.objective, ProductLikelihood):
            return None, Spent()
        if not self._proposal:
            raise ConfigError("`fit.objective` 'ram-token' reads the proposal: name it as `proposal`")
        cache = LogProbsCache(
            directory / LOG_PROBS_DIR,
            pairs,
            top_k=self.config.fit.top_k_log_probs,
            vocab_size=self._vocab_size(),
            proposal=content_hash(self._proposal),
        )
        spent = fill_cache(
            cache,
            self._proposal,
            dtype=self.loop.dtype,
            trust_remote_code=self.config.trust_remote_code,
            on_progress=on_progress,
        )
        return cache.open(), spent


class _Finished(msgspec.Struct, frozen=True):
    fingerprint: str
    summary: FitSummary


def _read_summary(directory: Path, fingerprint: str) -> FitSummary | None:
    """What a finished run took; None if there is none. Raises `ConfigError` if it was another's."""
    try:
        finished = msgspec.json.decode((directory / _SUMMARY_FILE).read_bytes(), type=_Finished)
    except (OSError, msgspec.DecodeError):
        return None
    if not (directory / MODEL_DIR).is_dir():
        return None
    require_same_run(directory, finished.fingerprint, fingerprint)
    return finished.summary


def _write_summary(directory: Path, fingerprint: str, summary: FitSummary) -> None:
    from accelerate import PartialState

    if PartialState().is_main_process:
        write_aside(directory / _SUMMARY_FILE, msgspec.json.encode(_Finished(fingerprint, summary)))
