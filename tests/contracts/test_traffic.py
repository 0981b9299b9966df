"""A reader who follows one batch opens few files."""

from .traffic import default_policy, one_batch, tent


def test_a_default_batch_runs_through_28_files_at_most() -> None:
    files = one_batch(default_policy()).files
    assert {"policy/step.py", "policy/parts/restoration.py", "optimizers/mgg.py"} <= set(files)
    assert len(files) <= 28, files


def test_a_batch_of_tent_runs_through_19_files_at_most() -> None:
    files = one_batch(tent()).files
    assert {"policy/step.py", "objectives/entropy.py", "optimizers/adam.py"} <= set(files)
    assert len(files) <= 19, files
