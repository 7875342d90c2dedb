"""The benchmark suite's own machinery: its gate, its clocks, its files, and the GPU script end to end."""

import collections
import contextlib
import csv
import functools
import gc
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora import ops, planner
from fastlora.device import Device, describe
from fastlora.kernels import configs
from fastlora.paths import current_mode
from fastlora.reference import keep_mask
from fastlora.tune import as_tuple

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_linear  # noqa: E402
import check  # noqa: E402
import gpu  # noqa: E402
import group_providers  # noqa: E402
import harness  # noqa: E402
import model_providers  # noqa: E402
import plot  # noqa: E402
import primitives  # noqa: E402
import providers  # noqa: E402
import results  # noqa: E402
import shapes  # noqa: E402
import tables  # noqa: E402
import tiles  # noqa: E402
import timing  # noqa: E402
from measure import Checks, Measurement, Plan, base_row, measure, with_times  # noqa: E402
from primitives import (  # noqa: E402
    BLAS_AND_UPDATE,
    OFF,
    ONE_LAUNCH,
    TRITON,
    failures,
    products,
    shipped_config,
)
from problem import Layer, Problem, Unavailable, make_problem, step  # noqa: E402
from providers import PROVIDERS, Provider  # noqa: E402
from shapes import GroupShape, ModelShape, Shape  # noqa: E402

# On a busy machine a second thread costs many times what it saves.
torch.set_num_threads(1)
CPU = torch.device("cpu")
SMALL = Shape(33, 40, 48, 4)
GROUP, MODEL = shapes.TINY_GROUP_SHAPES[0], shapes.TINY_MODEL_SHAPES[0]
ONCE = timing.Timing((1.0,))
PLAN = Plan("test", ("both",), ("cpu",), torch.float32, CPU, seconds=0.001, min_rounds=2, min_sample=0.0)


def problem(shape=SMALL, dtype=torch.float32, **options):
    return make_problem(shape, dtype, CPU, **{"bias": True, **options})


# --- Shapes ---


def test_shape_lists():
    features = {(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8192, 8192)}
    llm = {(s.M, s.N, s.K, s.R) for s in shapes.TRAINING_SHAPES + shapes.DECODE_SHAPES}
    assert llm == {
        (M, N, K, R) for M in (1, 16, 512, 4096, 8192) for N, K in features for R in (8, 16, 64, 128)
    }
    small = {(s.M, s.N, s.K, s.R) for s in shapes.CPU_SHAPES}
    assert small == {(M, K, K, R) for M in (1, 64, 512, 2048) for K in (384, 768, 1024) for R in (8, 64)}
    # A run that is cut short has measured long batches at the usual rank.
    assert all(s.M >= 4096 and s.R == 16 for s in shapes.TRAINING_SHAPES[:10])


def test_groups_and_decoder_layers_are_those_of_llama_3():
    groups = {(s.M, s.widths, s.K, s.R) for s in shapes.GROUP_SHAPES}
    features = {((4096, 1024, 1024), 4096), ((14336, 14336), 4096), ((8192, 1024, 1024), 8192)}
    assert groups == {
        (M, widths, K, R) for M in (1, 16, 512, 4096, 8192) for widths, K in features for R in (16, 64, 128)
    }
    assert shapes.GROUP_SHAPES[0].N == 6144
    layer = shapes.MODEL_SHAPES[0]
    assert (layer.hidden, layer.heads, layer.kv_heads, layer.intermediate, layer.R) == (
        4096,
        32,
        8,
        14336,
        16,
    )
    assert {(s.batch, s.sequence) for s in shapes.MODEL_SHAPES} == {(1, 4096), (2, 4096), (4, 2048), (8, 512)}
    assert {s.M for s in shapes.MODEL_SHAPES} == {4096, 8192}


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("5,24,17,3", Shape(5, 24, 17, 3)),
        ("5,24+9,17,3", GroupShape(5, (24, 9), 17, 3)),
        ("2x24,32,4", ModelShape(2, 24, 32, 4)),
    ],
)
def test_shapes_are_read_by_how_they_are_written(text, shape):
    assert shapes.parse(text) == shape


@pytest.mark.parametrize(
    "text",
    [
        *("1,2,3", "a,b,c,d", "1,2,3,4,5", "0,1,1,1", ""),
        *("1,2+0,3,4", "1,2+,3,4", "1,2+2,3"),
        *("2x,32,4", "0x4,32,4", "2x24,33,4", "2x24,32", "2x3x4,32,4"),
    ],
)
def test_shape_refuses_what_is_none(text):
    with pytest.raises(ValueError, match=r"M,N,K,R|M,N\+N\+N,K,R|BATCHxSEQUENCE,K,R|at least 1"):
        shapes.parse(text)


# --- The check before the timing ---


correct_layer = PROVIDERS["eager"].build


class _Altered(torch.autograd.Function):
    """Passes values on and alters gradients."""

    @staticmethod
    def forward(ctx, tensor, change):
        ctx.change = change
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def broken(what):
    """A provider that is right in everything but ``what``; also a list that counts its calls."""
    calls = []

    def build(problem):
        layer = correct_layer(problem)
        A, B = layer.adapters
        p = problem

        def call(x):
            calls.append(what)
            if what == "dx":
                x = _Altered.apply(x, lambda gradient: gradient * 1.001)
            a = _Altered.apply(A, lambda g: g * 1.001) if what == "dA" else A
            b = _Altered.apply(B, lambda g: g * 1.001) if what == "dB" else B
            y = providers.eager_lora(x, p.weight, a, b, p.alpha, p.bias)
            if what == "y":
                y = y * 1.001
            elif what == "nan":
                y = torch.where(torch.arange(y.shape[-1]) == 3, float("nan"), y)
            elif what == "shape":
                y = y[..., :-1]
            elif what == "dtype":
                y = y.double()
            elif what == "raises":
                raise RuntimeError("kernel went away")
            return y

        return Layer(call, (A, B))

    return Provider(f"broken-{what}", build, "for the test"), calls


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("y", "check failed: y: largest error"),
        ("dx", "check failed: dx: "),
        ("dA", "check failed: dA: "),
        ("dB", "check failed: dB: "),
        ("nan", "check failed: y: largest error nan"),
        ("shape", "error: RuntimeError"),
        ("dtype", "check failed: y: torch.float64, expected torch.float32"),
        ("raises", "error: RuntimeError: kernel went away"),
    ],
)
def test_wrong_provider_is_reported_and_not_timed(what, message):
    wrong, calls = broken(what)
    measured = measure(SMALL, [PROVIDERS["frozen"], wrong, PROVIDERS["eager"]], PLAN)
    rows = {row.provider: row for row in measured.rows}
    assert rows[wrong.name].status.startswith(message)
    assert rows[wrong.name].median_ms is None
    assert len(calls) == 1, "called for the check alone"
    assert measured.failures() == {wrong.name: rows[wrong.name].status}
    assert set(measured.timings) == {("both", "cpu", "frozen"), ("both", "cpu", "eager")}
    assert rows["eager"].status == results.OK
    assert rows["eager"].median_ms > 0


def broken_branch(what):
    """A group that is right in everything but ``what`` of its second branch."""
    wrong, calls = broken(what)

    def build(problem):
        layers = [correct_layer(branch) for branch in problem.branches]
        layers[1] = wrong.build(problem.branches[1])
        return group_providers.joined(layers)

    return replace(wrong, build=build), calls


def broken_projection(what):
    """A decoder layer that is right in everything but ``what`` of its up_proj."""
    wrong, calls = broken(what)

    def build(problem):
        layer, leaves = problem.copy(), []
        for path, (A, B) in problem.adapters.items():
            linear = layer.get_submodule(path)
            part = Problem(None, problem.x, problem.dy, linear.weight, None, A, B, problem.alpha)
            built = wrong.build(part) if path == "mlp.up_proj" else correct_layer(part)
            linear.forward = built.call
            leaves += built.adapters
        return Layer(problem.called(layer), tuple(leaves))

    return replace(wrong, build=build), calls


def swapped_branches(problem):
    """Each branch has the multiplier of another one."""
    alphas = [branch.alpha for branch in problem.branches]
    branches = [replace(b, alpha=alpha) for b, alpha in zip(problem.branches, reversed(alphas), strict=True)]
    return group_providers.joined([correct_layer(branch) for branch in branches])


@pytest.mark.parametrize(
    ("shape", "break_it", "what", "message"),
    [
        (GROUP, broken_branch, "y", "check failed: y1: largest error"),
        (GROUP, broken_branch, "dx", "check failed: dx: "),
        (GROUP, broken_branch, "dA", "check failed: dA1: "),
        (GROUP, broken_branch, "dB", "check failed: dB1: "),
        (GROUP, broken_branch, "nan", "check failed: y1: largest error nan"),
        (GROUP, broken_branch, "dtype", "check failed: y1: torch.float64, expected torch.float32"),
        (GROUP, broken_branch, "raises", "error: RuntimeError: kernel went away"),
        (MODEL, broken_projection, "y", "check failed: y: largest error"),
        (MODEL, broken_projection, "dx", "check failed: dx: "),
        (MODEL, broken_projection, "dA", "check failed: dA of mlp.up_proj: "),
        (MODEL, broken_projection, "dB", "check failed: dB of mlp.up_proj: "),
        (MODEL, broken_projection, "raises", "error: RuntimeError: kernel went away"),
    ],
)
def test_wrong_group_or_model_is_reported_and_not_timed(shape, break_it, what, message):
    wrong, calls = break_it(what)
    kind = tables.KINDS[type(shape)]
    measured = measure(shape, [kind.providers["frozen"], wrong, kind.providers["fastlora"]], PLAN, kind.make)
    rows = {row.provider: row for row in measured.rows}
    assert rows[wrong.name].status.startswith(message)
    assert rows[wrong.name].median_ms is None
    assert len(calls) == 1, "called for the check alone"
    assert set(measured.timings) == {("both", "cpu", "frozen"), ("both", "cpu", "fastlora")}
    assert rows["fastlora"].saved_mib > rows["frozen"].saved_mib


def test_mixed_up_branches_are_seen():
    checks = Checks(group_providers.make_group_problem(GROUP, torch.float32, CPU, bias=False))
    assert checks.status(Provider("swapped", swapped_branches, "")).startswith("check failed: y0: ")


def test_the_bound_is_twice_the_error_of_eager_pytorch():
    """Of either form with float32 adapters; both the largest and the rms error count, and NaN."""
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    assert check.error(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), zeros) == check.Error(3.0, 1.5)
    made = problem(dtype=torch.bfloat16)
    checker, exact = check.Checker(made), made.exact()
    for dtype, forms in ((torch.bfloat16, ["plain"]), (torch.float32, ["peft", "autocast"])):
        eager = [check.outputs(made.eager(dtype, form), made) for form in forms]
        for name, bound in checker.bounds(dtype).items():
            errors = [check.error(results[name], exact[name]) for results in eager]
            for kind in ("largest", "rms"):
                worst = max(getattr(error, kind) for error in errors)
                assert getattr(bound, kind) == pytest.approx(2.0 * worst + 1e-6, rel=1e-12)
    masked = problem(dropout=0.25)
    for made, mask in (
        (masked, keep_mask(torch.tensor([1]), SMALL.M, SMALL.K, 0.25)),
        (masked, None),
        (group_providers.make_group_problem(GROUP, torch.float32, CPU, bias=True), None),
        (model_providers.make_model_problem(MODEL, torch.float32, CPU), None),
    ):
        bounds = check.Checker(made, mask).bounds(torch.float32)
        assert max(bound.largest for bound in bounds.values()) < 1e-4, "the float64 results are right"
    single, spoilt, bound = zeros.clone(), zeros.clone(), check.Error(1.0, 0.6)
    single[0, 1], spoilt[0, 1] = 1.1, float("nan")
    assert check._exceeded("y", zeros + 0.59, zeros, bound) == []
    assert check._exceeded("y", zeros + 0.61, zeros, bound) == ["y: rms error 0.61, allowed 0.6"]
    assert check._exceeded("y", single, zeros, bound) == ["y: largest error 1.1, allowed 1"]
    assert len(check._exceeded("y", spoilt, zeros, bound)) == 2


def test_outputs_do_not_lie_on_memory_with_right_values(monkeypatch):
    """On a GPU, the free memory is overwritten last before the provider is called."""
    done = []
    checker = check.Checker(problem())
    layer = correct_layer(problem())
    monkeypatch.setattr(check, "poison_free_memory", lambda *_: done.append("poison"))
    bounds = checker.bounds(torch.float32)
    monkeypatch.setattr(checker, "bounds", lambda dtype: (done.append(dtype), bounds)[1])
    called = replace(layer, call=lambda x: (done.append("call"), layer.call(x))[1])
    assert checker.failures(called, None) == []
    assert done == [torch.float32, "poison", "call"]
    done.clear()
    checker.failures(called, torch.bfloat16)
    assert done[0] == torch.bfloat16, "the adapters' dtype decides"
    monkeypatch.undo()

    filled = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: filled.append("cache"))
    monkeypatch.setattr(torch, "full", lambda size, value, **_: filled.append((size[0], value)))
    check.poison_free_memory(torch.device("cuda"), 10**6)
    assert filled[0] == "cache"
    assert filled[1][0] >= 2 * 10**6
    assert filled[1][1] != filled[1][1]


@pytest.mark.parametrize("shape", [SMALL, GROUP, MODEL], ids=str)
def test_adapters_have_the_dtype_that_is_said(shape):
    kind = tables.KINDS[type(shape)]
    made = kind.make(shape, torch.bfloat16, CPU, bias=False)
    for provider in kind.providers.values():
        with contextlib.suppress(Unavailable):
            if provider.name != "compile":
                dtypes = {adapter.dtype for adapter in provider.build(made).adapters}
                assert dtypes <= {provider.adapter_dtype or made.dtype}, provider.name


def test_a_step_touches_the_elements_of_its_tensors():
    """The number of input sets follows from it."""
    group = group_providers.make_group_problem(GROUP, torch.float32, CPU, bias=False)
    weights = sum(branch.weight.numel() for branch in group.branches)
    assert group.elements == group.x.numel() + sum(dy.numel() for dy in group.dy) + weights
    made = problem()
    assert made.elements == made.x.numel() + made.dy.numel() + made.weight.numel()
    drawn = [made.redrawn(seed).x for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_unavailable_provider_says_why():
    def build(problem):
        raise Unavailable("needs a library")

    measured = measure(SMALL, [PROVIDERS["frozen"], Provider("absent", build, "")], PLAN)
    assert [r.status for r in measured.rows if r.provider == "absent"] == ["unavailable: needs a library"]
    assert not measured.failures()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_every_provider_is_right_or_says_why_not(dtype, dropout):
    checks = Checks(problem(dtype=dtype, dropout=dropout))
    chosen = [p for name, p in PROVIDERS.items() if name != "compile"]  # see the test below
    statuses = {p.name: checks.status(p) for p in chosen}
    unavailable = {name: status for name, status in statuses.items() if status != results.OK}
    assert all(status.startswith("unavailable: ") for status in unavailable.values()), unavailable
    must_run = {"frozen", "frozen-again", "eager", "peft", "fastlora", "fastlora-addmm", "fastlora-reference"}
    without = {"merged", "addmm", "addmm-base-last"}
    if dropout == 0.0:
        must_run |= without
    else:
        assert {unavailable[name] for name in without} == {"unavailable: has no dropout"}
    if dtype == torch.bfloat16:
        must_run |= {"peft-same-dtype", "fastlora-fp32-adapters"}
    assert not must_run & unavailable.keys(), unavailable


def test_rows_name_the_path_of_fastlora_alone():
    made = SimpleNamespace(dtype=torch.bfloat16, path=lambda name, adapter_dtype: str(adapter_dtype))
    names = ("peft", "fastlora-addmm", "fastlora", "fastlora-fp32-adapters")
    found = [sys.modules["measure"]._path(name, made) for name in names]
    assert found == ["", "addmm", "torch.bfloat16", "torch.float32"]


def test_the_path_of_a_group_is_that_of_its_adapters_dtype(monkeypatch):
    """They may take other paths than adapters in the base's dtype."""
    problems = []
    made = group_providers.make_group_problem(GROUP, torch.bfloat16, CPU, bias=False)
    original = planner.make_group_plan
    monkeypatch.setattr(
        planner, "make_group_plan", lambda *given: (problems.append(given), original(*given))[1]
    )
    for dtype in (torch.bfloat16, torch.float32):
        assert made.path("fastlora", dtype) == "addmm"
        problem, *sizes = problems.pop()
        assert (problem.adapter_dtype, problem.N, problem.R) == (dtype, GROUP.N, GROUP.R * len(GROUP.widths))
        assert sizes == [GROUP.widths, (GROUP.R,) * len(GROUP.widths)]


def test_layers_with_dropout_drop():
    """Not only those whose mask is known: each is timed with its own."""
    made, dropping = problem(dtype=torch.bfloat16, dropout=0.5), set()
    for provider in PROVIDERS.values():
        with contextlib.suppress(Unavailable):
            layer = provider.build(made) if provider.name != "compile" else Layer(lambda x: x)
            if not torch.equal(layer.call(made.x), layer.call(made.x)):
                dropping.add(provider.name)
    peft, ours = {"eager", "peft", "peft-same-dtype"}, ("", "-fp32-adapters", "-addmm", "-reference")
    assert dropping == peft | {f"fastlora{name}" for name in ours} | {"fastlora-triton"} & dropping


RUN_ANYWHERE = {"frozen", "frozen-again", "peft", "fastlora"}


def assert_right_or_unavailable(table, checks, must_run):
    statuses = {p.name: checks.status(p) for p in table.values() if p.name != "compile"}
    unavailable = {name: status for name, status in statuses.items() if status != results.OK}
    assert all(status.startswith("unavailable: ") for status in unavailable.values()), unavailable
    assert not must_run & unavailable.keys(), unavailable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    # The last one's rows are a remainder for the BLAS, which sums them otherwise.
    [*shapes.TINY_GROUP_SHAPES, GroupShape(3, (768, 768, 768), 768, 8)],
    ids=str,
)
def test_every_group_provider_is_right_or_says_why_not(shape, dtype):
    must_run = RUN_ANYWHERE | {"eager", "addmm-base-last", "fastlora-separate", "fastlora-addmm"}
    if dtype == torch.bfloat16:
        must_run |= {"peft-same-dtype", "fastlora-fp32-adapters"}
    made = group_providers.make_group_problem(shape, dtype, CPU, bias=shape.M == 33)
    assert_right_or_unavailable(group_providers.GROUP_PROVIDERS, Checks(made), must_run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_model_provider_is_right_or_says_why_not(dtype):
    must_run = RUN_ANYWHERE | {"fastlora-groups", "fastlora-fuse-peft", "fastlora-fuse-peft-groups"}
    if dtype == torch.bfloat16:
        must_run |= {"peft-same-dtype"}
    made = model_providers.make_model_problem(MODEL, dtype, CPU)
    assert_right_or_unavailable(model_providers.MODEL_PROVIDERS, Checks(made.checked), must_run)


@pytest.mark.parametrize(
    ("shape", "name", "single", "groups"),
    [
        (MODEL, "fastlora", 7, 0),
        (MODEL, "fastlora-groups", 2, 2),
        (MODEL, "fastlora-fuse-peft", 7, 0),
        (MODEL, "fastlora-fuse-peft-groups", 2, 2),
        (MODEL, "peft", 0, 0),
        (GROUP, "fastlora", 0, 1),
        (GROUP, "fastlora-separate", 3, 0),
        (GROUP, "fastlora-addmm", 0, 1),
        (SMALL, "fastlora", 1, 0),
        (SMALL, "fastlora-addmm", 1, 0),
        (SMALL, "fastlora-reference", 1, 0),
    ],
    ids=str,
)
def test_providers_run_what_they_say(monkeypatch, shape, name, single, groups):
    """Layers one by one; or q/k/v and gate/up as groups, which leaves o_proj and down_proj; on their path."""
    kind, mode = tables.KINDS[type(shape)], name.removeprefix("fastlora-")
    made = kind.make(shape, torch.float32, CPU, bias=False)
    layer, calls = kind.providers[name].build(made), []
    originals = {called: getattr(ops, called) for called in ("lora_forward", "group_forward")}
    for called, original in originals.items():
        monkeypatch.setattr(
            ops, called, lambda *args, f=original, n=called: (calls.append((n, current_mode())), f(*args))[1]
        )
    layer.call(made.x)
    names = [called for called, _ in calls]
    assert (names.count("lora_forward"), names.count("group_forward")) == (single, groups)
    assert {mode for _, mode in calls} <= {mode if mode in ("addmm", "reference") else "auto"}


class Products(TorchDispatchMode):
    """Notes (rows, summands, columns) of each matrix product, and other operations that compute or copy."""

    def __init__(self):
        super().__init__()
        self.sizes, self.others = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm"):
            p, q = args[name == "addmm" :][:2]
            self.sizes.append((*p.shape, q.shape[1]))
        elif name not in ("t", "transpose", "detach", "new_empty"):
            self.others.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["addmm", "addmm-base-last"])
def test_chains_of_blas_calls(name):
    """h or g first, the frozen product and the update in the order of the name, and nothing else."""
    made = problem(bias=False)
    M, N, K, R = made.shape.M, made.shape.N, made.shape.K, made.shape.R
    layer, order = PROVIDERS[name].build(made), -1 if name == "addmm-base-last" else 1
    with Products() as forward:
        y = layer.call(made.x)
    assert forward.sizes == [(M, K, R), *[(M, K, N), (M, R, N)][::order]]
    with Products() as backward:
        torch.autograd.grad(y, (made.x, *layer.adapters), made.dy)
    assert backward.sizes == [(M, N, R), (N, M, R), (R, M, K), *[(M, N, K), (M, R, K)][::order]]
    assert forward.others == backward.others == []


def test_products_of_the_other_forms():
    made = problem(bias=False)
    M, N, K, R = made.shape.M, made.shape.N, made.shape.K, made.shape.R
    frozen = [(M, K, N), (M, N, K)]
    eager = [*frozen, (M, K, R), (M, R, N), (M, N, R), (N, M, R), (M, R, K), (R, M, K)]
    merged = [*frozen, (N, R, K), (N, M, K), (N, K, R), (R, N, K)]
    forms = {"frozen": frozen, "frozen-again": frozen, "eager": eager, "merged": merged}
    for name, expected in forms.items():
        layer = PROVIDERS[name].build(made)
        with Products() as seen:
            step(layer, made, "both")()
        assert sorted(seen.sizes) == sorted(expected), name


def test_other_libraries_forms_are_called_as_they_are_meant(monkeypatch):
    """Unsloth's and Axolotl's functions, replaced by PyTorch ones with the same signatures."""
    inplace_of, others = [], []

    def qkv(self, X, inplace=True):
        inplace_of.append(inplace)
        return self.q_proj(X), self.k_proj(X), self.v_proj(X)

    def o(self, X):
        others.append("o")
        return self.o_proj(X)

    def mlp(self, X, inplace=True):
        others.append("mlp")
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(X)) * self.up_proj(X))

    library = SimpleNamespace(apply_lora_qkv=qkv, apply_lora_o=o, apply_lora_mlp_swiglu=mlp)
    monkeypatch.setitem(sys.modules, "unsloth.kernels", library)
    monkeypatch.setitem(sys.modules, "axolotl.kernels.lora", library)

    def fused(x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0, linear_bias=None):
        assert x.dim() == 3
        x_dropped = torch.nn.functional.dropout(x, dropout_p)
        update = torch.nn.functional.linear(torch.nn.functional.linear(x_dropped, lora_a), lora_b)
        return torch.nn.functional.linear(x, linear_w, linear_bias) + alpha * update

    lorafusion = SimpleNamespace(fused_linear_lora=fused)
    monkeypatch.setitem(sys.modules, "lorafusion.ops.lora_v1", lorafusion)
    group = Checks(group_providers.make_group_problem(GROUP, torch.bfloat16, CPU, bias=False))
    model = Checks(model_providers.make_model_problem(MODEL, torch.bfloat16, CPU))
    for name in ("unsloth", "axolotl"):
        assert group.status(group_providers.GROUP_PROVIDERS[name]) == results.OK
        assert model.status(model_providers.MODEL_PROVIDERS[name]) == results.OK
        for table, made in (
            (group_providers.GROUP_PROVIDERS, group._problem),
            (model_providers.MODEL_PROVIDERS, model._problem),
        ):
            assert {adapter.dtype for adapter in table[name].build(made).adapters} == {torch.bfloat16}
    assert others == ["o", "mlp"] * 2
    for bias, name in ((False, "unsloth"), (True, "lorafusion")):
        made = problem(dtype=torch.bfloat16, bias=bias)
        assert Checks(made).status(PROVIDERS[name]) == results.OK
        assert {adapter.dtype for adapter in PROVIDERS[name].build(made).adapters} == {torch.bfloat16}
    layer = PROVIDERS["lorafusion"].build(problem(dropout=0.5))
    assert not torch.equal(layer.call(made.x.float()), layer.call(made.x.float()))
    assert inplace_of == [False, True] * 2, "x of a group is a leaf, that of the layer is not"


def test_decoder_layer_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.llama.modeling_llama", None)
    kind = tables.KINDS[ModelShape]
    rows = measure(MODEL, list(kind.providers.values()), PLAN, kind.make).rows
    assert {row.provider for row in rows} == kind.providers.keys()
    assert all(row.status.startswith("unavailable: import of transformers") for row in rows)


def test_model_is_checked_on_few_tokens_of_the_same_weights():
    made = model_providers.make_model_problem(ModelShape(3, 300, 32, 4), torch.float32, CPU)
    checked = made.checked
    assert checked.x.shape == (1, model_providers.CHECK_TOKENS, 32)
    assert checked.layer is made.layer
    assert checked.adapters is made.adapters
    assert (made.shape.M, made.shape.N, made.shape.K) == (900, 300, 32)


def test_modes_run_what_they_say():
    """How often each calls the layer, whether for gradients, and what it computes."""
    made = problem()
    built, calls = PROVIDERS["eager"].build(made), []
    layer = replace(built, call=lambda x: (calls.append(torch.is_grad_enabled()), built.call(x))[1])
    once = {"forward": [True], "backward": [], "both": [True], "step": [True], "inference": [False]}
    found = {}
    for mode, expected in once.items():
        run = step(layer, made, mode)
        calls.clear()
        found[mode] = run()
        assert calls == expected, mode
    assert found["forward"].requires_grad
    assert not found["inference"].requires_grad
    for mode in ("backward", "both"):
        assert [gradient.shape for gradient in found[mode]] == [
            tensor.shape for tensor in (made.x, *built.adapters)
        ]
    (dx,) = step(PROVIDERS["frozen"].build(made), made, "step")()
    torch.testing.assert_close(dx, made.dy @ made.weight)


def test_training_step_is_both_and_adamw(monkeypatch):
    """AdamW is given the gradients of mode "both", and leaves the values for the other providers' turn."""
    made = problem()
    layer = PROVIDERS["fastlora"].build(made)
    before = [adapter.detach().clone() for adapter in layer.adapters]
    expected = step(layer, made, "both")()[1:]
    given, original = [], torch.optim.AdamW.step

    def recorded(self, *arguments):
        given.extend(p.grad for group in self.param_groups for p in group["params"])
        return original(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    step(layer, made, "step")()
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.adapters, strict=True))
    assert all(adapter.grad is None for adapter in layer.adapters)


@pytest.mark.slow
def test_compile_provider():
    rows = measure(SMALL, [PROVIDERS["frozen"], PROVIDERS["compile"]], replace(PLAN, modes=gpu.TRAINING)).rows
    assert {row.status for row in rows} == {results.OK}


def test_dropout_of_fastlora_is_checked_against_its_mask():
    def other_mask(problem, seed):
        return PROVIDERS["fastlora"].seeded(problem, seed + 1)

    checks = Checks(problem(dropout=0.25))
    assert checks.status(PROVIDERS["fastlora"]) == results.OK
    status = checks.status(replace(PROVIDERS["fastlora"], seeded=other_mask))
    assert status.startswith("check failed: y: ")


def test_select_names_the_floor_and_refuses_unknown_names():
    chosen = {kind: [p.name for p in table] for kind, table in tables.select("peft, merged").items()}
    assert chosen == {
        Shape: ["frozen", "merged", "peft"],
        GroupShape: ["frozen", "peft"],
        ModelShape: ["frozen", "peft"],
    }
    assert {kind: len(table) for kind, table in tables.select(None).items()} == {
        kind: len(table.providers) for kind, table in tables.KINDS.items()
    }
    chosen = {kind: {p.name for p in table} for kind, table in tables.select(None, "compile,frozen").items()}
    assert chosen == {kind: table.providers.keys() - {"compile"} for kind, table in tables.KINDS.items()}
    for names in (("peft,nothing",), (None, "nothing")):
        with pytest.raises(ValueError, match="unknown providers nothing; known: frozen"):
            tables.select(*names)


def test_products_are_checked():
    """The kernels of the products, in the interpreter or on a GPU; and a wrong value is seen."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = products(make_problem(Shape(19, 24, 17, 3), torch.float32, device, bias=False))
    assert list(made) == ["y", "dx", "h", "g", "dA", "dB", "g+dA", "h+y", "g+dx", "dx+dropout", "forward"]
    assert {*gpu.PRODUCTS, "h+y", "g+dx", "forward"} == set(made)
    product = made["y"]()
    assert failures(product, CPU) == {}
    assert product.kernels[TRITON + OFF].args[2].shape == (19, 0), "no update at all, rather than one times 0"
    kernels = {name: (lambda run=run: run() * 1.01) for name, run in product.kernels.items()}
    wrong = failures(replace(product, kernels=kernels), CPU)
    assert wrong.keys() == {TRITON, TRITON + OFF}

    exact = product.formulas[TRITON](*(operand.double() for operand in product.operands))
    eager = check.error(product.formulas[TRITON](*product.operands), exact)
    largest, rms = 2.0 * eager.largest + 1e-6, 2.0 * eager.rms + 1e-6
    single = torch.zeros_like(exact)
    for error, message in (
        (0.99 * rms, None),
        (1.01 * rms, "check failed: rms error"),
        (single.index_put((torch.tensor(3), torch.tensor(5)), exact.new_tensor(0.99 * largest)), None),
        (single.index_put((torch.tensor(3), torch.tensor(5)), exact.new_tensor(1.01 * largest)), "largest"),
        (single.index_put((torch.tensor(3), torch.tensor(5)), exact.new_tensor(float("nan"))), "nan"),
    ):
        wrong = failures(replace(product, kernels={TRITON: lambda error=error: exact + error}), CPU)
        assert message in wrong[TRITON] if message else wrong == {}

    dropped = made["dx+dropout"]()
    assert dropped.kernels.keys() == {"triton", BLAS_AND_UPDATE}
    assert failures(dropped, CPU) == {}
    planned = planner.Problem(describe(device), torch.float32, 19, 24, 17, 3, dropout=True)
    for name, path in ((TRITON, "triton"), (BLAS_AND_UPDATE, "addmm")):
        assert dropped.kernels[name].args[0] == planner.step_of(planned, "dx", path, "")
    undropped = dict.fromkeys(dropped.kernels, made["dx"]().kernels["triton"])
    assert failures(replace(dropped, kernels=undropped), CPU).keys() == dropped.kernels.keys()

    for name, kernel in (("g+dA", ONE_LAUNCH), ("h+y", TRITON), ("g+dx", TRITON)):
        pair = made[name]()
        assert failures(pair, CPU) == {}
        first, second = pair.kernels[kernel]()
        for altered in ((first * 1.01, second), (first, second * 1.01)):
            kernels = {**pair.kernels, kernel: lambda altered=altered: altered}
            wrong = failures(replace(pair, kernels=kernels), CPU)
            assert wrong.keys() == {kernel}


def test_products_are_as_accurate_as_what_computes_the_same():
    """The update is larger than the frozen product here, and so is the rounding of their sum."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    M, N, K, R = 100, 136, 264, 16
    made = products(make_problem(Shape(M, N, K, R), torch.float16, device, bias=False))
    sizes = {
        "y": (M, K, N),
        "dx": (M, N, K),
        "h": (M, K, R),
        "g": (M, N, R),
        "dA": (N, M, R),
        "dB": (K, M, R),
    }
    sizes |= {"dx+dropout": sizes["dx"], "forward": sizes["y"]}
    for name, make in made.items():
        product = make()
        assert failures(product, CPU) == {}, name
        with Products() as blas:
            product.blas(*product.operands)
        assert blas.sizes == ([sizes[name]] if name in sizes else [sizes[part] for part in name.split("+")])
        assert blas.others == []
        each = [result for kernel in product.kernels.values() for result in as_tuple(kernel())]
        assert {result.dtype for result in each} <= {torch.float16}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off in a process with a GPU")
def test_results_of_products_do_not_lie_on_memory_with_right_values(monkeypatch):
    """On a GPU, the free memory is overwritten right before each kernel, after the formula."""
    made, done = products(problem(bias=False))["g+dA"](), []
    shape = made.operands[0].shape

    def noted(name, function):
        return lambda *operands: (done.append(name), function(*operands))[1]

    monkeypatch.setattr(primitives, "poison_free_memory", lambda device, size: done.append(size))
    kernels = {name: noted(name, kernel) for name, kernel in made.kernels.items()}
    assert failures(replace(made, blas=noted("formula", made.blas), kernels=kernels), CPU) == {}
    sizes = [size for size in done if isinstance(size, int)]
    assert min(sizes) >= sum(operand.numel() for operand in made.operands) > shape.numel()
    first, second = kernels
    assert done == ["formula", "formula", sizes[0], first, sizes[1], second]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off in a process with a GPU")
def test_wrong_kernels_of_a_product_are_not_timed(monkeypatch):
    """Each has one row that says what is wrong; the others and the BLAS call have their times."""
    made = products(problem(bias=False))["y"]()
    broken = {
        TRITON: lambda: made.kernels[TRITON]().add_(1.0),
        "raises": lambda: made.blas(),
        OFF: lambda: made.kernels[TRITON + OFF](),
    }
    monkeypatch.setattr(primitives._Products, "gemm", lambda *_: replace(made, kernels=broken))
    rows = primitives.measure_products(SMALL, replace(PLAN, modes=("y",))).rows
    statuses = {row.provider: row.status for row in rows}
    assert len(statuses) == len(rows) == 4
    assert statuses["blas"] == statuses[OFF] == results.OK
    assert statuses[TRITON].startswith("check failed: ")
    assert statuses["raises"].startswith("error: TypeError")
    assert {row.provider for row in rows if row.ratio} == {"blas", OFF}


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a Hopper GPU")
@pytest.mark.parametrize("schedule", [*primitives.SCHEDULES, primitives.PROJECTS])
def test_hopper_loops_are_called_as_they_are_meant(monkeypatch, schedule):
    """Their launchers are replaced by what they compute, as they run on Hopper alone."""
    teams, ranks, projected = set(), set(), []

    def gemm(p, q, u, v, scale, config, bias, q_by_rows):
        teams.add(config.teams)
        ranks.add(u.shape[1])
        q, v = (q, v) if q_by_rows else (q.t(), v.t())
        return torch.mm(p, q).addmm_(u, v, alpha=scale)

    def project_and_gemm(p, q, z, v, scale, config, bias, q_by_rows):
        projected.append(q_by_rows)
        u = scale * (p @ (z if q_by_rows else z.t()))
        return gemm(p, q, u, v, 1.0, config, bias, q_by_rows), u

    monkeypatch.setattr("fastlora.kernels.hopper.gemm", gemm)
    monkeypatch.setattr("fastlora.kernels.hopper_project.project_and_gemm", project_and_gemm)
    monkeypatch.setattr(primitives, "describe", lambda device: Device("cuda", "NVIDIA H100", 90, 132))
    made = products(problem(Shape(128, 48, 64, 8), bias=False), schedule)
    names, kernels = ("y", "dx"), {TRITON, TRITON + OFF, schedule, schedule + OFF}
    if schedule == primitives.PROJECTS:
        names, kernels = ("h+y", "g+dx"), {TRITON, "hopper", schedule}
    for name in names:
        product = made[name]()
        assert product.kernels.keys() == kernels
        assert failures(product, CPU) == {}
    assert teams == {2 if schedule == "hopper-pingpong" else 1}
    assert ranks == ({8} if schedule == primitives.PROJECTS else {0, 8})
    assert projected == ([False, True] if schedule == primitives.PROJECTS else [])
    monkeypatch.setattr(primitives, "alternate", lambda functions, *_, **__: dict.fromkeys(functions, ONCE))
    plan = replace(PLAN, section=schedule, modes=names)
    rows = primitives.measure_products(Shape(128, 48, 64, 8), plan).rows
    timed = {(row.mode, row.provider) for row in rows if row.ratio}
    assert timed == set(itertools.product(names, {"blas", *kernels}))


@pytest.mark.parametrize("capability", sorted(configs.SHARED_MEMORY))
def test_tile_candidates(capability):
    """The shipped shape is the first; every product that is swept has others that fit, each once."""
    device = Device("cuda", "", capability, 132)
    for product, s in tiles.work():
        problem = planner.Problem(device, torch.bfloat16, s.M, s.N, s.K, s.R)
        shipped = shipped_config(problem, product)
        if product not in ("forward", "g+dA"):
            assert shipped == getattr(planner.make_plan(problem, "triton"), product).config
        named = tiles.candidates(shipped, capability)
        assert next(iter(named)) == f"triton {tiles.text(shipped)}"
        assert next(iter(named.values())) == shipped
        assert len(set(named.values())) == len(named) > 10
        assert all(configs.fits(config, capability, 2) for config in named.values())
        if product == "g+dA":
            assert all(c.rows % c.block_m == c.rows % c.step_m == 0 for c in named.values())


@pytest.mark.parametrize("product", ["h", "dA", "g+dA", "forward"])
def test_wrong_tile_candidates_are_not_timed(monkeypatch, product):
    """Each is checked in a process of its own first; one that is wrong there has a row that says so."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off in a process with a GPU")
    monkeypatch.setattr(
        tiles, "GRIDS", {kind: dict(list(grid.items())[:1]) for kind, grid in tiles.GRIDS.items()}
    )
    shape = Shape(5, 24, 17, 3)
    found = {}

    def wrong_candidates(*arguments):
        share = tiles.check_share(*arguments, 0, 1)
        assert share == {}
        name = list(tiles._share(*arguments, 0, 1))[-1]
        found[name] = "error: it broke"
        return found

    monkeypatch.setattr(tiles, "wrong_candidates", wrong_candidates)
    rows = tiles.measure_tiles(product, shape, replace(PLAN, section="tiles")).rows
    assert {row.mode for row in rows} == {product}
    statuses = {row.provider: row.status for row in rows}
    assert {name: status for name, status in statuses.items() if status != "ok"} == found
    assert len(statuses) > 2
    assert all(row.ratio > 0 for row in rows if row.status == "ok")
    table = tiles.tile_table(rows)
    assert f"{product} M5-N24-K17-R3 float32, cpu timer: {len(statuses) - 2} timed, 1 failed" in table
    (shipped,) = (row for row in rows if row.provider.startswith("triton"))
    figures = [f"{shipped.ratio:.3f}", f"{shipped.median_ms * 1e3:.1f}", "us", "triton"]
    assert table.splitlines()[2].split()[:4] == figures
    assert len(tiles.tile_table(rows, ["graph"]).splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off in a process with a GPU")
def test_each_tile_candidate_is_launched_with_its_own_tiles(monkeypatch):
    """The kernels are replaced by what they are given."""
    for name in ("project.project", "gemm.gemm", "token_sum.token_sum", "backward.g_and_dA", "small.small"):
        monkeypatch.setattr(f"fastlora.kernels.{name}", lambda *arguments: (arguments,))
    device, given = Device("cuda", "NVIDIA H100", 90, 132), {}
    monkeypatch.setattr(primitives, "describe", lambda device: Device("cuda", "NVIDIA H100", 90, 132))

    def some(name, shipped):
        given[name] = dict(list(tiles.candidates(shipped, device.tile_capability).items())[:3])
        return given[name]

    made = products(problem(Shape(16, 48, 64, 8), bias=False), tiles=some)
    for name in ("h", "y", "dA", "g+dA", "forward"):
        for key, kernel in made[name]().kernels.items():
            (arguments,) = kernel() if name != "forward" else [kernel()]
            assert any(argument is given[name][key] for argument in arguments), key
    monkeypatch.setattr(tiles, "failures", lambda product, device: dict.fromkeys(product.kernels, "seen"))
    share = "h", Shape(5, 24, 17, 3), PLAN, 1, 2
    assert tiles.check_share(*share).keys() == tiles._share(*share).keys()


def test_tile_table():
    """The shipped tiles, then the three fastest; one block for each shape, dtype and timer."""
    base = replace(base_row(SMALL, replace(PLAN, section="tiles")), mode="h", timer="cpu")
    ratios = {"blas": 0.5, "a": 0.9, "triton x": 1.0, "b": 0.8, "c": 1.2, "d": 0.7}
    rows = [replace(base, provider=name, ratio=r, median_ms=r) for name, r in ratios.items()]
    lines = tiles.tile_table([*rows, replace(rows[1], R=8, status="check failed")]).splitlines()
    assert [line.split("us  ")[1] for line in lines[2:6]] == ["triton x", "d", "b", "a"]
    assert lines[1].endswith("R4 float32, cpu timer: 5 timed, 0 failed")
    assert lines[6].endswith("R8 float32, cpu timer: 1 timed, 1 failed")


def die_in_share_1(product, shape, plan, part, parts):
    if part == 1:
        os.abort()
    return {}


def find_nothing(product, shape, plan, part, parts):
    return {}


def hang_in_share_1(product, shape, plan, part, parts):
    if part == 1:
        time.sleep(300)
    return {}


def test_tile_candidates_are_checked_by_other_processes(monkeypatch):
    """A share that breaks its process costs its candidates, and the next product gets new processes."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off in a process with a GPU")
    monkeypatch.setattr(tiles, "MOST_WORKERS", 2)
    monkeypatch.setattr(tiles.os, "cpu_count", lambda: 3)
    tiles.pool.cache_clear()
    shape = Shape(5, 24, 17, 3)
    try:
        assert tiles.wrong_candidates("h", shape, PLAN) == {}
        for process in list(tiles.pool()[1]._processes.values()):
            process.kill()
            process.join()
        assert tiles.wrong_candidates("h", shape, PLAN) == {}
        workers, first = tiles.pool()
        monkeypatch.setattr(tiles, "check_share", os.kill)  # takes no such arguments, and raises
        wrong = tiles.wrong_candidates("h", shape, PLAN)
        everyone = {name for part in (0, 1) for name in tiles._share("h", shape, PLAN, part, workers)}
        assert wrong.keys() == everyone == tiles._share("h", shape, PLAN, 0, 1).keys()
        assert {status.split(": ")[2] for status in wrong.values()} == {"TypeError"}
        assert tiles.pool()[1] is not first

        monkeypatch.setattr(tiles, "check_share", die_in_share_1)
        wrong = tiles.wrong_candidates("h", shape, PLAN)
        assert wrong.keys() == set(tiles._share("h", shape, PLAN, 1, workers))
        assert {status.split(": ")[2] for status in wrong.values()} == {"its process died"}

        monkeypatch.setattr(tiles, "check_share", find_nothing)
        assert tiles.wrong_candidates("h", shape, PLAN) == {}  # new processes, which take a while to start
        monkeypatch.setattr(tiles, "check_share", hang_in_share_1)
        monkeypatch.setattr(tiles, "CHECK_SECONDS", 5.0)
        wrong = tiles.wrong_candidates("h", shape, PLAN)
        assert wrong.keys() == set(tiles._share("h", shape, PLAN, 1, workers))
        assert {status.split(": ")[2] for status in wrong.values()} == {"TimeoutError"}
    finally:
        tiles.pool()[1].shutdown()
        tiles.pool.cache_clear()


# --- Timing ---


class CountingClock:
    """Each function takes as long as it says; the order of the samples is kept."""

    def __init__(self):
        self.order, self.repeats = [], []

    def sample(self, function, calls):
        assert not gc.isenabled()
        self.order.append(function.__name__)
        self.repeats.append(calls)
        return calls * sum(function() for _ in range(1))

    def read(self, sample):
        return sample

    def synchronize(self):
        pass


def slow():
    return 0.5


def quick():
    return 0.25


def test_alternate_takes_turns():
    clock = CountingClock()
    timings = timing.alternate(
        {"quick": quick, "slow": slow}, clock, seconds=6.0, calls_each=5, min_sample=0.0, max_rounds=50
    )
    assert timings["quick"].seconds == (0.05,) * 8  # 6 s hold 8 rounds of 0.75 s
    assert timings["slow"].ratio(timings["quick"]) == pytest.approx(2.0)
    rounds = clock.order[-16:]
    pairs = [tuple(rounds[i : i + 2]) for i in range(0, 16, 2)]
    assert set(pairs) == {("quick", "slow"), ("slow", "quick")}, "both orders, each function once a round"


def test_alternate_repeats_short_functions_alike():
    clock = CountingClock()
    timings = timing.alternate(
        {"quick": quick, "slow": slow}, clock, seconds=0.0, min_rounds=3, min_sample=1.0
    )
    assert timings["quick"].seconds == (0.25,) * 3
    assert timings["slow"].seconds == (0.5,) * 3
    assert set(clock.repeats[-6:]) == {4}, "until the quickest function takes a second"


@pytest.mark.parametrize("options", [{"min_rounds": 0}, {"min_rounds": 5, "max_rounds": 4}])
def test_alternate_refuses_no_rounds(options):
    with pytest.raises(ValueError, match="min_rounds"):
        timing.alternate({"quick": quick}, CountingClock(), seconds=1.0, **options)
    with pytest.raises(ValueError, match="0 functions"):
        timing.alternate({}, CountingClock(), seconds=1.0)


def test_ratio_is_taken_within_a_round():
    """A machine that slows down fourfold in the middle changes both times and no ratio."""
    floor = timing.Timing((1.0, 1.0, 4.0, 4.0))
    other = timing.Timing((1.5, 1.5, 6.0, 6.0))
    assert other.ratio(floor) == 1.5
    assert other.ratio_quartiles(floor) == (1.5, 1.5)
    assert timing.Timing((1.0, 2.0, 3.0)).spread == pytest.approx(0.5)
    floor, other = timing.Timing((1.0, 2.0, 4.0, 8.0)), timing.Timing((2.0, 6.0, 16.0, 40.0))
    row = with_times(base_row(SMALL, PLAN), other, floor)
    assert (row.ratio, row.ratio_low, row.ratio_high) == (3.5, 2.75, 4.25), "not of the medians"
    assert (row.median_ms, row.spread, row.rounds) == (11e3, pytest.approx(17.0 / 11.0), 4)


class StandInGpu:
    """A GPU on which a call takes 3 ms, and the host 1 ms to issue it."""

    def __init__(self, monkeypatch):
        self.host = self.device = 0.0
        self.was_idle = []
        clock = SimpleNamespace(perf_counter=lambda: self.host, monotonic=time.monotonic)
        monkeypatch.setattr(timing, "time", clock)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def synchronize(self, device=None):
        self.host = max(self.host, self.device)

    def call(self):
        self.was_idle.append(self.device <= self.host)
        self.host += 1e-3
        self.device = max(self.device, self.host) + 3e-3


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.time = max(self.gpu.host, self.gpu.device)

    def elapsed_time(self, end):
        assert self.gpu.host >= end.time, "not reached yet"
        return (end.time - self.time) * 1e3


def test_clocks_of_a_gpu(monkeypatch):
    """Its own time where calls follow each other, the host's where each sample finds it idle."""
    for clock, seconds in ((timing.CudaEventClock(), 3.1e-3), (timing.HostClock(), 1e-3)):
        gpu = StandInGpu(monkeypatch)
        timings = timing.alternate(
            {"a": gpu.call, "b": gpu.call}, clock, seconds=0.0, min_rounds=3, min_sample=1e-2
        )
        repeats = (len(gpu.was_idle) - 4 * timing.WARM_UP_CALLS) // 6
        assert repeats >= 3
        for name in ("a", "b"):
            assert timings[name].seconds == pytest.approx([seconds] * 3, rel=0.1)
        firsts = gpu.was_idle[4 * timing.WARM_UP_CALLS :: repeats]
        assert isinstance(clock, timing.CudaEventClock) or all(firsts)


def test_peak_bytes_of_a_step(monkeypatch):
    used = SimpleNamespace(now=100, peak=500)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: used.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: used.peak)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: vars(used).update(peak=used.now)
    )
    assert timing.peak_bytes(lambda: vars(used).update(peak=130), torch.device("cuda")) == 30
    assert timing.peak_bytes(lambda: None, torch.device("cuda")) == 0
    assert timing.peak_bytes(lambda: None, CPU) is None


@pytest.fixture
def timers(monkeypatch):
    """Three input sets, and stand-ins for graphs and for the timing, which calls each function once."""
    # inside: whether on a stream. called: the address of each call's input, as the callables note it.
    seen = SimpleNamespace(inside=0, captured=[], bytes=[], timed=[], called=[])

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def stream(stream):
        seen.inside += 1
        yield
        seen.inside -= 1

    def captured(function, stream):
        assert isinstance(stream, Stream)
        return lambda: (seen.captured.append(function), function())

    def alternate(functions, clock, **options):
        calls = {}
        for name, function in functions.items():
            seen.called.clear()
            seen.captured.clear()
            function()
            calls[name] = list(seen.called), bool(seen.captured)
        seen.timed.append((type(clock), options, calls))
        return {name: timing.Timing((1.0 if name in ("frozen", "blas") else 2.0,)) for name in functions}

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    for module in ("measure", "primitives"):
        monkeypatch.setattr(f"{module}.captured", captured)
        monkeypatch.setattr(f"{module}.alternate", alternate)
        monkeypatch.setattr(f"{module}.input_sets", lambda size, *_: (seen.bytes.append(size), 3)[1])
    return seen


TIMERS = {"graph": timing.CudaEventClock, "eager": timing.CudaEventClock, "host": timing.HostClock}


def assert_all_sets_are_timed(seen, plan, rows):
    """Each timer calls each provider on three inputs, a graph's replay for all three."""
    assert [clock for clock, *_ in seen.timed] == list(TIMERS.values())
    for timer, (_, options, calls) in zip(TIMERS, seen.timed, strict=True):
        assert options == {
            "seconds": plan.seconds,
            "calls_each": 3,
            "min_rounds": plan.min_rounds,
            "min_sample": plan.min_sample,
        }
        for inputs, captured in calls.values():
            assert len(set(inputs)) == len(inputs) == 3
            assert captured == (timer == "graph")
    assert [(row.timer, row.ratio) for row in rows] == [(timer, r) for timer in TIMERS for r in (1.0, 2.0)]


def test_each_timer_times_all_input_sets(timers, monkeypatch):
    """A graph's forward runs on the stream of its capture; the plan's bias and dropout are in the layers."""
    made, inside = [], []

    def build(problem):
        layer = PROVIDERS["eager"].build(problem)
        made.append(problem)
        return replace(layer, call=lambda x: (timers.called.append(x.data_ptr()), layer.call(x))[1])

    def noted(layer, problem, mode):
        inside.append(bool(timers.inside))
        return step(layer, problem, mode)

    monkeypatch.setattr("measure.step", noted)
    plan = replace(PLAN, timers=tuple(TIMERS), bias=True, dropout=0.25, min_rounds=6)
    chosen = [replace(PROVIDERS["eager"], name=name, build=build) for name in ("frozen", "rival")]
    rows = measure(SMALL, chosen, plan).rows
    assert_all_sets_are_timed(timers, plan, rows)
    assert inside == [False] * 4 + [True] * 6 + [False] * 12, "two of each provider's memory, then three sets"
    assert {(problem.dropout, problem.bias is None) for problem in made} == {(0.0, False), (0.25, False)}
    assert {(row.dropout, row.bias) for row in rows} == {(0.25, True)}
    assert timers.bytes == [4 * made[-1].elements]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off in a process with a GPU")
def test_each_timer_times_all_input_sets_of_a_product(timers, monkeypatch):
    made = [products(problem(seed=seed, bias=False))["y"]() for seed in range(3)]
    sets = iter(
        replace(
            product,
            blas=lambda p, *_: timers.called.append(p.data_ptr()),
            kernels={TRITON: lambda p=product.operands[0]: timers.called.append(p.data_ptr())},
        )
        for product in made
    )
    monkeypatch.setattr(primitives._Products, "gemm", lambda *_: next(sets))
    monkeypatch.setattr(primitives, "failures", lambda product, device: {})
    plan = replace(PLAN, modes=("y",), timers=tuple(TIMERS), min_rounds=6)
    assert_all_sets_are_timed(timers, plan, primitives.measure_products(SMALL, plan).rows)
    assert timers.bytes == [4 * SMALL.N * SMALL.K], "of few tokens the weight, of many the skinny products' x"


def test_saved_bytes(monkeypatch):
    """Beyond x and the parameters: M * R for fastlora, PEFT's copies in float32, the whole merged weight."""
    shape = Shape(64, 48, 40, 4)
    p = problem(shape, torch.bfloat16)

    def saved(name):
        layer = PROVIDERS[name].build(p)
        known = [p.x, p.weight, p.bias, *layer.adapters]
        return timing.saved_bytes(step(layer, p, "forward"), known)

    assert saved("frozen") == 0
    assert saved("fastlora") == shape.M * shape.R * 2
    rows = measure(shape, [PROVIDERS[name] for name in ("frozen", "fastlora")], replace(PLAN, bias=True)).rows
    assert [row.saved_mib for row in rows] == [0.0, shape.M * shape.R * 4 / 2**20]
    kept, leaf = torch.ones(100, 4), torch.ones(1, 4, requires_grad=True)
    assert timing.saved_bytes(lambda: leaf * kept[:1], [leaf]) == kept.nbytes, (
        "a view keeps all of its storage"
    )
    monkeypatch.setattr("measure.peak_bytes", lambda step, device: len(step()) * 2**20)
    (row,) = measure(shape, [PROVIDERS["fastlora"]], PLAN).rows
    assert row.peak_mib == 3.0, "of dx, dA and dB"
    assert saved("merged") == shape.N * shape.K * 2
    assert saved("peft") == shape.M * (shape.K + shape.R) * 4


def test_budget_stops_and_says_what_it_left_out():
    now = [0.0]

    def lasting(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    budget = timing.Budget(10.0, clock=lambda: now[0])
    work = (("x a", 1.0), ("x b", 4.0), ("x c", 4.0), ("x d", 0.1), ("y a", 0.3), ("y b", 0.1))
    ran = [budget.run(name, lasting(s), guess=0.5) for name, s in work]
    # After a and b 5 s are left, enough for another b; after c 1 s is not, but enough for another kind, and
    # its guess is forgotten once one of it has run.
    assert ran == [True, True, True, False, True, True]
    assert not budget.run("z a", lasting(0.1), guess=0.6)
    assert budget.left_out == ["x d", "z a"]


# --- Files ---


def measured_rows():
    return measure(SMALL, [PROVIDERS["frozen"], PROVIDERS["eager"]], PLAN).rows


def test_csv_round_trip(tmp_path):
    rows = measured_rows()
    stamp = results.environment(CPU)
    writer = results.CsvWriter(tmp_path / "new" / "rows.csv", stamp)
    writer.write(rows)
    with (tmp_path / "new" / "rows.csv").open(newline="") as file:
        records = list(csv.DictReader(file))  # before close: each row is flushed
    writer.close()
    assert tuple(records[0]) == results.COLUMNS
    assert {
        "median_ms",
        "ratio",
        "peak_mib",
        "saved_mib",
        "device",
        "driver",
        "torch",
        "triton",
        "commit",
        "date",
    } <= set(records[0])
    assert records[0]["torch"] == torch.__version__
    assert records[0]["commit"] == stamp.commit
    back, text = results.read_csv(tmp_path / "new" / "rows.csv")
    assert text == str(stamp)
    assert [(r.provider, r.M, r.bias, r.status) for r in back] == [
        (r.provider, r.M, r.bias, r.status) for r in rows
    ]
    assert back[1].ratio == pytest.approx(rows[1].ratio, rel=1e-5)
    assert back[0].peak_mib is None
    full = results.Row(
        "a", 1, 2, 3, 4, "b", True, 0.5, "c", "d", "e", "f", 1.5, 2.5, 3, 4.5, 5.5, 6.5, 7.5, 8.5, "g"
    )
    writer = results.CsvWriter(tmp_path / "full.csv", stamp)
    writer.write([full, replace(full, bias=False)])
    writer.close()
    assert results.read_csv(tmp_path / "full.csv")[0] == [full, replace(full, bias=False)]


def test_newest_rows():
    """The later one of what is the same but for the figures; nothing else is lost."""
    base = results.Row("linear", 1, 2, 3, 4, "float32", False, 0.0, "both", "cpu", "frozen", ratio=1.0)
    changes = {"section": "x", "M": 9, "N": 9, "K": 9, "R": 9, "dtype": "x", "bias": True, "dropout": 0.1}
    changes |= {"mode": "x", "timer": "x", "provider": "x"}
    rows = [base, *(replace(base, **{name: value}) for name, value in changes.items())]
    assert results.newest(rows) == rows
    assert results.newest([*rows, replace(base, ratio=2.0)]) == [replace(base, ratio=2.0), *rows[1:]]


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_stamps_name_the_source(tmp_path, monkeypatch):
    """A commit with changes says so; the digest, by which a proof of correctness is known, sees any file."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    files = [tmp_path / folder / "code.py" for folder in ("fastlora", "kernels", "tests")]
    for file in files:
        file.parent.mkdir()
        file.write_text("first")
    git = [*shlex.split("git -c user.name=a -c user.email=a@b -c commit.gpgsign=false -C"), str(tmp_path)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    assert re.fullmatch("[0-9a-f]{12}", results._commit())
    digests = {results.source_digest()}
    for file in files:
        file.write_text("other")
        digests.add(results.source_digest())
    assert len(digests) == 4
    assert re.fullmatch(r"[0-9a-f]{12}\+changes", results._commit())


def test_read_csv_refuses_other_columns(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        results.read_csv(path)


def test_ratio_table_counts_shapes():
    base = results.Row("linear", 1, 2, 3, 4, "float32", False, 0.0, "both", "cpu", "frozen", ratio=1.0)
    rows = [base, base, replace(base, provider="peft", ratio=2.0), replace(base, provider="peft", ratio=8.0)]
    table = results.ratio_table([*rows, replace(base, provider="compile", ratio=1.5)])
    assert "4.000 (8.000)" in table
    assert "1.500 (1.500) [1]" in table, "a mean over fewer shapes says so"
    changes = {"section": "x", "dtype": "x", "timer": "x", "R": 8}
    apart = [base, *(replace(base, ratio=2.0, **{name: value}) for name, value in changes.items())]
    table = results.ratio_table(apart)
    assert (table.count("1.000 (1.000)"), table.count("2.000 (2.000)")) == (1, 4), (
        "no mean over different blocks"
    )
    assert "x timer" not in results.ratio_table(apart, ["cpu"])
    assert results.ratio_table(apart, ["x"]).count("(2.000)") == 1
    assert results.ratio_table([]) == "no ratio was measured"


def test_step_table():
    base = results.Row("model", 48, 24, 32, 4, "float32", False, 0.0, "step", "cpu", "peft", median_ms=4.0)
    rows = [base, replace(base, provider="fastlora", median_ms=3.2, peak_mib=12.0, saved_mib=1.25)]
    rows.append(replace(base, provider="peft-same-dtype", median_ms=3.6))
    table = results.step_table([*rows, replace(base, mode="both", median_ms=1.0)])
    lines = [line.split() for line in table.splitlines()]
    assert "2 x 24 tokens, hidden 32, rank 4, float32, cpu timer" in table
    assert ["peft", "4.000", "12000", "1.000x", "0.900x", "-", "-"] in lines
    assert ["fastlora", "3.200", "15000", "1.250x", "1.125x", "12", "1.2"] in lines
    assert len(lines) == 6
    changes = {"N": 48, "dtype": "x", "timer": "x", "R": 8}
    apart = [base, *(replace(base, provider="fastlora", **{name: v}) for name, v in changes.items())]
    table = results.step_table(apart)
    assert table.count("1.000x") == 1, "PEFT's times are those of the same block"
    assert "1 x 48 tokens" in table
    assert results.step_table(apart, ["x"]).count("step ms") == 1
    assert results.step_table([]) == "no training step was measured"


def test_noise_warning():
    base = results.Row("linear", 1, 2, 3, 4, "float32", False, 0.0, "both", "cpu", "frozen-again", ratio=1.01)
    assert results.noise_warning([base]) is None
    assert "1 of 2 runs (at most 1.25x)" in results.noise_warning([base, replace(base, ratio=0.8)])


def test_plot(tmp_path, monkeypatch):
    rows = measured_rows()
    writer = results.CsvWriter(tmp_path / "rows.csv", results.environment(CPU))
    writer.write(rows)
    writer.close()
    monkeypatch.setattr(
        sys, "argv", ["plot.py", str(tmp_path / "rows.csv"), str(tmp_path / "out" / "rows.png")]
    )
    plot.main()
    assert (tmp_path / "out" / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert not plot.draw([replace(rows[0], ratio=None)], "", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_plot_shows_each_row_in_its_place(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", drawn.append)
    base = results.Row("linear", 1, 2, 3, 4, "float32", False, 0.0, "both", "cpu", "frozen", median_ms=7.0)
    base = replace(base, ratio=1.0, ratio_low=1.0, ratio_high=1.0)
    rows = [base, replace(base, M=9)]
    rows += [
        replace(base, M=M, timer=timer, provider=provider, ratio=r, ratio_low=r - 0.25, ratio_high=r + 0.5)
        for provider, timer, M, r in (
            ("a", "cpu", 9, 3.0),
            ("a", "cpu", 1, 2.0),
            ("b", "cpu", 9, 4.0),
            ("a", "x", 1, 5.0),
        )
    ]
    rows.append(replace(rows[3], dtype="bfloat16", ratio=6.0, ratio_low=6.0, ratio_high=6.0))
    assert plot.draw(rows, "", tmp_path / "rows.png")
    (figure,) = drawn
    found = {}
    for axes in figure.axes:
        assert [1.0, 1.0] in [list(line.get_ydata()) for line in axes.lines], "the floor"
        for bars in axes.containers:
            points = zip(map(round, bars[0].get_xdata()), bars[0].get_ydata(), strict=True)
            ends = [segment[:, 1].tolist() for segment in bars[2][0].get_segments()]
            found[axes.get_title(), bars.get_label()] = list(points), ends
    assert found == {
        ("linear: both (cpu, float32)", "a"): ([(0.0, 2.0), (1.0, 3.0)], [[1.75, 2.5], [2.75, 3.5]]),
        ("linear: both (cpu, float32)", "b"): ([(1.0, 4.0)], [[3.75, 4.5]]),
        ("linear: both (x, float32)", "a"): ([(0.0, 5.0)], [[4.75, 5.5]]),
        ("linear: both (cpu, bfloat16)", "a"): ([(0.0, 6.0)], [[6.0, 6.0]]),
    }
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["1\n2x3\nr4", "9\n2x3\nr4"]
    close(figure)

    writer = results.CsvWriter(tmp_path / "rows.csv", results.environment(CPU))
    writer.write(
        [*rows, replace(rows[2], mode="forward"), replace(rows[2], R=8), replace(rows[2], section="y")]
    )
    writer.close()
    chosen = []
    monkeypatch.setattr(plot, "draw", lambda rows, stamp, path: chosen.append(rows) or True)
    options = ["--mode", "both", "--rank", "4", "--section", "linear", "--timer", "cpu", "--providers", "a"]
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "rows.csv"), "x.png", *options])
    plot.main()
    assert chosen == [[*rows[2:4], rows[-1]]]


# --- The GPU script, on the CPU ---


@pytest.fixture
def dry_run(tmp_path, monkeypatch):
    """Runs gpu.py's main with few providers; ``tests``: text of a test file to run instead of the cuda tests.

    None takes the tests as passed, which saves a process.
    """
    threads = torch.get_num_threads()
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(timing, "WARM_UP_CALLS", 1)

    def run(*arguments, tests=None, chosen="frozen,eager,fastlora"):
        (tmp_path / "test_it.py").write_text(tests or "")
        if tests is None:
            monkeypatch.setattr(gpu, "run_tests", lambda *_: results.OK)
        options = ["--out", tmp_path / "out", "--providers", chosen, "--tests", tmp_path / "test_it.py"]
        return gpu.main(["--dry-run-cpu", *map(str, options), *arguments])

    yield run
    torch.set_num_threads(threads)


def test_gpu_script_without_gpu(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_loop_that_projects_is_for_bfloat16(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert primitives.PROJECTS in gpu._arguments(out).only
    assert primitives.PROJECTS not in gpu._arguments([*out, "--dtype", "float16"]).only
    with pytest.raises(SystemExit):
        gpu._arguments([*out, "--dtype", "float16", "--only", "both", primitives.PROJECTS])
    assert "overflow in float16" in capsys.readouterr().err


def test_gpu_script_measures_as_it_is_asked(tmp_path, monkeypatch):
    """With a GPU that is only said to be there."""
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run", lambda *arguments: given.append(arguments) or 0)
    options = ["--dtype", "float16", "--timers", "eager", "--seconds", "0.3", "--without", "compile,peft"]
    assert gpu.main(["--out", str(tmp_path), *options]) == 0
    ((arguments, target, _, timers),) = given
    assert target == gpu.Target(torch.device("cuda"), torch.float16, ("eager",), dry=False, seconds=0.3)
    assert timers == ("eager", "host")
    names = {provider.name for chosen in arguments.providers.values() for provider in chosen}
    assert names & {"compile", "peft", "eager"} == {"eager"}


def test_a_proof_is_for_the_same_machine_source_and_tests(monkeypatch):
    stamp = results.environment(CPU)
    proof = gpu.proof(stamp, ["tests"])
    assert proof == gpu.proof(replace(stamp, date="", commit=""), ["tests"])
    for name in ("device", "torch", "triton"):
        assert gpu.proof(replace(stamp, **{name: "other"}), ["tests"]) != proof
    assert gpu.proof(stamp, ["other"]) != proof
    monkeypatch.setattr(gpu, "source_digest", lambda: "other")
    assert gpu.proof(stamp, ["tests"]) != proof


def test_what_counts_as_wrong():
    """Whatever fails of fastlora and its kernels; rivals, and what cannot run, are only reported."""
    base = base_row(SMALL, PLAN)
    ours = ["fastlora", "fastlora-groups", TRITON, TRITON + OFF, ONE_LAUNCH, BLAS_AND_UPDATE]
    ours += [*primitives.SCHEDULES, primitives.PROJECTS]
    statuses = ("check failed: y", "error: broke", "unavailable: no GPU", results.OK)
    rows = [replace(base, provider=p, status=s) for p in [*ours, "peft", "compile"] for s in statuses]
    wrong = [(row.provider, row.status) for row in gpu.wrong_rows(rows)]
    assert wrong == list(itertools.product(ours, statuses[:2]))


def test_the_tables_show_the_first_timer(tmp_path, capsys):
    base = replace(base_row(SMALL, PLAN), mode="both", provider="fastlora", ratio=1.5)
    rows = [replace(base, timer="graph"), replace(base, timer="eager", status="check failed: y")]
    gpu.Progress(rows=rows).report(tmp_path, ("graph", "host"))
    printed = capsys.readouterr().out
    assert "graph timer" in printed
    assert "eager timer" not in printed
    assert "WRONG: fastlora M33-N40-K48-R4 both: check failed: y" in printed


def test_checks_of_a_case_have_its_bias_and_dropout(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "Checks", lambda problem: (seen.append(problem), Checks(problem))[1])
    (row,) = gpu.check_case("frozen", SMALL, replace(PLAN, bias=True, dropout=0.25))
    assert (row.status, row.bias, row.dropout) == (results.OK, True, 0.25)
    assert [(problem.bias is None, problem.dropout) for problem in seen] == [(False, 0.25)]


def test_gpu_script_end_to_end(dry_run, tmp_path, capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off in a process with a GPU")
    passing = "def test(): pass"
    assert dry_run(tests=passing) == 0
    out = tmp_path / "out"
    rows, stamp = results.read_csv(out / "gpu.csv")
    assert torch.__version__ in stamp
    sections = {row.section for row in rows}
    assert sections == {
        "mainloop",
        "training",
        "decode",
        "host",
        "dropout",
        "group",
        "model",
        "tiles",
        *gpu.HOPPER_PRODUCTS,
    }
    assert {row.mode for row in rows if row.section == "training"} == {"forward", "backward", "both"}
    assert {row.mode for row in rows if row.section == "mainloop"} == set(gpu.PRODUCTS)
    assert {row.mode for row in rows if row.section == "group"} == {*gpu.TRAINING, "inference"}
    assert {row.mode for row in rows if row.section == "model"} == {"both", "step"}
    checks, _ = results.read_csv(out / "checks.csv")
    assert {shape.N for shape in shapes.TINY_GROUP_SHAPES} < {row.N for row in checks}
    assert all(row.ratio > 0 for row in rows if row.status == results.OK)
    assert {row.status for row in rows if row.provider == "fastlora"} == {results.OK}
    for name in gpu.PICTURES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["correctness"], summary["left_out"], summary["wrong"]) == ("ok", [], [])
    assert "1 passed" in (out / "tests.log").read_text()
    printed = capsys.readouterr().out
    assert printed.index("correctness: pytest") < printed.index("training M33-N40-K48-R4")
    assert "geometric mean" in printed
    assert "tokens/s" in printed
    assert "h M5-N24-K17-R3 float32, cpu timer: 3 timed, 0 failed" in printed
    assert "block_m" not in printed.split("geometric mean")[1].split("tile shapes")[0]

    # The same source again: shown already, only what is asked for, after the rows that are there.
    (out / "tests.log").unlink()
    (out / "correctness.json").rename(tmp_path / "proof.json")
    drawn = []
    monkeypatch.setattr(gpu, "pictures", lambda rows, *_: drawn.extend(rows))
    assert dry_run("--only", "forward", "decode", "--proof", str(tmp_path / "proof.json"), tests=passing) == 0
    assert "shown by an earlier call" in capsys.readouterr().out
    assert not (out / "tests.log").exists()
    both, _ = results.read_csv(out / "gpu.csv")
    assert both[: len(rows)] == rows
    again = both[len(rows) :]
    assert {(row.section, row.mode) for row in again} == {("training", "forward"), ("decode", "inference")}
    assert len(drawn) == len(rows), "the newer row of each pair alone"
    assert all(row in drawn for row in again)


def test_gpu_script_leaves_out_what_does_not_fit(dry_run, tmp_path, capsys, monkeypatch):
    started = []

    class Spent(timing.Budget):
        def __init__(self, seconds):
            assert seconds < 9 * 60 - gpu.MOST_RESERVE - 0.1, "without the time that the tests took"
            super().__init__(seconds)
            self._longest = dict.fromkeys(("training", "decode"), 0.0)

        @property
        def remaining(self):
            return 1e9 if len(started) < 1 else 0.0

    units = gpu.units

    def counted(*arguments):
        return [
            gpu.Unit(unit.name, lambda unit=unit: (started.append(unit.name), unit.run())[1])
            for unit in units(*arguments)
        ]

    monkeypatch.setattr(gpu, "Budget", Spent)
    monkeypatch.setattr(gpu, "units", counted)
    monkeypatch.setattr(gpu, "correctness", lambda *_, **__: (time.sleep(0.1), results.OK)[1])
    assert dry_run("--only", "forward", "decode") == 0
    assert started == ["training M33-N40-K48-R4"]
    left_out = ["decode M5-N24-K17-R3", "training M5-N24-K17-R3"]  # the sections take turns
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["left_out"] == left_out
    assert f"left out for lack of time, 2: {', '.join(left_out)}" in capsys.readouterr().out


def test_gpu_units_in_the_order_of_their_weight(monkeypatch):
    """Each section's first shapes come before the ones for the time that is left; compiling is rare."""
    measured = []

    plans = collections.defaultdict(set)

    def noted(shape, chosen, plan, make):
        measured.append((plan.section, shape, plan.modes, [p.name for p in chosen]))
        plans[plan.section].add((plan.timers, plan.dropout, plan.dtype, plan.seconds, plan.min_rounds))

    monkeypatch.setattr(gpu, "measure", noted)
    monkeypatch.setattr(gpu, "measure_products", lambda shape, plan: None)
    swept = []
    monkeypatch.setattr(
        tiles, "measure_tiles", lambda product, shape, plan: swept.append((product, plan.timers))
    )
    target = gpu.Target(torch.device("cuda"), torch.bfloat16, ("graph", "eager"), dry=False, seconds=0.8)
    tested = []
    monkeypatch.setattr(gpu, "run_tests", lambda *arguments: tested.append(arguments[0]) or "no end")
    work = gpu.units(set(gpu.SECTIONS), tables.select(None), target, Path("unused"))
    loops = {"hopper": ("y", "dx"), "hopper-project": ("h+y", "g+dx"), "hopper-pingpong": ("y", "dx")}
    assert [unit.name.split()[0] for unit in work[-15:]] == [*loops] * 5
    assert {unit.name.split()[0] for unit in work[-15 - len(tiles.work()) : -15]} == {"tiles"}
    for unit, (section, modes) in zip(work[-3:], loops.items(), strict=True):
        assert {(row.mode, row.provider, row.status) for row in unit.run().rows} == {
            (mode, section, "check failed: no end") for mode in modes
        }
    assert len({unit.name for unit in work}) == len(work)
    for unit in work:
        unit.run()
    assert swept == [(product, ("graph",)) for product, _ in tiles.work()]
    assert ["pingpong" in tests for tests in tested] == [section == "hopper-pingpong" for section in loops]
    both = ("graph", "eager")
    for section, found in plans.items():
        timers, dropout = ("host",) if section == "host" else both, 0.1 if section == "dropout" else 0.0
        assert found == {(timers, dropout, torch.bfloat16, 0.8, 7)}
    assert {modes for section, _, modes, _ in measured if section == "host"} == {("inference", "both")}
    for section in ("mainloop", "host", "dropout", *loops):
        expected = {"host": {1}, "dropout": {8192, 4096}}.get(section, {8192})
        found = gpu.shapes_of(section, target)[0]
        assert ({shape.M for shape in found}, {shape.R for shape in found}) == (expected, {16})
    drawn = [section for sections in gpu.PICTURES.values() for section in sections]
    assert sorted([*drawn, "tiles"]) == sorted({unit.name.split()[0] for unit in work})
    order = [section for section, *_ in measured]
    assert order[:6] == ["training", "decode", "host", "dropout", "group", "model"]
    assert order[6:11] == ["training", "decode", "dropout", "group", "model"]
    firsts = {name: len(gpu.shapes_of(name, target)[0]) for name in dict.fromkeys(order)}
    assert order[: sum(firsts.values())].count("training") == firsts["training"]
    later = measured[sum(firsts.values()) :]
    assert {section for section, *_ in later} == {"training", "decode", "group"}
    assert all(shape.R != 16 or shape.M == 512 for _, shape, *_ in later)
    groups = {shape.M: modes for section, shape, modes, _ in measured if section == "group"}
    assert groups == {M: ("inference",) if M <= 16 else gpu.TRAINING for M in (8192, 4096, 512, 1, 16)}
    compiled = [shape for section, shape, _, names in measured if section == "model" and "compile" in names]
    assert compiled == shapes.MODEL_SHAPES[:1]


def test_the_planned_calls_measure_what_they_name():
    """Each command of NOTES.md has time for several units of each section, even if they last as guessed."""
    notes = (ROOT / "benchmarks" / "results" / "NOTES.md").read_text(encoding="utf-8")
    (plan,) = (block for block in notes.split("```")[1::2] if "benchmarks/gpu.py" in block)
    calls = [call.replace("\\\n", " ").strip().splitlines() for call in plan.strip().split("\n\n")]
    assert len(calls) == 3
    for call in calls:
        minutes = [float(number) for line in call for number in re.findall(r"--minutes ([\d.]+)", line)]
        minutes += [float(number) / 60 for line in call for number in re.findall(r"timeout (\d+)", line)]
        assert sum(minutes) <= 9.0, call
        for line in call:
            words = shlex.split(line)
            if "benchmarks/gpu.py" not in words:
                continue
            options = gpu._arguments(words[2:])
            cuda = torch.device("cuda")
            target = gpu.Target(cuda, torch.bfloat16, tuple(options.timers), dry=False, seconds=0.8)
            now = [0.0]
            budget = timing.Budget(60 * options.minutes - gpu.MOST_RESERVE, clock=lambda now=now: now[0])
            if "correctness" in options.only:
                now[0] += 200.0
            started = collections.Counter()

            def lasting(kind, seconds, now=now, started=started):
                now[0] += seconds if kind not in started else seconds / 3
                started[kind] += 1

            for unit in gpu.units(set(options.only), options.providers, target, Path("unused")):
                kind = unit.name.split()[0]
                budget.run(unit.name, functools.partial(lasting, kind, unit.guess or 12.0), unit.guess)
            sections = {gpu_section(name) for name in options.only} - {"correctness"}
            assert started.keys() == sections
            assert min(count for kind, count in started.items() if kind != "host") >= 2, started


def gpu_section(name):
    return "training" if name in gpu.TRAINING else name


def test_checks_in_processes_of_their_own(monkeypatch):
    """The providers are checked there, and a case whose process dies is a failure."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off in a process with a GPU")
    monkeypatch.setattr(tiles, "MOST_WORKERS", 2)
    monkeypatch.setattr(gpu, "CHECK_SHAPES", [Shape(9, 24, 17, 3)])
    monkeypatch.setattr(gpu, "CHECK_GROUPS", gpu.TINY_GROUP_SHAPES[1:])
    target = gpu.Target(CPU, torch.float32, ("cpu",), dry=False, seconds=0.01)
    tiles.pool.cache_clear()
    try:
        rows = gpu.check_providers(tables.select("frozen,fastlora"), target)
        assert {row.status for row in rows} == {results.OK}
        assert {(row.M, row.dtype, row.dropout, row.provider) for row in rows} == {
            *itertools.product((9,), ("bfloat16", "float16"), (0.0, 0.1), ("frozen", "fastlora")),
            *itertools.product((16,), ("bfloat16",), (0.0,), ("frozen", "fastlora")),
        }
        monkeypatch.setattr(gpu, "check_case", dies_with_a_mask)
        rows = gpu.check_providers(tables.select("frozen,fastlora"), target)
        wrong = gpu.wrong_rows(rows)
        assert [(row.dtype, row.dropout) for row in wrong] == [("bfloat16", 0.1), ("float16", 0.1)]
        assert {row.status.split(": ")[2] for row in wrong} == {"BrokenProcessPool"}
        assert len(rows) == 2 + 3 * 2
        rows = gpu.check_providers(tables.select("frozen,fastlora"), target, seconds=0.0)
        assert {row.status.split(": ")[2] for row in rows} == {"TimeoutError"}
    finally:
        tiles.pool.cache_clear()


def dies_with_a_mask(names, shape, plan):
    if plan.dropout:
        os._exit(1)
    return CHECK_CASE(names, shape, plan)


CHECK_CASE = gpu.check_case


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("def test(): assert False", "pytest ended with status 1"),
        ("import pytest\n@pytest.mark.skip\ndef test(): pass", "no test passed (1 skipped)"),
        ("", "pytest ended with status 5"),
    ],
)
def test_gpu_script_times_nothing_if_the_tests_fail(dry_run, tmp_path, capsys, tests, message):
    assert dry_run("--only", "both", tests=tests) == 1
    assert f"correctness: {message}; nothing was timed" in capsys.readouterr().out
    assert not (tmp_path / "out" / "gpu.csv").exists()
    assert dry_run("--only", "both", tests="def test(): pass") == 0  # run anew, whatever the proof says


def test_gpu_script_ends_hung_tests(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text("import time\ndef test(): time.sleep(60)")
    status = gpu.run_tests([str(tmp_path / "test_it.py")], tmp_path / "log", 1.5)
    assert status == "the tests did not end within 2 s"

    class Process:
        pid, returncode = 1, 0

        def __init__(self, hangs):
            self.hangs = hangs

        def wait(self, timeout=None):
            if self.hangs and timeout is not None:
                raise subprocess.TimeoutExpired("pytest", timeout)
            return 0

    ended = []
    parts = iter([Process(False), Process(True)])
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda *_, **__: next(parts))
    monkeypatch.setattr(gpu.os, "killpg", lambda pid, signal: ended.append(pid))
    status = gpu.run_tests([], tmp_path / "log", 7.0, processes=2)
    assert (status, ended) == ("the tests did not end within 7 s", [1]), "though another process did"


@pytest.mark.parametrize(
    ("table", "break_it"), [(PROVIDERS, broken), (group_providers.GROUP_PROVIDERS, broken_branch)]
)
def test_gpu_script_times_nothing_if_a_check_fails(dry_run, tmp_path, capsys, monkeypatch, table, break_it):
    wrong = replace(break_it("dA")[0], name="fastlora")
    monkeypatch.setitem(table, "fastlora", wrong)
    assert dry_run("--only", "both") == 1
    assert "of fastlora's checks failed; nothing was timed" in capsys.readouterr().out
    assert not (tmp_path / "out" / "gpu.csv").exists()


def test_gpu_script_fails_if_the_decoder_layer_is_wrong(dry_run, tmp_path, monkeypatch):
    wrong = replace(broken_projection("dB")[0], name="fastlora-groups")
    monkeypatch.setitem(model_providers.MODEL_PROVIDERS, "fastlora-groups", wrong)
    assert dry_run("--only", "model", chosen="peft,fastlora,fastlora-groups") == 1
    failed = json.loads((tmp_path / "out" / "summary.json").read_text())["wrong"]
    assert [line.split(" of ")[0] for line in failed] == [
        f"fastlora-groups M48-N24-K32-R4 {mode}: check failed: dB" for mode in ("both", "step")
    ]
    rows, _ = results.read_csv(tmp_path / "out" / "gpu.csv")
    assert {row.provider for row in rows if row.ratio} == {"frozen", "peft", "fastlora"}


def test_gpu_script_reports_a_rival_that_fails_and_goes_on(dry_run, tmp_path, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "eager", replace(broken("y")[0], name="eager"))
    assert dry_run("--only", "both") == 0
    rows, _ = results.read_csv(tmp_path / "out" / "gpu.csv")
    statuses = {row.provider: row.status for row in rows}
    assert statuses["eager"].startswith("check failed: y")
    assert statuses["fastlora"] == results.OK


def run_failing(error):
    """What run_units makes of two units, each of which raises."""

    def fails():
        raise error

    progress = gpu.Progress()
    work = [gpu.Unit("one", fails), gpu.Unit("two", fails)]
    gpu.run_units(work, timing.Budget(60.0), None, progress, CPU)
    assert progress.rows == []
    return progress.wrong


def test_gpu_script_ends_timing_at_a_device_error(monkeypatch):
    monkeypatch.setattr(gpu, "device_works", lambda device: False)
    wrong = run_failing(RuntimeError("illegal memory access"))
    assert wrong == ["one: RuntimeError: illegal memory access; timing ended there"]


def test_gpu_script_goes_on_after_an_error_of_one_unit():
    assert run_failing(RuntimeError("odd")) == ["one: RuntimeError: odd", "two: RuntimeError: odd"]
    assert run_failing(torch.OutOfMemoryError("full")) == ["one: full", "two: full"]


def test_gpu_script_can_time_in_spite_of_failing_tests(dry_run, tmp_path, capsys):
    assert dry_run("--only", "both", "--anyway", tests="def test(): assert False") == 1
    out = tmp_path / "out"
    rows, stamp = results.read_csv(out / "gpu.csv")
    assert {row.provider for row in rows if row.ratio} == {"frozen", "eager", "fastlora"}
    assert "+failing-tests" in stamp
    assert json.loads((out / "summary.json").read_text())["wrong"] == ["pytest ended with status 1"]
    (tmp_path / "test_it.py").unlink()
    capsys.readouterr()
    arguments = ["--out", str(out), "--providers", "frozen,eager,fastlora", "--only", "both"]
    arguments += ["--tests", str(tmp_path / "test_it.py"), "--anyway", "--no-pictures", "--dry-run-cpu"]
    assert gpu.main(arguments) == 1
    assert "shown by an earlier call" in capsys.readouterr().out


@pytest.mark.parametrize(("count", "status"), [(5, "OK"), (40, "OK"), (40, "failed"), (0, "none")])
def test_gpu_script_shares_the_tests_among_processes(tmp_path, count, status):
    """Each test runs in one of them, whether there are tests for all or not."""
    failing = f"assert i != {count - 1}" if status == "failed" else "pass"
    (tmp_path / "conftest.py").write_text(
        (ROOT / "tests" / "conftest.py")
        .read_text()
        .replace(
            "sys.path.insert(0, str(Path(__file__).parent))", f"sys.path.insert(0, {str(ROOT / 'tests')!r})"
        )
    )
    (tmp_path / "test_it.py").write_text(
        f"import pytest\n@pytest.mark.parametrize('i', range({count}))\n"
        f"def test(i):\n    open({str(tmp_path)!r} + f'/ran-{{i}}', 'x')\n    {failing}\n"
        if count
        else ""
    )
    found = gpu.run_tests([str(tmp_path / "test_it.py")], tmp_path / "log", 120.0, processes=3)
    assert len(list(tmp_path.glob("ran-*"))) == count
    expected = {
        "OK": results.OK,
        "failed": "pytest ended with status 1",
        "none": "pytest ended with status 5",
    }
    assert found == expected[status]
    if status == "failed":
        assert "1 failed" in (tmp_path / "log").read_text()[-3000:]


def test_a_replay_keeps_what_it_replays(monkeypatch):
    """A graph reads what its function holds, the forward that a backward pass needs above all."""
    if torch.cuda.is_available():
        pytest.skip("a stand-in for CUDA")

    class Stand(contextlib.nullcontext):
        def __init__(self, *_, **__):
            super().__init__()

        def wait_stream(self, stream):
            pass

        def replay(self):
            pass

    for name in ("graph", "stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Stand)
    monkeypatch.setattr(torch.cuda, "current_stream", Stand)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    held = torch.zeros(3)
    alive = weakref.ref(held)
    replay = timing.captured(lambda held=held: held.add_(1), Stand())
    del held
    replay()
    assert alive() is not None
    del replay
    assert alive() is None


def test_gpu_script_default_tests_are_collected():
    """Its deselections name tests that exist; without a GPU they are collected all the same."""
    names = [argument.split("=")[1] for argument in gpu.TESTS.split() if argument.startswith("--")]
    assert len(names) == 4
    for name in names:
        path, *parts = name.split("::")
        text = (ROOT / path).read_text()
        assert all(f"class {part}" in text or f"def {part}" in text for part in parts), name


def test_a_rival_that_breaks_after_its_check_costs_its_own_rows():
    """At any of its calls: in the check, in the step whose memory is taken, while it warms up or is timed."""
    for good in range(12):
        calls = iter(range(10**6))

        def build(problem, calls=calls, good=good):
            layer = PROVIDERS["eager"].build(problem)

            def call(x):
                if next(calls) >= good:
                    raise RuntimeError("broke")
                return layer.call(x)

            return replace(layer, call=call)

        rival = replace(PROVIDERS["eager"], name="rival", build=build)
        plan = replace(PLAN, modes=("forward", "both"))
        rows = measure(SMALL, [PROVIDERS["frozen"], rival, PROVIDERS["fastlora"]], plan).rows
        statuses = {(row.mode, row.provider): row.status for row in rows}
        assert len(rows) == len(statuses) == 6
        assert statuses["both", "fastlora"] == statuses["forward", "fastlora"] == results.OK
        assert "RuntimeError: broke" in statuses["both", "rival"]


# --- Fresh processes ---


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_watchdog_ends_a_hung_process():
    program = "import gpu, time; gpu.watchdog(0.1); time.sleep(60)"
    run = python("-c", program, PYTHONPATH=str(BENCHMARKS))
    assert run.returncode == 3
    assert "did not end" in run.stdout
    program = "import gpu, time; gpu.watchdog(0.1, lambda: print('so far')); time.sleep(60)"
    run = python("-c", program, PYTHONPATH=str(BENCHMARKS))
    assert (run.returncode, run.stdout.split("\n")[0]) == (3, "so far")


def test_source_tree_without_an_install():
    """In a process that finds no fastlora, install() maps both packages and nothing named `kernels`."""
    program = textwrap.dedent(
        f"""
        import importlib.util, sys
        root = {str(ROOT)!r}
        sys.meta_path[:] = [f for f in sys.meta_path if "fastlora" not in getattr(f, "__module__", "")]
        sys.path[:] = [entry for entry in sys.path if entry != root]
        assert importlib.util.find_spec("fastlora") is None, "still installed"
        sys.path.append({str(BENCHMARKS)!r})
        import source_tree
        source_tree.install()
        source_tree.install()
        assert "fastlora" not in sys.modules
        import fastlora, fastlora.kernels.configs
        assert fastlora.__file__ == root + "/fastlora/__init__.py", fastlora.__file__
        assert fastlora.kernels.configs.__file__ == root + "/kernels/configs.py"
        kernels = importlib.util.find_spec("kernels")
        assert kernels is None or not kernels.origin.startswith(root), kernels.origin
        assert root not in sys.path and "triton" not in sys.modules
        print(len([f for f in sys.meta_path if type(f).__module__ == "source_tree"]))
        """
    )
    run = python("-I", "-c", program)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "1\n"


def test_source_tree_refuses_a_second_fastlora(monkeypatch):
    import source_tree

    monkeypatch.setattr(sys.modules["fastlora"], "__file__", "/elsewhere/fastlora/__init__.py")
    with pytest.raises(RuntimeError, match="another fastlora is imported already: /elsewhere"):
        source_tree.install()


def test_pytest_benchmarks_of_a_gpu():
    """By graphs, in bfloat16, without biases, for training and decoding."""
    options = ("shape", "dtype", "modes", "providers", "seconds")
    option = SimpleNamespace(bench_device="cuda", **{f"bench_{name}": None for name in options})
    choice = harness.choice(SimpleNamespace(option=option), bench_linear.BENCHMARK)
    plan = choice.plan
    assert (plan.timers, plan.dtype, plan.bias) == (("graph",), torch.bfloat16, False)
    assert list(choice.modes) == shapes.TRAINING_SHAPES + shapes.DECODE_SHAPES
    training = ("forward", "backward", "both")
    assert {shape.M: modes for shape, modes in choice.modes.items()} == {
        **dict.fromkeys((1, 16), (*training, "inference")),
        **dict.fromkeys((512, 4096, 8192), training),
    }


ON_A_CPU = ("--bench-device", "cpu")


def test_pytest_benchmarks_share_one_measurement(tmp_path, monkeypatch):
    """Each shape is measured once in its share of the time; every test replays its own, the file has all."""
    given = []

    def measured(shape, chosen, plan, make):
        given.append((shape, plan.modes, plan.seconds))
        base = replace(base_row(shape, plan), timer="cpu", provider="frozen")
        rows = [replace(base, mode=mode, ratio=r) for mode, r in (("forward", 1.0), ("both", 2.0))]
        times = {row.mode: timing.Timing((row.ratio, 4.0)) for row in rows}
        return Measurement(rows, {(mode, "cpu", "frozen"): time for mode, time in times.items()})

    options = {"shape": ["5,24,17,3", "6,24,17,3"], "modes": "forward,both", "seconds": 8.0, "device": "cpu"}
    options |= {"dtype": None, "providers": None, "out": tmp_path}
    option = SimpleNamespace(**{f"bench_{name}": value for name, value in options.items()})
    monkeypatch.setattr(harness, "measure", measured)
    monkeypatch.setattr(harness, "draw", lambda *_: False)
    session = harness.Session(SimpleNamespace(option=option), bench_linear.BENCHMARK)
    replayed = []
    stand_in = SimpleNamespace(
        extra_info={}, pedantic=lambda advance, rounds: replayed.append([advance() for _ in range(rounds)])
    )
    asked = [Shape(5, 24, 17, 3), Shape(6, 24, 17, 3)]
    for shape, (mode, ratio) in itertools.product(asked, (("forward", 1.0), ("both", 2.0))):
        start = harness.REPLAY.now()
        session.report(shape, mode, "frozen", SimpleNamespace(getfixturevalue=lambda name: stand_in))
        assert (stand_in.extra_info["ratio"], harness.REPLAY.now() - start) == (ratio, ratio + 4.0)
    assert given == [(shape, ("forward", "both"), 2.0) for shape in asked]
    assert [len(rounds) for rounds in replayed] == [2] * 4
    session.write()
    rows, _ = results.read_csv(tmp_path / "linear.csv")
    assert [(row.M, row.mode) for row in rows] == list(itertools.product((5, 6), ("forward", "both")))


def test_pytest_benchmarks_fail_where_fastlora_is_wrong(tmp_path):
    (tmp_path / "wrong.py").write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(BENCHMARKS)!r})
            import dataclasses, providers
            p = providers.PROVIDERS
            for name in ("eager", "fastlora-addmm"):
                p[name] = dataclasses.replace(p[name], build=lambda problem: providers._build_merged(
                    dataclasses.replace(problem, alpha=2.0)))
            """
        )
    )
    arguments = ["-p", "wrong", "--bench-shape", "5,24,17,3", "--bench-modes", "both", *ON_A_CPU]
    arguments += [
        "--bench-providers",
        "merged,eager,unsloth,fastlora-addmm",
        "--bench-seconds",
        "0.01",
        "--bench-out",
        tmp_path / "out",
    ]
    script = Path(sys.executable).with_name("pytest")
    run = python(script, "benchmarks", "-q", *arguments, PYTHONPATH=str(tmp_path))
    assert "1 failed, 2 passed, 2 skipped" in run.stdout, run.stdout + run.stderr
    assert run.returncode == 1
    assert "fastlora-addmm on M5-N24-K17-R3: check failed: y: largest error" in run.stdout
    assert "eager check failed: y: largest error" in run.stdout
    assert "unsloth unavailable: apply_lora_o has no bias" in run.stdout
    rows, _ = results.read_csv(tmp_path / "out" / "linear.csv")
    assert {row.provider for row in rows if row.ratio} == {"frozen", "merged"}
    assert (tmp_path / "out" / "linear.png").exists()


def test_pytest_benchmarks_of_groups_and_models(tmp_path):
    """Shapes choose their file; each writes its CSV and picture, the model a table of its steps."""
    arguments = ["--bench-shape", "16,24+9,17,3", "--bench-shape", "2x24,32,4", "--bench-seconds", "0.01"]
    arguments += ["--bench-providers", "peft,fastlora,fastlora-groups", "--bench-out", tmp_path / "out"]
    arguments += ON_A_CPU
    script = Path(sys.executable).with_name("pytest")
    run = python(script, "benchmarks", "-q", *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "11 passed" in run.stdout, "three providers' inference of the group, four by both and step"
    assert "tokens/s  over PEFT" in run.stdout
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"group.csv", "group.png", "model.csv", "model.png"}
    rows, _ = results.read_csv(out / "group.csv")
    assert {(r.section, r.M, r.N, r.mode, r.provider) for r in rows} == {
        ("group", 16, 33, "inference", name) for name in ("frozen", "peft", "fastlora")
    }
    rows, _ = results.read_csv(out / "model.csv")
    assert {(r.M, r.N, r.K, r.mode) for r in rows} == {(48, 24, 32, "both"), (48, 24, 32, "step")}
    assert all(row.median_ms > 0 and row.status == results.OK for row in rows)
