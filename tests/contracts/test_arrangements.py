"""The battery that every arrangement of a stream in the registry passes; a new one needs nothing but its row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt import registry
from metaopt.data import Batch, Digits, Domain, ImageSet, Stream, arrange, batch_count, batches, to_bytes
from metaopt.data.arrangements import Arrangement, arrangement, settings_of
from metaopt.errors import CheckpointError, ConfigError, DataError
from metaopt.online import OnlineAdapter, Progress, run_stream
from metaopt.online.progress import Stopped, fingerprint
from metaopt.policy import MethodConfig, build_method

from ..tiny import BARE, random_images, tiny_model

SIZE = 8  # images of a batch
COUNTS = {"a": 43, "b": 43, "c": 29}  # images of each domain
LABEL_STEP = 3  # labels have gaps: classes 0, 3, 6 and 9

everyone = pytest.mark.parametrize("name", registry.ARRANGEMENTS)
by_label = [name for name in registry.ARRANGEMENTS if registry.get("arrangement", name).needs_labels]
free = [name for name in registry.ARRANGEMENTS if name not in by_label]


def images_of(name: str, severity: float) -> ImageSet:
    seed = int(10 * severity) + ord(name)
    return ImageSet(to_bytes(random_images(COUNTS[name], seed)), LABEL_STEP * (torch.arange(COUNTS[name]) % 4))


def domain(name: str, severity: float = 5.0, labelled: bool = True) -> Domain:
    data = images_of(name, severity)
    data = data if labelled else ImageSet(data.images)
    return Domain(name, severity, len(data), lambda: data, at_severity=lambda other: domain(name, other, labelled))


def stream_of(labelled: bool = True) -> Stream:
    return [domain(name, labelled=labelled) for name in COUNTS]


def met(stream: Stream, **given: Any) -> list[tuple[Domain, Batch]]:
    """Each batch, and the domain that it was met in."""
    return [(each, batch) for each in stream for batch in batches(each, SIZE, **given)]


def origins(each: Domain, batch: Batch) -> list[Domain]:
    """The domain, as read, of each image of a batch."""
    if batch.source is None:
        return [each] * len(batch.index)
    return [batch.sources[place] for place in batch.source.tolist()]


def seen(stream: Stream, **given: Any) -> list[list[tuple[str, float, int, int]]]:
    """Domain, severity, visit and index of each image of each batch."""
    return [
        [
            (origin.name, origin.severity, origin.visit, index)
            for origin, index in zip(origins(each, batch), batch.index.tolist(), strict=True)
        ]
        for each, batch in met(stream, **given)
    ]


@everyone
def test_it_is_a_dataclass_of_settings_that_says_what_it_is(name: str) -> None:
    kind = registry.get("arrangement", name)
    assert issubclass(kind, Arrangement) and is_dataclass(kind)
    assert registry.describe("arrangement")[name]
    assert settings_of(name) == {"name": name, **{each.name: each.default for each in fields(kind)}}


@everyone
def test_the_index_names_the_image_and_its_label_follows(name: str) -> None:
    for each, batch in met(arrange(stream_of(), name, seed=1, batch_size=SIZE)):
        assert batch.labels is not None and 0 < len(batch.index) == len(batch.images) <= SIZE
        for place, origin in enumerate(origins(each, batch)):
            own, index = images_of(origin.name, origin.severity), batch.index[place]
            assert own.labels is not None
            assert torch.equal(to_bytes(batch.images[place]), own.images[index])
            assert batch.labels[place] == own.labels[index]


@everyone
def test_an_image_comes_once_a_visit_at_most(name: str) -> None:
    stream = arrange(stream_of(), name, seed=1, batch_size=SIZE)
    for each in stream:
        found = [image for batch in seen([each]) for image in batch]
        assert max(Counter(found).values()) == 1
        assert len(found) == each.size == len(each.images)
    if name != "gradual":  # it comes back to a severity
        found = [image for batch in seen(stream) for image in batch]
        assert max(Counter(found).values()) == 1


@everyone
def test_a_seed_means_the_same_stream_again_and_another_one_another(name: str) -> None:
    first, again, other = (arrange(stream_of(), name, seed=seed, batch_size=SIZE) for seed in (3, 3, 4))
    assert seen(first, seed=3) == seen(again, seed=3) != seen(other, seed=4)
    assert fingerprint(first) == fingerprint(again)
    assert (fingerprint(first) == fingerprint(other)) == (name == "shuffled")  # whose seed is kept beside it


@everyone
def test_batches_left_out_leave_the_others_as_they_are(name: str) -> None:
    stream = arrange(stream_of(), name, batch_size=SIZE)
    assert batch_count(stream, SIZE) == len(met(stream))
    for each in stream:
        whole = [*batches(each, SIZE)]
        for skip in range(len(whole) + 1):
            rest = [*batches(each, SIZE, skip=skip)]
            assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[skip:], strict=True))


@everyone
def test_passes_meet_the_same_arranged_domains_again(name: str) -> None:
    once, thrice = (arrange([*stream_of()] * passes, name, batch_size=SIZE) for passes in (1, 3))
    assert len(thrice) == 3 * len(once)
    assert thrice[0] is thrice[len(once)] is thrice[2 * len(once)]


@everyone
def test_images_without_labels_are_refused_where_labels_are_needed_and_met_elsewhere(name: str) -> None:
    if name in free:
        assert all(batch.labels is None for _, batch in met(arrange(stream_of(labelled=False), name)))
        return
    with pytest.raises(DataError, match=f"stream={name} arranges .* 'a' has none; allowed without are shuffled, "):
        arrange(stream_of(labelled=False), name)


@everyone
def test_a_single_domain_of_a_single_image_is_met(name: str) -> None:
    data = images_of("a", 5.0).take(1)
    lonely = Domain("a", 5.0, 1, lambda: data, at_severity=lambda severity: Domain("a", severity, 1, lambda: data))
    least = {"few_classes": {"classes": 1}, "recurring": {"rounds": 1}}
    found = seen(arrange([lonely], name, batch_size=SIZE, **least.get(name, {})))
    assert {(image[0], image[3]) for batch in found for image in batch} == {("a", 0)}


def adapt(stream: Stream, progress: Progress | None = None, stop_after: int | None = None) -> Any:
    """Logits of each batch, and the report; None where it was stopped."""
    answers: list[Tensor] = []

    def note(domain: str, severity: float, batch: Batch, logits: Tensor) -> None:
        answers.append(logits)
        if progress is not None and len(answers) == stop_after:
            progress.stop()

    config = MethodConfig("tent", update="adam", lr=3e-2, objective={"entropy": 1.0}, parts=dict(BARE))
    adapter = OnlineAdapter(tiny_model(), build_method(config))
    try:
        return answers, run_stream(adapter, stream, batch_size=SIZE, on_batch=note, progress=progress)
    except Stopped:
        return answers, None


@everyone
def test_a_stopped_run_goes_on_bit_for_bit_and_no_other_stream_does(name: str) -> None:
    stream = arrange(stream_of(), name, batch_size=SIZE)
    expected, report = adapt(stream)
    cut, kept = len(expected) // 2, list[Any]()
    found, nothing = adapt(stream, Progress(kept.append), cut)
    assert nothing is None and len(found) == cut
    rest, resumed = adapt(arrange(stream_of(), name, batch_size=SIZE), Progress(kept.append, resume=kept[-1]))
    assert all(map(torch.equal, found + rest, expected)) and len(found + rest) == len(expected)
    assert resumed.domains == report.domains and resumed.pass_errors == report.pass_errors
    if kept[0]["shares"]:
        with pytest.raises(CheckpointError, match="is damaged"):
            adapt(stream, Progress(kept.append, resume={**kept[0], "shares": kept[0]["shares"][1:]}))
    other = arrange(stream_of(), "sorted" if name != "sorted" else "mixed", batch_size=SIZE)
    with pytest.raises(CheckpointError, match="had another stream"):
        adapt(other, Progress(kept.append, resume=kept[0]))


@everyone
def test_errors_are_those_of_each_domain_by_its_name(name: str) -> None:
    stream = arrange(stream_of(), name, batch_size=SIZE)
    answers, report = adapt(stream)
    wrong, images = Counter[tuple[str, float, int]](), Counter[tuple[str, float, int]]()
    for (each, batch), logits in zip(met(stream), answers, strict=True):
        assert batch.labels is not None
        missed = (logits.argmax(dim=1) != batch.labels).tolist()
        for origin, miss in zip(origins(each, batch), missed, strict=True):
            visit = max(each.visit, origin.visit)
            wrong[origin.name, origin.severity, visit] += miss
            images[origin.name, origin.severity, visit] += 1
    told, right = Counter[tuple[str, float, int]](), Counter[tuple[str, float, int]]()
    for row in report.domains:
        told[row.name, row.severity, row.number] += row.images
        right[row.name, row.severity, row.number] += round(row.error * row.images / 100)
    assert told == images and +right == +wrong
    assert report.images == sum(images.values())


@pytest.mark.parametrize(
    ("how", "settings", "says"),
    [
        ("srted", {}, "stream is 'srted'; allowed are shuffled, sorted, "),
        ("few_classes", {"clases": 2}, "did you mean stream.classes"),
        ("sorted", {"classes": 2}, "stream.classes is a setting of few_classes alone, and stream is sorted"),
        ("few_classes", {"classes": 0}, "stream.classes is 0; allowed are finite values of at least 1"),
        ("few_classes", {"classes": 2.5}, "stream.classes=2.5 is not allowed; it takes a whole number"),
        ("few_classes", {"classes": 5}, "stream.classes is 5; allowed is \\[1, 4\\]"),
        ("dirichlet", {"concentration": 0.0}, "stream.concentration is 0.0; it must be positive"),
        ("long_tail", {"ratio": 0.5}, "stream.ratio is 0.5; allowed are finite values of at least 1"),
        ("recurring", {"rounds": 0}, "stream.rounds is 0"),
        ("recurring", {"rounds": 30}, "stream.rounds is 30 and 'c' has 29 images"),
        ("long", {"passes": 0}, "stream.passes is 0"),
        ("sorted", {"seed": -1}, "seed is -1"),
        ("sorted", {"batch_size": 0}, "batch_size is 0"),
        (None, {}, "stream is None"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(how: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, DataError), match=says) as caught:
        arrange(stream_of(), how, **settings)
    assert "\n" not in str(caught.value)


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
