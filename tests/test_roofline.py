"""The estimates that choose where nothing was measured."""

import dataclasses

import pytest

from fastlora.device import Device
from fastlora.kernels import configs
from fastlora.roofline import _INTEGER_RATE, _MASK, LAUNCH, ROOFLINES, estimate, estimate_small, roofline_of


def test_the_estimate():
    """Times are positive, grow with the work, and a faster loop or memory never costs more."""
    roofline = next(iter(ROOFLINES.values()))
    config = configs.select_gemm(80, 4096, 4096, 16, 2, False)
    small = estimate("gemm", roofline, 4096, 4096, 4096, 16, config)
    large = estimate("gemm", roofline, 4096, 8192, 4096, 16, config)
    assert all(0 < a < b for a, b in zip(small, large, strict=True))
    better = dataclasses.replace(roofline, flops=2 * roofline.flops, bytes=2 * roofline.bytes)
    faster = estimate("gemm", better, 4096, 4096, 4096, 16, config)
    assert all(a < b for a, b in zip(faster, small, strict=True))
    # Compute-bound: no less than the operations at peak rate, no more than twice that.
    floor = 2 * 4096**3 / roofline.flops
    assert all(floor < seconds < 2 * floor for seconds in small)


def test_the_last_tiles_leave_multiprocessors_idle():
    """A tile more than there are multiprocessors takes as long as twice as many."""
    roofline = ROOFLINES[80]
    config = configs.select_gemm(80, 8192, 4096, 16, 2, False)

    def seconds(rows, columns):
        return estimate("gemm", roofline, 128 * rows, 4096, 128 * columns, 16, config)[0]

    assert seconds(10, 11) == pytest.approx(seconds(12, 18), rel=0.01)
    assert seconds(12, 18) > 1.9 * seconds(9, 12)


def test_geforce_sums_at_half_the_rate():
    workstation = Device("cuda", "RTX 6000 Ada", 89, 128)
    geforce = dataclasses.replace(workstation, name="NVIDIA GeForce RTX 4090")
    for device, factor in ((workstation, 1), (geforce, 2)):
        assert roofline_of(device).flops * factor == pytest.approx(362e12 * 128 / 142)


def test_wider_adapters():
    """The kernels read more bytes, addmm takes a launch more to cast them, except in a dropped update."""
    roofline = ROOFLINES[90]
    for primitive, config, dropped in (
        ("project", configs.select_project(90, 132, 4096, 64, 2, 4), False),
        ("token_sum", configs.select_token_sum(90, 132, 4096, 4096, 64, 2), False),
        ("gemm", configs.select_gemm(90, 4096, 4096, 64, 2, False), False),
        ("gemm", configs.select_gemm(90, 4096, 4096, 64, 2, True), True),
    ):
        same, wider = (
            estimate(primitive, roofline, 4096, 4096, 4096, 64, config, dropped, itemsize)
            for itemsize in (2, 4)
        )
        assert wider[0] > same[0] if primitive == "project" else wider[0] == same[0]
        assert wider[1] - same[1] == pytest.approx(0.0 if dropped else LAUNCH)
    config = configs.select_small(90, 132, 4096, 64, 2, 4)
    narrow, wide = (estimate_small(roofline, 1, 4096, 4096, 64, config, itemsize) for itemsize in (2, 4))
    assert 1.3 * narrow < wide < 2 * narrow


def test_a_dropped_update_takes_as_long_as_its_mask():
    """In both forms, as each draws it: where memory and tensor cores cost nothing, that is all."""
    free = dataclasses.replace(ROOFLINES[80], flops=1e21, bytes=1e21)
    config = configs.select_gemm(80, 4096, 4096, 16, 2, True)
    mask = 4096 * 4096 * _MASK / (_INTEGER_RATE * free.sms)
    dropped, plain = (estimate("gemm", free, 4096, 4096, 4096, 16, config, each) for each in (True, False))
    for longer, shorter in zip(dropped, plain, strict=True):
        assert longer - shorter == pytest.approx(mask, rel=0.1)


def test_multiprocessors_are_the_devices():
    assert roofline_of(Device("cuda", "NVIDIA H100 PCIe", 90, 114)).sms == 114
