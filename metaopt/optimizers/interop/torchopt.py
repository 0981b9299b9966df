"""Update rules as torchopt gradient transformations, and the backend ``torchopt``, by ``torchopt.apply_updates``."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchopt
from torch import Tensor
from torchopt import pytree as trees
from torchopt.base import GradientTransformation

from metaopt.errors import ConfigError
from metaopt.optimizers.interop.torch_optim import named_parameters
from metaopt.optimizers.update import loss_and_gradients
from metaopt.types import LossOf, Parameters, UpdateRule


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


class TorchOptApply:
    """Differentiable update through torchopt's functional interface."""

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule
        self.transformation = gradient_transformation(rule)

    def __call__(self, loss_of: LossOf, parameters: Parameters, state: Any) -> tuple[Parameters, Any]:
        """New parameters and new rule state after one update."""
        # Tuples, because torchopt's trees would sort a dictionary by its keys.
        params = tuple(parameters.values())
        _, gradients = loss_and_gradients(self.rule, loss_of, parameters, create_graph=True)
        updates, state = self.transformation.update(tuple(gradients.values()), state, params=params, inplace=False)
        moved: Any = torchopt.apply_updates(params, updates, inplace=False)
        return dict(zip(parameters, moved, strict=True)), state
