"""A tiny vision transformer for 32x32 digits, small enough to train in a minute on two CPU cores.

timm's `VisionTransformer` (Dosovitskiy et al. 2021) with patches of 4x4 pixels, so 64 patch tokens and a class token.

Importing this module registers ``digits_vit`` in timm.
"""

from typing import Any

from timm.models import VisionTransformer, build_model_with_cfg, register_model

__all__ = ["digits_vit"]

default_cfgs = {
    "digits_vit": {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
}


@register_model
def digits_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Width 96, six blocks of three heads, 0.7 M parameters."""
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 10}
    return build_model_with_cfg(VisionTransformer, "digits_vit", pretrained, **{**shape, **kwargs})
