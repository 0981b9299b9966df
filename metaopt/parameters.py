"""Which tensors adapt: the affine weight and bias of every normalisation layer, or all that a model has.

The adapted tensors are kept as a dictionary from their name in the model to the tensor, in the model's own order, ready
for :func:`call_with`. Rules that treat all adapted scalars alike flatten that dictionary once per step.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.errors import ModelError
from metaopt.norm_layers import affine_tensors, fixed_tensors, norm_kind
from metaopt.types import Parameters, widened


@dataclass(frozen=True)
class AdaptedTensor:
    """Where one adapted tensor sits in its model."""

    name: str
    kind: str  # normalisation kind and role, such as "batch_norm.weight"
    depth: float  # position among the model's normalisation layers, 0 (first) to 1 (last)
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of scalars in the tensor."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel


@dataclass(frozen=True)
class ParameterLayout:
    """The adapted tensors of one model, in order."""

    tensors: tuple[AdaptedTensor, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the model, in order."""
        return tuple(tensor.name for tensor in self.tensors)

    @property
    def numel(self) -> int:
        """N, the number of adapted scalars."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by its name."""
        return {tensor.name: tensor.shape for tensor in self.tensors}

    def take(self, model: nn.Module) -> Parameters:
        """The model's own tensors (not copies), by name."""
        # Duplicates too: a tensor tied to another module's may go by that one's name first.
        own = dict(model.named_parameters(remove_duplicate=False))
        return {name: own[name] for name in self.names}

    def to_list(self) -> list[dict[str, object]]:
        """Primitives for a checkpoint."""
        return [{"name": t.name, "kind": t.kind, "depth": t.depth, "shape": list(t.shape)} for t in self.tensors]

    @classmethod
    def from_list(cls, rows: Iterable[Mapping[str, Any]]) -> "ParameterLayout":
        """Inverse of :meth:`to_list`.

        Raises:
            ValueError: a row is of other types or out of range, or a name comes twice.
        """
        tensors = tuple(_tensor_from(row) for row in rows)
        if len({tensor.name for tensor in tensors}) != len(tensors) or not tensors:
            raise ValueError("an adapted tensor is listed twice, or none is")
        return cls(tensors)


def _tensor_from(row: Mapping[str, Any]) -> AdaptedTensor:
    name, kind, depth, shape = (row[key] for key in ("name", "kind", "depth", "shape"))
    named = isinstance(name, str) and isinstance(kind, str)
    placed = type(depth) in (int, float) and 0 <= depth <= 1
    shaped = isinstance(shape, list | tuple) and all(type(size) is int and size >= 0 for size in shape)
    if not (named and placed and shaped):
        raise ValueError(f"{dict(row)!r:.120} describes no adapted tensor")
    return AdaptedTensor(name, kind, float(depth), tuple(shape))


def adapted_layout(model: nn.Module) -> ParameterLayout:
    """Find the affine tensors of all normalisation layers.

    Args:
        model: any module; tensors shared between layers are listed once, at their first name. Left out are those
            that it calls ``fixed``, as skeletons of a ``SourceModel`` do, else those of
            `metaopt.norm_layers.fixed_tensors`.

    Raises:
        ModelError: the model has no normalisation layer with a weight or bias, or has frozen batch normalisation.
    """
    fixed: frozenset[str] | None = getattr(model, "fixed", None)
    fixed = fixed_tensors(model) if fixed is None else fixed
    layers = [(name, module, norm_kind(module)) for name, module in model.named_modules()]
    norms = [(name, module, kind) for name, module, kind in layers if kind is not None]
    seen: set[int] = set()
    tensors: list[AdaptedTensor] = []
    for position, (name, module, kind) in enumerate(norms):
        depth = position / max(1, len(norms) - 1)
        for role, own in affine_tensors(module).items():
            tensor, full_name = module._parameters[own], f"{name}.{own}" if name else own
            if tensor is not None and id(tensor) not in seen and full_name not in fixed:
                seen.add(id(tensor))
                tensors.append(AdaptedTensor(full_name, f"{kind}.{role}", depth, tuple(tensor.shape)))
    if not tensors:
        raise ModelError(
            f"{type(model).__name__} has no normalisation layer with a weight or bias, so nothing can adapt; allowed "
            "are models with BatchNorm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm, or a class called ...Norm with a "
            "weight: use one of those"
        )
    return ParameterLayout(tuple(tensors))


def full_layout(model: nn.Module) -> ParameterLayout:
    """Every parameter of a model; kinds are those of :func:`adapted_layout`, elsewhere the module's class and the role.

    Args:
        model: any module; tensors shared between layers are listed once, at their first name.

    Raises:
        ModelError: the model has frozen batch normalisation.
    """
    named = list(model.named_parameters())
    tensors: list[AdaptedTensor] = []
    for position, (name, tensor) in enumerate(named):
        owner, _, role = name.rpartition(".")
        module = model.get_submodule(owner)
        kind = norm_kind(module) or type(module).__name__
        depth = position / max(1, len(named) - 1)
        tensors.append(AdaptedTensor(name, f"{kind}.{role}", depth, tuple(tensor.shape)))
    return ParameterLayout(tuple(tensors))


def call_with(
    model: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Any:
    """The model's output with other tensors in place of its own, which come back in any case.

    As ``torch.func.functional_call``, but for ties: a tensor that several modules share is replaced in all of them, and
    in a module that goes by several names once. torch swaps that one under each name, and what it puts back last is
    the stand-in. And it takes one quick walk over the modules, where small networks would wait for names.

    Args:
        model: any module.
        tensors: by a name of the parameter or buffer that each stands in for.
        args: of the forward pass.
        kwargs: of the forward pass.

    Raises:
        AttributeError: the model has none of that name.
    """
    standing_in = {id(own_tensor(model, name)): tensor for name, tensor in tensors.items()}
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in walked(model):
        for table in (module._parameters, module._buffers):
            for role, own in table.items():
                if own is not None and id(own) in standing_in:
                    swapped.append((table, role, own))
    found = {id(own) for _, _, own in swapped}
    for name in tensors if len(found) < len(standing_in) else ():
        if id(own_tensor(model, name)) not in found:
            raise AttributeError(f"{name} of {type(model).__name__} is no parameter or buffer, so nothing stands in")
    try:
        for table, role, own in swapped:
            table[role] = standing_in[id(own)]
        return model(*args, **(kwargs or {}))
    finally:
        for table, role, own in swapped:
            table[role] = own


def walked(model: nn.Module) -> list[nn.Module]:
    """Each module of a model once, in any order: ``modules()`` without the names, whose making takes longer."""
    found, seen = [model], {model}
    for module in found:  # which grows
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def own_tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of the model by its name.

    Raises:
        AttributeError: there is none.
    """
    *path, role = name.split(".")
    owner: nn.Module | None = model
    for child in path:
        owner = None if owner is None else owner._modules.get(child)
    if owner is None:
        raise AttributeError(f"{type(model).__name__} has no module {'.'.join(path)}")
    found = owner._parameters.get(role)
    if found is None:
        found = getattr(owner, role)
    assert isinstance(found, Tensor)
    return found


def own_values(model: nn.Module, names: Iterable[str]) -> Parameters:
    """The model's own values of some of its tensors, which adaptation never changes, detached; float32 at least."""
    return {name: widened(own_tensor(model, name).detach()) for name in names}


def flatten(parameters: Parameters) -> Tensor:
    """All scalars in order, shape (N,)."""
    return torch.cat([tensor.reshape(-1) for tensor in parameters.values()])


def unflatten(flat: Tensor, like: Parameters) -> Parameters:
    """Inverse of :func:`flatten`: cut ``flat`` (N,) into the shapes of ``like``."""
    pieces = flat.split([tensor.numel() for tensor in like.values()])
    return {name: piece.view(like[name].shape) for name, piece in zip(like, pieces, strict=True)}


def detached(parameters: Parameters) -> Parameters:
    """The same values cut from every graph, as fresh leaves that require a gradient."""
    return {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
