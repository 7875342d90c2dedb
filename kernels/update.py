"""update: C += s * keep * (U @ V) in place, the rank-R update with dropout of a product computed by the BLAS.

U: (M, R), V: (R, E), C: (M, E) (dx = dy @ W, then += alpha * drop(g @ B)). The pass over C is the bottleneck.
Unlike gemm's single launch, this needs that extra pass, but leaves the product to the BLAS; no mask is
written.
"""

import torch
import triton
import triton.language as tl

from fastlora.kernels.configs import UpdateConfig
from fastlora.kernels.tiles import update_constants, update_tile


@triton.jit(do_not_specialize=["keep_threshold"])
def _update_kernel(
    u_ptr, stride_um, stride_ur,
    v_ptr, stride_vr, stride_ve,
    c_ptr, stride_cm,
    seed_ptr, keep_threshold, scale,
    M, E, R,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    U_EIGHTS: tl.constexpr, V_EIGHTS: tl.constexpr,
):  # fmt: skip
    tiles_e = tl.cdiv(E, BLOCK_E)
    tile_m, tile_e = tl.program_id(0) // tiles_e, tl.program_id(0) % tiles_e
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_e = tile_e.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_m = offs_m < M
    mask_e = offs_e < E
    c_ptrs = c_ptr + offs_m[:, None] * stride_cm + offs_e[None, :]
    mask = mask_m[:, None] & mask_e[None, :]
    c = tl.load(c_ptrs, mask=mask, other=0.0)  # issued first, so that it overlaps the rest
    acc = update_tile(
        u_ptr, stride_um, stride_ur, v_ptr, stride_vr, stride_ve, R, scale,
        seed_ptr, keep_threshold, offs_m, offs_e, mask_m, mask_e, tile_e * BLOCK_E,
        BLOCK_M, BLOCK_E, BLOCK_R, RANK_BLOCKS, U_EIGHTS, V_EIGHTS, True,
    )  # fmt: skip
    tl.store(c_ptrs, (acc + c.to(tl.float32)).to(c_ptr.dtype.element_ty), mask=mask)


def add_update(
    c: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    config: UpdateConfig,
    seed: torch.Tensor,
    keep_threshold: int,
) -> torch.Tensor:
    """c: (M, E) += scale * keep * (u: (M, R) @ v: (R, E)), in place; c has column stride 1; M, E, R > 0.

    ``seed``: int64 tensor of one element; the factor 1 / (1 - p) must be part of ``scale``. Returns ``c``.
    """
    (M, E), R = c.shape, u.shape[1]
    _update_kernel[(triton.cdiv(M, config.block_m) * triton.cdiv(E, config.block_e),)](
        u, u.stride(0), u.stride(1),
        v, v.stride(0), v.stride(1),
        c, c.stride(0),
        seed, keep_threshold, scale,
        M, E, R,
        BLOCK_M=config.block_m, BLOCK_E=config.block_e,
        **update_constants(u, v, config.block_r),
        num_warps=config.num_warps,
    )  # fmt: skip
    return c
