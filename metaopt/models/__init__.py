"""Source models: pre-trained classifiers with their normalisation, and how to name, load and look into them."""

from metaopt.models.blocks import find_blocks as find_blocks
from metaopt.models.registry import OWN_MODELS as OWN_MODELS
from metaopt.models.registry import load_source_model as load_source_model
from metaopt.models.source_model import SourceModel as SourceModel
from metaopt.models.source_prior import SourcePrior as SourcePrior
from metaopt.models.source_prior import prior_layers as prior_layers
from metaopt.models.spec import ModelSpec as ModelSpec
