"""The meta gradient generator as a ``torch.optim.Optimizer``: a drop-in for any training loop."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from metaopt.errors import CheckpointError, ConfigError
from metaopt.optimizers.mgg import GeneratorState, GradientGenerator
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
