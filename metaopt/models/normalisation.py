"""What BatchNorm layers normalise by, for one forward pass: the batch, and with a prior or a stream, these too."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metaopt.errors import DataError, ModelError
from metaopt.models.source_prior import ChannelMoments, Recorded, Shrinkage, SourcePrior, recording_hooks
from metaopt.parameters import walked
from metaopt.types import HALF


@contextmanager
def by_batch(
    module: nn.Module,
    enabled: bool,
    prior: Tensor | Shrinkage | None,
    stream: ChannelMoments | None,
    record: Recorded | None,
    inputs: Tensor,
) -> Iterator[None]:
    """BatchNorm layers inside normalise by the batch ``inputs``, and with a prior or a stream, by these too.

    In ``eval()`` and without running buffers torch takes the batch's statistics. So the buffers are out of the way for
    the duration, which also guards them from NaN batches, and come back in any case. Of a single image layers may need
    them, and in half precision torch would round what it takes.
    """
    modules = walked(module) if enabled else []
    layers = [layer for layer in modules if isinstance(layer, _BatchNorm)]
    if layers and any(getattr(part, "grad_checkpointing", False) for part in modules):
        raise ModelError(
            f"{type(module).__name__} has grad_checkpointing on, whose recomputation would miss the batch statistics; "
            "allowed is off with BatchNorm: call set_grad_checkpointing(False)"
        )
    if layers and (prior is not None or stream is not None or len(inputs) == 1 or inputs.dtype in HALF):
        with SourcePrior(module, prior, stream, record):
            yield
        return
    handles = [] if record is None or not layers else recording_hooks(module, record)
    saved = [(layer.running_mean, layer.running_var) for layer in layers]
    try:
        for layer in layers:
            layer.running_mean = layer.running_var = None
        yield
    finally:
        for layer, (mean, var) in zip(layers, saved, strict=True):
            layer.running_mean, layer.running_var = mean, var
        for handle in handles:
            handle.remove()


@contextmanager
def single_values_refused(module: nn.Module) -> Iterator[None]:
    """What torch says of one value a channel, as an error of one line: layers without running buffers know no other."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise DataError(
            f"a batch of 1 image gives a BatchNorm layer of {type(module).__name__} one value for each channel, and it "
            "has no running statistics to take instead; allowed are 2 images or more: give larger batches"
        ) from error
