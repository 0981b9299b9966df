"""Predicting with what an adapter has learned, while nothing changes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from metaopt.online.incoming import Images
from metaopt.types import StepOutput

_here: ContextVar[tuple["FrozenAdapter", ...]] = ContextVar("frozen", default=())
"""What this thread (or task) has frozen, the latest last: another's calls are not concerned."""


class FrozenAdapter:
    """Predicts with what an adapter has learned, in any thread, and changes nothing.

    Args:
        adapter: whose; it may go on learning.
        step: the adapter's, of images and of this.
        as_exported: predict as the network of `OnlineAdapter.export_model` does.
    """

    def __init__(
        self, adapter: Any, step: Callable[[Images, "FrozenAdapter"], StepOutput], as_exported: bool = False
    ) -> None:
        self.adapter, self._step, self.as_exported = adapter, step, as_exported

    def __call__(self, images: Images) -> Tensor:
        """Logits (B, C), detached; arguments and errors are those of the adapter."""
        return self.step(images).logits

    def step(self, images: Images) -> StepOutput:
        """As a call, with the loss and its terms beside the logits; without these as an exported network."""
        return self._step(images, self)

    @contextmanager
    def in_this_thread(self) -> Iterator["FrozenAdapter"]:
        """Within this context calls of the adapter itself, in this thread, go to this."""
        token = _here.set((*_here.get(), self))
        try:
            yield self
        finally:
            _here.reset(token)


def frozen_here(adapter: Any) -> FrozenAdapter | None:
    """What this thread has frozen of an adapter last; None: nothing."""
    return next((frozen for frozen in reversed(_here.get()) if frozen.adapter is adapter), None)
