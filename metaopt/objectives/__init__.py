"""Label-free losses: from logits and features to a weighted sum of named terms."""

from metaopt.objectives.consistency import view_consistency as view_consistency
from metaopt.objectives.discrepancy import REFERENCE_BLOCKS as REFERENCE_BLOCKS
from metaopt.objectives.discrepancy import biased_std as biased_std
from metaopt.objectives.discrepancy import feature_discrepancy as feature_discrepancy
from metaopt.objectives.diversity import negative_mean_entropy as negative_mean_entropy
from metaopt.objectives.entropy import softmax_entropy as softmax_entropy
from metaopt.objectives.filtered import filtered_entropy as filtered_entropy
from metaopt.objectives.registry import OBJECTIVE_TERMS as OBJECTIVE_TERMS
from metaopt.objectives.registry import ObjectiveTerm as ObjectiveTerm
from metaopt.objectives.registry import get_term as get_term
from metaopt.objectives.registry import register_term as register_term
from metaopt.objectives.slr import soft_likelihood_ratio as soft_likelihood_ratio
from metaopt.objectives.source_statistics import source_statistics as source_statistics
from metaopt.objectives.teacher import teacher_cross_entropy as teacher_cross_entropy
from metaopt.objectives.views import augmented_view as augmented_view
from metaopt.objectives.weighted import POSITIVE as POSITIVE
from metaopt.objectives.weighted import InvertiblePair as InvertiblePair
from metaopt.objectives.weighted import WeightedObjective as WeightedObjective
