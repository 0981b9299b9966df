"""Which rule stores what an operator saves: one table over torch's functions and methods.

A rule is called once the operator has run. It fills the slots it understands; the rest is stored as the unknown is. It
returns the operator's kind, for the records, or None where it did not recognise what was saved.
"""

from collections.abc import Callable

from metaopt.sparsity.activations import ACTIVATION_RULES
from metaopt.sparsity.attention import ATTENTION_RULES
from metaopt.sparsity.convolution import CONVOLUTION_RULES
from metaopt.sparsity.norms import NORM_RULES

RULES: dict[Callable | None, Callable] = {**NORM_RULES, **ACTIVATION_RULES, **ATTENTION_RULES, **CONVOLUTION_RULES}
