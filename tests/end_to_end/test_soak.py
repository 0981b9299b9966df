"""A policy on a stream of small batches with faults: it goes on as without them, and no memory is lost."""

import pytest

from ..soak import FAULTS, soak


@pytest.mark.slow
def test_a_stream_with_faults_is_as_good_as_one_without() -> None:
    found = soak(1500, unrolls=8, fault_every=15, report=False)
    assert set(found.faults) == set(FAULTS)
    for tenth in range(1, 10):
        assert abs(found.with_faults[tenth] - found.without[tenth]) < 4, found
    mean = [sum(errors) / len(errors) for errors in found[:3]]
    assert abs(mean[0] - mean[1]) < 1.0 and mean[0] < mean[2] + 1.0, found
    assert found.resident[-1] - found.resident[1] < 50, found.resident
