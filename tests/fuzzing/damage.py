"""Ways of damaging a file, each drawn from a source of randomness that hypothesis can shrink."""

import io
import math
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import torch

TEXTS = (
    "True",
    "None",
    "-1",
    "9" * 30,
    "'",
    "(",
    "b'",
    "0x",
    "1e999",
    "{",
    ",",
    "\\",
    "\0",
    "\n",
    "nan",
    "'|O'",
    "'<U0'",
)
"""What numpy's parser meets in a damaged header."""

NONSENSE: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**9, 10**30, 1.5, -0.0, math.nan, math.inf, "", "x", "a\nb", b"x", (), [], {}, [None],
    {1: 2}, {"a": 1}, torch.zeros(0), torch.zeros(()), torch.full((8,), math.nan), torch.ones(3, dtype=torch.int64),
    torch.ones(8).double(), -torch.ones(8), torch.ones(1).expand(10**6), torch.ones(2, dtype=torch.complex64),
)  # fmt: skip
"""What a value in a file is replaced by."""

VALUES: dict[torch.dtype, tuple[float, ...]] = {
    **dict.fromkeys((torch.float32, torch.float64), (math.nan, math.inf, -1.0, 1e30)),
    torch.int64: (-1, 10**9),
}
"""What a number in a tensor of that type is replaced by."""


def flipped(content: bytes, rng: Random) -> bytes:
    """With up to eight bits flipped, or bytes replaced."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(len(changed))
        changed[place] = rng.choice((changed[place] ^ 1 << rng.randrange(8), rng.randrange(256)))
    return bytes(changed)


def cut(content: bytes, rng: Random) -> bytes:
    """Without its end, its start, or a piece in the middle."""
    start = rng.randrange(len(content))
    end = rng.randrange(start, len(content))
    return rng.choice((content[:start], content[start:], content[:start] + content[end:]))


def grown(content: bytes, rng: Random) -> bytes:
    """With a piece of itself, or something else, put in."""
    start, place = rng.randrange(len(content)), rng.randrange(len(content) + 1)
    piece = rng.choice((content[start : start + 64], bytes(rng.randrange(256) for _ in range(rng.randrange(40)))))
    return content[:place] + piece + content[place:]


def headed(content: bytes, rng: Random) -> bytes:
    """With text in place of some of its first bytes, where a ``.npy`` file says what it holds."""
    start = rng.randrange(min(len(content), 100))
    text = rng.choice(TEXTS).encode()
    return content[:start] + text + content[start + rng.choice((0, 1, len(text))) :]


BYTES: tuple[Callable[[bytes, Random], bytes], ...] = (flipped, cut, grown, headed)


def damaged(content: bytes, rng: Random) -> bytes:
    """By one to three of these."""
    for _ in range(rng.randint(1, 3)):
        content = rng.choice(BYTES)(content, rng) if content else content
    return content


def resealed(content: bytes, rng: Random) -> bytes:
    """A file of ``torch.save`` with one of its members damaged, under checksums that fit."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    chosen = rng.choice([*members, *[name for name in members if name.endswith("data.pkl")] * len(members)])
    members[chosen] = damaged(members[chosen], rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return buffer.getvalue()


def rewritten(content: bytes, rng: Random) -> bytes:
    """A file of ``torch.save`` with one or two values replaced by nonsense, taken out, or changed a little."""
    tree = torch.load(io.BytesIO(content), weights_only=True)
    for _ in range(rng.randint(1, 2)):
        tree = _replaced(tree, rng)
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


def _replaced(node: Any, rng: Random) -> Any:
    if isinstance(node, dict) and node and rng.random() < 0.95:
        key = rng.choice(list(node))
        if rng.random() < 0.1:
            return {name: value for name, value in node.items() if name != key}
        return {**node, key: _replaced(node[key], rng)}
    if isinstance(node, list | tuple) and node and rng.random() < 0.9:
        place = rng.randrange(len(node))
        return type(node)(_replaced(item, rng) if index == place else item for index, item in enumerate(node))
    if isinstance(node, torch.Tensor) and node.numel() and rng.random() < 0.5:
        changed = node.clone()
        values = VALUES.get(node.dtype, (0, 1))
        changed.view(-1)[rng.randrange(node.numel())] = rng.choice(values)
        return changed
    return rng.choice(NONSENSE)
