"""Expected calibration error of a stream of predictions."""

import torch
from torch import Tensor

_JUST_UNDER_ONE = 1.0 - 1e-12


def confidences(logits: Tensor) -> Tensor:
    """Largest softmax probability of each row, in float64, 0 where the row has no softmax (NaN or +inf in it).

    Args:
        logits: (B, C).

    Returns:
        (B,), in [0, 1].
    """
    return torch.softmax(logits.detach().double(), dim=1).amax(dim=1).nan_to_num(nan=0.0)


class CalibrationError:
    """Streaming ECE: mean over images of their confidence bin's |accuracy - confidence| (Guo et al., ICML 2017, eq. 3).

    The bins are equally wide and the norm is L1. The binning is torchmetrics', fed with confidences and hits instead of
    logits: torchmetrics takes logits that all happen to lie in [0, 1] for probabilities, and gives confidences of
    exactly 1 a bin of their own, beside the highest one.
    """

    def __init__(self, bins: int = 15) -> None:
        from torchmetrics.classification import BinaryCalibrationError

        self._metric = BinaryCalibrationError(n_bins=bins, norm="l1")
        self._images = 0

    def update(self, confidence: Tensor, correct: Tensor) -> None:
        """Add a batch.

        Args:
            confidence: (B,), in [0, 1].
            correct: (B,), bool: whether the prediction was right.
        """
        if confidence.numel() == 0:
            return
        self._metric.update(confidence.cpu().clamp(max=_JUST_UNDER_ONE), correct.cpu().long())
        self._images += confidence.numel()

    def percent(self) -> float | None:
        """The error over everything added so far, in percent; None before the first image."""
        return 100.0 * float(self._metric.compute()) if self._images else None
