"""Checks each provider's outputs against float64 before it is timed.

The rule: the largest and the root-mean-square error of y and of every gradient are at most twice those of
eager PyTorch in the same dtypes, plus 1e-6. With float32 adapters on a half-precision base, eager PyTorch
means the worse of PEFT's form (the update in float32) and the eager form under autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from problem import AnyProblem, Layer, outputs
from torch import Tensor

from fastlora.tune import FACTOR, SLACK

FEW_TOKENS, EXTRA_DRAWS = 32, 4


@dataclass(frozen=True)
class Error:
    """Largest and root-mean-square distance from float64."""

    largest: float
    rms: float


def error(actual: Tensor, exact: Tensor) -> Error:
    """The error of ``actual`` against float64 ``exact``; ValueError if the shapes differ."""
    if actual.shape != exact.shape:
        raise ValueError(f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    distance = (actual.detach().double() - exact).abs_()
    return Error(distance.max().item(), distance.square_().mean().sqrt().item())


class Checker:
    """Checks the layers of one problem; the float64 results and eager errors are computed once.

    With a mask ``keep``, bool (M, K), the layers must drop exactly the elements where it is False; otherwise
    none.
    """

    def __init__(self, problem: AnyProblem, keep: Tensor | None = None) -> None:
        self._problem = problem
        self._keep = keep
        self._references = {frozen: problem.exact(frozen=frozen, keep=keep) for frozen in (False, True)}
        self._bounds: dict[torch.dtype, dict[str, Error]] = {}

    def bounds(self, adapter_dtype: torch.dtype) -> dict[str, Error]:
        """The largest errors allowed for adapters of ``adapter_dtype``, by output."""
        if adapter_dtype not in self._bounds:
            forms = ("plain",) if adapter_dtype == self._problem.dtype else ("peft", "autocast")
            eager = [
                {name: error(value, exact[name]) for name, value in outputs(layer, problem).items()}
                for problem, exact in self._draws()
                for layer in (problem.eager(adapter_dtype, form, self._keep) for form in forms)
            ]
            self._bounds[adapter_dtype] = {
                name: Error(
                    max(e[name].largest for e in eager) * FACTOR + SLACK,
                    max(e[name].rms for e in eager) * FACTOR + SLACK,
                )
                for name in eager[0]
            }
        return self._bounds[adapter_dtype]

    def _draws(self) -> Iterator[tuple[AnyProblem, dict[str, Tensor]]]:
        """The problem with its float64 results and, for few tokens, further random draws of it.

        Few tokens mean few roundings, and chance would decide whose are larger.
        """
        yield self._problem, self._references[False]
        if self._problem.shape.M < FEW_TOKENS:
            for seed in range(1, EXTRA_DRAWS + 1):
                drawn = self._problem.redrawn(1000 + seed)
                yield drawn, drawn.exact(keep=self._keep)

    def failures(self, layer: Layer, adapter_dtype: torch.dtype | None) -> list[str]:
        """What is wrong with the layer's y and gradients, one line each; empty if they are right.

        The frozen linear (no adapters) is held to the same bounds for y and dx.
        """
        exact = self._references[not layer.adapters]
        bounds = self.bounds(adapter_dtype or self._problem.dtype)
        poison_free_memory(self._problem.device, self._problem.elements)
        actual = outputs(layer, self._problem)
        if actual.keys() != exact.keys():
            return [f"outputs {', '.join(actual)}, expected {', '.join(exact)}"]
        for name, value in actual.items():
            if name.startswith("y") and value.dtype != self._problem.dtype:
                return [f"{name}: {value.dtype}, expected {self._problem.dtype}"]
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


def poison_free_memory(device: torch.device, elements: int) -> None:
    """Fill with NaN the device memory from which outputs of up to ``elements`` are allocated next.

    This exposes elements that no kernel writes. The CPU's allocator cannot be steered this way.
    """
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    poison = torch.full((2 * elements + 2**20,), float("nan"), device=device, dtype=torch.float32)
    del poison
