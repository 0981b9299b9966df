"""The battery that every reader in `READERS` passes: a new one needs its settings and files in `small_readers`."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from metaopt.data import READERS, Reader
from metaopt.errors import ConfigError

from .small_readers import reader_settings, write_files

CONFIGS = Path(__file__).parents[2] / "configs" / "data"

everyone = pytest.mark.parametrize("name", READERS)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Of each reader for a stream of at most a few images under fog and snow, and the files for it."""
    write_files(tmp_path)
    return reader_settings(tmp_path)


@everyone
def test_it_is_called_what_its_row_says_and_its_file_names_its_settings(name: str):
    reader = READERS[name]
    assert reader.name == name
    told = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert told.pop("name") == name
    assert set(told) <= {field.name for field in fields(reader)}
    default = reader()
    assert {key: getattr(default, key) or None for key in told} == {key: value or None for key, value in told.items()}


@everyone
def test_the_stream_has_a_domain_for_each_corruption_and_holds_labelled_images(name: str, settings):
    stream = READERS[name](**settings[name]).stream()
    assert [(domain.name, domain.severity, domain.size) for domain in stream] == [("fog", 5.0, 4), ("snow", 5.0, 4)]
    for domain in stream:
        data = domain.images
        assert len(data) == domain.size
        assert data.labels is not None


@everyone
def test_a_seed_means_the_same_stream_again(name: str, settings):
    first, again = (READERS[name](**settings[name]).stream(seed=3) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.images.images, other.images.images)


@everyone
def test_passes_meet_the_same_domains_again(name: str, settings):
    stream = READERS[name](**settings[name], passes=3).stream()
    assert len(stream) == 6
    assert stream[0] is stream[2] is stream[4]


@everyone
def test_what_a_stream_needs_may_be_left_out_until_there_is_to_be_one(name: str):
    reader = READERS[name]()
    if reader.required is None:
        reader.check_stream()
        return
    key, why = reader.required
    says = f"data.{key} is not set; data={name} {why}: set data.{key}=PATH"
    for call in (reader.check_stream, reader.stream):
        with pytest.raises(ConfigError) as caught:
            call()
        assert str(caught.value) == says


@everyone
@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"limit": 0}, "data.limit=0 is out of range; allowed are values of at least 1: set data.limit=1"),
        ({"passes": 0}, "data.passes=0 is out of range; allowed are values of at least 1: set data.passes=1"),
        (
            {"severities": []},
            "data.severities=[] is empty; allowed are values in (0, 5]: set data.severities=[5]",
        ),
        *(
            (
                {"severities": [5, value]},
                f"data.severities has {value}; allowed are values in (0, 5]: set for example data.severities=[5]",
            )
            for value in (0, -1, 5.5, float("nan"))
        ),
    ],
)
def test_values_out_of_range_are_refused_when_they_are_set(name: str, values: dict[str, Any], says: str):
    with pytest.raises(ConfigError) as caught:
        READERS[name](**values)
    assert str(caught.value) == says


@everyone
def test_clean_images_have_no_labels_or_are_said_to_be_missing(name: str):
    reader: Reader = READERS[name]()
    if reader.has_clean_images:
        assert reader.clean_images().labels is None
        return
    with pytest.raises(ConfigError, match=rf"source\.images is not set; data={name} has no clean unlabeled images"):
        reader.clean_images()


def test_an_unknown_part_of_the_digits_is_refused():
    with pytest.raises(ConfigError, match=r"data\.part=test is unknown; allowed are stream, source: choose one"):
        READERS["digits"](part="test")  # pyright: ignore[reportCallIssue]
