"""What all tests share."""

import torch

# The tests' models are small: splitting their work over threads costs more than it brings, and two test processes with
# one thread each use two cores better than one process with two.
torch.set_num_threads(1)
