import os
import subprocess
import sys

import pytest

CHURN = """
import resource, sys
import torch
from metaopt.allocator import keep_freed_memory

took = keep_freed_memory() if sys.argv[1] == "keep" else None
torch.set_num_threads(1)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():  # three blocks of 4, 8 and 48 MiB, alive together
    return [torch.ones(mib, 1 << 18) for mib in (4, 8, 48)]

for _ in range(12):  # the heap takes a few rounds to find its shape
    work()
counts = []
for _ in range(15):
    before = faults()
    work()
    counts.append(faults() - before)
print(took, min(counts))  # the least: a machine under load moves and takes back pages, in some of the rounds
"""


def churn(mode: str) -> tuple[str, int]:
    """What the call said, and the fewest page faults of a round that allocates the same 60 MiB."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", CHURN, mode], capture_output=True, text=True, env=plain, check=True)
    took, faults = done.stdout.split()
    return took, int(faults)


def under_glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError, OSError):
        return False


@pytest.mark.skipif(not under_glibc(), reason="settings of glibc's malloc")
def test_freed_memory_is_used_again_without_page_faults():
    took, kept = churn("keep")
    _, returned = churn("return")
    assert took == "True"
    assert kept * 20 < returned


def test_another_c_library_is_left_alone(monkeypatch):
    from metaopt.allocator import keep_freed_memory

    def unknown(name: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", unknown, raising=False)
    assert keep_freed_memory() is False
