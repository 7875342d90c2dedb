"""The formula of a LoRA linear layer and its gradients in plain PyTorch: the oracle of every other path.

    y  = x @ W.T + alpha * (drop(x) @ B.T) @ A.T + bias
    dx = dy @ W + alpha * drop((dy @ A) @ B)
    dA = alpha * dy.T @ (drop(x) @ B.T)
    dB = alpha * (dy @ A).T @ drop(x)

x: (..., K), W: (N, K), B: (R, K), A: (N, R), bias: (N,); drop(x) = keep * x / (1 - p).
The formula is that of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1.

Three primitives make all of it, in both directions; the Triton kernels carry the same names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Philox4x32 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). Seven rounds are the
# fewest that pass BigCrush according to that paper's table 2.
PHILOX_ROUNDS = 7
_PHILOX_MULTIPLIER_0, _PHILOX_MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_KEY_STEP_0, _PHILOX_KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
_LOW32 = 0xFFFFFFFF

# One Philox call gives 128 bits: 16 for each of this many neighbouring columns.
COLUMNS_PER_CALL = 8


def keep_threshold(dropout: float) -> int:
    """The 16-bit threshold of dropout probability ``dropout``: an element is kept where its bits reach it."""
    return round(dropout * 65536)


def _philox(counter_0: Tensor, counter_1: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 of the counters (counter_0, counter_1, 0, 0); int64 tensors that hold 32-bit words.

    A 32 x 32-bit product wraps in int64, but its bits do not change: shift and mask still read both halves.
    """
    key_0, key_1 = key & _LOW32, (key >> 32) & _LOW32
    c0, c1 = torch.broadcast_tensors(counter_0, counter_1)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(PHILOX_ROUNDS):
        product_0, product_1 = c0 * _PHILOX_MULTIPLIER_0, c2 * _PHILOX_MULTIPLIER_1
        c0 = ((product_1 >> 32) & _LOW32) ^ c1 ^ key_0
        c2 = ((product_0 >> 32) & _LOW32) ^ c3 ^ key_1
        c1, c3 = product_1 & _LOW32, product_0 & _LOW32
        key_0, key_1 = (key_0 + _PHILOX_KEY_STEP_0) & _LOW32, (key_1 + _PHILOX_KEY_STEP_1) & _LOW32
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """The keep mask of dropout, a function of (seed, row, column) alone.

    Args:
        seed: int64 tensor of one element; both its halves are the Philox key.
        rows: number of rows M (tokens).
        columns: number of columns K.
        dropout: probability of dropping an element, in [0, 1], resolved to 1/65536.

    Returns:
        bool tensor (rows, columns) on ``seed``'s device, True where the element is kept.
    """
    groups = -(-columns // COLUMNS_PER_CALL)
    counter_0 = torch.arange(groups, device=seed.device).unsqueeze(0)
    counter_1 = torch.arange(rows, device=seed.device).unsqueeze(1)
    words = torch.stack(_philox(counter_0, counter_1, seed.reshape(())), dim=-1)
    bits = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(rows, groups * COLUMNS_PER_CALL)
    return bits[:, :columns] >= keep_threshold(dropout)


def keep_scale(dropout: float) -> float:
    """What a kept element is multiplied by, 1 / (1 - p); 0 for p = 1, where none is kept."""
    return 0.0 if dropout >= 1.0 else 1.0 / (1.0 - dropout)


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
    return (p.to(dtype).t() @ u.to(dtype)) * scale


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
        seed: int64 tensor of one element; drawn from torch's generator if None and dropout > 0.

    Returns:
        (..., N), in x's dtype.
    """
    x_2d = x.reshape(-1, x.shape[-1])
    dropped = x_2d
    if dropout > 0.0:
        seed = new_seed(x.device) if seed is None else seed
        keep = keep_mask(seed, x_2d.shape[0], x_2d.shape[1], dropout)
        dropped = torch.where(keep, x_2d * keep_scale(dropout), x_2d.new_zeros(()))
    h = project(dropped, B.t())
    return gemm(x_2d, weight.t(), h, A.t(), alpha, bias).reshape(*x.shape[:-1], weight.shape[0])


def new_seed(device: torch.device) -> Tensor:
    """A dropout seed, int64 of shape (1,), drawn from torch's generator of ``device``."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
