"""g and dA in one launch against float64: layouts, odd sizes, regions, layers; interpreted or on a GPU."""

import dataclasses
import itertools

import pytest
import torch
from cases import (
    DTYPES,
    HALF,
    assert_matches,
    bits_equal,
    differentiate,
    dtype_id,
    eager_errors,
    exact,
    fused,
    keep_factors,
    tensors,
)
from tolerance import LAYOUTS, assert_as_accurate, lay_out

import fastlora
from fastlora import function, measured, ops, planner
from fastlora.device import Device, describe
from fastlora.kernels import configs

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# (M, N, R): one element, odd and padded sizes, whole tiles, one past them, the largest rank, whole steps.
SIZES = ((1, 1, 1), (3, 7, 2), (64, 128, 16), (129, 65, 33), (17, 200, 100), (40, 70, 256), (70, 128, 24))
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
@pytest.mark.parametrize(("M", "N", "R"), [(70, 37, 9), (72, 40, 8)])  # odd, and in eights one way round
def test_reads_only_its_views(kernel_device, M, N, R, layout, operand):
    layouts = [layout if index == operand else "contiguous" for index in range(3)]
    run(*make(kernel_device, torch.float16, M, N, R, layouts=layouts))


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


class Chosen:
    """Makes layers use the kernel by measured rows, on CPU tensors as on a GPU's; counts its launches."""

    def __init__(self, device, monkeypatch):
        from fastlora.kernels import backward

        self.launches = 0
        self._device = Device("cuda", "Test GPU", 80, 4) if device.type == "cpu" else describe(device)
        for module in (ops, function):
            monkeypatch.setattr(module, "describe", lambda device: self._device)
        launch = backward.g_and_dA

        def counted(*args):
            self.launches += 1
            return launch(*args)

        monkeypatch.setattr(backward, "g_and_dA", counted)

    def make_fastest(self, case):
        """Write the rows for a case, as ``tune`` would."""
        (N, R), (_, K), M = case.A.shape, case.B.shape, case.dy.numel() // case.dy.shape[-1]
        rows = [
            measured.Row(
                gpu=self._device.name,
                capability=self._device.capability,
                triton=measured.triton_version(),
                dtype=dtype_id(case.x.dtype),
                adapter_dtype=dtype_id(case.A.dtype),
                product="g+dA",
                M=M,
                N=N,
                K=K,
                R=R,
                dropout=False,
                path=path,
                microseconds=us,
            )
            for path, us in (("together", 1.0), ("apart", 2.0))
        ]
        measured.save_rows(measured.user_file(), rows)
        planner.forget_plans()


@pytest.fixture
def chosen(kernel_device, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    planner.forget_plans()
    yield Chosen(kernel_device, monkeypatch)
    planner.forget_plans()


def layer(device, dtypes=DTYPES[1], lead=300, N=70, K=40, R=5):
    return tensors(lead, N, K, R, *dtypes, device=device)


def assert_gradients(case, wanted=("x", "A", "B", "bias"), dropout=0.0, seed=None, dy=None):
    keep = keep_factors(seed, case, dropout) if dropout else None
    actual = differentiate(fused(0.7, dropout, seed), case, wanted, dy)
    assert_matches(actual, exact(case, 0.7, keep), eager_errors(case, 0.7, keep, wanted))
    return actual


class TestLayer:
    """The operator by the kernel, which a measured row chooses."""

    @pytest.mark.parametrize("dtypes", DTYPES[1:], ids=dtype_id)
    @pytest.mark.parametrize("lead", [1, 17, 300, (3, 43)], ids=str)
    def test_every_gradient(self, kernel_device, chosen, dtypes, lead):
        case = layer(kernel_device, dtypes, lead)
        assert not fastlora.plan(case.x, case.weight, case.A, case.B).g_with_dA
        chosen.make_fastest(case)
        plan = fastlora.plan(case.x, case.weight, case.A, case.B)
        assert plan.g_with_dA
        assert "tuned here: together 1.0 us, apart 2.0 us" in plan.g.reason
        actual = assert_gradients(case)
        assert chosen.launches == 1
        assert (actual.A.dtype, actual.B.dtype, actual.x.dtype) == (dtypes[1], dtypes[1], dtypes[0])

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    @pytest.mark.parametrize(
        "wanted", [w for n in (1, 2, 3) for w in itertools.combinations(("x", "A", "B"), n)], ids="".join
    )
    def test_gradients_in_part(self, kernel_device, chosen, monkeypatch, wanted, dropout):
        """One launch where both g and dA are needed, else only the kernel of what is."""
        case = layer(kernel_device)
        chosen.make_fastest(case)
        steps = []

        def spied(launch):
            def call(step, p, *args, **kwargs):
                if p.shape == case.dy.shape:
                    steps.append(step)
                return launch(step, p, *args, **kwargs)

            return call

        for name in ("run_project", "run_token_sum"):
            monkeypatch.setattr(ops, name, spied(getattr(ops, name)))
        assert_gradients(case, wanted, dropout, torch.tensor([5], device=kernel_device))
        together = "A" in wanted and len(wanted) > 1
        assert chosen.launches == together
        apart = ops._plan(
            kernel_device, torch.float16, torch.float16, 300, 70, 40, 5, dropout > 0, "auto"
        ).apart
        # Without dropout only BLAS calls are left then, which run as one chain.
        alone = [] if apart.all_addmm else [apart.dA if wanted == ("A",) else apart.g]
        assert apart.all_addmm is (dropout == 0.0)
        assert steps == ([] if together else alone)

    @pytest.mark.parametrize("layout", LAYOUTS[1:])
    @pytest.mark.parametrize("operand", ["dy", "A"])
    def test_strides(self, kernel_device, chosen, operand, layout):
        case = layer(kernel_device, (torch.bfloat16, torch.float32))
        chosen.make_fastest(case)
        setattr(case, operand, lay_out(getattr(case, operand), layout))
        assert_gradients(case)
        assert chosen.launches == 1

    @pytest.mark.parametrize("dtypes", DTYPES[1:], ids=dtype_id)
    def test_an_expanded_dy(self, kernel_device, chosen, dtypes):
        case = layer(kernel_device, dtypes, (2, 30))
        chosen.make_fastest(case)
        case.dy = case.dy[:1, :1].expand(2, 30, -1)
        assert_gradients(case, dy=case.dy)
        assert chosen.launches == 1

    def test_repeats(self, kernel_device, chosen):
        case = layer(kernel_device)
        chosen.make_fastest(case)
        first, second = (differentiate(fused(), case) for _ in range(2))
        assert all(bits_equal(value, getattr(second, name)) for name, value in vars(first).items())
        assert chosen.launches == 2

    def test_opcheck(self, kernel_device, chosen):
        case = layer(kernel_device, (torch.float16, torch.float32), 20)
        chosen.make_fastest(case)
        h = case.x @ case.B.t().half()
        arguments = [case.dy, case.x, case.weight, case.A, case.B, h, 0.7, 0.0, None, *[True] * 4, "auto"]
        torch.library.opcheck(torch.ops.fastlora.lora_backward.default, arguments)
        assert chosen.launches

    @pytest.mark.parametrize("mode", ["triton", "addmm", "reference"])
    def test_not_on_a_path_that_was_asked_for(self, kernel_device, chosen, mode):
        case = layer(kernel_device, lead=20)
        chosen.make_fastest(case)
        differentiate(fused(path=mode), case)
        assert not chosen.launches

    def test_a_wrong_g_shows(self, kernel_device, chosen, monkeypatch):
        case = layer(kernel_device)
        chosen.make_fastest(case)
        from fastlora.kernels import backward

        launch = backward.g_and_dA

        def scaled(dy, A, h, scale, *rest):
            g, dA = launch(dy, A, h, scale, *rest)
            return g * scale, dA

        monkeypatch.setattr(backward, "g_and_dA", scaled)
        with pytest.raises(AssertionError, match="x: max error"):
            assert_gradients(case)
