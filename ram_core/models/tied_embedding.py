"""Embeddings that are tied to a packed head: the weight is in memory once, as the head multiplies it."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


class Head(Protocol):
    """What has the weight."""

    @property
    def weight(self) -> Tensor:
        """A copy of all of it, plainly laid out."""

    def rows_of(self, ids: Int64[Tensor, " token"]) -> Float[Tensor, "token feature"]:
        """Some rows of it."""


def take_rows_of(embedding: nn.Embedding, head: Head) -> None:
    """Have an embedding let go of its weight, and look its rows up in that of a head, for inference alone."""
    if not is_tied(embedding):
        del embedding._parameters["weight"]
        # It says which row is not trained, and is compared with the size of what rows are looked up in.
        embedding.padding_idx = None
        embedding.__class__ = _tied_class(type(embedding))  # type: ignore[arg-type]
    # A module that is no part of this one.
    embedding.__dict__["head"] = head


def is_tied(module: nn.Module) -> bool:
    """Whether `take_rows_of` was done to it."""
    return isinstance(module, nn.Embedding) and "weight" not in module._parameters and "head" in vars(module)


@cache
def _tied_class(kind: type[Any]) -> type[nn.Embedding]:
    """A subclass whose own code goes on to run, on no more rows than there are tokens."""
    attributes = {"weight": property(_weight), "forward": _embed, "kind": kind}
    return type(f"Tied{kind.__name__}", (kind,), attributes)


def _weight(module: Any) -> Tensor:
    rows: Tensor | None = vars(module).get("rows")
    return module.head.weight if rows is None else rows


def _embed(module: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    vars(module)["rows"] = module.head.rows_of(ids.reshape(-1))
    try:
        numbers = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        return module.kind.forward(module, numbers, *args, **kwargs)
    finally:
        del vars(module)["rows"]
