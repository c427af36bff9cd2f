"""The training loop: `transformers.Trainer`, told which examples make an update and what its loss is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ram_core.progress import OnProgress
from ram_core.training.batches import BatchPlan, Share, Sharing
from ram_core.training.errors import ConfigError, DivergedError
from ram_core.training.examples import Example, collate
from ram_core.training.flops import PassFlops
from ram_core.training.heads import AnswerHead
from ram_core.training.job import Job
from ram_core.training.monitor import Monitor
from ram_core.training.optimizers import make_optimizer, make_schedule
from ram_core.training.saves import Save, Spent, last_save

OnTrained = Callable[[PreTrainedModel, Mapping[str, Tensor] | None], None]
"""Hears of the trained model in one process; with its weights gathered, where they lie apart."""


@dataclass(frozen=True)
class TrainingSummary:
    """`steps` updates were made at this cost; `metrics` are those of the last ones."""

    steps: int
    spent: Spent
    metrics: dict[str, float]


def train(
    model: PreTrainedModel, job: Job, directory: Path, on_progress: OnProgress, on_trained: OnTrained
) -> TrainingSummary:
    """Train `model` in place, from the last save below `directory` if there is one.

    Saves and `metrics.jsonl` are written there. All processes of a launch call this alike.

    Raises:
        ConfigError: the saves are of another run.
        DataError: there is nothing to train on.
        DivergedError: a loss or a gradient is not finite; nothing of it was saved.
        RunawayAscentError: the proposal's answers became too improbable.
    """
    plan = BatchPlan.of(job.pairs, job.loop, job.seed)
    save = last_save(directory, job.fingerprint)
    if job.loop.activation_checkpointing:
        _checkpoint_activations(model)
    trainer = _PairTrainer(model, job, plan, directory, save, on_progress)
    try:
        trainer.train(resume_from_checkpoint=str(save.path) if save else None)
    except DivergedError as error:
        good = last_save(directory, job.fingerprint)
        kept = f"the last good save is `{good.path}`" if good else "there is no save yet"
        raise type(error)(f"{error}; {kept}") from None
    finally:
        trainer.monitor.close()
    trainer.hand_over(on_trained)
    return TrainingSummary(len(plan.steps), trainer.monitor.spent(), trainer.monitor.last)


class _PairTrainer(Trainer):  # type: ignore[misc] # it has no types
    """A Trainer whose epoch is the whole run, and whose items are the parts of its updates."""

    def __init__(
        self,
        model: PreTrainedModel,
        job: Job,
        plan: BatchPlan,
        directory: Path,
        save: Save | None,
        on_progress: OnProgress,
    ) -> None:
        arguments = _arguments(job, plan, directory)
        self.optimizer: Any
        self.lr_scheduler: Any
        self._job = job
        self._uses_cache = model.config.use_cache
        sharing = Sharing.of(job.loop, arguments.process_index, arguments.world_size)
        arguments.gradient_accumulation_steps = sharing.num_parts
        self._parts = _Parts(job, plan, sharing)
        self._head = AnswerHead(model)
        self._flops = PassFlops.of(model, is_recomputed=job.loop.activation_checkpointing)
        self.monitor = Monitor(self, job, plan, directory, save, on_progress)
        super().__init__(
            model,
            arguments,
            train_dataset=self._parts,
            callbacks=[self.monitor],
            # It says that losses are scaled for the whole update already.
            compute_loss_func=job.objective.losses,
        )
        if self.is_fsdp_enabled and job.loop.optimizer == "muon":
            raise ConfigError("`optimizer` 'muon' needs whole matrices, which FSDP takes apart; use 'adamw'")
        self.remove_callback(PrinterCallback)
        self._clip = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = self._clip_and_judge

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The parts of all updates in order; each process has its own already."""
        return DataLoader(
            self._parts, batch_size=1, collate_fn=_only, pin_memory=self.args.device.type == "cuda"
        )

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model if model is None else model, self._job.loop)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = make_schedule(optimizer or self.optimizer, self._job.loop, num_training_steps)
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This part's addend to the update's loss, times the processes that gradients are averaged over."""
        objective = self._job.objective
        logits = self._head.logits(model, inputs)
        if logits.shape[1] > self._job.vocab_size:  # a slice costs a copy of all gradients
            logits = logits[:, : self._job.vocab_size]
        log_probs = objective.token_log_probs(logits, inputs)
        num_pairs = inputs["num_pairs"]
        num_rows = num_pairs * (2 if objective.reads_proposed else 1)
        sums = log_probs.new_zeros(num_rows).index_add(0, inputs["rows"], log_probs)
        wanted, proposed = sums[:num_pairs], sums[num_pairs:]
        loss: Tensor = objective.losses(wanted, proposed).sum() * inputs["scale"]
        self.monitor.add(loss, wanted, proposed, inputs["is_counted"])
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        return self._flops.of_batch(inputs["input_ids"].numel(), inputs["targets"].numel())

    def hand_over(self, on_trained: OnTrained) -> None:
        """Give the trained model to `on_trained` in the main process; all take part in gathering it."""
        self._head.remove()
        model = self.accelerator.unwrap_model(self.model_wrapped)
        state = self.accelerator.get_state_dict(self.model_wrapped) if self.is_fsdp_enabled else None
        model.config.use_cache = self._uses_cache
        if self.is_world_process_zero():
            on_trained(model, state)
        self.accelerator.wait_for_everyone()

    def _clip_and_judge(self, parameters: Any, max_norm: float, norm_type: int = 2) -> Any:
        norm = self._clip(parameters, max_norm, norm_type)
        self.monitor.judge(float(norm))
        return norm


def _checkpoint_activations(model: Any) -> None:
    """Compute layers again in the backward pass instead of keeping what they computed."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # its name in earlier versions
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _only(items: list[dict[str, Any]]) -> dict[str, Any]:
    (item,) = items
    return item


def _arguments(job: Job, plan: BatchPlan, directory: Path) -> TrainingArguments:
    loop = job.loop
    is_on_cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=len(plan.steps),
        num_train_epochs=1,
        per_device_train_batch_size=1,
        max_grad_norm=loop.max_gradient_norm,
        learning_rate=loop.learning_rate,
        bf16=loop.dtype == "bfloat16" or (loop.dtype == "auto" and is_on_cuda),
        use_cpu=not torch.accelerator.is_available(),
        logging_strategy="no",
        save_strategy="steps",
        save_steps=loop.save_steps or plan.steps_per_epoch,
        # Saves are pruned once a newer one is known to be whole.
        save_total_limit=None,
        seed=job.seed,
        report_to="none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        dataloader_pin_memory=is_on_cuda,
    )
    # One process trains on one device; more of them are `accelerate launch`'s.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


class _Parts(Dataset[dict[str, Any]]):
    """Every part of every update that this process reads, in order."""

    def __init__(self, job: Job, plan: BatchPlan, sharing: Sharing) -> None:
        self._job = job
        self._plan = plan
        self._sharing = sharing

    def __len__(self) -> int:
        return len(self._plan.steps) * self._sharing.num_parts

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, part = divmod(index, self._sharing.num_parts)
        share = self._sharing.share(self._job.pairs, self._plan.steps[step], part)
        pairs = [self._job.pairs[each] for each in share.indices]
        examples = [Example(pair.prompt, pair.wanted) for pair in pairs]
        if self._job.objective.reads_proposed:
            examples += [Example(pair.prompt, pair.proposed) for pair in pairs]
        batch: dict[str, Any] = dict(collate(examples))
        if self._job.extra is not None:
            batch |= self._job.extra.rows(share.indices)
        return batch | {
            "num_pairs": len(pairs),
            "scale": self._scale(share),
            "is_counted": share.is_counted,
        }

    def _scale(self, share: Share) -> float:
        if not share.is_counted:
            return 0.0
        is_per_token = self._job.objective.is_per_token
        whole = share.num_wanted_tokens if is_per_token else share.num_pairs
        return self._sharing.num_processes / whole
