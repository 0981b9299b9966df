"""What a user's network is under its wrappers, so that it has one identity however it is handed over."""

import copy

import torch
from torch import nn

from metaopt.errors import ModelError

WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",  # torch.compile
    "AveragedModel": "module",
    "ModelEma": "ema",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
}
"""Classes that run another module as it is, by name, for some are costly to import; and where they hold it."""

_REFUSED = {
    "ScriptModule": "a compiled program: give the module that torch.jit compiled",
    "FullyShardedDataParallel": "split over processes: give the whole module",
    "FSDPModule": "split over processes: give the whole module",
}


def unwrapped(module: object) -> nn.Module:
    """The module inside of `WRAPPERS`; such wrappers further inside are taken off a copy that shares all tensors.

    Raises:
        ModelError: it is no module, or one whose tensors cannot be swapped.
    """
    while (inner := _inner(module)) is not None:
        module = inner
    if not isinstance(module, nn.Module):
        raise ModelError(f"the model is {type(module).__name__}; allowed is a torch.nn.Module: give the network")
    for part in module.modules():
        for kind, reason in _REFUSED.items():
            if kind in _class_names(part):
                raise ModelError(f"the model holds {type(part).__name__}, which is {reason}")
    if isinstance(module, torch.fx.GraphModule):
        _check_traced(module)
    if any(_inner(part) is not None for part in module.modules()):
        return _without_inner_wrappers(module)
    return module


def _inner(module: object) -> nn.Module | None:
    """What a wrapper runs; None for anything else."""
    for name in _class_names(module):
        inner = getattr(module, WRAPPERS[name], None) if name in WRAPPERS else None
        if isinstance(inner, nn.Module):
            return inner
    return None


def _class_names(module: object) -> list[str]:
    return [kind.__name__ for kind in type(module).__mro__]


def _without_inner_wrappers(module: nn.Module) -> nn.Module:
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for part in reversed(list(module.modules())):  # innermost first
        inner = _inner(part)
        if inner is not None:
            memo[id(part)] = copy.deepcopy(inner, memo)
    return copy.deepcopy(module, memo)


def _check_traced(module: torch.fx.GraphModule) -> None:
    """Refuse a graph that computes norms by functions: nobody could tell them to take other statistics or weights."""
    for node in module.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and "_norm" in name:
            raise ModelError(
                f"the model is a traced graph whose norm layers have become functions ('{name}'); allowed are norm "
                "layers that are modules: give the network that was traced"
            )
