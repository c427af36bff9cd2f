"""The ways to generate that are compared. Each loads once and then generates on demand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.messages import Request, TokenEvent
from ram_core.params import AlignerTerm, AlignmentParams, SamplingParams

TOP_P = 0.95


@dataclass(frozen=True, slots=True)
class Job:
    """What a way is asked to do, and with which models."""

    proposal: str
    aligner: str
    device: str
    dtype: str
    max_batch: int


Generate = Callable[[list[list[int]], int], float]
"""Continue all prompts by so many tokens; return the seconds until the first token existed."""


def ours(job: Job, *, aligned: bool) -> Generate:
    """Our engine in this process, with the aligner or with the identity."""
    config = EngineConfig(
        proposal=job.proposal,
        aligners=(AlignerSource("aligner", job.aligner),) if aligned else (),
        device=job.device,
        dtype=job.dtype,
        max_batch=job.max_batch,
        max_step_tokens=4096,
    )
    engine = Engine.load(config)
    alignment = AlignmentParams((AlignerTerm("aligner"),)) if aligned else AlignmentParams()

    def generate(prompts: list[list[int]], num_tokens: int) -> float:
        began = time.perf_counter()
        first = 0.0
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=1)
        for index, prompt in enumerate(prompts):
            engine.handle(Request(str(index), tuple(prompt), sampling, alignment))
        while engine.has_work:
            told = engine.step()
            if not first and any(isinstance(event, TokenEvent) for event in told):
                first = time.perf_counter() - began
        return first

    return generate


def _load(source: str, job: Job) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, job.dtype))
    return model.eval().to(job.device)


def authors_way(job: Job) -> Generate:
    """Two eager models with a `DynamicCache` each, one request at a time, as a research script does it."""
    proposal, aligner = _load(job.proposal, job), _load(job.aligner, job)

    def draw(proposal_logits: torch.Tensor, aligner_logits: torch.Tensor) -> torch.Tensor:
        p = proposal_logits.float().softmax(-1)
        mass, order = p.sort(-1, descending=True)
        outside = mass.cumsum(-1) - mass >= TOP_P
        scores = p.log() + aligner_logits.float().log_softmax(-1)
        scores = scores.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
        return torch.multinomial(scores.softmax(-1), 1)

    @torch.inference_mode()
    def one(prompt: list[int], num_tokens: int) -> float:
        began = time.perf_counter()
        first = 0.0
        ids = torch.tensor([prompt], device=job.device)
        caches = DynamicCache(), DynamicCache()
        for _ in range(num_tokens):
            logits = [
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                for model, cache in zip((proposal, aligner), caches, strict=True)
            ]
            ids = draw(*logits)
            # As a script would: look at each token for the end of the text.
            ids.item()
            first = first or time.perf_counter() - began
        return first

    def generate(prompts: list[list[int]], num_tokens: int) -> float:
        firsts = [one(prompt, num_tokens) for prompt in prompts]
        return firsts[0]

    return generate


def continuous_batching(job: Job) -> Generate:
    """transformers' own continuous batching of the proposal alone.

    Its pages are limited to what the batch needs; left alone it takes most of the machine's memory.
    """
    model = _load(job.proposal, job)
    limits = ContinuousBatchingConfig(num_blocks=4 * job.max_batch, max_batch_tokens=4096)

    def generate(prompts: list[list[int]], num_tokens: int) -> float:
        config = GenerationConfig(
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=True,
            eos_token_id=-1,
            pad_token_id=2,
        )
        model.generate_batch(
            inputs=prompts,
            generation_config=config,
            continuous_batching_config=limits,
            warmup=False,
        )
        return float("nan")

    return generate


WAYS: dict[str, Callable[[Job], Generate]] = {
    "aligned": lambda job: ours(job, aligned=True),
    "identity": lambda job: ours(job, aligned=False),
    "authors": authors_way,
    "transformers": continuous_batching,
}
