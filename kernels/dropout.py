"""The dropout keep mask, regenerated wherever it is needed and never written to memory.

    keep[row, column] = bits16(philox4x32(seed, counter=(column // 8, row, 0, 0)))[column % 8] >= p * 65536

One Philox call serves eight neighbouring columns with 16 bits each: a call per element would cost more
integer work than the layer's whole matrix product. ``fastlora.reference.keep_mask`` is its oracle.
"""

import triton
import triton.language as tl

# The numbers of fastlora.reference, which explains them.
PHILOX_ROUNDS = tl.constexpr(7)
COLUMNS_PER_CALL = tl.constexpr(8)


@triton.jit
def keep_mask(seed, rows, first_column, threshold, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where the elements of a tile are kept.

    seed: int64 scalar. rows: (BLOCK_M,) row numbers. first_column: a multiple of 8. threshold: p * 65536, not
    specialised by the kernels, where 1 would become a constant that has no ``to``.
    Returns (BLOCK_M, BLOCK_D) of int1.
    """
    groups = first_column // COLUMNS_PER_CALL + tl.arange(0, BLOCK_D // COLUMNS_PER_CALL)
    counter_0 = tl.broadcast_to(groups.to(tl.uint32)[None, :], (BLOCK_M, BLOCK_D // COLUMNS_PER_CALL))
    counter_1 = tl.broadcast_to(rows.to(tl.uint32)[:, None], (BLOCK_M, BLOCK_D // COLUMNS_PER_CALL))
    zero = tl.zeros_like(counter_0)
    w0, w1, w2, w3 = tl.philox(seed, counter_0, counter_1, zero, zero, PHILOX_ROUNDS)
    # join() adds a last axis of two; nested so that flattening gives w0, w1, w2, w3 and low before high.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(words, (BLOCK_M, BLOCK_D // COLUMNS_PER_CALL, 4))
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_M, BLOCK_D))
    return bits >= threshold.to(tl.uint32)
