"""Each provider's outputs against float64, before it is timed.

The rule: the largest and the root-mean-square error of y and of every gradient are at most twice those of
eager PyTorch in the same dtypes, plus 1e-6. With float32 adapters on a half-precision base, eager PyTorch is
the worse of PEFT's form (the update in float32) and the eager form under autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from providers import Layer, Problem, make_problem, outputs
from torch import Tensor

FACTOR = 2.0
SLACK = 1e-6
FEW_TOKENS, EXTRA_DRAWS = 32, 4


@dataclass(frozen=True)
class Error:
    """Largest and root-mean-square distance from float64."""

    largest: float
    rms: float


def dropped(x: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    """x where ``keep`` is True, over 1 - dropout, else 0; x itself without a mask."""
    return x if keep is None else torch.where(keep, x * (1.0 / (1.0 - dropout)), x.new_zeros(()))


def reference(problem: Problem, *, frozen: bool = False, keep: Tensor | None = None) -> dict[str, Tensor]:
    """y: (M, N), dx: (M, K), dA: (N, R) and dB: (R, K) in float64 from the problem's rounded values.

    ``frozen``: y and dx of the frozen linear alone. ``keep``: dropout's mask, bool (M, K); none without it.
    """
    p = problem
    x, dy, weight, A, B = (t.detach().double() for t in (p.x, p.dy, p.weight, p.A, p.B))
    y = x @ weight.t() if p.bias is None else torch.addmm(p.bias.double(), x, weight.t())
    dx = dy @ weight
    if frozen:
        return {"y": y, "dx": dx}
    x = dropped(x, keep, p.dropout)
    h, g = x @ B.t(), dy @ A
    return {
        "y": y.addmm_(h, A.t(), alpha=p.alpha),
        "dx": dx.add_(dropped(g @ B, keep, p.dropout), alpha=p.alpha),
        "dA": (dy.t() @ h).mul_(p.alpha),
        "dB": (g.t() @ x).mul_(p.alpha),
    }


def error(actual: Tensor, exact: Tensor) -> Error:
    """Of ``actual`` against float64 ``exact``; ValueError if the shapes differ."""
    if actual.shape != exact.shape:
        raise ValueError(f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    distance = (actual.detach().double() - exact).abs_()
    return Error(distance.max().item(), distance.square_().mean().sqrt().item())


def _eager_layer(problem: Problem, dtype: torch.dtype, form: str, keep: Tensor | None) -> Layer:
    """Eager PyTorch with adapters of ``dtype``; ``form``: "plain", "peft" or "autocast"."""
    p = problem
    A, B = (t.detach().to(dtype, copy=True).requires_grad_() for t in (p.A, p.B))

    def plain(x: Tensor) -> Tensor:
        update = F.linear(F.linear(dropped(x, keep, p.dropout), B), A)
        return F.linear(x, p.weight, p.bias) + p.alpha * update

    def peft(x: Tensor) -> Tensor:
        update = F.linear(F.linear(dropped(x.to(dtype), keep, p.dropout), B), A)
        return (F.linear(x, p.weight, p.bias) + update * p.alpha).to(x.dtype)

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast(p.device.type, p.dtype):
            return plain(x)

    return Layer({"plain": plain, "peft": peft, "autocast": autocast}[form], (A, B))


class Checker:
    """Checks the layers of one problem; the float64 results and eager errors are computed once.

    With a mask ``keep``, bool (M, K), the layers have to drop just these elements, else none.
    """

    def __init__(self, problem: Problem, keep: Tensor | None = None) -> None:
        self._problem = problem
        self._keep = keep
        self._references = {frozen: reference(problem, frozen=frozen, keep=keep) for frozen in (False, True)}
        self._bounds: dict[torch.dtype, dict[str, Error]] = {}

    def bounds(self, adapter_dtype: torch.dtype) -> dict[str, Error]:
        """The largest errors allowed for adapters of ``adapter_dtype``, by output."""
        if adapter_dtype not in self._bounds:
            forms = ("plain",) if adapter_dtype == self._problem.dtype else ("peft", "autocast")
            eager = [
                {name: error(value, exact[name]) for name, value in outputs(layer, problem).items()}
                for problem, exact in self._draws()
                for layer in (_eager_layer(problem, adapter_dtype, form, self._keep) for form in forms)
            ]
            self._bounds[adapter_dtype] = {
                name: Error(
                    max(e[name].largest for e in eager) * FACTOR + SLACK,
                    max(e[name].rms for e in eager) * FACTOR + SLACK,
                )
                for name in eager[0]
            }
        return self._bounds[adapter_dtype]

    def _draws(self) -> Iterator[tuple[Problem, dict[str, Tensor]]]:
        """The problem with its float64 results, and for few tokens other draws of it too.

        Few tokens make few roundings, and luck would decide whose are larger.
        """
        p = self._problem
        yield p, self._references[False]
        if p.shape.M < FEW_TOKENS:
            for seed in range(1, EXTRA_DRAWS + 1):
                drawn = make_problem(p.shape, p.dtype, p.device, bias=p.bias is not None, seed=1000 + seed)
                drawn = replace(drawn, dropout=p.dropout)
                yield drawn, reference(drawn, keep=self._keep)

    def failures(self, layer: Layer, adapter_dtype: torch.dtype | None) -> list[str]:
        """What is wrong with the layer's y and gradients, one line each; empty if it is right.

        The frozen linear (no adapters) is held to the same bounds for y and dx.
        """
        exact = self._references[not layer.adapters]
        bounds = self.bounds(adapter_dtype or self._problem.dtype)
        _poison_free_memory(self._problem)
        actual = outputs(layer, self._problem)
        if actual.keys() != exact.keys():
            return [f"outputs {', '.join(actual)}, expected {', '.join(exact)}"]
        if actual["y"].dtype != self._problem.dtype:
            return [f"y: {actual['y'].dtype}, expected {self._problem.dtype}"]
        return [line for name in exact for line in _exceeded(name, actual[name], exact[name], bounds[name])]


def _exceeded(name: str, actual: Tensor, exact: Tensor, bound: Error) -> list[str]:
    try:
        found = error(actual, exact)
    except ValueError as mismatch:
        return [f"{name}: {mismatch}"]
    # "not <=" rather than ">": a NaN must not pass.
    return [
        f"{name}: {kind} error {value:.3g}, allowed {limit:.3g}"
        for kind, value, limit in (
            ("largest", found.largest, bound.largest),
            ("rms", found.rms, bound.rms),
        )
        if not value <= limit
    ]


def _poison_free_memory(problem: Problem) -> None:
    """Leaves NaN in the device memory that the next outputs are allocated from.

    An element that no kernel writes then shows. On a CPU the allocator takes no such hint.
    """
    if problem.device.type != "cuda":
        return
    shape = problem.shape
    floats = 2 * (shape.M * (shape.N + shape.K) + shape.R * (shape.N + shape.K + 2 * shape.M)) + 2**20
    torch.cuda.empty_cache()
    poison = torch.full((floats,), float("nan"), device=problem.device, dtype=torch.float32)
    del poison
