"""A training run: its stages in order, each begun once, resumed if it was interrupted, and kept when done."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from ram_core.aligners.manifest import read_manifest
from ram_core.aligners.names import require_name
from ram_core.progress import OnProgress, ignore_progress
from ram_core.training.config import FREE_FIELDS, STAGES, Stage, TrainConfig
from ram_core.training.errors import ConfigError, TrainingError
from ram_core.training.examples import TrainingPair
from ram_core.training.fingerprints import ids_fingerprint, model_fingerprint
from ram_core.training.fit import LOG_PROBS_DIR, fit_model, warm_up_model
from ram_core.training.inputs import Inputs, read_inputs
from ram_core.training.ledger import Ledger, StageRecord, only_run_in, plain_inputs
from ram_core.training.packaging import Judge, install, package
from ram_core.training.provenance import wishes_of
from ram_core.training.synthesis import read_answers, synthesize

Outcome = Literal["done", "resumed", "kept"]

# In milliseconds it must be less than 2³¹.
_LONG = timedelta(days=20)


@dataclass(frozen=True, slots=True)
class StageReport:
    """What came of a stage: "kept" if it was done already, "resumed" if it had been interrupted."""

    stage: Stage
    outcome: Outcome
    seconds: float
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run did, and what lies where; `aligner` and `installed` are None where there is none."""

    output: Path
    proposal: str
    notes: tuple[str, ...]
    stages: tuple[StageReport, ...]
    name: str = ""
    version: str = ""
    aligner: Path | None = None
    installed: Path | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie below a run's output."""

    output: Path

    @property
    def warmup(self) -> Path:
        return self.output / "warmup"

    @property
    def answers(self) -> Path:
        return self.output / "synthesis.jsonl"

    @property
    def fit(self) -> Path:
        return self.output / "fit"

    @property
    def aligner(self) -> Path:
        return self.output / "aligner"

    @property
    def ledger(self) -> Path:
        return self.output / "stages"

    def product(self, stage: Stage) -> Path:
        """What a stage makes."""
        products = {"warmup": self.warmup, "synthesize": self.answers, "fit": self.fit}
        return products.get(stage, self.aligner)


def run_stages(
    config: TrainConfig,
    stages: Sequence[Stage] = (),
    *,
    restart: bool = False,
    install_into: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> RunReport:
    """Run the stages that the config asks for, or of these only `stages`, in their order.

    A stage that is done is kept if its inputs are the same, and one that was interrupted goes on. With
    `restart`, those of `stages`, or if none is named all whose inputs have changed, begin anew. In a launch
    of several processes all call this; the first alone synthesises, packages, and tells of its progress.

    Raises:
        TrainingError: the config or data is not fit for it, inputs have changed, a stage before is not done,
            or training diverged.
        CheckpointError, VocabularyMismatch: a model cannot be used.
        OSError: something cannot be written. What was finished before stays, whatever is raised.
    """
    group = ProcessGroup()
    lock = only_run_in(Path(config.output)) if group.is_main else nullcontext()
    with lock:
        run = _Run(config, stages, group, restart, on_progress if group.is_main else ignore_progress)
        reports = [run.take(stage) for stage in run.stages]
        report = run.report(reports)
        if install_into is None or report.aligner is None or not group.is_main:
            return report
        judge = Judge(report.proposal, trust_remote_code=config.trust_remote_code)
        return replace(report, installed=install(report.aligner, install_into, judge))


class ProcessGroup:
    """The processes of a launch (`accelerate launch`, `torchrun`); without one, this process alone."""

    def __init__(self) -> None:
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        self._size = int(os.environ.get("WORLD_SIZE", "1"))

    def wait(self) -> None:
        """Go on when all processes are here, however long the first one works alone."""
        if self._size > 1:
            from accelerate import PartialState

            # The trainer finds the group that is made here, by the same rule.
            PartialState(cpu=not torch.accelerator.is_available(), timeout=_LONG).wait_for_everyone()


class _Run:
    """The state of one run; every process of a launch has one, and they take the same decisions."""

    def __init__(
        self,
        config: TrainConfig,
        stages: Sequence[Stage],
        group: ProcessGroup,
        restart: bool,
        on_progress: OnProgress,
    ) -> None:
        self._layout = Layout(Path(config.output))
        self._ledger = Ledger(self._layout.ledger)
        self._group = group
        self._restarted = set(stages) if restart else set()
        self._restarts_changed = restart and not stages
        self._on_progress = on_progress
        self._known_inputs: dict[Stage, dict[str, Any]] = {}
        self.stages = _wanted_stages(config, stages)
        self._name = _aligner_name(config)
        self._inputs: Inputs = read_inputs(config, self.stages, on_progress)
        if config.warmup.model:
            config = msgspec.structs.replace(config, proposal=str(self._layout.warmup / "model"))
        # The limits are those that hold, for all that reads them later.
        self._config = msgspec.structs.replace(config, data=self._inputs.data)

    def take(self, stage: Stage) -> StageReport:
        """Do one stage, or what is left to do of it."""
        start_s = time.monotonic()
        self._group.wait()
        inputs = self._inputs_of(stage)
        record = self._judged(stage, inputs)
        self._group.wait()
        if record is not None and record.is_done:
            return StageReport(stage, "kept", 0.0, record.summary)
        if self._group.is_main and record is None:
            self._begin(stage, inputs)
        self._group.wait()
        summary = self._work(stage)
        self._group.wait()
        if self._group.is_main:
            self._ledger.write(stage, StageRecord(inputs, is_done=True, summary=summary))
        outcome: Outcome = "done" if record is None else "resumed"
        return StageReport(stage, outcome, time.monotonic() - start_s, summary)

    def report(self, reports: list[StageReport]) -> RunReport:
        """What there is now, of this run and of those before."""
        manifest = read_manifest(self._layout.aligner) if self._layout.aligner.is_dir() else None
        return RunReport(
            self._layout.output,
            self._config.proposal,
            self._inputs.notes,
            tuple(reports),
            name=manifest.name if manifest else "",
            version=manifest.version if manifest else "",
            aligner=self._layout.aligner if manifest else None,
        )

    def _judged(self, stage: Stage, inputs: dict[str, Any]) -> StageRecord | None:
        """The stage's record if it is to be kept or to go on; None if it is to begin."""
        record = self._ledger.read(stage)
        product = self._layout.product(stage)
        if record is None and product.exists():
            # Not even a restart may take away what it did not make.
            raise TrainingError(
                f"`{product}` is there, but not by this run; remove it, or choose another `output`"
            )
        if record is None or stage in self._restarted:
            return None
        if record.inputs != inputs:
            # An aligner is packed in a moment, and replaced as a whole.
            if self._restarts_changed or stage == "package":
                return None
            raise TrainingError(_changed_inputs(stage, record.inputs, inputs))
        return record if product.exists() or not record.is_done else None

    def _begin(self, stage: Stage, inputs: dict[str, Any]) -> None:
        """Take away what an earlier run made with other inputs, and write down with which it is made now."""
        self._ledger.forget(stage)
        product = self._layout.product(stage)
        if stage == "synthesize":
            product.unlink(missing_ok=True)
        elif stage != "package" and product.exists():
            for path in product.iterdir():
                # The proposal's log-probabilities know themselves what they were made of.
                if path.is_dir() and path.name != LOG_PROBS_DIR:
                    shutil.rmtree(path)
                elif path.is_file():
                    path.unlink()
        self._ledger.write(stage, StageRecord(inputs))

    def _inputs_of(self, stage: Stage) -> dict[str, Any]:
        """All that decides what comes of a stage, once the stages before it are done."""
        if stage not in self._known_inputs:
            self._known_inputs[stage] = plain_inputs(self._find_inputs(stage))
        return self._known_inputs[stage]

    def _find_inputs(self, stage: Stage) -> dict[str, Any]:
        config, pairs = self._config, self._inputs.encoded.pairs
        if stage == "warmup":
            learnt = ids_fingerprint((pair.prompt, pair.wanted) for pair in pairs)
            return {"model": model_fingerprint(config.warmup.model), "data": learnt, "seed": config.seed,
                    "settings": _settings(config.warmup)}  # fmt: skip
        if stage == "synthesize":
            return self._synthesis_inputs()
        if stage == "fit":
            learnt = ids_fingerprint((pair.prompt, pair.wanted, pair.proposed) for pair in self._fit_pairs)
            inputs = {"model": model_fingerprint(config.fit.model), "data": learnt, "seed": config.seed,
                      "settings": _settings(config.fit)}  # fmt: skip
            if config.fit.objective == "ram-token":
                inputs["proposal"] = model_fingerprint(self._proposal())
            return inputs
        self._require_done("fit")
        return {"model": model_fingerprint(str(self._layout.fit / "model")),
                "settings": config.package, "name": self._name}  # fmt: skip

    def _synthesis_inputs(self) -> dict[str, Any]:
        config = self._config
        settings = msgspec.structs.asdict(config.synthesize)
        # Which machine answered, and how many answers at once, makes no difference to what is asked of it.
        settings = {name: settings[name] for name in settings if name not in ("device", "max_batch")}
        pairs = self._inputs.encoded.pairs
        rows = ((pair.prompt, pair.proposed if config.synthesize.from_rejected else ()) for pair in pairs)
        return {"proposal": model_fingerprint(self._proposal()), "prompts": ids_fingerprint(rows),
                "num_prompts": len(pairs), "max_tokens": config.data.max_tokens, "seed": config.seed,
                "settings": settings}  # fmt: skip

    @cached_property
    def _fit_pairs(self) -> list[TrainingPair]:
        """What the aligner is trained on: with the proposal's answers, where the objective reads them."""
        pairs = self._inputs.encoded.pairs
        if not self._config.needs_synthesis:
            return [TrainingPair(pair.prompt, pair.wanted) for pair in pairs]
        self._require_done("synthesize")
        answers = read_answers(self._layout.answers)
        if set(answers) != set(range(len(pairs))):
            raise TrainingError(
                f"`{self._layout.answers}` answers {len(answers)} of {len(pairs)} prompts; "
                "run the stage `synthesize` with --restart"
            )
        return [
            TrainingPair(pair.prompt, pair.wanted, answers[index].token_ids)
            for index, pair in enumerate(pairs)
        ]

    def _proposal(self) -> str:
        if self._config.warmup.model:
            self._require_done("warmup")
        return self._config.proposal

    def _require_done(self, stage: Stage) -> None:
        """Raise TrainingError unless a stage is done, and with the inputs that it would have now."""
        record = self._ledger.read(stage)
        if record is None or not record.is_done or not self._layout.product(stage).exists():
            raise TrainingError(
                f"the stage `{stage}` comes first and is not done; run it with --stage {stage}"
            )
        inputs = self._inputs_of(stage)
        if record.inputs != inputs:
            raise TrainingError(_changed_inputs(stage, record.inputs, inputs))

    def _work(self, stage: Stage) -> dict[str, Any]:
        """Do a stage's share of this process; what came of it, on the main one."""
        config, layout = self._config, self._layout
        if stage == "warmup":
            pairs = [TrainingPair(pair.prompt, pair.wanted) for pair in self._inputs.encoded.pairs]
            return _plain(warm_up_model(config, pairs, layout.warmup, self._on_progress))
        if stage == "fit":
            return _plain(fit_model(config, self._fit_pairs, layout.fit, self._on_progress))
        if not self._group.is_main:
            return {}
        if stage == "synthesize":
            return _plain(
                synthesize(config, config.proposal, self._inputs.encoded, layout.answers, self._on_progress)
            )
        fitted = self._ledger.read("fit")
        assert fitted is not None
        wishes = wishes_of(config, self._name, self._inputs, fitted.summary)
        judge = Judge(config.proposal, trust_remote_code=config.trust_remote_code)
        manifest = package(layout.fit / "model", layout.aligner, wishes, judge)
        return {"name": manifest.name, "version": manifest.version}


def _wanted_stages(config: TrainConfig, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    if stages:
        return tuple(stage for stage in STAGES if stage in stages)
    needed: dict[Stage, bool] = {"warmup": bool(config.warmup.model), "synthesize": config.needs_synthesis}
    return tuple(stage for stage in STAGES if needed.get(stage, True))


def _aligner_name(config: TrainConfig) -> str:
    """The name that the aligner is packed under; that of the output directory if none is given."""
    if config.package.name:
        return config.package.name
    try:
        return require_name(Path(config.output).resolve().name)
    except ValueError as error:
        raise ConfigError(
            f"`package.name` must be given, as `output` is no name for an aligner: {error}"
        ) from None


def _settings(config: msgspec.Struct) -> dict[str, Any]:
    settings = msgspec.structs.asdict(config)
    # The model is known by its files, wherever they lie.
    return {name: value for name, value in settings.items() if name not in FREE_FIELDS | {"model"}}


def _changed_inputs(stage: Stage, before: dict[str, Any], now: dict[str, Any]) -> str:
    changes = "; ".join(_differences(before, now))
    return (
        f"`{stage}` was begun with other inputs ({changes}); "
        "add --restart to do it anew, or choose another `output`"
    )


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs, in words: values if they are short, names alone of fingerprints."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*now, *(key for key in before if key not in now)]
        pairs = [(before.get(key), now.get(key), key) for key in names]
        return [line for was, is_, key in pairs if was != is_ for line in _differences(was, is_, key)]
    is_long = any(isinstance(value, str) and len(value) == 64 for value in (before, now))
    return [f"{name} has changed" if is_long else f"{name} was {before!r} and is {now!r}"]


def _plain(summary: object) -> dict[str, Any]:
    """A summary as it is written down."""
    return plain_inputs(msgspec.to_builtins(summary))
