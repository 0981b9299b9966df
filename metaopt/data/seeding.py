"""Random streams that depend on what they are for, not on what was drawn before."""

import hashlib

import torch


def generator_for(*key: object) -> torch.Generator:
    """A CPU generator seeded by the key, the same in every process: ``generator_for(seed, "fog", 5.0)``.

    Args:
        key: primitives (numbers and strings) whose ``repr`` is stable.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
