"""The dropout keep mask, recomputed wherever it is needed and never written to memory.

    keep[row, column] = bits16(philox4x32(seed, counter=(column // 8, row, 0, 0)))[column % 8] >= p * 65536

One Philox call serves eight neighbouring columns with 16 bits each: one call per element would cost more in
integer work than the layer's whole matrix product. ``fastlora.masks`` is the reference implementation.
"""

import triton
import triton.language as tl

# The same values as in fastlora.masks, which explains them.
PHILOX_ROUNDS = tl.constexpr(7)
COLUMNS_PER_CALL = tl.constexpr(8)
# Constants of Philox 4x32: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC11).
_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_KEY_STEP_0 = tl.constexpr(0x9E3779B9)
_KEY_STEP_1 = tl.constexpr(0xBB67AE85)


@triton.jit
def _philox(seed, c0, c1):
    """The four words of philox4x32(seed, (c0, c1, 0, 0)): uint32 tensors of one shape.

    ``tl.philox`` returns the same words, but computes each half of a product with its own instruction.
    """
    seed = seed.to(tl.uint64)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    for _ in tl.static_range(PHILOX_ROUNDS):
        a = c0.to(tl.uint64) * _MULTIPLIER_0
        b = c2.to(tl.uint64) * _MULTIPLIER_1
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ k1, a.to(tl.uint32)
        k0 += _KEY_STEP_0
        k1 += _KEY_STEP_1
    return c0, c1, c2, c3


@triton.jit
def keep_mask(seed, rows, first_column, threshold, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of a tile are kept: (BLOCK_M, BLOCK_D) of int1.

    seed: int64 scalar. rows: (BLOCK_M,) row numbers. first_column: a multiple of 8. threshold: p * 65536; the
    kernels do not specialise it, because 1 would become a constant, which has no ``to``.
    """
    groups = first_column // COLUMNS_PER_CALL + tl.arange(0, BLOCK_D // COLUMNS_PER_CALL)
    counter_0 = tl.broadcast_to(groups.to(tl.uint32)[None, :], (BLOCK_M, BLOCK_D // COLUMNS_PER_CALL))
    counter_1 = tl.broadcast_to(rows.to(tl.uint32)[:, None], (BLOCK_M, BLOCK_D // COLUMNS_PER_CALL))
    w0, w1, w2, w3 = _philox(seed, counter_0, counter_1)
    # join() adds a last axis of size two; nested so that flattening gives w0, w1, w2, w3 and low before high.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(words, (BLOCK_M, BLOCK_D // COLUMNS_PER_CALL, 4))
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_M, BLOCK_D))
    return bits >= threshold.to(tl.uint32)
