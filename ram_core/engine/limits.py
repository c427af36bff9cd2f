"""What the engine can take, as frozen numbers: requests are checked against them before they are queued."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ram_core.engine.messages import Request
from ram_core.engine.pages import pages_for
from ram_core.errors import ContextLengthExceeded, InvalidRequest, UnknownModel


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """`pools` maps each aligner to the KV pool it writes to; all pools have `num_pages` usable pages."""

    vocab_size: int
    max_model_len: int
    page_size: int
    num_pages: int
    pools: Mapping[str, str]

    def check(self, request: Request) -> None:
        """Refuse what could never be served.

        Raises:
            InvalidRequest: an empty prompt, a token id outside the vocabulary, or more KV than there is.
            ContextLengthExceeded: prompt and wanted answer do not fit into the context.
            UnknownModel: an aligner that is not registered.
        """
        for term in request.alignment.terms:
            if term.aligner not in self.pools:
                raise UnknownModel(f"The aligner `{term.aligner}` does not exist.")
        self._check_tokens(request)
        tokens = len(request.prompt_ids) + self.max_tokens(request)
        lanes = Counter(self.pools[term.aligner] for term in request.alignment.terms)
        needed = pages_for(tokens, self.page_size) * max(lanes.values(), default=1)
        if needed > self.num_pages:
            raise InvalidRequest(
                f"{len(request.alignment.terms)} aligners at {tokens} tokens need {needed} pages of KV "
                f"memory, of which there are {self.num_pages}; ask for fewer aligners or tokens.",
                param="aligners",
            )

    def max_tokens(self, request: Request) -> int:
        """How many tokens may be drawn: what was asked for, or what the context holds."""
        room = self.max_model_len - len(request.prompt_ids)
        return request.sampling.max_tokens or room

    def _check_tokens(self, request: Request) -> None:
        length = len(request.prompt_ids)
        if not length:
            raise InvalidRequest("The prompt must hold at least one token.", param="prompt")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.vocab_size:
            raise InvalidRequest(f"Token ids must be in [0, {self.vocab_size}).", param="prompt")
        if length + max(request.sampling.max_tokens, 1) > self.max_model_len:
            raise ContextLengthExceeded(
                f"This model's context holds {self.max_model_len} tokens; the prompt has {length} and "
                f"{max(request.sampling.max_tokens, 1)} more were asked for.",
                param="prompt",
            )
