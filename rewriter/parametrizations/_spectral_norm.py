"""Spectral normalization by the power method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Parametrization
from rewriter.parametrizations.maths._eager import Together, at_hand, overwrite
from rewriter.parametrizations.maths._precision import widen
from rewriter.parametrizations.maths._unit_norm import as_matrix, dividing_all, over_norm


class SpectralNorm(Parametrization, name="spectral_norm"):
    """Divide a tensor by its largest singular value, estimated by the power method.

    >>> import torch
    >>> weight = torch.diag(torch.tensor([4.0, 2.0]))
    >>> SpectralNorm(weight=weight)(weight)
    tensor([[1.0000, 0.0000],
            [0.0000, 0.5000]])

    The tensor is seen as a matrix with `dim` in front and all other dimensions flattened, as in
    :func:`torch.nn.utils.parametrizations.spectral_norm`. The singular vectors are the buffers ``_u`` and ``_v``, as
    there. They advance once per forward in train mode, and are fitted again when a value is assigned. In eval mode
    their norms do not matter, so that averaged models may average them.

    Arguments:
        n_power_iterations: steps per forward in train mode.
        dim: the dimension of the outputs; by default 1 for transposed convolutions, else 0.
        eps: the least norm that is divided by.
        transposed: whether the layer is a transposed convolution; filled in by the site.
    """

    guarantee = "the largest singular value is one, up to the error of the power method; zero stays zero"
    cost = "2 (n_power_iterations + 1) matrix-vector products"
    reference = "Miyato et al., https://arxiv.org/abs/1802.05957"
    takes = ("no vector",)
    stateful = True

    n_power_iterations: int = 1
    dim: int | None = None
    eps: float = 1e-12
    transposed: bool = False

    def build(self, weight: Tensor) -> None:
        dim = int(self.transposed) if self.dim is None else self.dim
        if not -weight.ndim <= dim < weight.ndim:
            raise RewriterError(f"spectral_norm: dim {dim} is out of range for shape {list(weight.shape)}")
        if self.n_power_iterations <= 0:
            raise RewriterError(f"spectral_norm: n_power_iterations must be positive, not {self.n_power_iterations}")
        self.outputs: int = dim % weight.ndim
        self._fitted = 0.0
        M = as_matrix(widen(weight.detach()), self.outputs)
        self._u: Tensor
        self._v: Tensor
        for name, size in zip(("_u", "_v"), M.shape, strict=True):
            self.register_buffer(name, functional.normalize(M.new_empty(size).normal_(), dim=0, eps=self.eps))
        self._advance(M, 15)
        if weight.device.type != "meta":
            self._fitted = self._estimate(M)

    def forward(self, X: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            value = self._in_one_node(X) if self.training else None
            if value is not None:
                return value
        W = widen(X)
        M = as_matrix(W, self.outputs)
        if self.training:
            self._advance(M.detach(), self.n_power_iterations)
        # Copies: the next forward advances the buffers in place while this graph still needs them.
        u, v = widen(self._u.clone()), widen(self._v.clone())
        if not self.training:
            u, v = functional.normalize(u, dim=0, eps=self.eps), functional.normalize(v, dim=0, eps=self.eps)
        sigma = torch.vdot(u, torch.mv(M, v))
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._divided(W, sigma).to(X.dtype)
        else:
            if at_hand(sigma) and abs(sigma.item()) > self.eps:
                # One multiplication: differentiating a division by a scalar costs three passes more.
                return (W * sigma.reciprocal()).to(X.dtype)
            return self._divided(W, sigma).to(X.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return `value` itself, after fitting the singular vectors to it."""
        M = as_matrix(widen(value.detach()), self.outputs)
        # The site builds the module from the tensor and assigns the same tensor right after. A closer fit there
        # would give other values than torch gives with the same seed.
        if M.device.type != "meta" and self._estimate(M) != self._fitted:
            self._fit(M)
        return value

    def _in_one_node(self, X: Tensor) -> Tensor | None:
        return over_norm(X, self.outputs, self._u, self._v, self.n_power_iterations, self.eps)

    @classmethod
    def together(cls, steps: Sequence[SpectralNorm], stored: Sequence[Sequence[Tensor]]) -> Together | None:
        (iterations, *others) = {step.n_power_iterations for step in steps}
        if others or not all(step.training for step in steps):
            return None
        us, vs = [step._u for step in steps], [step._v for step in steps]
        outputs, eps = [step.outputs for step in steps], [step.eps for step in steps]
        return dividing_all([X for (X,) in stored], outputs, us, vs, iterations, eps)

    def _divided(self, W: Tensor, sigma: Tensor) -> Tensor:
        return W / torch.where(sigma.abs() <= self.eps, torch.ones_like(sigma), sigma)

    def _advance(self, M: Tensor, steps: int) -> None:
        with torch.no_grad():
            for _ in range(steps):
                self._turn(self._u, torch.mv(M, widen(self._v)))
                self._turn(self._v, torch.mv(M.mH, widen(self._u)))

    def _turn(self, vector: Tensor, x: Tensor) -> None:
        """Make `vector` x scaled to norm one, unless x is zero: a zero would never recover."""
        norm = torch.linalg.vector_norm(x)
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            vector.copy_(torch.where(norm <= self.eps, vector, x / norm.clamp_min(self.eps)))
        else:
            if not at_hand(x):
                overwrite(vector, torch.where(norm <= self.eps, vector, x / norm.clamp_min(self.eps)))
            elif not norm.item() <= self.eps:
                torch.div(x, norm, out=vector)

    def _fit(self, M: Tensor) -> None:
        for _ in range(20):
            before = self._estimate(M)
            self._advance(M, 15)
            self._fitted = self._estimate(M)
            if abs(self._fitted - before) <= 1e-7 * self._fitted:
                break

    @torch.no_grad()
    def _estimate(self, M: Tensor) -> float:
        return float(torch.vdot(widen(self._u), torch.mv(M, widen(self._v))).abs())
