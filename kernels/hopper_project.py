"""project and gemm with rank-R update for Hopper (sm_90a) in one launch: U = s * P @ Z, C = P @ Q + U @ V.

P: (M, D), U: (M, R), C: (M, E), in bfloat16; C may have a bias. Q, V and Z are read in their memory layout:
in the forward pass (U is alpha * h, C is y) they are W: (E, D), A: (E, R) and B: (R, D), in the backward pass
(U is alpha * g, C is dx) W: (D, E), B: (R, E) and A: (D, R). U contains s and is rounded once, so the update
is the main loop's last step, without a pass over the accumulator. (In float16, s could make U overflow.)

The loop is that of the cooperative schedule in :mod:`fastlora.kernels.hopper`, but a tile of C may compute
its rows of U from the tiles of P that it reads anyway, with no second pass over P. This takes an eighth
longer (each product of 16 or 32 columns reads P from shared memory again), but few tiles do it. Those of C's
first column come first, always do it, and write U. Any other tile looks at the state of its rows as it
starts: while nobody is computing them, it does this for itself, with the same bits. Otherwise it waits for
them at its end. They are then being computed by a program that runs and waits for no one, so this ends
however few programs the GPU runs at a time.

    owns[slot]    whether the tile that begins in this slot computes U
    states[m]     of BLOCK_M rows of U: 0, 1 when a program has started on them, 2 when they are written

What one multiprocessor stores and another loads by TMA goes through the state (release and acquire) and a
proxy fence on either side.

This kernel has not run on a GPU yet, and nothing chooses it: benchmarks/gpu.py times it.
"""

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

from fastlora.kernels import hopper
from fastlora.kernels.configs import HOPPER_BUFFERS, HopperProjectConfig
from fastlora.kernels.hopper import (
    WARPS,
    add_bias,
    async_load,
    descriptor,
    grouped_tile,
    next_slot,
    operands,
    slot_before,
    store_tile,
)

C_BUFFERS = gl.constexpr(HOPPER_BUFFERS)
# Gluon renamed this between triton 3.6 and 3.7.
barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def _tile(number, tiles_m, tiles_e, GROUP_M: gl.constexpr):
    """Map a tile number to the tile (m, e): all tiles of the first column, then the others in groups."""
    first = number < tiles_m
    m, e = grouped_tile(gl.maximum(number - tiles_m, 0), tiles_m, gl.maximum(tiles_e - 1, 1), GROUP_M)
    return gl.where(first, number, m), gl.where(first, 0, e + 1)


@gluon.jit
def _fenced(value):
    """``value``, after a fence between this thread's ordinary accesses to global memory and those of TMA."""
    return gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [value], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _wait_for_state(pointer, least):
    """Wait until the state is at least ``least``, and let TMA read what was stored before it was set."""
    gl.inline_asm_elementwise(
        """{
            .reg .pred done;
            .reg .b32 state;
        again:
            ld.acquire.gpu.global.b32 state, [$1];
            setp.ge.s32 done, state, $2;
            @!done bra again;
            fence.proxy.async.global;
            mov.b32 $0, state;
        }""",
        "=r,l,r",
        [pointer.to(gl.int64), least],
        gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _producer(rings, owns, sizes, inputs, states_ptr, GROUP_M: gl.constexpr, Q_BY_ROWS: gl.constexpr):
    p_ring, q_ring, z_ring, ready, empty = rings
    M, D, E = sizes
    p_desc, q_desc, z_desc, u_desc, v_desc = inputs
    SLOTS: gl.constexpr = p_ring.shape[0]
    BLOCK_M: gl.constexpr = p_ring.shape[1]
    BLOCK_D: gl.constexpr = p_ring.shape[2]
    BLOCK_E: gl.constexpr = q_ring.shape[2 if Q_BY_ROWS else 1]
    BOTH: gl.constexpr = p_desc.block_type.nbytes + q_desc.block_type.nbytes
    ALL: gl.constexpr = BOTH + z_desc.block_type.nbytes
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_e = gl.cdiv(E, BLOCK_E)
    slot = 0
    phase = 0
    for number in range(gl.program_id(0), tiles_m * tiles_e, gl.num_programs(0)):
        tile_m, tile_e = _tile(number, tiles_m, tiles_e, GROUP_M)
        m = tile_m * BLOCK_M
        e = tile_e * BLOCK_E
        first = tile_e == 0
        state = gl.atomic_add(states_ptr + tile_m, gl.where(first, 1, 0), sem="acquire", scope="gpu")
        state = _fenced(state)  # if U is written, TMA may read it
        own = first | (state == 0)
        reads = (tile_e > 0) & (state > 0)
        mbarrier.wait(empty.index(slot), phase ^ 1)
        owns.index(slot).store(gl.full([1], own.to(gl.int32), gl.int32, ONE))
        for d in range(0, D, BLOCK_D):
            mbarrier.wait(empty.index(slot), phase ^ 1)
            full = ready.index(slot)
            mbarrier.expect(full, ALL, pred=own)
            mbarrier.expect(full, BOTH, pred=reads)
            async_load(p_desc, [m, d], full, p_ring.index(slot))
            if Q_BY_ROWS:
                async_load(q_desc, [d, e], full, q_ring.index(slot))
                async_load(z_desc, [d, 0], full, z_ring.index(slot), pred=own)
            else:
                async_load(q_desc, [e, d], full, q_ring.index(slot))
                async_load(z_desc, [0, d], full, z_ring.index(slot), pred=own)
            slot, phase = next_slot(slot, phase, SLOTS)
        mbarrier.wait(empty.index(slot), phase ^ 1)
        full = ready.index(slot)
        mbarrier.expect(full, q_desc.block_type.nbytes, pred=own)
        mbarrier.expect(full, BOTH, pred=reads)
        if Q_BY_ROWS:
            async_load(v_desc, [0, e], full, q_ring.index(slot))
        else:
            async_load(v_desc, [e, 0], full, q_ring.index(slot))
        if reads & (state < 2):  # not once U is written: asking again would delay the next tile's loads
            _wait_for_state(states_ptr + tile_m, 2)
        async_load(u_desc, [m, 0], full, p_ring.index(slot), pred=reads)
        slot, phase = next_slot(slot, phase, SLOTS)


@gluon.jit
def _multiply(rings, D, slot, phase, BLOCK_R: gl.constexpr, Q_BY_ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """A tile of P @ Q + U @ V, with U read."""
    p_ring, q_ring, _, ready, empty = rings
    SLOTS: gl.constexpr = p_ring.shape[0]
    BLOCK_M: gl.constexpr = p_ring.shape[1]
    BLOCK_D: gl.constexpr = p_ring.shape[2]
    BLOCK_E: gl.constexpr = q_ring.shape[2 if Q_BY_ROWS else 1]
    acc = gl.zeros((BLOCK_M, BLOCK_E), gl.float32, LAYOUT)
    for d in range(0, D, BLOCK_D):
        mbarrier.wait(ready.index(slot), phase)
        p, q = operands(slot, p_ring, q_ring, BLOCK_D, Q_BY_ROWS)
        acc = warpgroup_mma(p, q, acc, is_async=True)
        # All products before this one have finished, so the previous slot is free.
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index(slot_before(slot, SLOTS)), count=1, pred=d > 0)
        slot, phase = next_slot(slot, phase, SLOTS)
    mbarrier.wait(ready.index(slot), phase)
    u, v = operands(slot, p_ring, q_ring, BLOCK_R, Q_BY_ROWS)
    acc = warpgroup_mma(u, v, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(slot_before(slot, SLOTS)), count=1)
    mbarrier.arrive(empty.index(slot), count=1)
    slot, phase = next_slot(slot, phase, SLOTS)
    return acc, slot, phase


@gluon.jit
def _project_and_multiply(
    rings, D, slot, phase, scale, BLOCK_R: gl.constexpr, Q_BY_ROWS: gl.constexpr, LAYOUT: gl.constexpr
):
    """A tile of P @ Q + U @ V, and the tile of U = s * P @ Z that enters it."""
    p_ring, q_ring, z_ring, ready, empty = rings
    SLOTS: gl.constexpr = p_ring.shape[0]
    BLOCK_M: gl.constexpr = p_ring.shape[1]
    BLOCK_D: gl.constexpr = p_ring.shape[2]
    BLOCK_E: gl.constexpr = q_ring.shape[2 if Q_BY_ROWS else 1]
    U_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_R, 16])
    acc = gl.zeros((BLOCK_M, BLOCK_E), gl.float32, LAYOUT)
    total = gl.zeros((BLOCK_M, BLOCK_R), gl.float32, U_LAYOUT)
    for d in range(0, D, BLOCK_D):
        mbarrier.wait(ready.index(slot), phase)
        p, q = operands(slot, p_ring, q_ring, BLOCK_D, Q_BY_ROWS)
        z = z_ring.index(slot) if Q_BY_ROWS else z_ring.index(slot).permute((1, 0))
        total = warpgroup_mma(p, z, total, is_async=True)
        acc = warpgroup_mma(p, q, acc, is_async=True)
        acc, total = warpgroup_mma_wait(2, deps=(acc, total))
        mbarrier.arrive(empty.index(slot_before(slot, SLOTS)), count=1, pred=d > 0)
        slot, phase = next_slot(slot, phase, SLOTS)
    acc, total = warpgroup_mma_wait(0, deps=(acc, total))
    mbarrier.arrive(empty.index(slot_before(slot, SLOTS)), count=1)
    u = (total * scale).to(p_ring.dtype)
    mbarrier.wait(ready.index(slot), phase)
    _, v = operands(slot, p_ring, q_ring, BLOCK_R, Q_BY_ROWS)
    left = gl.convert_layout(u, gl.DotOperandLayout(0, LAYOUT, 2))
    acc = warpgroup_mma(left, v, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(slot), count=1)
    slot, phase = next_slot(slot, phase, SLOTS)
    return acc, u, slot, phase


@gluon.jit
def _publish(u, u_ptr, states_ptr, tile_m, M, R):
    """Store a tile of U and set the state of its rows."""
    BLOCK_M: gl.constexpr = u.shape[0]
    BLOCK_R: gl.constexpr = u.shape[1]
    LAYOUT: gl.constexpr = u.type.layout
    offs_m = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    offs_r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, LAYOUT))
    offs_m = gl.expand_dims(offs_m, 1)
    offs_r = gl.expand_dims(offs_r, 0)
    gl.store(u_ptr + offs_m.to(gl.int64) * R + offs_r, u, mask=(offs_m < M) & (offs_r < R))
    one = _fenced(1)
    barrier()  # one thread sets the state, all have stored and fenced
    gl.atomic_add(states_ptr + tile_m, one, sem="release", scope="gpu")


@gluon.jit
def _consumer(
    rings, owns, sizes, output, u_ptr, states_ptr, scale, R,
    BLOCK_R: gl.constexpr, GROUP_M: gl.constexpr, Q_BY_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    p_ring, q_ring, _, ready, _ = rings
    M, D, E = sizes
    c_desc, c_buffers, bias_ptr = output
    BLOCK_M: gl.constexpr = p_ring.shape[1]
    BLOCK_E: gl.constexpr = q_ring.shape[2 if Q_BY_ROWS else 1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_E, 16])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_e = gl.cdiv(E, BLOCK_E)
    slot = 0
    phase = 0
    for number in range(gl.program_id(0), tiles_m * tiles_e, gl.num_programs(0)):
        tile_m, tile_e = _tile(number, tiles_m, tiles_e, GROUP_M)
        mbarrier.wait(ready.index(slot), phase)
        own = gl.max(owns.index(slot).load(ONE), 0)
        if own != 0:
            acc, u, slot, phase = _project_and_multiply(
                rings, D, slot, phase, scale, BLOCK_R, Q_BY_ROWS, LAYOUT
            )
            if tile_e == 0:
                _publish(u, u_ptr, states_ptr, tile_m, M, R)
        else:
            acc, slot, phase = _multiply(rings, D, slot, phase, BLOCK_R, Q_BY_ROWS, LAYOUT)

        if HAS_BIAS:
            acc = add_bias(acc, bias_ptr, tile_e * BLOCK_E, E, LAYOUT)
        store_tile(c_desc, c_buffers, acc.to(c_desc.dtype), tile_m * BLOCK_M, tile_e * BLOCK_E, 0, C_BUFFERS)
    tma.store_wait(0)


@gluon.jit
def _hopper_project_kernel(
    p_desc, q_desc, z_desc, u_desc, v_desc, c_desc, u_ptr, states_ptr, bias_ptr, scale, M, D, E, R,
    BLOCK_R: gl.constexpr, GROUP_M: gl.constexpr, SLOTS: gl.constexpr,
    Q_BY_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    p_ring = gl.allocate_shared_memory(p_desc.dtype, [SLOTS] + p_desc.block_type.shape, p_desc.layout)  # noqa: RUF005
    q_ring = gl.allocate_shared_memory(q_desc.dtype, [SLOTS] + q_desc.block_type.shape, q_desc.layout)  # noqa: RUF005
    z_ring = gl.allocate_shared_memory(z_desc.dtype, [SLOTS] + z_desc.block_type.shape, z_desc.layout)  # noqa: RUF005
    c_buffers = gl.allocate_shared_memory(c_desc.dtype, [C_BUFFERS] + c_desc.block_type.shape, c_desc.layout)  # noqa: RUF005
    owns = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    fence_async_shared()  # makes the barriers visible to TMA
    rings = (p_ring, q_ring, z_ring, ready, empty)
    sizes = (M, D, E)
    inputs = (p_desc, q_desc, z_desc, u_desc, v_desc)
    output = (c_desc, c_buffers, bias_ptr)
    # The two lists of numbers are the producer's warps and registers per thread, the minimum.
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    rings,
                    owns,
                    sizes,
                    output,
                    u_ptr,
                    states_ptr,
                    scale,
                    R,
                    BLOCK_R,
                    GROUP_M,
                    Q_BY_ROWS,
                    HAS_BIAS,
                ),
            ),
            (_producer, (rings, owns, sizes, inputs, states_ptr, GROUP_M, Q_BY_ROWS)),
        ],
        [1],
        [24],
    )


def blocks(config: HopperProjectConfig, q_by_rows: bool) -> dict[str, list[int]]:
    """The shape of the tile that each descriptor reads or writes."""
    z = [config.block_d, config.block_r] if q_by_rows else [config.block_r, config.block_d]
    return {**hopper.blocks(config, q_by_rows), "z_desc": z}


def project_and_gemm(
    p: torch.Tensor,
    q: torch.Tensor,
    z: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    config: HopperProjectConfig,
    bias: torch.Tensor | None = None,
    q_by_rows: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """p: (M, D), bias: (E,) -> c: (M, E), u: (M, R), in p's dtype, contiguous.

    q: (E, D), v: (E, R) and z: (R, D), or (D, E), (R, E) and (D, R) if ``q_by_rows``; all in bfloat16.
    ``why_not`` of :mod:`fastlora.kernels.hopper` must return None for the matrices, M, D, E > 0, E and R
    multiples of 8, R at most 32, bias contiguous and scale finite.
    """
    (M, D), R = p.shape, z.shape[1] if q_by_rows else z.shape[0]
    E = q.shape[1] if q_by_rows else q.shape[0]
    c = torch.empty((M, E), dtype=p.dtype, device=p.device)
    u = torch.empty((M, R), dtype=p.dtype, device=p.device)
    tiles_m = triton.cdiv(M, config.block_m)
    states = torch.zeros(tiles_m, dtype=torch.int32, device=p.device)
    block = blocks(config, q_by_rows)
    tiles = tiles_m * triton.cdiv(E, config.block_e)
    _hopper_project_kernel[(min(config.programs, tiles),)](
        descriptor(p, block["p_desc"]),
        descriptor(q, block["q_desc"]),
        descriptor(z, block["z_desc"]),
        descriptor(u, block["u_desc"]),
        descriptor(v, block["v_desc"]),
        descriptor(c, block["c_desc"]),
        u, states, bias, scale, M, D, E, R,
        BLOCK_R=config.block_r, GROUP_M=config.group_m, SLOTS=config.slots,
        Q_BY_ROWS=q_by_rows, HAS_BIAS=bias is not None,
        num_warps=WARPS.value,
    )  # fmt: skip
    return c, u
