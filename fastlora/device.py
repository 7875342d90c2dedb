"""What the planner knows about a device: queried from the driver once, plain values in tests."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastlora.kernels.configs import MIN_CAPABILITY


@dataclass(frozen=True)
class Device:
    """What the planner knows about a device. ``capability``: 10 * major + minor, 0 if there is none.

    ``bandwidth``: bytes per second of its memory, from its clock and bus width; 0 if they are unknown.
    """

    kind: str
    name: str = ""
    capability: int = 0
    sms: int = 0
    rocm: bool = False
    bandwidth: float = 0.0

    @property
    def tile_capability(self) -> int:
        """The capability that tile shapes are chosen for; the oldest for the interpreter's CPU."""
        return self.capability or MIN_CAPABILITY

    @property
    def tile_sms(self) -> int:
        """The number of multiprocessors that tile shapes are chosen for; a few in the interpreter."""
        return self.sms or 8


@functools.cache
def describe(device: torch.device) -> Device:
    """What the planner needs to know about a torch device; queries the driver once for each GPU."""
    if device.type != "cuda":
        return Device(kind=device.type)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        kind="cuda",
        name=properties.name,
        capability=10 * properties.major + properties.minor,
        sms=properties.multi_processor_count,
        rocm=torch.version.hip is not None,
        bandwidth=_bandwidth(properties, device),
    )


def _bandwidth(properties, device: torch.device) -> float:
    """Bytes per second of memory with two transfers per clock; 0 if the driver's values are implausible."""
    kilohertz, bits = (getattr(properties, f"memory_{name}", 0) for name in ("clock_rate", "bus_width"))
    if not kilohertz or not bits:
        kilohertz, bits = _clock_and_width(device)
    rate = 2e3 * kilohertz * bits / 8
    return rate if 1e11 < rate < 5e13 else 0.0


def _clock_and_width(device: torch.device) -> tuple[int, int]:
    """The memory's clock in kHz and bus width in bits as Triton's driver reports them, zeros if it cannot.

    CUDA 13 took the clock out of the structure that PyTorch reads; Triton asks for it on its own.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        from triton.runtime import driver

        found = driver.active.utils.get_device_properties(index)
        return found["mem_clock_rate"], found["mem_bus_width"]
    except Exception:  # no Triton, or no C compiler for its driver: an estimate does without the rate
        return 0, 0


@contextmanager
def sums_in_float32() -> Iterator[None]:
    """While results are checked: cuBLAS adds the parts of a split half-precision product in float32.

    By default it may add them in half precision. Whether it splits depends on the layouts of the operands, so
    a product and its transpose could differ in accuracy by more than any check allows.
    """
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("fp16", "bf16")]
    before = [(getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in names]
    try:
        for name in names:
            setattr(matmul, name, False)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)
