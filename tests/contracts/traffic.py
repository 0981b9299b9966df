"""How many files of the package one default batch runs through, and how many calls go from file to file.

python -m tests.contracts.traffic  # prints both for the default policy and for Tent
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

import metaopt
from metaopt.meta import MetaTrainConfig
from metaopt.meta.build_policy import build_policy
from metaopt.models import load_source_model
from metaopt.online import OnlineAdapter
from metaopt.policy import AdaptationPolicy
from metaopt.policy.untrained import DEFAULT_PARTS

PACKAGE = Path(metaopt.__file__ or "").parent
BATCH = 16


class Traffic(NamedTuple):
    """What a call ran through."""

    files: list[str]  # of the package, entered at least once
    crossings: int  # calls that enter a file of the package from another file


def traffic(run: Callable[[], object]) -> Traffic:
    """Watch one call by ``sys.setprofile``."""
    files: Counter[str] = Counter()
    crossings = 0

    def profile(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal crossings
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(PACKAGE)):
            files[str(Path(path).relative_to(PACKAGE))] += 1
            crossings += frame.f_back is not None and frame.f_back.f_code.co_filename != path

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return Traffic(sorted(files), crossings)


def default_policy() -> AdaptationPolicy:
    """The default composition, untrained, on the default network."""
    parts = {**DEFAULT_PARTS, "class_skew": {"evenness": 1e-9, "slope": 1e9}}  # noise is no skewed batch
    return build_policy(network(), torch.rand(BATCH, 3, 32, 32), MetaTrainConfig(parts=parts)).policy


def tent() -> AdaptationPolicy:
    """Tent, as its file says."""
    return metaopt.build_method(metaopt.load_method("tent"))


def network() -> metaopt.SourceModel:
    """The default network."""
    torch.manual_seed(0)
    return load_source_model("cifar_resnet20")


def one_batch(policy: AdaptationPolicy) -> Traffic:
    """The second batch of a stream: the first one allocates."""
    adapter, images = OnlineAdapter(network(), policy), torch.rand(BATCH, 3, 32, 32)
    adapter(images)
    return traffic(lambda: adapter(images))


if __name__ == "__main__":
    for name, policy in (("default policy", default_policy()), ("tent", tent())):
        seen = one_batch(policy)
        print(f"{name}: {len(seen.files)} files, {seen.crossings} calls from file to file", *seen.files, sep="\n  ")
