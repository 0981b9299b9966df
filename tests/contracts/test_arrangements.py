"""The battery that every arrangement of a stream in the registry passes; a new one needs nothing but its row."""

from collections import Counter
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch

from metaopt import registry
from metaopt.data import Domain, arrange, batch_count, batches, to_bytes
from metaopt.data.arrangements import Arrangement, settings_of
from metaopt.errors import CheckpointError, ConfigError, DataError
from metaopt.online import Progress
from metaopt.online.progress import fingerprint

from .arranged import SIZE, adapt, images_of, met, origins, seen, stream_of

everyone = pytest.mark.parametrize("name", registry.ARRANGEMENTS)
by_label = [name for name in registry.ARRANGEMENTS if registry.get("arrangement", name).needs_labels]
free = [name for name in registry.ARRANGEMENTS if name not in by_label]


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
