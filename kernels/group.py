"""dx of a group: C = P_0 @ Q_0 + ... + P_3 @ Q_3 + s * keep * (U @ V) (dx = sum of dy_i @ W_i, and G @ B).

P_i: (M, D_i), Q_i: (D_i, E), U: (M, R), V: (R, E), C: (M, E), for one to four branches; R is the sum of their
ranks. As in :mod:`fastlora.kernels.gemm`, the update comes first and every main loop accumulates onto it in
fp32, so C is written once. Each branch has its own loop: selecting the pointers inside a single loop would
make its copies synchronous.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.configs import MAX_BRANCHES, GemmConfig
from fastlora.kernels.tiles import add_product, grouped_tile, update_constants, update_tile


@triton.jit(do_not_specialize=["keep_threshold"])
def _group_dx_kernel(
    p0_ptr, stride_p0m, stride_p0d, q0_ptr, stride_q0d, stride_q0e, D0,
    p1_ptr, stride_p1m, stride_p1d, q1_ptr, stride_q1d, stride_q1e, D1,
    p2_ptr, stride_p2m, stride_p2d, q2_ptr, stride_q2d, stride_q2e, D2,
    p3_ptr, stride_p3m, stride_p3d, q3_ptr, stride_q3d, stride_q3e, D3,
    u_ptr, stride_um, stride_ur,
    v_ptr, stride_vr, stride_ve,
    c_ptr, stride_cm,
    seed_ptr, keep_threshold, scale,
    M, E, R,
    BRANCHES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr, GROUP_M: tl.constexpr,
    U_EIGHTS: tl.constexpr, V_EIGHTS: tl.constexpr, EVEN_D: tl.constexpr, HAS_DROPOUT: tl.constexpr,
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
        acc, p0_ptr, stride_p0m, stride_p0d, q0_ptr, stride_q0d, stride_q0e, D0,
        offs_m, offs_e, mask_m, mask_e, BLOCK_D, EVEN_D,
    )  # fmt: skip
    if BRANCHES > 1:
        acc = add_product(
            acc, p1_ptr, stride_p1m, stride_p1d, q1_ptr, stride_q1d, stride_q1e, D1,
            offs_m, offs_e, mask_m, mask_e, BLOCK_D, EVEN_D,
        )  # fmt: skip
    if BRANCHES > 2:
        acc = add_product(
            acc, p2_ptr, stride_p2m, stride_p2d, q2_ptr, stride_q2d, stride_q2e, D2,
            offs_m, offs_e, mask_m, mask_e, BLOCK_D, EVEN_D,
        )  # fmt: skip
    if BRANCHES > 3:
        acc = add_product(
            acc, p3_ptr, stride_p3m, stride_p3d, q3_ptr, stride_q3d, stride_q3e, D3,
            offs_m, offs_e, mask_m, mask_e, BLOCK_D, EVEN_D,
        )  # fmt: skip

    c_ptrs = c_ptr + offs_m[:, None] * stride_cm + offs_e[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_e[None, :])


def group_dx(
    ps: Sequence[torch.Tensor],
    qs: Sequence[torch.Tensor],
    u: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    config: GemmConfig,
    seed: torch.Tensor | None = None,
    keep_threshold: int = 0,
) -> torch.Tensor:
    """ps: (M, D_i), qs: (D_i, E), u: (M, R), v: (R, E) -> (M, E) in u's dtype, contiguous.

    One to four branches, any strides; M, D_i, E, R > 0. ``seed``: int64 tensor of one element, turns on
    dropout of the update; the factor 1 / (1 - p) must be part of ``scale``.
    """
    (M, R), E = u.shape, v.shape[1]
    c = torch.empty((M, E), dtype=u.dtype, device=u.device)
    branches = [
        (p, p.stride(0), p.stride(1), q, q.stride(0), q.stride(1), q.shape[0])
        for p, q in zip(ps, qs, strict=True)
    ]
    branches += [(None, 0, 0, None, 0, 0, 0)] * (MAX_BRANCHES - len(ps))
    _group_dx_kernel[(triton.cdiv(M, config.block_m) * triton.cdiv(E, config.block_e),)](
        *branches[0],
        *branches[1],
        *branches[2],
        *branches[3],
        u, u.stride(0), u.stride(1),
        v, v.stride(0), v.stride(1),
        c, c.stride(0),
        seed, keep_threshold, scale,
        M, E, R,
        BRANCHES=len(ps),
        BLOCK_M=config.block_m, BLOCK_E=config.block_e, BLOCK_D=config.block_d,
        **update_constants(u, v, config.block_r), GROUP_M=config.group_m,
        EVEN_D=all(q.shape[0] % config.block_d == 0 for q in qs), HAS_DROPOUT=seed is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return c
