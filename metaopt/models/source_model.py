"""The source model: a pre-trained network with its input normalisation, in the one mode that adaptation needs.

It stays in ``eval()`` (no dropout, no running-buffer updates); a forward pass may ask for BatchNorm's batch statistics
and for each block's pooled features.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metaopt.data.images import check_image_shape
from metaopt.errors import DataError, ModelError
from metaopt.files import weights_sha256
from metaopt.models.blocks import find_blocks, pool_features
from metaopt.models.source_prior import ChannelMoments, Recorded, SourcePrior, complete, recording_hooks
from metaopt.models.spec import CUSTOM_PREFIX, ModelSpec, triple
from metaopt.types import HALF, ForwardOutput, widened


class SourceModel(nn.Module):
    """Wraps ``module`` so that it takes images in [0, 1] and gives logits and features.

    The module is held, not copied, and is set to ``eval()``. Names of its tensors are those of the module after
    ``"module."``. It works under `torch.func.functional_call` and `copy.deepcopy`, in any floating type, on any device.

    Args:
        module: any classifier of RGB images; its output is (B, C) logits, or an object with such ``logits``.
        spec: identity of the network; by default read off the module (timm's ``pretrained_cfg``, its last layer).
        mean: per-channel mean of the training images, in [0, 1]; wins over ``spec``.
        std: per-channel standard deviation; wins over ``spec``.
        blocks: names of the modules whose outputs are the features; by default those of
            `metaopt.models.blocks.find_blocks`.
        channels_last: keep convolution weights and images in the channels-last memory format, on which BatchNorm
            ResNets run 1.3 to 1.8 times as fast on CPUs.

    Raises:
        ModelError: a block's name is unknown, or the class count cannot be told.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        *,
        spec: ModelSpec | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        blocks: Sequence[str] | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self.spec = _complete_spec(module, spec, mean, std)
        self.blocks = tuple(find_blocks(module) if blocks is None else blocks)
        modules = dict(module.named_modules())
        for name in self.blocks:
            if name not in modules:
                raise ModelError(f"no module '{name}' in {type(module).__name__}; allowed are names of named_modules()")
        self.channels_last = channels_last
        reference = next(module.parameters(), torch.empty(0))
        if channels_last:
            module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        # Not persistent: a state_dict holds the network's own tensors and nothing else.
        for name, values in (("mean", self.spec.mean), ("std", self.spec.std)):
            constant = torch.tensor(values, dtype=reference.dtype, device=reference.device).view(1, 3, 1, 1)
            self.register_buffer(name, constant, persistent=False)
        self.eval()

    @property
    def num_classes(self) -> int:
        """C, the number of logits."""
        return self.spec.num_classes

    def weights_sha256(self, dtype: torch.dtype | None = None) -> str:
        """Fingerprint of the wrapped network's weights and buffers, rounded to ``dtype`` (`metaopt.files`)."""
        return weights_sha256(self.module, dtype)

    def skeleton(self) -> "SourceModel":
        """Another model of the same network: its modules are copies, every parameter and buffer is shared.

        What a forward pass does to modules (tensors that stand in for others, hooks) stays in the skeleton that it runs
        on, so that several threads may each run one of their own.

        Raises:
            ModelError: a module of the network cannot be copied.
        """
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        try:
            return copy.deepcopy(self, shared)
        except (TypeError, RuntimeError, AttributeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(
                f"{type(self.module).__name__} cannot be copied ({reason}); adapters run a copy of the modules that "
                "shares their tensors: keep what cannot be copied out of the modules' attributes"
            ) from error

    def train(self, mode: bool = True) -> "SourceModel":
        """Stay in ``eval()`` whatever is asked: only BatchNorm's statistics change mode, by ``batch_statistics``."""
        return super().train(False)

    def forward(
        self,
        images: Tensor,
        batch_statistics: bool = False,
        features: bool = False,
        prior: Tensor | None = None,
        stream: ChannelMoments | None = None,
        record: Recorded | None = None,
    ) -> ForwardOutput:
        """Logits in the network's type, and each block's features where asked, in float32 at least.

        Args:
            images: (B, 3, H, W), floating, in [0, 1]; brought to the network's type.
            batch_statistics: BatchNorm layers normalise by this batch instead of by their running buffers, which stay
                untouched in either case. A layer that has one value for each channel of a single image goes on with its
                buffers.
            features: also give each block's output, pooled to (B, D_l).
            prior: with batch statistics, for how many images the source's count beside them
                (`metaopt.models.source_prior`): one number for all BatchNorm layers, (), or one for each, (L,).
            stream: with batch statistics, what earlier images counted for beside the source.
            record: with batch statistics, takes this batch's moments at each BatchNorm layer.

        Raises:
            DataError: the images' shape does not fit the model, or there are none; or a layer without running buffers
                gets one value for each channel.
            ModelError: features are asked of a model without blocks, or a block did not run; or the prior has another
                number of layers.
        """
        self._check_shape(images)
        inputs = ((images - self.mean) / self.std).to(self.mean.dtype)  # the same tensor where types agree
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        statistics = _batch_statistics(self.module, batch_statistics, prior, stream, record, inputs)
        features_of = self._recorded_features(images.shape[0]) if features else nullcontext({})
        with _single_values_refused(self.module), statistics:
            with features_of as recorded:
                logits = _logits(self.module(inputs))
        if record is not None:
            complete(record, self.module)
        if not features:
            return ForwardOutput(logits)
        missing = [name for name in self.blocks if name not in recorded]
        if missing or not self.blocks:
            raise ModelError(
                f"no features from {', '.join(missing) or type(self.module).__name__}; every block must run in a "
                "forward pass: name such modules by SourceModel(..., blocks=[...])"
            )
        return ForwardOutput(logits, tuple(recorded[name] for name in self.blocks))

    def _check_shape(self, images: Tensor) -> None:
        check_image_shape(images)
        fixed = getattr(getattr(self.module, "patch_embed", None), "strict_img_size", False)
        if fixed and self.spec.input_size is not None and tuple(images.shape[1:]) != self.spec.input_size:
            _, height, width = self.spec.input_size
            raise DataError(
                f"images have {images.shape[2]}x{images.shape[3]} pixels; {self.spec.name} takes {height}x{width}: "
                "resize the images"
            )

    @contextmanager
    def _recorded_features(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Hooks for this forward only, so that copies and pickles of the model carry none."""
        recorded: dict[str, Tensor] = {}

        def record(name: str):
            def hook(block: nn.Module, _inputs: Any, output: Any) -> None:
                tensor = output[0] if isinstance(output, tuple | list) else output
                recorded[name] = pool_features(self.module, block, widened(tensor), batch_size)

            return hook

        handles = [self.module.get_submodule(name).register_forward_hook(record(name)) for name in self.blocks]
        try:
            yield recorded
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _batch_statistics(
    module: nn.Module,
    enabled: bool,
    prior: Tensor | None,
    stream: ChannelMoments | None,
    record: Recorded | None,
    inputs: Tensor,
) -> Iterator[None]:
    """BatchNorm layers inside normalise by the batch ``inputs``, and with a prior or a stream, by these too.

    In ``eval()`` and without running buffers torch takes the batch's statistics. So the buffers are out of the way for
    the duration, which also guards them from NaN batches, and come back in any case. Of a single image layers may need
    them, and in half precision torch would round what it takes.
    """
    layers = [layer for layer in module.modules() if enabled and isinstance(layer, _BatchNorm)]
    if layers and any(getattr(part, "grad_checkpointing", False) for part in module.modules()):
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
def _single_values_refused(module: nn.Module) -> Iterator[None]:
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


def _logits(output: Any) -> Tensor:
    """A network's output as logits: itself, or its ``logits`` (transformers)."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"the model returns {type(output).__name__}; allowed is a tensor of logits or an object with one as "
            "'logits': wrap the model"
        )
    return logits


def _complete_spec(
    module: nn.Module, spec: ModelSpec | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> ModelSpec:
    """The spec given, or one read off the module, with the normalisation that was asked for."""
    if spec is None:
        cfg = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
        cfg = cfg if isinstance(cfg, dict) else {}
        spec = ModelSpec(
            name=cfg.get("architecture") or f"{CUSTOM_PREFIX}{type(module).__name__}",
            num_classes=_count_classes(module),
            input_size=tuple(cfg["input_size"]) if cfg.get("input_size") else None,
            mean=triple("mean", cfg.get("mean") or ModelSpec.mean),
            std=triple("std", cfg.get("std") or ModelSpec.std),
        )
    given = {"mean": mean, "std": std}
    return replace(spec, **{label: triple(label, values) for label, values in given.items() if values is not None})


def _count_classes(module: nn.Module) -> int:
    count = getattr(module, "num_classes", None)
    if isinstance(count, int):
        return count
    for layer in reversed(list(module.modules())):
        if isinstance(layer, nn.Linear):
            return layer.out_features
    raise ModelError(
        f"cannot tell the class count of {type(module).__name__}: it has no 'num_classes' and no linear layer; "
        "give SourceModel(module, spec=ModelSpec(name, num_classes))"
    )
