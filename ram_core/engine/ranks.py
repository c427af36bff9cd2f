"""One engine over several processes: rank 0 schedules and answers, the others do their share of forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from ram_core.engine.config import EngineConfig
from ram_core.engine.engine import Engine
from ram_core.models.tensor_parallel import SharedModel, is_first_rank


@contextmanager
def engine_of_ranks(
    config: EngineConfig, progress: Callable[[str], None] = lambda _: None
) -> Iterator[Engine | None]:
    """Load what `config` names, the same on every rank; the engine on rank 0, None on the others.

    The other ranks enter the block only when rank 0 has left it:

    >>> with engine_of_ranks(EngineConfig("…", tensor_parallel=2)) as engine:
    ...     if engine is not None:
    ...         LocalEngine(engine).generate(…)

    Without `tensor_parallel`, this process is rank 0 and the only one.

    Raises:
        CheckpointError: something cannot be served, or torchrun did not begin as many processes.
        RuntimeError: another rank died.
    """
    if config.tensor_parallel > 1:
        # What is recorded on one rank cannot be announced to the others.
        config = replace(config, cuda_graphs=False)
    engine = Engine.load(config, progress if is_first_rank() else lambda _: None)
    proposal = engine.bank.proposal
    if not isinstance(proposal, SharedModel):
        yield engine
        return
    if engine.bank.ranks.rank:
        proposal.follow(engine.bank.pools[engine.bank.proposal_pool])
        yield None
        return
    proposal.lead()
    yield engine
    # Only if all went well: after an error the others may wait for something else.
    proposal.release()
