"""Models of one architecture as one module whose every weight has a leading slot axis.

The model's code stays its own: only its leaves are replaced, by twins that take for each token the weights
of its slot. On a device a linear layer's twin is a grouped product; on CPU it multiplies the rows of each
slot by that slot's weight, laid out as `packed_linear` does it for a model alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from ram_core.errors import CheckpointError
from ram_core.models.grouped_linear import current_groups, grouped_linear, rows_of_layer
from ram_core.models.model_stack import ModelStack, Twin, by_module, head_of, replace_module
from ram_core.models.packed_linear import PackedLinear, is_lookup
from ram_core.models.paged import PagedModel
from ram_core.models.slot_linear import Linear, SlotLinear, is_to_be_packed
from ram_core.models.stored import StoredTensor, StoredWeights, Weight, put
from ram_core.models.tied_embedding import is_tied, take_rows_of

_NORM_NAMES = {"weight", "bias"}
_PREFIX = "stacked_"
_ALIGNMENT = 64
"""Bytes; as PyTorch aligns what it allocates."""
_KEPT_BYTES = 1 << 30
"""Models that take no more on CPU leave their memory to the next one."""


class StackedModel(ModelStack):
    """`num_slots` models of the architecture of `paged`, whose leaves this replaces; all slots begin empty.

    With `axes`, as `trailing_axes` says them of the same model without weights, it is not run to know.

    Raises:
        CheckpointError: the architecture has weights outside the leaves that can be replaced; nothing was.
    """

    def __init__(self, paged: PagedModel, num_slots: int, axes: Mapping[str, int] | None = None) -> None:
        if reason := unstackable_reason(paged.model):
            raise CheckpointError(f"`{paged.name}` shares no module with others: {reason}")
        self._shapes, self._tied = _shapes(paged.model), _tied(paged.model)
        self._keeps_room = paged.device.type == "cpu" and paged.weight_bytes <= _KEPT_BYTES
        self._filled: set[int] = set()
        axes = axes or trailing_axes(paged)
        twins = _replace_leaves(paged.model, num_slots, axes, keeps_room=self._keeps_room)
        super().__init__(paged, num_slots, twins, slot_bytes=paged.weight_bytes)

    @property
    def is_worth_keeping(self) -> bool:
        """Whether it is little that a stack takes of which all slots are empty: the memory of one slot."""
        return self._keeps_room and len(self._filled) <= 1

    def weights_in(self, stored: StoredWeights) -> dict[str, StoredTensor] | None:
        """What `stage` takes, if a checkpoint's weights have the names and shapes of this architecture's.

        None if not: then transformers knows which they are, perhaps, as it renames, splits and joins weights.
        """
        return _weights_in(stored, self._shapes, self._tied)

    def stage(self, slot: int, weights: Mapping[str, Weight]) -> None:
        """Begin to put a model's weights, as `plain_weights` names them, into a slot that nothing uses.

        Raises:
            CheckpointError: a weight is missing, unknown, of another shape, or no finite number; or two are
                not the same that are one here.
        """
        odd = sorted(self._shapes.keys() ^ weights.keys())
        odd += [
            name for name, shape in self._shapes.items() if name in weights and weights[name].shape != shape
        ]
        if odd:
            raise CheckpointError(f"weights of another architecture than `{self.paged.name}`'s: `{odd[0]}`")
        for name, source in self._tied.items():
            if not _is_same(weights[name], weights[source]):
                raise CheckpointError(f"`{name}` and `{source}` are one weight in `{self.paged.name}`")
        self._filled.add(slot)
        self._copy(slot, by_module(weights))


def fits_as_stored(model: nn.Module, stored: StoredWeights) -> bool:
    """Whether a stack made of a model takes a checkpoint's weights as they are."""
    return _weights_in(stored, _shapes(model), _tied(model)) is not None


def _weights_in(
    stored: StoredWeights, shapes: Mapping[str, torch.Size], tied: Mapping[str, str]
) -> dict[str, StoredTensor] | None:
    found = stored.tensors
    own = shapes.keys() - tied.keys()
    if stored.odd or found.keys() != own or any(found[name].shape != shapes[name] for name in own):
        return None
    return {name: found[tied.get(name, name)] for name in shapes}


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """As `plain_weights`, their shapes alone: what is packed is not laid out plainly for that."""
    shapes = {name: value.shape for name, value in model.named_parameters(remove_duplicate=False)}
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            shapes[f"{name}.weight"] = torch.Size((layer.out_features, layer.in_features))
        elif is_tied(layer):
            shapes[f"{name}.weight"] = torch.Size((layer.num_embeddings, layer.embedding_dim))
    return shapes


def _tied(model: nn.Module) -> dict[str, str]:
    """Names of weights that are another one's, with its name."""
    shapes, known = _shapes(model), dict(getattr(model, "all_tied_weights_keys", {}))
    names = {id(layer): name for name, layer in model.named_modules()}
    for name, layer in model.named_modules():
        if is_tied(layer):
            known[f"{names[id(layer.head)]}.weight"] = f"{name}.weight"
    return {name: source for name, source in known.items() if name in shapes and source in shapes}


def _is_same(one: Weight, other: Weight) -> bool:
    if isinstance(one, StoredTensor) or isinstance(other, StoredTensor):
        return one is other
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight of a model by name, those of packed layers and tied ones too."""
    weights = {name: value.detach() for name, value in model.named_parameters(remove_duplicate=False)}
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    weights |= {f"{name}.weight": layer.weight for name, layer in packed.items()}
    return {source: weights[name] for name, source in _tied(model).items()} | weights


def unstackable_reason(model: nn.Module) -> str | None:
    """Why models of this architecture cannot share a module; None if nothing is known to speak against it."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        kept = {key for key, _ in module.named_buffers(recurse=False)}
        if kept - module._non_persistent_buffers_set:
            return f"`{name}` keeps numbers that are no weights"
        if own and not (is_linear(module) or is_lookup(module) or _is_norm(module)):
            return f"`{name}` is a {type(module).__name__}, which is no linear layer, embedding or norm"
        if any(type(value) is not nn.Parameter for value in own.values()):
            return f"`{name}` has weights of a layout of its own"
    return None


def is_linear(module: nn.Module) -> TypeGuard[Linear]:
    """A plain linear layer, as it was or packed; not a subclass, which may do more than multiply."""
    return type(module) in (nn.Linear, PackedLinear)


def _is_norm(module: nn.Module) -> bool:
    """Scales, and perhaps shifts, each feature by a number of its own."""
    own = dict(module.named_parameters(recurse=False))
    is_flat = all(value.ndim == 1 for value in own.values())
    is_leaf = not is_linear(module) and not list(module.children())
    return bool(own) and is_leaf and is_flat and own.keys() <= _NORM_NAMES


@torch.inference_mode()
def trailing_axes(paged: PagedModel) -> dict[str, int]:
    """How many axes each norm's input has after that of the tokens: what differs with their number.

    Raises:
        CheckpointError: a norm does not see every token once.
    """
    norms = {name: module for name, module in paged.model.named_modules() if _is_norm(module)}
    seen: dict[str, list[tuple[int, ...]]] = {name: [] for name in norms}

    def watch(name: str) -> Any:
        return lambda _, inputs: seen[name].append(tuple(inputs[0].shape))

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in norms.items()]
    try:
        for num_tokens in (2, 3):
            paged.run_blank(num_tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _axes_behind(name, shapes) for name, shapes in seen.items()}


def _axes_behind(name: str, shapes: list[tuple[int, ...]]) -> int:
    if len(shapes) == 2 and len(shapes[0]) == len(shapes[1]):
        axes = [at for at, sizes in enumerate(zip(*shapes, strict=True)) if sizes == (2, 3)]
        if len(axes) == 1 and axes[0] < len(shapes[0]) - 1:
            return len(shapes[0]) - axes[0] - 1
    raise CheckpointError(f"`{name}` does not see every token once, but {shapes}")


def _replace_leaves(
    model: nn.Module, num_slots: int, trailing_axes: Mapping[str, int], *, keeps_room: bool
) -> dict[str, Twin]:
    """Twins by the names of what they replace, in the order in which they are staged.

    Embeddings come first, as heads may be tied to them, and then heads: their work is done before a disk has
    given the last layer. An embedding that a packed head is tied to has no twin: its rows are the head's.
    """
    leaves = dict(model.named_modules())
    ties = {_owner(name): _owner(source) for name, source in _tied(model).items()}
    lent = {
        source: name
        for name, source in ties.items()
        if _gets_packed(leaves[name]) and is_lookup(leaves[source])
    }
    embeddings = {
        name: _Leaf(module, num_slots, trailing_axes=1)
        for name, module in leaves.items()
        if is_lookup(module) and name not in lent
    }
    twins: dict[str, Twin] = dict(embeddings)
    head = head_of(model)
    for name, module in sorted(leaves.items(), key=lambda leaf: leaf[1] is not head):
        if is_linear(module):
            own, is_head = embeddings.get(ties.get(name, "")), module is head
            tied = None if own is None else own.stacks["weight"]
            if _is_on_cpu(module):
                twins[name] = SlotLinear(module, num_slots, is_head=is_head, tied=tied, keeps_room=keeps_room)
            else:
                twins[name] = StackedLinear(module, num_slots, is_head=is_head, tied=tied)
        elif name not in twins and name not in lent and list(module.parameters(recurse=False)):
            twins[name] = _Leaf(module, num_slots, trailing_axes[name])
    for name, twin in twins.items():
        if isinstance(twin, nn.Module):
            replace_module(model, name, twin)
    for source, name in lent.items():
        embedding, owner = leaves[source], twins[name]
        assert is_lookup(embedding)
        assert isinstance(owner, SlotLinear)
        take_rows_of(embedding, owner)
    return twins


def _is_on_cpu(layer: Linear) -> bool:
    """What is packed is, and has no weight to look at without a copy."""
    return isinstance(layer, PackedLinear) or layer.weight.device.type == "cpu"


def _gets_packed(module: nn.Module) -> bool:
    """Whether a slot of it is laid out for the CPU."""
    return is_linear(module) and _is_on_cpu(module) and is_to_be_packed(module)


def _owner(weight: str) -> str:
    """The name of the module that has a weight."""
    return weight.rpartition(".")[0]


class StackedLinear(nn.Module):
    """Linear layers as one tensor, on a device, where none is packed."""

    def __init__(self, layer: Linear, num_slots: int, *, is_head: bool, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._is_head, self._is_tied = is_head, tied is not None
        self.weight = _stack(layer.weight, num_slots) if tied is None else tied
        self.bias = None if layer.bias is None else _stack(layer.bias, num_slots)

    def stage(self, slot: int, weights: Mapping[str, Weight]) -> None:
        """Copy a slot's weights; tied ones are the embedding's to copy."""
        if not self._is_tied:
            put(self.weight[slot], weights["weight"])
        if self.bias is not None:
            put(self.bias[slot], weights["bias"])

    def clear(self, slot: int) -> None:
        """The memory stays: it is the next one's."""

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight[slot of each row].T`, for `x` of shape [..., in_features]."""
        rows = x.reshape(-1, self.in_features)
        out = grouped_linear(rows, self.weight, self.bias, rows_of_layer(self._is_head))
        return out.view(*x.shape[:-1], self.out_features)


def _stack(weight: Tensor, num_slots: int) -> nn.Parameter:
    return nn.Parameter(_zeros(weight, (num_slots, *weight.shape)), requires_grad=False)


def _zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros; on CPU, memory that is not taken from the system before somebody writes to it."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    num_bytes = prod(shape) * like.dtype.itemsize
    room = torch.from_numpy(np.zeros(num_bytes + _ALIGNMENT, np.uint8))
    start = -room.data_ptr() % _ALIGNMENT
    return room[start : start + num_bytes].view(like.dtype).view(shape)


class _Leaf:
    """An embedding or norm whose own code goes on to run, with weights that differ from token to token."""

    def __init__(self, module: nn.Module, num_slots: int, trailing_axes: int) -> None:
        self.stacks: dict[str, nn.Parameter] = {}
        for name, weight in list(module.named_parameters(recurse=False)):
            self.stacks[name] = _stack(weight, num_slots)
            del module._parameters[name]
            module.register_parameter(_PREFIX + name, self.stacks[name])
        # Between tokens and features, weights are the same for all, as for the heads of one token.
        module.__dict__["middle"] = (1,) * (trailing_axes - 1)
        module.__class__ = _stacked_class(type(module), tuple(self.stacks))  # type: ignore[arg-type]

    def stage(self, slot: int, weights: Mapping[str, Weight]) -> None:
        """Copy a slot's weights."""
        for name, stack in self.stacks.items():
            put(stack[slot], weights[name])

    def clear(self, slot: int) -> None:
        """The memory stays: it is the next one's."""


@cache
def _stacked_class(kind: type[Any], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass that finds other weights where it looks for its own."""
    if issubclass(kind, nn.Embedding):
        attributes: dict[str, Any] = {"weight": property(_all_rows), "forward": _embed}
    else:
        attributes = {name: property(_token_weights(_PREFIX + name)) for name in names}
        if issubclass(kind, nn.LayerNorm):
            attributes["forward"] = _layer_norm
    return type(f"Stacked{kind.__name__}", (kind,), {**attributes, "kind": kind})


def _all_rows(module: Any) -> Tensor:
    """The rows of all slots' embeddings, one after the other."""
    stack: Tensor = module._parameters[_PREFIX + "weight"]
    return stack.flatten(0, 1)


def _embed(module: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    rows = ids + (current_groups().tokens.slots * module.num_embeddings).view(ids.shape)
    return module.kind.forward(module, rows, *args, **kwargs)


def _token_weights(name: str) -> Any:
    def weights(module: Any) -> Tensor:
        """[feature] if the host knows all tokens to be of one slot, else [token, …, feature]."""
        groups = current_groups().tokens
        stack: Tensor = module._parameters[name]
        if groups.spans is not None and len(groups.spans) == 1:
            return stack[groups.spans[0][0]]
        own = stack[groups.slots]
        return own.view(len(own), *module.middle, -1)

    return weights


def _layer_norm(module: Any, x: Tensor) -> Tensor:
    """PyTorch's own insists on one weight for all tokens."""
    out = layer_norm(x, module.normalized_shape, None, None, module.eps)
    if _PREFIX + "weight" in module._parameters:
        out = out * module.weight
    return out + module.bias if _PREFIX + "bias" in module._parameters else out
