"""Damage files of every kind for a while, and count what reading them does: ``python -m tests.fuzz --minutes 10``.

Exit code 1 where anything but a `MetaoptError` of one line came out; such files are kept in ``--keep``.
"""

import argparse
import collections
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from random import Random

from metaopt.errors import MetaoptError

from .fuzzing.subjects import SUBJECTS

OUTCOMES = ("refused", "loaded", "faults")


def outcome(name: str, folder: Path) -> tuple[str, str]:
    """What reading a subject's files does, and where that is a fault, its traceback."""
    try:
        SUBJECTS[name].read(folder)
    except MetaoptError as error:
        return ("refused", "") if "\n" not in str(error) else ("faults", f"several lines: {error}")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "faults", traceback.format_exc()
    return "loaded", ""


def main() -> int:
    """Try until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SUBJECTS)
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"))
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    rng, end = Random(arguments.seed), time.monotonic() + 60 * arguments.minutes
    counts: dict[str, collections.Counter[str]] = {n: collections.Counter() for n in SUBJECTS}
    slowest, faults = (0.0, ""), set[str]()
    with tempfile.TemporaryDirectory() as root:
        good: dict[str, bytes] = {}
        for index, (name, subject) in enumerate(SUBJECTS.items()):
            (folder := Path(root) / str(index)).mkdir()
            subject.write(folder)
            good[name] = (folder / subject.file).read_bytes()
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        while time.monotonic() < end:
            name = arguments.only or rng.choice(list(SUBJECTS))
            subject, folder = SUBJECTS[name], Path(root) / str(list(SUBJECTS).index(name))
            content = rng.choice(subject.damages)(good[name], rng)
            (folder / subject.file).write_bytes(content)
            began = time.monotonic()
            found, why = outcome(name, folder)
            slowest = max(slowest, (time.monotonic() - began, name))
            counts[name][found] += 1
            last = why.strip().splitlines()[-1][:160] if why else ""
            if why and last not in faults:  # each kind of fault once
                faults.add(last)
                arguments.keep.mkdir(parents=True, exist_ok=True)
                (arguments.keep / f"{len(faults)}-{subject.file}").write_bytes(content)
                print(f"--- fault {len(faults)}, {name}\n{why}", file=sys.stderr, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts["all"] = sum(counts.values(), collections.Counter())
    for name, found in counts.items():
        print(f"{name:28}{sum(found.values()):9} files", *(f"{found[key]:8} {key}" for key in OUTCOMES))
    print(f"peak memory {peak / 1024:.0f} MiB, {(peak - start) / 1024:.0f} above the start", end="; ")
    print(f"slowest {slowest[0]:.2f} s ({slowest[1]})")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
