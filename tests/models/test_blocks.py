"""Which modules count as blocks, and how their outputs are pooled."""

import pytest
import timm
import torch
from torch import Tensor, nn

from metaopt.models import cifar_resnet, digits_vit
from metaopt.models.blocks import find_blocks, pool_features
from metaopt.models.source_model import SourceModel


@pytest.mark.parametrize(
    ("name", "count"),
    [
        (cifar_resnet.cifar_resnet20.__name__, 9),
        (cifar_resnet.cifar_resnet56.__name__, 27),
        (digits_vit.digits_vit.__name__, 4),
        ("resnet50", 16),
        ("convnext_atto", 12),
        ("swin_tiny_patch4_window7_224", 12),
        ("mobilenetv3_small_100", 11),
        ("vit_tiny_patch16_224", 12),
        ("efficientnet_b0", 16),
        ("densenet121", 4),
        ("vgg11_bn", 8),  # no blocks: its norm layers
    ],
)
def test_number_of_blocks(name: str, count: int):
    with torch.device("meta"):  # the structure alone
        network = timm.create_model(name)
    assert len(find_blocks(network)) == count


def test_blocks_are_in_order_and_outermost():
    names = find_blocks(timm.create_model("cifar_resnet20"))
    assert names == [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]


class BasicBlock(nn.Sequential):
    """Counts by its name."""


class NetworkBlock(nn.Sequential):
    """Holds blocks and nothing of its own, as in WideResNet's public code."""


def test_containers_of_blocks_are_looked_into():
    def block() -> BasicBlock:
        return BasicBlock(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    network = nn.Sequential(NetworkBlock(block(), block()), NetworkBlock(block()), nn.BatchNorm2d(3))
    assert find_blocks(network) == ["0.0", "0.1", "1.0"]


def test_blocks_with_blocks_inside_and_layers_of_their_own_count_once():
    network = nn.Sequential(BasicBlock(nn.Linear(2, 2), BasicBlock(nn.Linear(2, 2))))
    assert find_blocks(network) == ["0"]


def test_without_blocks_norm_layers_count():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Sequential(nn.RMSNorm(4)), nn.LayerNorm(4))
    assert find_blocks(network) == ["1", "2.0", "3"]
    assert find_blocks(nn.Linear(2, 2)) == []


class TestPooling:
    """`pool_features`."""

    def test_maps_in_both_layouts(self):
        maps = torch.rand(2, 5, 3, 4)  # (B, D, H, W)
        network, block = nn.Identity(), nn.Identity()
        expected = maps.mean(dim=(2, 3))
        torch.testing.assert_close(pool_features(network, block, maps, 2), expected)
        network.output_fmt = "NHWC"  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(pool_features(network, block, maps.permute(0, 2, 3, 1), 2), expected)

    def test_a_layernorm_gives_the_layout_away(self):
        maps = torch.rand(2, 3, 4, 5)
        swin = nn.Sequential(nn.LayerNorm(5))
        torch.testing.assert_close(pool_features(nn.Identity(), swin, maps, 2), maps.mean(dim=(1, 2)))
        convnext = nn.Sequential(nn.LayerNorm(3))
        torch.testing.assert_close(pool_features(nn.Identity(), convnext, maps, 2), maps.mean(dim=(2, 3)))

    def test_tokens_with_and_without_a_class_token(self):
        tokens = torch.rand(2, 5, 7)  # (B, T, D)
        with_class, without = nn.Module(), nn.Module()
        with_class.cls_token = nn.Parameter(torch.zeros(1, 1, 7))
        assert torch.equal(pool_features(with_class, nn.Identity(), tokens, 2), tokens[:, 0])
        torch.testing.assert_close(pool_features(without, nn.Identity(), tokens, 2), tokens.mean(dim=1))

    def test_blocks_that_see_patches_only_are_averaged(self):
        network = nn.Module()
        network.cls_token = nn.Parameter(torch.zeros(1, 1, 7))
        network.patch_embed = nn.Module()
        network.patch_embed.num_patches = 5  # pyright: ignore[reportArgumentType]
        tokens = torch.rand(2, 5, 7)
        torch.testing.assert_close(pool_features(network, nn.Identity(), tokens, 2), tokens.mean(dim=1))

    def test_sequences_first_and_vectors(self):
        tokens = torch.rand(5, 2, 7)  # (T, B, D), torch's own transformer layers
        torch.testing.assert_close(pool_features(nn.Identity(), nn.Identity(), tokens, 2), tokens.mean(dim=0))
        assert torch.equal(pool_features(nn.Identity(), nn.Identity(), tokens[0], 2), tokens[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "widths"),
    [
        ("resnet50", 32, [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3),
        ("convnext_atto", 32, [40] * 2 + [80] * 2 + [160] * 6 + [320] * 2),
        ("swin_tiny_patch4_window7_224", 224, [96] * 2 + [192] * 2 + [384] * 6 + [768] * 2),
        ("mobilenetv3_small_100", 64, [16, 24, 24, 40, 40, 40, 48, 48, 96, 96, 96]),
        ("vit_tiny_patch16_224", 224, [192] * 12),
        ("cait_xxs24_224", 224, [192] * 26),
    ],
)
def test_features_of_common_networks(name: str, size: int, widths: list[int]):
    torch.manual_seed(0)
    model = SourceModel(timm.create_model(name, num_classes=7).double())
    images: Tensor = torch.rand(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        output = model(images, batch_statistics=True, features=True)
    assert [feature.shape for feature in output.features] == [(2, width) for width in widths]
    assert output.logits.shape == (2, 7)
    assert all(feature.isfinite().all() for feature in output.features)
