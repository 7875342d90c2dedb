"""token sum: G = s * drop(P).T @ U, the weight gradients (dA = dy.T @ h, dB = (x.T @ g).T).

P: (M, D), U: (M, R), G: (D, R). The single pass over P is the bottleneck. The tokens are split among programs
that write fp32 partial sums; a second kernel adds them in a fixed order, so the result is deterministic.
"""

import torch
import triton
import triton.language as tl

from fastlora.kernels.configs import TokenSumConfig
from fastlora.kernels.dropout import keep_mask
from fastlora.kernels.tiles import in_eights, of_eights, tile_dot

# Four elements per thread, hence many programs: each is a chain of loads, one per split.
_REDUCE_BLOCK, _REDUCE_WARPS = 256, 2


@triton.jit
def token_sum_tile(
    tile_d, split,
    p_ptr, stride_pm, stride_pd,
    u_ptr, stride_um, stride_ur,
    g_ptr, stride_gs, stride_gd, stride_gr,
    seed_ptr, keep_threshold,
    M, D, R, tokens_per_split,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    U_EIGHTS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Write the sum over the tokens of one split for ``BLOCK_D`` columns of P, all ranks."""
    R, stride_um = of_eights(R, U_EIGHTS), of_eights(stride_um, U_EIGHTS)
    split = split.to(tl.int64)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, M)
    tl.assume(last > first)
    offs_d = tile_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_d = offs_d < D
    mask_r = offs_r < R
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    acc = tl.zeros((BLOCK_D, BLOCK_R), dtype=tl.float32)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < last
        # P is read as (BLOCK_D, BLOCK_M): transposing a loaded tile would keep its copies synchronous.
        p_ptrs = p_ptr + offs_d[:, None] * stride_pd + offs_m[None, :] * stride_pm
        u_ptrs = u_ptr + offs_m[:, None] * stride_um + offs_r[None, :] * stride_ur
        p = tl.load(p_ptrs, mask=mask_d[:, None] & mask_m[None, :], other=0.0)
        u = tl.load(u_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if HAS_DROPOUT:
            keep = keep_mask(seed, offs_m, tile_d * BLOCK_D, keep_threshold, BLOCK_M, BLOCK_D)
            p = tl.where(tl.trans(keep), p, 0.0)
        acc = tile_dot(p, u.to(p.dtype), acc)

    g_ptrs = g_ptr + split * stride_gs + offs_d[:, None] * stride_gd + offs_r[None, :] * stride_gr
    tl.store(g_ptrs, acc, mask=mask_d[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["keep_threshold"])
def _token_sum_kernel(
    p_ptr, stride_pm, stride_pd,
    u_ptr, stride_um, stride_ur,
    g_ptr, stride_gs, stride_gd, stride_gr,
    seed_ptr, keep_threshold,
    M, D, R, tokens_per_split,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    U_EIGHTS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    token_sum_tile(
        tl.program_id(0), tl.program_id(1),
        p_ptr, stride_pm, stride_pd,
        u_ptr, stride_um, stride_ur,
        g_ptr, stride_gs, stride_gd, stride_gr,
        seed_ptr, keep_threshold,
        M, D, R, tokens_per_split,
        BLOCK_M, BLOCK_D, BLOCK_R, U_EIGHTS, HAS_DROPOUT,
    )  # fmt: skip


@triton.jit
def _reduce_kernel(partial_ptr, g_ptr, size, splits, scale, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    partial_ptrs = partial_ptr + offs
    for _ in range(splits):
        acc += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += size
    tl.store(g_ptr + offs, (acc * scale).to(g_ptr.dtype.element_ty), mask=mask)


def reduce_partials(partial: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """partial: (splits, D, R), fp32, contiguous -> ``scale`` * its sum over the splits: (D, R), ``dtype``."""
    splits, *shape = partial.shape
    g = torch.empty(shape, dtype=dtype, device=partial.device)
    size = g.numel()
    _reduce_kernel[(triton.cdiv(size, _REDUCE_BLOCK),)](
        partial, g, size, splits, scale, BLOCK=_REDUCE_BLOCK, num_warps=_REDUCE_WARPS
    )
    return g


def token_sum(
    p: torch.Tensor,
    u: torch.Tensor,
    scale: float,
    config: TokenSumConfig,
    dtype: torch.dtype,
    transposed: bool = False,
    seed: torch.Tensor | None = None,
    keep_threshold: int = 0,
) -> torch.Tensor:
    """p: (M, D), u: (M, R) -> (D, R), or (R, D) if ``transposed``, in ``dtype``, contiguous.

    Any strides; M, D, R > 0. ``seed``: int64 tensor of one element, turns on dropout of p; the factor
    1 / (1 - p) must be part of ``scale``.
    """
    (M, D), R = p.shape, u.shape[1]
    tokens_per_split = triton.cdiv(triton.cdiv(M, config.splits), config.block_m) * config.block_m
    splits = triton.cdiv(M, tokens_per_split)  # No split is empty.
    shape = (R, D) if transposed else (D, R)
    partial = torch.empty((splits, *shape), dtype=torch.float32, device=p.device)
    stride_d, stride_r = partial.stride()[:0:-1] if transposed else partial.stride()[1:]
    _token_sum_kernel[(triton.cdiv(D, config.block_d), splits)](
        p, p.stride(0), p.stride(1),
        u, u.stride(0), u.stride(1),
        partial, partial.stride(0), stride_d, stride_r,
        seed, keep_threshold,
        M, D, R, tokens_per_split,
        BLOCK_M=config.block_m, BLOCK_D=config.block_d, BLOCK_R=config.block_r,
        U_EIGHTS=in_eights(R, *u.stride()), HAS_DROPOUT=seed is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return reduce_partials(partial, scale, dtype)
