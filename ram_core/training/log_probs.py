"""What the proposal says of every wanted answer token, computed once for a corpus and kept in files."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ram_core.models.loading import load_model
from ram_core.progress import OnProgress, Progress, ignore_progress
from ram_core.training.examples import Example, TrainingPair, collate
from ram_core.training.flops import PassFlops
from ram_core.training.heads import AnswerHead
from ram_core.training.saves import Spent, write_aside

_SPENT_FILE = "spent.json"
_ARRAYS = ("ids", "log_probs", "target_log_probs")
# What is in memory at once: logits of so many answer tokens, hidden states of so many positions.
_MAX_ANSWER_POSITIONS = 2048
_MAX_POSITIONS = 16384


class _Header(msgspec.Struct, frozen=True):
    fingerprint: str
    num_tokens: int
    num_top: int
    num_chunks: int


@dataclass(frozen=True)
class ProposalLogProbs:
    """The proposal's most probable tokens, and its log-probability of each wanted answer token.

    `ids` (int32) and `log_probs` (float32) are [token, top], `target_log_probs` (float32) [token]; the tokens
    of pair i's wanted answer are `offsets[i]` to `offsets[i + 1]`. They lie in files, and are read as needed.
    """

    ids: np.ndarray
    log_probs: np.ndarray
    target_log_probs: np.ndarray
    offsets: np.ndarray

    def rows(self, indices: Sequence[int]) -> Mapping[str, Tensor]:
        """What `ProductLikelihood` reads: [answer token, top] and [answer token]."""
        spans = [slice(*self.offsets[index : index + 2]) for index in indices]
        ids, log_probs, targets = (
            torch.from_numpy(np.concatenate([array[span] for span in spans]))
            for array in (self.ids, self.log_probs, self.target_log_probs)
        )
        return {
            "proposal_ids": ids.long(),
            "proposal_log_probs": log_probs,
            "proposal_target_log_probs": targets,
        }


class LogProbsCache:
    """The files below a directory, and which parts of them are filled: a restart goes on where it was."""

    def __init__(
        self, directory: Path, pairs: Sequence[TrainingPair], *, top_k: int, vocab_size: int, proposal: str
    ) -> None:
        """`proposal` identifies the proposal's weights, such as by a hash of them."""
        self._directory = directory
        self._pairs = pairs
        self._vocab_size = vocab_size
        self._chunks = list(_chunks(pairs))
        self._offsets = np.cumsum([0, *(len(pair.wanted) for pair in pairs)])
        self._header = _Header(
            hashlib.sha256(f"{proposal} {vocab_size} {pairs_digest(pairs)}".encode()).hexdigest(),
            int(self._offsets[-1]),
            min(top_k, vocab_size),
            len(self._chunks),
        )

    def prepare(self) -> None:
        """Make the files, unless those of the same corpus and proposal are there. One process calls this."""
        if self._is_ours():
            return
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)
        num_tokens, num_top = self._header.num_tokens, self._header.num_top
        for name, dtype, shape in (
            ("ids", np.int32, (num_tokens, num_top)),
            ("log_probs", np.float32, (num_tokens, num_top)),
            ("target_log_probs", np.float32, (num_tokens,)),
            ("is_done", np.uint8, (self._header.num_chunks,)),
        ):
            np.lib.format.open_memmap(self._path(name), mode="w+", dtype=dtype, shape=shape).flush()
        write_aside(self._directory / "header.json", msgspec.json.encode(self._header))

    @torch.no_grad()
    def fill(
        self, model: PreTrainedModel, on_progress: OnProgress, *, process: int = 0, num_processes: int = 1
    ) -> None:
        """Compute what is missing of this process' part."""
        ids, log_probs, targets, is_done = (
            np.load(self._path(name), mmap_mode="r+") for name in (*_ARRAYS, "is_done")
        )
        head = AnswerHead(model)
        own = range(process, len(self._chunks), num_processes)
        for done, number in enumerate(own, 1):
            if not is_done[number]:
                chunk = self._chunks[number]
                batch = collate(
                    [Example(self._pairs[each].prompt, self._pairs[each].wanted) for each in chunk]
                )
                found = self._look_up(head, model, batch)
                spans = [np.arange(*self._offsets[index : index + 2]) for index in chunk]
                for array, values in zip((ids, log_probs, targets), found, strict=True):
                    array[np.concatenate(spans)] = values
                for array in (ids, log_probs, targets):
                    array.flush()
                is_done[number] = 1
                is_done.flush()
            on_progress(Progress("proposal's log-probabilities", done, len(own)))
        head.remove()

    def open(self) -> ProposalLogProbs:
        """The files, once all processes have filled their parts."""
        ids, log_probs, targets = (np.load(self._path(name), mmap_mode="r") for name in _ARRAYS)
        return ProposalLogProbs(ids, log_probs, targets, self._offsets)

    def flops(self, model: PreTrainedModel) -> float:
        """The floating-point operations that all of it takes, about."""
        costs = PassFlops.of(model, is_trained=False)
        return sum(
            costs.of_batch(
                len(chunk)
                * max(len(self._pairs[each].prompt) + len(self._pairs[each].wanted) for each in chunk),
                sum(len(self._pairs[each].wanted) for each in chunk),
            )
            for chunk in self._chunks
        )

    def finish(self, spent: Spent) -> None:
        """Nothing is left to compute; `spent` is what it took."""
        write_aside(self._directory / _SPENT_FILE, msgspec.json.encode(spent))

    def spent(self) -> Spent | None:
        """What it took, or None if something is left to compute."""
        path = self._directory / _SPENT_FILE
        return msgspec.json.decode(path.read_bytes(), type=Spent) if path.is_file() else None

    def _look_up(
        self, head: AnswerHead, model: PreTrainedModel, batch: Mapping[str, Tensor]
    ) -> tuple[np.ndarray, ...]:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        log_p = head.logits(model, batch)[:, : self._vocab_size].float().log_softmax(-1)
        top = log_p.topk(self._header.num_top, -1)
        targets = log_p.gather(-1, batch["targets"][:, None]).squeeze(-1)
        return tuple(each.cpu().numpy() for each in (top.indices, top.values, targets))

    def _is_ours(self) -> bool:
        try:
            header = msgspec.json.decode((self._directory / "header.json").read_bytes(), type=_Header)
        except (OSError, msgspec.DecodeError):
            return False
        return header == self._header

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.npy"


def fill_cache(
    cache: LogProbsCache, proposal: str, *, dtype: str, trust_remote_code: bool, on_progress: OnProgress
) -> Spent:
    """Fill what is missing, all processes of a launch together; returns what the whole of it took.

    Raises:
        CheckpointError: the proposal cannot be loaded.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.is_main_process:
        cache.prepare()
    state.wait_for_everyone()
    spent = cache.spent()
    if spent is None:
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        is_half = dtype == "bfloat16" or (dtype == "auto" and state.device.type == "cuda")
        model = load_model(
            proposal,
            device=state.device,
            dtype=torch.bfloat16 if is_half else torch.float32,
            attn_implementation="sdpa",
            trust_remote_code=trust_remote_code,
        )
        tell = on_progress if state.is_main_process else ignore_progress
        cache.fill(model, tell, process=state.process_index, num_processes=state.num_processes)
        state.wait_for_everyone()
        cpu_seconds = (time.process_time() - began_cpu_s) * state.num_processes
        spent = Spent(time.perf_counter() - began_s, cpu_seconds, cache.flops(model))
        if state.is_main_process:
            cache.finish(spent)
    state.wait_for_everyone()
    return spent


def pairs_digest(pairs: Sequence[TrainingPair]) -> str:
    """SHA-256, in hexadecimal, of all token ids in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        for ids in (pair.prompt, pair.wanted, pair.proposed):
            digest.update(np.array((len(ids), *ids), dtype=np.int64).tobytes())
    return digest.hexdigest()


def _chunks(pairs: Sequence[TrainingPair]) -> Iterator[list[int]]:
    """Pairs of like length, as many as are in memory at once; the longest first."""
    order = sorted(range(len(pairs)), key=lambda index: _length(pairs[index]), reverse=True)
    chunk: list[int] = []
    num_answer = width = 0
    for index in order:
        num_wanted, num_tokens = len(pairs[index].wanted), _length(pairs[index])
        is_full = num_answer + num_wanted > _MAX_ANSWER_POSITIONS or (len(chunk) + 1) * width > _MAX_POSITIONS
        if chunk and is_full:
            yield chunk
            chunk, num_answer = [], 0
        width = width if chunk else num_tokens
        num_answer += num_wanted
        chunk.append(index)
    if chunk:
        yield chunk


def _length(pair: TrainingPair) -> int:
    return len(pair.prompt) + len(pair.wanted)
