"""Bad input to the commands: one clear line, exit code 2, and every file from before is as it was."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import timm
import torch

from metaopt.models import load_source_model

from .commands import TINY, TINY_META, command

COMMANDS = {
    name: command(path)
    for name, path in {
        "meta_train": "pretrain/meta_train.py",
        "source": "pretrain/source.py",
        "online": "adapt/online.py",
        "benchmark": "adapt/benchmark.py",
    }.items()
}
ONLINE = [*TINY, "data.limit=8", "data.corruptions=[fog]", "out=run"]
POLICY = ["--policy", "bad.pt", *ONLINE]
ARRAYS = ["method=bn", *TINY, "data=arrays", "data.images=bad.npy", "out=run"]
CLEAN = [*TINY_META, "data=arrays", "source.images=bad.npy", "out=run"]
NFNET = ["model=test_nfnet", "model.checkpoint=bad.pt", "model.num_classes=10"]
IMAGES = numpy.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=numpy.uint8)

Make = Callable[[], None]


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return Path.touch, (Path("exploded"),)  # type: ignore[return-value]


def nothing() -> None:
    """The bad input is in the arguments alone."""


def pickled_code() -> None:
    with open("bad.pt", "wb") as file:
        pickle.dump({"weights": Bomb()}, file)


def saved_code() -> None:
    torch.save({"state_dict": Bomb()}, "bad.pt")


def half_a_policy() -> None:
    content = Path("ckpt.pt").read_bytes()
    Path("bad.pt").write_bytes(content[: len(content) // 2])


def policy_with_a_hole() -> None:
    values = torch.load("ckpt.pt")
    del values["weights"]
    torch.save(values, "bad.pt")


def policy_of_tomorrow() -> None:
    torch.save(torch.load("ckpt.pt") | {"version": 99}, "bad.pt")


def copy_of(name: str) -> Make:
    def make() -> None:
        Path("bad.pt").write_bytes(Path(name).read_bytes())

    return make


def weights_of(name: str, classes: int = 10) -> Make:
    def make() -> None:
        torch.save(load_source_model(name, num_classes=classes).module.state_dict(), "bad.pt")

    return make


def a_flipped_bit() -> None:
    content = bytearray(Path("model.pt").read_bytes())
    content[len(content) // 2] ^= 1
    Path("bad.pt").write_bytes(content)


def weights_with_nan() -> None:
    weights = torch.load("model.pt")
    next(iter(weights.values()))[0, 0, 0, 0] = torch.nan
    torch.save(weights, "bad.pt")


def no_norm_layers() -> None:
    torch.save(timm.create_model("test_nfnet", num_classes=10).state_dict(), "bad.pt")


def images(array: numpy.ndarray, labels: numpy.ndarray | None = None) -> Make:
    def make() -> None:
        numpy.save("bad.npy", array)
        if labels is not None:
            numpy.save("labels.npy", labels)

    return make


def floats(low: float, high: float, hole: float | None = None) -> Make:
    values = numpy.linspace(low, high, IMAGES.size, dtype=numpy.float32).reshape(IMAGES.shape)
    if hole is not None:
        values[3, 2, 1, 0] = hole
    return images(values)


def text_file() -> None:
    Path("bad.npy").write_text("not an array")


def object_array() -> None:
    numpy.save("bad.npy", numpy.array([Bomb()], dtype=object), allow_pickle=True)


def a_file_called_taken() -> None:
    Path("taken").write_text("")


def a_policy_elsewhere() -> None:
    Path("start.pt").write_bytes(Path("ckpt.pt").read_bytes())


@dataclass(frozen=True)
class Case:
    command: str
    arguments: list[str]
    says: str  # part of the line
    make: Make = nothing


CASES = {
    # Policies
    "policy missing": Case("online", ["--policy", "none.pt", *ONLINE], "no file 'none.pt'"),
    "policy is a folder": Case("online", ["--policy", "run", *ONLINE], "is a folder"),
    "policy of a long path": Case("online", ["--policy", "x" * 300, *ONLINE], "File name too long"),
    "policy in nobody's home": Case("online", ["--policy", "~/none.pt", *ONLINE], f"'{Path.home()}/none.pt'"),
    "policy cut short": Case("online", POLICY, "is no readable file of torch.save", half_a_policy),
    "policy with a hole": Case("online", POLICY, "damaged", policy_with_a_hole),
    "policy of another version": Case("online", POLICY, "version 99", policy_of_tomorrow),
    "policy foreign": Case("online", POLICY, "is not a policy", copy_of("model.pt")),
    "policy is a run to resume": Case("online", POLICY, "is not a policy", copy_of("run/last.pt")),
    "policy pickled code": Case("online", POLICY, "pickled code", pickled_code),
    "policy saved code": Case("online", POLICY, "pickled code", saved_code),
    "policy in benchmark": Case("benchmark", ["methods=[policy]", *POLICY], "pickled code", saved_code),
    # Models
    "model unknown": Case("online", [*ONLINE, "method=bn", "model=resnet5O"], "no model 'resnet5O'; nearest are"),
    "model without recipe": Case("online", ["method=bn", "model=resnet18", "out=run"], "no training recipe"),
    "weights missing": Case("online", [*ONLINE, "method=bn", "model.checkpoint=none.pt"], "no file 'none.pt'"),
    "weights damaged": Case("online", [*ONLINE, "method=bn", "model.checkpoint=bad.pt"], "checksum", a_flipped_bit),
    "weights with NaN": Case("online", [*ONLINE, "method=bn", "model.checkpoint=bad.pt"], "NaN", weights_with_nan),
    "weights with code": Case(
        "meta_train", [*TINY_META, "model.checkpoint=bad.pt", "out=run"], "pickled code", saved_code
    ),
    "weights of another architecture": Case(
        "online",
        [*ONLINE, "method=bn", "model=digits_vit", "model.checkpoint=model.pt"],
        "is not for VisionTransformer",
    ),
    "weights of other classes": Case("online", [*ONLINE, "method=bn", "model.num_classes=7"], "7"),
    "policy of another architecture": Case(
        "online",
        ["--policy", "ckpt.pt", *ONLINE, "model=cifar_resnet56", "model.checkpoint=bad.pt"],
        "trained on cifar_resnet20 and the model is cifar_resnet56",
        weights_of("cifar_resnet56"),
    ),
    "policy of another class count": Case(
        "online",
        ["--policy", "ckpt.pt", *ONLINE, "model.num_classes=12", "model.checkpoint=bad.pt"],
        "trained on 10 classes and the model has 12",
        weights_of("cifar_resnet20", classes=12),
    ),
    "policy of other weights": Case(
        "benchmark",
        ["methods=[adam]", "--policy", "ckpt.pt", *ONLINE, "model.checkpoint=bad.pt"],
        "trained on weights",
        weights_of("cifar_resnet20"),
    ),
    "no norm layers, online": Case(
        "online", [*ONLINE, "method=tent", *NFNET], "no normalisation layer", no_norm_layers
    ),
    "no norm layers, meta-training": Case(
        "meta_train", [*TINY_META, *NFNET, "out=run"], "no normalisation layer", no_norm_layers
    ),
    # Images and labels
    "images missing": Case("online", ARRAYS, "no file bad.npy"),
    "images of a long path": Case(
        "online", [*ARRAYS[:-2], f"data.images={'x' * 300}", "out=run"], "File name too long"
    ),
    "images no array": Case("online", ARRAYS, "cannot read bad.npy", text_file),
    "images with code": Case("online", ARRAYS, "cannot read bad.npy", object_array),
    "images channels first": Case("online", ARRAYS, "images are (N, H, W, 3)", images(IMAGES.transpose(0, 3, 1, 2))),
    "images grey": Case("online", ARRAYS, "images are (N, H, W, 3)", images(IMAGES[..., 0])),
    "images float": Case("online", ARRAYS, "holds float32", floats(0, 1)),
    "images out of range": Case("online", ARRAYS, "holds float32", floats(-3, 3)),
    "images with NaN": Case("online", ARRAYS, "NaN", floats(0, 1, numpy.nan)),
    "images int64": Case("online", ARRAYS, "holds int64", images(IMAGES.astype(numpy.int64))),
    "stream empty": Case("online", ARRAYS, "at least one image", images(IMAGES[:0])),
    "images of another size": Case(
        "online",
        [*ARRAYS, "model=digits_vit", "model.checkpoint=bad.pt"],
        "takes 32x32",
        lambda: (images(IMAGES[:, :24])(), weights_of("digits_vit")())[0],
    ),
    "clean images of another size": Case(
        "meta_train",
        [*CLEAN, "model=digits_vit", "model.checkpoint=bad.pt"],
        "takes 32x32",
        lambda: (images(IMAGES[:, :24])(), weights_of("digits_vit")())[0],
    ),
    "images too small for the model": Case(
        "online",
        [*ARRAYS, "model=test_convnext", "model.checkpoint=bad.pt", "model.num_classes=10"],
        "images of 8x8 pixels do not go through test_convnext",
        lambda: (images(IMAGES[:, :8, :8])(), weights_of("test_convnext")())[0],
    ),
    "labels too few": Case(
        "online", [*ARRAYS, "data.labels=labels.npy"], "16 images need (16,)", images(IMAGES, numpy.arange(9))
    ),
    "labels float": Case(
        "online", [*ARRAYS, "data.labels=labels.npy"], "labels are integers", images(IMAGES, numpy.ones(16))
    ),
    "labels beyond the classes": Case(
        "online", [*ARRAYS, "data.labels=labels.npy"], "classes 0..9", images(IMAGES, numpy.arange(16))
    ),
    "labels beyond the classes, benchmark": Case(
        "benchmark",
        ["methods=[bn]", *ARRAYS[1:], "data.labels=labels.npy"],
        "classes 0..9",
        images(IMAGES, numpy.arange(16)),
    ),
    "corruption unknown": Case("online", [*ONLINE, "method=bn", "data.corruptions=[frog]"], "did you mean 'fog'"),
    "severity not in the files": Case(
        "online", ["method=bn", *TINY, "data=cifar_c", "data.root=none", "out=run"], "no folder none"
    ),
    "too few unlabeled images": Case("meta_train", CLEAN, "n_unlabeled=16", images(IMAGES[:9])),
    "too few digits": Case("meta_train", [*TINY_META, "n_unlabeled=129", "out=run"], "n_unlabeled=128"),
    "clean images with NaN": Case("meta_train", CLEAN, "NaN", floats(0, 1, numpy.nan)),
    "statistics without images": Case(
        "online",
        [*ARRAYS, "method=adam", "method.objective.discrepancy=1"],
        "source.images is not set",
        images(IMAGES),
    ),
    # Settings
    "setting unknown": Case("meta_train", ["meta.epoch=3", "out=run"], "did you mean meta.epochs?"),
    "setting added": Case("online", [*ONLINE, "+batch_siz=3"], "did you mean batch_size?"),
    "setting of a part": Case("meta_train", [*TINY_META, "meta.loss=none", "out=run"], "allowed are clean_teacher"),
    "strength of one value": Case(
        "meta_train",
        [*TINY_META, "meta.strength=[1]", "out=run"],
        "meta.strength=[1] is not allowed; it takes 2 values",
    ),
    "shift unknown": Case("meta_train", [*TINY_META, "meta.shifts=[satturate]", "out=run"], "did you mean 'saturate'"),
    "device unknown": Case("online", [*ONLINE, "method=bn", "device=gpu"], "device=gpu cannot be used"),
    "source classes": Case("online", ["method=bn", "model.num_classes=7", "out=run"], "does not go with the digits"),
    # Runs to resume
    "resume missing": Case("meta_train", [*TINY_META, "resume=none.pt", "out=run"], "no file 'none.pt'"),
    "resume a policy": Case("meta_train", [*TINY_META, "resume=ckpt.pt", "out=run"], "no meta-training to resume"),
    "resume with code": Case("meta_train", [*TINY_META, "resume=bad.pt", "out=run"], "pickled code", saved_code),
    "resume other settings": Case(
        "meta_train", [*TINY_META, "resume=run/last.pt", "meta.lr=0.5"], "other settings of lr"
    ),
    "resume other images": Case(
        "meta_train", [*TINY_META, "resume=run/last.pt", "n_unlabeled=32"], "other unlabeled images"
    ),
    "resume another model": Case(
        "meta_train",
        [*TINY_META, "resume=run/last.pt", "model.checkpoint=bad.pt"],
        "another source model",
        weights_of("cifar_resnet20"),
    ),
    # Policies to start with
    "gate recipe without a policy": Case("meta_train", [*TINY_META, "recipe=gate", "out=run"], "set start=start.pt"),
    "start missing": Case("meta_train", [*TINY_META, "start=none.pt", "out=run"], "no file 'none.pt'"),
    "start of another generator": Case(
        "meta_train",
        [*TINY_META, "start=start.pt", "generator=published", "out=run"],
        "other settings of generator.",
        a_policy_elsewhere,
    ),
    "start overwritten": Case(
        "meta_train", [*TINY_META, "start=ckpt.pt", "out=run"], "a file that this command writes"
    ),
    "start overwritten in the run's folder": Case(
        "meta_train", [*TINY_META, "start=run/ckpt.pt", "out=run"], "a file that this command writes"
    ),
    "frozen unknown": Case(
        "meta_train",
        [*TINY_META, "meta.frozen=[optimizer]", "out=run"],
        "allowed are the parts that this policy learns",
    ),
    # Outputs
    "out is a file": Case("online", [*ONLINE, "method=bn", "out=taken"], "cannot write", a_file_called_taken),
    "out too long": Case("online", [*ONLINE, "method=bn", f"out={'x' * 300}"], "File name too long"),
    "out no text": Case("online", [*ONLINE[:-1], "method=bn", "out=\udcff"], "is no UTF-8 text"),
    "out under a file": Case("meta_train", [*TINY_META, "out=taken/run"], "cannot write", a_file_called_taken),
    "out of benchmark": Case("benchmark", [*ONLINE, "out=taken"], "cannot write", a_file_called_taken),
    "cache is a file": Case("source", ["cache=taken"], "cannot write", a_file_called_taken),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_code_2_and_nothing_lost(name: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    for result in ("predictions.csv", "benchmark.csv"):
        (workspace / "run" / result).write_text("earlier")
    case.make()
    before = {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()}
    assert COMMANDS[case.command](case.arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert case.says in err
    after = {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()}
    assert before == after
    assert not (workspace / "exploded").exists()
