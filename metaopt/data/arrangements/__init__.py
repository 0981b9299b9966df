"""How the images of a stream are arranged: a dataclass of settings and a row in ``metaopt/registry.py`` for each way.

    stream = arrange(stream, "few_classes", seed=0, batch_size=50, classes=3)

Labels serve to arrange images alone; no method is given them. The same seed and batch size give the same stream.
"""

from metaopt.data.arrangements.arrange import arrange, arrangement, settings_of
from metaopt.data.arrangements.arrangement import Arrangement
