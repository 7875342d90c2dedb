"""Groups of layers that share x: the functional form, its operators and kernel, and whole models."""

import copy
import dataclasses
import gc
import pickle
import threading
import weakref
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    HALF,
    assert_matches,
    differentiate,
    draws_of,
    dtype_id,
    eager,
    eager_autocast,
    every_run,
    exact,
    fused,
    keep_factors,
    tensors,
    worst_errors,
)
from tolerance import LAYOUTS, assert_as_accurate, lay_far_apart, lay_out
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import dtensors, masks, ops, reference
from fastlora.device import Device
from fastlora.group import _chunks, lora_linear_group
from fastlora.kernels import configs
from fastlora.planner import Problem, make_group_plan, make_plan

KINDS = ("A", "B", "bias")
# (N, R) of each branch: grouped-query attention with three ranks, and gate/up.
QKV, GATE_UP = ((50, 16), (24, 5), (33, 9)), ((40, 4), (40, 4))
ALPHAS = (1.7, -0.5, 0.3, 2.0, 1.0)


def group(lead, K, branches, dtype=torch.float32, adapter_dtype=None, device="cpu", bias=(True, False)):
    """Branches of one x; biases are there and missing in turn."""
    cases = [
        tensors(lead, N, K, R, dtype, adapter_dtype, device, bias[i % len(bias)])
        for i, (N, R) in enumerate(branches)
    ]
    for case in cases:
        case.x = cases[0].x
    return SimpleNamespace(
        x=cases[0].x,
        cases=cases,
        alphas=ALPHAS[: len(cases)],
        redraw=lambda: group(lead, K, branches, dtype, adapter_dtype, device, bias),
    )


def grouped(alphas, dropout=0.0, seed=None, path="auto"):
    """``lora_linear_group`` as a function of x and lists of tensors."""

    def function(x, weights, As, Bs, biases):
        with fastlora.use_path(path):
            return lora_linear_group(x, weights, As, Bs, alphas, biases, dropout, seed)

    return function


def apart(forms):
    """Each branch by a form of its own, as a function of x and lists of tensors."""

    def function(x, weights, As, Bs, biases):
        return tuple(form(x, *t) for form, *t in zip(forms, weights, As, Bs, biases, strict=True))

    return function


def leaves_of_group(problem, wanted=("x", *KINDS)):
    """The arguments of a function of x and lists of tensors, and by name those that need gradients."""
    x = problem.x.detach().requires_grad_("x" in wanted)
    lists = {
        name: [
            None if (t := getattr(c, name)) is None else t.detach().requires_grad_(name in wanted)
            for c in problem.cases
        ]
        for name in ("weight", *KINDS)
    }
    leaves = {"x": x} if "x" in wanted else {}
    for name in KINDS:
        if name in wanted:
            leaves |= {f"{name}{i}": t for i, t in enumerate(lists[name]) if t is not None}
    return (x, *lists.values()), leaves


def run_group(function, problem, wanted=("x", *KINDS)):
    """y0, y1, ... and the gradients x, A0, B0, bias0, ... of a function of x and lists of tensors."""
    arguments, leaves = leaves_of_group(problem, wanted)
    ys = function(*arguments)
    grads = torch.autograd.grad(ys, list(leaves.values()), [c.dy for c in problem.cases])
    return SimpleNamespace(
        **{f"y{i}": y.detach() for i, y in enumerate(ys)}, **dict(zip(leaves, grads, strict=True))
    )


def exact_group(problem, keep=None):
    """The float64 results of every branch; dx is their sum."""
    results = {}
    for i, (case, alpha) in enumerate(zip(problem.cases, problem.alphas, strict=True)):
        one = exact(case, alpha, keep)
        results |= {f"{name}{i}": getattr(one, name) for name in ("y", *KINDS)}
        results["x"] = results.get("x", 0) + one.x
    return SimpleNamespace(**results)


def eager_group_errors(problem, keep=None):
    """As cases.eager_errors, for a group: the worst (max, RMS) of eager PyTorch's forms."""

    def forms(draw):
        forms = [apart([eager(alpha, keep) for alpha in draw.alphas])]
        if any(case.A.dtype != draw.x.dtype for case in draw.cases):
            forms.append(apart([eager_autocast(draw.x.dtype, alpha, keep) for alpha in draw.alphas]))
        return forms

    return worst_errors(draws_of(problem), forms, run_group, lambda draw: exact_group(draw, keep))


def check(problem, run, dropout=0.0, seed=None, keep=None):
    ours = run_group(grouped(problem.alphas, dropout, seed, run.path), problem)
    assert_matches(ours, exact_group(problem, keep), eager_group_errors(problem, keep))
    return ours


class TestValues:
    @pytest.mark.parametrize("dtypes", [d for d in DTYPES if d[0] in HALF], ids=dtype_id)
    @pytest.mark.parametrize(("M", "K", "branches"), [(1, 65, GATE_UP), (37, 70, QKV)])
    def test_in_the_order_of_a_gpus_blas(self, as_blas_on_a_gpu, dtypes, M, K, branches):
        check(group(M, K, branches, *dtypes), SimpleNamespace(path="addmm"))

    @every_run
    @pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize(("M", "K", "branches"), [(1, 65, GATE_UP), (37, 70, QKV)])
    def test_against_float64(self, run, dtypes, M, K, branches, poisoned_empty):
        problem = group(M, K, branches, *dtypes, device=run.device)
        ours = check(problem, run)
        for i, case in enumerate(problem.cases):
            assert getattr(ours, f"y{i}").dtype == case.x.dtype
            for name in KINDS:
                if getattr(case, name) is not None:
                    assert getattr(ours, f"{name}{i}").dtype == getattr(case, name).dtype

    @every_run
    @pytest.mark.parametrize("lead", [(), (0,), (2, 0), (1,), (3, 5), (2, 1, 3)])
    def test_leading_sizes(self, run, lead, poisoned_empty):
        ours = check(group(lead, 40, QKV, torch.float16, device=run.device), run)
        assert ours.x.shape == (*lead, 40)
        assert [getattr(ours, f"y{i}").shape for i in range(3)] == [(*lead, N) for N, _ in QKV]

    @every_run
    @pytest.mark.parametrize("empty", ["out_features", "in_features"])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_empty_features(self, run, empty, dropout):
        K, branches = (0, QKV) if empty == "in_features" else (40, ((24, 4), (0, 4)))
        problem = group(7, 1, branches, device=run.device)
        for case in problem.cases:
            case.x, case.weight, case.B = (t[:, :1].expand(-1, K) for t in (case.x, case.weight, case.B))
        problem.x = problem.cases[0].x
        seed = torch.tensor([3], device=run.device)
        ours = run_group(grouped(problem.alphas, dropout, seed, run.path), problem)
        keep = keep_factors(seed, problem.cases[0], dropout) if dropout and K else None
        plain = run_group(apart([eager(alpha, keep) for alpha in problem.alphas]), problem)
        for name, value in vars(ours).items():
            torch.testing.assert_close(value, getattr(plain, name), rtol=1e-4, atol=1e-5)

    @every_run
    @pytest.mark.parametrize("operand", ["x", "weight", "A", "B", "dy"])
    @pytest.mark.parametrize("layout", LAYOUTS[1:])
    def test_strided_operands(self, run, operand, layout):
        problem = group(19, 40, QKV, torch.float16, device=run.device)
        truth, yardstick = exact_group(problem), eager_group_errors(problem)
        for case in problem.cases:
            setattr(case, operand, lay_out(getattr(case, operand), layout))
        problem.x = problem.cases[0].x
        ours = run_group(grouped(problem.alphas, path=run.path), problem)
        assert_matches(ours, truth, yardstick)

    @every_run
    def test_expanded_dy_of_a_plain_sum(self, run):
        problem = group((3, 4), 40, QKV, torch.float16, device=run.device)
        for case in problem.cases:
            case.dy = torch.ones((), dtype=torch.float16, device=run.device).expand(case.dy.shape)
        check(problem, run)

    @every_run
    @pytest.mark.parametrize(
        "branches",
        [((20, 128), (12, 120), (9, 100)), ((20, 300), (12, 4), (9, 4)), ((8, 2),) * 5],
        ids=["rank_sum", "one_rank", "five"],
    )
    def test_more_than_one_launch_takes(self, run, branches):
        """Rank sums past MAX_RANK and more than MAX_BRANCHES branches."""
        if run.path == "triton" and branches[0][1] > configs.MAX_RANK:
            with pytest.raises(RuntimeError, match="ranks up to 256, not 300"):
                check(group(20, 40, branches, torch.float16, device=run.device), run)
            return
        check(group(20, 40, branches, torch.float16, device=run.device), run)

    @every_run
    @pytest.mark.parametrize("half", HALF, ids=dtype_id)
    def test_branches_of_different_adapter_dtypes(self, run, half):
        problem = group(37, 40, QKV, half, device=run.device)
        problem.cases[1].A, problem.cases[1].B = problem.cases[1].A.float(), problem.cases[1].B.float()
        ours = check(problem, run)
        assert [ours.A0.dtype, ours.B1.dtype, ours.B2.dtype] == [half, torch.float32, half]

    @every_run
    def test_group_of_one_is_lora_linear(self, run):
        problem = group((3, 5), 40, QKV[:1], torch.float16, device=run.device)
        ours = run_group(grouped((0.5,), path=run.path), problem)
        single = differentiate(fused(0.5, path=run.path), problem.cases[0])
        for name in ("y", *KINDS):
            assert torch.equal(getattr(ours, f"{name}0"), getattr(single, name)), name
        assert torch.equal(ours.x, single.x)

    @every_run
    def test_without_gradients_the_same_values(self, run):
        problem = group((3, 5), 40, QKV, torch.float16, device=run.device)
        lists = [[getattr(c, name) for c in problem.cases] for name in ("weight", *KINDS)]
        with torch.no_grad():
            ys = grouped(problem.alphas, path=run.path)(problem.x, *lists)
        ours = run_group(grouped(problem.alphas, path=run.path), problem)
        assert all(torch.equal(y, getattr(ours, f"y{i}")) for i, y in enumerate(ys))
        assert not any(y.requires_grad for y in ys)

    def test_outputs_may_be_changed_in_place(self):
        """None of them is a view, so that an activation in place works."""
        problem = group((3, 5), 40, QKV)
        x = problem.x.requires_grad_()
        lists = [[getattr(c, name) for c in problem.cases] for name in ("weight", *KINDS)]
        for y in grouped(problem.alphas)(x, *lists):
            y.relu_()

    def test_the_plain_formula_is_the_oracle(self):
        problem = group((3, 5), 40, QKV, torch.float64)
        lists = [[getattr(c, name) for c in problem.cases] for name in ("weight", *KINDS)]
        weights, As, Bs, biases = lists
        ys = reference.lora_linear_group(problem.x, weights, As, Bs, problem.alphas, biases)
        truth = exact_group(problem)
        for i, y in enumerate(ys):
            torch.testing.assert_close(y, getattr(truth, f"y{i}"))
        without = reference.lora_linear_group(problem.x, weights, As, Bs, problem.alphas)
        torch.testing.assert_close(without[0] + biases[0], ys[0])


class TestDropout:
    @every_run
    @pytest.mark.parametrize("dtypes", DTYPES[1::2], ids=dtype_id)
    @pytest.mark.parametrize("dropout", [0.3, 1.0])
    def test_all_branches_drop_the_oracles_elements(self, run, dtypes, dropout):
        problem = group((9, 4), 70, QKV, *dtypes, device=run.device)
        seed = torch.tensor([-(2**61)], device=run.device)
        keep = keep_factors(seed, problem.cases[0], dropout)
        check(problem, run, dropout, seed, keep)

    @every_run
    def test_the_seed_is_drawn_once_from_torchs_generator(self, run):
        problem = group(20, 40, ((8, 2),) * 5, device=run.device)  # two launches, one mask
        function = grouped(problem.alphas, 0.4, None, run.path)
        torch.manual_seed(5)
        first = run_group(function, problem)
        torch.manual_seed(5)
        seed = masks.new_seed(problem.x.device)
        truth = exact_group(problem, keep_factors(seed, problem.cases[0], 0.4))
        for name, value in vars(first).items():
            torch.testing.assert_close(value.double(), getattr(truth, name), rtol=1e-4, atol=1e-4)


def recorded(monkeypatch, name):
    """What the operators' implementations are called with."""
    calls, function = [], getattr(ops, name)

    def wrapper(*args):
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(ops, name, wrapper)
    return calls


class TestOnlyWhatIsAskedFor:
    @every_run
    @pytest.mark.parametrize("used", [(0,), (2,), (0, 1), (1, 2)])
    def test_unused_outputs(self, run, used, monkeypatch):
        problem = group((3, 5), 40, QKV, torch.float16, device=run.device)
        leaves = [
            [None if (t := getattr(c, name)) is None else t.detach().requires_grad_() for c in problem.cases]
            for name in KINDS
        ]
        x = problem.x.detach().requires_grad_()
        ys = grouped(problem.alphas, path=run.path)(x, [c.weight for c in problem.cases], *leaves)
        calls = recorded(monkeypatch, "group_backward")
        torch.autograd.backward([ys[i] for i in used], [problem.cases[i].dy for i in used])
        assert [dy is not None for dy in calls[0][0]] == [i in used for i in range(3)]
        part = SimpleNamespace(
            x=problem.x,
            cases=[problem.cases[i] for i in used],
            alphas=[problem.alphas[i] for i in used],
            redraw=problem.redraw,
        )
        truth = exact_group(part)
        yardstick = run_group(apart([eager(alpha) for alpha in part.alphas]), part)
        assert_as_accurate(x.grad, yardstick.x, truth.x, "x")
        for name, tensors_ in zip(KINDS, leaves, strict=True):
            for i, leaf in enumerate(tensors_):
                if leaf is None or i not in used:
                    assert leaf is None or leaf.grad is None
                    continue
                key = f"{name}{used.index(i)}"
                assert_as_accurate(leaf.grad, getattr(yardstick, key), getattr(truth, key), key)

    @every_run
    @pytest.mark.parametrize(
        "trained", [("x",), ("A0",), ("B2",), ("B1", "B2"), ("bias0",), ("x", "B2"), ("A1", "B0", "x")]
    )
    def test_frozen_tensors(self, run, trained):
        problem = group((3, 5), 40, QKV, torch.float16, device=run.device)
        full = run_group(grouped(problem.alphas, path=run.path), problem)
        x = problem.x.detach().requires_grad_("x" in trained)
        named = {"x": x}
        lists = []
        for name in ("weight", *KINDS):
            lists.append([getattr(c, name) for c in problem.cases])
            for i in range(3):
                if f"{name}{i}" in trained:
                    lists[-1][i] = named[f"{name}{i}"] = lists[-1][i].detach().requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            ys = grouped(problem.alphas, path=run.path)(x, *lists)
        own = {t.data_ptr() for t in (*lists[0], *lists[1], *lists[2])}
        beyond = [tuple(t.shape) for t in saved if t.data_ptr() not in own]
        expected = [(3, 5, 40)] * any(name[0] == "B" for name in trained)
        expected += [(15, 30)] * any(name[0] == "A" for name in trained)
        assert beyond == expected
        grads = torch.autograd.grad(ys, [named[name] for name in trained], [c.dy for c in problem.cases])
        for name, grad in zip(trained, grads, strict=True):
            # An order of its own for the stacked ranks changes nothing but rounding.
            torch.testing.assert_close(grad, getattr(full, name), rtol=2e-2, atol=2e-2)

    def test_launches(self, kernel_device, monkeypatch):
        """One pass over x for h, one gradient of x, one pass over x for all of dB."""
        from fastlora.kernels import gemm, project, token_sum
        from fastlora.kernels import group as kernel

        counts = dict.fromkeys(("project", "gemm", "token_sum", "group_dx"), 0)

        def counted(name, launch):
            def wrapper(*args, **kwargs):
                counts[name] += 1
                return launch(*args, **kwargs)

            return wrapper

        for module, name in zip((project, gemm, token_sum, kernel), counts, strict=True):
            monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
        problem = group(40, 40, QKV, torch.float16, device=kernel_device)
        run_group(grouped(problem.alphas, path="triton"), problem)
        assert counts == {"project": 1 + 3, "gemm": 3, "group_dx": 1, "token_sum": 3 + 1}


@pytest.mark.parametrize("path", ["auto", "addmm", "reference"])
def test_float64_of_many_tokens_and_ranks(path):
    """No kernel's tile of that size would fit a GPU, and none is asked for."""
    x, *rest = (torch.randn(*shape, dtype=torch.float64) for shape in ((65, 8), (4, 8), (4, 17), (17, 8)))
    arguments = x, *([t] * 2 for t in rest), [1.0, 0.5]
    with fastlora.use_path(path):
        ours = lora_linear_group(*arguments)
    for y, truth in zip(ours, reference.lora_linear_group(*arguments), strict=True):
        torch.testing.assert_close(y, truth)


@pytest.mark.parametrize("partial", [False, True])
def test_sharded_tensors_take_the_plain_formula(partial, tmp_path, monkeypatch):
    """partial: where PyTorch would scale gradients wrongly that are not summed over the ranks yet."""
    monkeypatch.setattr(dtensors, "_CLIPS_PARTIAL_GRADIENTS_WRONGLY", partial)
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        problem = group((3, 5), 40, QKV)
        lists = [[getattr(c, name) for c in problem.cases] for name in ("weight", *KINDS)]
        expected = lora_linear_group(problem.x, *lists[:3], problem.alphas, lists[3])
        placements = (Shard(0), Shard(0), Replicate(), Shard(0))
        sharded = [
            [None if t is None else distribute_tensor(t, mesh, [placement]) for t in tensors_]
            for tensors_, placement in zip(lists, placements, strict=True)
        ]
        x = distribute_tensor(problem.x, mesh, [Replicate()])
        ys = lora_linear_group(x, *sharded[:3], problem.alphas, sharded[3])
        for y, truth in zip(ys, expected, strict=True):
            assert isinstance(y, DTensor)
            torch.testing.assert_close(y.full_tensor(), truth)
        As = [A.detach().requires_grad_() for A in sharded[1]]
        x = distribute_tensor(problem.x, mesh, [Shard(0)])
        parts = lora_linear_group(x, sharded[0], As, sharded[2], problem.alphas, sharded[3])
        torch.autograd.backward([y.to_local().sum() for y in parts])
        whole = all(A.grad.placements == A.placements for A in As)
        assert whole or not partial
    finally:
        distributed.destroy_process_group()


class TestAutocast:
    @every_run
    @pytest.mark.parametrize("half", HALF, ids=dtype_id)
    @pytest.mark.parametrize("x_dtype", ["float32", "half"])
    def test_values_and_dtypes(self, run, half, x_dtype):
        problem = group((3, 7), 40, QKV, torch.float32, device=run.device)
        if x_dtype == "half":
            problem.x = problem.x.to(half)
            for case in problem.cases:
                case.x = problem.x
        for case in problem.cases:
            case.dy = case.dy.to(half)
        with torch.autocast(run.device, half):
            ours = run_group(grouped(problem.alphas, path=run.path), problem)
        truth = exact_group(problem)
        plain = run_group(apart([eager_autocast(half, alpha) for alpha in problem.alphas]), problem)
        for name, value in vars(ours).items():
            assert value.dtype == (half if name[0] == "y" else getattr(plain, name).dtype), name
            assert_as_accurate(value, getattr(plain, name), getattr(truth, name), name)


BAD = {
    "shape": ({"As": 1}, lambda p: p.cases[1].A[:-1], r"branch 1: shapes do not match: .*A \(23, 5\)"),
    "rank": ({"Bs": 2}, lambda p: p.cases[2].B[:-1], r"branch 2: shapes do not match"),
    "dtype": ({"weights": 2}, lambda p: p.cases[2].weight.half(), r"branch 2: dtypes do not match"),
    "nan_alpha": ({"alphas": 0}, lambda p: float("nan"), r"branch 0: alpha must be finite"),
    "trained": (
        {"weights": 1},
        lambda p: p.cases[1].weight.clone().requires_grad_(),
        r"branch 1: weight .* requires a gradient",
    ),
}


class TestErrors:
    def arguments(self):
        problem = group(7, 40, QKV)
        lists = {f"{name}s": [getattr(c, name) for c in problem.cases] for name in ("weight", "A", "B")}
        return problem, {"x": problem.x, **lists, "alphas": list(problem.alphas)}

    @pytest.mark.parametrize("fault", BAD)
    def test_the_branch_is_named(self, fault):
        problem, arguments = self.arguments()
        (where, make, message) = BAD[fault]
        ((name, index),) = where.items()
        arguments[name][index] = make(problem)
        with pytest.raises(ValueError, match=f"^lora_linear_group: {message}"):
            lora_linear_group(**arguments)

    @pytest.mark.parametrize(
        ("name", "value"), [("weights", 3), ("As", "abc"), ("Bs", torch.ones(3)), ("alphas", 2.0)]
    )
    def test_no_sequence(self, name, value):
        _, arguments = self.arguments()
        with pytest.raises(TypeError, match=f"{name} must be a sequence with an entry for each branch"):
            lora_linear_group(**{**arguments, name: value})

    def test_any_iterables(self):
        _, arguments = self.arguments()
        names = ("weights", "As", "Bs", "alphas")
        expected = lora_linear_group(**arguments)
        given = {name: iter(arguments[name]) for name in names}
        for ours, theirs in zip(lora_linear_group(**{**arguments, **given}), expected, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_numbers_of_any_kind(self):
        problem, arguments = self.arguments()
        given = {**arguments, "alphas": [Fraction(alpha) for alpha in arguments["alphas"]]}
        for form in (lora_linear_group, reference.lora_linear_group):
            for ours, theirs in zip(form(**given), form(**arguments), strict=True):
                assert torch.equal(ours, theirs)
        batched = torch.func.vmap(lambda x: lora_linear_group(**{**given, "x": x}))(problem.x[None])
        assert [y.shape[1:] for y in batched] == [y.shape for y in lora_linear_group(**arguments)]

    def test_lengths(self):
        _, arguments = self.arguments()
        with pytest.raises(ValueError, match="got 3 weights, 2 As, 3 Bs, 3 alphas"):
            lora_linear_group(**{**arguments, "As": arguments["As"][:2]})
        with pytest.raises(ValueError, match="one or more branches"):
            lora_linear_group(arguments["x"], [], [], [], [])

    def test_no_tensor(self):
        _, arguments = self.arguments()
        arguments["Bs"][1] = None
        with pytest.raises(TypeError, match="branch 1: B must be a tensor, got NoneType"):
            lora_linear_group(**arguments)


def second_derivatives(function, problem, unused=()):
    """The gradients of all leaves, and those of a sum of their squares, by name; the base is frozen.

    ``unused``: branches whose output goes nowhere.
    """
    arguments, leaves = leaves_of_group(problem)
    used = [i for i in range(len(problem.cases)) if i not in unused]
    leaves = {name: t for name, t in leaves.items() if name == "x" or int(name[-1]) in used}
    dys = {f"dy{i}": problem.cases[i].dy.detach().requires_grad_() for i in used}
    ys = function(*arguments)
    grads = torch.autograd.grad(
        [ys[i] for i in used], list(leaves.values()), list(dys.values()), create_graph=True
    )
    total = 1e-3 * sum(g.double().square().sum() for g in grads)
    of = leaves | dys
    second = torch.autograd.grad(total, list(of.values()), allow_unused=True, materialize_grads=True)
    return {f"d{name}": g.detach() for name, g in zip(leaves, grads, strict=True)} | {
        f"d2{name}": g for name, g in zip(of, second, strict=True)
    }


class TestSecondDerivative:
    @every_run
    @pytest.mark.parametrize("unused", [(), (1,), (0, 2)])
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    def test_as_of_separate_layers(self, run, unused, dropout):
        problem = group((5, 13), 40, QKV, torch.float16, device=run.device)
        seed = torch.tensor([3], device=run.device) if dropout else None
        keep = keep_factors(seed, problem.cases[0], dropout) if dropout else None
        ours = second_derivatives(grouped(problem.alphas, dropout, seed, run.path), problem, unused)
        theirs = second_derivatives(apart([eager(a, keep) for a in problem.alphas]), problem, unused)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=0.02, atol=0.01 * value.abs().max().item())

    @every_run
    def test_frozen_Bs(self, run):
        """One trained B keeps x, on which every dA depends; without any, the error of a single layer."""
        problem = group((5, 13), 40, QKV, torch.float16, device=run.device)
        results = []
        for form in (grouped(problem.alphas, path=run.path), apart([eager(a) for a in problem.alphas])):
            x, B = (t.detach().requires_grad_() for t in (problem.x, problem.cases[1].B))
            As = [case.A.detach().requires_grad_() for case in problem.cases]
            Bs = [problem.cases[0].B, B, problem.cases[2].B]
            weights, biases = ([getattr(case, name) for case in problem.cases] for name in ("weight", "bias"))
            loss = 1e-2 * sum(y.double().square().sum() for y in form(x, weights, As, Bs, biases))
            first = torch.autograd.grad(loss, (x, *As, B), create_graph=True)
            penalty = 1e-2 * sum(g.double().square().sum() for g in first)
            results.append(torch.autograd.grad(penalty, (x, *As, B)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.01 * theirs.abs().max().item())
        Bs = [case.B for case in problem.cases]
        y = grouped(problem.alphas, path=run.path)(x, weights, As, Bs, biases)[0]
        with pytest.raises(RuntimeError, match=r"create_graph=True.*frozen B"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


forward_operator = torch.ops.fastlora.group_forward.default
backward_operator = torch.ops.fastlora.group_backward.default


def operator_arguments(run, dtypes, dropout, lead=(3, 5)):
    problem = group(lead, 40, QKV, *dtypes, device=run.device)
    problem.cases[1].A, problem.cases[1].B = problem.cases[1].A.float(), problem.cases[1].B.float()
    weights, As, Bs, biases = [[getattr(c, name) for c in problem.cases] for name in ("weight", *KINDS)]
    seed = torch.tensor([7], device=run.device) if dropout else None
    forward = [problem.x, weights, As, Bs, biases, list(problem.alphas), dropout, seed, run.path]
    h = forward_operator(*forward)[-1]
    backward = [[c.dy for c in problem.cases], problem.x, weights, As, Bs, h, list(problem.alphas)]
    need = [True, [True] * 3, [True] * 3, [True, False, True]]
    return forward, [*backward, dropout, seed, *need, run.path]


def assert_fake_matches(operator, arguments):
    def described(results):
        return [(tuple(t.shape), t.stride(), t.dtype) for t in results]

    def on_meta(value):
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        return [on_meta(item) for item in value] if isinstance(value, list) else value

    assert described(operator(*map(on_meta, arguments))) == described(operator(*arguments))


class TestOperators:
    @every_run
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_opcheck(self, run, dropout):
        forward, backward = operator_arguments(run, (torch.float16,), dropout)
        torch.library.opcheck(forward_operator, forward)
        torch.library.opcheck(backward_operator, backward)

    @every_run
    @pytest.mark.parametrize("lead", [(), (0,), (2, 3, 4)])
    def test_fakes(self, run, lead):
        forward, backward = operator_arguments(run, (torch.float16,), 0.0, lead)
        assert_fake_matches(forward_operator, forward)
        for need in (
            [True, [True] * 3, [True] * 3, [True, False, True]],
            [False, [False] * 3, [False, True, False], [False] * 3],
            [True, [False, True, False], [False] * 3, [False] * 3],
        ):
            backward[9:13] = need
            assert_fake_matches(backward_operator, backward)
        backward[0] = [None, *backward[0][1:]]
        assert_fake_matches(backward_operator, backward)

    @every_run
    def test_results_are_memory_of_their_own(self, run):
        for operator, arguments in zip(
            (forward_operator, backward_operator), operator_arguments(run, (torch.float16,), 0.0), strict=True
        ):
            results = [t for t in operator(*arguments) if t.numel()]
            assert len({t.untyped_storage().data_ptr() for t in results}) == len(results)


H200 = Device("cuda", "NVIDIA H200", 90, 132)
L40S = Device("cuda", "L40S", 89, 142)


class TestPlan:
    def plan(
        self, M=8192, Ns=(4096, 1024, 1024), K=4096, Rs=(16, 16, 16), device=H200, mode="auto", **kwargs
    ):
        problem = Problem(device, torch.bfloat16, M, sum(Ns), K, sum(Rs), **kwargs)
        return make_group_plan(problem, Ns, Rs, mode)

    def test_dropout_writes_no_mask(self):
        plan = self.plan(dropout=True)
        assert (plan.h.path, plan.dB.path) == ("triton",) * 2
        assert isinstance(plan.dx.config, configs.UpdateConfig)  # beside the BLAS's products
        plan = self.plan(M=4096, K=8192, Ns=(256, 256), Rs=(16, 16), device=L40S, dropout=True)
        assert isinstance(plan.dx.config, configs.GemmConfig)
        assert self.plan(dropout=True, mode="addmm").dx.config is None

    @pytest.mark.parametrize(
        ("Ns", "K"), [((4096, 1024, 1024), 4104), ((1000, 1000), 4096), ((520, 504), 1024)]
    )
    @pytest.mark.parametrize("dropout", [False, True])
    def test_sizes_that_the_kernels_read_slowly(self, Ns, K, dropout):
        for device in (L40S, H200):
            plan = self.plan(Ns=Ns, K=K, Rs=(16,) * len(Ns), device=device, dropout=dropout)
            assert plan.dx.path == "addmm"
            assert (plan.dx.config is not None) == dropout
            assert "the kernels are slow" in plan.dx.reason
            assert plan.launches or not dropout
        assert not self.plan(Ns=Ns, K=K, Rs=(16,) * len(Ns), mode="addmm").launches
        assert not self.plan(Ns=Ns, K=K, Rs=(16,) * len(Ns), device=Device("cpu")).launches

    def test_wider_adapters_are_read_as_they_lie_for_g_alone(self):
        plan = self.plan(Rs=(64, 64, 128), adapter_dtype=torch.float32, mode="triton")
        assert plan.h.config == configs.select_project(90, 132, 8192, 256, 2)
        assert plan.branches[2].g.config == configs.select_project(90, 132, 8192, 128, 2, 4)
        assert plan.branches[2].g.config != configs.select_project(90, 132, 8192, 128, 2)

    def test_dx_counts_every_branch_of_the_chain(self):
        """Where one layer as wide as all takes cuBLAS, each branch is a launch and a pass over dx more."""
        steps = [self.plan(M=1024, Ns=(4096 // n,) * n, Rs=(48 // n,) * n).dx for n in (1, 2, 4)]
        assert [step.path for step in steps] == ["addmm", "triton", "triton"]
        times = [float(step.reason.rpartition("addmm ")[2].split()[0]) for step in steps]
        assert times[0] < times[1] < times[2]

    @pytest.mark.parametrize("empty", [{"M": 0}, {"K": 0}, {"Ns": (0, 0, 0)}])
    @pytest.mark.parametrize("mode", ["auto", "triton"])
    def test_empty(self, empty, mode):
        plan = self.plan(**empty, mode=mode)
        assert plan.dx.config is None

    def test_an_architecture_without_a_main_loop(self):
        plan = self.plan(device=Device("cuda", "NVIDIA B200", 100, 148))
        assert (plan.dx.path, plan.dx.config) == ("addmm", None)
        assert "no dedicated main loop" in plan.dx.reason

    def test_few_tokens(self):
        plan = self.plan(M=1, mode="triton")
        assert plan.one_launch
        assert all(isinstance(branch.y.config, configs.SmallConfig) for branch in plan.branches)
        assert isinstance(plan.h.config, configs.ProjectConfig)

    def test_few_tokens_of_branches_that_differ(self):
        """Where one branch's h and y would share a launch and the others' not, each is chosen on its own."""
        device, Ns, Rs = Device("cuda", "NVIDIA A100", 80, 108), (4096, 1024, 1024), (8, 8, 8)
        alone = [make_plan(Problem(device, torch.bfloat16, 16, N, 4096, 8)) for N in Ns]
        assert [plan.one_launch for plan in alone] == [True, False, False]
        plan = self.plan(M=16, Ns=Ns, Rs=Rs, device=device)
        assert not plan.one_launch
        for step in (plan.h, *(branch.y for branch in plan.branches)):
            assert step.reason.startswith("estimated for sm_80: triton ")
            triton, addmm = (float(text.split()[-1]) for text in step.reason.split(" us")[:2])
            assert step.path == ("triton" if triton < addmm else "addmm")

    @pytest.mark.parametrize("mode", ["addmm", "reference", "triton"])
    def test_asked_for(self, mode):
        plan = self.plan(mode=mode)
        steps = (plan.h, plan.dx, plan.dB, *((b.y, b.g, b.dA) for b in plan.branches))
        flat = [s for step in steps for s in (step if isinstance(step, tuple) else (step,))]
        assert {step.path for step in flat} == {mode}

    def test_the_widest_adapter_of_a_group_decides(self, monkeypatch):
        """The kernels' shared memory has to hold each of them."""
        asked, plan = [], ops._group_plan
        monkeypatch.setattr(ops, "_group_plan", lambda *given: asked.append(given[2]) or plan(*given))
        x, weights = torch.randn(3, 8).half(), [torch.randn(6, 8).half()] * 2
        As = [torch.randn(6, 2).half().requires_grad_(), torch.randn(6, 2).requires_grad_()]
        Bs = [torch.randn(2, 8).half(), torch.randn(2, 8)]
        ys = fastlora.lora_linear_group(x, weights, As, Bs, [1.0, 1.0])
        sum(y.sum() for y in ys).backward()
        assert asked == [torch.float32] * 2

    def test_branches_of_one_launch(self):
        for ranks, counts in (([128, 128], [2]), ([128, 129], [1, 1]), ([8] * 5, [4, 1]), ([256, 1], [1, 1])):
            assert [part.stop - part.start for part in _chunks(ranks)] == counts

    @pytest.mark.parametrize("need_dx", [False, True])
    def test_dB_has_the_rows_of_the_branches_that_need_it(self, need_dx):
        x, dy, weight = torch.randn(3, 8), torch.randn(3, 6), torch.randn(6, 8)
        As, Bs = [torch.randn(6, 2), torch.randn(6, 5)], [torch.randn(2, 8), torch.randn(5, 8)]
        asked = need_dx, [False] * 2, [False, True], [False] * 2
        given = [dy] * 2, x, [weight] * 2, As, Bs, None, [1.0, 0.5], 0.0, None
        dB = ops.group_backward(*given, *asked, "auto")[1]
        torch.testing.assert_close(dB, 0.5 * (dy @ As[1]).t() @ x)

    @pytest.mark.parametrize("name", ["h", "dx", "dB", "y", "g", "dA"])
    def test_any_kernel_is_a_launch(self, name):
        plan = self.plan(mode="addmm")
        assert not plan.launches
        branch = plan.branches[1]
        step = dataclasses.replace(plan.h, config=configs.select_update(16))
        if hasattr(plan, name):
            plan = dataclasses.replace(plan, **{name: step})
        else:
            branches = (plan.branches[0], dataclasses.replace(branch, **{name: step}), plan.branches[2])
            plan = dataclasses.replace(plan, branches=branches)
        assert plan.launches

    def test_without_a_gpu(self):
        plan = self.plan(device=Device("cpu"))
        assert plan.dx.path == plan.h.path == plan.branches[0].y.path == "addmm"
        with pytest.raises(RuntimeError, match="not ROCm"):
            self.plan(device=Device("cuda", "MI300", 90, 304, rocm=True), mode="triton")


class TestKernel:
    @staticmethod
    def run(device, dtype, M, Ds, E, R, *, layouts=("contiguous",) * 4, seed=None, adapter=None):
        from fastlora.kernels.group import group_dx

        def matrix(rows, columns, layout, scale=1.0, kind=dtype):
            return lay_out((torch.randn(rows, columns) * scale).to(kind).to(device), layout)

        ps = [matrix(M, D, layouts[0]) for D in Ds]
        qs = [matrix(D, E, layouts[1], D**-0.5) for D in Ds]
        u, v = matrix(M, R, layouts[2]), matrix(R, E, layouts[3], R**-0.5, adapter or dtype)
        keep, scale, dropout = torch.ones(M, E, dtype=torch.float64, device=device), 1.0, {}
        if seed is not None:
            keep = reference.keep_mask(seed.cpu(), M, E, 0.3).double().to(device) / 0.7
            scale, dropout = 1 / 0.7, {"seed": seed, "keep_threshold": masks.keep_threshold(0.3)}
        capability = 80
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            capability = 10 * major + minor
        config = configs.select_gemm(capability, M, E, R, 2, seed is not None)
        c = group_dx(ps, qs, u, v, scale, config, **dropout)
        truth = keep * (u.double() @ v.double())
        plain = keep.to(dtype) * (u @ v.to(dtype))
        for p, q in zip(ps, qs, strict=True):
            truth, plain = truth + p.double() @ q.double(), plain + p @ q
        assert c.dtype == dtype
        assert c.is_contiguous()
        assert_as_accurate(c, plain, truth, "c")

    @pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
    @pytest.mark.parametrize("Ds", [(70,), (64, 33), (5, 128, 64), (65, 1, 40, 128)])
    def test_branches(self, kernel_device, dtype, Ds, poisoned_empty):
        self.run(kernel_device, dtype, 37, Ds, 130, 9)

    @pytest.mark.parametrize(("M", "E", "R"), [(1, 1, 1), (64, 128, 64), (129, 140, 65), (20, 40, 200)])
    def test_sizes(self, kernel_device, M, E, R, poisoned_empty):
        self.run(kernel_device, torch.float16, M, (40, 24), E, R)

    @pytest.mark.parametrize("layout", LAYOUTS[1:])
    @pytest.mark.parametrize("operand", range(4))
    def test_reads_only_its_views(self, kernel_device, layout, operand):
        layouts = [layout if i == operand else "contiguous" for i in range(4)]
        self.run(kernel_device, torch.float16, 37, (70, 24), 45, 9, layouts=layouts)

    def test_adapter_of_a_wider_dtype(self, kernel_device):
        self.run(kernel_device, torch.bfloat16, 40, (64, 24), 72, 8, adapter=torch.float32)

    @pytest.mark.parametrize("operand", ["p", "q"])
    def test_rows_and_columns_beyond_31_bits(self, kernel_device, tmp_path, operand):
        from fastlora.kernels.group import group_dx

        p, q, u, v = (torch.randn(3, 3).half().to(kernel_device) for _ in range(4))
        if operand == "p":
            p = lay_far_apart(p, tmp_path)
        else:
            q = lay_far_apart(q, tmp_path).t()
        c = group_dx([p, p], [q, q], u, v, 1.0, configs.select_gemm(80, 3, 3, 3, 2, False))
        exact = 2 * (p.double() @ q.double()) + u.double() @ v.double()
        assert_as_accurate(c, p @ q + p @ q + u @ v, exact, "c")

    @pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
    @pytest.mark.parametrize("rank", [8, 80])
    def test_dropout_is_the_oracles(self, kernel_device, dtype, rank):
        seed = torch.tensor([2**61 + 99], device=kernel_device)
        self.run(kernel_device, dtype, 150, (70, 16, 33), 133, rank, seed=seed)

    def test_project_into_a_part_of_a_matrix(self, kernel_device):
        from fastlora.kernels.project import project

        p = torch.randn(37, 70).half().to(kernel_device)
        q = (torch.randn(70, 9) * 0.1).half().to(kernel_device)
        whole = torch.full((37, 20), 7.0, dtype=torch.float16, device=kernel_device)
        out = project(p, q, configs.select_project(80, 8, 37, 9, 2), scale=0.7, out=whole[:, 5:14])
        assert out.data_ptr() == whole[:, 5:].data_ptr()
        assert_as_accurate(whole[:, 5:14], 0.7 * (p @ q), 0.7 * (p.double() @ q.double()), "h")
        assert (whole[:, :5] == 7).all()
        assert (whole[:, 14:] == 7).all()


class Parent(nn.Module):
    """Attention and MLP projections in one module, small enough to compile."""

    def __init__(self, K=24, widths=(20, 12, 12)):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(K, N) for N in widths)
        self.gate_proj, self.up_proj = nn.Linear(K, 16), nn.Linear(K, 16)

    def forward(self, x, memory=None):
        kv = x if memory is None else memory
        attention = torch.cat([self.q_proj(x), self.k_proj(kv), self.v_proj(kv)], -1)
        return torch.cat([attention, F.silu(self.gate_proj(x)) * self.up_proj(x)], -1)


def adapted(parent=Parent, targets="all-linear", dropout=0.0, **kwargs):
    """An adapted parent with adapters that are not zero, in a model."""
    model = nn.Sequential(parent(**kwargs))
    fastlora.apply_lora(model, targets, rank=3, alpha=2.0, dropout=dropout)
    for layer in model.modules():
        if isinstance(layer, fastlora.FusedLoRALinear):
            nn.init.normal_(layer.A)
    return model


def outcome(model, *inputs):
    """Output and the gradients of every trained parameter and input."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = model(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    grads = torch.autograd.grad((y * weights).sum(), [*trained.values(), *inputs], allow_unused=True)
    return [y.detach(), *grads]


def same_outcome(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def launches(monkeypatch):
    """Which operators ran, in order: "s" for a single layer, "g" for a group."""
    ran = []
    for name, mark in (("lora_forward", "s"), ("group_forward", "g")):

        def wrapper(*args, mark=mark, launch=getattr(ops, name)):  # noqa: B008
            ran.append(mark)
            return launch(*args)

        monkeypatch.setattr(ops, name, wrapper)
    return ran


class TestSiblings:
    def test_values_and_gradients(self, launches):
        model, x = adapted(), torch.randn(2, 5, 24)
        apart_ = outcome(model, x)
        assert launches == ["s"] * 5
        assert fastlora.group_projections(model) is model
        launches.clear()
        same_outcome(outcome(model, x), apart_)
        assert launches == ["g"] * 2
        with torch.no_grad():
            torch.testing.assert_close(model(x), apart_[0], rtol=1e-4, atol=1e-5)

    def test_keyword_input(self, launches):
        model, x = adapted(), torch.randn(2, 5, 24)
        apart_ = model[0](x)
        fastlora.group_projections(model)
        launches.clear()
        torch.testing.assert_close(model[0](x=x), apart_, rtol=1e-4, atol=1e-5)
        assert launches == ["g"] * 2

    def test_the_group_shares_one_mask(self):
        model, x = adapted(dropout=0.4), torch.randn(2, 5, 24)
        fastlora.group_projections(model)
        layers = [model[0].q_proj, model[0].k_proj, model[0].v_proj]
        torch.manual_seed(3)
        y = model(x)
        torch.manual_seed(3)
        seed = masks.new_seed(x.device)
        lists = [[getattr(m, name) for m in layers] for name in ("weight", "A", "B")]
        expected = reference.lora_linear_group(x, *lists, [2.0] * 3, [m.bias for m in layers], 0.4, seed)
        torch.testing.assert_close(y[..., :44], torch.cat(expected, -1), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "v_proj", "up_proj"]])
    def test_siblings_without_an_adapter_stay_out(self, targets, launches):
        model, x = adapted(targets=targets), torch.randn(2, 5, 24)
        apart_ = outcome(model, x)
        fastlora.group_projections(model)
        launches.clear()
        same_outcome(outcome(model, x), apart_)
        assert launches == ["g"] + ["s"] * (len(targets) - 2)

    def test_cross_attention_stays_single(self, launches):
        model = adapted(targets=["q_proj", "k_proj", "v_proj"])
        x, memory = torch.randn(5, 24), torch.randn(5, 24)
        apart_ = outcome(model[0], x, memory)
        fastlora.group_projections(model)
        launches.clear()
        same_outcome(outcome(model[0], x, memory), apart_)
        assert launches == ["s"] * 3
        assert "single: 0.q_proj/k_proj/v_proj (1): no one input that all may take" in fastlora.summary(model)
        launches.clear()
        same_outcome(outcome(model[0], x), outcome(fastlora.ungroup_projections(copy.deepcopy(model))[0], x))
        assert launches[0] == "g"
        assert "grouped: 0.q_proj/k_proj/v_proj (1)" in fastlora.summary(model)

    @pytest.mark.parametrize("checkpointed", [False, True])
    def test_a_sibling_of_another_tensor_computes_alone(self, launches, checkpointed):
        """The parent's one input tells nothing of it; later calls for inference stay single."""

        class Shifted(Parent):
            def forward(self, x):
                return torch.cat([self.q_proj(x), self.k_proj(x + 1), self.v_proj(x)], -1)

        model, x = adapted(Shifted, ["q_proj", "k_proj", "v_proj"]), torch.randn(2, 5, 24)
        apart_ = outcome(model, x)
        fastlora.group_projections(model)
        launches.clear()
        function = model
        if checkpointed:
            function = nn.Module()
            function.model = model
            function.forward = lambda x: checkpoint(model, x, use_reentrant=False)
        for _ in range(2):
            same_outcome(outcome(function, x), apart_)
        assert launches == ["g", "s"] * (4 if checkpointed else 2)
        assert "single: 0.q_proj/k_proj/v_proj (1): not all" in fastlora.summary(model)
        launches.clear()
        with torch.no_grad():
            model.train()(x)
            assert launches == ["g", "s"]  # may be the forward pass of a reentrant checkpoint
            model.eval()(x)
        assert launches == ["g", "s"] + ["s"] * 3

    @pytest.mark.parametrize(
        ("reentrant", "training"),
        [(False, True), (True, True), (False, False)],  # a reentrant one in eval mode looks like inference
    )
    def test_what_was_learned_does_not_change_a_checkpoint(self, reentrant, training):
        """Neither the first call's own recompute nor a call for inference before it."""

        class Shifted(Parent):
            def forward(self, x):
                return (self.k_proj(x) * self.v_proj(x)).tanh() * self.q_proj(x * 2).mean()

        def gradients(model, checkpointed):
            torch.manual_seed(4)
            model.train(training).zero_grad()
            y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
            with torch.no_grad():
                model.eval()(x)
            model.train(training)
            y.square().sum().backward()
            return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

        x = torch.randn(2, 5, 24, requires_grad=True)
        model = adapted(Shifted, ["q_proj", "k_proj", "v_proj"], dropout=0.5)
        results = []
        for checkpointed in (False, True):
            x.grad = None
            results.append(gradients(fastlora.group_projections(copy.deepcopy(model)), checkpointed))
        for ours, expected in zip(*results[::-1], strict=True):
            torch.testing.assert_close(ours, expected)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_checkpoint_inside_the_parent(self, launches, reentrant):
        """Its recompute runs outside the parent's call, so the layers inside it compute alone."""

        class Inner(Parent):
            def inner(self, x):
                return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

            def forward(self, x):
                return checkpoint(self.inner, x, use_reentrant=reentrant)

        def gradients(model):
            torch.manual_seed(4)
            model.zero_grad()
            model(x).square().sum().backward()  # reentrant checkpoints do not support autograd.grad
            return [p.grad for p in model.parameters() if p.requires_grad]

        model = adapted(Inner, ["q_proj", "k_proj", "v_proj"], dropout=0.5)
        x = torch.randn(2, 5, 24, requires_grad=True)
        apart_ = gradients(model)
        fastlora.group_projections(model)
        launches.clear()
        for ours, theirs in zip(gradients(model), apart_, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert set(launches) == {"s"}

    def test_a_sibling_that_is_not_called(self, launches):
        class Half(Parent):
            def forward(self, x):
                return self.q_proj(x) + self.q_proj(x)

        model, x = adapted(Half, ["q_proj", "k_proj"]), torch.randn(2, 5, 24)
        apart_ = outcome(model, x)
        fastlora.group_projections(model)
        launches.clear()
        for _ in range(2):
            same_outcome(outcome(model, x), apart_)
        assert launches == ["g", "s", "g", "s"]
        with torch.no_grad():
            model.eval()(x)
        assert launches[4:] == ["s", "s"]

    def test_an_input_changed_in_place_is_another(self, launches):
        class Changing(Parent):
            def forward(self, x):
                q = self.q_proj(x)
                x += 1
                return torch.cat([q, self.k_proj(x)], -1)

        model = adapted(Changing, ["q_proj", "k_proj"])
        x = torch.randn(2, 5, 24)
        with torch.no_grad():
            apart_ = model(x.clone())
            fastlora.group_projections(model)
            launches.clear()
            torch.testing.assert_close(model(x.clone()), apart_, rtol=1e-4, atol=1e-5)
        assert launches == ["g", "s"]

    def test_other_modes_are_other_calls(self, launches):
        class Mixed(Parent):
            def forward(self, x):
                with torch.no_grad():
                    q = self.q_proj(x)
                with torch.autocast("cpu", torch.bfloat16):
                    k = self.k_proj(x)
                return torch.cat([q, k, self.v_proj(x)], -1)

        model, x = adapted(Mixed, ["q_proj", "k_proj", "v_proj"]), torch.randn(2, 5, 24)
        apart_ = outcome(model, x)
        fastlora.group_projections(model)
        launches.clear()
        same_outcome(outcome(model, x), apart_)
        assert launches == ["s"] * 3

    def test_another_dtype_of_autocast_is_another_call(self, launches):
        class Mixed(Parent):
            def forward(self, x):
                with torch.autocast("cpu", torch.bfloat16):
                    q = self.q_proj(x)
                with torch.autocast("cpu", torch.float16):
                    return q, self.k_proj(x)

        model, x = adapted(Mixed, ["q_proj", "k_proj"]), torch.randn(2, 5, 24)
        apart_ = model(x)
        fastlora.group_projections(model)
        launches.clear()
        for ours, theirs in zip(model(x), apart_, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
        assert launches == ["g", "s"]

    def test_another_path_is_another_call(self, launches):
        class Mixed(Parent):
            def forward(self, x):
                q = self.q_proj(x)
                with fastlora.use_path("reference"):
                    return q, self.k_proj(x)

        model, x = fastlora.group_projections(adapted(Mixed, ["q_proj", "k_proj"])), torch.randn(2, 5, 24)
        model(x)
        assert launches == ["g", "s"]

    def test_a_parent_inside_that_forms_no_group_leaves_the_call_alone(self, launches):
        """It gets two inputs that may be meant, one of which carries the call of the parent outside."""

        class Outer(Parent):
            def __init__(self):
                super().__init__()
                self.inner = Parent()

            def forward(self, x):
                return self.q_proj(x).sum() + self.inner(x, x + 1).sum() + self.k_proj(x).sum()

        targets = ["q_proj", "k_proj"]
        model, x = fastlora.group_projections(adapted(Outer, targets)), torch.randn(5, 24)
        model(x)
        assert launches == ["g", "s", "s"]

    @pytest.mark.parametrize("kind", ["a number", "the input again", "a mask", "positions"])
    def test_arguments_that_are_not_another_input(self, launches, kind):
        class Given(Parent):
            def forward(self, x, other):
                return self.q_proj(x) + other.sum(), self.k_proj(x)

        x = torch.randn(2, 24, 24)
        other = {
            "a number": torch.tensor(2.0),
            "the input again": x,
            "a mask": torch.zeros(2, 1, 24, 24),
            "positions": torch.zeros(2, 1, 24, dtype=torch.int64),
        }[kind]
        model = fastlora.group_projections(adapted(Given, ["q_proj", "k_proj"]))
        model[0](x, other)
        assert launches == ["g"]

    def test_a_sibling_that_cannot_compute_raises_its_own_error(self, launches):
        model = fastlora.group_projections(adapted(targets=["q_proj", "k_proj"]))
        model[0].k_proj.A = nn.Parameter(model[0].k_proj.A.detach().double())
        with pytest.raises(ValueError, match=r"^lora_linear: dtypes do not match"):
            model(torch.randn(5, 24))
        assert launches == ["s"]

    def test_a_parent_that_turns_gradients_on_again(self, launches):
        class Inner(Parent):
            def forward(self, x):
                with torch.enable_grad():
                    y = self.q_proj(x) + self.q_proj(x) * self.k_proj(x).sum()
                    return torch.autograd.grad(y.sum(), x_)[0]

        model, x_ = adapted(Inner, ["q_proj", "k_proj"]), torch.randn(5, 24, requires_grad=True)
        with torch.no_grad():
            alone = model(x_)
            fastlora.group_projections(model)
            launches.clear()
            torch.testing.assert_close(model(x_), alone, rtol=1e-4, atol=1e-4)
        assert launches == ["s"] * 3

    def test_calls_from_outside_compute_alone(self, launches):
        model, x = adapted(), torch.randn(2, 5, 24)
        fastlora.group_projections(model)
        model[0].q_proj(x)
        assert launches == ["s"]

    def test_inference_mode(self, launches):
        """Inference tensors cannot tell a change in place."""
        model = adapted()
        fastlora.group_projections(model)
        with torch.inference_mode():
            model(torch.randn(2, 5, 24))
        assert launches == ["s"] * 5

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda p: p.k_proj.merge(), "merged"),
            (lambda p: setattr(p.k_proj, "adapter_enabled", False), "adapter disabled"),
            (lambda p: p.v_proj.register_forward_hook(lambda *a: None), "hooks or a replaced forward"),
            (lambda p: p.v_proj.register_forward_pre_hook(lambda *a: None), "hooks or a replaced forward"),
            (lambda p: p.q_proj.register_full_backward_hook(lambda *a: None), "hooks or a replaced forward"),
            (
                lambda p: p.k_proj.register_full_backward_pre_hook(lambda *a: None),
                "hooks or a replaced forward",
            ),
            (lambda p: setattr(p.q_proj, "forward", p.q_proj.forward), "hooks or a replaced forward"),
            (lambda p: setattr(p.q_proj, "dropout", 0.5), "dropout 0.5 and 0 differ"),
            (lambda p: setattr(p, "k_proj", nn.Linear(24, 12)), "k_proj is Linear"),
        ],
    )
    def test_what_keeps_siblings_single(self, change, reason, launches):
        model, x = adapted(targets=["q_proj", "k_proj", "v_proj"]), torch.randn(2, 5, 24)
        fastlora.group_projections(model)
        change(model[0])
        y = model(x)
        assert "g" not in launches
        assert f"single: 0.q_proj/k_proj/v_proj (1): {reason}" in fastlora.summary(model)
        if "dropout" not in reason:
            torch.testing.assert_close(fastlora.ungroup_projections(model)(x), y)

    def test_disable_adapter(self, launches):
        model, x = adapted(), torch.randn(2, 5, 24)
        with fastlora.disable_adapter(model):
            frozen = model(x)
        fastlora.group_projections(model)
        with fastlora.disable_adapter(model):
            assert torch.equal(model(x), frozen)
        assert launches == []
        model(x)
        assert launches == ["g", "g"]

    def test_a_wrong_input_raises_the_layers_own_error(self):
        model = adapted()
        fastlora.group_projections(model)
        with pytest.raises(ValueError, match=r"^lora_linear: shapes do not match: x \(2, 23\)"):
            model(torch.randn(2, 23))
        with pytest.raises(ValueError, match=r"^lora_linear: dtypes do not match"):
            model(torch.randn(2, 24).half())

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoints(self, reentrant, launches):
        model, x = adapted(dropout=0.3), torch.randn(2, 5, 24)
        fastlora.group_projections(model)
        torch.manual_seed(1)
        plain = outcome(model, x)
        wrapper = nn.Module()
        wrapper.model = model
        wrapper.forward = lambda x: checkpoint(model, x, use_reentrant=reentrant)
        torch.manual_seed(1)
        if reentrant:  # it supports .backward() alone
            x.requires_grad_()
            y = wrapper.forward(x)
            (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
            ours = [y, *(p.grad for p in model.parameters() if p.requires_grad), x.grad]
        else:
            ours = outcome(wrapper, x)
        same_outcome(ours, plain)
        assert set(launches) == {"g"}

    def test_threads(self):
        model = adapted()
        xs = [torch.randn(2, 5, 24) for _ in range(4)]
        expected = [outcome(model, x) for x in xs]
        fastlora.group_projections(model)
        results = [None] * 4

        def work(i):
            for _ in range(10):
                results[i] = outcome(model, xs[i])

        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for ours, theirs in zip(results, expected, strict=True):
            same_outcome(ours, theirs)


class TestNothingIsKept:
    @pytest.fixture(autouse=True)
    def _no_collector(self):
        """What only a collection of cycles would free counts as kept."""
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    def alive(self, monkeypatch, model, x):
        """How many outputs of the group are alive after the call, and after its results are gone."""
        made = []
        function = ops.group_forward

        def wrapper(*args):
            results = function(*args)
            made.extend(map(weakref.ref, results))
            return results

        monkeypatch.setattr(ops, "group_forward", wrapper)
        try:
            y = model(x)
        except RuntimeError:
            y = None
        del y
        assert made
        return sum(ref() is not None for ref in made)

    @pytest.mark.parametrize("grad", [False, True])
    def test_after_a_call(self, monkeypatch, grad):
        model = adapted()
        fastlora.group_projections(model)
        assert self.alive(monkeypatch, model, torch.randn(2, 5, 24, requires_grad=grad)) == 0

    @pytest.mark.parametrize("grad", [False, True])
    @pytest.mark.parametrize("end", ["return", "raise"])
    def test_after_a_call_that_leaves_siblings_out(self, monkeypatch, grad, end):
        class Cut(Parent):
            def forward(self, x):
                y = self.q_proj(x)
                if end == "raise":
                    raise RuntimeError("cut short")
                return y

        model = adapted(Cut, ["q_proj", "k_proj", "v_proj"])
        fastlora.group_projections(model)
        x = torch.randn(2, 5, 24)
        if grad:
            assert self.alive(monkeypatch, model, x.requires_grad_()) == 0
        else:
            with torch.no_grad():
                assert self.alive(monkeypatch, model, x) == 0
        single = "single" in fastlora.summary(model)
        assert single == (end == "return")  # an exception tells nothing of the siblings

    def test_the_input_carries_nothing(self):
        model, x = adapted(), torch.randn(2, 5, 24)
        fastlora.group_projections(model)
        model(x)
        assert not vars(x)
        assert not any("fastlora" in name for name in vars(model[0]))


class TestModelFunctions:
    def test_a_second_call_forgets_parents_without_siblings(self):
        model = fastlora.apply_lora(nn.Sequential(Parent(), Parent()), "all-linear", rank=3)
        fastlora.group_projections(model)
        for name, layer in list(model[0].named_children()):
            setattr(model[0], name, layer.to_linear())
        fastlora.group_projections(model)
        assert not model[0]._forward_pre_hooks
        assert model[1]._forward_pre_hooks

    def test_ungroup_restores_exactly(self):
        model, x = adapted(), torch.randn(2, 5, 24)

        def state():
            return {
                path: {k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()}
                for path, m in model.named_modules()
            }

        calls = []
        model[0].register_forward_pre_hook(lambda *a: calls.append("before"))
        model[0].register_forward_hook(lambda *a: calls.append("after"), always_call=True)
        before = state()
        fastlora.group_projections(fastlora.group_projections(model))
        assert state() != before
        assert len(model[0]._forward_pre_hooks) == 2  # once, however often it is called
        assert fastlora.ungroup_projections(model) is model
        assert state() == before
        model(x)
        assert calls == ["before", "after"]
        fastlora.ungroup_projections(model)

    def test_copies_are_groups_of_their_own(self, launches):
        model, x = adapted(), torch.randn(2, 5, 24)
        fastlora.group_projections(model)
        expected = outcome(model, x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            nn.init.zeros_(model[0].q_proj.A)
            launches.clear()
            same_outcome(outcome(other, x), expected)
            assert launches == ["g", "g"]
            fastlora.ungroup_projections(other)
            assert "grouped" not in fastlora.summary(other)
            assert "grouped" in fastlora.summary(model)
            model.load_state_dict(other.state_dict())

    def test_names_and_parameters_stay(self):
        model = adapted()
        before = list(model.state_dict())
        fastlora.group_projections(model)
        assert list(model.state_dict()) == before

    def test_functional_call(self):
        model, x = adapted(), torch.randn(2, 5, 24)
        state = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        expected = torch.func.functional_call(model, state, (x,))
        fastlora.group_projections(model)
        torch.testing.assert_close(
            torch.func.functional_call(model, state, (x,)), expected, rtol=1e-4, atol=1e-4
        )

    def test_function_transforms(self):
        model, x = adapted(), torch.randn(2, 5, 24)
        state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

        def loss(state, x):
            return torch.func.functional_call(model, state, (x,)).square().sum()

        expected = torch.func.grad(loss)(state, x)
        fastlora.group_projections(model)
        same_outcome(torch.func.grad(loss)(state, x).values(), expected.values())
        batched = torch.func.vmap(model)(x)
        torch.testing.assert_close(batched, model(x), rtol=1e-4, atol=1e-5)

    def test_batched_gradients(self):
        problem = group(3, 24, GATE_UP)
        x = problem.x.requires_grad_()
        lists = [
            [getattr(c, name).requires_grad_(name != "weight") for c in problem.cases]
            for name in ("weight", "A", "B")
        ]
        ys = lora_linear_group(x, *lists, problem.alphas)
        leaves = (x, *lists[1], *lists[2])
        rows = [torch.randn(2, *y.shape) for y in ys]
        batched = torch.autograd.grad(ys, leaves, rows, is_grads_batched=True, retain_graph=True)
        for i in range(2):
            each = torch.autograd.grad(ys, leaves, [row[i] for row in rows], retain_graph=True)
            for ours, expected in zip(batched, each, strict=True):
                torch.testing.assert_close(ours[i], expected, rtol=1e-3, atol=1e-4)

    def test_merge_lora_takes_the_groups_away(self):
        model, x = adapted(), torch.randn(2, 5, 24)
        fastlora.group_projections(model)
        y = model(x)
        fastlora.merge_lora(model)
        assert not model[0]._forward_pre_hooks
        assert not model[0]._forward_hooks
        torch.testing.assert_close(model(x), y, rtol=1e-3, atol=1e-4)

    def test_summary(self):
        model = nn.Sequential(*(adapted()[0] for _ in range(3)))
        assert "grouped" not in fastlora.summary(model)
        fastlora.group_projections(model)
        model[1].up_proj.merge()
        lines = fastlora.summary(model).splitlines()
        assert "grouped: {0..2}.q_proj/k_proj/v_proj (3)" in lines
        assert "grouped: {0,2}.gate_proj/up_proj (2)" in lines
        assert "single: 1.gate_proj/up_proj (1): merged" in lines

    def test_summary_of_what_fsdp_shards(self):
        """Its parameters are whole only inside a call, so they do not decide before it."""

        class Sharded(nn.Parameter):
            pass

        model = adapted()
        fastlora.group_projections(model)
        projection = model[0].q_proj
        projection.weight = Sharded(projection.weight.detach(), requires_grad=False)
        assert "grouped: 0.q_proj/k_proj/v_proj (1)" in fastlora.summary(model)
        reason = projection._group_branch(torch.randn(2, 24))
        assert reason == "sharded or otherwise special parameters"

    def test_a_parent_that_returns_its_input(self):
        """Nothing of the call is left on it."""

        class Echo(Parent):
            def forward(self, x):
                super().forward(x)
                return x

        model, x = Echo(), torch.randn(2, 5, 24)
        fastlora.group_projections(fastlora.apply_lora(model, ["q_proj", "k_proj"]))
        y = model(x)
        assert torch.equal(x, y)
        assert not hasattr(y, "_fastlora_call")

    def test_nothing_to_group(self):
        for model, message in (
            (
                nn.Sequential(Parent()),
                "at least two of q_proj/k_proj/v_proj, .*the model has no adapted layer",
            ),
            (adapted(targets=["k_proj", "gate_proj"]), "adapted layers: 0.k_proj, 0.gate_proj"),
        ):
            with pytest.raises(ValueError, match=f"^group_projections: found no siblings: .*{message}"):
                fastlora.group_projections(model)
            assert not model[0]._forward_pre_hooks

    @pytest.mark.parametrize("function", [fastlora.group_projections, fastlora.ungroup_projections])
    def test_no_model(self, function):
        with pytest.raises(TypeError, match=f"{function.__name__}: expected a torch.nn.Module, got list"):
            function([])


class TestCompile:
    @pytest.fixture(autouse=True)
    def _reset(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @staticmethod
    def backend(graphs):
        """aot_eager that keeps the names of the operators in each forward and backward graph."""
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph, inputs):
            graphs.append(Counter(str(node.target) for node in graph.graph.nodes))
            return make_boxed_func(graph)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)

    @pytest.mark.parametrize("checkpointed", [False, True])
    def test_fullgraph(self, checkpointed):
        model, x = adapted(), torch.randn(2, 5, 24)
        fastlora.group_projections(model)

        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, x):
                if checkpointed:
                    return checkpoint(self.model, x * 1, use_reentrant=False)
                return self.model(x)

        wrapped = Wrapped()
        plain = outcome(wrapped, x)
        graphs = []
        compiled = torch.compile(wrapped, fullgraph=True, backend=self.backend(graphs), dynamic=True)
        same_outcome(outcome(compiled, x), plain)
        forward, backward = graphs
        assert forward["fastlora.group_forward.default"] == 2
        assert backward["fastlora.group_backward.default"] == 2
        assert not any("lora_forward" in name for name in forward)
        count = len(graphs)
        x = torch.randn(3, 5, 24)
        same_outcome(outcome(compiled, x), outcome(wrapped, x))
        assert len(graphs) == count  # another number of tokens compiles nothing anew

    @pytest.mark.slow
    def test_inductor(self):
        model, x = adapted(targets=["q_proj", "k_proj", "v_proj"]), torch.randn(2, 5, 24)
        fastlora.group_projections(model)
        plain = outcome(model, x)
        same_outcome(outcome(torch.compile(model, fullgraph=True), x), plain)


FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma")


def tiny_of(name, **sizes):
    """A random model of the class called ``name``."""
    transformers = pytest.importorskip("transformers")
    family = name.partition("For")[0].removesuffix("Model")
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = next(
        c for suffix in ("TextConfig", "Config") if (c := getattr(transformers, family + suffix, None))
    )
    return getattr(transformers, name)(config(vocab_size=40, **sizes))


LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
DECODER = {**LAYERS, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}


def tiny(family, **kwargs):
    """A random model of two layers whose k and v are narrower than q."""
    return tiny_of(f"{family}ForCausalLM", **{**DECODER, **kwargs})


TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def with_adapters(model, kind, targets=TARGETS):
    if kind == "fastlora":
        fastlora.apply_lora(model, targets, rank=4, alpha=2.0)
    else:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        fastlora.fuse_peft(model)
    for name, p in model.named_parameters():
        if name.endswith(".A") or "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    return model.train()


def step(model, tokens):
    """Logits, loss and gradients of one training step."""
    model.zero_grad()
    out = model(input_ids=tokens, labels=tokens, use_cache=False)
    out.loss.backward()
    return [out.logits.detach(), out.loss.detach()] + [p.grad for p in model.parameters() if p.requires_grad]


class TestTransformers:
    @pytest.mark.parametrize("kind", ["fastlora", "peft"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_same_values_and_gradients(self, family, kind, launches):
        model, tokens = with_adapters(tiny(family), kind), torch.randint(1, 40, (2, 9))
        # Under PEFT single layers run the operator through another name: count the groups alone.
        apart_ = step(model, tokens)
        fastlora.group_projections(model)
        launches.clear()
        same_outcome(step(model, tokens), apart_)
        assert launches.count("g") == 4
        assert launches.count("s") == 2  # down_proj
        summary = fastlora.summary(model)
        assert "self_attn.q_proj/k_proj/v_proj (2)" in summary
        assert "mlp.gate_proj/up_proj (2)" in summary
        if kind == "peft":
            assert summary.splitlines()[-1].startswith("fused 12, fell back 0")
        fastlora.ungroup_projections(model)
        launches.clear()
        for a, b in zip(step(model, tokens), apart_, strict=True):
            assert torch.equal(a, b)
        assert "g" not in launches

    @pytest.mark.parametrize("kind", ["fastlora", "peft"])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, kind, reentrant, launches):
        model, tokens = with_adapters(tiny("Llama"), kind), torch.randint(1, 40, (2, 9))
        apart_ = step(model, tokens)
        fastlora.group_projections(model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        launches.clear()
        same_outcome(step(model, tokens), apart_)
        assert launches.count("g") == 8

    @pytest.mark.parametrize("kind", ["fastlora", "peft"])
    def test_generate(self, kind, launches):
        model, tokens = with_adapters(tiny("Qwen3"), kind).eval(), torch.randint(1, 40, (2, 5))
        arguments = {
            "input_ids": tokens,
            "max_new_tokens": 6,
            "do_sample": False,
            "attention_mask": tokens > 0,
        }
        alone = model.generate(**arguments)
        fastlora.group_projections(model)
        launches.clear()
        assert torch.equal(model.generate(**arguments), alone)
        assert launches.count("g") == 4 * (alone.shape[1] - 5)

    def test_autocast(self):
        model, tokens = with_adapters(tiny("Llama"), "peft"), torch.randint(1, 40, (2, 9))
        with torch.autocast("cpu", torch.bfloat16):
            apart_ = step(model, tokens)
            fastlora.group_projections(model)
            ours = step(model, tokens)
        for a, b in zip(ours, apart_, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=5e-2, atol=2e-2)

    @pytest.mark.parametrize("extra", [([None], {}), ([], {"unknown": None})])
    def test_more_arguments_than_x_reach_peft(self, extra):
        peft = pytest.importorskip("peft")

        class Extra(Parent):
            def forward(self, x):
                args, kwargs = extra
                return self.q_proj(x), self.k_proj(x, *args, **kwargs)

        config = peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj"])
        model = fastlora.fuse_peft(peft.get_peft_model(Extra(), config))
        fastlora.group_projections(model)
        with pytest.raises(TypeError, match="argument"):
            model(torch.randn(5, 24))

    def test_a_peft_layer_that_fell_back_is_fused_again_in_a_group(self, launches):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj"])
        model, x = fastlora.fuse_peft(peft.get_peft_model(Parent(), config)), torch.randn(5, 24)
        fastlora.group_projections(model)
        for layer in (model.base_model.model.q_proj, model.base_model.model.k_proj):
            layer(x.to_sparse())
        assert "fell back 2: x is nested or sparse (2)" in fastlora.summary(model)
        model(x)
        assert launches == ["g"]
        assert "fused 2, fell back 0" in fastlora.summary(model)

    def test_peft_layers_that_fall_back_stay_single(self, launches):
        model, tokens = with_adapters(tiny("Llama"), "peft"), torch.randint(1, 40, (2, 9))
        fastlora.group_projections(model)
        with model.disable_adapter():
            step_logits = model(input_ids=tokens).logits
            assert "g" not in launches
            torch.testing.assert_close(model.base_model(input_ids=tokens).logits, step_logits)
        attention = model.base_model.model.model.layers[0].self_attn
        attention.k_proj.lora_A.default.register_forward_hook(lambda *a: None)
        launches.clear()
        model(input_ids=tokens)
        assert launches.count("g") == 3
        assert "layers.0.self_attn.q_proj/k_proj/v_proj (1): hooks on lora_A" in fastlora.summary(model)

    def test_encoder_and_decoder_of_bert(self, launches):
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            is_decoder=True, add_cross_attention=True,
        )  # fmt: skip
        model = transformers.BertModel(config).eval()
        fastlora.apply_lora(model, ["query", "key", "value"], rank=4)
        for layer in model.modules():
            if isinstance(layer, fastlora.FusedLoRALinear):
                nn.init.normal_(layer.A, std=0.2)
        inputs = {"input_ids": torch.randint(1, 40, (2, 6)), "encoder_hidden_states": torch.randn(2, 6, 32)}
        alone = model(**inputs).last_hidden_state
        fastlora.group_projections(model)
        launches.clear()
        torch.testing.assert_close(model(**inputs).last_hidden_state, alone, rtol=1e-4, atol=1e-5)
        assert launches == ["g", "s", "s", "s"]

    def test_compiled(self):
        torch._dynamo.reset()
        model, tokens = (
            with_adapters(tiny("Llama", num_hidden_layers=1), "peft"),
            torch.randint(1, 40, (2, 9)),
        )
        apart_ = step(model, tokens)
        fastlora.group_projections(model)
        same_outcome(step(torch.compile(model, backend="aot_eager", fullgraph=True), tokens), apart_)
        torch._dynamo.reset()


DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
LATENT = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1}
# Families that call their siblings otherwise: the model, its sizes, and its groups with how many it has.
OTHERS = {
    "DistilBertModel": (
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0},
        {"q_lin/k_lin/v_lin": 2},
    ),
    "MT5ForConditionalGeneration": (
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
        {"SelfAttention.q/k/v": 4, "wi_0/wi_1": 4},
    ),
    "DebertaV2Model": (
        {
            **LAYERS,
            "num_hidden_layers": 2,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "share_att_key": True,  # query_proj and key_proj are called with the positions too
            "position_buckets": 8,
            "max_relative_positions": 16,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        {"query_proj/key_proj/value_proj": 2},
    ),
    "DeepseekV3ForCausalLM": (
        {**LAYERS, "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_experts_per_tok": 2}
        | {**LATENT, **ROUTED},
        {"q_a_proj/kv_a_proj_with_mqa": 2, "gate_proj/up_proj": 2},
    ),
    "Qwen3NextForCausalLM": (
        {**DECODER, **DELTA, **EXPERTS, "num_experts_per_tok": 2},
        {"in_proj_qkvz/in_proj_ba": 1, "q_proj/k_proj/v_proj": 1, "gate_proj/up_proj": 2},
    ),
    "Qwen3_5ForCausalLM": (
        {**DECODER, **DELTA},
        {"in_proj_qkv/in_proj_z/in_proj_b/in_proj_a": 1, "q_proj/k_proj/v_proj": 1, "gate_proj/up_proj": 2},
    ),
    "Lfm2ForCausalLM": (
        {**DECODER, "layer_types": ["conv", "full_attention"]},
        {"q_proj/k_proj/v_proj": 1, "w1/w3": 2},
    ),
}


class TestOtherNames:
    @pytest.mark.parametrize("name", OTHERS)
    def test_same_values_and_gradients(self, name):
        sizes, expected = OTHERS[name]
        model = with_adapters(tiny_of(name, **sizes), "fastlora", "all-linear")
        tokens = torch.randint(1, 40, (2, 9))

        def values():
            model.zero_grad()
            y = model(input_ids=tokens, **({"labels": tokens} if "Conditional" in name else {}))[key]
            (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
            return [y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

        key = "last_hidden_state" if name.endswith("Model") else "logits"
        apart_ = values()
        fastlora.group_projections(model)
        for ours, theirs in zip(values(), apart_, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:  # recurrences add up rounding errors
                torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4 * theirs.abs().max().item())
        found = {}
        for line in fastlora.summary(model).splitlines():
            if line.startswith("grouped: "):
                group = next(wanted for wanted in expected if wanted in line)
                found[group] = found.get(group, 0) + int(line.rpartition("(")[2].removesuffix(")"))
        assert found == expected

    def test_projections_called_by_another_object(self, launches):
        """diffusers' processors call the projections of the attention layer that calls them."""

        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.to_q, self.to_k, self.to_v = (nn.Linear(24, 16, bias=False) for _ in range(3))

            def forward(self, hidden_states, encoder_hidden_states=None):
                return process(self, hidden_states, encoder_hidden_states)

        def process(attention, x, memory):
            memory = x if memory is None else memory
            return torch.cat([attention.to_q(x), attention.to_k(memory), attention.to_v(memory)], -1)

        model = nn.Sequential(Attention())
        fastlora.apply_lora(model, ["to_q", "to_k", "to_v"], rank=3)
        x = torch.randn(2, 5, 24)
        apart_ = outcome(model, x)
        fastlora.group_projections(model)
        launches.clear()
        same_outcome(outcome(model, x), apart_)
        assert launches == ["g"]
        assert "grouped: 0.to_q/to_k/to_v (1)" in fastlora.summary(model)
