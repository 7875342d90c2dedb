"""dx of a group: C = P_0 @ Q_0 + ... + P_3 @ Q_3 + s * keep * (U @ V) (dx = sum of dy_i @ W_i, and G @ B).

P_i: (M, D_i), Q_i: (D_i, E), U: (M, R), V: (R, E), C: (M, E), for one to four branches; R is the sum of their
ranks. As in :mod:`fastlora.kernels.gemm` the update comes first and every main loop accumulates onto it in
fp32, so C is written once. Each branch has a loop of its own: choosing pointers inside one loop would make
its copies synchronous.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.configs import MAX_BRANCHES, GemmConfig
from fastlora.kernels.dropout import keep_mask
from fastlora.kernels.tiles import grouped_tile, tile_dot


@triton.jit
def _add_product(
    acc,
    p_ptr, stride_pm, stride_pd,
    q_ptr, stride_qd, stride_qe,
    D,
    offs_m, offs_e, mask_m, mask_e,
    BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """acc: (BLOCK_M, BLOCK_E) + P @ Q."""
    tl.assume(D > 0)  # Lets ptxas keep wgmma asynchronous: the loop below runs at least once.
    offs_d = tl.arange(0, BLOCK_D)
    p_ptrs = p_ptr + offs_m[:, None] * stride_pm + offs_d.to(tl.int64)[None, :] * stride_pd
    q_ptrs = q_ptr + offs_d.to(tl.int64)[:, None] * stride_qd + offs_e[None, :] * stride_qe
    step = tl.full((), BLOCK_D, tl.int64)
    for d in range(0, D, BLOCK_D):
        if EVEN_D:
            p = tl.load(p_ptrs, mask=mask_m[:, None], other=0.0)
            q = tl.load(q_ptrs, mask=mask_e[None, :], other=0.0)
        else:
            mask_d = offs_d < D - d
            p = tl.load(p_ptrs, mask=mask_m[:, None] & mask_d[None, :], other=0.0)
            q = tl.load(q_ptrs, mask=mask_d[:, None] & mask_e[None, :], other=0.0)
        acc = tile_dot(p, q, acc)
        p_ptrs += step * stride_pd
        q_ptrs += step * stride_qd
    return acc


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
    EVEN_D: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    tile_m, tile_e = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(E, BLOCK_E), GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_e = tile_e.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_m = offs_m < M
    mask_e = offs_e < E

    acc = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
    for block in tl.range(0, RANK_BLOCKS, num_stages=1):  # not unrolled: hoisted loads would spill
        offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < R
        u_ptrs = u_ptr + offs_m[:, None] * stride_um + offs_r[None, :] * stride_ur
        v_ptrs = v_ptr + offs_r[:, None] * stride_vr + offs_e[None, :] * stride_ve
        u = tl.load(u_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=mask_r[:, None] & mask_e[None, :], other=0.0)
        acc = tile_dot(u, v.to(u.dtype), acc)
    acc *= scale
    if HAS_DROPOUT:
        keep = keep_mask(tl.load(seed_ptr), offs_m, tile_e * BLOCK_E, keep_threshold, BLOCK_M, BLOCK_E)
        acc = tl.where(keep, acc, 0.0)

    acc = _add_product(
        acc, p0_ptr, stride_p0m, stride_p0d, q0_ptr, stride_q0d, stride_q0e, D0,
        offs_m, offs_e, mask_m, mask_e, BLOCK_D, EVEN_D,
    )  # fmt: skip
    if BRANCHES > 1:
        acc = _add_product(
            acc, p1_ptr, stride_p1m, stride_p1d, q1_ptr, stride_q1d, stride_q1e, D1,
            offs_m, offs_e, mask_m, mask_e, BLOCK_D, EVEN_D,
        )  # fmt: skip
    if BRANCHES > 2:
        acc = _add_product(
            acc, p2_ptr, stride_p2m, stride_p2d, q2_ptr, stride_q2d, stride_q2e, D2,
            offs_m, offs_e, mask_m, mask_e, BLOCK_D, EVEN_D,
        )  # fmt: skip
    if BRANCHES > 3:
        acc = _add_product(
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

    One to four branches of any strides; M, D_i, E, R > 0. ``seed``: int64 tensor of one element turns dropout
    of the update on; its factor 1 / (1 - p) belongs into ``scale``.
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
        BLOCK_R=config.block_r, RANK_BLOCKS=triton.cdiv(R, config.block_r), GROUP_M=config.group_m,
        EVEN_D=all(q.shape[0] % config.block_d == 0 for q in qs), HAS_DROPOUT=seed is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return c
