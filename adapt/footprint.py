"""Measure how small an adaptation step can get: ``python adapt/footprint.py --help``."""

import sys

from metaopt.cli.footprint import main

if __name__ == "__main__":
    sys.exit(main())
