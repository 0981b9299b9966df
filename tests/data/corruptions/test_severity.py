from itertools import pairwise

import pytest
import torch

from metaopt.data.corruptions.severity import constants, poisson, truncate, unit
from metaopt.data.images import to_float
from metaopt.data.seeding import generator_for
from metaopt.errors import DataError

TABLE = ((0, 10), (1, 20), (2, 30), (4, 30), (8, 0), (16, 5))


@pytest.mark.parametrize(
    ("severity", "row"),
    [(1, (1, 20)), (5, (16, 5)), (5.0, (16, 5)), (0.5, (0.5, 15)), (3.25, (5, 22.5)), (4.5, (12, 2.5))],
)
def test_constants_lie_on_the_line_between_two_severities(severity, row):
    assert constants(TABLE, severity) == pytest.approx(row)


def test_constants_change_without_a_jump():
    steps = [constants(TABLE, 0.01 * step)[0] for step in range(1, 501)]
    assert max(abs(b - a) for a, b in pairwise(steps)) == pytest.approx(0.08)


@pytest.mark.parametrize("severity", [0, 5.1, -2, float("nan")])
def test_a_severity_out_of_range_is_refused(severity):
    with pytest.raises(DataError, match=r"it must lie in \(0, 5\]"):
        constants(TABLE, severity)


def test_bytes_are_recovered_exactly_and_cut_as_a_cast_does():
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    values = unit(to_float(images))
    assert torch.equal(values, images.double() / 255)
    shifted = truncate(values + 0.9 / 255, to_float(images))
    assert torch.equal((shifted * 255).round().to(torch.uint8), images)


def test_poisson_draws_have_the_mean_and_variance_of_their_rate():
    draws = poisson(torch.full((20000,), 9.0), generator_for(0))
    assert draws.mean().item() == pytest.approx(9, abs=0.1)
    assert draws.var().item() == pytest.approx(9, abs=0.4)
