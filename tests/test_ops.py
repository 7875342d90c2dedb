"""The two operators: registration, fakes that match the real results, autocast inside."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from cases import HALF, dtype_id, every_run, tensors
from torch._subclasses import FakeTensorMode

import fastlora
from fastlora import ops, planner, reference
from fastlora.device import Device

forward = torch.ops.fastlora.lora_forward.default
backward = torch.ops.fastlora.lora_backward.default
DTYPES = ((torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.float32))
ALL = (True, True, True, True)


def forward_arguments(run, lead=(3, 5), dtypes=DTYPES[0], bias=True, dropout=0.0):
    case = tensors(lead, 24, 40, 4, *dtypes, device=run.device, bias=bias)
    seed = torch.tensor([7], device=run.device) if dropout else None
    return [case.x, case.weight, case.A, case.B, case.bias, 1.5, dropout, seed, run.path]


def backward_arguments(run, lead=(3, 5), dtypes=DTYPES[0], dropout=0.0, need=ALL):
    x, weight, A, B, bias, alpha, dropout, seed, mode = forward_arguments(run, lead, dtypes, True, dropout)
    h = forward(x, weight, A, B, bias, alpha, dropout, seed, mode)[1]
    dy = torch.randn(*lead, 24).to(x)
    # What autograd saves.
    x, weight, h = x if need[2] else None, weight if need[0] else None, h if need[1] else None
    return [dy, x, weight, A, B, h, alpha, dropout, seed, *need, mode]


def described(result):
    return [(tuple(t.shape), t.stride(), t.dtype, t.device.type) for t in result]


def assert_fake_matches(operator, arguments, device):
    real = described(operator(*arguments))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        assert described(operator(*fake)) == real
    on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    assert described(operator(*on_meta)) == [(*entry[:3], "meta") for entry in real]
    assert all(entry[3] == device for entry in real)


class TestForward:
    @every_run
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    @pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
    def test_opcheck(self, run, dropout, dtypes):
        torch.library.opcheck(forward, forward_arguments(run, dtypes=dtypes, dropout=dropout))

    @every_run
    def test_opcheck_without_bias(self, run):
        torch.library.opcheck(forward, forward_arguments(run, bias=False))

    @every_run
    @pytest.mark.parametrize("lead", [(), (0,), (1,), (70,), (2, 0), (2, 3, 4)])
    @pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
    def test_fake(self, run, lead, dtypes):
        arguments = forward_arguments(run, lead, dtypes)
        assert_fake_matches(forward, arguments, run.device)
        y, h = forward(*arguments)
        assert y.shape == (*lead, 24)
        assert h.shape == (arguments[0].numel() // 40, 4)
        assert y.dtype == h.dtype == dtypes[0]

    @every_run
    def test_fake_of_a_permuted_x(self, run):
        arguments = forward_arguments(run, (3, 5), DTYPES[1])
        arguments[0] = arguments[0].transpose(0, 1)
        assert_fake_matches(forward, arguments, run.device)

    @every_run
    @pytest.mark.parametrize("half", HALF, ids=dtype_id)
    def test_autocast_is_off_inside(self, run, half):
        arguments = forward_arguments(run)
        plain = forward(*arguments)
        with torch.autocast(run.device, half):
            inside = forward(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


NEEDS = [
    ALL,
    (True, False, False, False),
    (False, True, False, False),
    (False, False, True, False),
    (False, False, False, True),
    (False, True, True, False),
]


class TestBackward:
    @every_run
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    @pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
    def test_opcheck(self, run, dropout, dtypes):
        torch.library.opcheck(backward, backward_arguments(run, dtypes=dtypes, dropout=dropout))

    @every_run
    @pytest.mark.parametrize("need", NEEDS[1:])
    def test_opcheck_in_part(self, run, need):
        torch.library.opcheck(backward, backward_arguments(run, need=need))

    @every_run
    @pytest.mark.parametrize("need", NEEDS)
    @pytest.mark.parametrize("lead", [(), (0,), (70,), (2, 3, 4)])
    def test_fake(self, run, lead, need):
        for dtypes in DTYPES:
            assert_fake_matches(backward, backward_arguments(run, lead, dtypes, need=need), run.device)

    @every_run
    def test_fake_of_an_expanded_or_permuted_dy(self, run):
        arguments = backward_arguments(run)
        for dy in (
            arguments[0][:1, :1].expand(3, 5, 24),
            arguments[0].permute(2, 1, 0).contiguous().permute(2, 1, 0),
        ):
            arguments[0] = dy
            assert_fake_matches(backward, arguments, run.device)

    @every_run
    @pytest.mark.parametrize("half", HALF, ids=dtype_id)
    def test_autocast_is_off_inside(self, run, half):
        arguments = backward_arguments(run)
        plain = backward(*arguments)
        with torch.autocast(run.device, half):
            inside = backward(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))

    @every_run
    def test_results_are_memory_of_their_own(self, run):
        """An operator must not hand out a tensor twice, nor one of its arguments."""
        for need in NEEDS:
            arguments = backward_arguments(run, need=need)
            pointers = [
                t.data_ptr() for t in (*arguments, *backward(*arguments)) if isinstance(t, torch.Tensor)
            ]
            pointers = [pointer for pointer in pointers if pointer]
            assert len(pointers) == len(set(pointers))


@pytest.mark.parametrize(
    ("kind", "dtype", "first"),
    [
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float16, True),
        ("cuda", torch.float32, False),
        ("cpu", torch.bfloat16, False),
    ],
)
def test_when_blas_computes_the_update_first(kind, dtype, first):
    assert ops._update_first(SimpleNamespace(is_cuda=kind == "cuda", dtype=dtype)) == first


@pytest.mark.parametrize("bias", [False, True])
def test_the_large_product_comes_last_on_a_gpu(as_blas_on_a_gpu, bias):
    """It is added in place onto the update, in both directions."""
    case = tensors(64, 48, 80, 4, torch.bfloat16, bias=bias)
    for name in ("x", "A", "B"):
        getattr(case, name).requires_grad_()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        y = fastlora.lora_linear(case.x, case.weight, case.A, case.B, 1.5, case.bias)
        y.backward(case.dy)
    products = {"aten::mm", "aten::addmm", "aten::addmm_"}
    calls = [(event.name, event.input_shapes[:3]) for event in profile.events() if event.name in products]
    assert [call for call in calls if [48, 80] in call[1] or [80, 48] in call[1]] == [
        ("aten::addmm_", [[64, 48], [64, 80], [80, 48]]),
        ("aten::addmm_", [[64, 80], [64, 48], [48, 80]]),
    ]


@pytest.mark.parametrize(
    ("current", "autocast", "entered"),
    [(1, False, []), (0, False, [1]), (1, True, [1]), (0, True, [1])],
    ids=["nothing to change", "another device", "autocast", "both"],
)
def test_operators_enter_only_the_blocks_that_change_something(monkeypatch, current, autocast, entered):
    devices = []

    @contextlib.contextmanager
    def device(which):
        devices.append(which.index)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    was_on = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", autocast)
    try:
        with ops._scope(SimpleNamespace(device=torch.device("cuda", 1))):
            assert devices == entered
            assert not torch.is_autocast_enabled("cuda")
        assert torch.is_autocast_enabled("cuda") == autocast
    finally:
        torch.set_autocast_enabled("cuda", was_on)


@every_run
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("special", ["negative", "zero"])
def test_tensors_whose_memory_does_not_hold_their_values(run, rows, special):
    """The imaginary part of a conjugate is kept negated; of some zeros nothing is kept."""

    def made(shape):
        if special == "zero":
            return torch._efficientzerotensor(shape, device=run.device)
        real = torch.randn(shape, device=run.device)
        return torch.complex(real, real).conj().imag

    case = tensors(rows, 24, 40, 4, torch.float32, device=run.device)
    x, dy, bias = made((rows, 40)), made((rows, 24)), made(24)
    assert special == "zero" or (x.is_neg() and dy.is_neg() and bias.is_neg())

    def results(x, dy, bias):
        x, A, B = (t.detach().requires_grad_() for t in (x, case.A, case.B))
        with fastlora.use_path(run.path):
            y = fastlora.lora_linear(x, case.weight, A, B, 1.5, bias)
            pair = [case.weight] * 2, [A] * 2, [B] * 2, [1.0, 2.0], [bias] * 2
            ys = (y, *fastlora.lora_linear_group(x, *pair))
            return *ys, *torch.autograd.grad(ys, (x, A, B), (dy,) * 3)

    plain = [torch.zeros_like(t) if special == "zero" else t.resolve_neg() for t in (x, dy, bias)]
    for got, expected in zip(results(x, dy, bias), results(*plain), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("strides", "offset", "copied"),
    [
        ((64, 1), 0, False),
        ((80, 1), 0, False),
        ((1, 16), 0, False),
        ((0, 1), 0, False),
        ((64, 1), 8, False),
        ((64, 1), 1, True),
        ((72, 1), 0, True),
        ((1, 12), 0, True),
        ((0, 0), 0, True),
        ((128, 2), 0, True),
    ],
)
def test_activations_are_copied_where_the_kernels_would_read_them_slowly(strides, offset, copied):
    values = torch.randn(4096).half()
    p = values.as_strided((12, 64), strides, offset)
    q = ops._aligned(p)
    assert torch.equal(q, p)
    assert (q is not p) is copied
    assert ops._aligned(q) is q
    odd = values.as_strided((12, 63), (65, 1), 1)
    assert ops._aligned(odd) is odd  # a copy's rows would begin no better
    for mode in ("auto", "triton"):
        assert ops._for_kernels(p, mode) is p  # on a CPU, or asked for


@pytest.mark.parametrize("kernels", [False, True])
def test_dA_alone_of_a_plan_that_makes_it_with_g(monkeypatch, kernels):
    """Whichever plan has made h, with a kernel or without: it has dropout's factor."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off in a process with a GPU")
    M, N, K, R, p = 64, 24, 40, 4, 0.5
    case = tensors(M, N, K, R, torch.float32)
    problem = planner.Problem(Device("cpu"), torch.float32, M, N, K, R, True)
    plan = planner.make_plan(problem, "addmm")
    if kernels:
        steps = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
        plan = planner.Plan(**planner._g_with_dA(steps, planner.backward_config(problem), "measured"))
    assert plan.apart.all_addmm
    assert plan.all_addmm is not kernels
    monkeypatch.setattr(ops, "_plan", lambda *_: plan)
    seed = torch.tensor([3])
    _, h = ops._forward(case.x, case.weight, case.A, case.B, None, 1.5, p, seed, "auto")
    arguments = (case.dy, case.x, case.weight, case.A, case.B, h, 1.5, p, seed)
    dA = ops._backward(*arguments, False, True, False, False, "auto")[1]
    keep = reference.keep_mask(seed, M, K, p).double() / (1 - p)
    exact = 1.5 * case.dy.double().t() @ ((case.x.double() * keep) @ case.B.double().t())
    torch.testing.assert_close(dA.double(), exact, rtol=1e-4, atol=1e-4)


class TestFirstKernel:
    """The kernel that is tried on a GPU before a plan with kernels is used; no GPU is needed here."""

    @pytest.fixture
    def starting(self, monkeypatch):
        """Stands in for the launch: raises the exception it is called with."""
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        ops.why_no_kernel_starts.cache_clear()

        def fails_with(error):
            def start(device):
                if error is not None:
                    raise error

            monkeypatch.setattr(ops, "start_a_kernel", start)
            return ops.why_no_kernel_starts(torch.device("cuda", 7))

        yield fails_with
        ops.why_no_kernel_starts.cache_clear()

    def test_starts(self, starting):
        assert starting(None) is None

    def test_the_reason_is_one_line_and_remembered(self, starting):
        why = "no kernel starts on this GPU: RuntimeError: Failed to find C compiler."
        assert starting(RuntimeError("Failed to find C compiler.\nPlease set CC")) == why
        assert starting(None) == why

    def test_nothing_is_tried_while_a_graph_is_captured(self, monkeypatch):
        """A launch would become part of the graph, and a compilation would break the capture."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(ops, "why_no_kernel_starts", lambda device: pytest.fail("a kernel was tried"))
        assert ops.exclude_if_no_kernel_starts(torch.device("cuda", 7)) is None

    def test_a_lack_of_memory_is_no_reason(self, starting):
        for error in (torch.OutOfMemoryError("full"), RuntimeError("Triton Error [CUDA]: out of memory")):
            with pytest.raises(torch.OutOfMemoryError):
                starting(error)
        assert starting(None) is None
