"""A tiny vision transformer for 32x32 digits, small enough to train in under a minute on two CPU cores.

timm's `VisionTransformer` (Dosovitskiy et al. 2021) with a class token and 4x4 tokens. The patches come from three
strided convolutions (Xiao et al. 2021, "Early Convolutions Help Transformers See Better"): with one linear patch
embedding a thousand images do not teach it that dark ink on light paper and its opposite are the same digit. The first
convolution starts with kernels of zero mean, blind to flat colour: it sees edges at once, without the long plateau of
training that it would otherwise take to find them. All norm layers are LayerNorms.

Importing this module registers ``digits_vit`` in timm.
"""

from functools import partial
from typing import Any

import torch
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.norm_act import LayerNormAct2d
from timm.models import VisionTransformer, build_model_with_cfg, register_model
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

from metaopt.models.cifar_resnet import SMALL_IMAGES

__all__ = ["digits_vit"]

default_cfgs = {
    "digits_vit": SMALL_IMAGES
    | {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.backbone.0.conv",
        "classifier": "head",
    }
}


@register_model
def digits_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Width 96, four blocks of three heads, 0.5 M parameters."""
    stem = ConvStem(
        in_chans=kwargs.get("in_chans", 3),
        depth=3,
        channels=(32, 64, 96),
        kernel_size=3,
        stride=(2, 2, 2),
        norm_layer=LayerNormAct2d,
        act_layer=nn.GELU,
    )
    shape: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 1,  # of the stem's output: 8x8 pixels of the image
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 3,
        "num_classes": 10,
        "embed_layer": partial(HybridEmbed, backbone=stem, proj=False),
        "weight_init": "jax",  # Xavier: timm's default of std 0.02 is too small at this width
    }
    model = build_model_with_cfg(VisionTransformer, "digits_vit", pretrained, **{**shape, **kwargs})
    # timm initialises the stem as well, so only now.
    kernels = model.get_parameter(default_cfgs["digits_vit"]["first_conv"] + ".weight")
    with torch.no_grad():
        kernels -= kernels.mean(dim=(2, 3), keepdim=True)
    return model
