"""What each arrangement of a stream means, beside what all have in common."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from metaopt.data import CifarC, Digits, Domain, ImageSet, Stream, arrange, batches, to_bytes
from metaopt.data.arrangements import arrangement
from metaopt.errors import DataError

from ..contracts.arranged import COUNTS, SIZE, adapt, domain, met, seen, stream_of


def test_a_name_or_a_mapping_may_be_given() -> None:
    one, other = (
        arrange(stream_of(), "few_classes", classes=3),
        arrange(stream_of(), {"name": "few_classes"}, classes=3),
    )
    assert seen(one) == seen(other)
    assert arrangement({}) == arrangement("shuffled")


def test_what_is_arranged_is_not_arranged_again() -> None:
    with pytest.raises(DataError, match="cannot be arranged as 'mixed' again"):
        arrange(arrange(stream_of(), "sorted"), "mixed")


def test_a_domain_that_comes_again_out_of_turn_is_no_pass() -> None:
    one, two, _ = stream_of()
    assert [each.name for each in arrange([one, two, one], "sorted")] == ["a", "b", "a"]


def test_shuffled_is_the_stream_itself() -> None:
    stream = stream_of()
    assert arrange(stream) is stream


def labels_of(stream: Stream) -> list[Tensor]:
    """Labels of each domain in the order in which they are met."""
    return [torch.cat([batch.labels for _, batch in met([each]) if batch.labels is not None]) for each in stream]


def digits(name: str, seed: int = 0, **settings: Any) -> list[Tensor]:
    return labels_of(arrange(Digits(["fog", "contrast"]).stream(), name, seed=seed, **settings))


def changes(labels: Tensor) -> int:
    return int((labels[1:] != labels[:-1]).sum())


def test_sorted_has_each_class_in_one_stretch() -> None:
    first, second = digits("sorted")
    assert changes(first) == 9 and torch.equal(first, second)


def test_a_small_concentration_gives_long_stretches_and_a_large_one_none() -> None:
    plain = changes(digits("shuffled")[0])
    stretches = [changes(digits("dirichlet", concentration=value)[0]) for value in (0.01, 0.1, 1e4)]
    assert stretches[0] < stretches[1] < stretches[2] < plain
    # Even slots: each of the ten holds every class, one after another, and two neighbours may meet in the same one.
    assert stretches[1] < 60 and 90 <= stretches[2] < 100


def test_few_classes_are_so_many_and_the_same_in_every_domain() -> None:
    counts = torch.bincount(labels_of(Digits([]).stream())[0])
    for seed in range(3):
        first, second = digits("few_classes", seed, classes=3)
        assert len(first.unique()) == 3 and torch.equal(first, second)
        assert len(first) == int(counts[first.unique()].sum())


def test_a_long_tail_falls_exponentially_and_evenly_over_time() -> None:
    for ratio in (1.0, 10.0, 100.0):
        first, _ = digits("long_tail", ratio=ratio)
        counts = torch.bincount(first, minlength=10).sort(descending=True).values
        expected = 70 * ratio ** -(torch.arange(10) / 9)
        assert ((counts - expected).abs() <= 0.1 * expected + 1).all(), (counts, expected)
    halves = digits("long_tail")[0].tensor_split(2)
    rare = torch.bincount(digits("long_tail")[0], minlength=10).argsort()[:5]
    early, late = (int(torch.isin(half, rare).sum()) for half in halves)
    assert 0.5 < early / late < 2


def test_alternating_has_one_domain_a_batch_in_turn() -> None:
    found = seen(arrange(stream_of(), "alternating", batch_size=SIZE))
    names = [{image[0] for image in batch} for batch in found]
    assert all(len(own) == 1 for own in names)
    turns = "".join(name for own in names for name in own)
    assert turns == "abc" * 4 + "ab" * 2 or turns == "abcabcabcabcabab"
    assert sum(map(len, found)) == sum(COUNTS.values())
    mismatched = [*batches(arrange(stream_of(), "alternating", batch_size=SIZE)[0], 2 * SIZE)]
    assert all(batch.source is not None and len(batch.source.unique()) == 1 for batch in mismatched)


def test_mixed_meets_each_position_once_under_a_domain_by_chance() -> None:
    found = [image for batch in seen(arrange(stream_of(), "mixed", batch_size=SIZE)) for image in batch]
    assert sorted(image[3] for image in found) == list(range(43))
    names = Counter(image[0] for image in found)
    assert set(names) == set("abc") and names["c"] <= 29


def test_recurring_meets_all_images_in_rounds() -> None:
    stream = arrange(stream_of(), "recurring", rounds=5)
    assert [(each.name, each.visit) for each in stream] == [(name, turn) for turn in range(1, 6) for name in "abc"]
    found = [image for batch in seen(stream) for image in batch]
    assert {(image[0], image[3]) for image in found} == {(name, k) for name, n in COUNTS.items() for k in range(n)}


def severities(stream: Sequence[Domain]) -> list[tuple[str, float]]:
    return [(each.name, each.severity) for each in stream]


def test_gradual_rises_and_falls() -> None:
    made = arrange(Digits(["fog", "snow"], limit=5).stream(), "gradual")
    rising = [1.0, 2.0, 3.0, 4.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert severities(made) == [(name, severity) for name in ("fog", "snow") for severity in rising]
    alone = Digits(["fog"], [2.0], limit=5).stream()[0]
    assert torch.equal(made[1].images.images, alone.images.images)
    some = arrange(Digits(["fog", "snow"], [5.0, 1.0], limit=5).stream(), "gradual")
    assert severities(some) == [(name, severity) for name in ("fog", "snow") for severity in (1.0, 5.0, 1.0)]
    with pytest.raises(DataError, match="stream=gradual needs several severities, and 'digits' has 0 alone"):
        arrange(Digits([], limit=5).stream(), "gradual")


def test_long_stays_in_a_domain_and_tells_the_error_of_each_pass() -> None:
    stream = arrange(stream_of(), "long", passes=3, batch_size=SIZE)
    assert [(each.name, each.size) for each in stream] == [(name, 3 * count) for name, count in COUNTS.items()]
    _, report = adapt(stream)
    assert [(row.name, row.number, row.images) for row in report.domains] == [
        (name, number, COUNTS[name]) for name in "abc" for number in (1, 2, 3)
    ]
    assert len(report.pass_errors) == 3
    _, twice = adapt([*stream] * 2)
    assert [row.number for row in twice.domains] == [1, 2, 3] * 3 + [4, 5, 6] * 3


def test_one_domain_alternates_and_mixes_under_its_own_name() -> None:
    for name in ("alternating", "mixed"):
        _, report = adapt(arrange([domain("a")], name, batch_size=SIZE))
        assert [(row.name, row.images) for row in report.domains] == [("a", 43)]


def test_domains_of_other_sizes_are_not_mixed() -> None:
    large = ImageSet(torch.zeros(43, 3, 20, 20, dtype=torch.uint8))
    with pytest.raises(DataError, match="domains have images of the shapes"):
        met(arrange([domain("a", labelled=False), Domain("z", 5.0, 43, lambda: large)], "mixed"))


def test_files_of_many_domains_are_read_row_by_row(tmp_path: Path) -> None:
    pixels = numpy.random.default_rng(0).integers(0, 256, (2, 50, 8, 8, 3), dtype=numpy.uint8)
    numpy.save(tmp_path / "labels.npy", numpy.arange(10))
    for name, own in zip(("fog", "snow"), pixels, strict=True):
        numpy.save(tmp_path / f"{name}.npy", own)
    stream = CifarC(["fog", "snow"], [2.0, 5.0], limit=8, root=str(tmp_path)).stream()

    def whole() -> ImageSet:
        raise AssertionError("a whole file was read")

    for name in ("mixed", "alternating"):
        mixed = arrange([replace(each, load=whole) for each in stream], name, batch_size=4)
        found = [*batches(mixed[0], 4)]
        assert sum(len(batch.index) for batch in found) == (8 if name == "mixed" else 32)
        for batch in found:
            assert batch.source is not None and batch.labels is not None
            for image, label, index, place in zip(batch.images, batch.labels, batch.index, batch.source, strict=True):
                data = stream[int(place)].images
                assert data.labels is not None
                assert torch.equal(to_bytes(image), data.images[index]) and label == data.labels[index] == index
