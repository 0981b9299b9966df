"""The gradient generator with its memory, written a second time: one scalar, plain loops, float64, autograd inside.

It follows the equations of MGG (arXiv 2412.16901, section 3) as directly as possible and shares no code with the
package. The memory step is what autograd says the gradient of the reconstruction loss is, not a closed form.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BETA1, BETA2 = 0.9, 0.99
EPS = 1e-8
NORM_EPS = 1e-6


class OracleMGG:
    """Generator for ONE adapted scalar, with its own memory (W, b) and moments (m, v).

    Args:
        weights: ``Wq``, ``Wk``, ``Wv`` (h, 2); ``W0`` (h, h); ``b0`` (h,); ``w_eta`` (2,), ``c_eta`` (); ``ln_weight``,
            ``ln_bias`` (h,) of the norm in the reconstruction and the read-out; ``ln2_weight``, ``ln2_bias`` (h,) of
            the norm before the output; ``Wo`` (h,), ``bo`` (). The memory multiplies row vectors: u = k W + b.
        differentiable: keep the graph through the memory steps, so that outputs can be differentiated in ``weights``
            and in the gradients; else nothing of it requires gradients.
    """

    def __init__(self, weights: Mapping[str, Tensor], differentiable: bool = False) -> None:
        self.differentiable = differentiable
        self.weights = {
            name: tensor.to(torch.float64) if differentiable else tensor.detach().to(torch.float64)
            for name, tensor in weights.items()
        }
        self.h = self.weights["W0"].shape[0]
        self.W, self.b = self.weights["W0"], self.weights["b0"]
        self.m = self.v = torch.zeros((), dtype=torch.float64)
        self.t = 0

    def features(self, g: Tensor) -> list[Tensor]:
        """Take the gradient into the moments; the two features x."""
        self.t += 1
        self.m = BETA1 * self.m + (1 - BETA1) * g
        self.v = BETA2 * self.v + (1 - BETA2) * g * g
        m_hat = self.m / (1 - BETA1**self.t)
        v_hat = self.v / (1 - BETA2**self.t)
        root = v_hat.sqrt() if v_hat.item() > 0 else torch.zeros((), dtype=torch.float64)
        return [m_hat / (root + EPS), g / (root + EPS)]

    def reconstruction_loss(self, W: Tensor, b: Tensor, k: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
        """½‖LN(kW + b) − (v − k)‖²."""
        reconstruction = self._norm(_row_times(k, W, b), "ln")
        total = torch.zeros((), dtype=torch.float64)
        for j in range(self.h):
            total = total + (reconstruction[j] - (v[j] - k[j])) ** 2
        return total / 2

    def step(self, gradients: Sequence[Tensor | float]) -> Tensor:
        """Take in the given gradients of the scalar one after the other; the output y in (−1, 1) after the last.

        What is subtracted from the scalar is the learning rate times y.
        """
        y = torch.zeros((), dtype=torch.float64)
        for g in gradients:
            y = self._step(torch.as_tensor(g, dtype=torch.float64))
        return y

    def _step(self, g: Tensor) -> Tensor:
        weights = self.weights
        if not self.differentiable:
            g = g.detach()
        x = self.features(g)
        q, k, v = (_project(weights[name], x) for name in ("Wq", "Wk", "Wv"))
        eta = torch.sigmoid(weights["w_eta"][0] * x[0] + weights["w_eta"][1] * x[1] + weights["c_eta"]) / self.h
        with torch.enable_grad():
            W, b = self.W, self.b
            if not W.requires_grad:
                W = W.clone().requires_grad_()
            if not b.requires_grad:
                b = b.clone().requires_grad_()
            loss = self.reconstruction_loss(W, b, k, v)
            slope_W, slope_b = torch.autograd.grad(loss, (W, b), create_graph=self.differentiable)
        self.W = self.W - eta * slope_W
        self.b = self.b - eta * slope_b
        read = self._norm(_row_times(q, self.W, self.b), "ln")
        z = self._norm([q[j] + read[j] for j in range(self.h)], "ln2")
        out = weights["bo"]
        for j in range(self.h):
            out = out + weights["Wo"][j] * z[j]
        return torch.tanh(out)

    def _norm(self, u: Sequence[Tensor], name: str) -> list[Tensor]:
        """Affine layer norm over the h entries, biased variance."""
        mean = sum(u[1:], u[0]) / self.h
        variance = torch.zeros((), dtype=torch.float64)
        for j in range(self.h):
            variance = variance + (u[j] - mean) ** 2 / self.h
        scale, shift = self.weights[f"{name}_weight"], self.weights[f"{name}_bias"]
        return [(u[j] - mean) / (variance + NORM_EPS).sqrt() * scale[j] + shift[j] for j in range(self.h)]


def random_weights(h: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Weights of every shape above in float64, none at its special start (no zeros, no ones)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, around: float = 0.0, scale: float = 1.0) -> Tensor:
        return around + scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = {name: draw(h, 2, scale=0.7) for name in ("Wq", "Wk", "Wv")}
    weights |= {"W0": draw(h, h, scale=0.3), "b0": draw(h, scale=0.3), "w_eta": draw(2, scale=0.5), "c_eta": draw()}
    for name in ("ln", "ln2"):
        weights |= {f"{name}_weight": draw(h, around=1.0, scale=0.3), f"{name}_bias": draw(h, scale=0.3)}
    return weights | {"Wo": draw(h, scale=1 / math.sqrt(h)), "bo": draw(scale=0.3)}


def _project(matrix: Tensor, x: Sequence[Tensor]) -> list[Tensor]:
    return [matrix[j, 0] * x[0] + matrix[j, 1] * x[1] for j in range(matrix.shape[0])]


def _row_times(row: Sequence[Tensor], W: Tensor, b: Tensor) -> list[Tensor]:
    """Row vector times matrix, plus b: entry j is Σ_i row_i W_ij + b_j."""
    out = []
    for j in range(len(row)):
        entry = b[j]
        for i in range(len(row)):
            entry = entry + row[i] * W[i, j]
        out.append(entry)
    return out
