"""Build the demo bundle from nothing, with what `ram train` is made of: data and configs, and its stages.

The steps follow method §4: warm a proposal up, let it answer the training prompts once, and train every
aligner on wanted answers against the proposal's own. All aligners start from one small model that has read
the proposal's corpus, as one starts from a small pretrained model in earnest.
"""

import dataclasses
import shutil
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ram_core.demo import ALIGNERS, PARTS
from ram_core.demo.corpus import proposal_corpus, tokenizer_texts
from ram_core.demo.data import write_aligner_data, write_corpus
from ram_core.demo.vocabulary import train_tokenizer
from ram_core.progress import OnProgress, Progress, ignore_progress
from ram_core.training.config import (
    DataConfig,
    FitConfig,
    PackageConfig,
    Stage,
    SynthesizeConfig,
    TrainConfig,
    WarmupConfig,
)
from ram_core.training.stages import Layout, run_stages

MAX_CONTEXT_TOKENS = 1024
_NUM_TOKENIZER_CONVERSATIONS = 15_000
_INITIALIZER_RANGE = 0.04  # the usual 0.02 is for wide models; narrow ones start too flat with it

_WARMUP = WarmupConfig(
    batch_size=32,
    optimizer="muon",
    weight_decay=0.01,
    warmup_fraction=0.03,
    final_rate_fraction=0.05,
    max_gradient_norm=1.0,
)
PROPOSAL_TRAINING = replace(_WARMUP, max_steps=2200, learning_rate=4e-3)
BASE_TRAINING = replace(_WARMUP, max_steps=1200, learning_rate=6e-3)
ALIGNER_TRAINING = FitConfig(
    max_steps=300,
    batch_size=32,
    learning_rate=1e-3,
    final_rate_fraction=0.05,
    max_gradient_norm=1.0,
    ascent_weight=1e-3,
)
SYNTHESIS = SynthesizeConfig(temperature=1.0, top_p=1.0, top_k=0, max_answer_tokens=48, device="cpu")


@dataclass(frozen=True)
class ModelShape:
    """Size of a Llama-architecture model; embeddings are tied."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int


@dataclass(frozen=True)
class BuildPlan:
    """How big and how long. The defaults make the shipped bundle; tests shrink everything.

    Aligners use RMSprop as the paper does, at a learning rate fit for 0.3 M parameters. Synthesis samples
    at temperature 1, not at the authors' 0.5: the point of the ascent term is to see the proposal's habits
    in the proportions in which they will be met, and a cold proposal shows only one of its five styles per
    prompt.
    """

    vocab_size: int = 2304
    proposal: ModelShape = ModelShape(256, 3, 8, 4, 32, 768)
    aligner: ModelShape = ModelShape(80, 2, 4, 2, 24, 160)
    num_conversations: int = 70_000
    num_proposal_cycles: int = 2
    num_aligner_prompts: int = 4_000
    proposal_training: WarmupConfig = PROPOSAL_TRAINING
    base_training: WarmupConfig = BASE_TRAINING
    aligner_training: FitConfig = ALIGNER_TRAINING


def build_bundle(
    out_dir: Path,
    *,
    seed: int = 0,
    plan: BuildPlan | None = None,
    work: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> None:
    """Train the bundle from scratch and put it at `out_dir`, replacing a bundle that is there.

    Runs on the CPU with as many threads as torch is set to; the same seed, machine and thread count give
    the same weights. What was begun in `work` goes on there; without it, all work is for once. Raises
    `FileExistsError` if `out_dir` holds anything but a bundle, `RunawayAscentError` if an aligner's training
    diverges; `out_dir` is then untouched.
    """
    _refuse_foreign(out_dir)
    with tempfile.TemporaryDirectory(prefix="ram-demo-") if work is None else nullcontext(work) as place:
        builder = _Builder(Path(place), seed, plan or BuildPlan(), on_progress)
        builder.build()
        for part in PARTS:
            shutil.rmtree(out_dir / part, ignore_errors=True)
            shutil.copytree(builder.bundle / part, out_dir / part)


def _refuse_foreign(out_dir: Path) -> None:
    names = {path.name for path in out_dir.iterdir()} if out_dir.exists() else set()
    if names - set(PARTS):
        raise FileExistsError(
            f"`out_dir` must be empty or hold a bundle, {out_dir} holds {sorted(names)[:5]}"
        )


class _Builder:
    """One build: seed and plan, and a training run for each model."""

    def __init__(self, work: Path, seed: int, plan: BuildPlan, on_progress: OnProgress) -> None:
        self._work = work
        self._seed = seed
        self._plan = plan
        self._on_progress = on_progress
        self.bundle = work / "bundle"

    def build(self) -> None:
        """Make every model; they lie in `bundle` afterwards."""
        plan = self._plan
        shutil.rmtree(self.bundle, ignore_errors=True)
        tokenizer = self._train_tokenizer()
        model = plant(plan.proposal, tokenizer, self._work / "new" / "proposal", seed=self._seed)
        # Each cycle has a fresh corpus, and a learning rate that starts anew.
        for cycle in range(plan.num_proposal_cycles):
            model = self._warm_up(f"proposal-{cycle + 1}", model, self._corpus(cycle), plan.proposal_training)
        shutil.copytree(model, self.bundle / "proposal")
        base = plant(plan.aligner, tokenizer, self._work / "new" / "aligner-base", seed=self._seed)
        base = self._warm_up("aligner-base", base, self._corpus(0), plan.base_training)
        shutil.copytree(base, self.bundle / "aligner-base")
        for name in ALIGNERS:
            self._train_aligner(name)

    def _train_tokenizer(self) -> PreTrainedTokenizerFast:
        corpus = proposal_corpus(self._plan.num_conversations, seed=self._seed)
        texts = tokenizer_texts(corpus[:_NUM_TOKENIZER_CONVERSATIONS])
        tokenizer = train_tokenizer(texts, vocab_size=self._plan.vocab_size, max_length=MAX_CONTEXT_TOKENS)
        self._on_progress(Progress("tokenizer", 1, 1, f"{len(tokenizer)} tokens"))
        return tokenizer

    def _corpus(self, cycle: int) -> Path:
        path = self._work / "data" / f"corpus-{cycle + 1}.jsonl"
        write_corpus(path, self._plan.num_conversations, seed=self._seed + cycle)
        return path

    def _warm_up(self, name: str, model: Path, corpus: Path, training: WarmupConfig) -> Path:
        config = self._config(name, corpus, warmup=replace(training, model=str(model)))
        self._run(name, config, "warmup")
        return Path(config.output) / "warmup" / "model"

    def _train_aligner(self, name: str) -> None:
        data = self._work / "data" / f"{name}.train.jsonl"
        write_aligner_data(data, name, self._plan.num_aligner_prompts, seed=self._seed)
        config = self._config(
            name,
            data,
            proposal=str(self.bundle / "proposal"),
            synthesize=SYNTHESIS,
            fit=replace(self._plan.aligner_training, model=str(self.bundle / "aligner-base")),
            package=PackageConfig(name=name, license="Apache-2.0"),
        )
        if name != "safe":
            self._share_answers(Layout(Path(config.output)))
        self._run(name, config, "synthesize", "fit", "package")
        shutil.copytree(Path(config.output) / "aligner", self.bundle / "aligners" / name)

    def _share_answers(self, to: Layout) -> None:
        """Styles have their prompts in common: the proposal answers them in the first one's run."""
        first = Layout(self._work / "runs" / ALIGNERS[0])
        if first.answers.exists() and not to.answers.exists():
            to.ledger.mkdir(parents=True)
            shutil.copy(first.ledger / "synthesize.json", to.ledger)
            shutil.copy(first.answers, to.answers)

    def _config(self, name: str, data: Path, **sections: Any) -> TrainConfig:
        lengths = DataConfig(str(data), max_prompt_tokens=448, max_tokens=512, too_long="drop")
        return TrainConfig(output=str(self._work / "runs" / name), seed=self._seed, data=lengths, **sections)

    def _run(self, name: str, config: TrainConfig, *stages: Stage) -> None:
        def tell(progress: Progress) -> None:
            self._on_progress(dataclasses.replace(progress, stage=f"{name}: {progress.stage}"))

        run_stages(config, stages, on_progress=tell)


def plant(shape: ModelShape, tokenizer: PreTrainedTokenizerFast, directory: Path, *, seed: int) -> Path:
    """Write a model that has learnt nothing yet, in bfloat16, as what comes of it will be; its directory."""
    torch.manual_seed(seed)
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        max_position_embeddings=MAX_CONTEXT_TOKENS,
        initializer_range=_INITIALIZER_RANGE,
        tie_word_embeddings=True,
        **tokens,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(do_sample=True, **tokens)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    return directory
