"""What is held is small for the operating system too: a step that the dense one dies in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("metaopt.activation_memory")

LIMIT_MIB = 200  # dense, ResNet-20 holds 288 MiB at batch 200


def run(memory: str, mib: int) -> "subprocess.CompletedProcess[str]":
    script = Path(__file__).with_name("limited.py")
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, str(script), memory, str(mib)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux alone")
def test_under_a_hard_limit_the_dense_step_dies_and_the_compact_one_finishes() -> None:
    dense, compact = run("dense", LIMIT_MIB), run("compact", LIMIT_MIB)
    assert dense.returncode == 3, dense.stderr
    assert compact.returncode == 0, compact.stderr
    roomy = run("dense", 4 * LIMIT_MIB)
    assert roomy.returncode == 0, roomy.stderr
    assert float(compact.stdout) == pytest.approx(float(roomy.stdout), rel=0.02)
