"""The generator in three ecosystems: ``torch.optim``, torchopt and higher. All three give the same parameters."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import higher
import torch
from higher.optim import DifferentiableOptimizer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torchopt import pytree as trees
from torchopt.base import GradientTransformation

from metaopt.errors import CheckpointError, ConfigError
from metaopt.generator.mgg import GeneratorState, GradientGenerator
from metaopt.types import Parameters, UpdateRule


class MGGOptimizer(Optimizer):
    """The meta gradient generator as a ``torch.optim.Optimizer``.

    The state is one set of flat buffers over all parameters, in float32 or wider, whatever the parameters' type. A
    parameter without a gradient counts as one with a zero gradient.

    Args:
        params: parameters or parameter groups; a group's ``lr`` replaces the generator's own.
        generator: trained or fresh generator. Where it has a step size for each tensor, the parameters must be those
            tensors, in the same order.
        lr: base rate; None: the generator's own.

    Raises:
        ConfigError: the generator has step sizes for another number of tensors.
    """

    def __init__(self, params: Iterable[Any], generator: GradientGenerator, lr: float | None = None) -> None:
        self.generator = generator
        self.generator_state: GeneratorState | None = None
        super().__init__(params, {"lr": generator.config.lr if lr is None else lr})
        named_parameters([tensor for group in self.param_groups for tensor in group["params"]], generator)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, before the first step only: the state is one flat buffer.

        Raises:
            ConfigError: a step was already taken.
        """
        if self.generator_state is not None:
            raise ConfigError("a parameter group was added after the first step; add every group before it")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update from the gradients in ``.grad``; returns what ``closure`` returns, if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        gradients = named_parameters([_gradient(tensor) for tensor in tensors], self.generator)
        state = self._fresh_state() if self.generator_state is None else self.generator_state
        updates, self.generator_state = self.generator.update(gradients, state)
        remaining = iter(updates.values())
        for group in self.param_groups:
            scale = group["lr"] / self.generator.config.lr
            for tensor in group["params"]:
                tensor.sub_((next(remaining) * scale).to(tensor.dtype))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Parameter groups and a copy of the generator's state, as tensors and primitives."""
        tensors = None
        if self.generator_state is not None:
            leaves = pytree.tree_leaves(self.generator_state)
            tensors = [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]
        return {**super().state_dict(), "generator_state": tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy what :meth:`state_dict` gave; nothing is shared with it afterwards.

        Raises:
            CheckpointError: the state belongs to another generator or to other parameters.
        """
        tensors = state_dict.get("generator_state")
        state = None if tensors is None else self._copied_state(tensors)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "generator_state"})
        self.generator_state = state

    def __getstate__(self) -> dict[str, Any]:
        """Torch's own lists what it copies and pickles, and knows of no generator."""
        return {**super().__getstate__(), "generator": self.generator, "generator_state": self.generator_state}

    def _copied_state(self, tensors: Sequence[Tensor]) -> GeneratorState:
        leaves, structure = pytree.tree_flatten(self._fresh_state())
        slots = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        expected = [tuple(leaves[index].shape) for index in slots]
        if [tuple(tensor.shape) for tensor in tensors] != expected:
            raise CheckpointError(
                f"the optimizer's state has {len(tensors)} tensors that do not fit; this generator over these "
                f"parameters needs {len(expected)} of shapes {expected}: load the state into the optimizer it came from"
            )
        for index, tensor in zip(slots, tensors, strict=True):
            leaves[index] = tensor.detach().to(leaves[index], copy=True)
        return pytree.tree_unflatten(leaves, structure)

    def _fresh_state(self) -> GeneratorState:
        tensors = [_widened(tensor.detach()) for group in self.param_groups for tensor in group["params"]]
        return self.generator.init(named_parameters(tensors, self.generator))


class DifferentiableMGG(DifferentiableOptimizer):
    """The meta gradient generator as a higher ``DifferentiableOptimizer``; made by ``higher.get_diff_optim``.

    The generator is an attribute and not a setting of the parameter groups, which higher copies deeply: its tensors
    keep their identity, so that meta-gradients reach them.
    """

    def __init__(self, other: MGGOptimizer, *args: Any, **kwargs: Any) -> None:
        super().__init__(other, *args, **kwargs)
        self.generator = other.generator
        self.generator_state = other.generator_state

    def _update(self, grouped_grads: Sequence[Sequence[Tensor | None]], **kwargs: Any) -> None:
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        flat = [gradient for group in grouped_grads for gradient in group]
        filled = [
            torch.zeros_like(tensor) if gradient is None else gradient
            for gradient, tensor in zip(flat, tensors, strict=True)
        ]
        if self.generator_state is None:
            self.generator_state = self.generator.init(named_parameters(tensors, self.generator))
        updates, self.generator_state = self.generator.update(
            named_parameters(filled, self.generator), self.generator_state
        )
        remaining = iter(updates.values())
        for group in self.param_groups:
            scale = group["lr"] / self.generator.config.lr
            group["params"] = [tensor - next(remaining) * scale for tensor in group["params"]]


higher.register_optim(MGGOptimizer, DifferentiableMGG)  # pyright: ignore[reportArgumentType]: its annotation is wrong


def gradient_transformation(rule: UpdateRule) -> GradientTransformation:
    """An update rule as a torchopt ``GradientTransformation``, for ``torchopt.chain`` and ``torchopt.MetaOptimizer``.

    Its updates are to be *added* to the parameters, as torchopt has it. A missing gradient counts as zero, which needs
    ``params`` in the call to ``update``. Where the rule has a step size for each tensor, a dictionary of parameters is
    matched by name, and any other tree by position in torchopt's order, in which ``torchopt.MetaOptimizer`` lists each
    submodule's tensors alphabetically: bias before weight.
    """

    def init(params: Any) -> Any:
        leaves = trees.tree_leaves(params)
        return rule.init(_in_rule_order(dict(zip(_leaf_names(params, leaves, rule), leaves, strict=True)), rule))

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        leaves, structure = trees.tree_flatten(updates, none_is_leaf=True)
        if any(leaf is None for leaf in leaves):
            if params is None:
                raise ConfigError("a gradient is None and no params were given; call update(..., params=params)")
            like = trees.tree_leaves(params)
            leaves = [torch.zeros_like(own) if leaf is None else leaf for leaf, own in zip(leaves, like, strict=True)]
        names = _leaf_names(updates, leaves, rule)
        named = _in_rule_order(dict(zip(names, leaves, strict=True)), rule)
        subtrahends, state = rule.update(named, state)
        moves = [-subtrahends[name] for name in names]
        return trees.tree_unflatten(structure, moves), state

    return GradientTransformation(init, update)


def _leaf_names(tree: Any, leaves: Sequence[Tensor], rule: UpdateRule) -> tuple[str, ...]:
    """The rule's name for each leaf of a tree, in the tree's order: torchopt sorts a dictionary by its keys."""
    if isinstance(tree, Mapping) and set(tree) == set(getattr(rule, "tensors", ())):
        named: Any = tree
        return tuple(str(path[0]) for path in trees.tree_paths(named, none_is_leaf=True))
    return tuple(named_parameters(leaves, rule))


def _in_rule_order(named: Parameters, rule: UpdateRule) -> Parameters:
    return {name: named[name] for name in getattr(rule, "tensors", ()) or named}


def named_parameters(tensors: Sequence[Tensor], rule: UpdateRule) -> Parameters:
    """Tensors under the names that a rule expects: its own where it has step sizes for each, else their positions.

    Raises:
        ConfigError: the rule has step sizes for another number of tensors.
    """
    names = getattr(rule, "tensors", ()) or tuple(str(position) for position in range(len(tensors)))
    if len(names) != len(tensors):
        raise ConfigError(
            f"the generator has step sizes for {len(names)} tensors and got {len(tensors)}; give those tensors, or "
            "build a generator without tensor names"
        )
    return dict(zip(names, tensors, strict=True))


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _gradient(tensor: Tensor) -> Tensor:
    return _widened(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
