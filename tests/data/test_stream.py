import pytest
import torch

from metaopt.data.images import ImageSet, to_bytes
from metaopt.data.readers.digits import Digits
from metaopt.data.shifts import get_shift
from metaopt.data.stream import batches, corrupt, shifted_stream
from metaopt.errors import DataError


def test_batches_cover_every_image_once_with_the_short_one_last(digits):
    domain = shifted_stream(digits, [], [5], name="digits")[0]
    parts = list(batches(domain, 16))
    assert [len(part.images) for part in parts] == [16, 16, 8]
    index = torch.cat([part.index for part in parts])
    assert sorted(index.tolist()) == list(range(40))
    for part in parts:
        assert part.labels is not None and digits.labels is not None
        assert torch.equal(to_bytes(part.images), digits.images[part.index])
        assert torch.equal(part.labels, digits.labels[part.index])


def test_the_order_is_shuffled_by_the_seed_alone():
    fog, snow = Digits(["fog", "snow"], limit=30).stream()
    orders = [
        torch.cat([part.index for part in batches(fog, size, seed=seed)]) for size, seed in ((7, 0), (30, 0), (7, 1))
    ]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], torch.arange(30))
    assert torch.equal(orders[0], torch.cat([part.index for part in batches(snow, 7)]))


def test_domains_come_severity_by_severity():
    stream = Digits(["fog", "contrast"], [1, 5], limit=4).stream()
    assert [(domain.name, domain.severity, domain.size) for domain in stream] == [
        *(("fog", 1.0, 4), ("contrast", 1.0, 4)),
        *(("fog", 5.0, 4), ("contrast", 5.0, 4)),
    ]


def test_the_default_is_the_fifteen_at_their_hardest():
    stream = Digits().stream()
    assert len(stream) == 15
    assert {(domain.severity, domain.size) for domain in stream} == {(5.0, 669)}


def test_corruptions_of_a_domain_are_computed_once_and_do_not_depend_on_the_stream(digits):
    alone = shifted_stream(digits, ["shot_noise"], [5], name="digits")[0]
    among = shifted_stream(digits, ["fog", "shot_noise"], [5], name="digits")[1]
    assert alone.images is alone.images
    assert torch.equal(alone.images.images, among.images.images)
    assert alone.images.labels is digits.labels


def test_a_seed_changes_what_the_corruptions_draw(digits):
    first, second = (corrupt(digits, get_shift("shot_noise"), 5.0, seed).images for seed in (0, 1))
    assert not torch.equal(first, second)


def test_images_without_labels_give_batches_without():
    unlabeled = ImageSet(torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
    assert next(batches(shifted_stream(unlabeled, [], [5], name="arrays")[0], 2)).labels is None


def test_an_unknown_corruption_is_refused_before_the_stream_runs(digits):
    with pytest.raises(DataError, match="did you mean 'fog'"):
        shifted_stream(digits, ["foog"], [5], name="digits")


def test_a_batch_size_below_one_is_refused(digits):
    with pytest.raises(DataError, match="batch_size is 0"):
        next(batches(shifted_stream(digits, [], [5], name="digits")[0], 0))
