"""Source models: pre-trained classifiers with their normalisation, and how to name, load and look into them."""

from metaopt.models.blocks import find_blocks
from metaopt.models.registry import OWN_MODELS, load_source_model
from metaopt.models.source_model import SourceModel
from metaopt.models.source_prior import (
    ChannelMoments,
    Shrinkage,
    SourcePrior,
    merged_moments,
    prior_layers,
    running_statistics,
)
from metaopt.models.spec import ModelSpec
