"""What is measured of a run: errors, calibration, bytes held, time; and where it is shown."""

from metaopt.evaluation.error import DomainResult, DomainScore
from metaopt.evaluation.meter import MemoryMeter
from metaopt.evaluation.monitor import Monitor, curve_figure, curves_figure, read_scalars
from metaopt.evaluation.reachable import state_mib
from metaopt.evaluation.tables import ProgressBar, closing_table, progress
from metaopt.evaluation.timing import Stopwatch
