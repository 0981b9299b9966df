"""A network's forward pass by ``torch.compile``, with its backward pass where torch keeps the activations itself.

What a compiled pass cannot do runs as it is: hooks that watch a module for one pass (features of the blocks, the input
of the first norm layer), and, unless told otherwise, passes that are learned from.
"""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.errors import ModelError


class CompiledForward:
    """Runs a module compiled; copies of it compile the module's copy anew.

    Args:
        module: the network, whose parameters may be swapped by `metaopt.parameters.call_with`.
        learns: whether passes that gradients are taken of are compiled too.

    Raises:
        ModelError: there is no C++ compiler, which torch.compile needs on CPUs.
    """

    def __init__(self, module: nn.Module, *, learns: bool = True) -> None:
        self.module, self.learns = module, learns
        if next(module.parameters(), torch.empty(0)).device.type == "cpu":
            _check_compiler()
        # What comes back of the start makes parameters no leaves, and torch's tracing looks at the gradients of all.
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
        self._run = torch.compile(module)

    def __call__(self, inputs: Tensor) -> Any:
        """The module's output.

        Args:
            inputs: (B, channels, H, W), normalised.

        Raises:
            ModelError: torch cannot compile it.
        """
        if torch.is_grad_enabled() and not self.learns:
            return self.module(inputs)
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self._run(inputs)
        except TorchDynamoException as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ModelError(
                f"{type(self.module).__name__} cannot be compiled ({reason}); allowed is compile=false: leave it out"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledForward":
        return type(self)(copy.deepcopy(self.module, memo), learns=self.learns)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.module, self.learns)


def _rebuilt(kind: type[CompiledForward], module: nn.Module, learns: bool) -> CompiledForward:
    return kind(module, learns=learns)


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ModelError(
            "compile=true needs a C++ compiler and found none; allowed without one is compile=false: install g++, or "
            "name a compiler by the variable CXX"
        ) from error
