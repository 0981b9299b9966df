"""The meter against what the system says of a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Large blocks go back to the system when they are freed, and one thread has one arena.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sets up glibc's allocator")
def test_held_memory_is_resident_memory_within_3_percent() -> None:
    script = Path(__file__).with_name("resident.py")
    command = [sys.executable, str(script), "dense,checkpoint,hiding", "cifar_resnet20", "64"]
    run = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    for case in ("dense", "hiding"):
        assert found[case]["after_forward"] == pytest.approx(found[case]["held"], rel=0.03)
        assert found[case]["peak_held"] == found[case]["held"]
    assert found["hiding"]["held"] > 1.2 * found["dense"]["held"]
    # Checkpointed as a whole: nothing after the forward pass, and in backward as much as without.
    assert found["checkpoint"]["held"] < 0.1 and found["checkpoint"]["after_forward"] < 1.0
    assert found["checkpoint"]["in_backward"] == pytest.approx(found["checkpoint"]["peak_held"], rel=0.03)
    assert found["checkpoint"]["peak_held"] == pytest.approx(found["dense"]["peak_held"], rel=0.001)
