"""Label-free losses: from logits and features to a weighted sum of named terms."""

from metaopt.objectives.term import Term as Term
from metaopt.objectives.term import register_term as register_term
from metaopt.objectives.weighted import WeightedObjective as WeightedObjective
