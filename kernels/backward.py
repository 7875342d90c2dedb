"""backward: g = dy @ A and dA = s * dy.T @ h in one launch that reads dy from memory once.

dy: (M, N), A: (N, R), h: (M, R), g: (M, R), dA: (N, R). The rows of dy are cut into regions of a few MB. The
programs of a region have consecutive ids: first those of g (project), because they run longest, then those
of dA (token sum, with the region as their split). They run concurrently, so the second read of the region
comes from the L2 cache. A second kernel adds the partial sums of dA in a fixed order, as in token sum.

The planner chooses this kernel only where a measured row of the product "g+dA", as written by ``python -m
fastlora tune``, says that it beats two separate products, each on its fastest path. The shipped table has no
such row yet.
"""

import torch
import triton
import triton.language as tl

from fastlora.kernels.configs import BackwardConfig
from fastlora.kernels.project import project_tile
from fastlora.kernels.tiles import in_eights
from fastlora.kernels.token_sum import reduce_partials, token_sum_tile


@triton.jit
def _backward_kernel(
    dy_ptr, stride_dym, stride_dyn,
    a_ptr, stride_an, stride_ar,
    h_ptr, stride_hm, stride_hr,
    g_ptr, stride_gm,
    dA_ptr, stride_dAs, stride_dAn, stride_dAr,
    M, N, R, rows,
    BLOCK_M: tl.constexpr, STEP_N: tl.constexpr, BLOCK_N: tl.constexpr, STEP_M: tl.constexpr,
    BLOCK_R: tl.constexpr, A_EIGHTS: tl.constexpr, H_EIGHTS: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    region_tiles_m = rows // BLOCK_M
    programs = region_tiles_m + tl.cdiv(N, BLOCK_N)
    region = tl.program_id(0) // programs
    place = tl.program_id(0) % programs
    first_tile_m = region * region_tiles_m
    region_tiles_m = tl.minimum(region_tiles_m, tiles_m - first_tile_m)  # The last region may be shorter.
    if place < region_tiles_m:
        project_tile(
            first_tile_m + place,
            dy_ptr, stride_dym, stride_dyn,
            a_ptr, stride_an, stride_ar,
            g_ptr, stride_gm,
            None, 0, 1.0,
            M, N, R,
            BLOCK_M, STEP_N, BLOCK_R, A_EIGHTS, EVEN_N, False,
        )  # fmt: skip
    else:
        token_sum_tile(
            place - region_tiles_m, region,
            dy_ptr, stride_dym, stride_dyn,
            h_ptr, stride_hm, stride_hr,
            dA_ptr, stride_dAs, stride_dAn, stride_dAr,
            None, 0,
            M, N, R, rows,
            STEP_M, BLOCK_N, BLOCK_R, H_EIGHTS, False,
        )  # fmt: skip


def g_and_dA(
    dy: torch.Tensor,
    A: torch.Tensor,
    h: torch.Tensor,
    scale: float,
    config: BackwardConfig,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy: (M, N), A: (N, R), h: (M, R) -> g: (M, R) in dy's dtype, dA: (N, R) in ``dtype``, both contiguous.

    Any strides; M, N, R > 0. ``scale`` multiplies only dA.
    """
    (M, N), R = dy.shape, A.shape[1]
    regions = triton.cdiv(M, config.rows)
    g = torch.empty((M, R), dtype=dy.dtype, device=dy.device)
    partial = torch.empty((regions, N, R), dtype=torch.float32, device=dy.device)
    programs = triton.cdiv(M, config.block_m) + regions * triton.cdiv(N, config.block_n)
    _backward_kernel[(programs,)](
        dy, dy.stride(0), dy.stride(1),
        A, A.stride(0), A.stride(1),
        h, h.stride(0), h.stride(1),
        g, g.stride(0),
        partial, partial.stride(0), partial.stride(1), partial.stride(2),
        M, N, R, config.rows,
        BLOCK_M=config.block_m, STEP_N=config.step_n, BLOCK_N=config.block_n, STEP_M=config.step_m,
        BLOCK_R=config.block_r, A_EIGHTS=in_eights(R, *A.stride()), H_EIGHTS=in_eights(R, *h.stride()),
        EVEN_N=N % config.step_n == 0,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return g, reduce_partials(partial, scale, dtype)
