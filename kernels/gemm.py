"""gemm with rank-R update: C = P @ Q + s * keep * (U @ V) + bias (y = x @ W.T + ..., dx = dy @ W + ...).

P: (M, D), Q: (D, E), U: (M, R), V: (R, E), bias: (E,), C: (M, E). The update comes first and the main loop
accumulates onto it: s and the dropout mask are applied in fp32 without a second accumulator, and wgmma
stays asynchronous (with the update after the loop, ptxas serialises it, or registers spill at 128 x 256).
"""

import torch
import triton
import triton.language as tl

from fastlora.kernels.configs import GemmConfig
from fastlora.kernels.tiles import add_product, grouped_tile, update_constants, update_tile


@triton.jit(do_not_specialize=["keep_threshold"])
def _gemm_kernel(
    p_ptr, stride_pm, stride_pd,
    q_ptr, stride_qd, stride_qe,
    u_ptr, stride_um, stride_ur,
    v_ptr, stride_vr, stride_ve,
    bias_ptr, stride_bias,
    c_ptr, stride_cm,
    seed_ptr, keep_threshold, scale,
    M, D, E, R,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr, GROUP_M: tl.constexpr,
    U_EIGHTS: tl.constexpr, V_EIGHTS: tl.constexpr,
    EVEN_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    tile_m, tile_e = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(E, BLOCK_E), GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_e = tile_e.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_m = offs_m < M
    mask_e = offs_e < E

    acc = update_tile(
        u_ptr, stride_um, stride_ur, v_ptr, stride_vr, stride_ve, R, scale,
        seed_ptr, keep_threshold, offs_m, offs_e, mask_m, mask_e, tile_e * BLOCK_E,
        BLOCK_M, BLOCK_E, BLOCK_R, RANK_BLOCKS, U_EIGHTS, V_EIGHTS, HAS_DROPOUT,
    )  # fmt: skip
    acc = add_product(
        acc, p_ptr, stride_pm, stride_pd, q_ptr, stride_qd, stride_qe, D,
        offs_m, offs_e, mask_m, mask_e, BLOCK_D, EVEN_D,
    )  # fmt: skip

    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_e * stride_bias, mask=mask_e, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    c_ptrs = c_ptr + offs_m[:, None] * stride_cm + offs_e[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_e[None, :])


def gemm(
    p: torch.Tensor,
    q: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    config: GemmConfig,
    bias: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    keep_threshold: int = 0,
) -> torch.Tensor:
    """p: (M, D), q: (D, E), u: (M, R), v: (R, E), bias: (E,) -> (M, E) in p's dtype, contiguous.

    Any strides; M, D, E, R > 0. ``seed``: int64 tensor of one element, turns on dropout of the update; the
    factor 1 / (1 - p) must be part of ``scale``.
    """
    (M, D), E, R = p.shape, q.shape[1], u.shape[1]
    c = torch.empty((M, E), dtype=p.dtype, device=p.device)
    _gemm_kernel[(triton.cdiv(M, config.block_m) * triton.cdiv(E, config.block_e),)](
        p, p.stride(0), p.stride(1),
        q, q.stride(0), q.stride(1),
        u, u.stride(0), u.stride(1),
        v, v.stride(0), v.stride(1),
        bias, 0 if bias is None else bias.stride(0),
        c, c.stride(0),
        seed, keep_threshold, scale,
        M, D, E, R,
        BLOCK_M=config.block_m, BLOCK_E=config.block_e, BLOCK_D=config.block_d,
        **update_constants(u, v, config.block_r), GROUP_M=config.group_m,
        EVEN_D=D % config.block_d == 0, HAS_BIAS=bias is not None, HAS_DROPOUT=seed is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return c
