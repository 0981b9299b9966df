"""Tiny networks of several families with random weights, none of them at its start."""

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from metaopt.models import SourceModel, cifar_resnet
from metaopt.models.spec import ModelSpec

CLASSES = 7

# timm name, settings, side of the images, number of sites
FAMILIES: dict[str, tuple[str, dict, int, int]] = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
        32,
        2,
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)},
        32,
        2,
    ),
    "convnext": ("convnext_atto", {"dims": (8, 12, 16, 20), "depths": (1, 1, 1, 1)}, 64, 4),
    "resnet": ("test_resnet", {}, 64, 4),
    "poolformer": ("poolformer_s12", {}, 32, 12),  # its MLPs are 1x1 convolutions
    "efficientnet": ("test_efficientnet", {}, 64, 5),
    "cifar_resnet": (cifar_resnet.cifar_resnet20.__name__, {}, 32, 3),
}


def build(family: str, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> tuple[SourceModel, Tensor]:
    """A network of the family and two images for it."""
    name, settings, side, _ = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model(name, num_classes=CLASSES, **settings)
        stir(network)
    spec = ModelSpec(f"custom:{name}", CLASSES, (3, side, side))
    model = SourceModel(network.to(dtype), spec=spec, channels_last=channels_last)
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return model, images.to(dtype)


def stir(module: nn.Module, scale: Callable[[Tensor], float] = lambda tensor: 0.2) -> nn.Module:
    """Move every parameter off its first value: some families start as constants."""
    with torch.no_grad():
        for tensor in module.parameters():
            tensor += scale(tensor) * torch.randn_like(tensor)
    return module
