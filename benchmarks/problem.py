"""What a provider is given and what it has to compute: one LoRA layer and one batch.

A provider builds a :class:`Layer` from a problem's weights, without copying the frozen ones. Forward,
backward, both and a training step are then built here in the same way for all providers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from shapes import Shape
from torch import Tensor

MODES = ("forward", "backward", "both", "step", "inference")


class Unavailable(Exception):
    """A provider cannot run here or cannot handle this problem; the message says why."""


@dataclass(frozen=True)
class Layer:
    """A built layer: ``call`` maps x to y; ``adapters`` are its leaves, empty for the frozen layer."""

    call: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    adapters: tuple[Tensor, ...] = ()


class AnyProblem(Protocol):
    """What check.py and measure.py need of a problem: one layer, a group of layers, or a decoder layer.

    x: (..., K). dy: the shape of y; a tuple if there are several results. ``names``: of y, dx and the adapter
    gradients, in this order. ``frozen``: the tensors that stay allocated, besides x and the adapters.
    ``elements``: the number in all tensors that one step touches. ``fewest_sets``: the minimum number of
    input sets to rotate over on a GPU.
    """

    fewest_sets: ClassVar[int]

    x: Tensor
    dy: Tensor | tuple[Tensor, ...]
    dropout: float

    @property
    def shape(self): ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def frozen(self) -> Sequence[Tensor]: ...
    @property
    def elements(self) -> int: ...

    @property
    def checked(self) -> AnyProblem:
        """The problem on which providers are checked: itself, or the same weights with fewer tokens."""

    def redrawn(self, seed: int) -> AnyProblem:
        """Other random values of the same shape."""

    def exact(self, *, frozen: bool = False, keep: Tensor | None = None) -> dict[str, Tensor]:
        """Every result by name in float64; ``frozen``: only y and dx of the frozen layer.

        ``keep``: the dropout mask, bool (M, K); None for no dropout.
        """

    def eager(self, dtype: torch.dtype, form: str, keep: Tensor | None = None) -> Layer:
        """Eager PyTorch with adapters of ``dtype``; ``form``: "plain", "peft" or "autocast"."""

    def path(self, name: str, adapter_dtype: torch.dtype) -> str:
        """What fastlora's planner chooses for the provider ``name``; "" if there is no single path."""


def dropped(x: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    """x / (1 - dropout) where ``keep`` is True, else 0; x itself without a mask."""
    return x if keep is None else torch.where(keep, x * (1.0 / (1.0 - dropout)), x.new_zeros(()))


@dataclass(frozen=True)
class Problem:
    """The weights of one layer and one batch, the same for every provider.

    x: (M, K), dy: (M, N), weight: (N, K), bias: (N,) or None, A: (N, R), B: (R, K); all with the same dtype.
    """

    names: ClassVar[tuple[str, ...]] = ("y", "dx", "dA", "dB")
    fewest_sets: ClassVar[int] = 2

    shape: Shape
    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    alpha: float
    dropout: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def frozen(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def elements(self) -> int:
        s = self.shape
        return s.M * (s.N + s.K) + s.N * s.K

    @property
    def checked(self) -> Problem:
        return self

    def redrawn(self, seed: int) -> Problem:
        has_bias = self.bias is not None
        return make_problem(
            self.shape, self.dtype, self.device, bias=has_bias, dropout=self.dropout, seed=seed
        )

    def exact(self, *, frozen: bool = False, keep: Tensor | None = None) -> dict[str, Tensor]:
        x, dy, weight, A, B = (t.detach().double() for t in (self.x, self.dy, self.weight, self.A, self.B))
        y = x @ weight.t() if self.bias is None else torch.addmm(self.bias.double(), x, weight.t())
        dx = dy @ weight
        if frozen:
            return {"y": y, "dx": dx}
        x = dropped(x, keep, self.dropout)
        h, g = x @ B.t(), dy @ A
        return {
            "y": y.addmm_(h, A.t(), alpha=self.alpha),
            "dx": dx.add_(dropped(g @ B, keep, self.dropout), alpha=self.alpha),
            "dA": (dy.t() @ h).mul_(self.alpha),
            "dB": (g.t() @ x).mul_(self.alpha),
        }

    def eager(self, dtype: torch.dtype, form: str, keep: Tensor | None = None) -> Layer:
        A, B = (t.detach().to(dtype, copy=True).requires_grad_() for t in (self.A, self.B))

        def call(x: Tensor) -> Tensor:
            return eager_form(x, self.weight, self.bias, A, B, self.alpha, form, keep, self.dropout)

        return Layer(call, (A, B))

    def path(self, name: str, adapter_dtype: torch.dtype) -> str:
        from fastlora import plan

        A, B = self.A.to(adapter_dtype), self.B.to(adapter_dtype)
        return plan(self.x, self.weight, A, B, self.bias, self.dropout).path


def make_problem(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, bias: bool, dropout: float = 0.0, seed: int = 0
) -> Problem:
    """Random weights and a random batch; A is not zero, as after some training."""
    normal = drawing(dtype, device, seed)
    M, N, K, R = shape.M, shape.N, shape.K, shape.R
    return Problem(
        shape=shape,
        x=normal(M, K).requires_grad_(),
        dy=normal(M, N),
        weight=normal(N, K, scale=K**-0.5),
        bias=normal(N) if bias else None,
        A=normal(N, R, scale=R**-0.5),
        B=normal(R, K, scale=K**-0.5),
        alpha=1.5,
        dropout=dropout,
    )


def drawing(dtype: torch.dtype, device: torch.device, seed: int) -> Callable[..., Tensor]:
    """A function normal(*size, scale=1.0) that returns a new random tensor at each call."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
        return (values * scale).to(dtype)

    return normal


def eager_form(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: float,
    form: str,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The layer in eager PyTorch: "plain", "peft" (the update in the adapters' dtype) or "autocast"."""
    if form == "autocast":
        with torch.autocast(x.device.type, weight.dtype):
            return eager_form(x, weight, bias, A, B, alpha, "plain", keep, dropout)
    if form == "peft":
        update = F.linear(F.linear(dropped(x.to(A.dtype), keep, dropout), B), A)
        return (F.linear(x, weight, bias) + update * alpha).to(x.dtype)
    update = F.linear(F.linear(dropped(x, keep, dropout), B), A)
    return F.linear(x, weight, bias) + alpha * update


def step(layer: Layer, problem: AnyProblem, mode: str) -> Callable[[], object]:
    """The callable that is timed for ``mode``; it returns what it computes and keeps nothing.

    forward: training forward. backward: dx and the adapters' gradients from one kept forward. both: forward
    and backward. step: both, and AdamW on the adapters. inference: forward without autograd. ValueError for
    any other mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}: expected one of {', '.join(MODES)}")
    call, x, dy = layer.call, problem.x, problem.dy
    leaves = (x, *layer.adapters)

    def forward() -> Tensor | tuple[Tensor, ...]:
        return call(x)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(x), leaves, dy)

    @torch.no_grad()
    def inference() -> Tensor | tuple[Tensor, ...]:
        return call(x)

    if mode == "backward":
        y = call(x)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
    if mode == "step" and layer.adapters:
        return _with_optimizer(both, layer.adapters, problem.device)
    return {"forward": forward, "both": both, "step": both, "inference": inference}[mode]


def _with_optimizer(
    both: Callable[[], tuple[Tensor, ...]], adapters: tuple[Tensor, ...], device: torch.device
) -> Callable[[], None]:
    """``both``, then AdamW with a learning rate of 0, so that all providers keep the same values."""
    optimizer = torch.optim.AdamW(adapters, lr=0.0, fused=True, capturable=device.type == "cuda")

    def train() -> None:
        for adapter, gradient in zip(adapters, both()[1:], strict=True):
            adapter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return train


def outputs(layer: Layer, problem: AnyProblem) -> dict[str, Tensor]:
    """y and every gradient of one training step, by name."""
    y = layer.call(problem.x)
    gradients = torch.autograd.grad(y, (problem.x, *layer.adapters), problem.dy)
    results = (y,) if isinstance(y, Tensor) else tuple(y)
    # Not strict: the adapters' names come last, and a frozen layer has no adapters.
    return dict(zip(problem.names, (*(t.detach() for t in results), *gradients), strict=False))
