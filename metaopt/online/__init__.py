"""Online adaptation: the adapter that predicts and adapts, its guard, and runs over whole streams."""

from metaopt.online.adapter import OnlineAdapter as OnlineAdapter
from metaopt.online.layers import LayerMemory as LayerMemory
from metaopt.online.progress import Progress as Progress
from metaopt.online.progress import Stopped as Stopped
from metaopt.online.report import DomainReport as DomainReport
from metaopt.online.report import RunReport as RunReport
from metaopt.online.run import SETTINGS as SETTINGS
from metaopt.online.run import run_stream as run_stream
