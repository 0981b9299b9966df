import torch

from metaopt.data.readers.digits import LEAST_CONTRAST, _contrast, load_digits


def test_parts_have_their_sizes_and_only_the_unlabeled_ones_have_no_labels():
    parts = load_digits()
    assert (len(parts.source), len(parts.unlabeled), len(parts.stream)) == (1000, 128, 669)
    assert parts.unlabeled.labels is None
    assert parts.source.images.shape == (1000, 3, 32, 32)
    assert parts.source.images.dtype == torch.uint8


def test_parts_are_disjoint():
    parts = load_digits()
    images = [
        image.numpy().tobytes() for part in (parts.source, parts.unlabeled, parts.stream) for image in part.images
    ]
    assert len(set(images)) == 1797


def test_every_class_is_in_proportion():
    parts = load_digits()
    assert parts.source.labels is not None and parts.stream.labels is not None
    shares = [labels.bincount(minlength=10) / len(labels) for labels in (parts.source.labels, parts.stream.labels)]
    assert (shares[0] - shares[1]).abs().max() < 0.005


def test_the_same_seed_gives_the_same_digits_and_another_others():
    first = load_digits()
    load_digits.cache_clear()
    again, other = load_digits(), load_digits(seed=1)
    assert torch.equal(first.stream.images, again.stream.images)
    assert not torch.equal(first.stream.images, other.stream.images)


def test_ink_and_paper_differ_and_colours_vary_between_images():
    images = load_digits().stream.images.float() / 255
    flat = images.flatten(2)  # the darkest and the brightest pixel of a digit are its ink and its paper
    luma = flat[:, 0] * 0.299 + flat[:, 1] * 0.587 + flat[:, 2] * 0.114
    assert (luma.amax(1) - luma.amin(1)).min() > 0.8 * LEAST_CONTRAST
    corners = images[:, :, 0, 0]
    assert corners.std(0).min() > 0.2
    assert _contrast(torch.tensor([[[0.0, 0, 0], [1, 1, 1]]])).item() == 1.0
