"""Which modules of a network are its blocks, and how a block's output becomes one feature vector per image.

The rule of `find_blocks`, for any network:

1. A module is a block if its class name says so: ``BasicBlock``, ``Bottleneck``, ``InvertedResidual``,
   ``ConvNeXtBlock``, ``TransformerEncoderLayer``, ``MBConv`` and the like, in timm, torchvision and elsewhere.
2. Of nested blocks the outermost one counts, unless it merely holds others, with no parameter outside them (a
   ``NetworkBlock`` made of ``BasicBlock``s): then those inside count.
3. Without any block by name, every normalisation layer counts, so that plain networks have features as well.
"""

import re
from collections.abc import Iterator

from torch import Tensor, nn

from metaopt.norm_layers import is_norm

_BLOCK_NAME = re.compile(
    r"Block|Bottleneck|BottleNeck|Residual|MBConv|DepthwiseSeparableConv|"
    r"(Encoder|Transformer|ViT|DeiT|Beit|Swin|ConvNext|ConvNextV2|Dinov2)Layer$"
)
_NO_BLOCK_NAME = re.compile(r"^Drop")  # DropBlock and kin are regularisers
_CLASS_TOKEN_NAMES = ("cls_token", "class_token")


def find_blocks(module: nn.Module) -> list[str]:
    """Names of the blocks of ``module``, in the order of its modules; empty without blocks and norm layers."""
    return list(_outermost_blocks(module, "")) or list(_norm_layers(module))


def _is_block(module: nn.Module) -> bool:
    name = type(module).__name__
    return _BLOCK_NAME.search(name) is not None and _NO_BLOCK_NAME.search(name) is None


def _outermost_blocks(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if not _is_block(child) or _only_holds_blocks(child):
            yield from _outermost_blocks(child, f"{path}.")
        else:
            yield path


def _only_holds_blocks(module: nn.Module) -> bool:
    inside = list(_outermost_blocks(module, ""))
    held = {id(parameter) for name in inside for parameter in module.get_submodule(name).parameters()}
    return bool(inside) and all(id(parameter) in held for parameter in module.parameters())


def _norm_layers(module: nn.Module) -> Iterator[str]:
    return (name for name, layer in module.named_modules() if name and is_norm(layer))


def _channels_last_output(module: nn.Module, block: nn.Module, output: Tensor) -> bool:
    """Whether a block's 4-D output is (B, H, W, D) rather than (B, D, H, W).

    timm models tell by ``output_fmt``. Others (torchvision's Swin) give themselves away by a LayerNorm over the last
    axis whose width is not that of axis 1.
    """
    layout = getattr(module, "output_fmt", None)
    if layout is not None:
        return str(layout).endswith("NHWC")
    widths = {layer.normalized_shape[-1] for layer in block.modules() if isinstance(layer, nn.LayerNorm)}
    return output.shape[-1] in widths and output.shape[1] not in widths


def pool_features(module: nn.Module, block: nn.Module, output: Tensor, batch_size: int) -> Tensor:
    """One vector per image from a block's output.

    Maps are averaged over space. Of token sequences the class token is taken; without one, or in blocks that see patch
    tokens only (CaiT, XCiT), tokens are averaged.

    Args:
        module: the whole network, which knows the layout.
        block: the block that gave the output.
        output: (B, D), (B, T, D), (T, B, D), (B, D, H, W) or (B, H, W, D).
        batch_size: B.

    Returns:
        (B, D)
    """
    if output.ndim == 2:
        return output
    if output.ndim == 3:
        if output.shape[0] != batch_size:
            output = output.transpose(0, 1)
        names = (name.rsplit(".", 1)[-1] for name, _ in module.named_parameters())
        has_class_token = any(name in _CLASS_TOKEN_NAMES for name in names)
        patches_only = output.shape[1] == getattr(getattr(module, "patch_embed", None), "num_patches", None)
        return output[:, 0] if has_class_token and not patches_only else output.mean(dim=1)
    if output.ndim == 4 and _channels_last_output(module, block, output):
        return output.mean(dim=(1, 2))
    return output.flatten(2).mean(dim=2)
