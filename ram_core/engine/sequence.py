"""A sequence: the mutable life of one choice of a request. Only the engine's step touches it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ram_core.engine.messages import FinishReason, Request
from ram_core.engine.pages import PrefixKey, chain_next
from ram_core.params import AlignerTerm


@dataclass(slots=True)
class Lane:
    """A sequence's KV in one model: `pages` of pool `pool`, in order.

    `model` names the pages. It is served by `group`, or by itself if that is "": in a group that shares a
    module, with the weights of `group_slot`; -1 elsewhere. With `is_expected`, these are still on their way.

    The first `num_computed` tokens are in them, or will be when the steps under way are done; the first
    `num_named` pages can be found by other sequences. Both mean nothing while the sequence waits.
    """

    model: str
    pool: str
    strength: float = 1.0
    group: str = ""
    group_slot: int = -1
    is_expected: bool = False
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_named: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """`token_ids` holds the prompt and what is known to be drawn; `num_in_flight` more are being drawn.

    `lanes[0]` is the proposal's; the others are the aligners', one a term. `slot` is the row of the
    parameter tables for as long as the sequence runs, -1 while it waits. `stay` counts its stays in the
    batch: what a step brings for an earlier stay is void. `prefix_root` starts the chain of page digests,
    None if nothing is shared.

    A sequence with `is_prefill` has the proposal read a prompt before its request comes, and perhaps some of
    the aligners that it `awaits`: it draws nothing. `end_logits` are then what each lane's model says after
    the prompt, on its device, for the one that goes on from there, which `is_continued`. `num_cached` tokens
    were in the proposal's pages when the first began.
    """

    request: Request
    index: int
    seed: int
    lanes: list[Lane]
    stop_ids: frozenset[int]
    max_tokens: int
    arrived_s: float
    token_ids: list[int]
    prefix_root: bytes | None = None
    num_in_flight: int = 0
    slot: int = -1
    stay: int = 0
    has_started: bool = False
    is_prefill: bool = False
    is_continued: bool = False
    awaits: tuple[AlignerTerm, ...] = ()
    end_logits: dict[str, object] = field(default_factory=dict)
    num_cached: int = 0
    _digests: list[bytes] = field(default_factory=list)

    @property
    def num_drawn(self) -> int:
        """Tokens drawn and known."""
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known or being drawn; also the index of the next one to draw."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_computed(self) -> int:
        """Tokens that all lanes have in their KV; a lane that found a longer prefix waits for the others."""
        return min(lane.num_computed for lane in self.lanes)

    @property
    def num_pending(self) -> int:
        """Tokens that are not computed: the rest of the prompt, or the token drawn last."""
        return self.num_tokens - self.num_computed

    @property
    def is_writing(self) -> bool:
        """Whether it has one token to read, and may draw the next."""
        return self.num_pending == 1 and self.may_draw and not self.is_prefill

    @property
    def is_reading(self) -> bool:
        """Whether it has tokens of its prompt to read."""
        return self.num_pending > (0 if self.is_prefill else 1)

    @property
    def is_read(self) -> bool:
        """Whether all was read before its request came: it has only to draw."""
        return not (self.num_pending or self.is_prefill)

    @property
    def is_expecting(self) -> bool:
        """Whether it may have to wait for weights of an aligner."""
        return any(lane.is_expected for lane in self.lanes)

    @property
    def may_draw(self) -> bool:
        """Whether the limit of tokens leaves another draw, all those under way counted."""
        return self.num_tokens - len(self.request.prompt_ids) < self.max_tokens

    def finish_reason_after(self, token_id: int) -> FinishReason | None:
        """Whether drawing `token_id`, already appended, ends the text."""
        if token_id in self.stop_ids:
            return "stop"
        return "length" if self.num_drawn >= self.max_tokens else None

    def prefix_keys(self, lane: Lane, num_pages: int, page_size: int) -> Iterator[PrefixKey]:
        """Keys of the lane's first `num_pages` pages; all of their tokens must be known."""
        if self.prefix_root is None:
            return
        for index in range(num_pages):
            if index == len(self._digests):
                parent = self._digests[-1] if self._digests else self.prefix_root
                tokens = self.token_ids[index * page_size : (index + 1) * page_size]
                self._digests.append(chain_next(parent, tokens))
            yield PrefixKey(lane.model, self._digests[index])
