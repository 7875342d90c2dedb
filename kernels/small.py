"""small: the whole forward of at most 16 tokens in one launch, y = x @ W.T + s * (x @ B.T) @ A.T + bias.

x: (M, K), W: (N, K), B: (R, K), A: (N, R), bias: (N,), y: (M, N), h = x @ B.T: (M, R). The single pass over W
is the bottleneck. Each program computes its own columns of y and, in the same loop, all of h: x and B come
from L2, and no program waits for another. The tile shape fixes the order of every sum.
"""

import torch
import triton
import triton.language as tl

from fastlora.kernels.configs import SmallConfig
from fastlora.kernels.tiles import tile_dot


@triton.jit
def _small_kernel(
    x_ptr, stride_xm, stride_xk,
    w_ptr, stride_wn, stride_wk,
    a_ptr, stride_an, stride_ar,
    b_ptr, stride_br, stride_bk,
    bias_ptr, stride_bias,
    y_ptr, stride_ym,
    h_ptr, stride_hm,
    scale,
    M, N, K, R,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    tile_n = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask_r = offs_r < R
    rows, columns, ranks = offs_m.to(tl.int64), offs_k.to(tl.int64), offs_r.to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xk
    w_ptrs = w_ptr + columns[:, None] * stride_wk + offs_n[None, :] * stride_wn
    b_ptrs = b_ptr + columns[:, None] * stride_bk + ranks[None, :] * stride_br

    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    step = tl.full((), BLOCK_K, tl.int64)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=mask_n[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_r[None, :], other=0.0)
        else:
            mask_k = offs_k < K - k
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        y = tile_dot(x, w, y)
        h = tile_dot(x, b.to(x.dtype), h)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
        b_ptrs += step * stride_bk

    # Where x is infinite, columns past R are infinity times zero: NaN, which must not reach y.
    h = tl.where(mask_r[None, :], h, 0.0)
    # Rounded as project would round it, so that y is computed from the h that backward sees.
    h = h.to(h_ptr.dtype.element_ty)
    if tile_n == 0:
        h_ptrs = h_ptr + rows[:, None] * stride_hm + offs_r[None, :]
        tl.store(h_ptrs, h, mask=mask_m[:, None] & mask_r[None, :])
    a_ptrs = a_ptr + ranks[:, None] * stride_ar + offs_n[None, :] * stride_an
    a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
    update = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    y += tile_dot(h, a.to(h.dtype), update) * scale
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)
        y += bias.to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def small(
    x: torch.Tensor,
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    config: SmallConfig,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x: (M, K), weight: (N, K), A: (N, R), B: (R, K), bias: (N,) -> y: (M, N), h: (M, R), in x's dtype.

    Any strides, contiguous results; 0 < M <= 16 and N, K, R > 0. h is kept for backward.

    Raises:
        ValueError: more than 16 tokens, too many for one tile of rows.
    """
    (M, K), N, R = x.shape, weight.shape[0], B.shape[0]
    if config.block_m < M:
        raise ValueError(f"small: x {tuple(x.shape)} has {M} rows, one launch takes at most {config.block_m}")
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    h = torch.empty((M, R), dtype=x.dtype, device=x.device)
    _small_kernel[(triton.cdiv(N, config.block_n),)](
        x, x.stride(0), x.stride(1),
        weight, weight.stride(0), weight.stride(1),
        A, A.stride(0), A.stride(1),
        B, B.stride(0), B.stride(1),
        bias, 0 if bias is None else bias.stride(0),
        y, y.stride(0),
        h, h.stride(0),
        scale,
        M, N, K, R,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=config.block_r,
        EVEN_K=K % config.block_k == 0, HAS_BIAS=bias is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y, h
