"""Files of weights that are damaged: each is refused in one line, or gives the very values that were saved."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from metaopt.errors import CheckpointError
from metaopt.models.weights import read_weights

from ..tiny import CLASSES, tiny_net


def read(path: Path) -> dict[str, Tensor]:
    return read_weights(path, tiny_net(), CLASSES).tensors


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return tiny_net(seed=1).state_dict()


def test_a_flipped_bit_never_changes_a_weight(tmp_path: Path, weights: dict[str, Tensor]):
    path = tmp_path / "weights.pt"
    torch.save(weights, path)
    content, generator, refused = path.read_bytes(), torch.Generator().manual_seed(0), 0
    for position in torch.randint(8 * len(content), (200,), generator=generator).tolist():
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            found = read(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert refused > 100, "the rest are in what pads an archive"


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, weights: dict[str, Tensor], suffix: str, value: float):
    path = tmp_path / f"weights.{suffix}"
    weights["bn1.running_mean"][3] = value
    (torch.save if suffix == "pt" else save_file)(weights, path)
    with pytest.raises(CheckpointError, match="holds NaN or infinity in 'bn1"):
        read(path)


def test_weights_that_overflow_in_the_models_type_are_refused(tmp_path: Path, weights: dict[str, Tensor]):
    torch.save(weights | {"bn1.weight": torch.full((8,), 1e300, dtype=torch.float64)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="holds NaN or infinity in 'bn1"):
        read(tmp_path / "weights.pt")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_of_another_kind_of_number_are_refused(tmp_path: Path, weights: dict[str, Tensor], dtype: torch.dtype):
    torch.save(weights | {"bn1.weight": torch.ones(8).to(dtype)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=f"holds {dtype} for 'bn1.weight'"):
        read(tmp_path / "weights.pt")


def test_a_normalisation_that_is_not_finite_is_refused(tmp_path: Path, weights: dict[str, Tensor]):
    wrapped = {f"model.{name}": tensor for name, tensor in weights.items()}
    wrapped |= {"mu": torch.tensor([0.5, math.nan, 0.5]), "sigma": torch.ones(3)}
    torch.save(wrapped, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="holds mean="):
        read(tmp_path / "weights.pt")


def test_a_dictionary_that_holds_itself_has_an_end(tmp_path: Path):
    stored: dict[str, object] = {}
    stored["state_dict"] = stored
    torch.save(stored, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="holds no state_dict"):
        read(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 9, (2**40).to_bytes(8, "little") + b"{}", (8).to_bytes(8, "little") + b"\xff" * 8, bytes(8) + b"{}"],
)
def test_broken_safetensors_are_one_line(tmp_path: Path, content: bytes):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors") as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_paths_that_cannot_be_looked_at_are_one_line(tmp_path: Path, suffix: str):
    with pytest.raises(CheckpointError, match="File name too long"):
        read(tmp_path / ("x" * 300 + f".{suffix}"))
    (tmp_path / f"folder.{suffix}").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        read(tmp_path / f"folder.{suffix}")
