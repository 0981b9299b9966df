"""Update rules: the meta gradient generator with its gradient memory layer, and the hand-made rules it replaces."""

from metaopt.generator.features import Moments as Moments
from metaopt.generator.memory import GradientMemoryLayer as GradientMemoryLayer
from metaopt.generator.mgg import VARIANTS as VARIANTS
from metaopt.generator.mgg import GeneratorConfig as GeneratorConfig
from metaopt.generator.mgg import GeneratorState as GeneratorState
from metaopt.generator.mgg import GradientGenerator as GradientGenerator
from metaopt.generator.registry import HAND_MADE_RULES as HAND_MADE_RULES
from metaopt.generator.registry import UPDATE_RULES as UPDATE_RULES
from metaopt.generator.rules import SGD as SGD
from metaopt.generator.rules import Adam as Adam
