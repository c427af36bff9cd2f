"""The models an engine serves: one proposal, its aligners, and the KV pools they write to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ram_core.engine.aligner_groups import AlignerGroup
from ram_core.engine.limits import EngineLimits
from ram_core.engine.newcomers import Newcomer, Terms
from ram_core.engine.plan import StartPlan
from ram_core.engine.sequence import Lane
from ram_core.models.kv import KvPool
from ram_core.models.packing import PackedBatch
from ram_core.models.paged import PagedModel
from ram_core.models.tensor_parallel import Ranks
from ram_core.params import AlignerTerm

PROPOSAL_POOL = "proposal"
PROPOSAL = "proposal"
"""The proposal's name among the models; no aligner has it."""


@dataclass(frozen=True)
class ModelBank:
    """The models of an engine and their KV memory. Aligners come and go, between steps; all else stays.

    `pools` holds the KV memory by name; `pool_of` maps each aligner's model to its pool, which those of equal
    geometry share. `group_of` maps it to the group that a forward serves; `group_by_name` has the groups.
    `residents` names the models of each aligner, `bytes_of` says what they take, and `failed` why some are
    missing that should have been there at start. `terms` are what newcomers must go with. `plan` says what
    memory went where, and why; `ranks` are the processes that share the proposal.
    """

    proposal: PagedModel
    group_by_name: dict[str, AlignerGroup]
    group_of: dict[str, AlignerGroup]
    pools: dict[str, KvPool]
    pool_of: dict[str, str]
    residents: dict[str, tuple[str, ...]]
    bytes_of: dict[str, int]
    failed: Mapping[str, str]
    terms: Terms
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_model_len: int
    page_size: int
    eos_ids: frozenset[int]
    plan: StartPlan
    ranks: Ranks
    proposal_pool: str = field(default=PROPOSAL_POOL)

    @property
    def aligners(self) -> dict[str, PagedModel]:
        """The model that serves each aligner, perhaps others too."""
        return {name: group.model for name, group in self.group_of.items()}

    @property
    def groups(self) -> tuple[AlignerGroup, ...]:
        """All groups, each once."""
        return tuple(self.group_by_name.values())

    def forward(
        self, name: str, batch: PackedBatch, pool: KvPool, slots: Int64[Tensor, " token"] | None
    ) -> Float[Tensor, "logit padded_vocab"]:
        """Run the proposal, or the group of that name; `slots` are those of a group that shares a module."""
        if name == PROPOSAL:
            return self.proposal.forward(batch, pool)
        return self.group_by_name[name].forward(batch, pool, slots)

    @property
    def limits(self) -> EngineLimits:
        """What requests are checked against."""
        return EngineLimits(
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            page_size=self.page_size,
            num_pages=self.pools[self.proposal_pool].num_pages - 1,
            pools=dict(self.pool_of),
        )

    def add(self, aligner: str, newcomers: Iterable[Newcomer]) -> dict[str, KvPool]:
        """Let an aligner's models be asked for; returns the pools that came with them, by name.

        Raises:
            ValueError: a model has the name of another; nothing has changed.
        """
        models = tuple(newcomers)
        for each in models:
            if each.name in self.group_of or each.name == PROPOSAL:
                raise ValueError(f"there is a model `{each.name}` already")
        new_pools: dict[str, KvPool] = {}
        for each in models:
            if each.pool is not None:
                new_pools[f"aligners-{len(self.pools) - 1}"] = self.pools[
                    f"aligners-{len(self.pools) - 1}"
                ] = each.pool
            self.pool_of[each.name] = self.pool_for(each.group)
            self.group_by_name[each.group.name] = each.group
            self.group_of[each.name] = each.group
            if each.name not in each.group.names:
                each.group.add(each.name, each.slot)
        self.residents[aligner] = tuple(each.name for each in models)
        self.bytes_of[aligner] = sum(each.num_bytes for each in models)
        return new_pools

    def pool_for(self, group: AlignerGroup) -> str:
        """The name of the pool that a group's aligners write to."""
        return next(
            name
            for name, pool in self.pools.items()
            if name != self.proposal_pool and pool.geometry == group.model.geometry
        )

    def lane(self, group: AlignerGroup, term: AlignerTerm) -> Lane:
        """What a new sequence keeps for life of an aligner of a group, in the version that is current now."""
        model, slot = group.lane(term.aligner)
        return Lane(model, self.pool_for(group), term.strength, group.name, slot)

    def remove(self, aligner: str) -> tuple[tuple[AlignerGroup, int], ...]:
        """Let nobody ask for an aligner any more; returns where its weights still are."""
        del self.bytes_of[aligner]
        places = []
        for name in self.residents.pop(aligner):
            del self.pool_of[name]
            group = self.group_of.pop(name)
            places.append((group, group.remove(name)))
        return tuple(places)

    def free(self, places: Iterable[tuple[AlignerGroup, int]]) -> list[AlignerGroup]:
        """Give back the memory of aligners that were removed; returns the groups that are gone with them."""
        gone = []
        for group, slot in places:
            group.free(slot)
            if group.is_empty:
                del self.group_by_name[group.name]
                gone.append(group)
        return gone
