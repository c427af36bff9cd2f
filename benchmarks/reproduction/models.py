"""The models that are compared: each fitted once for each seed, by the stages of `ram train`, and kept."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from benchmarks.reproduction.preference import fit_dpo
from ram_core.demo.build import ALIGNER_TRAINING, BASE_TRAINING, SYNTHESIS, BuildPlan, ModelShape, plant
from ram_core.demo.corpus import message
from ram_core.demo.data import write_aligner_data, write_corpus
from ram_core.models.inspection import inspect_pair
from ram_core.models.vocabulary import load_tokenizer
from ram_core.progress import OnProgress
from ram_core.training.config import DataConfig, FitConfig, Stage, TrainConfig
from ram_core.training.records import Message, read_records
from ram_core.training.stages import Layout, run_stages
from ram_core.training.synthesis import read_answers

STYLE = "pirate"
ALPHAS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
ALPHA = 1e-4
SIZES: Mapping[str, ModelShape] = {
    "small": ModelShape(40, 1, 2, 1, 24, 80),
    "medium": BuildPlan.aligner,
    "large": ModelShape(160, 3, 4, 2, 40, 320),
}
REWRITE = message("user", "Rewrite your answer.")
_PROPOSAL_RATE = 3e-4
_DPO_RATE = 1e-4
_DPO_BETA = 0.1


@dataclass(frozen=True)
class Cost:
    """What training took: the fit, and before it the proposal's own answers if it reads them."""

    fit_flops: float = 0.0
    fit_cpu_s: float = 0.0
    synthesis_flops: float = 0.0
    synthesis_cpu_s: float = 0.0

    @property
    def flops(self) -> float:
        return self.fit_flops + self.synthesis_flops

    @property
    def cpu_s(self) -> float:
        return self.fit_cpu_s + self.synthesis_cpu_s


class Models:
    """What one seed trains: data and fits of its own, on the proposal and the bases that all seeds share."""

    def __init__(
        self, work: Path, bundle: Path, seed: int, num_prompts: int, base_steps: int, on_progress: OnProgress
    ) -> None:
        self._work = work
        self._bundle = bundle
        self._home = work / f"seed-{seed}"
        self._seed = seed
        self._num_prompts = num_prompts
        self._base_steps = base_steps
        self._on_progress = on_progress
        self.costs: dict[str, Cost] = {}

    def proposal(self, name: str) -> Path:
        """A frozen model: "base", or what full "sft" or "dpo" made of it."""
        if name == "base":
            return self._bundle / "proposal"
        return self.tuned() if name == "sft" else self.preferring()

    def tuned(self) -> Path:
        """Full supervised training of the proposal."""
        fit = replace(self._fit("sft", self.proposal("base")), learning_rate=_PROPOSAL_RATE)
        return self._run("full-sft", "base", fit)

    def preferring(self) -> Path:
        """DPO of the proposal: wanted answers over its own, with itself as the reference."""
        directory = self._home / "full-dpo"
        answers = self._layout_of_answers("base").answers
        fit = replace(self._fit("ram-dpo", self.proposal("base")), learning_rate=_DPO_RATE)
        summary = fit_dpo(
            self._config("full-dpo", "base", fit), answers, directory, _DPO_BETA, self._on_progress
        )
        self.costs["full-dpo"] = self._with_synthesis(summary, "base")
        return directory / "model"

    def aligner(
        self,
        name: str,
        *,
        objective: str = "ram",
        alpha: float = ALPHA,
        size: str = "medium",
        proposal: str = "base",
    ) -> Path:
        """A small model, trained for its objective against the answers of a proposal."""
        fit = replace(self._fit(objective, self.base(size)), ascent_weight=alpha)
        return self._run(name, proposal, fit)

    def rewriter(self) -> Path:
        """A model of the aligner's size that reads a question and a draft, and writes the answer anew."""
        data = self._home / "rewriter.jsonl"
        records = read_records(str(self._data))
        answers = read_answers(self._layout_of_answers("base").answers)
        with data.open("w", encoding="utf-8") as file:
            for index, record in enumerate(records):
                messages = rewriting(record.messages, answers[index].completion)
                row = {"messages": [*messages, message("assistant", record.wanted)]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        model = self._run("rewriter", "base", self._fit("sft", self.base("medium")), data)
        cost = self.costs["rewriter"]
        self.costs["rewriter"] = self._with_synthesis(
            {"flops": cost.fit_flops, "cpu_seconds": cost.fit_cpu_s}, "base"
        )
        return model

    def base(self, size: str) -> Path:
        """The model that aligners of a size begin as: it has read the proposal's corpus."""
        if size == "medium" and (self._bundle / "aligner-base").is_dir():
            return self._bundle / "aligner-base"
        home = self._work / "bases" / size
        if (home / "warmup" / "summary.json").exists():
            # To find that out from its inputs, the whole corpus would be read.
            return home / "warmup" / "model"
        plan = BuildPlan()
        corpus = self._work / "corpus.jsonl"
        if not corpus.exists():
            write_corpus(corpus, plan.num_conversations, seed=0)
        new = self._work / "new" / size
        if not new.exists():
            plant(SIZES[size], load_tokenizer(str(self.proposal("base"))), new, seed=0)
        config = TrainConfig(
            output=str(home),
            data=self._lengths(corpus),
            warmup=replace(BASE_TRAINING, model=str(new), max_steps=self._base_steps),
        )
        run_stages(config, ["warmup"], on_progress=self._on_progress)
        return home / "warmup" / "model"

    @cached_property
    def _data(self) -> Path:
        path = self._home / "data.jsonl"
        if not path.exists():
            write_aligner_data(path, STYLE, self._num_prompts, seed=self._seed)
        return path

    def _fit(self, objective: str, model: Path) -> FitConfig:
        return replace(ALIGNER_TRAINING, max_steps=0, epochs=1.0, objective=objective, model=str(model))

    def _run(self, name: str, proposal: str, fit: FitConfig, data: Path | None = None) -> Path:
        """The model that a fit makes; what is done already is kept."""
        config = self._config(name, proposal, fit, data)
        stages: list[Stage] = ["fit"]
        if config.needs_synthesis:
            self._share_answers(Layout(Path(config.output)), proposal)
            stages = ["synthesize", "fit"]
        *_, fitted = run_stages(config, stages, on_progress=self._on_progress).stages
        reads = config.needs_synthesis
        self.costs[name] = self._with_synthesis(fitted.summary, proposal if reads else "")
        return Path(config.output) / "fit" / "model"

    def _with_synthesis(self, summary: Mapping[str, Any], proposal: str) -> Cost:
        flops, cpu_s = self._synthesis_cost(proposal) if proposal else (0.0, 0.0)
        return Cost(float(summary["flops"]), float(summary["cpu_seconds"]), flops, cpu_s)

    def _synthesis_cost(self, proposal: str) -> tuple[float, float]:
        """Two operations for each weight and token that is read or written; CPU seconds as measured."""
        layout = self._layout_of_answers(proposal)
        answers = read_answers(layout.answers).values()
        tokenizer = load_tokenizer(str(self.proposal("base")))
        num_prompt = sum(len(tokenizer.apply_chat_template(list(answer.prompt), add_generation_prompt=True,
                                                           return_dict=True)["input_ids"])
                         for answer in answers)  # fmt: skip
        num_tokens = num_prompt + sum(len(answer.token_ids) for answer in answers)
        cpu_s = json.loads((layout.output / "cpu_seconds.json").read_text())
        num_parameters = inspect_pair(str(self.proposal("base")), {}).proposal.num_parameters
        return 2.0 * num_parameters * num_tokens, float(cpu_s)

    def _layout_of_answers(self, proposal: str) -> Layout:
        """The run in which a proposal answers the training prompts: once, for all that read its answers."""
        layout = Layout(self._home / f"answers-{proposal}")
        if not (layout.output / "cpu_seconds.json").exists():
            fit = self._fit("ram", self.base("medium"))
            config = replace(self._config("", proposal, fit), output=str(layout.output))
            began_s = time.process_time()
            run_stages(config, ["synthesize"], on_progress=self._on_progress)
            (layout.output / "cpu_seconds.json").write_text(json.dumps(time.process_time() - began_s))
        return layout

    def _share_answers(self, to: Layout, proposal: str) -> None:
        source = self._layout_of_answers(proposal)
        to.ledger.mkdir(parents=True, exist_ok=True)
        for path in (source.answers, source.ledger / "synthesize.json"):
            target = to.output / path.relative_to(source.output)
            if not target.exists():
                target.write_bytes(path.read_bytes())

    def _config(self, name: str, proposal: str, fit: FitConfig, data: Path | None = None) -> TrainConfig:
        return TrainConfig(
            output=str(self._home / name),
            proposal=str(self.proposal(proposal)),
            seed=self._seed,
            data=self._lengths(data or self._data),
            synthesize=SYNTHESIS,
            fit=fit,
        )

    @staticmethod
    def _lengths(data: Path) -> DataConfig:
        return DataConfig(str(data), max_prompt_tokens=448, max_tokens=512)


def rewriting(messages: Sequence[Message], draft: str) -> tuple[Message, ...]:
    """What the rewriter reads: the conversation, the proposal's draft, and what to do about it."""
    return (*messages, message("assistant", draft), REWRITE)
