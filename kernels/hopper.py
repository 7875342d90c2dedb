"""gemm with rank-R update for Hopper (sm_90a), in Gluon: C = s * (U @ V) + P @ Q + bias.

P: (M, D), U: (M, R), C: (M, E). Q and V are read in their memory layout: in the forward pass (y = x @ W.T
+ ...) they are W: (E, D) and A: (E, R), in the backward pass (dx = dy @ W + ...) W: (D, E) and B: (R, E).

One persistent program per multiprocessor loops over tiles of C. A producer warp fills a ring of shared-memory
slots by TMA; two warpgroups multiply directly from the slots. The tiles of U and V pass through the same
slots ahead of those of P and Q: the accumulator starts as the update, is scaled in registers, and the main
loop continues from there. TMA fills elements outside a matrix with zeros, so no loop has a mask, and only
BLOCK_R columns of a slot enter the update. C is written 64 columns at a time by TMA stores that overlap what
follows, through two buffers: those of the only team in turn, or one for each of two teams.

There are two schedules. Cooperative: the warpgroups are one team, each with half the rows of every tile.
Ping-pong: each warpgroup is a team of its own with every second tile, and one team scales and stores its tile
while the other's main loop runs.

    ready[slot]   full:  the bytes that the producer expects have arrived   (a team waits for it)
    empty[slot]   free:  the product that read the slot has finished        (the producer waits for it)
    turn[team]    open:  the other team has seen all slots of its tile      (the team waits for it)

A wait names only the parity of a phase, so it must begin less than two phases ahead. The ring alone does not
ensure this for two teams, as one would wait for slots that the other has yet to see; the turns do.

This kernel has not run on a GPU yet: it compiles (benchmarks/static.py), and the form that the compiler gives
it, TTGIR, is emulated (tests/test_hopper.py). The planner therefore chooses it only on request
(FASTLORA_HOPPER=1), in the cooperative schedule.
"""

import functools

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastlora.kernels.configs import HOPPER_BUFFERS, HopperConfig

# Gluon renamed these two between triton 3.8 and 3.9.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

WARPS = gl.constexpr(8)  # the two warpgroups that multiply
# TMA reads and writes only rows that begin at multiples of 16 bytes.
TMA_ALIGNMENT = 16
C_BUFFERS = gl.constexpr(HOPPER_BUFFERS)


@gluon.jit
def grouped_tile(number, tiles_m, tiles_e, GROUP_M: gl.constexpr):
    """Map a tile number to the tile (m, e), GROUP_M rows of tiles at a time, as in fastlora.kernels.tiles."""
    tiles_in_group = GROUP_M * tiles_e
    first_m = (number // tiles_in_group) * GROUP_M
    rows_in_group = gl.minimum(tiles_m - first_m, GROUP_M)
    place = number % tiles_in_group
    return first_m + place % rows_in_group, place // rows_in_group


@gluon.jit
def next_slot(slot, phase, SLOTS: gl.constexpr):
    """The next slot and the parity of its barriers, which flips once per pass around the ring."""
    last = slot == SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def slot_before(slot, SLOTS: gl.constexpr):
    """The slot before ``slot``.

    Not a variable that the loop sets to ``slot``: Triton would take it for a constant of the loop.
    """
    return gl.where(slot == 0, SLOTS - 1, slot - 1)


@gluon.jit
def _skip(slot, phase, steps, SLOTS: gl.constexpr):
    """:func:`next_slot`, ``steps`` times."""
    place = slot + steps
    return place % SLOTS, phase ^ (place // SLOTS & 1)


@gluon.jit
def _fill(p_desc, q_desc, m, e, d, slot, phase, p_ring, q_ring, ready, empty, Q_BY_ROWS: gl.constexpr):
    """Once a slot is free, load into it the tile of P at (m, d) and the matching tile of Q."""
    mbarrier.wait(empty.index(slot), phase ^ 1)
    full = ready.index(slot)
    mbarrier.expect(full, p_desc.block_type.nbytes + q_desc.block_type.nbytes)
    async_load(p_desc, [m, d], full, p_ring.index(slot))
    if Q_BY_ROWS:
        async_load(q_desc, [d, e], full, q_ring.index(slot))
    else:
        async_load(q_desc, [e, d], full, q_ring.index(slot))


@gluon.jit
def _producer(ring, sizes, inputs, RANK_STEPS: gl.constexpr, GROUP_M: gl.constexpr, Q_BY_ROWS: gl.constexpr):
    p_ring, q_ring, ready, empty = ring
    M, D, E = sizes
    p_desc, q_desc, u_desc, v_desc = inputs
    SLOTS: gl.constexpr = p_ring.shape[0]
    BLOCK_M: gl.constexpr = p_ring.shape[1]
    BLOCK_D: gl.constexpr = p_ring.shape[2]
    BLOCK_E: gl.constexpr = q_ring.shape[2 if Q_BY_ROWS else 1]
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_e = gl.cdiv(E, BLOCK_E)
    slot = 0
    phase = 0
    for number in range(gl.program_id(0), tiles_m * tiles_e, gl.num_programs(0)):
        tile_m, tile_e = grouped_tile(number, tiles_m, tiles_e, GROUP_M)
        m = tile_m * BLOCK_M
        e = tile_e * BLOCK_E
        for step in range(RANK_STEPS):
            _fill(u_desc, v_desc, m, e, step * BLOCK_D, slot, phase, p_ring, q_ring, ready, empty, Q_BY_ROWS)
            slot, phase = next_slot(slot, phase, SLOTS)
        for d in range(0, D, BLOCK_D):
            _fill(p_desc, q_desc, m, e, d, slot, phase, p_ring, q_ring, ready, empty, Q_BY_ROWS)
            slot, phase = next_slot(slot, phase, SLOTS)


@gluon.jit
def operands(slot, p_ring, q_ring, DEPTH: gl.constexpr, Q_BY_ROWS: gl.constexpr):
    """Views of a slot's first DEPTH summands, (BLOCK_M, DEPTH) and (DEPTH, BLOCK_E); no data is moved."""
    p = p_ring.index(slot).slice(0, DEPTH, dim=1)
    if Q_BY_ROWS:
        q = q_ring.index(slot).slice(0, DEPTH, dim=0)
    else:
        q = q_ring.index(slot).slice(0, DEPTH, dim=1).permute((1, 0))
    return p, q


@gluon.jit
def add_bias(acc, bias_ptr, e, E, LAYOUT: gl.constexpr):
    """acc, a tile of C from column ``e`` on, + bias: (E,)."""
    offs_e = e + gl.arange(0, acc.shape[1], gl.SliceLayout(0, LAYOUT))
    bias = gl.load(bias_ptr + offs_e, mask=offs_e < E, other=0.0)
    return acc + gl.expand_dims(bias.to(gl.float32), 0)


@gluon.jit
def _halves(c):
    """The left and the right half of a tile, in registers; no data is moved."""
    return gl.split(gl.permute(gl.reshape(c, (c.shape[0], 2, c.shape[1] // 2)), (0, 2, 1)))


@gluon.jit
def store_tile(c_desc, c_buffers, c, m, e, FIRST: gl.constexpr, BUFFERS: gl.constexpr):
    """Write a tile of C in 2, 4 or 8 parts, through BUFFERS buffers from FIRST on in turn.

    A buffer is written again once the store that reads it has done so.
    """
    PART_E: gl.constexpr = c_desc.block_type.shape[1]
    PARTS: gl.constexpr = c.shape[1] // PART_E
    parts = _halves(c)
    if PARTS >= 4:
        parts = _halves(parts[0]) + _halves(parts[1])
    if PARTS == 8:
        parts = _halves(parts[0]) + _halves(parts[1]) + _halves(parts[2]) + _halves(parts[3])
    for i in gl.static_range(PARTS):
        buffer = c_buffers.index(FIRST + i % BUFFERS)
        tma.store_wait(BUFFERS - 1)
        buffer.store(parts[i])
        fence_async_shared()
        async_store(c_desc, [m, e + i * PART_E], buffer)


@gluon.jit
def _consumer(
    ring, sizes, output, turn,
    BLOCK_R: gl.constexpr, RANK_STEPS: gl.constexpr, GROUP_M: gl.constexpr, Q_BY_ROWS: gl.constexpr,
    HAS_BIAS: gl.constexpr, TEAM: gl.constexpr, TEAMS: gl.constexpr,
):  # fmt: skip
    p_ring, q_ring, ready, empty = ring
    M, D, E = sizes
    c_desc, c_buffers, bias_ptr, scale = output
    SLOTS: gl.constexpr = p_ring.shape[0]
    BLOCK_D: gl.constexpr = p_ring.shape[2]
    BLOCK_M: gl.constexpr = p_ring.shape[1]
    BLOCK_E: gl.constexpr = q_ring.shape[2 if Q_BY_ROWS else 1]
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS // TEAMS, 1], [16, BLOCK_E, 16])
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_e = gl.cdiv(E, BLOCK_E)
    steps = RANK_STEPS + gl.cdiv(D, BLOCK_D)
    slot = 0
    phase = 0
    if TEAM > 0:
        slot, phase = _skip(slot, phase, steps, SLOTS)
    # The first team need not wait for its first turn, so its parities are one phase behind.
    turn_phase = TEAM ^ 1
    first = gl.program_id(0) + TEAM * gl.num_programs(0)
    for number in range(first, tiles_m * tiles_e, TEAMS * gl.num_programs(0)):
        tile_m, tile_e = grouped_tile(number, tiles_m, tiles_e, GROUP_M)
        acc = gl.zeros((BLOCK_M, BLOCK_E), gl.float32, ACC_LAYOUT)
        if TEAMS > 1:
            mbarrier.wait(turn.index(TEAM), turn_phase)
            turn_phase ^= 1
        for _ in range(RANK_STEPS):
            mbarrier.wait(ready.index(slot), phase)
            u, v = operands(slot, p_ring, q_ring, BLOCK_R, Q_BY_ROWS)
            acc = warpgroup_mma(u, v, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(slot), count=1)
            slot, phase = next_slot(slot, phase, SLOTS)
        acc = acc * scale

        for d in range(0, D, BLOCK_D):
            mbarrier.wait(ready.index(slot), phase)
            p, q = operands(slot, p_ring, q_ring, BLOCK_D, Q_BY_ROWS)
            acc = warpgroup_mma(p, q, acc, is_async=True)
            # All products before this one have finished, so the previous slot is free.
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index(slot_before(slot, SLOTS)), count=1, pred=d > 0)
            slot, phase = next_slot(slot, phase, SLOTS)
        last = slot_before(slot, SLOTS)
        if TEAMS > 1:
            mbarrier.arrive(turn.index(TEAM ^ 1), count=1)
            slot, phase = _skip(slot, phase, steps, SLOTS)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(last), count=1)

        if HAS_BIAS:
            acc = add_bias(acc, bias_ptr, tile_e * BLOCK_E, E, ACC_LAYOUT)
        c = acc.to(c_desc.dtype)
        BUFFERS: gl.constexpr = C_BUFFERS // TEAMS
        store_tile(c_desc, c_buffers, c, tile_m * BLOCK_M, tile_e * BLOCK_E, TEAM * BUFFERS, BUFFERS)
    tma.store_wait(0)


@gluon.jit
def _hopper_kernel(
    p_desc, q_desc, u_desc, v_desc, c_desc, bias_ptr, scale, M, D, E,
    BLOCK_R: gl.constexpr, RANK_STEPS: gl.constexpr, GROUP_M: gl.constexpr, SLOTS: gl.constexpr,
    Q_BY_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, TEAMS: gl.constexpr,
):  # fmt: skip
    p_ring = gl.allocate_shared_memory(p_desc.dtype, [SLOTS] + p_desc.block_type.shape, p_desc.layout)  # noqa: RUF005
    q_ring = gl.allocate_shared_memory(q_desc.dtype, [SLOTS] + q_desc.block_type.shape, q_desc.layout)  # noqa: RUF005
    c_buffers = gl.allocate_shared_memory(c_desc.dtype, [C_BUFFERS] + c_desc.block_type.shape, c_desc.layout)  # noqa: RUF005
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [TEAMS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    for team in gl.static_range(TEAMS):
        mbarrier.init(turn.index(team), count=1)
    fence_async_shared()  # makes the barriers visible to TMA
    ring = (p_ring, q_ring, ready, empty)
    sizes = (M, D, E)
    inputs = (p_desc, q_desc, u_desc, v_desc)
    output = (c_desc, c_buffers, bias_ptr, scale)
    # The two lists of numbers are the other partitions' warps and registers per thread: the producer has the
    # minimum, and the first team gets what is left.
    if TEAMS == 1:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (ring, sizes, output, turn, BLOCK_R, RANK_STEPS, GROUP_M, Q_BY_ROWS, HAS_BIAS, 0, TEAMS),
                ),
                (_producer, (ring, sizes, inputs, RANK_STEPS, GROUP_M, Q_BY_ROWS)),
            ],
            [1],
            [24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (ring, sizes, output, turn, BLOCK_R, RANK_STEPS, GROUP_M, Q_BY_ROWS, HAS_BIAS, 0, TEAMS),
                ),
                (
                    _consumer,
                    (ring, sizes, output, turn, BLOCK_R, RANK_STEPS, GROUP_M, Q_BY_ROWS, HAS_BIAS, 1, TEAMS),
                ),
                (_producer, (ring, sizes, inputs, RANK_STEPS, GROUP_M, Q_BY_ROWS)),
            ],
            [4, 1],
            [240, 24],
        )


def blocks(config: HopperConfig, q_by_rows: bool) -> dict[str, list[int]]:
    """The shape of the tile that each descriptor reads or writes."""
    rows = [config.block_m, config.block_d]
    columns = [config.block_d, config.block_e] if q_by_rows else [config.block_e, config.block_d]
    part = [config.block_m, config.part_e]
    return {"p_desc": rows, "q_desc": columns, "u_desc": rows, "v_desc": columns, "c_desc": part}


def team_warps(config: HopperConfig) -> int:
    """The warps of one team, with which the kernel is launched."""
    return WARPS.value // config.teams


def why_not(*matrices: torch.Tensor) -> str | None:
    """The reason why TMA cannot read these matrices in place; None if it can."""
    for matrix in matrices:
        if matrix.dtype not in (torch.float16, torch.bfloat16) or matrix.dtype != matrices[0].dtype:
            return f"TMA ring: {', '.join(str(m.dtype) for m in matrices)}, expected one half-precision dtype"
        step = matrix.stride(0) * matrix.element_size()
        overlap = matrix.shape[0] > 1 and matrix.stride(0) < matrix.shape[1]  # expanded rows, for example
        if matrix.stride(1) != 1 or overlap or step % TMA_ALIGNMENT or matrix.data_ptr() % TMA_ALIGNMENT:
            return (
                f"TMA ring: shape {tuple(matrix.shape)}, strides {matrix.stride()}: rows must be contiguous, "
                f"apart and begin at multiples of {TMA_ALIGNMENT} bytes"
            )
    return None


def descriptor(matrix: torch.Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, block, _layout(*block, matrix.dtype))


@functools.cache  # Making one takes three times as long as the rest of a descriptor.
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([rows, columns], element)


def gemm(
    p: torch.Tensor,
    q: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    config: HopperConfig,
    bias: torch.Tensor | None = None,
    q_by_rows: bool = False,
) -> torch.Tensor:
    """p: (M, D), u: (M, R), bias: (E,) -> (M, E) in p's dtype, contiguous.

    q: (E, D) and v: (E, R), or (D, E) and (R, E) if ``q_by_rows``. :func:`why_not` must return None for the
    matrices, M, D, E > 0, E a multiple of 8, and bias contiguous.
    """
    (M, D), R = p.shape, u.shape[1]
    E = q.shape[1] if q_by_rows else q.shape[0]
    if not R:
        u, v = p, q  # No update, for the benchmarks. Never read, but a descriptor needs a nonempty matrix.
    c = torch.empty((M, E), dtype=p.dtype, device=p.device)
    block = blocks(config, q_by_rows)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(E, config.block_e)
    _hopper_kernel[(min(config.programs, tiles),)](
        descriptor(p, block["p_desc"]),
        descriptor(q, block["q_desc"]),
        descriptor(u, block["u_desc"]),
        descriptor(v, block["v_desc"]),
        descriptor(c, block["c_desc"]),
        bias, scale, M, D, E,
        BLOCK_R=config.block_r, RANK_STEPS=triton.cdiv(R, config.block_d), GROUP_M=config.group_m,
        SLOTS=config.slots, Q_BY_ROWS=q_by_rows, HAS_BIAS=bias is not None, TEAMS=config.teams,
        num_warps=team_warps(config),
    )  # fmt: skip
    return c
