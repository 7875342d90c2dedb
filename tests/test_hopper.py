"""The Gluon kernel for Hopper without one: its source emulated, and what the compiler makes of it."""

from pathlib import Path

import gluon_emulator
import pytest
import torch
from tolerance import assert_as_accurate

from fastlora.kernels import configs

KERNEL = Path(configs.__file__).with_name("hopper.py")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Small tiles with the proportions of the real ones keep the emulation quick.
CONFIG = configs.HopperConfig(block_m=16, block_e=32, block_d=8, block_r=8, group_m=2, slots=4, programs=3)


def matrices(M, D, E, R, dtype=torch.bfloat16, q_by_rows=False, bias=True):
    """p, q, u, v and bias as the kernel takes them."""

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).to(dtype)

    q, v = normal(E, D, scale=D**-0.5), normal(E, R, scale=R**-0.5)
    if q_by_rows:
        q, v = q.t().contiguous(), v.t().contiguous()
    return normal(M, D), q, normal(M, R), v, normal(E) if bias else None


def assert_right(M, D, E, R, dtype=torch.bfloat16, q_by_rows=False, bias=True, config=CONFIG, **options):
    p, q, u, v, b = matrices(M, D, E, R, dtype, q_by_rows, bias)
    scale = 1.5
    actual = gluon_emulator.run(KERNEL, config, p, q, u, v, scale, b, q_by_rows, **options)
    right, update = (q, v) if q_by_rows else (q.t(), v.t())

    def formula(cast):
        c = cast(p) @ cast(right) + scale * (cast(u) @ cast(update))
        return c if b is None else c + cast(b)

    assert_as_accurate(actual, formula(lambda t: t), formula(torch.Tensor.double), "c")


@pytest.mark.parametrize("q_by_rows", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("M", "D", "E", "R"),
    [(16, 8, 32, 8), (1, 1, 1, 1), (50, 41, 70, 5), (33, 8, 97, 8), (16, 80, 32, 3), (70, 24, 40, 20)],
)
def test_values(M, D, E, R, dtype, bias, q_by_rows):
    assert_right(M, D, E, R, dtype, q_by_rows, bias)


@pytest.mark.parametrize("slots", [2, 3, 5])
@pytest.mark.parametrize("programs", [1, 2, 7, 50])
def test_any_ring_and_any_number_of_programs(slots, programs):
    assert_right(
        90, 30, 130, 17, config=CONFIG.__class__(16, 32, 8, 8, 3, slots, programs), programs=programs
    )


def _free_before_waiting(module):
    """Every product is waited for one step later than its slot is freed."""
    wait = module.warpgroup_mma_wait
    module.warpgroup_mma_wait = lambda outstanding, deps: wait(outstanding + 1 if outstanding else 0, deps)


def _never_free(module):
    module.mbarrier.arrive = lambda barrier, count, pred=True: None


def _no_fence(module):
    module.fence_async_shared = lambda: None


def _no_store_wait(module):
    wait, waits = module.tma.store_wait, []

    def only_at_the_end(outstanding):
        waits.append(outstanding)
        if len(waits) % 5 == 0:  # 2 tiles of two halves, then the last wait
            wait(outstanding)

    module.tma.store_wait = only_at_the_end


def _expect_too_little(module):
    expect = module.mbarrier.expect
    module.mbarrier.expect = lambda barrier, size: expect(barrier, size // 2)


def _one_slot_ahead(module):
    step = module._next
    module._next = lambda slot, phase, slots: step(*step(slot, phase, slots), slots)


@pytest.mark.parametrize(
    "fault", [_free_before_waiting, _never_free, _no_fence, _no_store_wait, _expect_too_little]
)
def test_emulation_finds(fault, monkeypatch):
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 0.3)
    with pytest.raises((AssertionError, gluon_emulator.Deadlock)):
        assert_right(32, 80, 32, 8, programs=1, change=fault)
