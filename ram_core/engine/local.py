"""The engine in the caller's own thread: for scripts, synthesis and evaluation, and tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ram_core.engine.config import EngineConfig
from ram_core.engine.engine import Engine
from ram_core.engine.load_bank import Progress
from ram_core.engine.messages import (
    AlignerFailed,
    AlignerLoaded,
    AlignerOutcome,
    AlignerProgress,
    FailedEvent,
    FinishReason,
    FreeAligner,
    LoadAligner,
    Request,
    StepTelemetry,
    TokenEvent,
)
from ram_core.errors import CheckpointError, RamError
from ram_core.params import AlignmentParams, SamplingParams


@dataclass(frozen=True, slots=True)
class Choice:
    """One continuation. `token_ids` ends with the stop token if `finish_reason` is "stop".

    `log_probs` and `telemetry` have one entry a token; `telemetry` is empty for the identity aligner.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    telemetry: tuple[StepTelemetry, ...]
    finish_reason: FinishReason


def _choice_of(events: Sequence[TokenEvent], reason: FinishReason) -> Choice:
    return Choice(
        token_ids=tuple(event.token_id for event in events),
        log_probs=tuple(event.log_prob for event in events),
        telemetry=tuple(event.telemetry for event in events if event.telemetry is not None),
        finish_reason=reason,
    )


class LocalEngine:
    """Batched generation without a server.

    >>> engine = LocalEngine.load(EngineConfig(proposal="…", aligners=(AlignerSource("polite", "…"),)))
    >>> prompt = engine.encode_chat([{"role": "user", "content": "Hello!"}])
    >>> [choice] = engine.generate([prompt], alignment=AlignmentParams((AlignerTerm("polite"),)))
    >>> engine.text(choice)
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def load(cls, config: EngineConfig, progress: Progress = lambda _: None) -> LocalEngine:
        """Load what `config` names. Raises `CheckpointError` if any of it cannot be served."""
        return cls(Engine.load(config, progress))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the proposal and all aligners share."""
        return self.engine.bank.tokenizer

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation, ready for the assistant's answer."""
        encoded = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return tuple(encoded["input_ids"])

    def generate(
        self,
        prompts: Iterable[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 - frozen
        alignment: AlignmentParams = AlignmentParams(),  # noqa: B008 - frozen
        *,
        on_finish: Callable[[int, Choice], None] = lambda index, choice: None,
    ) -> list[Choice]:
        """Continue every prompt (token ids) once; results in the order of the prompts.

        `sampling` is for all prompts, or one for each. `on_finish(index, choice)` is called as each is done.

        Raises:
            RamError: a prompt that cannot be served (nothing was generated then), or a model that failed.
        """
        requests = _make_requests([tuple(prompt) for prompt in prompts], sampling, alignment)
        for request in requests:
            self.engine.limits.check(request)
        for request in requests:
            self.engine.handle(request)
        growing: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
        done: dict[int, Choice] = {}
        failure: RamError | None = None
        while self.engine.has_work:
            for event in self.engine.step():
                if isinstance(event, FailedEvent):
                    failure = event.error
                elif isinstance(event, TokenEvent):
                    growing[event.request_id].append(event)
                    if event.finish_reason is not None:
                        index = int(event.request_id)
                        done[index] = _choice_of(growing.pop(event.request_id), event.finish_reason)
                        on_finish(index, done[index])
        if failure is not None:
            raise failure
        return [done[index] for index in range(len(requests))]

    def load_aligner(self, order: LoadAligner) -> AlignerLoaded:
        """Bring another aligner into memory, and wait until it can be asked for.

        Raises:
            CheckpointError: it cannot be served; nothing has changed.
        """
        outcome = self._wait_for(order)
        if isinstance(outcome, AlignerFailed):
            raise CheckpointError(outcome.reason)
        assert isinstance(outcome, AlignerLoaded)
        return outcome

    def free_aligner(self, aligner: str) -> None:
        """Give the memory of an aligner back."""
        self._wait_for(FreeAligner(aligner))

    def _wait_for(self, order: LoadAligner | FreeAligner) -> AlignerOutcome:
        woken = threading.Event()
        self.engine.wake = woken.set
        self.engine.handle(order)
        while True:
            for outcome in self.engine.tend():
                if outcome.aligner == order.aligner and not isinstance(outcome, AlignerProgress):
                    return outcome
            woken.wait()
            woken.clear()

    def text(self, choice: Choice) -> str:
        """A choice's text, without its special tokens."""
        return str(self.tokenizer.decode(choice.token_ids, skip_special_tokens=True))


def _make_requests(
    prompts: list[tuple[int, ...]],
    sampling: SamplingParams | Sequence[SamplingParams],
    alignment: AlignmentParams,
) -> list[Request]:
    each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
    return [
        Request(str(index), prompt, own, alignment)
        for index, (prompt, own) in enumerate(zip(prompts, each, strict=True))
    ]
