"""Watches a run: judges each update before it is made, tells how it goes, and seals its saves."""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ram_core.progress import OnProgress, Progress
from ram_core.training.batches import BatchPlan
from ram_core.training.errors import DivergedError, RunawayAscentError
from ram_core.training.job import Job
from ram_core.training.metrics import MetricsLog, Update, Window
from ram_core.training.optimizers import rate_factor
from ram_core.training.saves import Save, Spent, prune, seal

_NOTE_STEPS = 20


class Monitor(TrainerCallback):  # type: ignore[misc] # it has no types
    """One process' view of a run; sums over all processes decide, so that all stop together."""

    def __init__(
        self,
        trainer: Any,
        job: Job,
        plan: BatchPlan,
        directory: Path,
        save: Save | None,
        on_progress: OnProgress,
    ) -> None:
        self._trainer = trainer
        self._job = job
        self._plan = plan
        self._directory = directory
        self._save = save
        self._on_progress = on_progress
        self._log: MetricsLog | None = None
        self._earlier = save.spent if save else Spent()
        self._began_s = time.perf_counter()
        self._began_cpu_s = time.process_time()
        self._sums: Tensor | None = None
        self._window = Window()
        self._recent: deque[Update] = deque(maxlen=_NOTE_STEPS)
        self.last: dict[str, float] = {}

    def add(self, loss: Tensor, wanted: Tensor, proposed: Tensor, is_counted: bool) -> None:
        """Take in a part of the update that is being computed; log-probabilities are of whole answers."""
        if is_counted:
            sums = torch.stack([loss.detach().float(), wanted.detach().sum(), proposed.detach().sum()])
            self._sums = sums if self._sums is None else self._sums + sums

    def judge(self, gradient_norm: float) -> None:
        """Look at the update as a whole, before the weights take it.

        Raises:
            DivergedError: its loss or its gradient is not finite.
            RunawayAscentError: the proposal's answers have become too improbable.
        """
        loss, wanted, proposed = self._summed()
        loss /= self._trainer.args.world_size
        indices = self._plan.steps[self._trainer.state.global_step]
        pairs = [self._job.pairs[index] for index in indices]
        update = Update(
            loss=loss,
            wanted=-wanted,
            proposed=-proposed,
            gradient_norm=gradient_norm,
            num_pairs=len(pairs),
            num_wanted=sum(len(pair.wanted) for pair in pairs),
            num_proposed=sum(len(pair.proposed) for pair in pairs),
            num_tokens=sum(len(pair.prompt) + len(pair.wanted) for pair in pairs)
            + self._job.objective.reads_proposed
            * sum(len(pair.prompt) + len(pair.proposed) for pair in pairs),
        )
        self._refuse(update)
        self._window.add(update)
        self._recent.append(update)

    def spent(self) -> Spent:
        """The cost so far, with that of interrupted sessions up to their last save. All processes ask."""
        cpu_s = torch.tensor(time.process_time() - self._began_cpu_s, device=self._trainer.args.device)
        return Spent(
            self._earlier.seconds + time.perf_counter() - self._began_s,
            self._earlier.cpu_seconds + float(self._trainer.accelerator.reduce(cpu_s, "sum")),
            float(self._trainer.state.total_flos),
        )

    def close(self) -> None:
        """Write no more."""
        if self._log is not None:
            self._log.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._log = MetricsLog(self._directory, state.global_step)
        self._tell(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._job.loop.log_steps == 0 or state.global_step == state.max_steps:
            self._write_metrics(state.global_step)
        self._tell(state)
        if control.should_save:
            self._refuse_weights(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        spent = self.spent()
        # Every process has written its part by then.
        self._trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            path = self._directory / f"checkpoint-{state.global_step}"
            seal(path, self._job.fingerprint, spent)
            prune(self._directory, self._job.loop.keep_saves)

    def _summed(self) -> tuple[float, float, float]:
        """This update's sums over all processes, which begin anew."""
        sums = self._sums if self._sums is not None else torch.zeros(3, device=self._trainer.args.device)
        self._sums = None
        if self._trainer.args.world_size > 1:
            sums = self._trainer.accelerator.reduce(sums, "sum")
        loss, wanted, proposed = sums.tolist()
        return loss, wanted, proposed

    def _refuse(self, update: Update) -> None:
        job, step = self._job, self._trainer.state.global_step + 1
        if update.proposed_a_token > job.max_ascent_nats:
            raise RunawayAscentError(
                f"at step {step} the proposal's answers cost {update.proposed_a_token:.1f} nats per token, "
                f"above `max_ascent_nats` {job.max_ascent_nats:g}; lower {job.objective.advice} "
                f"({job.loop.learning_rate:g})"
            )
        if not (math.isfinite(update.loss) and math.isfinite(update.gradient_norm)):
            raise DivergedError(
                f"at step {step} the loss is {update.loss:g} and its gradient's norm "
                f"{update.gradient_norm:g}; lower `learning_rate` ({job.loop.learning_rate:g})"
            )

    def _refuse_weights(self, step: int) -> None:
        """Weights that are no numbers any more are not saved."""
        # Of a model that is shared out, a process looks at what it has.
        own = (
            getattr(each, "to_local", lambda each=each: each)() for each in self._trainer.model.parameters()
        )
        num_bad = sum(int(not torch.isfinite(parameter).all()) for parameter in own)
        if self._trainer.args.world_size > 1:
            bad = torch.tensor(num_bad, device=self._trainer.args.device)
            num_bad = int(self._trainer.accelerator.reduce(bad, "sum"))
        if num_bad:
            raise DivergedError(
                f"after step {step} weights are not finite; lower `learning_rate` "
                f"({self._job.loop.learning_rate:g})"
            )

    def _tell(self, state: Any) -> None:
        if state.is_world_process_zero:
            self._on_progress(Progress(self._job.stage, state.global_step, state.max_steps, self._note()))

    def _note(self) -> str:
        if not self._recent:
            return ""
        note = f"loss {fmean(update.loss for update in self._recent):.3f}"
        if self._job.objective.reads_proposed:
            note += f", log Q(y') {fmean(-update.proposed / update.num_pairs for update in self._recent):.1f}"
        return note

    def _write_metrics(self, step: int) -> None:
        loop = self._job.loop
        rate = loop.learning_rate * rate_factor(step - 1, len(self._plan.steps), loop)
        seconds = self._earlier.seconds + time.perf_counter() - self._began_s
        self.last = {
            "step": step,
            **self._window.means(reads_proposed=self._job.objective.reads_proposed),
            "learning_rate": rate,
            "seconds": seconds,
        }
        self._window = Window()
        if self._log is not None:
            self._log.write(self.last)
