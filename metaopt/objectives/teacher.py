"""Cross-entropy with a teacher's prediction (CoTTA, CVPR 2022; MoASE, arXiv 2405.16486).

CE = −Σ_c p^T_c log p_c

with p the softmax of the student, which learns, and p^T that of the teacher, a constant.
"""

from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from metaopt.errors import ConfigError
from metaopt.objectives.term import Term
from metaopt.types import ForwardOutput


def teacher_cross_entropy(logits: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """Cross-entropy in nats of the prediction ``logits`` (B, C) with the teacher's, one value per sample: (B,).

    Raises:
        ConfigError: there are no predictions of a teacher.
    """
    if teacher_logits is None:
        raise ConfigError(
            "the objective's term 'teacher' got no logits of a teacher, needs (B, C); give the method a teacher "
            "(parts.teacher in its YAML file), or drop the term"
        )
    return -(softmax(teacher_logits.detach(), dim=-1) * log_softmax(logits, dim=-1)).sum(dim=-1)


class TeacherCrossEntropy(Term):
    """Cross-entropy of each prediction with a teacher's (CoTTA, MoASE)."""

    needs = frozenset({"teacher"})

    def forward(self, output: ForwardOutput) -> Tensor:
        """(B,), nats."""
        return teacher_cross_entropy(output.logits, output.teacher_logits)
