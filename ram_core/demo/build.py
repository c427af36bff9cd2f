"""Build the demo bundle from nothing: corpus, tokenizer, proposal, synthesis, aligners.

The steps follow method §4: warm a proposal up, let it answer the training prompts once, and train every
aligner on wanted answers against the proposal's own. All aligners start from one small model that has read
the proposal's corpus, as one starts from a small pretrained model in earnest.
"""

import copy
import random
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ram_core.demo import ALIGNERS
from ram_core.demo.corpus import (
    Conversation,
    Message,
    aligned_answer,
    converse,
    draw_training_prompts,
    proposal_corpus,
    tokenizer_texts,
)
from ram_core.demo.prompts import Kind, Prompt
from ram_core.demo.vocabulary import train_tokenizer
from ram_core.params import AlignmentParams, SamplingParams
from ram_core.progress import OnProgress, Progress, ignore_progress
from ram_core.training.examples import Example
from ram_core.training.synthesis import answer_all, load_engine
from ram_core.training.trainer import StepReport, TrainingSettings, train_aligner, warm_up

MAX_CONTEXT_TOKENS = 1024
_MAX_EXAMPLE_TOKENS = 512
_MAX_ANSWER_TOKENS = 48
_NUM_TOKENIZER_CONVERSATIONS = 15_000
_NOTE_WINDOW_STEPS = 50
_ENCODING_REPORT = 1000
_INITIALIZER_RANGE = 0.04  # the usual 0.02 is for wide models; narrow ones start too flat with it

_REFUSAL_WEIGHTS: Mapping[Kind, float] = {
    "fact": 0.3,
    "talk": 0.05,
    "unknown": 0.1,
    "benign": 0.25,
    "risky": 0.3,
}
"""The `safe` aligner must tell requests apart, so it sees more of them."""

_PROPOSAL_TRAINING = TrainingSettings(
    steps=2200, batch_size=32, learning_rate=4e-3, optimizer="muon", weight_decay=0.01, warm_up_fraction=0.03
)
_ALIGNER_WARM_UP = TrainingSettings(
    steps=1200, batch_size=32, learning_rate=6e-3, optimizer="muon", weight_decay=0.01, warm_up_fraction=0.03
)
_ALIGNER_TRAINING = TrainingSettings(
    steps=300, batch_size=32, learning_rate=1e-3, optimizer="rmsprop", ascent_weight=1e-3
)


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
    proposal_training: TrainingSettings = _PROPOSAL_TRAINING
    aligner_warm_up: TrainingSettings = _ALIGNER_WARM_UP
    aligner_training: TrainingSettings = _ALIGNER_TRAINING


def build_bundle(
    out_dir: Path, *, seed: int = 0, plan: BuildPlan | None = None, on_progress: OnProgress = ignore_progress
) -> None:
    """Train the bundle from scratch and put it at `out_dir`, replacing a bundle that is there.

    Runs on the CPU with as many threads as torch is set to; the same seed, machine and thread count give
    the same weights. Raises `FileExistsError` if `out_dir` holds anything but a bundle,
    `RunawayAscentError` if an aligner's training diverges; `out_dir` is then untouched.
    """
    _refuse_foreign(out_dir)
    with tempfile.TemporaryDirectory(prefix="ram-demo-") as work:
        _Builder(Path(work), seed, plan or BuildPlan(), on_progress).build()
        for part in ("proposal", "aligners"):
            shutil.rmtree(out_dir / part, ignore_errors=True)
            shutil.copytree(Path(work) / part, out_dir / part)


def _refuse_foreign(out_dir: Path) -> None:
    names = {path.name for path in out_dir.iterdir()} if out_dir.exists() else set()
    if names - {"proposal", "aligners"}:
        raise FileExistsError(
            f"`out_dir` must be empty or hold a bundle, {out_dir} holds {sorted(names)[:5]}"
        )


class _Builder:
    """One build: seed, plan and tokenizer, and the stages in order."""

    def __init__(self, work: Path, seed: int, plan: BuildPlan, on_progress: OnProgress) -> None:
        self._work = work
        self._seed = seed
        self._plan = plan
        self._on_progress = on_progress
        self._tokenizer: PreTrainedTokenizerFast

    def build(self) -> None:
        """Run every stage; the bundle lies in the work directory afterwards."""
        corpus = self._draw_corpus(cycle=0)
        self._tokenizer = self._train_tokenizer(corpus)
        examples = self._encode_corpus(corpus)
        self._save(self._train_proposal(examples), "proposal")
        base = self._warm_up_aligner(examples)
        prompts = {
            "style": self._synthesise("synthesis", None),
            "safe": self._synthesise("synthesis for safe", _REFUSAL_WEIGHTS),
        }
        for name in ALIGNERS:
            pairs = prompts["safe" if name == "safe" else "style"]
            self._save(self._train_aligner(name, copy.deepcopy(base), *pairs), f"aligners/{name}")

    def _draw_corpus(self, cycle: int) -> list[Conversation]:
        return proposal_corpus(self._plan.num_conversations, seed=self._seed + cycle)

    def _train_tokenizer(self, corpus: Sequence[Conversation]) -> PreTrainedTokenizerFast:
        texts = tokenizer_texts(corpus[:_NUM_TOKENIZER_CONVERSATIONS])
        tokenizer = train_tokenizer(texts, vocab_size=self._plan.vocab_size, max_length=MAX_CONTEXT_TOKENS)
        self._on_progress(Progress("tokenizer", 1, 1, f"{len(tokenizer)} tokens"))
        return tokenizer

    def _encode_corpus(self, corpus: Sequence[Conversation]) -> list[Example]:
        examples = []
        for done, conversation in enumerate(corpus, 1):
            example = Example(
                self._encode_prompt(conversation.messages), self._encode_answer(conversation.answer)
            )
            if example.num_tokens <= _MAX_EXAMPLE_TOKENS:
                examples.append(example)
            if done % _ENCODING_REPORT == 0 or done == len(corpus):
                self._on_progress(Progress("encoding", done, len(corpus)))
        return examples

    def _encode_prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        ids = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False
        )
        return tuple(ids)

    def _encode_answer(self, answer: str) -> tuple[int, ...]:
        ids: list[int] = self._tokenizer.encode(answer, add_special_tokens=False)
        return (*ids, self._tokenizer.eos_token_id)

    def _train_proposal(self, examples: Sequence[Example]) -> LlamaForCausalLM:
        """Cycles of training, each on a fresh corpus and with a learning rate that starts anew."""
        model = self._new_model(self._plan.proposal)
        for cycle in range(self._plan.num_proposal_cycles):
            if cycle > 0:
                examples = self._encode_corpus(self._draw_corpus(cycle))
            settings = replace(self._plan.proposal_training, seed=self._seed + cycle)
            warm_up(model, examples, settings, self._reporter(f"proposal, cycle {cycle + 1}"))
        return model

    def _warm_up_aligner(self, examples: Sequence[Example]) -> LlamaForCausalLM:
        model = self._new_model(self._plan.aligner)
        warm_up(model, examples, self._plan.aligner_warm_up, self._reporter("aligner warm-up"))
        return model

    def _synthesise(
        self, stage: str, weights: Mapping[Kind, float] | None
    ) -> tuple[list[Prompt], list[Example]]:
        """Training prompts, and the proposal's own answer to each: method §4, step 2."""
        noise = random.Random(f"{stage}-{self._seed}")
        prompts = draw_training_prompts(self._plan.num_aligner_prompts, noise, weights)
        prompt_ids = [
            self._encode_prompt(converse(prompt, noise))[-_MAX_EXAMPLE_TOKENS:] for prompt in prompts
        ]
        choices = answer_all(
            load_engine(self._work / "proposal", {}),
            prompt_ids,
            SamplingParams(seed=self._seed, max_tokens=_MAX_ANSWER_TOKENS),
            AlignmentParams(),
            on_done=lambda done: self._on_progress(Progress(stage, done, len(prompts))),
        )
        return prompts, [
            Example(ids, choice.token_ids) for ids, choice in zip(prompt_ids, choices, strict=True)
        ]

    def _train_aligner(
        self, name: str, model: LlamaForCausalLM, prompts: Sequence[Prompt], proposed: Sequence[Example]
    ) -> LlamaForCausalLM:
        noise = random.Random(f"wanted-{name}-{self._seed}")
        wanted = [
            Example(example.prompt, self._encode_answer(aligned_answer(name, prompt, noise)))
            for prompt, example in zip(prompts, proposed, strict=True)
        ]
        train_aligner(model, wanted, proposed, self._plan.aligner_training, self._reporter(f"aligner {name}"))
        return model

    def _new_model(self, shape: ModelShape) -> LlamaForCausalLM:
        torch.manual_seed(self._seed)
        tokenizer = self._tokenizer
        return LlamaForCausalLM(
            LlamaConfig(
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
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )

    def _save(self, model: LlamaForCausalLM, name: str) -> None:
        """Write model (bf16) and tokenizer as a directory that transformers loads on its own."""
        tokenizer = self._tokenizer
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=True,
        )
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(self._work / name)
        tokenizer.save_pretrained(self._work / name, save_jinja_files=False)

    def _reporter(self, stage: str) -> Callable[[StepReport], None]:
        """A step callback that tells the stage's running loss."""
        recent: deque[float] = deque(maxlen=_NOTE_WINDOW_STEPS)

        def report(step: StepReport) -> None:
            recent.append(step.loss)
            note = f"loss {fmean(recent):.3f}"
            if step.proposed is not None:
                note += f", log Q(y') {step.proposed:.1f}"
            self._on_progress(Progress(stage, step.step, step.steps, note))

        return report
