"""Normalisation layers of any network: which modules they are, what they call weight and bias, and which may adapt."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from metaopt.errors import ModelError

NORM_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "batch_norm": (_BatchNorm,),
    "instance_norm": (_InstanceNorm,),
    "layer_norm": (nn.LayerNorm,),
    "group_norm": (nn.GroupNorm,),
    "rms_norm": (nn.RMSNorm,),
}
FROZEN_NORM_NAMES = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")
# Other classes are told by their name, such as ChannelNorm, LayerNorm2d, FilterResponseNormTlu2d or LlamaRMSNorm.
_NORM_NAME = re.compile(r"Norm(Act|Tlu)?(\dd)?(Act)?([BS]\d[a-z]?)?$")
_NAMED_KINDS = {"RMS": "rms_norm", "Rms": "rms_norm", "LayerNorm": "layer_norm", "GroupNorm": "group_norm"}
_NO_NORM_NAMES = ("GlobalResponseNorm",)  # ConvNeXt V2's, which lets channels compete and starts at zero
_AFFINE_NAMES = ("Affine",)  # ResMLP's and its kin, which stand in place of a normalisation; LayerScale does not
WEIGHT_NAMES = ("weight", "gamma", "alpha", "g")
BIAS_NAMES = ("bias", "beta", "b")
_ROLES = {"weight": WEIGHT_NAMES, "bias": BIAS_NAMES}


def norm_kind(module: nn.Module) -> str | None:
    """Kind of normalisation that a module computes, or None for any other module.

    Raises:
        ModelError: the module is a frozen batch normalisation, whose affine tensors are buffers and cannot adapt.
    """
    names = [cls.__name__ for cls in type(module).__mro__]
    for frozen in FROZEN_NORM_NAMES:
        if frozen in names:
            raise ModelError(
                f"the model holds {frozen}, whose weight and bias are constants; adaptation needs trainable "
                "normalisation layers: replace it by torch.nn.BatchNorm2d with the same weights"
            )
    for kind, classes in NORM_KINDS.items():
        if isinstance(module, classes):
            return kind
    if "weight" not in affine_tensors(module) or any(name in _NO_NORM_NAMES for name in names):
        return None
    if type(module).__name__ in _AFFINE_NAMES:
        return "affine"
    if not any(_NORM_NAME.search(name) for name in names):
        return None
    return next((kind for part, kind in _NAMED_KINDS.items() if any(part in name for name in names)), "norm")


def affine_tensors(module: nn.Module) -> dict[str, str]:
    """Names of a module's own weight and bias by their role: one entry for each channel, whatever it calls them."""
    known = isinstance(module, tuple(kind for kinds in NORM_KINDS.values() for kind in kinds))
    found: dict[str, str] = {}
    for role, names in _ROLES.items():
        for name in names[:1] if known else names:
            tensor = module._parameters.get(name)
            # A kernel or a matrix is no affine weight, though its class may be called so.
            if tensor is not None and (known or tensor.numel() == max(tensor.shape, default=1)):
                found[role] = name
                break
    return found


def fixed_tensors(model: nn.Module) -> frozenset[str]:
    """Affine tensors that their user has frozen: without ``requires_grad``, where others have it.

    A model that is frozen as a whole says nothing of that kind, and all of it may adapt.
    """
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if is_norm(module):
            for name in affine_tensors(module).values():
                found[f"{path}.{name}" if path else name] = module._parameters[name]  # type: ignore[assignment]
    if not any(tensor.requires_grad for tensor in found.values()):
        return frozenset()
    return frozenset(name for name, tensor in found.items() if not tensor.requires_grad)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation that can adapt."""
    try:
        return norm_kind(module) is not None
    except ModelError:  # frozen batch normalisation: a layout says so
        return False


def chosen_layers(model: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """Affine tensors of the normalisation layers that no pattern names, which stay as they are.

    Args:
        model: any module.
        patterns: of names of layers, as ``fnmatch`` has them: ``layer3*``, ``blocks.[01].norm?``; without the
            ``module.`` that a ``SourceModel`` puts before them.

    Raises:
        ModelError: a pattern names no layer.
    """
    names = {path: path.removeprefix("module.") for path, module in model.named_modules() if is_norm(module)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names.values()):
            shown = ", ".join([*names.values()][:6]) + (", ..." if len(names) > 6 else "")
            raise ModelError(f"layers has {pattern!r}, which names no normalisation layer; allowed are {shown}")
    left = [path for path, name in names.items() if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    return frozenset(
        f"{path}.{name}" if path else name
        for path in left
        for name in affine_tensors(model.get_submodule(path)).values()
    )


def channels_first(module: nn.Module, x: Tensor) -> bool:
    """Whether a norm layer's input is (B, C, ...) rather than (B, ..., C), by the axis that its weight fits.

    Args:
        module: with a weight or a bias.
        x: what enters it.
    """
    own = next(module.parameters(recurse=False))
    if own.ndim > 1 and own.shape == x.shape[1:]:  # a LayerNorm over whole maps
        return True
    fits_first, fits_last = x.shape[1] == own.numel(), x.shape[-1] == own.numel()
    if fits_first != fits_last:
        return fits_first
    # Layers that are called so (timm's LayerNorm2d) take maps with the channels first, whatever they compute.
    return norm_kind(module) in ("batch_norm", "group_norm", "instance_norm") or "2d" in type(module).__name__
