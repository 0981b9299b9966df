"""What importing the parts costs: the libraries that only some calls need come with those calls."""

import subprocess
import sys
from pathlib import Path

import pytest

import metaopt

HEAVY = ("matplotlib", "tensorboard", "torchmetrics", "scipy", "sklearn", "timm", "torchvision", "rich", "triton")

CODE = """
import sys, types
front = types.ModuleType("metaopt")  # the package's own front takes in every part
front.__path__ = [sys.argv[1]]
sys.modules["metaopt"] = front
import metaopt.data, metaopt.evaluation, metaopt.experts, metaopt.models, metaopt.source_training
print(*{name.partition(".")[0] for name in sys.modules})
"""


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """Names of the top-level packages that importing the parts brings in, in a process of its own."""
    command = [sys.executable, "-c", CODE, str(Path(metaopt.__file__).parent)]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("library", HEAVY)
def test_a_heavy_library_waits_for_the_call_that_needs_it(imported: set[str], library: str):
    assert "metaopt" in imported and "torch" in imported
    assert library not in imported
