"""g and dA in one launch against float64: every layout, odd sizes, regions; interpreted or on a GPU."""

import dataclasses

import pytest
import torch
from tolerance import LAYOUTS, assert_as_accurate, lay_out

from fastlora.kernels import configs

pytestmark = pytest.mark.usefixtures("poisoned_empty")

HALF = (torch.float16, torch.bfloat16)
# (M, N, R): one element, odd and padded sizes, whole tiles, one past them, the largest rank.
SIZES = ((1, 1, 1), (3, 7, 2), (64, 128, 16), (129, 65, 33), (17, 200, 100), (40, 70, 256))
SCALE = 0.7


def capability(device):
    if device.type == "cpu":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def make(device, dtype, M, N, R, *, layouts=("contiguous",) * 3, adapter=None):
    """dy: (M, N), A: (N, R), h: (M, R), each in its layout."""
    sizes = ((M, N, dtype, 1.0), (N, R, adapter or dtype, N**-0.5), (M, R, dtype, M**-0.5))
    return [
        lay_out((torch.randn(rows, columns) * scale).to(dtype).to(device), layout)
        for (rows, columns, dtype, scale), layout in zip(sizes, layouts, strict=True)
    ]


def select(dy, R, **changes):
    config = configs.select_backward(capability(dy.device), 8, *dy.shape, R, 2)
    return dataclasses.replace(config, **changes)


def run(dy, A, h, config=None):
    """Launch once and compare; returns the results."""
    from fastlora.kernels.backward import g_and_dA

    g, dA = g_and_dA(dy, A, h, SCALE, config or select(dy, A.shape[1]), A.dtype)
    assert (g.dtype, dA.dtype) == (dy.dtype, A.dtype)
    assert g.is_contiguous()
    assert dA.is_contiguous()
    assert_as_accurate(g, dy @ A.to(dy.dtype), dy.double() @ A.double(), "g")
    eager = dy.to(A.dtype).t() @ (h.to(A.dtype) * SCALE)
    assert_as_accurate(dA, eager, SCALE * (dy.double().t() @ h.double()), "dA")
    return g, dA


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("M", "N", "R"), SIZES)
def test_against_float64(kernel_device, dtype, M, N, R):
    run(*make(kernel_device, dtype, M, N, R))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("operand", range(3))
def test_reads_only_its_views(kernel_device, layout, operand):
    layouts = [layout if index == operand else "contiguous" for index in range(3)]
    run(*make(kernel_device, torch.float16, 70, 37, 9, layouts=layouts))


@pytest.mark.parametrize("dtype", HALF)
def test_adapter_of_a_wider_dtype(kernel_device, dtype):
    run(*make(kernel_device, dtype, 100, 64, 8, adapter=torch.float32))


@pytest.mark.parametrize("M", [256, 257, 300, 321, 383, 384])
@pytest.mark.parametrize("block_m", [16, 64])
def test_regions(kernel_device, M, block_m):
    """Several regions, the last one of every length: a few rows, less than a block, whole."""
    dy, A, h = make(kernel_device, torch.float16, M, 70, 8, adapter=torch.float32)
    run(dy, A, h, select(dy, 8, rows=128, block_m=block_m))


def test_the_regions_that_select_chooses(kernel_device):
    dy, A, h = make(kernel_device, torch.float16, 600, 40, 8)
    assert -(-len(dy) // select(dy, 8).rows) > 1
    run(dy, A, h)


def test_same_values_as_the_separate_launches(kernel_device):
    """Bit for bit: where the tiles are the same, so is every order of summation."""
    from fastlora.kernels.backward import g_and_dA
    from fastlora.kernels.project import project
    from fastlora.kernels.token_sum import token_sum

    dy, A, h = make(kernel_device, torch.float16, 300, 130, 12)
    config = select(dy, 12, rows=128)
    g, dA = g_and_dA(dy, A, h, SCALE, config, torch.float32)
    rest = {name: getattr(config, name) for name in ("block_r", "num_warps", "num_stages")}
    apart = configs.ProjectConfig(block_m=config.block_m, block_d=config.step_n, **rest)
    sums = configs.TokenSumConfig(block_d=config.block_n, block_m=config.step_m, splits=3, **rest)
    assert torch.equal(g, project(dy, A, apart))
    assert torch.equal(dA, token_sum(dy, h, SCALE, sums, torch.float32))


def test_is_deterministic(kernel_device):
    dy, A, h = make(kernel_device, torch.float16, 500, 64, 8)
    config = select(dy, 8, rows=128)
    first = run(dy, A, h, config)
    for _ in range(2):
        assert all(map(torch.equal, first, run(dy, A, h, config)))


def launch_first(monkeypatch, programs):
    """From now on only the first ``programs`` programs of the kernel run."""
    from fastlora.kernels import backward

    class First:
        def __getitem__(self, grid):
            assert programs < grid[0]
            return kernel[(programs,)]

    kernel = backward._backward_kernel
    monkeypatch.setattr(backward, "_backward_kernel", First())
    return backward


@pytest.mark.parametrize("regions", [1, 2])
def test_the_programs_of_a_region_are_neighbours(kernel_device, monkeypatch, regions):
    """The first programs write g and dA of the first regions, all of these and nothing else."""
    dy, A, h = make(kernel_device, torch.float16, 300, 130, 8)
    config = select(dy, 8, rows=128, block_m=64)
    backward = launch_first(monkeypatch, regions * (128 // 64 + 3))
    monkeypatch.setattr(backward, "reduce_partials", lambda partial, scale, dtype: partial)
    g, partial = backward.g_and_dA(dy, A, h, SCALE, config, torch.float32)
    assert len(partial) == 3
    assert torch.isfinite(g[: regions * 128]).all()
    assert torch.isfinite(partial[:regions]).all()
    assert g[regions * 128 :].isnan().all()
    assert partial[regions:].isnan().all()


def test_a_missing_program_shows(kernel_device, monkeypatch):
    dy, A, h = make(kernel_device, torch.float16, 300, 64, 8)
    launch_first(monkeypatch, 3)
    with pytest.raises(AssertionError, match="not finite"):
        run(dy, A, h, select(dy, 8, rows=128))


@pytest.mark.parametrize("rank", [1, 16, 17, 128, 256])
@pytest.mark.parametrize("arch", sorted(configs.SHARED_MEMORY))
def test_every_configuration_fits_its_architecture(arch, rank):
    for itemsize in (2, 4):
        for M in (1, 17, 512, 8192, 10**6):
            for N in (1, 1024, 4096, 14336, 10**6):
                config = configs.select_backward(arch, 108, M, N, rank, itemsize)
                assert config.shared_bytes(itemsize) <= configs.SHARED_MEMORY[arch]
                assert config.rows % config.block_m == 0
                assert config.rows % config.step_m == 0


@pytest.mark.parametrize("rank", [16, 64, 256])
def test_partial_sums_move_less_than_dy(rank):
    """They are fp32, written and read; dy is half precision, read once."""
    for N in (1024, 4096, 14336):
        config = configs.select_backward(90, 132, 8192, N, rank, 2)
        assert 2 * 4 * rank * N <= config.rows * N * 2 / 2


@pytest.mark.parametrize(("arch", "cache"), [(80, 40), (86, 6), (90, 50)])
def test_a_region_is_small_beside_the_cache(arch, cache):
    """cache: MB of L2. A region takes a fifth at the most, or 256 rows, and there are programs enough."""
    for N in (1024, 4096, 14336):
        config = configs.select_backward(arch, 108, 8192, N, 16, 2)
        assert config.rows * N * 2 <= max(cache * 2**20 // 5, 256 * N * 2)
        assert 8192 // config.rows * -(-N // config.block_n) + 8192 // config.block_m >= 2 * 108
