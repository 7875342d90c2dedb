"""Tile shapes of the kernels: frozen values, one ``select`` per primitive, without Triton or any GPU query.

A capability is ``10 * major + minor`` (80, 86, 89, 90, 100, 120). The shapes compile for their capability
without spills and within its shared memory (checked by ``tests/test_aot.py``); which of them is fastest has
not been measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

# Shared memory that one program may use, in bytes (CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability"), for the capabilities that have configurations of their own.
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
MIN_CAPABILITY = 80
# The capabilities that the kernels are known to compile for, each with the configurations of the largest one
# above that does not exceed it.
COMPILED_FOR = (80, 86, 87, 89, 90, 100, 103, 120, 121)
MAX_RANK = 256
# The most branches that one launch of group_dx sums.
MAX_BRANCHES = 4

# The kernels read 16 bytes at a time only if sizes and strides are multiples of this many elements.
ALIGNED = 16
# Tensor-core tiles have at least 16 rows and columns, so smaller ranks are padded with zeros in registers.
_MIN_BLOCK = 16
# Bytes of dy that the programs of one region of backward share; a quarter of this on sm_86. The few regions
# in flight at a time should stay in L2, which has 6 MB on sm_86 and about 40 MB or more on the others. Not
# measured yet.
REGION_BYTES = 4 * 1024 * 1024
# The Hopper loops write C through this many buffers in shared memory.
HOPPER_BUFFERS = 2
# The most tokens for which one launch computes h and y: one tile of rows, so that W is read once.
SMALL_ROWS = 16


def _adapter_bytes(num_stages: int, elements: int, itemsize: int, adapter_itemsize: int) -> int:
    """Shared memory for the adapter tiles that a loop multiplies with operands of ``itemsize`` bytes.

    A wider adapter is converted as it is read: it has one buffer fewer, but also needs a converted copy of
    its tile.
    """
    if adapter_itemsize <= itemsize:
        return num_stages * elements * itemsize
    return elements * (max(1, num_stages - 1) * adapter_itemsize + itemsize)


@dataclass(frozen=True)
class ProjectConfig:
    """A program of project takes ``block_m`` rows of P and all ranks, ``block_d`` columns per step."""

    block_m: int
    block_d: int
    block_r: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, itemsize: int, adapter_itemsize: int = 0) -> int:
        p = self.num_stages * self.block_d * self.block_m * itemsize
        return p + _adapter_bytes(self.num_stages, self.block_d * self.block_r, itemsize, adapter_itemsize)


@dataclass(frozen=True)
class GemmConfig:
    """A program of gemm computes a (``block_m``, ``block_e``) tile of C, ``block_d`` summands per step."""

    block_m: int
    block_e: int
    block_d: int
    block_r: int
    group_m: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, itemsize: int) -> int:
        main_loop = self.num_stages * self.block_d * (self.block_m + self.block_e) * itemsize
        # The compiler allocates the update's operands in addition to the main loop's, without reuse.
        update = self.block_r * (self.block_m + self.block_e) * itemsize
        return main_loop + update


@dataclass(frozen=True)
class TokenSumConfig:
    """A program of token sum takes ``block_d`` columns of P and one of ``splits`` token ranges."""

    block_d: int
    block_m: int
    block_r: int
    splits: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, itemsize: int) -> int:
        return self.num_stages * self.block_m * (self.block_d + self.block_r) * itemsize


@dataclass(frozen=True)
class SmallConfig:
    """A program of small computes ``block_n`` columns of y for all tokens, ``block_k`` summands per step."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, itemsize: int, adapter_itemsize: int = 0) -> int:
        main_loop = self.num_stages * self.block_k * (self.block_m + self.block_n) * itemsize
        main_loop += _adapter_bytes(self.num_stages, self.block_k * self.block_r, itemsize, adapter_itemsize)
        # The update comes after the loop and reuses its shared memory.
        return max(main_loop, self.block_r * (self.block_m + self.block_n) * max(itemsize, adapter_itemsize))


@dataclass(frozen=True)
class HopperConfig:
    """``programs`` loop over (``block_m``, ``block_e``) tiles of C, reading through a ring of ``slots``.

    Two warpgroups share each tile (one team, the cooperative schedule) or take turns (two, ping-pong).
    """

    # C is written this many columns at a time, the most that one TMA box holds in the swizzled layout.
    part_e: ClassVar[int] = 64

    block_m: int
    block_e: int
    block_d: int
    block_r: int
    group_m: int
    slots: int
    programs: int
    teams: int = 1

    def shared_bytes(self, itemsize: int) -> int:
        ring = self.slots * self.block_d * (self.block_m + self.block_e) * itemsize
        c_parts = HOPPER_BUFFERS * self.block_m * self.part_e * itemsize
        return ring + c_parts + self.teams * 256  # 256 for barriers and what the warps are passed


@dataclass(frozen=True)
class HopperProjectConfig(HopperConfig):
    """A cooperative :class:`HopperConfig` whose slots also hold tiles of B or A, in half of C's memory."""

    part_e: ClassVar[int] = 32

    def shared_bytes(self, itemsize: int) -> int:
        ring = self.slots * self.block_d * self.block_r * itemsize
        return super().shared_bytes(itemsize) + ring + 4 * self.slots


@dataclass(frozen=True)
class BackwardConfig:
    """The programs of backward share a region of ``rows`` rows of dy: (M, N), a multiple of both row blocks.

    A program of g takes ``block_m`` of these rows, ``step_n`` columns per step; a program of dA takes
    ``block_n`` columns, ``step_m`` rows per step.
    """

    rows: int
    block_m: int
    step_n: int
    block_n: int
    step_m: int
    block_r: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, itemsize: int, adapter_itemsize: int = 0) -> int:
        # A program computes either g or dA, so the tiles of the two share the same memory.
        g = self.num_stages * self.step_n * self.block_m * itemsize
        g += _adapter_bytes(self.num_stages, self.step_n * self.block_r, itemsize, adapter_itemsize)
        dA = self.num_stages * self.step_m * (self.block_n + self.block_r) * itemsize
        return max(g, dA)


@dataclass(frozen=True)
class UpdateConfig:
    """A program of update adds to a (``block_m``, ``block_e``) tile of C."""

    block_m: int
    block_e: int
    block_r: int
    num_warps: int

    def shared_bytes(self, itemsize: int) -> int:
        # The last term is for converting the mask and C from one register layout to another.
        return self.block_r * (self.block_m + self.block_e) * itemsize + 4 * self.block_m * self.block_e


Config = (
    ProjectConfig | GemmConfig | TokenSumConfig | SmallConfig | HopperConfig | BackwardConfig | UpdateConfig
)


def nearest_capability(capability: int) -> int:
    """The listed capability whose configurations run on ``capability`` (>= 80): the largest not above it."""
    return max(known for known in SHARED_MEMORY if known <= capability)


def fits(config: Config, capability: int, *itemsizes: int) -> bool:
    """Whether the configuration's tiles fit into the shared memory of a GPU of this capability.

    ``itemsizes``: bytes per element and, for a kernel that reads an adapter in its own dtype, per element of
    the adapter.
    """
    return config.shared_bytes(*itemsizes) <= SHARED_MEMORY[nearest_capability(capability)]


def _first_fitting(candidates, capability: int, *itemsizes: int):
    for config in candidates:
        if fits(config, capability, *itemsizes):
            return config
    raise ValueError(f"{type(config).__name__}: none fits sm_{capability} with elements of {itemsizes} bytes")


def _rank_block(rank: int, limit: int = MAX_RANK) -> int:
    """The smallest power of two that holds ``rank``, between 16 and ``limit``."""
    return min(max(_MIN_BLOCK, 1 << (rank - 1).bit_length()), limit)


def _widest(blocks: tuple[int, ...], size: int, sms: int) -> int:
    """The widest block that still gives nine in ten multiprocessors a program; the last if none does."""
    return next((block for block in blocks[:-1] if 10 * -(-size // block) >= 9 * sms), blocks[-1])


def select_project(
    capability: int, sms: int, M: int, R: int, itemsize: int, adapter_itemsize: int = 0, dropout: bool = False
) -> ProjectConfig:
    """The configuration of project for P: (M, D) and rank R on a GPU with ``sms`` multiprocessors.

    ``adapter_itemsize``: bytes per element of Q; 0 for the same as P.
    """
    block_r = _rank_block(R)
    # Every program reads all of Q, which favours wide blocks; but saturating the memory takes many programs.
    block_m = _widest((64, 32, 16), M, sms)
    # The dropout mask is integer work, and one warp per scheduler has too little of it in flight.
    num_warps = 4 if block_m * block_r <= 64 * 128 and not (dropout and block_m == 64) else 8
    steps = ((128, 4), (128, 3), (64, 4), (64, 3), (64, 2), (32, 2))
    if (nearest_capability(capability), block_m, block_r) == (120, 32, 32) and adapter_itemsize > itemsize:
        steps = steps[2:]  # with dropout, the longer steps spill there
    return _first_fitting(
        (ProjectConfig(block_m, block_d, block_r, num_warps, num_stages) for block_d, num_stages in steps),
        capability,
        itemsize,
        adapter_itemsize,
    )


def select_gemm(capability: int, M: int, E: int, R: int, itemsize: int, dropout: bool) -> GemmConfig:
    """The configuration of gemm for C: (M, E) and rank R, and of group_dx for ranks that add up to R."""
    block_r = _rank_block(R, 64)
    block_m = next((block for block in (16, 64) if block >= M), 128)
    nearest = nearest_capability(capability)
    # wgmma is most efficient at 256 columns, but the dropout mask needs the registers that such a tile takes.
    wide = nearest in (90, 100) and block_m == 128 and E >= 512 and not dropout
    block_e = 256 if wide else 128
    num_warps = 4 if block_m * block_e <= 64 * 128 else 8
    if block_m == 64 and (nearest == 100 or (nearest != 90 and R > 128)):
        num_warps = 8  # four spill: on sm_100, and elsewhere at such ranks under Triton 3.8 and 3.9
    steps = [(num_warps, *step) for step in ((64, 3), (32, 4), (32, 3), (32, 2), (16, 2))]
    if (nearest, block_m, block_r) == (100, 64, 32) and dropout:
        steps = steps[1:]  # the longer steps spill
    if nearest not in (90, 100) and block_m == 128:
        steps = steps[1:]  # the longer steps spill with several rank blocks
        if R <= 128 and R % 8 == 0 and not dropout:  # otherwise, four warps spill
            # Two programs per multiprocessor: one computes during the other's update or final store.
            steps = [(4, 32, 4), *steps]
    return _first_fitting(
        (
            GemmConfig(block_m, block_e, block_d, block_r, 8, num_warps, num_stages)
            for num_warps, block_d, num_stages in steps
        ),
        capability,
        itemsize,
    )


def select_update(R: int) -> UpdateConfig:
    """The configuration of update for rank R."""
    block_r = _rank_block(R, 32)
    # With several rank blocks, four warps spill on sm_80 to 87 if M is not a multiple of 16.
    return UpdateConfig(block_m=64, block_e=128, block_r=block_r, num_warps=4 if R <= 32 else 8)


def select_token_sum(capability: int, sms: int, M: int, D: int, R: int, itemsize: int) -> TokenSumConfig:
    """The configuration of token sum for P: (M, D) and rank R on a GPU with ``sms`` multiprocessors."""
    block_r = _rank_block(R)
    # Every program reads all of U for its tokens: from rank 64 on, at least as much as of P.
    block_d, block_m = 128 if block_r >= 64 else 64, 64
    num_warps = 4 if block_r <= 64 else 8
    # Two programs per multiprocessor, each with at least four steps to amortise its partial sum.
    tiles = -(-D // block_d)
    splits = max(1, min(-(-2 * sms // tiles), M // (4 * block_m)))
    return _first_fitting(
        (
            TokenSumConfig(block_d, block_m, block_r, splits, num_warps, num_stages)
            for num_stages in (4, 3, 2, 1)
        ),
        capability,
        itemsize,
    )


def select_backward(
    capability: int, sms: int, M: int, N: int, R: int, itemsize: int, adapter_itemsize: int = 0
) -> BackwardConfig:
    """The configuration of backward for dy: (M, N) and rank R on a GPU with ``sms`` multiprocessors.

    ``adapter_itemsize``: bytes per element of A; 0 for the same as dy.
    """
    block_r = _rank_block(R)
    block_m = 64 if M >= 64 * 64 else 16
    block_n = step_m = 64
    num_warps = 4 if block_r <= 64 else 8
    at = nearest_capability(capability), block_r
    if at in ((86, 256), (89, 256), (100, 128)) or (at == (80, 256) and adapter_itemsize > itemsize):
        step_m = 32  # the longer steps spill there
    # A region should stay in L2 while its programs run, but has at least four steps, and enough rows that the
    # partial sums move at most half the bytes of dy. Within these limits: two programs per multiprocessor.
    tiles = -(-N // block_n)
    regions = max(1, -(-(2 * sms - M // block_m) // tiles))
    region_bytes = REGION_BYTES // 4 if nearest_capability(capability) == 86 else REGION_BYTES
    blocks = min(region_bytes // (N * itemsize), M // regions) // 64
    rows = 64 * min(max(4, block_r // 8, blocks), -(-M // 64))
    return _first_fitting(
        (
            BackwardConfig(rows, block_m, step_n, block_n, step_m, block_r, num_warps, num_stages)
            for step_n, num_stages in (
                (128, 4),
                (128, 3),
                (64, 4),
                (64, 3),
                (64, 2),
                (32, 2),
                (64, 1),
                (32, 1),
            )
        ),
        capability,
        itemsize,
        adapter_itemsize,
    )


def select_small(
    capability: int, sms: int, N: int, R: int, itemsize: int, adapter_itemsize: int = 0
) -> SmallConfig:
    """The configuration of small for y: (at most 16, N) and rank R on a GPU with ``sms`` multiprocessors.

    ``adapter_itemsize``: bytes per element of A and B; 0 for the same as x.
    """
    # With 16 columns, every warp would compute the whole tile of h, and that of y as well.
    block_r = max(32, _rank_block(R))
    # Every program reads all of x and B.
    block_n = _widest((64, 32, 16), N, sms)
    return _first_fitting(
        (
            SmallConfig(SMALL_ROWS, block_n, block_k, block_r, 4, num_stages)
            for block_k, num_stages in ((128, 5), (128, 4), (64, 5), (64, 4), (64, 3), (32, 3), (32, 2))
        ),
        capability,
        itemsize,
        adapter_itemsize,
    )


def select_hopper(sms: int, R: int, teams: int = 1) -> HopperConfig:
    """The configuration of hopper for rank R in half precision on a GPU with ``sms`` multiprocessors."""
    # A team holds its tile in registers, 128 per thread: the tile of one warpgroup is half as wide.
    block_e, slots = (256, 4) if teams == 1 else (128, 6)
    return HopperConfig(
        block_m=128,
        block_e=block_e,
        block_d=64,
        block_r=_rank_block(R, 64),
        group_m=8,
        slots=slots,
        programs=sms,
        teams=teams,
    )


def select_hopper_project(sms: int, R: int) -> HopperProjectConfig:
    """The configuration of hopper_project for rank R in half precision, ValueError above rank 32."""
    if R > 32:
        raise ValueError(f"hopper_project: expected a rank of up to 32, got {R}")  # shared memory
    return HopperProjectConfig(**asdict(select_hopper(sms, R)))
