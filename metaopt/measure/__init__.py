"""What is measured of a run: errors, calibration, bytes held, time; and where it is shown."""

from metaopt.measure.calibration import CalibrationError as CalibrationError
from metaopt.measure.error import DomainResult as DomainResult
from metaopt.measure.error import DomainScore as DomainScore
from metaopt.measure.memory import MemoryMeter as MemoryMeter
from metaopt.measure.monitor import Monitor as Monitor
from metaopt.measure.monitor import curve_figure as curve_figure
from metaopt.measure.monitor import curves_figure as curves_figure
from metaopt.measure.monitor import read_scalars as read_scalars
from metaopt.measure.reachable import state_mib as state_mib
from metaopt.measure.tables import ProgressBar as ProgressBar
from metaopt.measure.tables import closing_table as closing_table
from metaopt.measure.tables import progress as progress
from metaopt.measure.timing import Stopwatch as Stopwatch
