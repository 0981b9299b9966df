"""Where in a model and in its graph something is kept: names of the layers at work, attributes of custom nodes."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from metaopt.evaluation.ledger import Claim, Ledger
from metaopt.evaluation.reachable import reachable_blocks

OUTSIDE = "(outside)"
"""Layer name of what no layer of the model keeps, the loss for example."""
ROOT = "(model)"
"""Layer name of what the model's own forward keeps, outside its layers."""


class LayerNames:
    """The qualified name of the layer whose forward runs now, a recomputed one included, while the context lasts.

    Args:
        model: whose layers have names; a layer used twice goes by its first one.
        on_output: called with each layer's output before the layer's name is left.
    """

    def __init__(self, model: nn.Module | None, on_output: Callable[[Any], None]) -> None:
        self._model, self._on_output = model, on_output
        self._stack: list[str] = []
        self._handles: list[RemovableHandle] = []

    @property
    def current(self) -> str:
        """Name of the innermost layer at work."""
        return self._stack[-1] if self._stack else OUTSIDE

    def __enter__(self) -> "LayerNames":
        """Hook into the layers."""
        for name, module in () if self._model is None else self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(name or ROOT)))
            # Called in spite of exceptions too: checkpointing ends its recomputation by one.
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        return self

    def __exit__(self, *exception: Any) -> None:
        """Leave the layers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._stack.append(name)

        return enter

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._on_output(output)
        if self._stack:
            self._stack.pop()


class NodeAttributes:
    """What custom autograd Functions keep as attributes of ``ctx``, beside ``save_for_backward``.

    Nodes are found by walking the graph behind tensors, each once. An attribute counts in the ledger, for the layer at
    work, from when its node is found, or from after the node's backward where it was set there, until it is gone or the
    node is.
    """

    def __init__(self, ledger: Ledger, layer: Callable[[], str]) -> None:
        self._ledger, self._layer = ledger, layer
        self._mark = object()
        self._claims: dict[weakref.ref[Any], tuple[Claim, str]] = {}

    def find(self, outputs: Any) -> bool:
        """Take in the custom nodes of the graph behind a tensor, or behind those in a tuple, list or dictionary.

        Returns:
            Whether there were nodes, custom or not, that had not been seen before.
        """
        if isinstance(outputs, Tensor):
            return outputs.grad_fn is not None and self._walk([outputs.grad_fn])
        if isinstance(outputs, dict):
            outputs = list(outputs.values())
        if isinstance(outputs, (tuple, list)):
            return any([self.find(output) for output in outputs])
        return False

    def _walk(self, nodes: list[Any]) -> bool:
        found = False
        while nodes:
            node = nodes.pop()
            # The mark lives as long as the node does, which Python's own wrapper of the node need not.
            if node is None or self._mark in node.metadata:
                continue
            node.metadata[self._mark] = found = True
            if isinstance(node, BackwardCFunction):
                self._adopt(node)
            nodes.extend(previous for previous, _ in node.next_functions)
        return found

    def _adopt(self, node: Any) -> None:
        reference = weakref.ref(node, lambda gone: self._claims.pop(gone, None))
        self._scan(reference, self._layer())

        def after_backward(*_: Any) -> None:
            self._scan(reference, self._claims[reference][1])

        node.register_hook(after_backward)

    def _scan(self, reference: "weakref.ref[Any]", layer: str) -> None:
        blocks = list(reachable_blocks(vars(reference())))
        self._claims.pop(reference, None)  # first, or what replaces an attribute would count beside it
        self._claims[reference] = (self._ledger.claim(blocks, layer, loose=True), layer)


class ResultWatcher(TorchFunctionMode):
    """Shows ``find`` the arguments and results of all torch functions in its context; it tells if their graph grew.

    ``mark`` is called before a function runs, and what it gives handed to ``grown`` after one by which the graph grew.
    """

    def __init__(self, find: Callable[[Any], bool], mark: Callable[[], int], grown: Callable[[int], None]) -> None:
        super().__init__()
        self._find, self._mark, self._grown = find, mark, grown

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._find(args)  # of a backward pass above all: the nodes that no function has met yet
        mark = self._mark()
        result = func(*args, **(kwargs or {}))
        if self._find(result):
            self._grown(mark)
        return result
