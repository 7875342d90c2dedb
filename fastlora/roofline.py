"""A small roofline estimate of each product, for shapes without measurements; plain arithmetic."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from fastlora.device import Device
from fastlora.kernels import configs


@dataclass(frozen=True)
class Roofline:
    """Rates of a GPU with ``sms`` multiprocessors, and the share of cuBLAS's that the classic loop reaches.

    ``tile``: seconds per tile of C spent before and after the loop, without arithmetic; 0 if a second program
    on the multiprocessor hides them.
    """

    flops: float
    bytes: float
    loop_efficiency: float
    sms: int
    tile: float = 0.0


# Dense bf16 operations and bytes per second. 90: measured on an H200 (large torch.mm, device copy); the rest
# from the vendor's data sheets: A100 SXM, A40, L40S, B200, RTX 5090. The efficiencies and times per tile are
# estimates until rows are measured; an efficiency of 0: the architecture first needs its own main loop.
ROOFLINES = {
    80: Roofline(312e12, 2.0e12, 0.95, 108),
    86: Roofline(150e12, 0.70e12, 0.95, 84),
    89: Roofline(362e12, 0.86e12, 0.95, 142),
    90: Roofline(790e12, 4.3e12, 0.92, 132, 3e-6),
    100: Roofline(2250e12, 8.0e12, 0.0, 148),
    120: Roofline(210e12, 1.79e12, 0.0, 170),
}
# GeForce cards of these architectures accumulate in fp32 at half the rate.
_GEFORCE_HALVES = (86, 89)
# Share of the nominal memory rate that large copies reach: 4.3 of 4.9 TB/s on H200, 3.0 of 3.35 on H100.
_COPY_SHARE = 0.88
# Share of the memory's rate that a skinny product reaches, and seconds per kernel launch: estimates.
_TRITON_SKINNY, _CUBLAS_SKINNY = 0.85, 0.60
LAUNCH = 4e-6
# The dropout mask: integer instructions per element, and how many a multiprocessor executes per second.
_MASK, _INTEGER_RATE = 10, 64 * 1.5e9
# The share of the loop's rate that remains with a mask, for which the widest tiles lack registers.
_MASKED_LOOP = 0.9
# Estimated lower bound on the L2 cache's speed relative to memory's, for what every program reads again.
_L2 = 1.3


@functools.cache
def roofline_of(device: Device) -> Roofline:
    """The rates of this device: an H100 and an H200 share an architecture, but not a memory bandwidth."""
    capability, sms, bandwidth = configs.nearest_capability(device.capability), device.sms, device.bandwidth
    roofline = ROOFLINES[capability]
    halved = "GeForce" in device.name and capability in _GEFORCE_HALVES
    flops = roofline.flops / 2 if halved else roofline.flops
    return dataclasses.replace(
        roofline,
        flops=flops * sms / roofline.sms if sms else flops,
        bytes=_COPY_SHARE * bandwidth if bandwidth else roofline.bytes,
        sms=max(sms, 1),
    )


def _share(programs: int, roofline: Roofline) -> float:
    """The share of the GPU's rates that this many programs can use."""
    return min(1.0, programs / roofline.sms)


def estimate_small(
    roofline: Roofline, M: int, N: int, K: int, R: int, config: configs.SmallConfig, adapter_itemsize: int = 2
) -> float:
    """Seconds for h and y together by the kernel for few tokens, in half precision.

    W is read from memory once; every program reads x and B, in its own dtype, from the L2 cache.
    """
    programs = -(-N // config.block_n)
    moved = 2 * (N * K + M * (K + N)) + adapter_itemsize * R * (K + N)
    cached = programs * K * (2 * M + adapter_itemsize * R)
    seconds = max(moved / roofline.bytes, (moved + cached) / (roofline.bytes * _L2))
    return seconds / _share(programs, roofline) + LAUNCH


def estimate(
    primitive: str,
    roofline: Roofline,
    M: int,
    D: int,
    E: int,
    R: int,
    config,
    dropped: bool = False,
    adapter_itemsize: int = 2,
) -> tuple[float, float]:
    """Seconds for one half-precision product by the kernel and by addmm.

    Each takes as long as its operations or its bytes, whichever take longer, plus its launches. A kernel with
    fewer programs than multiprocessors gets only its share of the memory's rate, its last tiles leave
    multiprocessors idle, and what its programs read again comes from the L2 cache; cuBLAS is assumed to split
    its products so that none of this happens. Nothing here was measured beyond the two rates of ``roofline``.

    ``dropped``: whether gemm's update is dropped out. ``adapter_itemsize``: bytes per element of A and B; the
    kernels read and write wider ones as they are, addmm casts them in a launch of its own.
    """
    rank = max(R, 16)  # tensor-core tiles are at least 16 wide
    sms, casts = roofline.sms, LAUNCH if adapter_itemsize > 2 else 0.0
    if primitive == "gemm":
        flops = 2 * M * E * D
        moved = 2 * (M * D + D * E + M * E)
        mask = M * E * _MASK / (_INTEGER_RATE * sms) if dropped else 0.0
        programs = -(-M // config.block_m) * -(-E // config.block_e)
        waves = -(-programs // sms)
        rate = roofline.flops * roofline.loop_efficiency * (_MASKED_LOOP if dropped else 1.0)
        triton = max(
            ((flops + 2 * M * E * rank) / rate + mask) * waves * sms / programs,
            moved / roofline.bytes / _share(programs, roofline),
        )
        triton += waves * roofline.tile + LAUNCH
        product = 2 * M * E * rank / roofline.flops
        if dropped:
            # The update kernel reads and writes the product.
            addmm = max(flops / roofline.flops, moved / roofline.bytes)
            addmm += max(product, 4 * M * E / roofline.bytes, mask)
        else:
            # The update is written first; P @ Q is added onto it and overlaps reading it with arithmetic.
            addmm = max(flops / roofline.flops, (moved + 2 * M * E) / roofline.bytes)
            addmm += max(product, 2 * M * E / roofline.bytes)
        # The kernel that adds a dropped update casts as it reads.
        return triton, addmm + 2 * LAUNCH + (0.0 if dropped else casts)
    flops = 2 * M * D * rank
    moved = 2 * (M * D + M * R + D * R)
    # Every program reads the narrow operand from the L2 cache.
    if primitive == "project":
        programs, partial, launches = -(-M // config.block_m), 0, 1
        cached = programs * D * R * adapter_itemsize
    else:
        tiles = -(-D // config.block_d)
        programs, launches = tiles * config.splits, 2
        partial = 8 * config.splits * D * R  # fp32, written and read
        cached = 2 * tiles * M * R
    triton = max(
        flops / roofline.flops,
        moved / (roofline.bytes * _TRITON_SKINNY),
        (moved + cached) / (roofline.bytes * _L2),
    )
    triton /= _share(programs, roofline)
    triton += partial / roofline.bytes + launches * LAUNCH
    # cuBLAS splits the sum over the tokens too, and adds the parts in a second launch.
    addmm = max(flops / roofline.flops, moved / (roofline.bytes * _CUBLAS_SKINNY)) + launches * LAUNCH
    return triton, addmm + casts
