"""A small stream of three domains that arrangements are tried on, and what is met of it."""

from typing import Any

import torch
from torch import Tensor

from metaopt.data import Batch, Domain, ImageSet, Stream, batches, to_bytes
from metaopt.online import OnlineAdapter, Progress, run_stream
from metaopt.online.progress import Stopped
from metaopt.policy import MethodConfig, build_method

from ..tiny import BARE, random_images, tiny_model

SIZE = 8  # images of a batch
COUNTS = {"a": 43, "b": 43, "c": 29}  # images of each domain
LABEL_STEP = 3  # labels have gaps: classes 0, 3, 6 and 9


def images_of(name: str, severity: float) -> ImageSet:
    seed = int(10 * severity) + ord(name)
    return ImageSet(to_bytes(random_images(COUNTS[name], seed)), LABEL_STEP * (torch.arange(COUNTS[name]) % 4))


def domain(name: str, severity: float = 5.0, labelled: bool = True) -> Domain:
    data = images_of(name, severity)
    data = data if labelled else ImageSet(data.images)
    return Domain(name, severity, len(data), lambda: data, at_severity=lambda other: domain(name, other, labelled))


def stream_of(labelled: bool = True) -> Stream:
    return [domain(name, labelled=labelled) for name in COUNTS]


def met(stream: Stream, **given: Any) -> list[tuple[Domain, Batch]]:
    """Each batch, and the domain that it was met in."""
    return [(each, batch) for each in stream for batch in batches(each, SIZE, **given)]


def origins(each: Domain, batch: Batch) -> list[Domain]:
    """The domain, as read, of each image of a batch."""
    if batch.source is None:
        return [each] * len(batch.index)
    return [batch.sources[place] for place in batch.source.tolist()]


def seen(stream: Stream, **given: Any) -> list[list[tuple[str, float, int, int]]]:
    """Domain, severity, visit and index of each image of each batch."""
    return [
        [
            (origin.name, origin.severity, origin.visit, index)
            for origin, index in zip(origins(each, batch), batch.index.tolist(), strict=True)
        ]
        for each, batch in met(stream, **given)
    ]


def adapt(stream: Stream, progress: Progress | None = None, stop_after: int | None = None) -> Any:
    """Logits of each batch, and the report; None where it was stopped."""
    answers: list[Tensor] = []

    def note(domain: str, severity: float, batch: Batch, logits: Tensor) -> None:
        answers.append(logits)
        if progress is not None and len(answers) == stop_after:
            progress.stop()

    config = MethodConfig("tent", update="adam", lr=3e-2, objective={"entropy": 1.0}, parts=dict(BARE))
    adapter = OnlineAdapter(tiny_model(), build_method(config))
    try:
        return answers, run_stream(adapter, stream, batch_size=SIZE, on_batch=note, progress=progress)
    except Stopped:
        return answers, None
