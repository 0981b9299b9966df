"""metaopt: meta-train how a vision model adapts itself at test time, and deploy the result."""

from metaopt.data import register_shift as register_shift
from metaopt.data import shift_names as shift_names
from metaopt.errors import MetaoptError as MetaoptError
from metaopt.generator.faces import MGGOptimizer as MGGOptimizer
from metaopt.meta import MetaTrainConfig as MetaTrainConfig
from metaopt.meta import meta_train as meta_train
from metaopt.models import SourceModel as SourceModel
from metaopt.models import load_source_model as load_source_model
from metaopt.online import OnlineAdapter as OnlineAdapter
from metaopt.online import run_stream as run_stream
from metaopt.policy import AdaptationPolicy as AdaptationPolicy
from metaopt.policy import MethodConfig as MethodConfig
from metaopt.policy import build_method as build_method
