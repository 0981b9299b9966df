"""Meta-train an adaptation policy on a few unlabeled images: ``python pretrain/meta_train.py --help``."""

import sys

from metaopt.cli.meta_train import main

if __name__ == "__main__":
    sys.exit(main())
