"""The bridge between the command line and the library: the only place inside the package that knows Hydra."""

from metaopt.configs.bridge import compose as compose
from metaopt.configs.bridge import help_text as help_text
from metaopt.configs.command import resolve_device as resolve_device
from metaopt.configs.command import run_command as run_command
from metaopt.configs.schema import BenchmarkSettings as BenchmarkSettings
from metaopt.configs.schema import FootprintSettings as FootprintSettings
from metaopt.configs.schema import MetaTrainSettings as MetaTrainSettings
from metaopt.configs.schema import OnlineSettings as OnlineSettings
from metaopt.configs.schema import SourceSettings as SourceSettings
from metaopt.configs.sections import DataSection as DataSection
from metaopt.configs.sections import GeneratorSection as GeneratorSection
from metaopt.configs.sections import MetaSection as MetaSection
from metaopt.configs.sections import MethodSection as MethodSection
from metaopt.configs.sections import ModelSection as ModelSection
from metaopt.configs.sections import SourceSection as SourceSection
