"""project: H = s * drop(P) @ Q, the down-projection of both directions (h = x @ B.T and g = dy @ A).

P: (M, D), Q: (D, R), H: (M, R). The single pass over P is the bottleneck, so a program takes whole rows of P
and the full rank, and Q comes from L2.
"""

import torch
import triton
import triton.language as tl

from fastlora.kernels.configs import ProjectConfig
from fastlora.kernels.dropout import keep_mask
from fastlora.kernels.tiles import in_eights, of_eights, tile_dot


@triton.jit
def project_tile(
    tile_m,
    p_ptr, stride_pm, stride_pd,
    q_ptr, stride_qd, stride_qr,
    h_ptr, stride_hm,
    seed_ptr, keep_threshold, scale,
    M, D, R,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    Q_EIGHTS: tl.constexpr, EVEN_D: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Write rows ``tile_m * BLOCK_M`` to ``(tile_m + 1) * BLOCK_M`` of H, all ranks."""
    R, stride_qd = of_eights(R, Q_EIGHTS), of_eights(stride_qd, Q_EIGHTS)
    tl.assume(D > 0)  # Lets ptxas keep wgmma asynchronous: the loop below runs at least once.
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    mask_r = offs_r < R
    p_ptrs = p_ptr + offs_m[:, None] * stride_pm + offs_d.to(tl.int64)[None, :] * stride_pd
    q_ptrs = q_ptr + offs_d.to(tl.int64)[:, None] * stride_qd + offs_r.to(tl.int64)[None, :] * stride_qr
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    step = tl.full((), BLOCK_D, tl.int64)
    for d in range(0, D, BLOCK_D):
        if EVEN_D:
            p = tl.load(p_ptrs, mask=mask_m[:, None], other=0.0)
            q = tl.load(q_ptrs, mask=mask_r[None, :], other=0.0)
        else:
            mask_d = offs_d < D - d
            p = tl.load(p_ptrs, mask=mask_m[:, None] & mask_d[None, :], other=0.0)
            q = tl.load(q_ptrs, mask=mask_d[:, None] & mask_r[None, :], other=0.0)
        if HAS_DROPOUT:
            # The factor 1 / (1 - p) is applied to the fp32 sum, so that P is not rounded again.
            p = tl.where(keep_mask(seed, offs_m, d, keep_threshold, BLOCK_M, BLOCK_D), p, 0.0)
        acc = tile_dot(p, q.to(p.dtype), acc)
        p_ptrs += step * stride_pd
        q_ptrs += step * stride_qd

    h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_r[None, :]
    tl.store(h_ptrs, (acc * scale).to(h_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["keep_threshold"])
def _project_kernel(
    p_ptr, stride_pm, stride_pd,
    q_ptr, stride_qd, stride_qr,
    h_ptr, stride_hm,
    seed_ptr, keep_threshold, scale,
    M, D, R,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    Q_EIGHTS: tl.constexpr, EVEN_D: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    project_tile(
        tl.program_id(0),
        p_ptr, stride_pm, stride_pd,
        q_ptr, stride_qd, stride_qr,
        h_ptr, stride_hm,
        seed_ptr, keep_threshold, scale,
        M, D, R,
        BLOCK_M, BLOCK_D, BLOCK_R, Q_EIGHTS, EVEN_D, HAS_DROPOUT,
    )  # fmt: skip


def project(
    p: torch.Tensor,
    q: torch.Tensor,
    config: ProjectConfig,
    seed: torch.Tensor | None = None,
    keep_threshold: int = 0,
    scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """p: (M, D), q: (D, R) -> (M, R) in p's dtype; any strides; M, D, R > 0.

    ``seed``: int64 tensor of one element, turns on dropout of p with ``keep_threshold``. ``scale`` multiplies
    the result, with or without dropout. ``out``: (M, R) with column stride 1, written and returned; None for
    a new tensor.
    """
    (M, D), R = p.shape, q.shape[1]
    h = torch.empty((M, R), dtype=p.dtype, device=p.device) if out is None else out
    _project_kernel[(triton.cdiv(M, config.block_m),)](
        p, p.stride(0), p.stride(1),
        q, q.stride(0), q.stride(1),
        h, h.stride(0),
        seed, keep_threshold, scale,
        M, D, R,
        BLOCK_M=config.block_m, BLOCK_D=config.block_d, BLOCK_R=config.block_r,
        Q_EIGHTS=in_eights(R, *q.stride()), EVEN_D=D % config.block_d == 0, HAS_DROPOUT=seed is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return h
