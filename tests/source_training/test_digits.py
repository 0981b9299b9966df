"""The digits' source models and their cache."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metaopt.data.readers.digits import load_digits
from metaopt.errors import ModelError, OutputError
from metaopt.files import atomic_save, safe_load
from metaopt.source_training import digits
from metaopt.source_training.digits import default_cache_dir, train_digits_source
from metaopt.source_training.training import RECIPES

NAME = "digits_vit"


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A short recipe, and a list that grows with each training."""
    monkeypatch.setitem(RECIPES, NAME, replace(RECIPES[NAME], epochs=1, batch_size=250))
    done: list[str] = []
    train = digits.train_classifier

    def counted(*arguments, **options) -> None:
        done.append(options["title"])
        train(*arguments, **options)

    monkeypatch.setattr(digits, "train_classifier", counted)
    return done


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_a_second_call_reads_the_cache(tmp_path: Path, trainings: list[str]):
    first = train_digits_source(NAME, cache_dir=tmp_path / "new", progress=False)
    second = train_digits_source(NAME, cache_dir=tmp_path / "new", progress=False)
    assert len(trainings) == 1
    assert first.weights_sha256() == second.weights_sha256()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(first(images).logits, second(images).logits)
    assert not second.training and second.spec == first.spec
    safe_load(only_file(tmp_path / "new"))  # tensors and primitives only


def test_another_seed_or_recipe_has_a_file_of_its_own(tmp_path: Path, trainings: list[str], monkeypatch):
    first = train_digits_source(NAME, cache_dir=tmp_path, progress=False)
    other = train_digits_source(NAME, seed=1, cache_dir=tmp_path, progress=False)
    monkeypatch.setitem(RECIPES, NAME, replace(RECIPES[NAME], lr=1e-4))
    train_digits_source(NAME, cache_dir=tmp_path, progress=False)
    assert len(trainings) == 3 and len(list(tmp_path.iterdir())) == 3
    assert first.weights_sha256() != other.weights_sha256()


def test_training_is_reproducible_and_leaves_global_random_state_alone(tmp_path: Path, trainings: list[str]):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train_digits_source(NAME, cache_dir=tmp_path / "a", progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second = train_digits_source(NAME, cache_dir=tmp_path / "b", progress=False)
    assert first.weights_sha256() == second.weights_sha256()
    assert len(trainings) == 2


@pytest.mark.parametrize("damage", ["truncated", "nonsense", "foreign", "flipped"])
def test_a_damaged_cache_is_trained_again_with_a_warning(
    tmp_path: Path, trainings: list[str], caplog: pytest.LogCaptureFixture, damage: str
):
    first = train_digits_source(NAME, cache_dir=tmp_path, progress=False)
    path = only_file(tmp_path)
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "nonsense":
        path.write_bytes(b"nonsense")
    elif damage == "foreign":
        atomic_save({"weights": torch.zeros(3)}, path)
    else:
        stored = safe_load(path)
        stored["state_dict"]["head.bias"][0] += 1
        atomic_save(stored, path)
    with caplog.at_level(logging.WARNING):
        again = train_digits_source(NAME, cache_dir=tmp_path, progress=False)
    assert len(trainings) == 2
    (record,) = caplog.records
    assert f"training {NAME} again" in record.getMessage() and "\n" not in record.getMessage()
    assert again.weights_sha256() == first.weights_sha256()
    train_digits_source(NAME, cache_dir=tmp_path, progress=False)
    assert len(trainings) == 2


def test_an_unwritable_cache_is_known_before_the_training(tmp_path: Path, trainings: list[str]):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        train_digits_source(NAME, cache_dir=tmp_path / "file" / "cache", progress=False)
    assert not trainings


def test_models_without_a_recipe_are_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="allowed are cifar_resnet20"):
        train_digits_source("resnet50", cache_dir=tmp_path)


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "metaopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "metaopt"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("cifar_resnet20", 97.0), ("digits_vit", 94.0)])
def test_clean_accuracy_on_held_out_digits(tmp_path: Path, name: str, least: float):
    model = train_digits_source(name, cache_dir=tmp_path, progress=False)
    held_out = load_digits().stream
    assert held_out.labels is not None
    with torch.no_grad():
        predictions = model(held_out.images.float() / 255).logits.argmax(1)
    accuracy = 100 * (predictions == held_out.labels).double().mean().item()
    assert accuracy >= least
