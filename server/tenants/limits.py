"""How much a tenant may still ask for: taken when a request is admitted, corrected when it ends.

Times are in seconds on a clock that never goes back. Nothing here is shared between processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ram_core.errors import InvalidRequest, RamError
from server.tenants.policy import Limits

OPEN_ENDED_TOKENS = 256
"""What a choice without `max_tokens` is taken to need; what it used beyond is owed when it ends."""
_ROUNDING = 1e-6
"""Who waits as long as it was told must not be turned away for the last digit of a sum."""
_BUSY_RETRY_S = 1.0
"""When to ask again for a place that another request of the same tenant holds: nobody knows."""


class RateLimited(RamError):
    """The tenant has used up what it may use; try again in `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestsLimited(RateLimited):
    """Too many requests, in a minute or at once."""


class TokensLimited(RateLimited):
    """Too many tokens in a minute."""


class TooManyTokens(RamError):
    """The request asks for more tokens than the tenant may use in any minute."""


class Bucket:
    """What is left of `per_minute`; flows back evenly, up to a minute's worth. May be owed to."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now_s

    @property
    def per_minute(self) -> int:
        return self._per_minute

    def resize(self, per_minute: int, now_s: float) -> None:
        """Change the limit; what was used stays used."""
        self._flow(now_s)
        self._level += per_minute - self._per_minute
        self._per_minute = per_minute

    def left(self, now_s: float) -> float:
        """What may be taken now; below 0 if something is owed."""
        self._flow(now_s)
        return self._level

    def wait_s(self, amount: float, now_s: float) -> float:
        """How long until `amount` may be taken."""
        missing = amount - self.left(now_s)
        return missing * 60 / self._per_minute if missing > _ROUNDING else 0.0

    def take(self, amount: float) -> None:
        self._level -= amount

    def put(self, amount: float, now_s: float) -> None:
        """Give back what was taken and not used; take more if `amount` is negative."""
        self._flow(now_s)
        self._level = min(self._level + amount, self._per_minute)

    def _flow(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._at_s)
        self._level = min(self._level + passed_s * self._per_minute / 60, self._per_minute)
        self._at_s += passed_s


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks for: token ids in its prompts, and choices of `max_tokens` each (None: until the
    context of `context_tokens` is full)."""

    prompt_tokens: tuple[int, ...]
    num_choices: int
    max_tokens: int | None
    context_tokens: int

    @property
    def num_sequences(self) -> int:
        return len(self.prompt_tokens) * self.num_choices

    def tokens(self) -> int:
        """Tokens to set aside."""
        wanted = OPEN_ENDED_TOKENS if self.max_tokens is None else self.max_tokens
        return sum(
            prompt + self.num_choices * max(0, min(wanted, self.context_tokens - prompt))
            for prompt in self.prompt_tokens
        )


class Reservation:
    """What one request holds until it is settled; settling again does nothing."""

    def __init__(self, ledger: Ledger, wanted: Wanted, num_tokens: int) -> None:
        self._ledger = ledger
        self._num_tokens = num_tokens
        self._num_sequences = wanted.num_sequences
        # Those that it was taken from: limits may come and go while the request runs.
        self._buckets = ledger.requests, ledger.tokens
        self._is_open = True

    def settle(self, used_tokens: int) -> None:
        """The request has ended, and used so many tokens."""
        self._close(0, self._num_tokens - used_tokens)

    def cancel(self) -> None:
        """The request never began: it counts for nothing."""
        self._close(1, self._num_tokens)

    def _close(self, *unused: int) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._ledger.leave(self._num_sequences)
        for bucket, amount in zip(self._buckets, unused, strict=True):
            if bucket is not None:
                bucket.put(amount, self._ledger.now_s())


class Ledger:
    """The limits of one tenant, and what of them is in use."""

    def __init__(self, limits: Limits, num_places: int, clock: Callable[[], float]) -> None:
        self.now_s = clock
        self._num_requests = self._num_sequences = 0
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.configure(limits, num_places)

    def configure(self, limits: Limits, num_places: int) -> None:
        """Change the limits; `num_places` sequences fit into the engine. What is in use stays in use."""
        now_s = self.now_s()
        self._limits = limits
        # A tenant that may have all places is refused by the engine alone, which knows when they are taken.
        self._max_sequences = max(1, int(limits.queue_share * num_places)) if limits.queue_share < 1 else None
        self.requests = _resized(self.requests, limits.requests_per_minute, now_s)
        self.tokens = _resized(self.tokens, limits.tokens_per_minute, now_s)

    def check(self) -> None:
        """Raise `RequestsLimited` if no request at all could be admitted now; takes nothing."""
        limit = self._limits.concurrent_requests
        if limit is not None and self._num_requests >= limit:
            message = f"Limit of {limit} concurrent requests reached; {self._num_requests} are running."
            raise RequestsLimited(message, retry_after_s=_BUSY_RETRY_S)
        bucket = self.requests
        if bucket is not None and (wait_s := bucket.wait_s(1, self.now_s())) > 0:
            message = f"Limit of {bucket.per_minute} requests per minute reached; retry in {seconds(wait_s)}."
            raise RequestsLimited(message, retry_after_s=wait_s)

    def reserve(self, wanted: Wanted) -> Reservation:
        """Set aside what a request may need, or nothing.

        Raises:
            RequestsLimited, TokensLimited: try again later.
            TooManyTokens, InvalidRequest: it will never fit.
        """
        self.check()
        num_tokens = self._check_tokens(wanted)
        self._check_sequences(wanted.num_sequences)
        self._num_requests += 1
        self._num_sequences += wanted.num_sequences
        if self.requests is not None:
            self.requests.take(1)
        if self.tokens is not None:
            self.tokens.take(num_tokens)
        return Reservation(self, wanted, num_tokens)

    def _check_tokens(self, wanted: Wanted) -> int:
        num_tokens, bucket = wanted.tokens(), self.tokens
        if bucket is None:
            return num_tokens
        if wanted.max_tokens is None:
            # A guess must not shut out what may fit.
            num_tokens = max(sum(wanted.prompt_tokens), min(num_tokens, bucket.per_minute))
        if num_tokens > bucket.per_minute:
            raise TooManyTokens(
                f"The request asks for {num_tokens} tokens, of {bucket.per_minute} per minute."
            )
        wait_s = bucket.wait_s(num_tokens, self.now_s())
        if wait_s > 0:
            left = max(0, math.floor(bucket.left(self.now_s())))
            raise TokensLimited(
                f"Limit of {bucket.per_minute} tokens per minute reached: {left} are left, "
                f"{num_tokens} asked for; retry in {seconds(wait_s)}.",
                retry_after_s=wait_s,
            )
        return num_tokens

    def _check_sequences(self, num_sequences: int) -> None:
        if self._max_sequences is None:
            return
        if num_sequences > self._max_sequences:
            raise InvalidRequest(
                f"A request may have {self._max_sequences} choices in all, got {num_sequences}.", param="n"
            )
        if self._num_sequences + num_sequences > self._max_sequences:
            message = f"Limit of {self._max_sequences} choices at once reached."
            raise RequestsLimited(message, retry_after_s=_BUSY_RETRY_S)

    def leave(self, num_sequences: int) -> None:
        """A request that had so many sequences is over."""
        self._num_requests -= 1
        self._num_sequences -= num_sequences

    def headers(self) -> dict[str, str]:
        """What is left, in the words of OpenAI's headers; nothing where there is no limit."""
        now_s = self.now_s()
        headers = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                left = max(0, math.floor(bucket.left(now_s)))
                headers[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                headers[f"x-ratelimit-remaining-{name}"] = str(left)
                headers[f"x-ratelimit-reset-{name}"] = seconds(bucket.wait_s(bucket.per_minute, now_s))
        return headers


def _resized(bucket: Bucket | None, per_minute: int | None, now_s: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now_s)
    bucket.resize(per_minute, now_s)
    return bucket


def seconds(value_s: float) -> str:
    """A duration as OpenAI writes it: 120ms, 8.64s, 6m0s. Rounded up, so that waiting for it is enough."""
    milliseconds = math.ceil(value_s * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    if milliseconds < 60_000:
        return f"{milliseconds / 1000:g}s"
    minutes, rest = divmod(math.ceil(milliseconds / 1000), 60)
    return f"{minutes}m{rest}s"
