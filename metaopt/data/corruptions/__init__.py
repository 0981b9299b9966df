"""Corruptions: batched functions ``f(images, severity, generator)``, named by family in `metaopt.data.shifts`.

Each takes images (B, 3, H, W) in [0, 1], a severity in (0, 5] and a generator for all that is random, and gives images
of the same shape as truncated bytes. "Published" are the constants of D. Hendrycks and T. Dietterich, "Benchmarking
Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019, ``make_cifar_c.py``.
"""
