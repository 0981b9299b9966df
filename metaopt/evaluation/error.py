"""Error and expected calibration error (ECE) of one domain of a stream, batch by batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt.errors import DataError

_JUST_UNDER_ONE = 1.0 - 1e-12


def confidences(logits: Tensor) -> Tensor:
    """Largest softmax probability of each row of (B, C), (B,) in float64; 0 without a softmax (NaN or +inf in it)."""
    return torch.softmax(logits.detach().double(), dim=1).amax(dim=1).nan_to_num(nan=0.0)


@dataclass(frozen=True)
class DomainResult:
    """What a domain scored. Errors are in percent and None where no image had a label."""

    error: float | None
    ece: float | None
    images: int


class DomainScore:
    """Counts errors and calibration over the batches of one domain.

    ECE is the mean over images of their confidence bin's |accuracy - confidence| (Guo et al., ICML 2017, eq. 3), the
    bins being equally wide. A row without a softmax counts as wrong, with confidence 0: diverging is no excuse.

    Args:
        num_classes: C, which the logits must have and the labels stay under.
        bins: number of confidence bins of the calibration error.
    """

    def __init__(self, num_classes: int, *, bins: int = 15) -> None:
        from torchmetrics.classification import BinaryCalibrationError

        self.num_classes = num_classes
        self.images = 0
        self.cumulative_error: list[float] = []  # percent over all images so far, after each labelled batch
        self._wrong = self._labelled = 0  # images
        # Fed with confidences and hits: it takes logits that all happen to lie in [0, 1] for probabilities, and gives
        # confidences of exactly 1 a bin of their own.
        self._calibration = BinaryCalibrationError(n_bins=bins, norm="l1")

    def update(self, logits: Tensor, labels: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: (B, C).
            labels: (B,), integers in 0..C-1, or None where the truth is not known.

        Raises:
            DataError: the logits do not have C columns, or the labels do not go with them.
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise DataError(
                f"logits of shape {tuple(logits.shape)}: the score was made for (images, {self.num_classes}); "
                "make it with the model's number of classes"
            )
        self.images += logits.shape[0]
        if labels is None or logits.shape[0] == 0:
            return
        labels = self._checked(labels, logits.shape[0]).to(logits.device)
        confidence = confidences(logits)  # (B,)
        correct = (logits.detach().argmax(dim=1) == labels) & (confidence > 0)  # (B,)
        self._wrong += int((~correct).sum())
        self._labelled += len(labels)
        self._calibration.update(confidence.cpu().clamp(max=_JUST_UNDER_ONE), correct.cpu().long())
        self.cumulative_error.append(100.0 * self._wrong / self._labelled)

    def result(self) -> DomainResult:
        """Error and ECE over the batches so far."""
        if not self.cumulative_error:
            return DomainResult(None, None, self.images)
        return DomainResult(self.cumulative_error[-1], 100.0 * float(self._calibration.compute()), self.images)

    def state_dict(self) -> dict[str, Any]:
        """All that another score of as many classes needs to go on: tensors and primitives."""
        nothing = torch.empty(0)
        return {
            "images": self.images,
            "wrong": self._wrong,
            "labelled": self._labelled,
            "cumulative_error": torch.tensor(self.cumulative_error, dtype=torch.float64),
            "confidences": torch.cat([nothing.double(), *self._calibration.confidences]),
            "hits": torch.cat([nothing.byte(), *(hits.byte() for hits in self._calibration.accuracies)]),
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.images, self._wrong, self._labelled = values["images"], values["wrong"], values["labelled"]
        self.cumulative_error = values["cumulative_error"].tolist()
        self._calibration.reset()
        if len(values["hits"]):
            self._calibration.update(values["confidences"], values["hits"].long())

    def _checked(self, labels: Tensor, count: int) -> Tensor:
        if labels.shape != (count,):
            raise DataError(
                f"labels of shape {tuple(labels.shape)} for {count} images: allowed is ({count},); "
                "give one label an image"
            )
        if labels.dtype.is_floating_point or labels.dtype == torch.bool:
            raise DataError(f"labels of type {labels.dtype}: allowed are integers; convert them with .long()")
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= self.num_classes:
            raise DataError(
                f"labels from {lowest} to {highest}: allowed is 0 to {self.num_classes - 1}; "
                "map them to the model's classes"
            )
        return labels
