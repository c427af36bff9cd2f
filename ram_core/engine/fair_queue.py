"""Who leaves the queue next: by priority, then fairly between tenants, then in order of arrival.

Fairness is a deficit round robin (Shreedhar and Varghese, 1995) that charges what was really served, as the
length of an answer is not known beforehand: each round gives a waiting tenant `quantum` tokens of credit, it
may start sequences while its credit is positive, and pays for every token that they read or draw. Of two
tenants that always have somebody waiting, neither gets ahead by more than two quanta, a prompt, and what the
sequences running at once may draw (`tests/unit/test_scheduler_properties.py`).

A tenant without debts that has nothing under way does not wait until the others' credit is used up: it is
next at once. Then somebody has a turn before the next may overtake, so that nobody is overtaken for ever.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator

from ram_core.engine.sequence import Sequence

Tenant = tuple[int, str]
"""A tenant at one priority: levels do not share credit."""
Ring = OrderedDict[Tenant, deque[Sequence]]
"""The waiting of one priority, by tenant; the first tenant is the one whose turn it is."""


def tenant_of(sequence: Sequence) -> Tenant:
    """Whose credit a sequence uses."""
    return sequence.request.priority, sequence.request.tenant


class FairQueue:
    """The waiting sequences. Those put back after they had begun go before all others of their priority."""

    def __init__(self, *, quantum: int) -> None:
        self._quantum = quantum
        self._returned: defaultdict[int, deque[Sequence]] = defaultdict(deque)
        self._rings: dict[int, Ring] = {}
        self._credit: Counter[Tenant] = Counter()
        self._num_living: Counter[Tenant] = Counter()
        # Whether somebody was next before its turn, and nobody had a turn since.
        self._is_turn_due = False

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Sequence]:
        for priority in sorted({*self._returned, *self._rings}):
            yield from self._returned.get(priority, ())
            for queue in self._rings.get(priority, {}).values():
                yield from queue

    def __bool__(self) -> bool:
        return bool(self._rings) or any(self._returned.values())

    def add(self, sequence: Sequence, *, is_first: bool = False) -> None:
        """Queue a new sequence behind its tenant's others, or before them."""
        tenant = tenant_of(sequence)
        self._num_living[tenant] += 1
        queue = self._rings.setdefault(tenant[0], OrderedDict()).setdefault(tenant, deque())
        if is_first:
            queue.appendleft(sequence)
        else:
            queue.append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence that ran, before all that did not."""
        self._returned[sequence.request.priority].appendleft(sequence)

    def step_aside(self, sequence: Sequence) -> None:
        """Queue a sequence that ran before its tenant's others alone: it had more than its share."""
        tenant = tenant_of(sequence)
        self._rings.setdefault(tenant[0], OrderedDict()).setdefault(tenant, deque()).appendleft(sequence)

    def head(self) -> Sequence | None:
        """Who is next; stays next until taken, however long there is no room."""
        for priority in sorted({*self._returned, *self._rings}):
            if self._returned.get(priority):
                return self._returned[priority][0]
            if priority in self._rings:
                return self._rings[priority][self._turn(self._rings[priority])][0]
        return None

    def take(self, sequence: Sequence) -> None:
        """Take the head out, to run it."""
        tenant = tenant_of(sequence)
        ring: Ring = self._rings.get(tenant[0], OrderedDict())
        self._is_turn_due = tenant in ring and self._may_overtake(tenant, ring)
        self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out, to forget it."""
        tenant = tenant_of(sequence)
        returned = self._returned.get(tenant[0])
        if returned and sequence in returned:
            returned.remove(sequence)
            return
        ring = self._rings[tenant[0]]
        ring[tenant].remove(sequence)
        if not ring[tenant]:
            is_first = next(iter(ring)) == tenant
            del ring[tenant]
            if is_first and ring:
                # The next one's turn begins, as when the first has used up its credit.
                self._credit[next(iter(ring))] += self._quantum
            # Credit is for waiting; a debt remains for as long as the tenant has something running.
            self._credit[tenant] = min(self._credit[tenant], 0)
        if not ring:
            del self._rings[tenant[0]]

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Let the sequence's tenant pay for tokens that were served to it."""
        self._credit[tenant_of(sequence)] -= num_tokens

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended; a tenant without any is forgotten, debts and all."""
        tenant = tenant_of(sequence)
        self._num_living[tenant] -= 1
        if not self._num_living[tenant]:
            del self._num_living[tenant]
            self._credit.pop(tenant, None)

    def _may_overtake(self, tenant: Tenant, ring: Ring) -> bool:
        is_idle = self._num_living[tenant] == len(ring[tenant])
        return is_idle and self._credit[tenant] >= 0 and not self._is_turn_due

    def _turn(self, ring: Ring) -> Tenant:
        """The tenant whose turn it is, after all that have no credit were given their quanta."""
        for tenant in ring:
            if self._may_overtake(tenant, ring):
                return tenant
        if all(self._credit[tenant] <= -self._quantum for tenant in ring):
            # As many whole rounds as nobody would get anything in.
            rounds = min(-self._credit[tenant] for tenant in ring) // self._quantum
            for tenant in ring:
                self._credit[tenant] += rounds * self._quantum
        while self._credit[tenant := next(iter(ring))] <= 0:
            ring.move_to_end(tenant)
            self._credit[next(iter(ring))] += self._quantum
        return tenant
