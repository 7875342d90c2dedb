"""The formula of a LoRA linear layer and its gradients in plain PyTorch: the oracle of every other path.

    y  = x @ W.T + alpha * (drop(x) @ B.T) @ A.T + bias
    dx = dy @ W + alpha * drop((dy @ A) @ B)
    dA = alpha * dy.T @ (drop(x) @ B.T)
    dB = alpha * (dy @ A).T @ drop(x)

x: (..., K), W: (N, K), B: (R, K), A: (N, R), bias: (N,); drop(x) = keep * x / (1 - p).
The formula is that of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1.

Three primitives make all of it, in both directions; the Triton kernels carry the same names.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import numpy
except ImportError:  # PyTorch runs without it.
    numpy = None  # type: ignore[assignment]

# Philox4x32 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). Seven rounds are the
# fewest that pass BigCrush according to that paper's table 2.
PHILOX_ROUNDS = 7
_PHILOX_MULTIPLIER_0, _PHILOX_MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_KEY_STEP_0, _PHILOX_KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
_LOW32 = 0xFFFFFFFF

# One Philox call gives 128 bits: 16 for each of this many neighbouring columns.
COLUMNS_PER_CALL = 8

# Up to this many elements a mask on the CPU is drawn by numpy, whose calls take less time than PyTorch's:
# 25 us against 120 us for one token of 1024 columns, 125 against 200 us for 64 of them (one thread).
_FEW_ELEMENTS = 2**16


def keep_threshold(dropout: float) -> int:
    """The 16-bit threshold of dropout probability ``dropout``: an element is kept where its bits reach it."""
    return round(dropout * 65536)


def _philox(columns: Tensor, rows: Tensor, seed: int | Tensor) -> tuple[Tensor, ...]:
    """Philox4x32 with seven rounds of the counters (column, row, 0, 0): four words, each (rows, columns).

    Words lie in the low halves of int64 numbers: a 32 x 32-bit product wraps, but its bits do not change, so
    shift and mask still read both halves. Only a word about to be multiplied needs a clean high half, and the
    first two rounds work on one row and one column, as two of the counters are constant: six passes over the
    grid a round, in place, make this four times as fast as the plain form (5.5 ms against 23 ms at 2048 x
    1024, two Zen 3 cores).
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
    # Round 3 fills the grid of every word.
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
    """Words (0, 2), but for the key, and words (1, 3) after round 1: uint32 (2, rows * groups) each."""
    product = numpy.arange(groups, dtype=numpy.uint64) * numpy.uint64(_PHILOX_MULTIPLIER_0)
    even, odd = numpy.zeros((2, 2, rows, groups), numpy.uint32)
    even[0] = numpy.arange(rows, dtype=numpy.uint32)[:, None]
    even[1] = product >> numpy.uint64(32)
    odd[1] = product & numpy.uint64(_LOW32)
    return even.reshape(2, -1), odd.reshape(2, -1)


def _few_philox_bits(rows: int, groups: int, seed: int):
    """What :func:`_philox` computes, as numpy's uint16 (rows, groups * COLUMNS_PER_CALL).

    A round multiplies words (0, 2) in one call and reads the halves of both products as views. Crosswise,
    the high halves, xor words (1, 3), xor the key, are the new words (0, 2), and the low halves words (1, 3).
    """
    multipliers, key_steps = _philox_constants()
    keys = key_steps + numpy.array([[seed & _LOW32], [seed >> 32 & _LOW32]], numpy.uint32)
    even, odd = _philox_start(rows, groups)
    even = even ^ keys[0]
    products = numpy.empty((2, *even.shape), numpy.uint64)  # two in turns: odd is a view of the last one
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
def _few_keep(seed: int, rows: int, columns: int, threshold: int) -> Tensor:
    """The mask of few elements; remembered, as backward asks for what forward has drawn."""
    bits = _few_philox_bits(rows, -(-columns // COLUMNS_PER_CALL), seed)
    return torch.from_numpy(bits >= threshold)[:, :columns]


def shared_keep_mask(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """:func:`keep_mask` for those who only read it: others may get the same tensor."""
    threshold = keep_threshold(dropout)
    if threshold in (0, 65536):
        return torch.full((rows, columns), threshold == 0, device=seed.device)
    # On a GPU the seed stays a tensor: reading its value would wait for the device.
    on_cpu = seed.device.type == "cpu"
    key = int(seed) if on_cpu else seed.reshape(())
    if on_cpu and rows * columns <= _FEW_ELEMENTS and numpy is not None and not torch.compiler.is_compiling():
        return _few_keep(key, rows, columns, threshold)
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
        seed: int64 tensor of one element; both its halves are the Philox key.
        rows: number of rows M (tokens).
        columns: number of columns K.
        dropout: probability of dropping an element, in [0, 1], resolved to 1/65536.

    Returns:
        bool tensor (rows, columns) on ``seed``'s device, True where the element is kept.
    """
    return shared_keep_mask(seed, rows, columns, dropout).clone()


def _is_batched(seed: Tensor) -> bool:
    """Whether vmap runs over seeds, its own (randomness="different") or the caller's."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(seed)


def _functional_keep_mask(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """:func:`keep_mask` in operations for vmap and traces: nothing in place, no view of another dtype."""
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
    """What a kept element is multiplied by, 1 / (1 - p); 0 for p = 1, where none is kept."""
    return 0.0 if dropout >= 1.0 else 1.0 / (1.0 - dropout)


def project(p: Tensor, q: Tensor) -> Tensor:
    """p: (M, D) @ q: (D, R) -> (M, R), in the wider of the two dtypes."""
    dtype = torch.promote_types(p.dtype, q.dtype)
    return p.to(dtype) @ q.to(dtype)


def gemm(
    p: Tensor,
    q: Tensor,
    u: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """p: (M, D) @ q: (D, E) + scale * keep * (u: (M, R) @ v: (R, E)) + bias: (E,) -> (M, E), in p's dtype.

    ``keep``: (M, E) factors on the rank-R update, None for ones.
    """
    base = torch.mm(p, q) if bias is None else torch.addmm(bias, p, q)
    if keep is None and u.dtype == v.dtype == p.dtype:
        return torch.addmm(base, u, v, alpha=scale)
    update = project(u, v) * scale
    return (base + (update if keep is None else update * keep)).to(p.dtype)


def token_sum(p: Tensor, u: Tensor, scale: float) -> Tensor:
    """scale * p: (M, D).T @ u: (M, R) -> (D, R), in the wider of the two dtypes."""
    dtype = torch.promote_types(p.dtype, u.dtype)
    # The other way round a CPU's BLAS sums thousands of tokens in one chain, with twice the error.
    return (u.to(dtype).t() @ p.to(dtype)).t() * scale


def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The LoRA linear layer in differentiable PyTorch operations; any device, any floating dtype.

    Takes the arguments of :func:`fastlora.lora_linear` and, for the same ``seed``, drops the same elements.
    Adapters of a wider dtype than ``x`` compute their part in that dtype, as PEFT does; the result has x's
    dtype. Every gradient, second derivatives included, is PyTorch's own.

    Args:
        x: (..., K). weight: (N, K). A: (N, R). B: (R, K). bias: (N,) or None.
        alpha: the multiplier of the update (PEFT's scaling).
        dropout: probability in [0, 1] of dropping an element of the update's input.
        seed: int64 tensor of one element; drawn from torch's generator if None and dropout > 0.

    Returns:
        (..., N), in x's dtype.

    Raises:
        ValueError: a dropout outside [0, 1] or NaN.
    """
    return _lora_linear(x, _drop(x, dropout, seed), weight, A, B, alpha, bias)


def _lora_linear(
    x: Tensor, dropped: Tensor, weight: Tensor, A: Tensor, B: Tensor, alpha: float, bias: Tensor | None
) -> Tensor:
    """:func:`lora_linear` of x and drop(x). By F.linear, as inference mode has no transposed DTensors."""
    dtype = torch.promote_types(x.dtype, A.dtype)
    update = F.linear(F.linear(dropped.to(dtype), B.to(dtype)), A.to(dtype))
    return torch.add(F.linear(x, weight, bias), update, alpha=alpha).to(x.dtype)


def _drop(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """drop(x) for x: (..., K); x itself without dropout."""
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")
    if dropout == 0.0:
        return x
    if seed is None and is_traced():
        return F.dropout(x, dropout)  # what a trace would hold of a seed is the one mask that it drew
    seed = new_seed(x.device) if seed is None else seed
    columns = x.shape[-1]
    if _is_batched(seed) or is_traced():
        rows = x.reshape(-1, columns).shape[0]  # in a form that a trace records
        keep = _functional_keep_mask(seed, rows, columns, dropout)
    else:
        keep = _beside(x, shared_keep_mask(seed, x.shape[:-1].numel(), columns, dropout))
    return torch.where(keep.reshape(x.shape), x * keep_scale(dropout), x.new_zeros(()))


def is_traced() -> bool:
    """Whether torch.jit.trace records this call."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def _beside(x: Tensor, keep: Tensor) -> Tensor:
    """``keep``, which every rank computes whole, as a DTensor on x's mesh where x is one."""
    mesh = getattr(x, "device_mesh", None)
    if mesh is None:
        return keep
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(keep, mesh, [Replicate()] * mesh.ndim, run_check=False)


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    alphas: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """:func:`lora_linear` of one x by each branch; all of them drop the same elements of x.

    Args:
        x: (..., K). weights: (N_i, K). As: (N_i, R_i). Bs: (R_i, K). biases: (N_i,) or None each.
        alphas: the multiplier of each update.
        dropout, seed: as in :func:`lora_linear`.

    Returns:
        (..., N_i) for each branch, in x's dtype.
    """
    dropped = _drop(x, dropout, seed)
    biases = [None] * len(weights) if biases is None else biases
    return tuple(
        _lora_linear(x, dropped, weight, A, B, alpha, bias)
        for weight, A, B, alpha, bias in zip(weights, As, Bs, alphas, biases, strict=True)
    )


def new_seed(device: torch.device) -> Tensor:
    """A dropout seed, int64 of shape (1,), drawn from torch's generator of ``device``."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
