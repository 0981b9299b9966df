"""Adapt a model online, batch by batch, on a stream of shifted images: ``python adapt/online.py --help``."""

import sys

from metaopt.cli.adapt import main

if __name__ == "__main__":
    sys.exit(main())
