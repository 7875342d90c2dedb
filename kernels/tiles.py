"""Tile mapping shared by the kernels."""

import triton
import triton.language as tl


@triton.jit
def grouped_tile(pid, tiles_m, tiles_e, GROUP_M: tl.constexpr):
    """Map a program id to the tile (m, e), GROUP_M rows of tiles at a time.

    Neighbouring programs then share rows of P and columns of Q, which stay in L2.
    """
    programs_in_group = GROUP_M * tiles_e
    first_m = (pid // programs_in_group) * GROUP_M
    rows_in_group = tl.minimum(tiles_m - first_m, GROUP_M)
    place = pid % programs_in_group
    return first_m + place % rows_in_group, place // rows_in_group


@triton.jit
def tile_dot(a, b, acc):
    """acc + a @ b in fp32: tensor cores for fp16/bf16 tiles, full precision (no tf32) for fp32 ones."""
    return tl.dot(a, b, acc, input_precision="ieee")
