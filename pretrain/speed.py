"""Measure what meta-training costs: ``python pretrain/speed.py --help``."""

import sys

from metaopt.cli.speed import main

if __name__ == "__main__":
    sys.exit(main())
