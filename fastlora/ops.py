"""The two opaque operators of the layer: ``fastlora::lora_forward`` and ``fastlora::lora_backward``.

Each asks the planner which path computes each product, and runs it. They are registered by
``torch.library`` (define, impl, fake), so that ``torch.compile`` keeps them whole and plans at run time with
the real number of tokens. Only this module imports the kernels, when the first one is launched.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from fastlora import reference
from fastlora.planner import Plan, Problem, Step, describe, make_plan

_library = torch.library.Library("fastlora", "DEF")
_library.define(
    "lora_forward(Tensor x, Tensor weight, Tensor A, Tensor B, Tensor? bias, float alpha, float dropout, "
    "Tensor? seed, str mode) -> (Tensor y, Tensor h)"
)
_library.define(
    "lora_backward(Tensor dy, Tensor? x, Tensor weight, Tensor A, Tensor B, Tensor? h, float alpha, float dropout, "
    "Tensor? seed, bool need_dx, bool need_dA, bool need_dB, bool need_dbias, str mode) "
    "-> (Tensor dx, Tensor dA, Tensor dB, Tensor dbias)"
)


class _Dropout:
    """The keep mask of one call: (seed, threshold) for the kernels, made once as a tensor for the rest."""

    def __init__(self, seed: Tensor, probability: float, rows: int, columns: int) -> None:
        self.seed = seed
        self.probability = probability
        self.threshold = reference.keep_threshold(probability)
        self.scale = reference.keep_scale(probability)
        self._shape = (rows, columns)
        self._keep: Tensor | None = None

    def keep(self) -> Tensor:
        """(rows, columns) of bool."""
        if self._keep is None:
            self._keep = reference.keep_mask(self.seed, *self._shape, self.probability)
        return self._keep


def _project(step: Step, p: Tensor, q: Tensor, drop: _Dropout | None = None) -> Tensor:
    """drop(p): (M, D) @ q: (D, R) -> (M, R) in p's dtype."""
    if step.path == "triton":
        from fastlora.kernels.project import project

        if drop is None:
            return project(p, q, step.config)
        return project(p, q, step.config, drop.seed, drop.threshold, drop.scale)
    if drop is not None:
        p = torch.where(drop.keep(), p * drop.scale, p.new_zeros(()))
    if step.path == "reference":
        return reference.project(p, q).to(p.dtype)
    return torch.mm(p, q.to(p.dtype))


def _gemm(
    step: Step,
    p: Tensor,
    q: Tensor,
    u: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    drop: _Dropout | None = None,
) -> Tensor:
    """p: (M, D) @ q: (D, E) + scale * drop(u: (M, R) @ v: (R, E)) + bias: (E,) -> (M, E) in p's dtype."""
    if step.path == "triton":
        from fastlora.kernels.gemm import gemm

        if drop is None:
            return gemm(p, q, u, v, scale, step.config, bias)
        return gemm(p, q, u, v, scale * drop.scale, step.config, bias, drop.seed, drop.threshold)
    if step.path == "reference":
        return reference.gemm(p, q, u, v, scale, bias, None if drop is None else drop.keep() * drop.scale)
    c = torch.mm(p, q) if bias is None else torch.addmm(bias, p, q)
    if drop is None:
        return c.addmm_(u, v.to(p.dtype), alpha=scale)
    return c.addcmul_(torch.mm(u, v.to(p.dtype)), drop.keep(), value=scale * drop.scale)


def _token_sum(
    step: Step,
    p: Tensor,
    u: Tensor,
    scale: float,
    dtype: torch.dtype,
    transposed: bool = False,
    drop: _Dropout | None = None,
) -> Tensor:
    """scale * drop(p): (M, D).T @ u: (M, R) -> (D, R), or (R, D) if ``transposed``, in ``dtype``."""
    if step.path == "triton":
        from fastlora.kernels.token_sum import token_sum

        if drop is None:
            return token_sum(p, u, scale, step.config, dtype, transposed)
        return token_sum(p, u, scale * drop.scale, step.config, dtype, transposed, drop.seed, drop.threshold)
    if drop is not None:
        p = torch.where(drop.keep(), p * drop.scale, p.new_zeros(()))
    if step.path == "reference":
        total = reference.token_sum(p, u, scale)
        return (total.t() if transposed else total).to(dtype).contiguous()
    total = torch.mm(u.t(), p) if transposed else torch.mm(p.t(), u)
    return total.to(dtype).mul_(scale)


def _plan(x: Tensor, rows: int, weight: Tensor, rank: int, dropout: float, mode: str) -> Plan:
    N, K = weight.shape
    return make_plan(Problem(describe(x.device), x.dtype, rows, N, K, rank, dropout > 0.0), mode)


def _dropout(dropout: float, seed: Tensor | None, rows: int, columns: int) -> _Dropout | None:
    return None if seed is None or dropout == 0.0 else _Dropout(seed, dropout, rows, columns)


def _scope(tensor: Tensor):
    """Autocast off, where it is on: it would cast operands whose dtypes have been chosen already."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _device_guard(tensor: Tensor):
    """Triton launches on the current device, which may be another than the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def _lora_forward(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    alpha: float,
    dropout: float,
    seed: Tensor | None,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """x: (..., K), weight: (N, K), A: (N, R), B: (R, K) -> y: (..., N), h: (M, R), both in x's dtype."""
    N, K = weight.shape
    R = B.shape[0]
    x_2d = x if x.dim() == 2 else x.reshape(-1, K) if K else x.new_empty((_rows(x), 0))
    M = x_2d.shape[0]
    with _scope(x), _device_guard(x):
        plan = _plan(x, M, weight, R, dropout, mode)
        if not (M and N and K):  # Nothing to sum: no kernel takes an empty tile.
            y = x.new_zeros((M, N)) if bias is None else bias.expand(M, N).clone()
            return y.reshape(*x.shape[:-1], N), x.new_zeros((M, R))
        drop = _dropout(dropout, seed, M, K)
        h = _project(plan.h, x_2d, B.t(), drop)
        y = _gemm(plan.y, x_2d, weight.t(), h, A.t(), alpha, bias)
    return (y if x.dim() == 2 else y.reshape(*x.shape[:-1], N)), h


def _rows(x: Tensor) -> int:
    """The number of tokens of x: (..., K), K = 0 included."""
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows


def _lora_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    h: Tensor | None,
    alpha: float,
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    need_dbias: bool,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy: (..., N), x: (..., K) -> dx: (..., K), dA: (N, R), dB: (R, K), dbias: (N,).

    x is needed for dB and h: (M, R) for dA. A gradient that is not asked for comes back with no elements.
    """
    N, K = weight.shape
    R = B.shape[0]
    M = _rows(dy)
    dy_2d = dy if dy.dim() == 2 else dy.reshape(M, N)
    nothing = dy.new_empty((0,))
    dx = dA = dB = dbias = nothing
    with _scope(dy), _device_guard(dy):
        plan = _plan(dy, M, weight, R, dropout, mode)
        if not (M and N and K):
            dx = dy.new_zeros((*dy.shape[:-1], K)) if need_dx else nothing
            dA = torch.zeros_like(A) if need_dA else nothing
            dB = torch.zeros_like(B) if need_dB else nothing
            dbias = dy_2d.sum(0) if need_dbias else nothing.clone()
            return dx, *(
                gradient.clone() if gradient is nothing else gradient for gradient in (dA, dB, dbias)
            )
        drop = _dropout(dropout, seed, M, K)
        if need_dx or need_dB:
            g = _project(plan.g, dy_2d, A)
        if need_dA:
            dA = _token_sum(plan.dA, dy_2d, h, alpha, A.dtype)
        if need_dx:
            dx = _gemm(plan.dx, dy_2d, weight, g, B, alpha, drop=drop)
            dx = dx if dy.dim() == 2 else dx.reshape(*dy.shape[:-1], K)
        if need_dB:
            x_2d = x if x.dim() == 2 else x.reshape(M, K)
            dB = _token_sum(plan.dB, x_2d, g, alpha, B.dtype, transposed=True, drop=drop)
        if need_dbias:
            dbias = dy_2d.sum(0)
    # An operator's results may not alias one another.
    return tuple(
        torch.empty_like(nothing) if gradient is nothing else gradient for gradient in (dx, dA, dB, dbias)
    )


def _fake_forward(x, weight, A, B, bias, alpha, dropout, seed, mode):
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((_rows(x), B.shape[0]))


def _fake_backward(
    dy, x, weight, A, B, h, alpha, dropout, seed, need_dx, need_dA, need_dB, need_dbias, mode
):  # fmt: skip
    return (
        dy.new_empty((*dy.shape[:-1], weight.shape[1]) if need_dx else (0,)),
        A.new_empty(A.shape) if need_dA else dy.new_empty((0,)),
        B.new_empty(B.shape) if need_dB else dy.new_empty((0,)),
        dy.new_empty((weight.shape[0],) if need_dbias else (0,)),
    )


def _register(name: str, implementation: Callable, fake: Callable) -> torch._ops.OpOverload:
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{name}", fake, lib=_library)
    return getattr(torch.ops.fastlora, name).default


lora_forward = _register("lora_forward", _lora_forward, _fake_forward)
lora_backward = _register("lora_backward", _lora_backward, _fake_backward)
