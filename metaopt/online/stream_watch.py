r"""What a user should know of a stream that the method does not take it to be: told once each, never an error.

Three things are watched, all from predictions that are there anyway, without labels:

- **Batches far smaller** than those that a policy was meta-trained on: at two in a row of less than a quarter.
- **Classes far from even**, of methods with batch statistics: the mean :math:`\bar p` of all predicted class shares has
  :math:`e^{H(\bar p)} / C < 0.92`, after four batches and 40 images a class. Without batch statistics a shift alone
  brings this down (to 0.23 under gaussian noise), and nothing is told.
- **Sorted by class**: counts of the predicted classes differ between neighbouring batches (small ones are counted
  together, up to 40 images) by more than chance allows.
  Of the latest 20 two-sample :math:`\chi^2` over their degrees of freedom, each 1 in expectation where images come in a
  random order, the mean without the largest fifth (a shift changes one of them) is above 1.3: where all is chance, in 2
  of 500 streams of 60 batches.

Measured on eight corruptions of CIFAR-10-C at severity 5, ResNet-20, ``bn``, batch 100: classes are told of two of the
ten in six of eight (0.82 to 0.93), of five of the ten in two of eight, and of all ten never in 1,600 random orders
(0.944 at the lowest); a long tail of 10 to 1 (0.95 to 0.98) is not. A stream sorted by class is told of ``source``
(0.9 to 2.4, balanced 0.8 at most) and of ``bn`` at batch 200 (1.1 to 1.5, balanced 0.6), not at batch 100 (1.0):
normalised by a batch of one class, a network spreads its predictions over all. ``class_balance`` hides both.
"""

import logging
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

EVEN = 0.92  # effective number of predicted classes, over their number
EVEN_BATCHES, EVEN_IMAGES = 4, 40  # images of each class
SORTED, NEIGHBOURS = 1.3, 20
COMPARED = 40  # images at least on either side: counts of a few differ for no reason
KEPT = 0.8  # share of the differences that count, the smallest ones
TOGETHER = 8  # batches are judged together, for it takes a small network's step longer than it should
SMALL = 0.25  # of the batch size in meta-training

MISLED = "which misleads batch statistics, class_balance and diversity"
HANDLED = "so class_skew answers its batches for the classes that they hold, and little is learned of them"

LOGGER = logging.getLogger("metaopt")


class StreamWatch:
    """Sees each batch's predictions, and warns of what does not fit the method, once each, in the log too.

    Args:
        classes: C.
        trained_batch: images of a batch in meta-training; None: unknown.
        batch_statistics: whether the method normalises by the batch.
        handled: whether it tells batches of a few classes itself.
    """

    def __init__(self, classes: int, trained_batch: int | None, batch_statistics: bool, handled: bool = False) -> None:
        self.classes, self.trained_batch, self.batch_statistics = classes, trained_batch, batch_statistics
        self.handled = handled
        self.clear()

    def clear(self) -> None:
        """Another stream: what was seen and told so far is forgotten."""
        self._found: dict[str, str] = {}
        self._unseen: list[Tensor] = []  # counts of the latest batches
        self._counts = torch.zeros(self.classes, dtype=torch.float64)
        self._batches = self._small = 0
        self._last: Tensor | None = None  # counts of the batch before, or of the batches
        self._open: Tensor | None = None  # counts of smaller ones since, too few to be compared
        self._ratios: deque[float] = deque(maxlen=NEIGHBOURS)

    def reset(self) -> None:
        """The next batch is no neighbour of the last one; all else goes on."""
        self._catch_up()
        self._last = self._open = None

    def see(self, logits: Tensor) -> None:
        """Take in the predictions on a batch, (B, C); one that is not finite counts for nothing."""
        if not bool(torch.isfinite(logits).all()):
            return
        self._unseen.append(torch.bincount(logits.argmax(dim=1), minlength=logits.shape[1]))
        if len(self._unseen) == TOGETHER:
            self._catch_up()

    @property
    def found(self) -> dict[str, str]:
        """Warnings so far, by what they are of."""
        self._catch_up()
        return self._found

    def _catch_up(self) -> None:
        """Judge the latest batches, one after the other."""
        unseen, self._unseen = self._unseen, []
        for counts in torch.stack(unseen).double().cpu() if unseen else ():
            self._take(counts)

    def _take(self, counts: Tensor) -> None:
        images = int(counts.sum())
        self._batches, self._counts = self._batches + 1, self._counts + counts
        self._open = counts if self._open is None else self._open + counts
        if int(self._open.sum()) >= COMPARED:
            if self._last is not None:
                self._ratios.append(two_sample_ratio(self._last, self._open))
            self._last, self._open = self._open, None
        self._judge_size(images)
        self._judge_evenness()
        self._judge_order()

    def state_dict(self) -> dict[str, Any]:
        """What was seen and told so far, as tensors and primitives."""
        return {
            "found": dict(self.found),  # first: it catches up
            "counts": self._counts.clone(),
            "batches": self._batches,
            "small": self._small,
            "last": torch.empty(0) if self._last is None else self._last.clone(),
            "open": torch.empty(0) if self._open is None else self._open.clone(),
            "ratios": list(self._ratios),
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._found, self._unseen = {str(key): str(text) for key, text in values["found"].items()}, []
        self._counts = values["counts"].clone()
        self._batches, self._small = int(values["batches"]), int(values["small"])
        self._last, self._open = (values[k].clone() if values[k].numel() > 0 else None for k in ("last", "open"))
        self._ratios = deque(map(float, values["ratios"]), maxlen=NEIGHBOURS)

    def _judge_size(self, images: int) -> None:
        trained = self.trained_batch
        self._small = self._small + 1 if trained is not None and images < SMALL * trained else 0
        if self._small >= 2:
            self._warn(
                "batch_size",
                f"batches have {images} images and the policy was meta-trained on {trained}: small ones tell little of "
                "their domain, and updates wait for more of them; give larger ones, or meta-train with their size",
            )

    def _judge_evenness(self) -> None:
        if not self.batch_statistics or self._batches < EVEN_BATCHES or "classes" in self._found:
            return
        images, classes = int(self._counts.sum()), len(self._counts)
        if images < EVEN_IMAGES * classes:
            return
        effective = float(torch.special.entr(self._counts / images).sum().exp())
        if effective < EVEN * classes:
            self._warn(
                "classes",
                f"{images} predictions look like {effective:.1f} of {classes} classes: those of the stream seem "
                "unbalanced, or the shift favours some; diversity and class_balance take them for balanced",
            )

    def _judge_order(self) -> None:
        if len(self._ratios) < NEIGHBOURS:
            return
        kept = sorted(self._ratios)[: int(KEPT * NEIGHBOURS)]
        if sum(kept) / len(kept) > SORTED:
            self._warn(
                "order",
                "predicted classes differ between batches by more than chance allows: the stream seems sorted by "
                f"class, {HANDLED if self.handled else MISLED}; shuffle it if you can",
            )

    def _warn(self, key: str, text: str) -> None:
        if key not in self._found:
            self._found[key] = text
            LOGGER.warning(text)


def two_sample_ratio(first: Tensor, second: Tensor) -> float:
    r"""The two-sample :math:`\chi^2` of counts, (C,) each, over its degrees of freedom; 1 where nothing can differ."""
    one, other = first.numpy(), second.numpy()  # a dozen small operations a batch, which torch takes longer for
    together = one + other
    met = together > 0
    one, other, together = one[met], other[met], together[met]
    ratio = math.sqrt(other.sum() / one.sum())
    freedom = len(together) - 1
    return float(((ratio * one - other / ratio) ** 2 / together).sum()) / freedom if freedom > 0 else 1.0
