"""The formula of a LoRA linear layer and its gradients in plain PyTorch: the oracle for every other path.

    y  = x @ W.T + alpha * (drop(x) @ B.T) @ A.T + bias
    dx = dy @ W + alpha * drop((dy @ A) @ B)
    dA = alpha * dy.T @ (drop(x) @ B.T)
    dB = alpha * (dy @ A).T @ drop(x)

x: (..., K), W: (N, K), B: (R, K), A: (N, R), bias: (N,); drop(x) = keep * x / (1 - p).
The formula is that of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1,
with the names A and B swapped and alpha in place of their alpha / r.

Three primitives compute all of it, forward and backward; the Triton kernels have the same names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import masks
from fastlora.checks import check_dropout
from fastlora.dtensors import replicated_like
from fastlora.masks import keep_mask as keep_mask  # public: the mask of a seed


def project(p: Tensor, q: Tensor) -> Tensor:
    """p: (M, D) @ q: (D, R) -> (M, R), in the wider of the two dtypes."""
    dtype = torch.promote_types(p.dtype, q.dtype)
    return p.to(dtype) @ q.to(dtype)


def gemm(
    p: Tensor,
    q: Tensor,
    u: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """p: (M, D) @ q: (D, E) + scale * keep * (u: (M, R) @ v: (R, E)) + bias: (E,) -> (M, E), in p's dtype.

    ``keep``: (M, E) factors on the rank-R update, None for ones.
    """
    base = torch.mm(p, q) if bias is None else torch.addmm(bias, p, q)
    if keep is None and u.dtype == v.dtype == p.dtype:
        return torch.addmm(base, u, v, alpha=scale)
    update = project(u, v) * scale
    return (base + (update if keep is None else update * keep)).to(p.dtype)


def token_sum(p: Tensor, u: Tensor, scale: float) -> Tensor:
    """scale * p: (M, D).T @ u: (M, R) -> (D, R), in the wider of the two dtypes."""
    dtype = torch.promote_types(p.dtype, u.dtype)
    # In the other order a CPU's BLAS sums thousands of tokens in one chain, with twice the error.
    return (u.to(dtype).t() @ p.to(dtype)).t() * scale


def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The LoRA linear layer in differentiable PyTorch operations; any device, any floating dtype.

    Takes the arguments of :func:`fastlora.lora_linear` and, for the same ``seed``, drops the same elements.
    Adapters of a wider dtype than ``x`` compute their part in that dtype, as PEFT does; the result has x's
    dtype. Every gradient, second derivatives included, is PyTorch's own.

    Args:
        x: (..., K). weight: (N, K). A: (N, R). B: (R, K). bias: (N,) or None.
        alpha: the multiplier of the update (PEFT's scaling).
        dropout: probability in [0, 1] of dropping an element of the update's input.
        seed: one-element int64 tensor; drawn from torch's generator if None and dropout > 0.

    Returns:
        (..., N), in x's dtype.

    Raises:
        ValueError: a dropout outside [0, 1] or NaN.
        TypeError: a dropout that is not a number.
    """
    return _lora_linear(x, _drop(x, dropout, seed), weight, A, B, alpha, bias)


def _lora_linear(
    x: Tensor, dropped: Tensor, weight: Tensor, A: Tensor, B: Tensor, alpha: float, bias: Tensor | None
) -> Tensor:
    """:func:`lora_linear` of x and drop(x); by F.linear, as inference mode has no transposed DTensors."""
    dtype = torch.promote_types(x.dtype, A.dtype)
    update = F.linear(F.linear(dropped.to(dtype), B.to(dtype)), A.to(dtype))
    return torch.add(F.linear(x, weight, bias), update, alpha=float(alpha)).to(x.dtype)


def _drop(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """drop(x) for x: (..., K); x itself without dropout."""
    check_dropout(dropout)
    if dropout == 0.0:
        return x
    if seed is None and is_traced():
        return F.dropout(x, dropout)  # with a seed, the trace would record one fixed mask
    seed = masks.new_seed(x.device) if seed is None else seed
    columns = x.shape[-1]
    if masks.is_batched(seed) or is_traced():
        rows = x.unsqueeze(0).flatten(0, -2).shape[0]  # in a form that a trace records
        keep = masks.functional_keep_mask(seed, rows, columns, dropout)
    else:
        keep = replicated_like(x, masks.shared_keep_mask(seed, x.shape[:-1].numel(), columns, dropout))
    return torch.where(keep.reshape(x.shape), x * masks.keep_scale(dropout), x.new_zeros(()))


def is_traced() -> bool:
    """Whether torch.jit.trace is recording this call."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    alphas: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Apply :func:`lora_linear` of each branch to one x; all branches drop the same elements of x.

    Args:
        x: (..., K). weights: (N_i, K). As: (N_i, R_i). Bs: (R_i, K). biases: (N_i,) or None each.
        alphas: the multiplier of each update.
        dropout, seed: as in :func:`lora_linear`.

    Returns:
        (..., N_i) for each branch, in x's dtype.
    """
    dropped = _drop(x, dropout, seed)
    biases = [None] * len(weights) if biases is None else biases
    return tuple(
        _lora_linear(x, dropped, weight, A, B, alpha, bias)
        for weight, A, B, alpha, bias in zip(weights, As, Bs, alphas, biases, strict=True)
    )
