"""A run over a stream that may be stopped: when its state is saved, and what a saved state goes with."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from metaopt.data import Batch, Stream
from metaopt.errors import CheckpointError
from metaopt.files import weights_sha256

RunState = dict[str, Any]
"""What `run_stream` needs to go on: tensors and primitives."""


class Stopped(Exception):
    """A run stopped between two batches because it was asked to; its state was handed over to be saved."""


@dataclass
class Progress:
    """Keeps a run over a stream so that another process can go on with it.

    Args:
        save: called between two batches with the state of the run, which is a copy.
        every: batches from one call to the next. The first batch of the stream and the last are followed by one too.
            0: none but at a stop.
        resume: a state to go on from; None: from the beginning.
    """

    save: Callable[[RunState], None]
    every: int = 0
    resume: RunState | None = None
    _stopping: bool = False

    def stop(self) -> None:
        """Ask the run to stop after the batch in hand; may be called at any time, by a signal's handler too."""
        self._stopping = True

    def after_batch(self, done: int, total: int, state: Callable[[], RunState]) -> None:
        """Save where it is time to.

        Args:
            done: batches so far.
            total: batches of the stream.
            state: of the run after this batch.

        Raises:
            Stopped: the run was asked to stop, and more batches are left.
        """
        stopping = self._stopping  # once: it may be set at any time
        if stopping or (self.every and (done in (1, total) or done % self.every == 0)):
            self.save(state())
        if stopping and done < total:
            raise Stopped


def fingerprint(stream: Stream) -> str:
    """Names, severities and sizes of the domains and, where they were arranged, which images are met in which order."""
    digest = hashlib.sha256()
    for domain in stream:
        digest.update(f"{domain.name!r}|{domain.severity}|{domain.size}\n".encode())
        if domain.order is not None:
            order = domain.order
            made_of = [(each.name, each.severity, each.size, each.visit) for each in order.sources]
            images = weights_sha256({"source": order.source, "index": order.index})
            digest.update(f"{made_of}|{order.segments}|{images}\n".encode())
    return digest.hexdigest()


def last_seen(batch: Batch) -> str:
    """Fingerprint of the last image of a batch, and of which images the batch has."""
    of = {} if batch.source is None else {"source": batch.source}
    return weights_sha256({"image": batch.images[-1:], "index": batch.index, **of})


def check_same(now: RunState, then: RunState) -> None:
    """Refuse a state of another run.

    Args:
        now: what the run is made of, by name.
        then: what the run that was saved was made of.

    Raises:
        CheckpointError: something differs; the message says what.
    """
    differing = [name for name, value in now.items() if then.get(name) != value]
    if differing:
        raise CheckpointError(
            f"the run to resume had another {', another '.join(differing)}; allowed is the same one: repeat it, or "
            "start a new run"
        )
