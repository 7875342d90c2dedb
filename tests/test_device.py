"""What the planner is told of a device."""

from types import SimpleNamespace

import pytest
import torch

from fastlora.device import describe, sums_in_float32


@pytest.mark.parametrize(
    ("properties", "bandwidth"),
    [
        ({"memory_clock_rate": 3_201_000, "memory_bus_width": 6144}, 4.917e12),
        ({"memory_clock_rate": 0, "memory_bus_width": 6144}, 0.0),
        ({"memory_clock_rate": 3_201_000_000, "memory_bus_width": 6144}, 0.0),
        ({}, 0.0),
    ],
)
def test_bandwidth(properties, bandwidth, monkeypatch):
    given = SimpleNamespace(name="X", major=9, minor=0, multi_processor_count=132, **properties)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: given)
    device = describe.__wrapped__(torch.device("cuda", 0))
    assert device.bandwidth == pytest.approx(bandwidth, rel=1e-3)
    assert (device.capability, device.sms) == (90, 132)


def test_bandwidth_by_triton(monkeypatch):
    """CUDA 13 does not tell PyTorch the memory's clock; Triton asks for it on its own."""
    driver = pytest.importorskip("triton.runtime").driver
    known = {0: {"mem_clock_rate": 2_619_000, "mem_bus_width": 5120}}
    fake = SimpleNamespace(utils=SimpleNamespace(get_device_properties=known.__getitem__))
    monkeypatch.setattr(type(driver), "active", property(lambda self: fake))
    given = SimpleNamespace(name="X", major=9, minor=0, multi_processor_count=132, memory_bus_width=5120)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: given)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for device in (torch.device("cuda", 0), torch.device("cuda")):
        assert describe.__wrapped__(device).bandwidth == pytest.approx(3.352e12, rel=1e-3)
    assert describe.__wrapped__(torch.device("cuda", 1)).bandwidth == 0.0


def test_sums_in_float32_is_undone():
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    values = [(False, True), (True, True)]

    def flags():
        return [(getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in names]

    before = flags()
    try:
        for name, value in zip(names, values, strict=True):
            setattr(matmul, name, value)
        with sums_in_float32():
            assert flags() == [(False, True)] * 2
        assert flags() == values
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)
