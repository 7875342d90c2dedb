"""Tiles shared by the kernels: their order, and the two parts of a gemm with a rank-R update."""

import triton
import triton.language as tl

from fastlora.kernels.dropout import keep_mask


@triton.jit
def grouped_tile(pid, tiles_m, tiles_e, GROUP_M: tl.constexpr):
    """Map a program id to the tile (m, e), GROUP_M rows of tiles at a time.

    Neighbouring programs thus share rows of P and columns of Q, which stay in L2.
    """
    programs_in_group = GROUP_M * tiles_e
    first_m = (pid // programs_in_group) * GROUP_M
    rows_in_group = tl.minimum(tiles_m - first_m, GROUP_M)
    place = pid % programs_in_group
    return first_m + place % rows_in_group, place // rows_in_group


@triton.jit
def tile_dot(a, b, acc):
    """acc + a @ b in fp32: tensor cores for fp16/bf16 tiles, full precision (no TF32) for fp32 tiles."""
    return tl.dot(a, b, acc, input_precision="ieee")


def in_eights(R: int, row_stride: int, rank_stride: int) -> bool:
    """Whether a (rows, R) matrix has contiguous ranks, and R and row_stride multiples of 8, not both of 16.

    If so, :func:`of_eights` has to tell the compiler: Triton itself detects only multiples of 16.
    """
    return rank_stride == 1 and R % 8 == row_stride % 8 == 0 and R % 16 + row_stride % 16 > 0


def update_constants(u, v, block_r: int) -> dict[str, int | bool]:
    """The compile-time arguments of :func:`update_tile` for u: (M, R) and v: (R, E)."""
    R = u.shape[1]
    return {
        "BLOCK_R": block_r,
        "RANK_BLOCKS": triton.cdiv(R, block_r),
        "U_EIGHTS": in_eights(R, *u.stride()),
        "V_EIGHTS": in_eights(R, v.stride(1), v.stride(0)),
    }


@triton.jit
def of_eights(value, EIGHTS: tl.constexpr):
    """``value``, declared to the compiler as a multiple of 8 if EIGHTS.

    Triton detects only whether an argument is a multiple of 16: without this, an adapter of rank 8 or 24
    would be read element by element instead of by asynchronous copies.
    """
    return (value // 8) * 8 if EIGHTS else value


@triton.jit
def update_tile(
    u_ptr, stride_um, stride_ur,
    v_ptr, stride_vr, stride_ve,
    R, scale,
    seed_ptr, keep_threshold,
    offs_m, offs_e, mask_m, mask_e, first_e,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    U_EIGHTS: tl.constexpr, V_EIGHTS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """A (BLOCK_M, BLOCK_E) tile of s * keep * (U: (M, R) @ V: (R, E)) in fp32.

    first_e: the number of the tile's first column.
    """
    R = of_eights(R, U_EIGHTS or V_EIGHTS)
    stride_um = of_eights(stride_um, U_EIGHTS)
    stride_ve = of_eights(stride_ve, V_EIGHTS)
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
        keep = keep_mask(tl.load(seed_ptr), offs_m, first_e, keep_threshold, BLOCK_M, BLOCK_E)
        acc = tl.where(keep, acc, 0.0)
    return acc


@triton.jit
def add_product(
    acc,
    p_ptr, stride_pm, stride_pd,
    q_ptr, stride_qd, stride_qe,
    D,
    offs_m, offs_e, mask_m, mask_e,
    BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """acc: (BLOCK_M, BLOCK_E) + the corresponding tile of P: (M, D) @ Q: (D, E)."""
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
