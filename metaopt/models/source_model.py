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

from metaopt.data.images import check_image_shape
from metaopt.errors import DataError, ModelError
from metaopt.files import weights_sha256
from metaopt.models.blocks import find_blocks, pool_features
from metaopt.models.compiled import CompiledForward
from metaopt.models.identify import Identity, identify
from metaopt.models.normalisation import by_batch, single_values_refused
from metaopt.models.source_prior import ChannelMoments, Recorded, Shrinkage, complete
from metaopt.models.spec import ModelSpec, channel_values, class_indices
from metaopt.models.unwrap import unwrapped
from metaopt.norm_layers import fixed_tensors
from metaopt.types import ForwardOutput, widened


class SourceModel(nn.Module):
    """Wraps ``module`` so that it takes images in [0, 1] and gives logits and features.

    The module is held, not copied, and is set to ``eval()``. Names of its tensors are those of the module after
    ``"module."``. Of wrappers (``DataParallel``, ``torch.compile``, averaged copies, ``nn.Sequential(normalize,
    network)`` around a network of timm) it holds what is inside, so that a network has one identity. It works under
    `torch.func.functional_call` and `copy.deepcopy`, in any floating type, on any device.

    Args:
        module: any classifier of images; its output is (B, C) logits, or an object with such ``logits``.
        spec: identity of the network; by default read off the module (timm's ``pretrained_cfg``, its last layer).
        mean: per-channel mean of the training images, in [0, 1], as numbers, an array or a tensor; wins over ``spec``.
            As many as the images have channels: 1 or 13 as well as 3.
        std: per-channel standard deviation; wins over ``spec``.
        classes: the logits that are kept, by their index; ``num_classes`` is then their number, and labels count
            within them. None: all.
        blocks: names of the modules whose outputs are the features; by default those of
            `metaopt.models.blocks.find_blocks`.
        channels_last: keep convolution weights and images in the channels-last memory format, on which BatchNorm
            ResNets run 1.3 to 1.8 times as fast on CPUs.

    Raises:
        ModelError: a block's name is unknown, the class count or the normalisation cannot be told, or a value is of
            no use.
    """

    mean: Tensor
    std: Tensor
    kept: Tensor | None

    def __init__(
        self,
        module: nn.Module,
        *,
        spec: ModelSpec | None = None,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        classes: Sequence[int] | Tensor | None = None,
        blocks: Sequence[str] | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        given = {label: channel_values(label, v) for label, v in (("mean", mean), ("std", std)) if v is not None}
        module = unwrapped(module)
        known = identify(module, given) if spec is None else Identity(module, replace(spec, **given))
        module = self.module = known.module
        self.spec = known.spec if classes is None else _subset(known.spec, classes)
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
            constant = torch.tensor(values, dtype=reference.dtype, device=reference.device).view(1, -1, 1, 1)
            self.register_buffer(name, constant, persistent=False)
        kept = self.spec.classes
        indices = None if kept is None else torch.tensor(kept, device=reference.device)
        self.register_buffer("kept", indices, persistent=False)
        self.compiled: CompiledForward | None = None  # runs in the network's place, where it can
        self.fixed: frozenset[str] | None = None  # affine tensors that do not adapt; None: as their flags say
        self.eval()

    @property
    def num_classes(self) -> int:
        """C, the number of logits, those of the classes that are kept."""
        return self.spec.num_classes

    def weights_sha256(self, dtype: torch.dtype | None = None) -> str:
        """Fingerprint of the wrapped network's weights and buffers, rounded to ``dtype`` (`metaopt.files`)."""
        return weights_sha256(self.module, dtype)

    def skeleton(self) -> "SourceModel":
        """Another model of the same network: its modules are copies, every parameter and buffer has the same storage.

        What a forward pass does to modules (tensors that stand in for others, hooks) stays in the skeleton that it runs
        on, so that several threads may each run one of their own. Its parameters require no gradients; those of the
        network keep their flags. Where the network is moved or cast later, a skeleton stays as it is.

        Raises:
            ModelError: a module of the network cannot be copied.
        """
        shared: dict[int, object] = {id(tensor): tensor for tensor in self.buffers()}
        try:
            shared |= {id(own): nn.Parameter(own.detach(), requires_grad=False) for own in self.parameters()}
            with self.uncompiled():
                found = copy.deepcopy(self, shared)
        except (TypeError, RuntimeError, AttributeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(
                f"{type(self.module).__name__} cannot be copied ({reason}); adapters run a copy of the modules that "
                "shares their tensors: keep what cannot be copied out of the modules' attributes"
            ) from error
        if self.fixed is None:
            found.fixed = fixed_tensors(self)
        return found.eval()  # whatever its user has set since

    def compile_network(self, *, learns: bool = True) -> None:
        """From now on, run the network by ``torch.compile`` (`metaopt.models.compiled.CompiledForward`).

        Raises:
            ModelError: there is no compiler for it.
        """
        self.compiled = CompiledForward(self.module, learns=learns)

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Within this context the network runs as it is, so that hooks on its modules are called."""
        before, self.compiled = self.compiled, None
        try:
            yield
        finally:
            self.compiled = before

    def train(self, mode: bool = True) -> "SourceModel":
        """Stay in ``eval()`` whatever is asked: only BatchNorm's statistics change mode, by ``batch_statistics``."""
        return super().train(False)

    def forward(
        self,
        images: Tensor,
        batch_statistics: bool = False,
        features: bool = False,
        prior: Tensor | Shrinkage | None = None,
        stream: ChannelMoments | None = None,
        record: Recorded | None = None,
    ) -> ForwardOutput:
        """Logits in the network's type, and each block's features where asked, in float32 at least.

        Args:
            images: (B, channels, H, W), mostly (B, 3, H, W), floating, in [0, 1]; brought to the network's type.
            batch_statistics: BatchNorm layers normalise by this batch instead of by their running buffers, which stay
                untouched in either case. A layer that has one value for each channel of a single image goes on with its
                buffers.
            features: also give each block's output, pooled to (B, D_l).
            prior: with batch statistics, for how many images the source's count beside them
                (`metaopt.models.source_prior`): one number for all BatchNorm layers, (), or one for each, (L,); or how
                the batch's are shrunk to the source's.
            stream: with batch statistics, what earlier images counted for beside the source.
            record: with batch statistics, takes this batch's moments at each BatchNorm layer.

        Raises:
            DataError: the images' shape does not fit the model, or there are none; or a layer without running buffers
                gets one value for each channel.
            ModelError: the network gives anything but (B, C) logits; features are asked of a model without blocks, or a
                block did not run; or the prior has another number of layers.
        """
        self._check_shape(images)
        inputs = ((images - self.mean) / self.std).to(self.mean.dtype)  # the same tensor where types agree
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        statistics = by_batch(self.module, batch_statistics, prior, stream, record, inputs)
        features_of = self._recorded_features(images.shape[0]) if features else nullcontext({})
        # Hooks and dictionaries that take something out are nothing for a compiled pass.
        run = self.module if self.compiled is None or features or record is not None else self.compiled
        with single_values_refused(self.module), statistics, features_of as recorded:
            logits = self._logits(run(inputs), len(images))
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

    def _logits(self, output: Any, batch_size: int) -> Tensor:
        """What the network gave as (B, C) logits of the classes that are kept."""
        logits = _logits(output, batch_size)
        if self.kept is None and logits.shape[1] != self.num_classes:
            raise ModelError(
                f"the model gives {logits.shape[1]} logits and its class count is {self.num_classes}; allowed is the "
                f"same: give SourceModel(module, spec=ModelSpec({self.spec.name!r}, {logits.shape[1]}))"
            )
        if self.kept is None:
            return logits
        if logits.shape[1] <= max(self.spec.classes or ()):
            raise ModelError(
                f"the model gives {logits.shape[1]} logits and classes reach to {max(self.spec.classes or ())}; "
                f"allowed is 0 to {logits.shape[1] - 1}: give other classes"
            )
        return logits.index_select(1, self.kept)

    def _check_shape(self, images: Tensor) -> None:
        check_image_shape(images, self.spec.channels)
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


def _subset(spec: ModelSpec, classes: Sequence[int] | Tensor) -> ModelSpec:
    """The spec of a network with some of its logits."""
    kept = class_indices(classes, None if spec.classes is not None else spec.num_classes)
    return replace(spec, num_classes=len(kept), classes=kept)


def _logits(output: Any, batch_size: int) -> Tensor:
    """A network's output as logits: itself, or its ``logits`` (transformers)."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"the model returns {type(output).__name__}; allowed is a tensor of logits or an object with one as "
            "'logits': wrap the model"
        )
    if logits.ndim != 2 or logits.shape[0] != batch_size or logits.shape[1] < 2:
        raise ModelError(
            f"the model gives logits of shape {tuple(logits.shape)} for {batch_size} images; allowed is (B, C) with C "
            "of 2 or more, one row for each image: wrap the model so that it gives that, maps averaged over space and "
            "a single logit z as (0, z)"
        )
    return logits
