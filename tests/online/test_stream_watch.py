"""What is warned of along a stream, and what is not."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import scipy.stats
import torch
from timm.models import VisionTransformer
from torch import Tensor

from metaopt.catalogue import load_method
from metaopt.data import Domain, ImageSet, to_bytes
from metaopt.evaluation import Monitor
from metaopt.models import load_source_model
from metaopt.online import OnlineAdapter, run_stream
from metaopt.online.stream_watch import StreamWatch, two_sample_ratio
from metaopt.policy import build_method

from ..tiny import random_images, tiny_model, tiny_policy

CLASSES = 10


def predictions(shares: list[float], batches: int, seed: int = 0, size: int = 100) -> list[Tensor]:
    """Logits of classes drawn by their shares."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.multinomial(torch.tensor(shares), size, True, generator=generator) for _ in range(batches)]
    return [torch.nn.functional.one_hot(each, CLASSES).float() for each in drawn]


def warned(stream: list[Tensor], trained_batch: int | None = None, batch_statistics: bool = True) -> list[str]:
    watch = StreamWatch(CLASSES, trained_batch, batch_statistics)
    for logits in stream:
        watch.see(logits)
    return list(watch.found)


EVEN = [1.0] * CLASSES
BIASED = [1.5, 0.8, 1.2, 1.0, 0.8, 1.1, 0.9, 1.1, 0.8, 0.8]  # as batch statistics leave a balanced stream


@pytest.mark.parametrize("shares", [EVEN, BIASED])
def test_balanced_streams_raise_no_alarm(shares: list[float]) -> None:
    for seed in range(50):
        assert warned(predictions(shares, 40, seed)) == []


def test_few_classes_are_told_where_batch_statistics_would_even_them_out() -> None:
    few = [3.0, 3.0, *[0.5] * 8]
    assert warned(predictions(few, 4)) == ["classes"]
    assert warned(predictions(few, 3)) == warned(predictions(few, 4), batch_statistics=False) == []


def test_a_stream_sorted_by_class_is_told_and_a_shift_is_not() -> None:
    each = [predictions([5.0 if c == k else 0.3 for c in range(CLASSES)], 2, k) for k in range(CLASSES)]
    assert "order" not in warned([logits for pair in each for logits in pair])  # 19 differences
    assert "order" in warned([logits for pair in [*each, *each] for logits in pair])
    watch = StreamWatch(CLASSES, None, True, handled=True)
    for logits in [logits for pair in [*each, *each] for logits in pair]:
        watch.see(logits)
    assert "class_skew answers" in watch.found["order"]
    shifted = [*predictions(EVEN, 15), *predictions([5.0, *[0.3] * 9], 15)]
    assert "order" not in warned(shifted)


def test_small_batches_are_told_from_the_second_in_a_row() -> None:
    large, small = predictions(EVEN, 1, size=64)[0], predictions(EVEN, 1, size=8)[0]
    assert warned([large, small, large, small], 64) == []  # the short last batches of domains
    assert warned([large, small, small], 64) == ["batch_size"]
    assert warned([small, small], 32) == warned([small, small], None) == []


def test_the_ratio_is_the_two_sample_statistic() -> None:
    first, second = torch.tensor([12.0, 30.0, 0.0, 8.0]).double(), torch.tensor([20.0, 10.0, 0.0, 4.0]).double()
    table = numpy.array([first[[0, 1, 3]].numpy(), second[[0, 1, 3]].numpy()])
    expected: Any = scipy.stats.chi2_contingency(table, correction=False)
    assert two_sample_ratio(first, second) == pytest.approx(expected.statistic / expected.dof, rel=1e-9)
    only = torch.tensor([5.0, 0.0])
    assert two_sample_ratio(only, only) == 1.0


def test_batches_that_are_not_finite_count_for_nothing() -> None:
    watch = StreamWatch(CLASSES, None, True)
    watch.see(torch.full((4, CLASSES), torch.nan))
    assert not watch.found and watch._batches == 0


def test_an_adapter_says_it_once_in_the_log_and_a_run_in_its_summary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = tiny_policy(tiny_model())
    policy.training = {"config": {"batch_size": 64}}
    adapter = OnlineAdapter(tiny_model(), policy)
    images = ImageSet(to_bytes(random_images(24)))
    stream = [Domain(name, 5.0, 24, lambda: images) for name in "ab"]
    with caplog.at_level(logging.WARNING, logger="metaopt"), Monitor(tmp_path) as monitor:
        report = run_stream(adapter, stream, batch_size=8, monitor=monitor)
    (text,) = report.summary()["warnings"]
    assert text.startswith("batches have 8 images and the policy was meta-trained on 64") and "\n" not in text
    assert [record.message for record in caplog.records] == [text] == adapter.warnings
    assert json.dumps(report.summary())
    events = b"".join(path.read_bytes() for path in tmp_path.glob("events*"))
    assert text.encode() in events and events.count(text.encode()) == 1


def test_evenness_is_no_matter_of_a_network_that_does_not_normalise_by_the_batch() -> None:
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=CLASSES)
    for model, expected in ((vit.eval(), False), (tiny_model(), True)):
        assert OnlineAdapter(model, build_method(load_method("bn"))).watch.batch_statistics == expected


def test_a_look_is_not_watched() -> None:
    policy: Any = tiny_policy(tiny_model())
    policy.training = {"config": {"batch_size": 64}}
    adapter = OnlineAdapter(tiny_model(), policy)
    with adapter.frozen():
        for seed in range(3):
            adapter(random_images(4, seed))
    assert adapter.warnings == []


@pytest.mark.slow
@pytest.mark.skipif("METAOPT_TEST_DATA" not in os.environ, reason="METAOPT_TEST_DATA is not set: needs CIFAR-10-C")
@pytest.mark.parametrize(("kept", "expected"), [(range(10), []), ((3, 8), ["classes"])])
def test_two_classes_of_cifar_are_told_and_all_ten_are_not(kept: Any, expected: list[str]) -> None:
    data = Path(os.environ["METAOPT_TEST_DATA"])
    labels = torch.from_numpy(numpy.load(data / "cifar10c/labels.npy").astype("int64"))
    model = load_source_model("cifar_resnet20", checkpoint=data / "weights/cifar10_resnet20.pt")
    for corruption in ("contrast", "jpeg_compression"):
        images = torch.from_numpy(numpy.load(data / f"cifar10c/{corruption}.npy")).permute(0, 3, 1, 2)
        chosen = torch.isin(labels, torch.tensor(list(kept))).nonzero().flatten()[:1000]
        adapter = OnlineAdapter(model, build_method(load_method("bn")))
        for index in chosen.split(100):
            adapter(images[index].float() / 255)
        assert list(adapter.watch.found) == expected, corruption


@pytest.mark.parametrize("size", [1, 3, 16])
def test_small_batches_in_a_random_order_are_not_told_to_be_sorted(size: int) -> None:
    watch, generator = StreamWatch(10, None, batch_statistics=False), torch.Generator().manual_seed(0)
    for _ in range(3000 // size):
        watch.see(10.0 * torch.eye(10)[torch.randint(10, (size,), generator=generator)])
    assert not watch.found
    for kind in range(10):
        for _ in range(300 // size):
            watch.see(10.0 * torch.eye(10)[torch.full((size,), kind)])
    assert set(watch.found) == {"order"}
