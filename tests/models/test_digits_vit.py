"""The digits' vision transformer."""

import timm
import torch
from torch import nn

from metaopt.models import digits_vit


def test_starts_blind_to_flat_colour():
    torch.manual_seed(0)
    model = timm.create_model(digits_vit.digits_vit.__name__)
    first = model.get_submodule("patch_embed.backbone.0.conv")
    flat = torch.rand(4, 3, 1, 1).expand(4, 3, 32, 32)
    inside = first(flat)[..., 1:-1, 1:-1]  # edges see the padding
    assert inside.abs().max() < 1e-6
    assert first(torch.rand(4, 3, 32, 32))[..., 1:-1, 1:-1].abs().max() > 0.1


def test_has_layernorms_alone_and_a_class_token():
    model = timm.create_model(digits_vit.digits_vit.__name__, num_classes=4)
    norms = [layer for layer in model.modules() if "Norm" in type(layer).__name__ and list(layer.parameters(False))]
    assert norms and all(isinstance(layer, nn.LayerNorm) for layer in norms)
    assert model.forward_features(torch.rand(2, 3, 32, 32)).shape == (2, 1 + 16, 96)  # pyright: ignore[reportCallIssue]
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 4)
