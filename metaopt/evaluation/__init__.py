"""What is measured of a run: errors, calibration, bytes held, time; and where it is shown."""

from metaopt.evaluation.calibration import CalibrationError as CalibrationError
from metaopt.evaluation.error import DomainResult as DomainResult
from metaopt.evaluation.error import DomainScore as DomainScore
from metaopt.evaluation.meter import MemoryMeter as MemoryMeter
from metaopt.evaluation.monitor import Monitor as Monitor
from metaopt.evaluation.monitor import curve_figure as curve_figure
from metaopt.evaluation.monitor import curves_figure as curves_figure
from metaopt.evaluation.monitor import read_scalars as read_scalars
from metaopt.evaluation.reachable import state_mib as state_mib
from metaopt.evaluation.tables import ProgressBar as ProgressBar
from metaopt.evaluation.tables import closing_table as closing_table
from metaopt.evaluation.tables import progress as progress
from metaopt.evaluation.timing import Stopwatch as Stopwatch
