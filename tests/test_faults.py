"""Around a layer: NaN and Inf, failed allocations, threads and streams, odd inputs, mixed dtypes."""

import gc
import itertools
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from cases import (
    CUDA,
    DTYPES,
    HALF,
    RUNS,
    bits_equal,
    differentiate,
    dtype_id,
    eager,
    every_run,
    exact,
    fused,
    keep_factors,
    tensors,
)
from hypothesis import HealthCheck, given, settings
from tolerance import lay_out

import fastlora
import fastlora.ops
from fastlora import masks, paths, reference

NAMES = ("y", "x", "A", "B", "bias")
OPERANDS = ("x", "weight", "A", "B", "bias", "dy")


def assert_same_non_finite(ours, theirs, signs=True):
    """The same elements are NaN and infinite, by sign unless ``signs`` is off."""
    for name in NAMES:
        mine, stock = getattr(ours, name), getattr(theirs, name)
        for kind in ("isnan", "isposinf", "isneginf") if signs else ("isnan", "isinf"):
            assert torch.equal(getattr(mine, kind)(), getattr(stock, kind)()), (name, kind)


class TestNonFinite:
    """Beyond one value in float16, which test_function has: dtypes, tiles, several values, dropout."""

    @every_run
    @pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("operand", OPERANDS)
    def test_elements_of_eager(self, run, dtypes, operand):
        """NaN, Inf and -Inf in rows and columns of their own, on both sides of a tile's edge."""
        # An even rank: without AVX512-BF16 oneDNN pads bfloat16 sums to pairs, and Inf times padding is NaN.
        case = tensors(70, 72, 66, 6, *dtypes, device=run.device)
        poisoned = getattr(case, operand).clone()
        last = tuple(size - 1 for size in poisoned.shape)
        for where, value in ((0, float("nan")), (1, float("inf")), (2, float("-inf"))):
            index = tuple(where if axis % 2 else size - where for axis, size in enumerate(last))
            poisoned[index] = value
        setattr(case, operand, poisoned)
        ours, theirs = differentiate(fused(0.5, path=run.path), case), differentiate(eager(0.5), case)
        assert any(not getattr(theirs, name).isfinite().all() for name in NAMES)
        # Adapters rounded to x's dtype may turn the sign of a g near zero, which Inf makes visible.
        assert_same_non_finite(ours, theirs, signs=dtypes[0] == dtypes[1])

    @every_run
    @pytest.mark.parametrize("operand", OPERANDS)
    def test_under_dropout(self, run, operand):
        """Between the oracle, where a dropped element is not read, and eager, where 0 * NaN is NaN."""
        case = tensors(40, 24, 70, 5, torch.float16, device=run.device)
        poisoned = getattr(case, operand).clone()
        poisoned[(0,) * poisoned.dim()] = float("nan")
        setattr(case, operand, poisoned)
        seed = torch.tensor([12], device=run.device)

        def oracle(x, weight, A, B, bias):
            return reference.lora_linear(x, weight, A, B, 0.5, bias, 0.5, seed)

        ours = differentiate(fused(0.5, 0.5, seed, run.path), case)
        least = differentiate(oracle, case)
        most = differentiate(eager(0.5, keep_factors(seed, case, 0.5)), case)
        for name in NAMES:
            nan = getattr(ours, name).isnan()
            assert not (getattr(least, name).isnan() & ~nan).any(), name
            assert not (nan & ~getattr(most, name).isnan()).any(), name
        assert torch.equal(ours.y.isnan(), most.y.isnan())

    @every_run
    def test_dropout_does_not_overflow_g(self, run):
        """dy @ A fits float16 and, times 1 / (1 - p), does not; eager PyTorch never stores that."""
        case = tensors(40, 24, 70, 4, torch.float16, device=run.device)
        case.A.fill_(1.0)
        case.dy.fill_(45000 / 24)
        case.x, case.B = case.x * 1e-4, case.B * 1e-2
        seed = torch.tensor([12], device=run.device)
        ours = differentiate(fused(1.0, 0.5, seed, run.path), case)
        theirs = differentiate(eager(1.0, keep_factors(seed, case, 0.5)), case)
        for name in ("x", "A", "B"):
            assert getattr(theirs, name).isfinite().all(), name
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-2, atol=0.5)

    @every_run
    def test_one_bad_token_stays_alone(self, run):
        """A NaN in one token changes no other token's output or dx, bit for bit."""
        case = tensors(70, 24, 66, 5, torch.float16, device=run.device)
        clean = differentiate(fused(0.5, path=run.path), case)
        case.x = case.x.clone()
        case.x[33] = float("nan")
        bad = differentiate(fused(0.5, path=run.path), case)
        others = torch.arange(70, device=run.device) != 33
        assert bad.y[33].isnan().all()
        assert torch.equal(bad.y[others], clean.y[others])
        assert torch.equal(bad.x, clean.x)
        assert torch.equal(bad.A.isnan(), torch.ones_like(bad.A, dtype=torch.bool))
        assert torch.equal(bad.bias, clean.bias)

    @every_run
    def test_unused_adapter_of_zeros_keeps_infinity(self, run):
        """A = 0 at the start of training: 0 * Inf is NaN in eager PyTorch, and here."""
        case = tensors(9, 24, 40, 4, torch.float16, device=run.device)
        case.A.zero_()
        case.B[0, 0] = float("inf")
        ours, theirs = differentiate(fused(0.5, path=run.path), case), differentiate(eager(0.5), case)
        assert theirs.y.isnan().any()
        assert_same_non_finite(ours, theirs)


def failing(real, fail_at, counter, error):
    """``real``, but the call number ``fail_at`` of all that share the counter raises."""

    def function(*args, **kwargs):
        if next(counter) == fail_at:
            raise error
        return real(*args, **kwargs)

    return function


class TestOutOfMemory:
    # Where each path allocates: the functions around the products, and what the kernels' launchers call.
    PLACES = (
        (torch, "mm"),
        (torch, "addmm"),
        (torch, "empty"),
        (torch.nn.functional, "linear"),
        (torch.Tensor, "addmm_"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "addcmul_"),
        (torch.Tensor, "contiguous"),
    )

    @every_run
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_every_allocation_may_fail(self, run, dropout, autocast):
        """Nothing is changed or kept by a step that fails anywhere; the next one is right."""
        layer = fastlora.FusedLoRALinear(40, 24, 4, dropout=dropout, device=run.device)
        torch.nn.init.normal_(layer.A)
        x = torch.randn(12, 40, device=run.device)
        state = {name: value.clone() for name, value in layer.state_dict().items()}

        def step():
            torch.manual_seed(3)
            leaf = x.clone().requires_grad_()
            with fastlora.use_path(run.path), torch.autocast(run.device, torch.bfloat16, enabled=autocast):
                y = layer(leaf)
            y.float().square().mean().backward()
            result = y.detach(), leaf.grad, layer.A.grad, layer.B.grad
            layer.zero_grad()
            return result

        expected = step()
        failures = 0
        for fail_at in itertools.count():
            with pytest.MonkeyPatch.context() as patch:
                counter = itertools.count()
                error = torch.OutOfMemoryError("out of memory, says the test")
                for owner, name in self.PLACES:
                    patch.setattr(owner, name, failing(getattr(owner, name), fail_at, counter, error))
                try:
                    step()
                    break
                except torch.OutOfMemoryError:
                    failures += 1
            assert layer.A.grad is None or not layer.A.grad.isnan().any()
            layer.zero_grad()
            assert paths.current_mode() == "auto"
            assert torch.is_grad_enabled()
            assert not torch.is_autocast_enabled(run.device)
            for name, value in layer.state_dict().items():
                assert torch.equal(value, state[name]), name
            for ours, theirs in zip(step(), expected, strict=True):
                assert bits_equal(ours, theirs)
        assert failures >= 4

    @pytest.mark.parametrize("path", ["auto", "reference", "triton"])
    def test_no_memory_for_the_output(self, path):
        """A real one: the tokens are one row repeated, the output would need petabytes."""
        if path == "triton" and CUDA:
            pytest.skip("the interpreter is off in a process with a GPU")
        case = tensors(1, 64, 40, 4)
        function = fused(0.5, path=path)
        expected = differentiate(function, case)
        x = case.x.expand(2**44, 40)
        for wanted in (False, True):
            with pytest.raises(RuntimeError, match="allocate"):
                function(x, case.weight, case.A.clone().requires_grad_(wanted), case.B, case.bias)
        again = differentiate(function, case)
        for name in NAMES:
            assert torch.equal(getattr(again, name), getattr(expected, name)), name

    @every_run
    def test_nothing_is_kept_alive(self, run, monkeypatch):
        """A failed backward pass lets go of what the forward saved once its graph is gone."""
        case = tensors(67, 24, 40, 4, device=run.device)
        leaves = [case.x.clone().requires_grad_(), case.A.clone().requires_grad_()]

        def held():
            gc.collect()
            alive = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
            return sum(tuple(t.shape)[:1] == (67,) for t in alive)

        before = held()
        for _ in range(3):
            y = fused(0.5, path=run.path)(leaves[0], case.weight, leaves[1], case.B, case.bias)
            with monkeypatch.context() as patch:
                error = torch.OutOfMemoryError("out of memory, says the test")
                patch.setattr(fastlora.ops, "_plan", failing(None, 0, itertools.count(), error))
                with pytest.raises(torch.OutOfMemoryError):
                    y.backward(case.dy)
            error.__traceback__ = None
            del y, error
        assert held() == before
        assert all(leaf.grad is None for leaf in leaves)

    @pytest.mark.cuda
    @pytest.mark.parametrize("path", ["auto", "triton", "addmm"])
    def test_on_a_gpu(self, path):
        case = tensors(256, 512, 512, 8, torch.float16, device="cuda")
        function = fused(0.5, path=path)
        expected = differentiate(function, case)
        x = case.x[:1].expand(2**28, 512)
        before = torch.cuda.memory_allocated()
        with pytest.raises(torch.OutOfMemoryError):
            function(x, case.weight, case.A, case.B, case.bias)
        gc.collect()
        assert torch.cuda.memory_allocated() <= before + 2**20
        again = differentiate(function, case)
        for name in NAMES:
            assert torch.equal(getattr(again, name), getattr(expected, name)), name


# Triton's interpreter keeps the running program's place in a global: no two threads may be in it at once.
threaded_runs = pytest.mark.parametrize(
    "run", [run for run in RUNS if run.id != "cpu-triton"], ids=lambda run: f"{run.device}-{run.path}"
)


def threads(count):
    """A pool whose threads compute like this one: PyTorch counts its own threads for each of them."""
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


class TestThreads:
    @threaded_runs
    def test_one_module_in_many_threads(self, run):
        """Forward and backward of other tokens in each thread: bit for bit what one thread computes."""
        layer = fastlora.FusedLoRALinear(40, 24, 4, 2.0, device=run.device)
        torch.nn.init.normal_(layer.A)
        inputs = [torch.randn(1 + i % 7, 40, device=run.device) for i in range(60)]

        def work(x):
            leaf = x.clone().requires_grad_()
            with fastlora.use_path(run.path):
                y = layer(leaf)
            grads = torch.autograd.grad(y.square().sum(), (leaf, layer.A, layer.B))
            return [y.detach(), *grads]

        expected = [work(x) for x in inputs]
        with threads(8) as pool:
            results = list(pool.map(work, inputs))
        for ours, theirs in zip(results, expected, strict=True):
            assert all(map(bits_equal, ours, theirs))

    def test_gradients_of_all_threads_add_up(self):
        """backward() of eight threads into one .grad, as autograd promises it."""
        layer = fastlora.FusedLoRALinear(40, 24, 4, 2.0, dtype=torch.float64)
        torch.nn.init.normal_(layer.A)
        inputs = [torch.randn(5, 40, dtype=torch.float64) for _ in range(24)]
        layer(torch.cat(inputs)).square().sum().backward()
        expected = layer.A.grad.clone(), layer.B.grad.clone()
        layer.zero_grad(set_to_none=False)
        with threads(8) as pool:
            list(pool.map(lambda x: layer(x).square().sum().backward(), inputs))
        torch.testing.assert_close(layer.A.grad, expected[0])
        torch.testing.assert_close(layer.B.grad, expected[1])

    @pytest.mark.parametrize("first_closes_first", [True, False])
    def test_compiled_code_follows_the_newest_open_block(self, first_closes_first):
        """Of blocks of two threads, closed in either order."""
        opened, close = threading.Event(), threading.Event()

        def other():
            with fastlora.use_path("addmm"):
                opened.set()
                assert close.wait(30)

        thread = threading.Thread(target=other)
        with fastlora.use_path("reference"):
            thread.start()
            assert opened.wait(30)
            assert paths._mode == "addmm"
            if not first_closes_first:
                close.set()
                thread.join()
                assert paths._mode == "reference"
        if first_closes_first:
            assert paths._mode == "addmm"
            close.set()
            thread.join()
        assert paths._mode == "auto"

    def test_blocks_open_and_close_in_many_threads(self):
        """A block that ends looks at those of the others, which come and go meanwhile."""
        interval = sys.getswitchinterval()
        end = time.monotonic() + 2

        def work():
            while time.monotonic() < end:
                with fastlora.use_path("addmm"):
                    pass

        try:
            sys.setswitchinterval(1e-6)
            with threads(8) as pool:
                for done in [pool.submit(work) for _ in range(8)]:
                    done.result(timeout=60)
        finally:
            sys.setswitchinterval(interval)
        assert (paths._mode, paths._open_blocks) == ("auto", {})

    def test_a_path_is_its_threads_own(self, monkeypatch):
        """Blocks that open and close in turn, in three threads: each call runs on its thread's path."""
        case = tensors(5, 24, 40, 4)
        modes, real = threading.local(), fastlora.ops.lora_forward

        def forward(*arguments):
            modes.seen = arguments[-1]
            return real(*arguments)

        monkeypatch.setattr(fastlora.ops, "lora_forward", forward)

        def mode():
            fastlora.lora_linear(case.x, case.weight, case.A, case.B)
            return modes.seen

        barrier = threading.Barrier(3, timeout=30)

        def opens_first():
            seen = [mode()]
            with fastlora.use_path("addmm"):
                barrier.wait()  # 1: opened
                seen.append(mode())
                barrier.wait()  # 2: the other has opened its own
                seen.append(mode())
            barrier.wait()  # 3: closed
            seen.append(mode())
            barrier.wait()  # 4: the other has closed its own
            return [*seen, mode()], ["auto", "addmm", "addmm", "auto", "auto"]

        def opens_second():
            barrier.wait()  # 1
            seen = [mode()]
            with fastlora.use_path("reference"):
                barrier.wait()  # 2
                seen.append(mode())
                barrier.wait()  # 3
                seen.append(mode())
            barrier.wait()  # 4
            return [*seen, mode()], ["auto", "reference", "reference", "auto"]

        def opens_none():
            seen = [mode()]
            for _ in range(4):
                barrier.wait()
                seen.append(mode())
            return seen, ["auto"] * 5

        with threads(3) as pool:
            for task in [pool.submit(each) for each in (opens_first, opens_second, opens_none)]:
                seen, expected = task.result(60)
                assert seen == expected
        assert mode() == "auto"
        assert paths.current_mode() == paths._mode == "auto"

    def test_a_block_is_seen_by_backward_in_another_thread(self):
        """Backward is on the path of its own forward, whoever calls it."""
        case = tensors(5, 24, 40, 4, torch.float16)
        A = case.A.clone().requires_grad_()
        with fastlora.use_path("reference"):
            y = fastlora.lora_linear(case.x, case.weight, A, case.B)
            expected = torch.autograd.grad(y, A, case.dy, retain_graph=True)[0]
        with threads(1) as pool:
            there = pool.submit(torch.autograd.grad, y, A, case.dy).result(30)[0]
        assert torch.equal(there, expected)

    def test_seeds_of_threads_differ(self):
        device = torch.device("cpu")
        with threads(8) as pool:
            seeds = list(pool.map(lambda _: masks.new_seed(device).item(), range(400)))
        assert len(set(seeds)) == 400

    @pytest.mark.parametrize("path", ["auto", "reference"])
    def test_dropout_in_threads_keeps_each_calls_mask(self, path):
        """y and dx of a call agree on its mask, whatever other threads draw meanwhile."""
        eye = torch.eye(24)

        def work(_):
            x = torch.ones(16, 24, requires_grad=True)
            y = fused(1.0, 0.5, path=path)(x, torch.zeros(24, 24), eye, eye)
            return torch.equal(y, torch.autograd.grad(y, x, torch.ones_like(y))[0]), y.detach()

        with threads(8) as pool:
            results = list(pool.map(work, range(64)))
        assert all(agree for agree, _ in results)
        assert len({tuple(y.flatten().tolist()) for _, y in results}) == 64

    @pytest.mark.cuda
    @pytest.mark.parametrize("path", ["auto", "triton", "addmm"])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_two_streams(self, path, dropout):
        """Steps of two streams at once, again and again: each has its own results."""
        cases = [tensors(512 + 64 * i, 768, 1024, 16, torch.bfloat16, device="cuda") for i in range(2)]
        seed = torch.tensor([5], device="cuda")
        function = fused(0.5, dropout, seed, path)
        expected = [differentiate(function, case) for case in cases]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in cases]
        results = [[], []]
        for _ in range(20):
            for stream, case, into in zip(streams, cases, results, strict=True):
                with torch.cuda.stream(stream):
                    into.append(differentiate(function, case))
        torch.cuda.synchronize()
        for into, truth in zip(results, expected, strict=True):
            for result in into:
                for name in NAMES:
                    assert torch.equal(getattr(result, name), getattr(truth, name)), name


LAYOUTS = ("contiguous", "transposed", "strided")


@st.composite
def problems(draw, most=40):
    """Everything that a call may vary in, as plain values, so that a failure prints itself."""
    size = st.integers(1, most)
    lead = draw(st.one_of(st.just(()), st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)))
    return SimpleNamespace(
        lead=lead,
        N=draw(size),
        K=draw(size),
        R=draw(st.integers(1, 20)),
        dtypes=draw(st.sampled_from([*DTYPES, (torch.float16, torch.bfloat16)])),
        alpha=draw(st.sampled_from([1.0, 0.0, -2.0, 0.125, 3])),
        bias=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        x_view=draw(st.sampled_from(["plain", "expanded", "one value", "permuted", "sliced", "strided"])),
        dy_view=draw(st.sampled_from(["plain", "expanded", "one value", "permuted"])),
        layouts={name: draw(st.sampled_from(LAYOUTS)) for name in ("weight", "A", "B")},
        wanted=draw(st.lists(st.sampled_from(["x", "A", "B", "bias"]), min_size=1, unique=True)),
        path=draw(st.sampled_from(["auto", "addmm", "reference"])),
        autocast=draw(st.sampled_from([None, None, *HALF])),
        draw=draw(st.integers(0, 2**31)),
    )


def viewed(t, view):
    """A tensor of t's shape whose memory lies as ``view`` says; where values must repeat, not t's values."""
    if t.dim() == 0 or t.numel() == 0 or view == "plain":
        return t
    if view == "one value":
        return t.flatten()[0].expand(t.shape)
    if view == "expanded":
        return t[:1].expand(t.shape)
    if view == "permuted":
        order = tuple(reversed(range(t.dim())))
        return t.permute(order).contiguous().permute(order)
    if view == "sliced":
        wide = torch.cat([torch.full_like(t, float("nan")), t, torch.full_like(t, float("nan"))], 0)
        return wide[t.shape[0] : 2 * t.shape[0]]
    return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]


def check(problem, path, device="cpu"):
    """Values and gradients within rounding of float64, element by element; dtypes and shapes of eager."""
    torch.manual_seed(problem.draw)
    dtype, adapter_dtype = problem.dtypes
    case = tensors(problem.lead, problem.N, problem.K, problem.R, dtype, adapter_dtype, device, problem.bias)
    case.x, case.dy = viewed(case.x, problem.x_view), viewed(case.dy, problem.dy_view)
    for name, layout in problem.layouts.items():
        setattr(case, name, lay_out(getattr(case, name), layout))
    seed = torch.tensor([problem.draw], device=device)
    wanted = [name for name in problem.wanted if problem.bias or name != "bias"]
    computed = problem.autocast or dtype

    def call(**leaves):
        with torch.autocast(device, problem.autocast, enabled=problem.autocast is not None):
            return fused(problem.alpha, problem.dropout, seed, path)(**leaves)

    ours = differentiate(call, case, wanted, dy=case.dy.to(computed)) if wanted else None
    keep = keep_factors(seed, case, problem.dropout).reshape(-1, problem.K)
    truth = exact(case, problem.alpha, keep)
    sizes = SimpleNamespace(**{k: v if v is None or callable(v) else v.abs() for k, v in vars(case).items()})
    bound = exact(sizes, abs(problem.alpha), keep)
    # Each input, h, g and the result are rounded once: a handful of roundings of the sum of absolute values,
    # and in float32 those of up to ``most`` additions.
    precision = max(torch.finfo(computed).eps, torch.finfo(adapter_dtype).eps, torch.finfo(dtype).eps)
    factor = 8 if precision > 1e-5 else 64
    for name, value in vars(ours).items() if ours else ():
        expected = computed if name == "y" else getattr(case, name).dtype
        assert value.dtype == expected, name
        target = getattr(truth, name)
        assert value.shape == target.shape, name
        error = (value.double() - target).abs()
        assert (error <= factor * precision * getattr(bound, name) + 1e-6).all(), (name, error.max())


FUZZ = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow],
}


class TestFuzz:
    @settings(max_examples=250, **FUZZ)
    @given(problems())
    def test_pytorch_paths(self, problem):
        check(problem, problem.path)

    @pytest.mark.skipif(CUDA, reason="the interpreter is off in a process with a GPU")
    @settings(max_examples=25, **FUZZ)
    @given(problems(most=34))
    def test_kernels_in_the_interpreter(self, problem):
        check(problem, "triton")

    @pytest.mark.cuda
    @pytest.mark.parametrize("path", ["auto", "triton", "addmm"])
    @settings(max_examples=200, **FUZZ)
    @given(problem=problems(most=300))
    def test_on_a_gpu(self, path, problem):
        check(problem, path, "cuda")

    @settings(max_examples=150, **FUZZ)
    @given(st.data())
    def test_mismatched_shapes_are_refused_or_right(self, data):
        """Any shapes at all: ValueError, or the shape that the formula gives; nothing else, and no crash."""
        size = st.integers(0, 3)
        shapes = {name: data.draw(st.lists(size, max_size=3)) for name in ("x", "weight", "A", "B", "bias")}
        x, weight, A, B, bias = (torch.ones(shape) for shape in shapes.values())
        fits = (
            weight.dim() == A.dim() == B.dim() == 2
            and bias.shape == weight.shape[:1]
            and A.shape == (weight.shape[0], B.shape[0])
            and x.dim() >= 1
            and x.shape[-1] == weight.shape[1] == B.shape[1]
            and B.shape[0] > 0
        )
        if fits:
            assert fastlora.lora_linear(x, weight, A, B, 1.0, bias).shape == (*x.shape[:-1], weight.shape[0])
        else:
            with pytest.raises(ValueError, match="lora_linear"):
                fastlora.lora_linear(x, weight, A, B, 1.0, bias)


ANY = (torch.float32, torch.bfloat16, torch.float16)


class TestMixedDtypes:
    """Every combination of dtypes that PEFT's own layer computes; PEFT says what comes out."""

    @every_run
    @pytest.mark.parametrize("autocast", [None, *HALF], ids=str)
    def test_pefts_dtypes(self, run, autocast):
        lora = pytest.importorskip("peft.tuners.lora")
        refused = compared = 0
        for x_dtype, base, adapter in itertools.product(ANY, ANY, ANY):
            torch.manual_seed(1)
            config = pytest.importorskip("peft").LoraConfig(r=4, lora_alpha=8, target_modules=["x"])
            linear = torch.nn.Linear(40, 24, dtype=base).requires_grad_(False)
            layer = lora.Linear(linear, "default", config=config, r=4, lora_alpha=8).to(run.device)
            A = layer.lora_B["default"].to(adapter).weight
            B = layer.lora_A["default"].to(adapter).weight
            torch.nn.init.normal_(A, std=0.3)
            x = torch.randn(9, 40).to(run.device, x_dtype).requires_grad_()
            dy = torch.randn(9, 24, device=run.device)

            def gradients(function, x=x, A=A, B=B, dy=dy):
                with torch.autocast(run.device, autocast, enabled=autocast is not None):
                    y = function()
                return [y, *torch.autograd.grad(y, (x, A, B), dy.to(y.dtype))]

            def ours(x=x, linear=linear, A=A, B=B):
                with fastlora.use_path(run.path):
                    return fastlora.lora_linear(x, linear.weight, A, B, 2.0, linear.bias)

            try:
                theirs = gradients(lambda layer=layer, x=x: layer(x))
            except RuntimeError:  # PyTorch's linear wants one dtype for x and weight
                refused += 1
                with pytest.raises(ValueError, match="dtypes"):
                    ours()
                continue
            compared += 1
            for name, mine, stock in zip(("y", "x", "A", "B"), gradients(ours), theirs, strict=True):
                given = (x_dtype, base, adapter, name)
                assert mine.dtype == stock.dtype, given
                scale = stock.float().abs().max()
                assert (mine.float() - stock.float()).abs().max() <= 0.05 * scale, given
        assert (compared, refused) == ((27, 0) if autocast else (9, 18))
