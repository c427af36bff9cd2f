"""The proposal's own answers: sampled once through the engine, and kept in a file that grows by lines.

Also many prompts answered at once by a proposal, alone or under aligners, for evaluation.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.local import Choice, LocalEngine
from ram_core.models.loading import resolve_device
from ram_core.models.source import one_line
from ram_core.params import SamplingParams
from ram_core.progress import OnProgress, Progress
from ram_core.training.checkpoints import no_bars
from ram_core.training.config import SynthesizeConfig, TrainConfig
from ram_core.training.encoding import Encoded
from ram_core.training.errors import DataError
from ram_core.training.records import Message
from ram_core.training.saves import write_aside

REJECTED = "rejected"
"""In place of a finish reason: the answer was not sampled, but is a preference record's rejected one."""

_STEP_TOKENS = {"cpu": 2048}
_DEFAULT_STEP_TOKENS = 8192
# Answers are kept in memory until their block is done, and the batch runs empty at its end.
_BLOCK_BATCHES = 64


class Answer(msgspec.Struct, frozen=True):
    """A line of synthesis.jsonl: the proposal's answer to the prompt of the record `index`.

    `token_ids` end with the token that ends an answer, unless `finish_reason` is "length". The line is itself
    a record of training data.
    """

    index: int
    prompt: tuple[Message, ...]
    completion: str
    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class SynthesisSummary:
    """What a run of synthesis did: `num_answers` are in the file now, `num_sampled` of them from this run."""

    num_answers: int
    num_sampled: int
    num_tokens_sampled: int
    seconds: float


def synthesize(
    config: TrainConfig, proposal: str, encoded: Encoded, path: Path, on_progress: OnProgress
) -> SynthesisSummary:
    """One answer to each prompt, appended to `path` as it is finished; those that are there are kept.

    Each prompt has a seed of its own, made of `config.seed` and its index, so that a run that was interrupted
    ends with the answers of one that was not. In the end they lie in the order of the prompts.

    Raises:
        CheckpointError: the proposal cannot be served.
        DataError: what is in `path` is not what this wrote.
        OSError: the file cannot be written; what was is kept.
    """
    start_s = time.monotonic()
    _cut_half_line(path)
    known = read_answers(path)
    writer = _Writer(path, encoded, known, on_progress)
    with writer:
        if config.synthesize.from_rejected:
            writer.take_rejected()
        writer.tell()
        if missing := writer.missing:
            _sample(config, proposal, missing, writer)
            _free_memory()
    answers = read_answers(path)
    lines = (msgspec.json.encode(answers[index]) + b"\n" for index in sorted(answers))
    write_aside(path, b"".join(lines))
    return SynthesisSummary(len(answers), writer.num_sampled, writer.num_tokens, time.monotonic() - start_s)


def read_answers(path: Path) -> dict[int, Answer]:
    """The answers in a file by the index of their prompt; none if there is no file.

    Raises:
        DataError: a line is no answer, or a second one to its prompt.
    """
    answers: dict[int, Answer] = {}
    if not path.exists():
        return answers
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                answer = msgspec.json.decode(line, type=Answer)
            except (msgspec.MsgspecError, ValueError) as error:
                raise DataError(f"`{path}`, line {number}: {one_line(error)}") from None
            if answer.index in answers:
                raise DataError(f"`{path}`, line {number}: a second answer to prompt {answer.index}")
            answers[answer.index] = answer
    return answers


def load_engine(
    proposal: str,
    aligners: Sequence[AlignerSource],
    *,
    device: str,
    dtype: str,
    quantization: str,
    max_batch: int,
    trust_remote_code: bool,
    prefix_cache: bool = True,
) -> LocalEngine:
    """An engine for many prompts at once. Raises `CheckpointError` if a model cannot be served."""
    step_tokens = _STEP_TOKENS.get(resolve_device(device).type, _DEFAULT_STEP_TOKENS)
    return LocalEngine.load(
        EngineConfig(
            proposal=proposal,
            aligners=tuple(aligners),
            device=device,
            dtype=dtype,
            quantization=quantization,
            trust_remote_code=trust_remote_code,
            max_batch=max_batch,
            max_step_tokens=step_tokens,
            # Nobody waits for a next token here.
            max_chunk_tokens=step_tokens,
            prefix_cache=prefix_cache,
        )
    )


class _Writer:
    """The growing file: what it holds, what it lacks, and the progress that is told of it."""

    def __init__(
        self, path: Path, encoded: Encoded, known: Mapping[int, Answer], on_progress: OnProgress
    ) -> None:
        self._path = path
        self._encoded = encoded
        self._on_progress = on_progress
        self._done = set(known)
        if stray := self._done - set(range(len(encoded.pairs))):
            raise DataError(f"`{path}` answers prompt {min(stray)}, of {len(encoded.pairs)}")
        self.num_sampled = 0
        self.num_tokens = 0
        self._start_s = time.monotonic()

    def __enter__(self) -> _Writer:
        # Unbuffered: an answer is on its way to the disk when it is finished.
        self._file = self._path.open("ab", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def missing(self) -> dict[int, tuple[int, ...]]:
        """Token ids of the prompts that have no answer yet, by their index."""
        pairs = enumerate(self._encoded.pairs)
        return {index: pair.prompt for index, pair in pairs if index not in self._done}

    def take_rejected(self) -> None:
        """Write down the rejected answers of all records that have one."""
        for index in self.missing:
            record, pair = self._encoded.records[index], self._encoded.pairs[index]
            if pair.proposed:
                self._write(index, record.rejected, pair.proposed, REJECTED)

    def take(self, index: int, choice: Choice, text: str) -> None:
        """Write down a sampled answer."""
        self.num_sampled += 1
        self.num_tokens += len(choice.token_ids)
        self._write(index, text, choice.token_ids, choice.finish_reason)
        self.tell()

    def tell(self) -> None:
        """Report how many prompts have their answer."""
        seconds = time.monotonic() - self._start_s
        note = f"{self.num_tokens / seconds:,.0f} tokens/s" if self.num_tokens else ""
        self._on_progress(Progress("synthesize", len(self._done), len(self._encoded.pairs), note))

    def _write(self, index: int, text: str, token_ids: tuple[int, ...], reason: str) -> None:
        answer = Answer(index, self._encoded.records[index].messages, text, token_ids, reason)
        line = msgspec.json.encode(answer) + b"\n"
        # A raw file takes what there is room for, and only then says that the disk is full.
        while line:
            line = line[self._file.write(line) :]
        self._done.add(index)


def _sample(
    config: TrainConfig, proposal: str, missing: Mapping[int, tuple[int, ...]], writer: _Writer
) -> None:
    """Answer the missing prompts, a block after the other."""
    synthesis = config.synthesize
    with no_bars():
        engine = load_engine(
            proposal,
            (),
            device=synthesis.device,
            dtype=synthesis.dtype,
            quantization=synthesis.quantization,
            max_batch=synthesis.max_batch,
            trust_remote_code=config.trust_remote_code,
        )
    indices = list(missing)
    max_tokens = min(config.data.max_tokens, engine.engine.limits.max_model_len)
    block = synthesis.max_batch * _BLOCK_BATCHES
    for start in range(0, len(indices), block):
        chosen = indices[start : start + block]

        def take(at: int, choice: Choice, chosen: list[int] = chosen) -> None:
            writer.take(chosen[at], choice, engine.text(choice))

        each = [
            _sampling(synthesis, config.seed, index, room=max_tokens - len(missing[index]))
            for index in chosen
        ]
        engine.generate([missing[index] for index in chosen], each, on_finish=take)


def _sampling(synthesis: SynthesizeConfig, seed: int, index: int, *, room: int) -> SamplingParams:
    """How one prompt is answered; its seed is a hash, so that no two runs share noise."""
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return SamplingParams(
        temperature=synthesis.temperature,
        top_p=synthesis.top_p,
        top_k=synthesis.top_k,
        max_tokens=max(min(synthesis.max_answer_tokens, room), 1),
        seed=int.from_bytes(digest[:8], signed=True),
    )


def _free_memory() -> None:
    """Give back what an engine held that is no longer used: a model is trained next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _cut_half_line(path: Path) -> None:
    """Take away what a killed run left behind its last whole line."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
