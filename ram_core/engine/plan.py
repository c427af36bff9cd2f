"""How a device's memory is shared out at start: what was asked for, what fits, and why. Plain Python.

The same arithmetic is done twice: before weights are read, on what they will take, so that what cannot fit is
refused at once; and after, on what they left free.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ram_core.engine.config import EngineConfig
from ram_core.engine.pages import pages_for
from ram_core.errors import CheckpointError

logger = logging.getLogger(__name__)

_CPU_KV_BYTES = 1 << 30
_FREE_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that models take: weights by model, and a token of keys and values in all pools together.

    `quantized_bytes` are all weights together with the proposal's stored in other ways, by the ways' names.
    """

    weight_bytes: Mapping[str, int]
    kv_bytes_per_token: int
    quantized_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def total_weight_bytes(self) -> int:
        """The weights of all models."""
        return sum(self.weight_bytes.values())


@dataclass(frozen=True, slots=True)
class KvPlan:
    """Keys and values: `num_pages` usable pages in every pool, in `num_bytes` with the trash pages.

    The reasons say why there are no more pages, and no longer context.
    """

    num_pages: int
    page_size: int
    num_bytes: int
    max_model_len: int
    pages_reason: str
    context_reason: str

    @property
    def num_tokens(self) -> int:
        """How many tokens fit, of all sequences together."""
        return self.num_pages * self.page_size


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One line of the start-up plan: what, how much, and why so."""

    name: str
    value: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StartPlan:
    """What is told at start, row by row."""

    rows: tuple[PlanRow, ...]

    def with_row(self, name: str, value: str, reason: str = "") -> StartPlan:
        """The plan with one row more at its end."""
        return replace(self, rows=(*self.rows, PlanRow(name, value, reason)))

    def lines(self) -> list[str]:
        """A table for people, with a heading."""
        names = max(len(row.name) for row in self.rows)
        values = max(len(row.value) for row in self.rows)
        table = [f"  {row.name:<{names}}  {row.value:<{values}}  {row.reason}".rstrip() for row in self.rows]
        return ["start-up plan", *table]

    def summary(self) -> str:
        """The same in one line for a log, without the reasons."""
        return ", ".join(f"{row.name} {row.value}" for row in self.rows)


def check_fits(config: EngineConfig, needs: Needs, max_model_len: int, free_bytes: int) -> None:
    """Refuse, before any weight is read, what `free_bytes` of the device cannot hold.

    Raises:
        CheckpointError: it does not fit; says what would.
    """
    left = free_bytes - needs.total_weight_bytes
    if left > 0:
        plan_kv(config, needs, max_model_len, left)
        return
    raise CheckpointError(
        f"weights {size_text(needs.total_weight_bytes)} > {size_text(free_bytes)} free on the device"
        + _advice(_quantization_advice(config, needs, max_model_len, free_bytes))
    )


def plan_kv(config: EngineConfig, needs: Needs, max_model_len: int, free_bytes: int | None) -> KvPlan:
    """Share out KV memory, given what the weights leave free (None: the system does not say).

    `max_model_len` is what the models can, or what was asked for.

    Raises:
        CheckpointError: it holds no sequence of the length that was asked for, or of two pages.
    """
    budget, budget_reason = _kv_budget(config, free_bytes)
    page_bytes = needs.kv_bytes_per_token * config.page_size
    most = config.max_batch * pages_for(max_model_len, config.page_size)
    fitting = budget // page_bytes - 1
    num_pages = min(fitting, most)
    wanted_pages = pages_for(config.max_model_len or 1, config.page_size)
    if num_pages < wanted_pages or (free_bytes is not None and budget > free_bytes):
        raise CheckpointError(_kv_refusal(config, needs, max_model_len, free_bytes))
    capacity = num_pages * config.page_size
    is_cut = capacity < max_model_len
    asked = "asked" if config.max_model_len else "the models' own"
    return KvPlan(
        num_pages=num_pages,
        page_size=config.page_size,
        num_bytes=(num_pages + 1) * page_bytes,
        max_model_len=min(max_model_len, capacity),
        pages_reason=f"limited by KV memory: {budget_reason}"
        if fitting < most
        else f"enough for `max_batch` {config.max_batch} full contexts",
        context_reason=f"limited by KV memory; {asked}: {max_model_len}" if is_cut else asked,
    )


def describe(config: EngineConfig, needs: Needs, kv: KvPlan, *, device: str, dtype: str) -> StartPlan:
    """The rows that are known once all is loaded."""
    rows = [
        PlanRow("device", device, _origin(config.device)),
        PlanRow("dtype", dtype, _origin(config.dtype)),
    ]
    main_bytes = needs.weight_bytes["proposal"]
    rows.append(PlanRow("weights of proposal", size_text(main_bytes), _how_stored(config)))
    if config.aligners:
        others = size_text(needs.total_weight_bytes - main_bytes)
        rows.append(PlanRow("weights of aligners", others, f"{len(config.aligners)} in all"))
    rows += [
        PlanRow("KV memory", size_text(kv.num_bytes), f"{needs.kv_bytes_per_token} bytes a token"),
        PlanRow("KV pages", f"{kv.num_pages} of {kv.page_size} tokens", kv.pages_reason),
        PlanRow("tokens that fit", str(kv.num_tokens), f"{kv.num_tokens // kv.max_model_len} full contexts"),
        PlanRow("longest context", f"{kv.max_model_len} tokens", kv.context_reason),
    ]
    return StartPlan(tuple(rows))


def tell_plan(plan: StartPlan, progress: Callable[[str], None]) -> None:
    """The table, line by line, to whoever waits; one line to the log."""
    logger.info("start-up plan: %s", plan.summary())
    for line in plan.lines():
        progress(line)


def size_text(num_bytes: int) -> str:
    """Bytes for people: "15.2 GiB"."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"


def _how_stored(config: EngineConfig) -> str:
    ways = [f"asked: {config.quantization}"] if config.quantization != "none" else []
    if config.tensor_parallel > 1:
        ways.append(f"asked: one of {config.tensor_parallel} shares")
    return ", ".join(ways)


def _origin(asked: str) -> str:
    return "default (auto)" if asked == "auto" else "asked"


def _kv_budget(config: EngineConfig, free_bytes: int | None) -> tuple[int, str]:
    """Bytes for keys and values, and where the number comes from."""
    if config.kv_memory_bytes:
        return config.kv_memory_bytes, f"asked, {size_text(config.kv_memory_bytes)}"
    if free_bytes is None:
        return _CPU_KV_BYTES, f"default, {size_text(_CPU_KV_BYTES)}"
    share = int(free_bytes * _FREE_SHARE)
    return share, f"default, {_FREE_SHARE:.0%} of {size_text(free_bytes)} free"


def _kv_refusal(config: EngineConfig, needs: Needs, max_model_len: int, free_bytes: int | None) -> str:
    """What was wanted, what there is, and what would fit."""
    budget, _ = _kv_budget(config, free_bytes)
    page_bytes = needs.kv_bytes_per_token * config.page_size
    capacity = max(budget // page_bytes - 1, 0) * config.page_size
    length = config.max_model_len or config.page_size
    # The trash page is not for anybody's tokens.
    wanted = (pages_for(length, config.page_size) + 1) * page_bytes
    weights, sequence = needs.total_weight_bytes, f"KV for 1 sequence of {length} tokens {size_text(wanted)}"
    if free_bytes is not None and budget > free_bytes:
        return (
            f"`kv_memory` {size_text(budget)} > {size_text(free_bytes)} free beside {size_text(weights)} "
            f"of weights; lower `kv_memory` to at most {size_text(free_bytes)}"
        )
    ways = [f"lower `max_model_len` to {capacity}"] if capacity and config.max_model_len else []
    if free_bytes is None or wanted <= free_bytes:
        ways.append(f"raise `kv_memory` to {size_text(wanted)}")
    if free_bytes is None or config.kv_memory_bytes:
        said = f"{sequence} > {size_text(budget)} of `kv_memory`, which hold {capacity} tokens"
        return said + _advice(ways)
    ways += _quantization_advice(config, needs, max_model_len, free_bytes + weights)
    return (
        f"weights {size_text(weights)} + {sequence} > {size_text(free_bytes + weights)} free, of which "
        f"{size_text(budget)} for KV hold {capacity} tokens" + _advice(ways)
    )


def _quantization_advice(
    config: EngineConfig, needs: Needs, max_model_len: int, free_bytes: int
) -> list[str]:
    """The first way of storing the proposal's weights with which all would fit."""
    for name, num_bytes in needs.quantized_bytes.items():
        smaller = Needs({"all": num_bytes}, needs.kv_bytes_per_token)
        try:
            check_fits(config, smaller, max_model_len, free_bytes)
        except CheckpointError:
            continue
        return [f"set `quantization` to {name} (weights {size_text(num_bytes)})"]
    return []


def _advice(ways: Iterable[str]) -> str:
    return "; " + ", or ".join(ways) if ways else ""
