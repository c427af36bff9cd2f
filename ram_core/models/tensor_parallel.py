"""A model over several processes, each with a device and a share of every layer.

torchrun begins the processes; transformers' own plan cuts the layers up and puts collectives between them.
Rank 0 decides what is computed: before each forward it tells the others, who follow with the same batch,
their own share of the heads, and their own pages. Aligners are whole on every rank; only rank 0 runs them.

If a rank dies, or keeps the others waiting inside a forward, their collectives fail, and so do they.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ram_core.errors import CheckpointError
from ram_core.models.kv import KvPool
from ram_core.models.packing import PackedBatch
from ram_core.models.paged import PagedModel

COLLECTIVE_S = 60.0
"""A rank that keeps the others waiting for so long inside a forward is taken for dead."""
# Reading weights may take very different times.
_LOADING = timedelta(hours=2)
# Between forwards rank 0 is never late: that it died is seen by its closed connection.
_FOR_EVER = timedelta(days=365)
_ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that share a model, seen from number `rank`; there may be only this one.

    They meet in two groups: `loading` while they load, `orders` for what rank 0 tells the others.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    loading: dist.ProcessGroup | None = None
    orders: dist.ProcessGroup | None = None

    def least(self, number: int | None) -> int | None:
        """The smallest of the numbers that all ranks give; all wait for the last of them."""
        if self.size == 1 or number is None:
            return number
        shared = torch.tensor(number)
        dist.all_reduce(shared, dist.ReduceOp.MIN, group=self.loading)
        return int(shared)

    def wait(self) -> None:
        """Return once all ranks have come here, however long that takes."""
        if self.size > 1:
            dist.barrier(group=self.loading)


def join(num_ranks: int, device: torch.device) -> Ranks:
    """Take this process' place among `num_ranks`, and its device.

    Raises:
        CheckpointError: torchrun did not begin so many processes, or there are not so many devices.
    """
    if num_ranks == 1:
        return Ranks(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != num_ranks or not all(name in os.environ for name in _ENVIRONMENT):
        raise CheckpointError(
            f"`tensor_parallel` {num_ranks} needs {num_ranks} processes, got {world}: "
            f"begin them with `torchrun --nproc-per-node {num_ranks}`"
        )
    device = _own_device(num_ranks, device)
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            timeout=_collective(),
            device_id=None if device.type == "cpu" else device,
        )
    loading = dist.new_group(backend="gloo", timeout=_LOADING)
    orders = dist.new_group(backend="gloo", timeout=_FOR_EVER if dist.get_rank() else _collective())
    return Ranks(device, dist.get_rank(), num_ranks, loading, orders)


def is_first_rank() -> bool:
    """Whether this process has the word: the only one, or the first that torchrun began."""
    return os.environ.get("RANK", "0") == "0"


def check_shares(num_ranks: int, config: PreTrainedConfig) -> None:
    """Refuse a model whose attention cannot be cut into so many equal shares.

    Raises:
        CheckpointError: it cannot, or transformers has no plan for it.
    """
    if num_ranks < 1:
        raise CheckpointError(f"`tensor_parallel` must be at least 1, got {num_ranks}")
    if num_ranks == 1:
        return
    text = config.get_text_config(decoder=True)
    if not getattr(text, "base_model_tp_plan", None):
        raise CheckpointError(f"`tensor_parallel`: transformers has no plan for `{text.model_type}` models")
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, name, None) or text.num_attention_heads
        if heads % num_ranks:
            raise CheckpointError(
                f"`tensor_parallel` is {num_ranks}, which does not divide the model's `{name}` {heads}"
            )


def parallel_options(num_ranks: int) -> dict[str, Any]:
    """What `from_pretrained` has to be told to load only this rank's share."""
    if num_ranks == 1:
        return {}
    # Not in the first versions of transformers 5.
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=num_ranks)}


class SharedModel(PagedModel):
    """This rank's share of a model. Once it leads, every forward is announced to the other ranks first."""

    def __init__(self, model: PreTrainedModel, *, name: str, ranks: Ranks, attention: str = "auto") -> None:
        ranks.wait()
        super().__init__(model, name=name, attention=attention)
        self._ranks = ranks
        self._is_leading = False

    def lead(self) -> None:
        """Begin to announce forwards; all other ranks have to `follow`."""
        self._is_leading = True

    def forward(self, batch: PackedBatch, pool: KvPool) -> Tensor:
        """As `PagedModel.forward`; every rank computes the logits."""
        if self._is_leading:
            _announce(batch, self._ranks)
        return super().forward(batch, pool)

    def release(self) -> None:
        """Let the other ranks go."""
        if self._is_leading:
            _announce(None, self._ranks)
            self._is_leading = False

    def follow(self, pool: KvPool) -> None:
        """Compute this rank's share of each forward that rank 0 announces, until it lets go.

        Raises:
            RuntimeError: another rank died.
        """
        while (batch := _hear(self._ranks)) is not None:
            super().forward(batch, pool)


def _collective() -> timedelta:
    return timedelta(seconds=COLLECTIVE_S)


def _own_device(num_ranks: int, device: torch.device) -> torch.device:
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.type == "cpu":
        if torch.cuda.is_available():
            raise CheckpointError("`tensor_parallel` on CPU is possible only where there is no CUDA device")
        return device
    num_cuda = torch.cuda.device_count()
    if num_cuda < num_ranks:
        raise CheckpointError(
            f"`tensor_parallel` is {num_ranks}, but PyTorch sees {num_cuda} CUDA devices here"
        )
    own = torch.device("cuda", local_rank)
    torch.cuda.set_device(own)
    return own


def _announce(batch: PackedBatch | None, ranks: Ranks) -> None:
    """Shapes and the host's numbers as an order, the device's numbers from device to device."""
    if batch is None:
        dist.broadcast_object_list([None], src=0, group=ranks.orders)
        return
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    shapes = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    known = {name: value for name, value in values.items() if name not in tensors}
    dist.broadcast_object_list([(shapes, known)], src=0, group=ranks.orders)
    dist.broadcast(torch.cat([value.reshape(-1).long() for value in tensors.values()]), src=0)


def _hear(ranks: Ranks) -> PackedBatch | None:
    heard: list[Any] = [None]
    dist.broadcast_object_list(heard, src=0, group=ranks.orders)
    if heard[0] is None:
        return None
    shapes, known = heard[0]
    lengths = [shape.numel() for shape, _ in shapes.values()]
    flat = torch.empty(sum(lengths), dtype=torch.int64, device=ranks.device)
    dist.broadcast(flat, src=0)
    parts = zip(shapes.items(), torch.split(flat, lengths), strict=True)
    tensors: dict[str, Any] = {name: part.view(shape).to(dtype) for (name, (shape, dtype)), part in parts}
    return PackedBatch(**known, **tensors)
