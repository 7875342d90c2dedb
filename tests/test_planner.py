"""Which path runs what, and why: pinned for several GPUs that need not be here."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch
from cases import CUDA, HALF, dtype_id, tensors
from torch.testing._internal.two_tensor import TwoTensor

import fastlora
from fastlora import function, ops, planner
from fastlora.device import Device, describe
from fastlora.kernels import configs
from fastlora.paths import use_path
from fastlora.planner import Problem, backward_config, make_plan

A100 = Device("cuda", "A100", 80, 108)
A10 = Device("cuda", "A10", 86, 72)
L40S = Device("cuda", "L40S", 89, 142)
H100 = Device("cuda", "H100", 90, 132)
B200 = Device("cuda", "B200", 100, 148)
RTX5090 = Device("cuda", "RTX 5090", 120, 170)
CPU = Device("cpu")
GPUS = (A100, A10, L40S, H100, B200, RTX5090)
STEPS = {"h": "project", "y": "gemm", "g": "project", "dx": "gemm", "dA": "token_sum", "dB": "token_sum"}
CONFIGS = {
    "project": configs.ProjectConfig | configs.SmallConfig,
    "gemm": configs.GemmConfig | configs.SmallConfig,
    "token_sum": configs.TokenSumConfig,
}
SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (768, 768), (4096, 256))

in_the_interpreter = pytest.mark.skipif(CUDA, reason="the interpreter is off in a process with a GPU")


def by_name(device):
    return device.name


def planned(device, M, N, K, R=16, dtype=torch.bfloat16, dropout=False, mode="auto"):
    return make_plan(Problem(device, dtype, M, N, K, R, dropout), mode)


def paths(plan):
    return {name: getattr(plan, name).path for name in STEPS}


def assert_complete(plan):
    """Six steps, each with its primitive, a path, a reason, and a tile shape exactly where a kernel runs."""
    for name, primitive in STEPS.items():
        step = getattr(plan, name)
        assert step.primitive == primitive
        assert step.path in ("triton", "addmm", "reference")
        assert step.reason.strip()
        if step.path == "triton":
            assert isinstance(step.config, CONFIGS[primitive])
        elif step.config is not None:  # the dropped update of dx, added to the BLAS's product
            assert (name, step.path) == ("dx", "addmm")
            assert isinstance(step.config, configs.UpdateConfig)


class TestFields:
    def test_frozen(self):
        plan = planned(A100, 512, 4096, 4096)
        for value in (
            plan,
            plan.y,
            planner.kernel_step(Problem(A100, torch.float16, 1, 8, 8, 8), "y").config,
            A100,
        ):
            field = dataclasses.fields(value)[0].name
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field, None)

    def test_path_and_reason_are_those_of_the_forward_gemm(self):
        for M in (1, 512, 8192):
            plan = planned(A100, M, 4096, 4096)
            assert plan.path == plan.y.path
            assert plan.reason == plan.y.reason
            assert (plan.gemm, plan.project, plan.token_sum) == (plan.y, plan.h, plan.dA)

    @pytest.mark.parametrize("device", [*GPUS, CPU], ids=by_name)
    @pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
    def test_complete(self, device, dtype):
        for N, K in SHAPES:
            for M in (0, 1, 7, 16, 512, 8192):
                for R in (1, 8, 100, 256):
                    for dropout in (False, True):
                        assert_complete(planned(device, M, N, K, R, dtype, dropout))


# Forward gemm (device, M, N, K, R), each with a margin of several per cent in the estimate. A short inner
# size makes the addmm form's second pass over y dear; a long one hides it behind the loop.
TRITON = [
    (A100, 8192, 4096, 256, 16),
    (A100, 8192, 4096, 1024, 16),
    (A100, 8192, 768, 768, 8),
    (A10, 8192, 4096, 256, 16),
    (A10, 8192, 4096, 1024, 16),
    (L40S, 8192, 4096, 4096, 16),
    (L40S, 8192, 14336, 4096, 64),
    (H100, 8192, 4096, 256, 16),
]
ADDMM = [
    (A100, 1, 4096, 4096, 128),
    (A100, 16, 8192, 8192, 64),
    (A100, 8192, 4096, 14336, 16),
    (A100, 512, 4096, 4096, 16),  # 128 tiles on 108 multiprocessors take as long as 216
    (A10, 1, 4096, 4096, 16),
    (A10, 8192, 4096, 14336, 16),
    (L40S, 16, 4096, 4096, 16),
    (H100, 1, 4096, 4096, 128),
    (H100, 512, 8192, 8192, 16),
    (H100, 8192, 768, 768, 16),
    (H100, 8192, 4096, 4096, 16),
    (H100, 8192, 14336, 4096, 64),
    (H100, 8192, 8192, 8192, 128),
    (B200, 8192, 4096, 256, 16),
    (B200, 8192, 4096, 4096, 16),
    (RTX5090, 8192, 4096, 256, 16),
    (RTX5090, 8192, 8192, 8192, 16),
]


class TestPins:
    @pytest.mark.parametrize(("device", "M", "N", "K", "R"), TRITON)
    @pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
    def test_kernels_win(self, device, M, N, K, R, dtype):
        plan = planned(device, M, N, K, R, dtype)
        assert plan.path == "triton", plan.reason
        assert "estimate" in plan.reason

    @pytest.mark.parametrize(("device", "M", "N", "K", "R"), ADDMM)
    @pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
    def test_addmm_wins(self, device, M, N, K, R, dtype):
        plan = planned(device, M, N, K, R, dtype)
        assert plan.path == "addmm", plan.reason

    @pytest.mark.parametrize("device", [B200, RTX5090], ids=by_name)
    def test_no_gemm_of_our_own_from_sm_100(self, device):
        for N, K in SHAPES:
            for M in (1, 512, 8192):
                plan = planned(device, M, N, K)
                assert plan.y.path == plan.dx.path == "addmm"

    @pytest.mark.parametrize("device", [A100, H100, B200], ids=by_name)
    def test_skinny_products_are_decided_on_their_own(self, device):
        """cuBLAS is weak there: the kernels run them even where the gemm goes to cuBLAS."""
        plan = planned(device, 8192, 8192, 8192, 16)
        assert plan.h.path == plan.g.path == plan.dA.path == plan.dB.path == "triton"
        assert planned(device, 1, 4096, 4096, 16).dA.path == "addmm"

    @pytest.mark.parametrize("device", GPUS, ids=by_name)
    def test_the_faster_by_its_own_figures(self, device):
        """The reason states both times; the path is the smaller one's, the kernel's only by a margin."""
        stated = re.compile(
            r"triton ([\d.]+) us, addmm ([\d.]+) us(?:, a lead below the margin of (\d) us)?$"
        )
        seen = set()
        for N, K in SHAPES:
            for M in (1, 16, 512, 8192):
                for R in (8, 64):
                    plan = planned(device, M, N, K, R)
                    for name in STEPS:
                        step = getattr(plan, name)
                        match = stated.search(step.reason)
                        if match:
                            triton, addmm, margin = (float(figure or 0) for figure in match.groups())
                            seen.add(step.path)
                            assert margin in (0, 4 if step.primitive == "token_sum" else 2)
                            if margin:
                                assert triton - 0.1 < addmm < triton + margin + 0.1, step
                                assert step.path == "addmm"
                            elif abs(triton - addmm) > 0.1:  # both are rounded to 0.1 us
                                assert step.path == ("triton" if triton < addmm else "addmm"), step
                                least = 4 if step.primitive == "token_sum" else 2
                                assert step.path == "addmm" or addmm - triton > least - 0.2, step
        assert seen == {"triton", "addmm"}

    @pytest.mark.parametrize("device", GPUS, ids=by_name)
    @pytest.mark.parametrize("mode", ["auto", "triton"])
    def test_dropout_changes_the_steps_of_its_products_alone(self, device, mode):
        for N, K in SHAPES:
            plain = planned(device, 8192, N, K, mode=mode)
            dropped = planned(device, 8192, N, K, dropout=True, mode=mode)
            for name in ("y", "g", "dA"):
                assert getattr(dropped, name) == getattr(plain, name)

    @pytest.mark.parametrize("device", GPUS, ids=by_name)
    def test_dropout_takes_the_kernels_where_a_mask_would_be_written(self, device):
        for N, K in SHAPES:
            for M in (1, 512, 8192):
                plan = planned(device, M, N, K, dropout=True)
                assert plan.h.path == plan.dB.path == "triton"
                assert "dropout" in plan.h.reason
                assert isinstance(plan.dx.config, configs.GemmConfig | configs.UpdateConfig)
                for mode in ("addmm", "reference"):
                    assert planned(device, M, N, K, dropout=True, mode=mode).dx.config is None

    @pytest.mark.parametrize("device", [*GPUS, CPU], ids=by_name)
    def test_no_estimate_makes_g_and_dA_in_one_launch(self, device):
        for N, K in SHAPES:
            for M in (1, 512, 8192, 2**17):
                for dropout in (False, True):
                    for mode in ("auto", "addmm", "reference", *(["triton"] if device is not CPU else [])):
                        plan = planned(device, M, N, K, dropout=dropout, mode=mode)
                        assert not plan.g_with_dA
                        assert plan.apart is plan
                        assert plan.g.apart is plan.dA.apart is None

    def test_the_memory_of_the_device_counts(self):
        """An H100's memory is slower than the H200's of the table, so the pass that addmm adds costs more."""
        shape = (4096, 2048, 512)
        assert planned(Device("cuda", "", 90, 132), *shape).y.path == "addmm"
        assert planned(Device("cuda", "", 90, 132, bandwidth=4.92e12), *shape).y.path == "addmm"
        assert planned(Device("cuda", "", 90, 132, bandwidth=3.35e12), *shape).y.path == "triton"

    def test_sizes_that_the_kernels_read_slowly(self):
        for device in (A100, H100):
            for N, K in ((4104, 4096), (50257, 4096), (4096, 4104)):
                plan = planned(device, 8192, N, K)
                assert plan.y.path == plan.dx.path == "addmm"
                assert f"N={N}, K={K}: the kernels are slow" in plan.y.reason
                aligned = {"h": K % 16 == 0, "dB": K % 16 == 0, "g": N % 16 == 0, "dA": N % 16 == 0}
                assert {name: getattr(plan, name).path == "triton" for name in aligned} == aligned
            assert not planned(device, 1, 4104, 4096).one_launch
            # A mask is still not written.
            plan = planned(device, 8192, 1032, 1032, dropout=True)
            assert isinstance(plan.dx.config, configs.UpdateConfig)
            assert plan.h.path == plan.dB.path == "triton"

    def test_dropout_leaves_the_product_to_the_blas(self):
        """Where the loop that applies a mask is estimated to lose more than a pass over dx takes."""
        for device in (H100, B200):
            dx = planned(device, 8192, 4096, 4096, dropout=True).dx
            assert isinstance(dx.config, configs.UpdateConfig)
            assert dx.reason.endswith("; a kernel adds the dropped update")
        dx = planned(L40S, 8192, 256, 4096, dropout=True).dx
        assert isinstance(dx.config, configs.GemmConfig), dx


NO_KERNELS = {
    "an old GPU": ({"device": Device("cuda", "T4", 75, 40)}, "75|7.5|sm_80"),
    "a very old GPU": ({"device": Device("cuda", "V100", 70, 80)}, "70|7.0|sm_80"),
    "a nameless GPU": ({"device": Device("cuda")}, "sm_80|capability"),
    "ROCm": ({"device": Device("cuda", "MI300X", 94, 304, rocm=True)}, "ROCm|AMD"),
    "Apple": ({"device": Device("mps")}, "mps"),
    "Intel": ({"device": Device("xpu")}, "xpu"),
    "meta": ({"device": Device("meta")}, "meta"),
    "float64": ({"dtype": torch.float64}, "float64"),
    "a large rank": ({"R": 257}, "257"),
}


class TestNeverAnException:
    @pytest.mark.parametrize("why", NO_KERNELS)
    def test_auto_takes_a_safe_path_and_triton_is_refused(self, why):
        change, pattern = NO_KERNELS[why]
        arguments = {"device": A100, "M": 64, "N": 512, "K": 512, **change}
        for M in (0, 1, 64, 8192):
            for dropout in (False, True):
                plan = planned(**{**arguments, "M": M, "dropout": dropout})
                assert_complete(plan)
                assert "triton" not in paths(plan).values()
        assert re.search(pattern, planned(**arguments).reason)
        with pytest.raises(RuntimeError, match=pattern):
            planned(**arguments, mode="triton")
        for mode in ("addmm", "reference"):
            assert set(paths(planned(**arguments, mode=mode)).values()) == {mode}

    def test_wider_adapters_fit_the_shared_memory(self):
        """Rank 256 on the GPUs with the least of it: float32 adapters take shorter steps, or fewer stages."""
        for device in (A100, A10, H100):
            for M in (1, 4096):
                narrow = Problem(device, torch.bfloat16, M, 4096, 4096, 256)
                wide = dataclasses.replace(narrow, adapter_dtype=torch.float32)
                for problem in (narrow, wide):
                    plan = make_plan(problem, "triton")
                    for config in (plan.h.config, plan.g.config, backward_config(problem)):
                        assert configs.fits(config, device.capability, 2, problem.adapter_itemsize)
                narrow, wide = make_plan(narrow, "triton"), make_plan(wide, "triton")
                assert narrow.g.config != wide.g.config
                assert narrow.dx == wide.dx

    def test_float64_adapters_are_left_to_addmm(self):
        device = Device("cuda", "", 90, 132)
        problem = Problem(device, torch.bfloat16, 64, 512, 512, 8, adapter_dtype=torch.float64)
        plan = make_plan(problem)
        assert set(paths(plan).values()) == {"addmm"}
        assert "float64" in plan.reason
        with pytest.raises(RuntimeError, match="float64"):
            make_plan(problem, "triton")

    def test_float32_is_computed_by_the_kernels_only_when_asked(self):
        assert "triton" not in paths(planned(A100, 8192, 4096, 4096, dtype=torch.float32)).values()
        plan = planned(A100, 8192, 4096, 4096, dtype=torch.float32, mode="triton")
        assert set(paths(plan).values()) == {"triton"}

    def test_triton_missing(self, monkeypatch, request):
        monkeypatch.setattr(planner, "has_triton", lambda: False)
        request.addfinalizer(planner.forget_plans)
        planner.forget_plans()
        plan = planned(A100, 8192, 4096, 256)
        assert_complete(plan)
        assert "triton" not in paths(plan).values()
        assert re.search("triton.*(not|missing)|no triton", plan.reason, re.IGNORECASE)
        with pytest.raises(RuntimeError, match="triton"):
            planned(A100, 8192, 4096, 256, mode="triton")

    @pytest.mark.parametrize("capability", [87, 91, 99, 103, 110, 121, 130, 200])
    def test_a_gpu_of_tomorrow(self, capability):
        for M in (0, 1, 512, 8192):
            for dropout in (False, True):
                assert_complete(
                    planned(Device("cuda", "new", capability, 200), M, 4096, 4096, 16, dropout=dropout)
                )

    @pytest.mark.parametrize("capability", [110, 130])
    def test_a_gpu_that_nothing_was_compiled_for(self, capability):
        device = Device("cuda", "Next", capability, 100)
        plan = planned(device, 8192, 4096, 4096)
        assert set(paths(plan).values()) == {"addmm"}
        assert plan.reason == f"the kernels have not been compiled for sm_{capability} yet"
        with pytest.raises(RuntimeError, match=f"sm_{capability}"):
            make_plan(Problem(device, torch.bfloat16, 8192, 4096, 4096, 16), "triton")

    @pytest.mark.parametrize("capability", [103, 121, 130, 200])
    def test_an_unknown_gpu_gets_cublas_for_its_gemm(self, capability):
        assert planned(Device("cuda", "new", capability, 200), 8192, 4096, 256).path == "addmm"

    @pytest.mark.parametrize("sms", [0, 1, 1000])
    def test_odd_numbers_of_multiprocessors(self, sms):
        assert_complete(planned(Device("cuda", "odd", 90, sms), 8192, 4096, 4096))

    @pytest.mark.parametrize(("M", "N", "K"), [(1, 0, 0), (0, 1, 1), (1, 1, 1), (2**31, 4096, 4096)])
    def test_odd_sizes(self, M, N, K):
        for device in (A100, CPU):
            assert_complete(planned(device, M, N, K))


def case_arguments(**changes):
    case = tensors(37, 50, 70, 16, torch.float16)
    return {**{name: getattr(case, name) for name in ("x", "weight", "A", "B", "bias")}, **changes}


def test_the_reference_is_not_run_as_addmm():
    problem = Problem(CPU, torch.float32, 8, 16, 16, 4)
    assert make_plan(problem, "addmm").all_addmm
    assert not make_plan(problem, "reference").all_addmm


class TestPublicPlan:
    @pytest.mark.skipif(not planner.has_triton(), reason="no kernel is tried without Triton")
    def test_a_gpu_on_which_no_kernel_starts(self, monkeypatch):
        """Without a C compiler, say: layers run, by the addmm form, and say so once."""
        broken = dataclasses.replace(A100, name="A100 of a machine without a compiler")
        monkeypatch.setattr(planner, "_excluded", {})
        for module in (ops, function):
            monkeypatch.setattr(module, "describe", lambda device: broken)
        monkeypatch.setattr(ops, "why_no_kernel_starts", lambda device: "no kernel starts on this GPU: no cc")
        planner.forget_plans()
        x, weight, A, B, _ = case_arguments().values()
        wide = torch.randn(8192, x.shape[1]).to(x.dtype)[:, :48]
        arguments = (wide, weight[:48, :48].contiguous(), A[:48].contiguous(), B[:, :48].contiguous())
        with pytest.warns(RuntimeWarning, match="no kernel starts .*: no cc; the addmm form runs instead"):
            y = fastlora.lora_linear(*arguments, dropout=0.5)
        assert y.isfinite().all()
        plan = fastlora.plan(*arguments, dropout=0.5)
        assert set(paths(plan).values()) == {"addmm"}
        assert plan.reason == "no kernel starts on this GPU: no cc"
        planner.forget_plans()

    def test_cpu(self):
        plan = fastlora.plan(**case_arguments())
        assert_complete(plan)
        assert plan.path in ("addmm", "reference")
        assert "CPU" in plan.reason

    @in_the_interpreter
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_interpreter(self, dropout):
        with use_path("triton"):
            plan = fastlora.plan(**case_arguments(), dropout=dropout)
        assert_complete(plan)
        assert set(paths(plan).values()) == {"triton"}
        assert "interpreter" in plan.reason

    @pytest.mark.parametrize("mode", ["addmm", "reference"])
    def test_asked_for(self, mode):
        with use_path(mode):
            plan = fastlora.plan(**case_arguments())
        assert_complete(plan)
        assert set(paths(plan).values()) == {mode}
        assert "use_path" in plan.reason

    @pytest.mark.parametrize("mode", ["auto", "addmm"])
    def test_what_plain_operations_compute(self, mode):
        arguments, found = case_arguments(), []
        twice = {**arguments, "weight": TwoTensor(arguments["weight"], arguments["weight"].clone())}

        def planned_inside(x):
            found.append(fastlora.plan(**{**arguments, "x": x}))
            return x

        with use_path(mode):
            found.append(fastlora.plan(**twice))
            torch.func.vmap(planned_inside)(arguments["x"][None])
        for plan, words in zip(found, ("wrapped tensor", "torch.func"), strict=True):
            assert_complete(plan)
            assert set(paths(plan).values()) == {"reference"}
            assert words in plan.reason

    def test_computes_and_draws_nothing(self):
        arguments = case_arguments()
        state = torch.get_rng_state()
        meta = {name: tensor.to("meta") for name, tensor in arguments.items()}
        assert_complete(fastlora.plan(**meta, dropout=0.5))
        fastlora.plan(**arguments, dropout=0.5)
        assert torch.equal(state, torch.get_rng_state())

    def test_leading_sizes(self):
        arguments = case_arguments()
        arguments["x"] = arguments["x"].reshape(1, 37, 70)
        assert fastlora.plan(**arguments) == fastlora.plan(**case_arguments())

    def test_no_in_features(self):
        empty = {"x": torch.randn(3, 0), "weight": torch.randn(5, 0)}
        assert_complete(fastlora.plan(**empty, A=torch.randn(5, 2), B=torch.randn(2, 0)))

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_the_problem_of_a_call_under_autocast(self, dropout):
        x, weight, A = torch.randn(3, 7), torch.randn(5, 7), torch.randn(5, 2)
        assert function.problem_of(x, 3, weight, A.double(), dropout).adapter_dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            problem = function.problem_of(x, 3, weight, A, dropout)
        assert problem.dtype == problem.adapter_dtype == torch.bfloat16
        assert problem.dropout == (dropout > 0)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"x": torch.randn(37, 69).half()}, r"\(37, 69\)"),
            ({"A": torch.randn(51, 16).half()}, r"\(51, 16\)"),
            ({"B": torch.randn(16, 70)}, "float32"),
            ({"dropout": 2.0}, r"2\.0"),
        ],
    )
    def test_refuses_what_the_layer_refuses(self, change, words):
        with pytest.raises(ValueError, match=words):
            fastlora.plan(**case_arguments(**change))

    @pytest.mark.cuda
    def test_gpu(self):
        arguments = {name: tensor.cuda() for name, tensor in case_arguments().items()}
        assert_complete(fastlora.plan(**arguments))
        device = describe(torch.device("cuda"))
        major, minor = torch.cuda.get_device_capability()
        assert device.capability == 10 * major + minor
        assert device.sms == torch.cuda.get_device_properties(0).multi_processor_count
        with use_path("triton"):
            assert set(paths(fastlora.plan(**arguments)).values()) == {"triton"}

    def test_without_the_interpreter_a_cpu_refuses_the_kernels(self):
        """In a process of its own, as this one has chosen already."""
        code = (
            "import torch, fastlora\n"
            "x, W, A, B = torch.ones(2, 4), torch.ones(3, 4), torch.ones(3, 1), torch.ones(1, 4)\n"
            "fastlora.lora_linear(x, W, A, B)\n"
            "with fastlora.use_path('triton'):\n"
            "    for call in (fastlora.plan, fastlora.lora_linear):\n"
            "        try: call(x, W, A, B)\n"
            "        except RuntimeError as error: print(error)\n"
        )
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert result.stdout.count("TRITON_INTERPRET") == 2

    @pytest.mark.skipif(CUDA, reason="no interpreter in the environment of the GPU tests")
    def test_the_interpreters_bfloat16_is_refused(self):
        """In a process without this suite's repair of it, whose results would be garbage."""
        code = (
            "import torch, fastlora\n"
            "tensors = torch.ones(2, 4), torch.ones(3, 4), torch.ones(3, 1), torch.ones(1, 4)\n"
            "for dtype in (torch.float16, torch.float32, torch.bfloat16):\n"
            "    x, W, A, B = (t.to(dtype) for t in tensors)\n"
            "    with fastlora.use_path('triton'):\n"
            "        for _ in range(2):\n"
            "            try: print((fastlora.lora_linear(x, W, A, B) == 8).all().item())\n"
            "            except RuntimeError as error: print(error)\n"
            "        try:\n"
            "            ys = fastlora.lora_linear_group(x, [W, W], [A, A], [B, B], [1, 1])\n"
            "            print((ys[0] == 8).all().item())\n"
            "        except RuntimeError as error: print(error)\n"
        )
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert result.stdout.split("\n")[:6] == ["True"] * 6
        assert result.stdout.count("interpreter computes bfloat16 products wrongly") == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are kernels")
def test_summary_where_the_requested_kernels_cannot_run():
    layer = fastlora.FusedLoRALinear(8, 8, 2, dtype=torch.float64)
    with fastlora.use_path("triton"):
        assert "none: " in fastlora.summary(torch.nn.Sequential(layer))
