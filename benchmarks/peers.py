"""Other ways to generate: what a research script does, a batching library, a chain of two models."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.engine_way import EngineWay, Job
from ram_core.engine.memory import keep_freed_memory

TOP_P = 0.95


def _load(source: str, job: Job) -> PreTrainedModel:
    # No peer shall be slower for want of what we do to the process.
    keep_freed_memory()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, job.dtype))
    return model.eval().to(job.device)


class AuthorsWay:
    """Two eager models with a `DynamicCache` each, one request at a time, as a research script does it."""

    def __init__(self, job: Job) -> None:
        self._models = _load(job.proposal, job), _load(job.aligners[0], job)
        self._device = job.device

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        """Continue one prompt after the other; return the seconds it took."""
        began = time.perf_counter()
        for prompt in prompts:
            ids = torch.tensor([prompt], device=self._device)
            caches = DynamicCache(), DynamicCache()
            for _ in range(num_tokens):
                logits = [
                    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[
                        :, -1
                    ]
                    for model, cache in zip(self._models, caches, strict=True)
                ]
                ids = _draw(*logits)
                # As a script would: look at each token for the end of the text.
                ids.item()
        return time.perf_counter() - began


def _draw(proposal_logits: torch.Tensor, aligner_logits: torch.Tensor) -> torch.Tensor:
    p = proposal_logits.float().softmax(-1)
    mass, order = p.sort(-1, descending=True)
    outside = mass.cumsum(-1) - mass >= TOP_P
    scores = p.log() + aligner_logits.float().log_softmax(-1)
    scores = scores.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1)


class ContinuousBatching:
    """transformers' own continuous batching of the proposal alone, at its best.

    It draws from the plain distribution (its default cuts to the 50 most probable, which costs it time), it
    takes the attention that is faster for a batch's size, it keeps its memory and its graphs between calls,
    and its pages are limited to what the batch needs: left alone it takes most of the machine's memory.
    """

    # Left alone, it takes flash attention where there is any.
    _ATTENTIONS = ("sdpa", "paged|eager")

    def __init__(self, job: Job) -> None:
        self._model = _load(job.proposal, job)
        self._limits = ContinuousBatchingConfig(num_blocks=4 * job.max_batch, max_batch_tokens=4096)
        self._best: dict[int, str] = {}
        self._attention = ""

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        """Continue all prompts by so many tokens; return the seconds it took.

        Raises:
            RuntimeError: not every prompt was continued so far.
        """
        if len(prompts) not in self._best:
            slopes = {name: self._slope(prompts, name) for name in self._ATTENTIONS}
            self._best[len(prompts)] = min(slopes, key=lambda name: slopes[name])
        return self._run(prompts, num_tokens, self._best[len(prompts)])

    def attention(self, batch: int) -> str:
        """What it chose for a batch of this size."""
        return self._best[batch]

    def _slope(self, prompts: Sequence[Sequence[int]], attention: str) -> float:
        """Seconds between a short and a longer answer."""
        self._run(prompts, 2, attention)
        return self._run(prompts, 20, attention) - self._run(prompts, 4, attention)

    def _run(self, prompts: Sequence[Sequence[int]], num_tokens: int, attention: str) -> float:
        if attention != self._attention:
            self._model.destroy_cached_continuous_batching_manager()
            self._model.set_attn_implementation(attention)
            self._attention = attention
        config = GenerationConfig(
            max_new_tokens=num_tokens, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=2
        )
        began = time.perf_counter()
        found = self._model.generate_batch(
            inputs=[list(prompt) for prompt in prompts],
            generation_config=config,
            continuous_batching_config=self._limits,
            persistent_manager=True,
            # It captures its graphs then.
            warmup=self._model.device.type == "cuda",
        )
        took_s = time.perf_counter() - began
        if [len(output.generated_tokens) for output in found.values()] != [num_tokens] * len(prompts):
            raise RuntimeError("transformers did not continue every prompt")
        return took_s


class RewriteChain:
    """The proposal drafts a whole answer; a second model, of the aligner's size, then rewrites it.

    So do methods that correct an answer after the fact. Both run on our engine: the chain's cost is the
    chain's, not that of a slower engine.
    """

    def __init__(self, drafts: Job, rewrites: Job) -> None:
        self._drafts, self._rewrites = EngineWay(drafts), EngineWay(rewrites)

    def first_token(self, prompt: Sequence[int], draft: Sequence[int]) -> tuple[float, float]:
        """Seconds until the rewritten answer's first token, and those of them that the draft took.

        `draft` stands for what was drafted, token by token, in the prompt of the rewriting.
        """
        draft_s = self._drafts.generate([prompt], len(draft))
        return draft_s + self._rewrites.generate([[*prompt, *draft]], 1), draft_s
