"""Source statistics: exact, independent of the batch size, in source mode, and without traces in the model."""

import pytest
import torch
from torch import Tensor, nn

from metaopt.errors import ConfigError, DataError, ModelError
from metaopt.objectives.discrepancy import feature_discrepancy, source_statistics
from metaopt.types import ForwardOutput


class TinyModel(nn.Module):
    """Called as a source model: two convolution blocks with BatchNorm, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 5)
        for norm in (self.bn1, self.bn2):
            assert norm.running_mean is not None
            norm.running_mean += 0.1
        self.eval()
        self.batch_sizes: list[int] = []

    def forward(self, images: Tensor, batch_statistics: bool = False, features: bool = False) -> ForwardOutput:
        assert not batch_statistics
        assert not torch.is_grad_enabled()
        assert images.is_floating_point()
        assert images.max() <= 1.0
        self.batch_sizes.append(len(images))
        first = self.bn1(self.conv1(images)).relu()
        second = self.bn2(self.conv2(first)).relu()
        pooled = (first.mean(dim=(2, 3)), second.mean(dim=(2, 3)))
        return ForwardOutput(self.linear(pooled[1]), pooled if features else ())


class ColourModel(nn.Module):
    """Its only feature block is the mean of each colour plane plus ``offset``."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(offset, dtype=torch.float64))

    def forward(self, images: Tensor, features: bool = False) -> ForwardOutput:
        means = images.mean(dim=(2, 3)) + self.offset
        return ForwardOutput(means, (means,) if features else ())


@pytest.fixture
def model() -> TinyModel:
    torch.manual_seed(0)
    return TinyModel().double()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_they_are_the_moments_over_all_images(model: TinyModel, images: Tensor) -> None:
    statistics = source_statistics(model, images, batch_size=7)
    with torch.no_grad():
        features = model(images, features=True).features
    assert [mean.shape for mean in statistics.mean] == [(4,), (6,)]
    for block, mean, std in zip(features, statistics.mean, statistics.std, strict=True):
        torch.testing.assert_close(mean, block.mean(dim=0), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(std, block.std(dim=0, correction=0), rtol=1e-12, atol=1e-14)
    assert feature_discrepancy(features, statistics).item() == pytest.approx(0.0, abs=1e-25)


@pytest.mark.parametrize("batch_size", [1, 3, 49, 50, 1000])
def test_the_batch_size_does_not_change_them(model: TinyModel, images: Tensor, batch_size: int) -> None:
    whole = source_statistics(model, images, batch_size=50)
    split = source_statistics(model, images, batch_size=batch_size)
    assert max(model.batch_sizes[1:]) == min(batch_size, 50)
    torch.testing.assert_close((*split.mean, *split.std), (*whole.mean, *whole.std), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_large_mean_does_not_drown_a_small_std(batch_size: int) -> None:
    # A sum of squares minus the squared mean would lose every digit: 1e6² against 0.1².
    images = torch.rand(256, 3, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shifted = source_statistics(ColourModel(offset=1e6), images, batch_size)
    plain = source_statistics(ColourModel(), images, batch_size)
    torch.testing.assert_close(shifted.std, plain.std, rtol=1e-6, atol=0.0)


def test_bytes_are_read_as_fractions_of_255(model: TinyModel) -> None:
    codes = torch.randint(256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    from_codes = source_statistics(model, codes, batch_size=8)
    from_floats = source_statistics(model, codes.double() / 255, batch_size=8)
    assert from_codes.mean[0].dtype == torch.float64
    torch.testing.assert_close(from_codes.mean + from_codes.std, from_floats.mean + from_floats.std)


def test_they_leave_no_trace_in_the_model_and_carry_no_graph(model: TinyModel, images: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = source_statistics(model, images, batch_size=16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in statistics.mean + statistics.std)


def test_bad_images_and_batch_sizes_are_refused(model: TinyModel, images: Tensor) -> None:
    with pytest.raises(ConfigError, match="batch_size is 0, must be at least 1"):
        source_statistics(model, images, batch_size=0)
    with pytest.raises(DataError, match=r"shape \(0, 3, 8, 8\).*at least one clean image"):
        source_statistics(model, images[:0], batch_size=4)
    with pytest.raises(DataError, match=r"shape \(3, 8, 8\), must be \(N, 3, H, W\)"):
        source_statistics(model, images[0], batch_size=4)


def test_non_finite_features_are_refused() -> None:
    images = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    images[7, 1, 2, 2] = torch.nan
    with pytest.raises(DataError, match="features of block 0 are not finite"):
        source_statistics(ColourModel(), images, batch_size=4)


def test_a_model_without_blocks_is_refused(images: Tensor) -> None:
    class NoBlocks(nn.Module):
        def forward(self, images: Tensor, features: bool = False) -> ForwardOutput:
            return ForwardOutput(images.mean(dim=(2, 3)))

    with pytest.raises(ModelError, match=r"0 feature blocks.*blocks="):
        source_statistics(NoBlocks(), images, batch_size=4)
