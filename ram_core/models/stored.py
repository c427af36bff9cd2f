"""Weights read from safetensors files straight to where they are wanted, a piece at a time.

Files are read, not mapped: one that is cut off meanwhile is an error then, and not the end of the process.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ram_core.errors import CheckpointError
from ram_core.models.weight_files import TensorHeader, read_header_of, weight_files

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE_BYTES = 1 << 22
"""It is looked at while it is in the cores' cache, and no step beside it waits for long."""

OnRead = Callable[[int], None]
"""Told how many bytes were read since the last time."""


class StoredWeights:
    """The floats of a checkpoint, or of one file, by name; a context, which closes the files at its end."""

    def __init__(self, place: Path, on_read: OnRead = lambda num_bytes: None) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self.odd: set[str] = set()
        """Names of what is stored and is no float."""
        pieces = _Pieces()
        with ExitStack() as exits:
            for path in [place] if place.is_file() else weight_files(place):
                # The same file for good, whatever takes its name meanwhile.
                file = exits.enter_context(path.open("rb", buffering=0))
                self._add(file, path.name, pieces, on_read)
            self._exits = exits.pop_all()

    @property
    def num_bytes(self) -> int:
        """Bytes of all that can be read."""
        return sum(each.num_bytes for each in self.tensors.values())

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._exits.close()

    def _add(self, file: io.FileIO, file_name: str, pieces: _Pieces, on_read: OnRead) -> None:
        for name, header in read_header_of(file, file_name).items():
            if header.dtype in _DTYPES:
                self.tensors[name] = StoredTensor(name, header, file, pieces, on_read)
            else:
                self.odd.add(name)


class StoredTensor:
    """A tensor that lies in a file."""

    def __init__(
        self, name: str, header: TensorHeader, file: io.FileIO, pieces: _Pieces, on_read: OnRead
    ) -> None:
        self.name = name
        self.shape = torch.Size(header.shape)
        self.dtype = _DTYPES[header.dtype]
        self._start = header.start
        self._file = file
        self._pieces = pieces
        self._on_read = on_read

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.shape.numel() * self.dtype.itemsize

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor on the host, for the caller alone; raises as `copy_to`."""
        target = torch.empty(self.shape, dtype=dtype)
        self.copy_to(target)
        return target

    def rows(self, dtype: torch.dtype, multiple: int) -> Iterator[Tensor]:
        """A matrix on the host, some rows at a time, lent until the next are asked for; raises as `copy_to`.

        As many as a piece takes, and but for the last a multiple of so many.
        """
        num_rows, row_size = self.shape
        least_bytes = multiple * row_size * max(dtype.itemsize, self.dtype.itemsize)
        step = max(_PIECE_BYTES // least_bytes, 1) * multiple
        for at in range(0, num_rows, step):
            count = min(step, num_rows - at)
            part = self._pieces.room(count * row_size * dtype.itemsize).view(dtype)
            self._copy(part, at * row_size)
            yield part.view(count, row_size)

    def copy_to(self, target: Tensor) -> None:
        """Fill a contiguous tensor of the same shape; on a device, by its current stream.

        Raises:
            CheckpointError: the file ends too early, or a weight is no finite number.
        """
        self._copy(target.view(-1), 0)

    def _copy(self, flat: Tensor, first: int) -> None:
        """Fill a flat tensor with the numbers from number `first` on."""
        is_direct = flat.device.type == "cpu" and flat.dtype == self.dtype
        step = _PIECE_BYTES // self.dtype.itemsize
        for at in range(0, len(flat), step):
            part = flat[at : at + step]
            if is_direct:
                self._fill(part, first + at)
            else:
                self._pieces.send(part, self.dtype, partial(self._fill, at=first + at))

    def _fill(self, part: Tensor, at: int) -> None:
        """Read the numbers from number `at` on."""
        room = part.view(torch.uint8).numpy().data
        self._file.seek(self._start + at * self.dtype.itemsize)
        while room:
            count = self._file.readinto(room)
            if not count:
                raise CheckpointError(f"its weights are cut off within `{self.name}`")
            room = room[count:]
        if not is_finite(part):
            raise CheckpointError(f"`{self.name}` has weights that are no finite numbers")
        self._on_read(part.nbytes)


Weight = Tensor | StoredTensor
"""A weight in memory, or one that still lies in a file."""


def put(target: Tensor, weight: Weight) -> None:
    """Copy a weight to its place; on a device, by its current stream."""
    if isinstance(weight, StoredTensor):
        weight.copy_to(target)
    else:
        target.copy_(weight, non_blocking=True)


@torch.no_grad()
def take_from_files(model: nn.Module) -> None:
    """Copy what of a model's weights lies in a file that is mapped into memory, as transformers leaves them.

    Whoever writes to the file would change them, and whoever cuts it off would end the process.
    """
    for weight in itertools.chain(model.parameters(), model.buffers()):
        # Quantised ones are tensors of their own kinds, made in memory.
        is_plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu"
        # What PyTorch has not allocated by itself, it cannot resize.
        if is_plain and not weight.untyped_storage().resizable():
            weight.data = weight.detach().clone()


def is_finite(part: Tensor) -> bool:
    """Whether all numbers of a tensor are finite; makes no tensor of its size if they are."""
    total = part.sum(dtype=torch.float64 if part.dtype == torch.float64 else torch.float32)
    return bool(total.isfinite()) or bool(part.isfinite().all())


class _Pieces:
    """Memory on the host that is filled again and again, several times as fast as new memory.

    Of two buffers, one is filled while the device still copies from the other; the third is lent.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._turns = itertools.cycle(range(2))
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._room = torch.empty(0, dtype=torch.uint8)

    def room(self, num_bytes: int) -> Tensor:
        """Memory for so many bytes, the same as the last time if it is enough."""
        if len(self._room) < num_bytes:
            self._room = torch.empty(num_bytes, dtype=torch.uint8)
        return self._room[:num_bytes]

    def send(self, target: Tensor, dtype: torch.dtype, fill: Callable[[Tensor], None]) -> None:
        """Have numbers of `dtype` filled in, and copied to `target`, of another dtype or elsewhere."""
        is_far = target.device.type == "cuda"
        if not self._buffers:
            new = partial(torch.empty, _PIECE_BYTES, dtype=torch.uint8, pin_memory=is_far)
            self._buffers = [new(), new()]
        turn = next(self._turns)
        if (sent := self._sent[turn]) is not None:
            sent.synchronize()
        piece = self._buffers[turn][: len(target) * dtype.itemsize].view(dtype)
        fill(piece)
        if not is_far:
            target.copy_(piece)
            return
        # What has to be rounded is rounded there.
        source = piece if target.dtype == dtype else piece.to(target.device, non_blocking=True)
        target.copy_(source, non_blocking=True)
        self._sent[turn] = event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
