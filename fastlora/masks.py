"""The keep mask of dropout: a function of (seed, row, column) alone, the same on every path and device.

    keep[row, column] = bits16(philox4x32(seed, counter=(column // 8, row, 0, 0)))[column % 8] >= p * 65536

The kernels recompute it wherever they need it (``kernels/dropout.py``); here it is computed by PyTorch or,
for few elements, by numpy.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

try:
    import numpy
except ImportError:  # PyTorch runs without it.
    numpy = None  # type: ignore[assignment]


def new_seed(device: torch.device) -> Tensor:
    """A dropout seed, int64 of shape (1,), drawn from torch's generator for ``device``."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


# Philox4x32 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). Seven rounds are the
# fewest that pass BigCrush according to that paper's table 2.
PHILOX_ROUNDS = 7
_PHILOX_MULTIPLIER_0, _PHILOX_MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_KEY_STEP_0, _PHILOX_KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
_LOW32 = 0xFFFFFFFF

# One Philox call gives 128 bits: 16 for each of this many adjacent columns.
COLUMNS_PER_CALL = 8

# Up to this many elements a mask on the CPU is computed by numpy, whose calls take less time than PyTorch's:
# 25 us against 120 us for one token of 1024 columns, 125 us against 200 us for 64 tokens (one thread).
_FEW_ELEMENTS = 2**16


def keep_threshold(dropout: float) -> int:
    """The 16-bit threshold for probability ``dropout``: an element is kept if its bits are at least this."""
    return round(dropout * 65536)


def _philox(columns: Tensor, rows: Tensor, seed: int | Tensor) -> tuple[Tensor, ...]:
    """Philox4x32 with seven rounds on the counters (column, row, 0, 0): four words, each (rows, columns).

    Words are in the low halves of int64 numbers: a 32 x 32-bit product wraps, but its bits do not change, so
    shift and mask still read both halves. Only a word about to be multiplied needs a clean high half, and the
    first two rounds work on one row and one column, as two of the counters are constant. With six in-place
    passes over the grid per round, this is four times as fast as the plain form (5.5 ms against 23 ms at
    2048 x 1024, two Zen 3 cores).
    """
    keys = [
        ((seed + _PHILOX_KEY_STEP_0 * i) & _LOW32, ((seed >> 32) + _PHILOX_KEY_STEP_1 * i) & _LOW32)
        for i in range(PHILOX_ROUNDS)
    ]

    def high(product: Tensor) -> Tensor:
        return (product >> 32) & _LOW32

    # Rounds 1 and 2, in which only one word depends on row and column both.
    column_product = columns * _PHILOX_MULTIPLIER_0
    product_0 = (rows ^ keys[0][0]) * _PHILOX_MULTIPLIER_0
    product_1 = (high(column_product) ^ keys[0][1]) * _PHILOX_MULTIPLIER_1
    c2 = (high(product_0) ^ keys[1][1]) ^ (column_product & _LOW32)
    column_product = (high(product_1) ^ keys[1][0]) * _PHILOX_MULTIPLIER_0
    # In round 3 every word fills the grid.
    c1 = c2 * _PHILOX_MULTIPLIER_1
    c0 = high(c1) ^ ((product_1 & _LOW32) ^ keys[2][0])
    c2 = (product_0 & _LOW32) ^ (high(column_product) ^ keys[2][1])
    c3 = column_product.expand_as(c0).clone()
    shifted = torch.empty_like(c0)
    for key_0, key_1 in keys[3:]:
        c0.mul_(_PHILOX_MULTIPLIER_0)
        c2.mul_(_PHILOX_MULTIPLIER_1)
        c1.bitwise_xor_(torch.bitwise_right_shift(c2, 32, out=shifted)).bitwise_xor_(key_0).bitwise_and_(
            _LOW32
        )
        c3.bitwise_xor_(torch.bitwise_right_shift(c0, 32, out=shifted)).bitwise_xor_(key_1).bitwise_and_(
            _LOW32
        )
        c0, c1, c2, c3 = c1, c2, c3, c0
    return c0, c1, c2, c3


@functools.cache
def _philox_constants():
    """The two multipliers as uint64 (2, 1), and what the rounds add to the key as uint32 (rounds, 2, 1)."""
    steps = [[_PHILOX_KEY_STEP_0 * i & _LOW32, _PHILOX_KEY_STEP_1 * i & _LOW32] for i in range(PHILOX_ROUNDS)]
    multipliers = numpy.array([_PHILOX_MULTIPLIER_0, _PHILOX_MULTIPLIER_1], numpy.uint64)
    return multipliers[:, None], numpy.array(steps, numpy.uint32)[:, :, None]


@functools.lru_cache(maxsize=16)
def _philox_start(rows: int, groups: int):
    """Words (0, 2), without the key, and words (1, 3) after round 1: uint32 (2, rows * groups) each."""
    product = numpy.arange(groups, dtype=numpy.uint64) * numpy.uint64(_PHILOX_MULTIPLIER_0)
    even, odd = numpy.zeros((2, 2, rows, groups), numpy.uint32)
    even[0] = numpy.arange(rows, dtype=numpy.uint32)[:, None]
    even[1] = product >> numpy.uint64(32)
    odd[1] = product & numpy.uint64(_LOW32)
    return even.reshape(2, -1), odd.reshape(2, -1)


def _few_philox_bits(rows: int, groups: int, seed: int):
    """What :func:`_philox` computes, as numpy's uint16 (rows, groups * COLUMNS_PER_CALL).

    A round multiplies words (0, 2) in one call and reads the halves of both products as views. With the two
    products swapped, the high halves xor words (1, 3) xor the key are the new words (0, 2), and the low
    halves the new words (1, 3).
    """
    multipliers, key_steps = _philox_constants()
    keys = key_steps + numpy.array([[seed & _LOW32], [seed >> 32 & _LOW32]], numpy.uint32)
    even, odd = _philox_start(rows, groups)
    even = even ^ keys[0]
    products = numpy.empty((2, *even.shape), numpy.uint64)  # two in turns, as odd is a view of the last
    halves = products.view(numpy.uint32)[:, ::-1]
    for i in range(1, PHILOX_ROUNDS):
        numpy.multiply(even, multipliers, out=products[i % 2])
        numpy.bitwise_xor(halves[i % 2, :, 1::2], odd, out=even)
        numpy.bitwise_xor(even, keys[i], out=even)
        odd = halves[i % 2, :, 0::2]
    words = numpy.empty((rows * groups, 2, 2), numpy.uint32)
    words[:, :, 0], words[:, :, 1] = even.T, odd.T
    return words.view(numpy.uint16).reshape(rows, groups * COLUMNS_PER_CALL)


@functools.lru_cache(maxsize=64)
def _few_keep(seed: int, rows: int, columns: int, threshold: int):
    """The mask of few elements; cached, as backward needs the mask of forward again.

    As numpy's array: a tensor made in inference mode or under a transform would not serve other calls.
    """
    bits = _few_philox_bits(rows, -(-columns // COLUMNS_PER_CALL), seed)
    return (bits >= threshold)[:, :columns]


def shared_keep_mask(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """:func:`keep_mask` for read-only use: other callers may get the same tensor."""
    threshold = keep_threshold(dropout)
    if threshold in (0, 65536):
        return torch.full((rows, columns), threshold == 0, device=seed.device)
    # On a GPU the seed stays a tensor: reading its value would synchronise with the device.
    on_cpu = seed.device.type == "cpu"
    key = int(seed) if on_cpu else seed.reshape(())
    if on_cpu and rows * columns <= _FEW_ELEMENTS and numpy is not None and not torch.compiler.is_compiling():
        return torch.from_numpy(_few_keep(key, rows, columns, threshold))
    groups = -(-columns // COLUMNS_PER_CALL)
    column = torch.arange(groups, device=seed.device).unsqueeze(0)
    row = torch.arange(rows, device=seed.device).unsqueeze(1)
    words = torch.empty((rows, groups, 4), dtype=torch.int32, device=seed.device)
    for i, word in enumerate(_philox(column, row, key)):
        words[..., i] = word  # keeps the low half
    bits = words.view(torch.int16).view(rows, groups * COLUMNS_PER_CALL)
    # An unsigned comparison in signed arithmetic: flip the sign bit of both sides.
    return (bits.bitwise_xor_(-32768) >= threshold - 32768)[:, :columns]


def keep_mask(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """The keep mask of dropout, a function of (seed, row, column) alone.

    Args:
        seed: one-element int64 tensor, whose two halves are the Philox key.
        rows: number of rows M (tokens).
        columns: number of columns K.
        dropout: probability in [0, 1] of dropping an element, with a resolution of 1/65536.

    Returns:
        bool tensor (rows, columns) on ``seed``'s device, True where the element is kept.
    """
    return shared_keep_mask(seed, rows, columns, dropout).clone()


def is_batched(seed: Tensor) -> bool:
    """Whether vmap maps over seeds, its own (randomness="different") or the caller's."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(seed)


def functional_keep_mask(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """:func:`keep_mask` for vmap and traces: no in-place operations, no views as another dtype."""
    column = torch.arange(-(-columns // COLUMNS_PER_CALL), device=seed.device).unsqueeze(0)
    row = torch.arange(rows, device=seed.device).unsqueeze(1)
    key_0, key_1 = seed.reshape(()) & _LOW32, (seed.reshape(()) >> 32) & _LOW32
    c0, c1, c2, c3 = column, row, torch.zeros_like(column), torch.zeros_like(column)
    for _ in range(PHILOX_ROUNDS):
        product_0, product_1 = c0 * _PHILOX_MULTIPLIER_0, c2 * _PHILOX_MULTIPLIER_1
        c0 = ((product_1 >> 32) & _LOW32) ^ c1 ^ key_0
        c2 = ((product_0 >> 32) & _LOW32) ^ c3 ^ key_1
        c1, c3 = product_1 & _LOW32, product_0 & _LOW32
        key_0, key_1 = (key_0 + _PHILOX_KEY_STEP_0) & _LOW32, (key_1 + _PHILOX_KEY_STEP_1) & _LOW32
    halves = [half for word in (c0, c1, c2, c3) for half in (word & 0xFFFF, word >> 16)]
    bits = torch.stack(torch.broadcast_tensors(*halves), -1).flatten(-2)
    return (bits >= keep_threshold(dropout))[..., :columns]


def keep_scale(dropout: float) -> float:
    """The factor on kept elements: 1 / (1 - p) for the requested p, or 0 if no element is kept.

    Elements are kept with a probability rounded to 1/65536, which biases the mean by less than
    8e-6 / (1 - p).
    """
    return 0.0 if dropout >= 1.0 else 1.0 / (1.0 - dropout)
