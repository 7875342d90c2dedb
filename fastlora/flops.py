"""The cost of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

Two operations for each multiply-add of the products listed in :mod:`fastlora.reference`, as PyTorch counts
its own; the count is then that of the same layer in PyTorch operations with a frozen weight.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch.utils import _python_dispatch

Shape = Sequence[int]


def _forward_flops(x: Shape, weight: Shape, A: Shape, B: Shape, *_, **__) -> int:
    """FLOPs of h and y. x: (..., K), weight: (N, K), A: (N, R), B: (R, K)."""
    (N, K), R = weight, B[0]
    return 2 * math.prod(x[:-1]) * (N * K + R * (K + N))


def _backward_flops(
    dy: Shape,
    x: Shape | None,
    weight: Shape | None,
    A: Shape,
    B: Shape,
    h: Shape | None,
    alpha: float,
    dropout: float,
    seed: Shape | None,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    *_,
    **__,
) -> int:
    """FLOPs of those of g, dx, dA and dB that are needed. dy: (..., N), A: (N, R), B: (R, K)."""
    (N, R), K = A, B[1]
    g = R * N * (need_dx or need_dB)
    return 2 * math.prod(dy[:-1]) * (g + need_dx * K * (N + R) + need_dA * N * R + need_dB * R * K)


def _group_forward_flops(
    x: Shape, weights: Sequence[Shape], As: Sequence[Shape], Bs: Sequence[Shape], *_, **__
) -> int:
    return sum(_forward_flops(x, *branch) for branch in zip(weights, As, Bs, strict=True))


def _group_backward_flops(
    dys: Sequence[Shape | None],
    x: Shape | None,
    weights: Sequence[Shape | None],
    As: Sequence[Shape],
    Bs: Sequence[Shape],
    h: Shape | None,
    alphas: Sequence[float],
    dropout: float,
    seed: Shape | None,
    need_dx: bool,
    need_dA: Sequence[bool],
    need_dB: Sequence[bool],
    *_,
    **__,
) -> int:
    branches = zip(dys, weights, As, Bs, need_dA, need_dB, strict=True)
    return sum(
        _backward_flops(dy, x, weight, A, B, h, 1.0, dropout, seed, need_dx, dA, dB)
        for dy, weight, A, B, dA, dB in branches
        if dy is not None
    )


def register_where_counted() -> None:
    """Register the formulas with the active FlopCounterModes and with later ones.

    Each mode copies PyTorch's table of formulas when it is created, and importing that table loads Triton, so
    this is done not on import but when an operator is called under such a mode.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    tables = [counter.flop_registry]
    for mode in _python_dispatch._get_current_dispatch_mode_stack():
        table = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if isinstance(table, dict):
            tables.append(table)
    for table in tables:
        for name, formula in _FORMULAS.items():
            operator = getattr(torch.ops.fastlora, name)
            if operator not in table:
                table[operator] = counter.shape_wrapper(formula)


_FORMULAS = {
    "lora_forward": _forward_flops,
    "lora_backward": _backward_flops,
    "group_forward": _group_forward_flops,
    "group_backward": _group_backward_flops,
}
