"""How many tokens of which prompts a step reads. Plain Python: never imports torch.

What sequences that are being written leave of a step's budget goes to prompts, in chunks, shared equally
between tenants. Beside writing, a chunk is short, so that a long prompt delays no other sequence's next token
by much; alone it may fill the step. Where many could read beside few that write, as in a burst that finds the
server idle, the chunk is longer: few wait for many, and the batch is full sooner. What is left of a short
prompt is read at once if its tenant writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

from ram_core.engine.sequence import Sequence

_GUEST_CHUNKS = 2
"""Up to so many chunks are read at once for a tenant that writes nothing."""
_READER_WEIGHT = 4
"""Who waits for a first token counts as so many who wait for their next one."""
MIN_SHARE = 16
"""So many tokens of prompt a tenant gets in a step at least, if it gets any."""


class ReadingShares:
    """Shares a step's tokens out; a step may have `max_step_tokens` of `num_slots` sequences."""

    def __init__(self, max_step_tokens: int, max_chunk_tokens: int, num_slots: int) -> None:
        self._num_slots = num_slots
        self._max_chunk_tokens = max_chunk_tokens
        # Never twice in a row: other prompts get on, however many strangers come.
        self._has_welcomed = False
        self._set_budget(max_step_tokens)

    @property
    def can_shrink(self) -> bool:
        """Whether a step may have fewer tokens than now."""
        return self._max_step_tokens > self._num_slots + 1

    def shrink(self) -> None:
        """Halve the budget of a step: the last one found no memory."""
        self._set_budget(self._max_step_tokens // 2)

    def _set_budget(self, max_step_tokens: int) -> None:
        # At least one prompt token must fit beside a full batch of drawing sequences.
        self._max_step_tokens = max(max_step_tokens, self._num_slots + 1)

    def budget(self, num_writing: int, num_reading: int) -> int:
        """Tokens of prompts that a step may read: a chunk, or more where many wait for the sake of few."""
        left = self._max_step_tokens - num_writing
        if not num_writing:
            return left
        # Never more than a chunk each: one long prompt by itself delays nobody by more.
        num_chunks = min(_READER_WEIGHT * num_reading // num_writing, num_reading)
        return min(left, self._max_chunk_tokens * max(num_chunks, 1))

    def of(self, reading: Rows[Sequence], writing: Rows[Sequence], num_coming: int) -> list[int]:
        """Tokens for each reader, if so many more could read.

        A guest's prompt goes before all others. One whose request is still to come gets what these leave, and
        no more than a chunk: whoever comes next does not wait for long.
        """
        asked = [sequence for sequence in reading if not sequence.is_prefill]
        ahead = [sequence for sequence in reading if sequence.is_prefill]
        left = self.budget(len(writing), len(asked) + num_coming)
        shares: dict[Sequence, int] = {}
        guest = None if self._has_welcomed else self._guest(asked, writing)
        self._has_welcomed = guest is not None
        if guest is not None:
            shares[guest] = guest.num_pending
            asked.remove(guest)
            left = max(left - guest.num_pending, 0)
        own = _share_out(asked, left)
        spare = min(left - sum(own), self._max_chunk_tokens)
        shares |= zip((*asked, *ahead), (*own, *_share_out(ahead, spare)), strict=True)
        return [shares[sequence] for sequence in reading]

    def _guest(self, reading: Rows[Sequence], writing: Rows[Sequence]) -> Sequence | None:
        """The first whose tenant only waits while others write, and whose prompt is soon read."""
        if not writing:
            return None
        tenants = {sequence.request.tenant for sequence in writing}
        left = self._max_step_tokens - len(writing)
        soon = min(_GUEST_CHUNKS * self._max_chunk_tokens, left)
        strangers = (each for each in reading if each.request.tenant not in tenants)
        return next((each for each in strangers if each.num_pending <= soon), None)


def _share_out(reading: Rows[Sequence], budget: int) -> list[int]:
    """Tokens for each reader: its tenant's equal share, oldest first; then what others leave over."""
    if not reading:
        return []
    tenants = dict.fromkeys(sequence.request.tenant for sequence in reading)
    left = dict.fromkeys(tenants, max(budget // len(tenants), 1))
    spare = budget
    shares = []
    for sequence in reading:
        share = min(sequence.num_pending, left[sequence.request.tenant], spare)
        left[sequence.request.tenant] -= share
        spare -= share
        shares.append(share)
    for index, sequence in enumerate(reading):
        extra = min(sequence.num_pending - shares[index], spare)
        shares[index] += extra
        spare -= extra
    return shares
