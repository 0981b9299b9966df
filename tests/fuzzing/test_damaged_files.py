"""Whatever is done to a file, reading it gives valid values or one line; ``python -m tests.fuzz`` tries many more."""

from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaopt.data import READERS
from metaopt.errors import MetaoptError

from ..contracts.small_readers import FILES
from .subjects import SUBJECTS

EXAMPLES = 30


def test_every_reader_is_among_the_subjects() -> None:
    assert set(FILES) == set(READERS)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_good_file_is_read_and_stays_as_it_is(name: str, tmp_path: Path) -> None:
    SUBJECTS[name].write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    SUBJECTS[name].read(tmp_path)  # raises where a value is not as written
    assert before == {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert SUBJECTS[name].file in before or (tmp_path / SUBJECTS[name].file).is_file()


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_damaged_file_is_one_line_or_valid_values(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    subject, folder = SUBJECTS[name], tmp_path_factory.mktemp("damaged")
    subject.write(folder)
    good = (folder / subject.file).read_bytes()

    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True)
    @given(st.randoms(use_true_random=False), st.sampled_from(subject.damages))
    def read(rng: Random, damage) -> None:
        (folder / subject.file).write_bytes(damage(good, rng))
        try:
            subject.read(folder)
        except MetaoptError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000

    read()
