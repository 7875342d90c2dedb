"""The one-launch forward of few tokens against float64, alone and inside the layer."""

import pytest
import torch
from cases import HALF, assert_matches, differentiate, dtype_id, eager_errors, exact, fused, tensors
from tolerance import LAYOUTS, assert_as_accurate, lay_far_apart, lay_out

import fastlora
from fastlora import ops, planner
from fastlora.device import Device
from fastlora.kernels import configs
from fastlora.planner import Problem, make_plan
from fastlora.roofline import ROOFLINES, estimate_small

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# (M, N, K, R): one element, odd and padded sizes, whole tiles, one past them, several rank blocks' worth,
# padded sizes after whole steps.
SIZES = (
    (1, 1, 1, 1),
    (3, 7, 5, 2),
    (16, 128, 256, 16),
    (15, 65, 130, 33),
    (1, 40, 200, 100),
    (7, 33, 70, 256),
    (6, 100, 384, 24),
)
ALPHA = 0.7


def capability(device):
    if device.type == "cpu":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(case, *, sms=8, alpha=ALPHA):
    """y and h of a case by the kernel itself."""
    from fastlora.kernels.small import small

    N, R = case.A.shape
    config = configs.select_small(capability(case.x.device), sms, N, R, case.x.element_size())
    return small(case.x, case.weight, case.A, case.B, alpha, config, case.bias)


def check(case, y, h, alpha=ALPHA):
    dtype = case.x.dtype
    A, B = case.A.to(dtype), case.B.to(dtype)
    eager_h = case.x @ B.T
    eager_y = case.x @ case.weight.T + alpha * (eager_h @ A.T)
    if case.bias is not None:
        eager_y = eager_y + case.bias
    assert y.dtype == h.dtype == dtype
    assert y.is_contiguous()
    assert h.is_contiguous()
    assert_as_accurate(h, eager_h, case.x.double() @ case.B.double().T, "h")
    assert_as_accurate(y, eager_y, exact(case, alpha).y, "y")


class TestKernel:
    @pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
    @pytest.mark.parametrize(("M", "N", "K", "R"), SIZES)
    def test_against_float64(self, kernel_device, dtype, M, N, K, R):
        case = tensors(M, N, K, R, dtype, device=kernel_device)
        check(case, *launch(case))

    @pytest.mark.parametrize("sms", [1, 4, 132])
    def test_every_width(self, kernel_device, sms):
        """The tile is 64, 32 or 16 columns wide, and the last one is not full; only the first writes h."""
        case = tensors(5, 100, 40, 8, torch.float16, device=kernel_device)
        widths = {1: 64, 4: 32, 132: 16}
        config = configs.select_small(80, sms, 100, 8, 2)
        assert config.block_n == widths[sms]
        check(case, *launch(case, sms=sms))

    @pytest.mark.parametrize("layout", LAYOUTS[1:])
    @pytest.mark.parametrize("operand", ["x", "weight", "A", "B"])
    def test_reads_only_its_views(self, kernel_device, operand, layout):
        case = tensors(6, 45, 70, 9, torch.float16, device=kernel_device)
        setattr(case, operand, lay_out(getattr(case, operand), layout))
        check(case, *launch(case))

    @pytest.mark.parametrize("operand", ["x", "weight", "A", "B"])
    def test_rows_beyond_31_bits(self, kernel_device, operand, tmp_path):
        case = tensors(3, 3, 20, 3, torch.float16, device=kernel_device)
        setattr(case, operand, lay_far_apart(getattr(case, operand), tmp_path))
        check(case, *launch(case))

    def test_reads_only_its_bias(self, kernel_device):
        case = tensors(6, 45, 70, 9, torch.float16, device=kernel_device)
        case.bias = lay_out(case.bias.reshape(1, -1), "strided")[0]
        check(case, *launch(case))

    @pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
    def test_without_bias_and_with_wide_adapters(self, kernel_device, dtype):
        case = tensors(4, 72, 64, 8, dtype, torch.float32, kernel_device, bias=False)
        check(case, *launch(case))

    def test_float32(self, kernel_device):
        case = tensors(4, 40, 64, 8, device=kernel_device)
        check(case, *launch(case))

    def test_y_is_made_of_the_h_that_it_returns(self, kernel_device):
        """Backward differentiates the h it is given: rounding another one into y would be a small lie."""
        case = tensors(16, 48, 64, 4, torch.float16, device=kernel_device, bias=False)
        case.weight.zero_()
        case.A = torch.eye(48, 4, dtype=torch.float16, device=kernel_device)
        y, h = launch(case, alpha=1.0)
        assert torch.equal(y[:, :4], h)
        assert not y[:, 4:].any()
        # In a difference of near columns the rounding of each shows.
        case.B[1] = case.B[0] * 1.01
        case.A = torch.tensor([[1.0, -1.0, 0.0, 0.0]], device=kernel_device).half().repeat(48, 1)
        y, h = launch(case, alpha=1.0)
        assert torch.equal(y, (h[:, :1].double() - h[:, 1:2].double()).half().expand(16, 48))

    @pytest.mark.parametrize("value", [float("inf"), float("-inf")])
    def test_infinity_stays_infinity(self, kernel_device, value):
        """Times the zeros that pad the rank it would be NaN."""
        case = tensors(2, 5, 16, 3, torch.float16, device=kernel_device)
        for matrix in (case.weight, case.A, case.B):
            matrix.abs_()
        case.x[1, 0] = value
        for result in launch(case):
            assert result[0].isfinite().all()
            assert result[1].eq(value).all()

    def test_is_deterministic(self, kernel_device):
        case = tensors(16, 130, 300, 16, torch.float16, device=kernel_device)
        first = launch(case)
        for _ in range(2):
            assert all(map(torch.equal, first, launch(case)))

    def test_refuses_more_tokens_than_a_tile_holds(self, kernel_device):
        with pytest.raises(ValueError, match="17 rows"):
            launch(tensors(17, 8, 8, 2, torch.float16, device=kernel_device))

    @pytest.mark.parametrize("rank", [1, 16, 17, 64, 128, 256])
    @pytest.mark.parametrize("arch", sorted(configs.SHARED_MEMORY))
    def test_every_configuration_fits_its_architecture(self, arch, rank):
        for itemsize in (2, 4):
            for N in (1, 1024, 4096, 14336, 10**6):
                config = configs.select_small(arch, 132, N, rank, itemsize)
                assert configs.fits(config, arch, itemsize)
                assert config.block_m == configs.SMALL_ROWS

    def test_enough_programs(self):
        """The widest tile with which most multiprocessors still have one."""
        for N, width in ((512, 16), (1024, 16), (4096, 32), (14336, 64), (128256, 64)):
            config = configs.select_small(90, 132, N, 16, 2)
            assert config.block_n == width


class TestLayer:
    @pytest.fixture
    def launches(self, monkeypatch):
        """How often the layer launches the kernel."""
        count = []
        launch_small = ops.run_small
        monkeypatch.setattr(ops, "run_small", lambda *a: count.append(1) or launch_small(*a))
        return count

    @pytest.mark.parametrize("adapter_dtype", [torch.float16, torch.float32], ids=dtype_id)
    @pytest.mark.parametrize("lead", [(1,), (16,), (2, 3), (70,)])
    def test_values_and_gradients(self, kernel_device, launches, lead, adapter_dtype):
        M = torch.Size(lead).numel()
        case = tensors(lead, 50, 70, 9, torch.float16, adapter_dtype, kernel_device)
        actual = differentiate(fused(ALPHA, path="triton"), case)
        assert len(launches) == (M <= configs.SMALL_ROWS)
        assert_matches(actual, exact(case, ALPHA), eager_errors(case, ALPHA))

    def test_one_vector(self, kernel_device, launches):
        case = tensors((), 50, 70, 9, torch.float16, device=kernel_device)
        with torch.no_grad():
            y = fused(ALPHA, path="triton")(case.x, case.weight, case.A, case.B, case.bias)
        assert launches
        assert y.shape == (50,)
        case.x, case.dy = case.x[None], case.dy[None]
        assert_as_accurate(y[None], launch(case)[0], exact(case, ALPHA).y)

    @pytest.mark.parametrize(("dropout", "M"), [(0.5, 4), (0.0, 0), (0.0, 17)])
    def test_where_it_cannot_run(self, kernel_device, launches, dropout, M):
        case = tensors(M, 50, 70, 9, torch.float16, device=kernel_device)
        y = fused(ALPHA, dropout, path="triton")(case.x, case.weight, case.A, case.B)
        assert not launches
        assert y.shape == (M, 50)
        assert torch.isfinite(y).all()


H100 = Device("cuda", "H100", 90, 132)
A100 = Device("cuda", "A100", 80, 108)
B200 = Device("cuda", "B200", 100, 148)
# (device, M, N, K, R, whether one launch makes h and y), each with a margin in the estimate.
PINS = [
    (H100, 1, 4096, 4096, 16, True),
    (H100, 16, 4096, 4096, 16, True),
    (H100, 1, 14336, 4096, 16, True),
    (H100, 1, 1024, 4096, 8, True),
    (A100, 1, 4096, 4096, 16, True),
    (H100, 17, 4096, 4096, 16, False),
    (H100, 512, 4096, 4096, 16, False),
    (H100, 1, 4096, 4096, 128, False),
    (H100, 16, 4096, 14336, 64, False),
    (A100, 16, 8192, 8192, 64, False),
    (B200, 1, 4096, 4096, 16, False),
]


class TestPlan:
    @pytest.mark.parametrize(("device", "M", "N", "K", "R", "expected"), PINS)
    def test_pins(self, device, M, N, K, R, expected):
        plan = make_plan(Problem(device, torch.bfloat16, M, N, K, R))
        assert plan.one_launch is expected
        if expected:
            assert plan.path == plan.h.path == "triton"
            assert plan.h.config is plan.y.config
            assert "one launch" in plan.y.reason
            assert "estimated for sm_" in plan.reason
            assert "inside y" in plan.h.reason
            assert (plan.h.primitive, plan.y.primitive) == ("project", "gemm")
        else:
            assert not isinstance(plan.h.config, configs.SmallConfig)

    def test_dropout_and_empty_layers_go_other_ways(self):
        assert make_plan(Problem(H100, torch.bfloat16, 1, 4096, 4096, 16)).one_launch
        for change in ({"dropout": True}, {"M": 0}, {"N": 0}, {"K": 0}):
            sizes = {"M": 1, "N": 4096, "K": 4096, "R": 16, **change}
            for mode in ("auto", "triton"):
                assert not make_plan(Problem(H100, torch.bfloat16, **sizes), mode).one_launch

    def test_asked_for(self):
        problem = Problem(H100, torch.bfloat16, 16, 4096, 4096, 256)
        assert make_plan(problem, "triton").one_launch
        assert not make_plan(problem, "addmm").one_launch
        with fastlora.use_path("triton"):
            case = tensors(2, 8, 8, 2, torch.float16)
            if planner.interpreting():
                assert fastlora.plan(case.x, case.weight, case.A, case.B).one_launch

    def test_the_estimate(self):
        """It grows with the rank and the tokens (L2 traffic), and is never below one reading of W."""
        roofline = ROOFLINES[90]

        def seconds(M, R):
            config = configs.select_small(90, 132, 4096, R, 2)
            return estimate_small(roofline, M, 4096, 4096, R, config)

        assert 2 * 4096**2 / roofline.bytes < seconds(1, 16) < seconds(1, 64) < seconds(16, 64)
        assert seconds(1, 64) < seconds(1, 256)
