"""Adaptation memory: what autograd keeps for backward, and how small."""

from metaopt.sparsity.codec import Rate as Rate
from metaopt.sparsity.saved import LayerRecord as LayerRecord
from metaopt.sparsity.saved import SavedActivations as SavedActivations
