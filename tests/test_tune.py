"""Measured rows and the command that writes them: plans from any file, and whole runs without a GPU."""

import collections
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from cases import CUDA

from fastlora import measured, ops, planner, tune
from fastlora.device import Device, describe
from fastlora.kernels import configs
from fastlora.measured import Row
from fastlora.planner import Problem, make_plan

H200 = Device("cuda", "NVIDIA H200", 90, 132)
A100 = Device("cuda", "NVIDIA A100", 80, 108)
TEST_GPU = Device("cuda", "Test GPU", 80, 4)
STEPS = ("h", "y", "g", "dx", "dA", "dB")

in_the_interpreter = pytest.mark.skipif(CUDA, reason="the interpreter is off in a process with a GPU")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's file, in a cache folder of this test; no plan outlives the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    planner.forget_plans()
    yield measured.user_file()
    planner.forget_plans()


def row(path="triton", us=10.0, gpu=H200, product="y", M=4096, N=4096, K=4096, R=16, **changes):
    return Row(
        gpu=gpu.name,
        capability=gpu.capability,
        triton=measured.triton_version(),
        dtype="bfloat16",
        adapter_dtype=changes.pop("adapter_dtype", "bfloat16"),
        product=product,
        M=M,
        N=N,
        K=K,
        R=R,
        dropout=changes.pop("dropout", False),
        path=path,
        microseconds=us,
        status=changes.pop("status", "ok" if us else "check failed: largest error 1, allowed 0.1"),
    )


def pair(triton, addmm, **place):
    return [row("triton", triton, **place), row("addmm", addmm, **place)]


def together(one, apart, **place):
    """Rows of g and dA in one launch, and each in its own."""
    return [row("together", one, product="g+dA", **place), row("apart", apart, product="g+dA", **place)]


def write(path, rows):
    measured.save_rows(path, rows)
    planner.forget_plans()


def save_one_by_one(path, rows):
    for each in rows:
        measured.save_rows(path, [each])


def planned(device=H200, M=4096, N=4096, K=4096, R=16, mode="auto", **problem):
    dtype, dropout = problem.pop("dtype", torch.bfloat16), problem.pop("dropout", False)
    return make_plan(Problem(device, dtype, M, N, K, R, dropout, **problem), mode)


def estimated(**problem):
    """The plan without any rows, by the planner's own estimate."""
    plan = planned(**problem)
    assert all("tuned" not in getattr(plan, name).reason for name in STEPS)
    return plan


class TestRows:
    def test_a_file_gives_back_its_rows(self, cache):
        rows = [row(us=12.3456), row("addmm", 1e-3), row("addmm", None, product="dA", dropout=True)]
        write(cache, rows)
        assert set(measured.read_rows(cache)) == set(rows)
        assert cache.name == f"tuned-v{measured.VERSION}.csv"

    def test_folders_that_do_not_exist_yet(self, tmp_path):
        path = tmp_path / "cache" / "fastlora" / "rows.csv"
        measured.save_rows(path, [row(us=10.0)])
        assert measured.read_rows(path) == [row(us=10.0)]

    def test_newer_rows_take_the_place_of_older_ones(self, cache):
        write(cache, [row(us=10.0), row(us=5.0, M=512)])
        write(cache, [row(us=20.0), row("addmm", 7.0)])
        assert sorted(r.microseconds for r in measured.read_rows(cache)) == [5.0, 7.0, 20.0]

    @pytest.mark.skipif(os.name != "posix", reason="no locks of files")
    def test_processes_that_save_at_once(self, tmp_path):
        """As tune on each of several GPUs does, with one file for all."""
        context, path = multiprocessing.get_context("spawn"), tmp_path / "rows.csv"
        runs = [[row(M=M, N=N, us=1.0) for M in range(1, 31)] for N in (16, 32)]
        writers = [context.Process(target=save_one_by_one, args=(path, rows)) for rows in runs]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert set(measured.read_rows(path)) == {row for rows in runs for row in rows}

    @pytest.mark.parametrize("failing", ["fsync", "replace"])
    def test_an_interrupted_save_leaves_the_old_file(self, cache, monkeypatch, failing):
        write(cache, [row(us=10.0)])
        before = cache.read_bytes()

        def interrupt(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, failing, interrupt)
        with pytest.raises(KeyboardInterrupt):
            measured.save_rows(cache, [row(us=20.0)])
        assert cache.read_bytes() == before
        assert os.listdir(cache.parent) == [cache.name]

    @pytest.mark.parametrize(
        "change",
        [
            {"dtype": "float32"},
            {"adapter_dtype": "float16"},
            {"product": "z"},
            {"path": "reference"},
            {"path": "small"},
            {"path": "together"},
            {"path": "triton", "product": "g+dA"},
            {"M": 0},
            {"gpu": ""},
            {"microseconds": None},
            {"microseconds": 0.0},
            {"microseconds": float("nan")},
            {"microseconds": float("inf")},
            {"status": "check failed"},
            {"status": ""},
        ],
        ids=str,
    )
    def test_what_no_measurement_gives(self, change):
        with pytest.raises(ValueError, match=next(iter(change)) if "M" not in change else "positive"):
            dataclasses.replace(row(), **change)

    def test_the_shipped_table_can_be_read(self):
        rows = measured.read_rows(measured._SHIPPED)
        assert all(r.status == "ok" for r in rows)

    @pytest.mark.parametrize(("size", "bucket"), [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (4097, 8192)])
    def test_buckets(self, size, bucket):
        assert measured.bucket(size) == bucket

    def test_where_the_file_lies(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        for value in ("", "relative/folder"):
            monkeypatch.setenv("XDG_CACHE_HOME", value)
            assert measured.user_file().parent == tmp_path / "home" / ".cache" / "fastlora"
        monkeypatch.setattr(measured.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
        assert measured.user_file() is None
        planner.forget_plans()
        assert planned().path in ("triton", "addmm")


class TestPlan:
    def test_rows_before_the_estimate(self, cache):
        """Each product on its faster path, whatever the estimate says; the reason gives the figures."""
        for triton, addmm, path in ((12.34, 14.0, "triton"), (14.0, 12.34, "addmm")):
            write(cache, [r for name in STEPS for r in pair(triton, addmm, product=name)])
            plan = planned()
            for name in STEPS:
                step = getattr(plan, name)
                assert step.path == path
                assert (step.config is not None) == (path == "triton")
                assert step.reason == f"tuned here: triton {triton:.1f} us, addmm {addmm:.1f} us"

    def test_sources(self, cache, monkeypatch, tmp_path):
        """The user's rows, then the shipped ones, then the estimate."""
        shipped = tmp_path / "shipped.csv"
        monkeypatch.setattr(measured, "_SHIPPED", shipped)
        write(shipped, [*pair(1.0, 2.0), *pair(1.0, 2.0, product="dx")])
        assert planned().reason == "measured on NVIDIA H200 (shipped): triton 1.0 us, addmm 2.0 us"
        write(cache, pair(3.0, 2.0))
        plan = planned()
        assert (plan.y.path, plan.dx.path) == ("addmm", "triton")
        assert plan.y.reason.startswith("tuned here: ")
        assert plan.dx.reason.startswith("measured on NVIDIA H200 (shipped): ")
        assert plan.h.reason.startswith("estimated for sm_90: ")

    # The slower path of the estimate is measured to be faster at M = N = K = 4096, R = 16.
    @pytest.mark.parametrize(
        ("change", "decides"),
        [
            ({}, True),
            ({"M": 2049}, True),
            ({"M": 2048}, False),
            ({"M": 4097}, False),
            ({"N": 3008}, True),
            ({"N": 2800}, False),
            ({"K": 5696}, True),
            ({"K": 6000}, False),
            ({"N": 4097}, False),  # not aligned, which the row says nothing of
            ({"K": 4104}, False),
            ({"R": 1}, True),
            ({"R": 17}, False),
            ({"dtype": torch.float16}, False),
            ({"dtype": torch.float32}, False),
            ({"device": A100}, False),
            ({"device": dataclasses.replace(H200, name="NVIDIA H100")}, False),
            ({"device": dataclasses.replace(H200, capability=100)}, False),
        ],
        ids=str,
    )
    @pytest.mark.filterwarnings("ignore:fastlora")
    def test_which_calls_a_row_decides(self, cache, change, decides):
        without = estimated(**change).y
        write(cache, pair(1.0, 2.0) if without.path == "addmm" else pair(2.0, 1.0))
        step = planned(**change).y
        assert (step != without) is decides
        assert step.reason.startswith("tuned here") is decides
        if decides:
            assert step.path != without.path

    @pytest.mark.parametrize("product", STEPS)
    def test_sizes_that_a_product_does_not_depend_on(self, cache, product):
        write(cache, pair(1.0, 2.0, product=product))
        other_n = getattr(planned(N=512), product).reason.startswith("tuned")
        other_k = getattr(planned(K=512), product).reason.startswith("tuned")
        sizes = measured.SIZES[product]
        assert (other_n, other_k) == ("N" not in sizes, "K" not in sizes)

    def test_the_nearest_shape(self, cache):
        write(cache, [*pair(1.0, 2.0, N=4096), *pair(3.0, 2.0, N=5120)])
        assert planned(N=4512).reason == "tuned here at M=4096, N=4096, K=4096: triton 1.0 us, addmm 2.0 us"
        assert planned(N=4800).path == "addmm"
        write(cache, pair(5.0, 2.0, R=8))
        assert planned(R=8).reason == "tuned here: triton 5.0 us, addmm 2.0 us"
        assert planned(R=16).reason == "tuned here: triton 1.0 us, addmm 2.0 us"

    def test_the_nearest_number_of_tokens(self, cache):
        write(cache, [*pair(1.0, 2.0, M=2560), *pair(3.0, 2.0, M=4000)])
        assert [planned(M=M).path for M in (2100, 3200, 3400, 4096)] == ["triton"] * 2 + ["addmm"] * 2

    def test_few_tokens(self, cache):
        """A row of the whole forward decides h and y together."""
        for times, expected in (
            ({"small": 5.0, "triton": 6.0, "addmm": 7.0}, "small"),
            ({"small": 7.0, "triton": 5.0, "addmm": 6.0}, "triton"),
            ({"small": 7.0, "triton": 6.0, "addmm": 5.0}, "addmm"),
        ):
            rows = [row(path, us, product="forward", M=1) for path, us in times.items()]
            write(cache, [*rows, *pair(1.0, 2.0, product="h", M=1)])
            plan = planned(M=1)
            assert plan.one_launch == (expected == "small")
            assert plan.h.path == plan.y.path == ("addmm" if expected == "addmm" else "triton")
            assert f"tuned here: small {times['small']:.1f} us" in plan.y.reason
            assert not planned(M=1, dropout=True).one_launch

    def test_g_and_dA_in_one_launch(self, cache):
        """Where a row says that it is faster, with or without dropout; the rest of the plan stays."""
        write(cache, [*pair(7.0, 5.0, product="g"), *pair(3.0, 4.0, product="dA")])
        apart = planned()
        assert (apart.g.path, apart.dA.path) == ("addmm", "triton")
        write(cache, together(8.0, 7.9))
        assert planned() == apart
        write(cache, together(7.9, 8.0))
        for dropout in (False, True):
            plan = planned(dropout=dropout)
            assert plan.g_with_dA
            assert plan.g.path == plan.dA.path == "triton"
            assert (plan.g.primitive, plan.dA.primitive) == ("project", "token_sum")
            assert plan.g.config is plan.dA.config
            assert plan.g.config == configs.select_backward(90, 132, 4096, 4096, 16, 2)
            assert plan.g.reason == "one launch with dA, tuned here: together 7.9 us, apart 8.0 us"
            assert plan.dA.reason == "inside g's launch, tuned here: together 7.9 us, apart 8.0 us"
            assert plan.apart.apart == plan.apart == planned(dropout=dropout).apart
            assert (plan.apart.g, plan.apart.dA) == (apart.g, apart.dA)
            for name in ("h", "y", "dx", "dB"):
                assert getattr(plan, name) == getattr(plan.apart, name)
        assert planned() != apart
        assert planned().apart == apart

    @pytest.mark.parametrize(
        ("change", "decides"),
        [
            ({"K": 256}, True),
            ({"N": 3008}, True),
            ({"N": 2800}, False),
            ({"M": 2048}, False),
            ({"R": 17}, False),
            ({"K": 0}, False),
            ({"dtype": torch.float32}, False),
            ({"mode": "triton"}, False),
            ({"device": Device("cpu")}, False),
        ],
        ids=str,
    )
    @pytest.mark.filterwarnings("ignore:fastlora")
    def test_which_calls_a_row_of_g_and_dA_decides(self, cache, change, decides):
        write(cache, together(1.0, 2.0))
        assert planned(**change).g_with_dA is decides

    def test_groups_keep_g_and_dA_apart(self, cache):
        problem, branches = Problem(H200, torch.bfloat16, 4096, 8192, 4096, 32), ((4096, 4096), (16, 16))
        before = planner.make_group_plan(problem, *branches)
        write(cache, [*together(1.0, 2.0), *together(1.0, 2.0, N=8192, R=32)])
        assert make_plan(problem).g_with_dA
        assert planned().g_with_dA
        assert planner.make_group_plan(problem, *branches) == before

    @pytest.mark.parametrize("product", ["h", "y"])
    def test_no_estimate_against_a_row(self, cache, product):
        assert planned(M=1).one_launch
        write(cache, pair(2.0, 1.0, product=product, M=1))
        plan = planned(M=1)
        assert not plan.one_launch
        assert getattr(plan, product).path == "addmm"

    def test_wider_adapters(self, cache):
        """Their own rows decide, else those for adapters of the base's dtype, and the reason says so."""
        wide = {"adapter_dtype": torch.float32}
        write(cache, pair(1.0, 2.0))
        plan = planned(**wide)
        assert plan.path == "triton"
        assert plan.reason == "tuned here: triton 1.0 us, addmm 2.0 us, with bfloat16 adapters"
        write(cache, pair(4.0, 3.0, adapter_dtype="float32"))
        assert planned(**wide).path == "addmm"
        assert planned(**wide).reason == "tuned here: triton 4.0 us, addmm 3.0 us"
        assert planned().reason == "tuned here: triton 1.0 us, addmm 2.0 us"
        assert planned(adapter_dtype=torch.float16).reason.startswith("tuned here: triton 1.0 us")

    def test_use_path_goes_before_rows(self, cache):
        write(cache, pair(2.0, 1.0))
        assert planned(mode="triton").path == "triton"
        assert "use_path" in planned(mode="triton").reason

    def test_a_row_of_odd_sizes_is_for_these_alone(self, cache):
        without = planned(N=4096).y
        write(cache, pair(900.0, 300.0, N=4104))
        assert planned(N=4104).reason == "tuned here: triton 900.0 us, addmm 300.0 us"
        assert planned(N=4096).y == without

    @pytest.mark.parametrize("sizes", [{"M": 0}, {"N": 0}, {"K": 0}], ids=str)
    def test_empty_layers(self, cache, sizes):
        write(cache, [r for name in STEPS for r in pair(1.0, 2.0, product=name)])
        assert set(sizes) <= {"M", "N", "K"}
        for name in STEPS:
            step = getattr(planned(**sizes), name)
            assert (step.path == "triton") == (step.config is not None)


def test_only_apart_takes_the_fastest_paths_of_g_and_dA(monkeypatch):
    """The check compares with the plain formula, whatever was faster."""
    ran = []
    for name in ("run_project", "run_token_sum"):
        monkeypatch.setattr(ops, name, lambda step, *_: ran.append(step.path))
    job = tune.Job(torch.float32, torch.float32, tune.Shape(3, 5, 7, 2))
    inputs = tune.draw_inputs(job, torch.device("cpu"))
    before = [*pair(1.0, 2.0, product="g"), *pair(2.0, 1.0, product="dA")]
    problem = Problem(TEST_GPU, torch.float32, 3, 5, 7, 2)
    one = tune.computation("g+dA", problem, inputs, before)
    for path, expected in (("apart", ["triton", "addmm"]), ("reference", ["reference"] * 2)):
        ran.clear()
        one.run(path)
        assert ran == expected
    failed = tune.computation("g+dA", problem, inputs, [row("triton", None, product=p) for p in ("g", "dA")])
    ran.clear()
    failed.run("apart")
    assert ran == ["addmm"] * 2


def test_input_sets_exceed_the_cache(monkeypatch):
    """Three times, but not by more than 32 sets; what a product reads least of decides."""
    cache = 50 * 2**20
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=cache)
    )
    device = torch.device("cuda")
    for read, sets in (
        (2 * cache, 2),
        (cache, 3),
        (cache // 2, 6),
        (cache // 4 - 1, 13),
        (1000, 32),
        (0, 32),
    ):
        assert tune.input_sets(read, device) == sets
    assert tune.input_sets(4 * cache, device, 1) == 1
    assert tune.input_sets(1, torch.device("cpu")) == 1
    assert [tune.least_read(M, 4096, 1024) for M in (64, 65)] == [4096 * 1024, 65 * 1024]
    assert tune._input_sets(tune.Shape(1, 4096, 4096, 16), device) == 5
    assert tune._input_sets(tune.Shape(65536, 1024, 16384, 16), device) == 2, "a limit of memory"


@pytest.mark.parametrize("product", measured.SIZES)
def test_which_shapes_share_a_measurement(product):
    """Only those that differ in a size that the product does not depend on."""

    def key(adapter_dtype="bfloat16", **changes):
        sizes = {"M": 20, "N": 24, "K": 32, "R": 4, **changes}
        return tune._sizes(product, False, "bfloat16", adapter_dtype, tune.Shape(**sizes))

    shared = {name for name in "MNKR" if key(**{name: 64}) == key()}
    assert shared == {"N", "K"} - set(measured.SIZES[product])
    assert key("float32") != key()


def test_time_on_gpu(monkeypatch):
    """Samples of a millisecond by graphs that call every input set, in a new order; the median counts."""
    now, order, calls = [0.0], [], collections.Counter()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return (end.time - self.time) * 1e3

    def call(name, seconds):
        order.append(name)
        calls[name] += 1
        now[0] += seconds * {0: 100.0, 11: 0.01}.get(calls[name] % 30, 1.0)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(tune, "capture", lambda function, stream: SimpleNamespace(replay=function))
    sets = {
        name: [functools.partial(call, f"{name}{number}", seconds) for number in range(3)]
        for name, seconds in (("slow", 2e-4), ("quick", 1e-4))
    }
    times = tune.time_on_gpu(sets)
    assert times == {"slow": pytest.approx(2e-4), "quick": pytest.approx(1e-4)}
    assert calls == {f"slow{i}": 2 + 11 * 2 for i in range(3)} | {f"quick{i}": 2 + 11 * 4 for i in range(3)}
    firsts = [name for name, _ in itertools.groupby(name[:-1] for name in order[12:])]
    assert firsts != ["slow", "quick"] * 11


def test_table_names_the_path_that_will_be_chosen():
    failed = [row("triton", None, product="h"), row("addmm", 3.0, product="h")]
    lines = tune.table([*pair(20.0, 10.5), *failed, row("triton", None, product="g")]).splitlines()
    why = "triton check failed: largest error 1, allowed 0.1"
    assert [" ".join(line.split()) for line in lines] == [
        "bfloat16 M=4096 N=4096 K=4096 R=16 y addmm triton 20.0 us, addmm 10.5 us",
        f"bfloat16 M=4096 N=4096 K=4096 R=16 h addmm {why}, addmm 3.0 us",
        f"bfloat16 M=4096 N=4096 K=4096 R=16 g none {why}",
    ]


def test_what_was_measured_before_memory_ran_out_counts(cache, monkeypatch):
    def measure(product, *_):
        if product == "y":
            raise torch.OutOfMemoryError("full")
        return [row(product=product)]

    monkeypatch.setattr(tune, "measure", measure)
    jobs = [tune.Job(torch.bfloat16, torch.bfloat16, tune.Shape(3, 5, 7, 2))]
    done = list(tune.tune(jobs, torch.device("cpu"), TEST_GPU, dict.fromkeys, cache))
    assert done == [(jobs[0], [row(product="h")], False)]
    assert measured.read_rows(cache) == [row(product="h")]


def test_the_check_is_that_of_every_test():
    """Twice the error of eager PyTorch plus 1e-6, both the largest and the rms; every element is finite."""
    job = tune.Job(torch.bfloat16, torch.bfloat16, tune.Shape(300, 320, 40, 8))
    inputs = tune.draw_inputs(job, torch.device("cpu"))
    one = tune.computation("y", job.problem(TEST_GPU), inputs)
    eager, (exact,) = one.run("reference"), one.exact
    truth = exact(torch.arange(300), torch.arange(320))
    rows, columns = (tune._sample(size, eager.device) for size in eager.shape)
    errors = (eager.double() - truth)[rows][:, columns].abs()
    largest, rms = 2.0 * errors.max() + 1e-6, 2.0 * errors.square().mean().sqrt() + 1e-6
    single, spoilt = torch.zeros_like(truth), truth.clone()
    single[-1, -1], spoilt[1, 1] = 1.0, float("nan")
    for result, message in (
        (truth + 0.99 * rms, None),
        (truth + 1.01 * rms, "rms error"),
        (truth + 0.99 * largest * single, None),
        (truth + 1.01 * largest * single, "largest error"),
        (spoilt, "not finite"),
    ):
        fault = tune._fault(result, eager, exact)
        assert message in fault if message else fault is None
    assert {rows[0].item(), rows[-1].item(), columns[0].item(), columns[-1].item()} == {0, 299, 319}


class TestFailedChecks:
    def test_here(self, cache):
        write(cache, [row("triton", None), row("addmm", 20.0)])
        assert planned().path == "addmm"
        assert planned().reason == "tuned here: triton failed its check, addmm 20.0 us"

    def test_at_another_shape(self, cache):
        """Neither an estimate nor a passed row of the same dtype, product and rank trusts that kernel."""
        assert planned(M=8192, N=4096, K=256).path == "triton"
        write(cache, [row("triton", None, M=64, N=512, K=512), row("addmm", 20.0, M=64, N=512, K=512)])
        plan = planned(M=8192, N=4096, K=256)
        assert plan.path == "addmm"
        assert "failed its check" in plan.reason
        assert planned(M=8192, N=4096, K=256, R=17).path == "triton"
        assert planned(M=8192, N=4096, K=256, dtype=torch.float16).path == "triton"
        write(cache, pair(1.0, 2.0))
        assert planned().path == "addmm"

    def test_wider_adapters(self, cache):
        """A kernel that failed for them alone is trusted with others; one that failed for others is not."""
        shape, wide = {"M": 8192, "N": 4096, "K": 256}, {"adapter_dtype": torch.float32}
        assert planned(**shape).path == planned(**shape, **wide).path == "triton"
        write(cache, [row("triton", None, M=64, adapter_dtype="float32")])
        assert planned(**shape).path == "triton"
        assert planned(**shape, **wide).path == "addmm"
        write(cache, [row("triton", None, M=64), *pair(1.0, 2.0, adapter_dtype="float32", R=64)])
        assert planned(**shape, **wide).path == planned(**shape).path == "addmm"
        assert planned(R=64, **wide).path == "triton"
        write(cache, [row("triton", None, M=64, R=64)])
        assert planned(R=64, **wide).path == "addmm"

    def test_under_dropout(self, cache):
        """The kernels are the rule there, unless they gave wrong results."""
        assert planned(dropout=True).h.path == "triton"
        write(cache, [row("triton", None, product="h")])
        assert planned(dropout=True).h.path == "triton"
        write(cache, [row("triton", None, product="h", dropout=True, M=64)])
        plan = planned(dropout=True)
        assert (plan.h.path, plan.dB.path) == ("addmm", "triton")

    @pytest.mark.parametrize("K", [256, 4096])  # of which the estimate takes the one kernel and the other
    def test_dx_under_dropout(self, cache, K):
        """Two kernels and, if both gave wrong results, PyTorch's operations, which write the mask."""
        kinds = {"triton": configs.GemmConfig, "addmm": configs.UpdateConfig}
        shape = {"M": 8192, "K": K, "dropout": True}
        dx = planned(**shape).dx
        assert type(dx.config) is kinds[dx.path]
        other = "addmm" if dx.path == "triton" else "triton"
        failed = {path: row(path, None, product="dx", dropout=True, M=64) for path in kinds}
        write(cache, [failed[dx.path]])
        step = planned(**shape).dx
        assert (step.path, type(step.config)) == (other, kinds[other])
        write(cache, list(failed.values()))
        assert (planned(**shape).dx.path, planned(**shape).dx.config) == ("addmm", None)

    def test_one_launch(self, cache):
        assert planned(M=1).one_launch
        write(cache, [row("small", None, product="forward", M=16)])
        assert not planned(M=1).one_launch
        assert planned(M=1, R=8).one_launch is False
        times = {"small": 1.0, "triton": 2.0, "addmm": 2.0}
        write(cache, [row(path, us, product="forward", M=1) for path, us in times.items()])
        assert not planned(M=1).one_launch

    def test_g_and_dA(self, cache):
        write(cache, together(1.0, 2.0))
        assert planned().g_with_dA
        write(cache, [row("together", None, product="g+dA", M=64)])
        assert not planned().g_with_dA
        assert planned(R=64) == estimated(R=64)
        write(cache, together(1.0, 2.0, R=64))
        assert planned(R=64).g_with_dA

    def test_dx_of_a_group(self, cache):
        problem = Problem(H200, torch.bfloat16, 1024, 4096, 4096, 48)
        assert planner.make_group_plan(problem, (2048, 2048), (24, 24)).dx.path == "triton"
        write(cache, [row("triton", None, product="dx", M=64, R=48)])
        assert planner.make_group_plan(problem, (2048, 2048), (24, 24)).dx.path == "addmm"

    def test_every_path(self, cache):
        """Nothing passed: the plan still is whole."""
        write(cache, [row(path, None) for path in ("triton", "addmm")])
        assert planned().path == "addmm"

    def test_shipped_rows_do_not_overrule_a_failure_here(self, cache, monkeypatch, tmp_path):
        monkeypatch.setattr(measured, "_SHIPPED", tmp_path / "shipped.csv")
        write(tmp_path / "shipped.csv", pair(1.0, 2.0))
        assert planned().path == "triton"
        write(cache, [row("triton", None, M=64)])
        assert planned().path == "addmm"

    def test_nor_do_rows_from_here_overrule_a_shipped_failure(self, cache, monkeypatch, tmp_path):
        monkeypatch.setattr(measured, "_SHIPPED", tmp_path / "shipped.csv")
        write(cache, pair(1.0, 2.0))
        assert planned().path == "triton"
        write(tmp_path / "shipped.csv", [row("triton", None, M=64)])
        assert planned().path == "addmm"


def line(**changes):
    fields = {name: str(value) for name, value in dataclasses.asdict(row()).items()}
    return ",".join({**fields, **changes}.values())


HEADER = ",".join(measured.COLUMNS)
UNUSABLE = {
    "empty": "",
    "no csv": "hello\n",
    "binary": b"\xff\xfe\x00\x00\x80",
    "nul": f"{HEADER}\n\0\n".encode(),
    "another version's columns": f"{HEADER},extra\n{line()},1\n",
    "a column too few": f"{HEADER}\n{line().rsplit(',', 1)[0]}\n",
    "words for sizes": f"{HEADER}\n{line(M='many')}\n",
    "a negative size": f"{HEADER}\n{line(N='-1')}\n",
    "a huge number": f"{HEADER}\n{line(K='9' * 5000)}\n",
    "a size of no tensor": f"{HEADER}\n{line(K='9' * 400)}\n",
    "words for times": f"{HEADER}\n{line(microseconds='fast')}\n",
    "nan": f"{HEADER}\n{line(microseconds='nan')}\n",
    "no boolean": f"{HEADER}\n{line(dropout='yes')}\n",
    "an unknown path": f"{HEADER}\n{line(path='warp')}\n",
    "an unknown product": f"{HEADER}\n{line(product='dz')}\n",
    "a quote that does not end": f'{HEADER}\n{line()}\n"\n',
    "json": json.dumps({"rows": []}),
    "a folder": None,
    "another GPU": f"{HEADER}\n{line(gpu='NVIDIA T4', capability='75')}\n",
    "another Triton": f"{HEADER}\n{line(triton='2.0')}\n",
}


class TestUnusableFiles:
    @pytest.mark.parametrize("what", UNUSABLE)
    def test_ignored_with_one_warning(self, cache, what):
        expected = [estimated(M=M) for M in (1, 4096)]
        content = UNUSABLE[what]
        cache.parent.mkdir()
        if content is None:
            cache.mkdir()
        else:
            cache.write_bytes(content if isinstance(content, bytes) else content.encode())
        planner.forget_plans()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plans = [planned(M=M) for M in (1, 4096)]
            planned(M=512, N=1024)
        assert plans == expected
        assert len(caught) == 1, [str(w.message) for w in caught]
        assert str(cache) in str(caught[0].message)
        assert "fastlora: ignoring the measured times" in str(caught[0].message)

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every file")
    def test_an_unreadable_file(self, cache):
        write(cache, [row()])
        cache.chmod(0)
        with pytest.warns(RuntimeWarning, match="ignoring"):
            planned()

    @pytest.mark.parametrize("content", [None, f"{HEADER}\n"], ids=["absent", "no rows"])
    def test_nothing_to_say(self, cache, content):
        if content:
            cache.parent.mkdir()
            cache.write_text(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            planned()

    def test_a_file_without_rows_of_g_and_dA(self, cache):
        header = "gpu,capability,triton,dtype,adapter_dtype,product,M,N,K,R,dropout,path,microseconds,status"
        start = f"NVIDIA H200,90,{measured.triton_version()},bfloat16,bfloat16"
        times = {"triton": 1.5, "addmm": 2.0}
        lines = [
            f"{start},{name},4096,4096,4096,16,False,{path},{us},ok"
            for name in STEPS
            for path, us in times.items()
        ]
        cache.parent.mkdir()
        assert cache.name == "tuned-v3.csv"
        cache.write_text("\n".join([header, *lines, ""]))
        planner.forget_plans()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan = planned()
        assert {getattr(plan, name).reason for name in STEPS} == {"tuned here: triton 1.5 us, addmm 2.0 us"}
        assert not plan.g_with_dA
        write(cache, together(1.0, 2.0))
        assert planned().g_with_dA
        assert planned().apart == plan

    def test_a_broken_file_is_replaced_by_a_new_run(self, cache):
        cache.parent.mkdir()
        cache.write_text("hello")
        write(cache, [row()])
        assert measured.read_rows(cache) == [row()]

    @pytest.mark.filterwarnings("ignore:fastlora")
    def test_no_device_and_no_row_makes_the_planner_raise(self, cache):
        """Random devices and problems against random rows, some of which apply."""
        draw = random.Random(0)
        gpus = [Device("cuda", *pick) for pick in (("?", 80, 0), ("", 0, 0), ("new", 131, 7), ("H", 90, 1))]
        gpus += [H200, Device("cpu"), Device("mps"), Device("cuda", "MI300X", 94, 304, rocm=True)]
        for _ in range(30):
            rows = []
            for _ in range(20):
                product = draw.choice(list(measured.SIZES))
                gpu = draw.choice([gpu for gpu in gpus if gpu.name and gpu.capability])
                sizes = {size: draw.choice((1, 16, 4096, 4097)) for size in "MNK"}
                us = draw.choice((None, 1.0, 50.0))
                rank, dropout = draw.choice((1, 16, 64)), draw.random() < 0.3
                rows.append(
                    row(
                        draw.choice(measured.PATHS[product]),
                        us,
                        gpu,
                        product,
                        R=rank,
                        dropout=dropout,
                        adapter_dtype=draw.choice(("bfloat16", "float32")),
                        **sizes,
                    )
                )
            write(cache, rows)
            for _ in range(30):
                M, N, K = (draw.choice((0, 1, 16, 4096)) for _ in range(3))
                R, dropout = draw.choice((1, 16, 64, 256, 300)), draw.random() < 0.5
                dtype = draw.choice((torch.bfloat16, torch.float32, torch.float64))
                adapters = draw.choice((dtype, torch.float32))
                given = {"dtype": dtype, "dropout": dropout, "adapter_dtype": adapters}
                plan = planned(draw.choice(gpus), M, N, K, R, **given)
                for name in STEPS:
                    step = getattr(plan, name)
                    assert step.reason
                    kernel = step.config is not None and not isinstance(step.config, configs.UpdateConfig)
                    assert (step.path == "triton") == kernel


class TestReading:
    def test_once_and_for_gpus_alone(self, cache, monkeypatch):
        write(cache, pair(1.0, 2.0))
        reads = []
        read = measured.read_rows
        monkeypatch.setattr(measured, "read_rows", lambda path: reads.append(path) or read(path))
        planned(Device("cpu"))
        planned(dtype=torch.float64)
        planned(mode="addmm")
        assert reads == []
        for M in (1, 2, 4096):
            planned(M=M)
        assert sorted(reads) == sorted([cache, measured._SHIPPED])

    def test_new_rows_are_seen_by_calls_planned_before(self, cache):
        call = (torch.device("meta"), torch.bfloat16, torch.bfloat16, 4096, 4096, 4096, 16, False, "auto")
        assert ops._plan(*call) is ops._plan(*call)
        before = ops._plan(*call)
        planner.forget_plans()
        assert ops._plan(*call) is not before

    def test_not_at_import(self, cache):
        cache.parent.mkdir()
        cache.write_text("hello")
        code = (
            "import warnings; warnings.simplefilter('error', RuntimeWarning)\n"
            "import fastlora, torch\n"
            "x = torch.ones(2, 4)\n"
            "fastlora.lora_linear(x, torch.ones(3, 4), torch.ones(3, 1), torch.ones(1, 4))\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


TIMES = {"small": 1e-6, "triton": 2e-6, "addmm": 3e-6, "together": 5e-6, "apart": 4e-6}


def fake_timer(**changes):
    """A timer that runs each call once and reports TIMES, but for these; remembers what it was given."""
    seconds = {**TIMES, **changes}

    def timer(functions):
        timer.seen.append({name: len(calls) for name, calls in functions.items()})
        for calls in functions.values():
            for call in calls:
                call()
        return {name: seconds[name] for name in functions}

    timer.seen = []
    return timer


def run(*argv, timer=None, described=TEST_GPU):
    """The command, on CPU tensors in the interpreter that pass for a GPU."""
    timer = timer or fake_timer()
    return tune.main(list(argv), device=torch.device("cpu"), described=described, timer=timer)


@in_the_interpreter
class TestCommand:
    def test_a_whole_run(self, cache, capsys):
        """Every path of every product is checked and timed, and the plan follows."""
        before = planned(TEST_GPU, 4, 40, 48, 8)
        timer = fake_timer(small=9e-6)
        assert run("--shapes", "4,40,48,8", timer=timer) == 0
        rows = measured.read_rows(cache)
        assert {r.status for r in rows} == {"ok"}
        found = {(r.product, r.dropout, r.path, r.microseconds) for r in rows}
        assert found == {
            (product, dropout, path, us)
            for product, dropout in [*((s, False) for s in STEPS), *((s, True) for s in ("h", "dx", "dB"))]
            for path, us in (("triton", 2.0), ("addmm", 3.0))
        } | {
            *(("forward", False, path, us) for path, us in (("small", 9.0), ("triton", 2.0), ("addmm", 3.0))),
            *(("g+dA", False, path, us) for path, us in (("together", 5.0), ("apart", 4.0))),
        }
        assert len(timer.seen) == 11
        plan = planned(TEST_GPU, 4, 40, 48, 8)
        assert plan != before
        assert plan.reason == "tuned here: small 9.0 us, triton 2.0 us, addmm 3.0 us"
        assert not plan.g_with_dA
        out = capsys.readouterr().out
        assert "23 rows for Test GPU" in out
        assert str(cache) in out

    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    @pytest.mark.parametrize("shape", ["1,1,1,1", "16,33,70,5", "65,130,24,20"])
    def test_right_kernels_pass(self, cache, dtype, shape):
        assert run("--shapes", shape, "--dtype", dtype) == 0
        assert {r.status for r in measured.read_rows(cache)} == {"ok"}

    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    @pytest.mark.parametrize("shape", ["1,1,1,1", "16,33,70,5", "65,130,24,20"])
    def test_right_kernels_pass_with_wider_adapters(self, cache, dtype, shape):
        """They round the adapters, as eager PyTorch does under autocast."""
        assert run("--shapes", shape, "--dtype", dtype, "--adapter-dtype", "fp32") == 0
        rows = measured.read_rows(cache)
        assert {(r.status, r.adapter_dtype) for r in rows} == {("ok", "float32")}

    def test_adapters_of_both_kinds(self, cache, capsys):
        assert run("--shapes", "20,24,32,4", "--adapter-dtype", "base", "fp32") == 0
        rows, out = measured.read_rows(cache), capsys.readouterr().out
        assert sum(r.adapter_dtype == "bfloat16" for r in rows) == 20
        assert sum(r.adapter_dtype == "float32" for r in rows) == 20
        assert "\nbfloat16+float32 M=20 N=24 K=32 R=4 " in out
        assert run("--shapes", "20,24,32,4", "--adapter-dtype", "fp32", "base", "--resume") == 0
        assert "\n0 rows for Test GPU" in capsys.readouterr().out

    def test_a_kernel_that_is_wrong_for_wider_adapters(self, cache, monkeypatch):
        """They arrive in float32, though the base has half precision."""

        def wrong(step, p, q, *args):
            result = project(step, p, q, *args)
            if step.path == "triton" and q.dtype == torch.float32:
                result[-1, -1] += 1.0
            return result

        project = ops.run_project
        monkeypatch.setattr(ops, "run_project", wrong)
        assert run("--shapes", "20,24,32,4", "--adapter-dtype", "base", "fp32") == 0
        failed = {(r.product, r.adapter_dtype) for r in measured.read_rows(cache) if r.status != "ok"}
        assert failed == {("h", "float32"), ("g", "float32")}

    def test_shared_products_are_measured_once(self, cache):
        run("--shapes", "20,24,32,4", "20,40,32,4", "20,24,32,4")
        counts = {
            name: sum(r.product == name and r.path in ("addmm", "apart") for r in measured.read_rows(cache))
            for name in measured.SIZES
        }
        # dropout adds one more of h, dx and dB
        assert counts == {"h": 2, "dB": 2, "y": 2, "dx": 4, "g": 2, "dA": 2, "forward": 0, "g+dA": 2}

    def test_g_and_dA_against_the_fastest_pair(self, cache, monkeypatch, capsys):
        """Each alone first; then both on their faster paths, checked and timed against the one launch."""
        used, timed = [], []

        def spied(name, launch):
            def call(step, *args, **kwargs):
                used.append((name, step.path))
                return launch(step, *args, **kwargs)

            return call

        for name in ("run_project", "run_token_sum", "run_g_and_dA"):
            monkeypatch.setattr(ops, name, spied(name, getattr(ops, name)))

        def timer(functions):
            """The kernel is the slower one of token sums, the faster one of everything else."""
            used.clear()
            for calls in functions.values():
                for call in calls:
                    call()
            if "apart" in functions:
                timed.append((*functions, *used))
            slow = {"apart", "triton" if ("run_token_sum", "triton") in used else "addmm"}
            return {name: 2e-6 if name in slow else 1e-6 for name in functions}

        assert run("--shapes", "20,40,48,8", timer=timer) == 0
        kernels = ("run_g_and_dA", "triton"), ("run_project", "triton"), ("run_token_sum", "addmm")
        assert timed == [("together", "apart", *kernels)]
        plan = planned(TEST_GPU, 20, 40, 48, 8)
        assert plan.g_with_dA
        assert (plan.apart.g.path, plan.apart.dA.path) == ("triton", "addmm")
        assert "g+dA        together together 1.0 us, apart 2.0 us" in capsys.readouterr().out

    @pytest.mark.parametrize("product", [*STEPS, "forward"])
    @pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
    def test_a_faulty_kernel_is_never_chosen(self, cache, monkeypatch, capsys, product, fault):
        """Its row says what is wrong, it is not timed, and no plan takes it, at this shape or another."""

        def faulty(launch):
            def call(step, *args, **kwargs):
                result = launch(step, *args, **kwargs)
                if step.path != "triton":
                    return result
                if fault == "raises":
                    raise RuntimeError("PTXAS error\nlong text")
                whole = result[0] if isinstance(result, tuple) else result
                if fault == "nan":
                    whole[-1, -1] = float("nan")
                else:
                    whole[-1, -1] += 1.0
                return result

            return call

        function = {"project": "run_project", "gemm": "run_gemm", "token_sum": "run_token_sum"}
        if product == "forward":
            monkeypatch.setattr(ops, "run_small", faulty(ops.run_small))
        else:
            name = function[getattr(planned(), product).primitive]
            monkeypatch.setattr(ops, name, faulty(getattr(ops, name)))
        timer = fake_timer()
        assert run("--shapes", "4,40,48,8", timer=timer) == 0
        bad = "small" if product == "forward" else "triton"
        rows = [r for r in measured.read_rows(cache) if r.product == product and not r.dropout]
        status = {r.path: r.status for r in rows}
        says = {
            "wrong": "check failed: largest error",
            "nan": "check failed: not finite",
            "raises": "failed: ",
        }
        assert status.pop(bad).startswith(says[fault])
        assert set(status.values()) == {"ok"}
        assert all(bad not in seen for seen in timer.seen if product == "forward")
        for M in (4, 8192):
            plan = planned(TEST_GPU, M, 40, 48, 8)
            assert not plan.one_launch or product != "forward"
            if product != "forward":
                step = getattr(plan, product)
                assert step.path == "addmm" or plan.one_launch
        assert "failed" in capsys.readouterr().out

    @pytest.mark.parametrize("result", [0, 1], ids=["g", "dA"])
    @pytest.mark.parametrize("fault", ["wrong", "nan", "raises", "shape"])
    def test_a_faulty_launch_of_g_and_dA_is_never_chosen(self, cache, monkeypatch, fault, result):
        """Though by the clock it is the fastest."""
        from fastlora.kernels import backward

        def faulty(*args):
            results = list(launch(*args))
            if fault == "raises":
                raise RuntimeError("PTXAS error")
            if fault == "shape":
                results[result] = results[result][1:]
            else:
                results[result][-1, -1] += 1.0 if fault == "wrong" else float("nan")
            return tuple(results)

        launch = backward.g_and_dA
        monkeypatch.setattr(backward, "g_and_dA", faulty)
        timer = fake_timer(together=1e-6)
        assert run("--shapes", "20,40,48,8", timer=timer) == 0
        rows = [r for r in measured.read_rows(cache) if r.status != "ok"]
        assert [(r.product, r.path) for r in rows] == [("g+dA", "together")]
        assert rows[0].status.startswith(
            {"wrong": "check failed: largest error", "raises": "failed: RuntimeError: PTXAS"}.get(
                fault, "check failed: not finite, or of another shape"
            )
        )
        assert not any("together" in seen for seen in timer.seen)
        write(cache, together(1.0, 2.0, gpu=TEST_GPU))
        for sizes in ((20, 40, 48, 8), (8192, 40, 48, 8), (4096, 4096, 4096, 16)):
            assert not planned(TEST_GPU, *sizes).g_with_dA

    def test_wrong_dropout_is_seen(self, cache, monkeypatch):
        """dx without the mask, a known bug elsewhere."""
        gemm = ops.run_gemm

        def unmasked(step, *args, drop=None):
            return gemm(step, *args, drop=None if step.path == "triton" else drop)

        monkeypatch.setattr(ops, "run_gemm", unmasked)
        run("--shapes", "20,40,48,8")
        failed = {(r.product, r.dropout) for r in measured.read_rows(cache) if r.status != "ok"}
        assert failed == {("dx", True)}

    def test_out_of_memory(self, cache, capsys, monkeypatch):
        draw = tune.draw_inputs

        def draw_inputs(job, *args):
            if job.shape.M == 20:
                raise torch.OutOfMemoryError
            return draw(job, *args)

        monkeypatch.setattr(tune, "draw_inputs", draw_inputs)
        assert run("--shapes", "20,24,32,4", "21,24,32,4") == 0
        assert {r.M for r in measured.read_rows(cache)} == {21}
        assert "left out, the GPU's memory is too small: M=20 N=24 K=32 R=4, " in capsys.readouterr().out

    def test_out_of_memory_in_part(self, cache, capsys, monkeypatch):
        """What was measured before is kept, and what was not is named."""

        def full(step, *args, **kwargs):
            raise torch.OutOfMemoryError

        monkeypatch.setattr(ops, "run_token_sum", full)
        assert run("--shapes", "20,24,32,4") == 0
        assert {r.product for r in measured.read_rows(cache)} >= {"h", "y"}
        assert "too small: M=20 N=24 K=32 R=4, torch.bfloat16, in part" in capsys.readouterr().out

    def test_interrupted(self, cache, capsys):
        """What was measured before is kept, and planned with."""
        timer = fake_timer()

        def interrupting(functions):
            if len(timer.seen) == 10:
                raise KeyboardInterrupt
            return timer(functions)

        assert run("--shapes", "20,24,32,4", "21,24,32,4", timer=interrupting) == 130
        assert {r.M for r in measured.read_rows(cache)} == {20}
        assert "interrupted" in capsys.readouterr().out

    def test_a_timer_that_fails(self, cache, capsys):
        """A capture that fails, say: that product has no rows, the others have theirs."""
        timer = fake_timer()

        def failing(functions):
            if len(timer.seen) == 2:
                timer.seen.append({})
                raise RuntimeError("capture failed")
            return timer(functions)

        with pytest.warns(
            RuntimeWarning, match=r"at M=20 N=24 K=32 R=4, torch.bfloat16 was not timed: capture failed"
        ):
            assert run("--shapes", "20,24,32,4", timer=failing) == 0
        rows = measured.read_rows(cache)
        assert {row.status for row in rows} == {"ok"}
        assert (
            len({(row.product, row.dropout) for row in rows})
            == len(tune.products(tune.Shape(20, 24, 32, 4))) - 1
        )

    @pytest.mark.parametrize(
        "text", ["Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"]
    )
    def test_other_libraries_run_out_of_memory_too(self, cache, text, monkeypatch):
        """No path is to blame: there is no row that would exclude it at other shapes."""

        def full(step, *args, **kwargs):
            raise RuntimeError(text)

        monkeypatch.setattr(ops, "run_token_sum", full)
        assert run("--shapes", "20,24,32,4") == 0
        rows = measured.read_rows(cache)
        assert {row.product for row in rows} & {"h", "y"}
        assert {row.status for row in rows} == {"ok"}

    def test_minutes(self, cache, capsys, monkeypatch):
        now = iter([0.0, 1.0, 61.0])
        monkeypatch.setattr(tune.time, "monotonic", lambda: next(now))
        assert run("--shapes", "20,24,32,4", "21,24,32,4", "--minutes", "1") == 0
        assert {r.M for r in measured.read_rows(cache)} == {20}
        assert "left out for lack of time: 1 of 2 shapes" in capsys.readouterr().out

    def test_a_lost_device(self, cache, monkeypatch, capsys):
        """After an illegal access nothing more can be measured: the culprit's row is the last."""

        def illegal(step, *args, **kwargs):
            if step.path == "triton":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return token_sum(step, *args, **kwargs)

        token_sum = ops.run_token_sum
        monkeypatch.setattr(ops, "run_token_sum", illegal)
        monkeypatch.setattr(tune, "_works", lambda device: False)
        assert run("--shapes", "20,24,32,4") == 2
        rows = measured.read_rows(cache)
        (lost,) = [r for r in rows if r.status != "ok"]
        assert (lost.product, lost.path) == ("dA", "triton")
        assert lost.status.startswith("lost the GPU: failed: RuntimeError: CUDA error: an illegal")
        assert not [r for r in rows if r.product == "dB"]
        assert "dA by triton" in capsys.readouterr().err
        assert planned(TEST_GPU, 8192, 4096, 4096, 4).dA.path == "addmm"

    def test_a_device_lost_while_paths_are_timed(self, cache, monkeypatch, capsys):
        """The kernel is suspected, not the BLAS."""

        def timer(functions):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(tune, "_works", lambda device: False)
        assert run("--shapes", "20,24,32,4", timer=timer) == 2
        (lost,) = measured.read_rows(cache)
        assert (lost.product, lost.path) == ("h", "triton")
        assert lost.status.startswith("lost the GPU: timed: CUDA error: an illegal")
        assert planned(TEST_GPU, 8192, 4096, 4096, 4).h.path == "addmm"

    @pytest.mark.parametrize("shape", ["20,24,32,4", "300,40,8,9"])
    def test_after_a_lost_device(self, cache, monkeypatch, shape):
        """The path that broke the GPU is not run again, so that the next run gets past it, at any shape."""
        token_sum, status = ops.run_token_sum, "lost the GPU: failed: RuntimeError: CUDA error"

        def illegal(step, p, u, scale, dtype, transposed=False, drop=None):
            assert step.path != "triton" or transposed
            return token_sum(step, p, u, scale, dtype, transposed, drop)

        monkeypatch.setattr(ops, "run_token_sum", illegal)
        write(
            cache,
            [row(us=None, gpu=TEST_GPU, product="dA", M=20, N=24, K=32, R=4, dropout=False, status=status)],
        )
        assert run("--shapes", shape) == 0
        rows = [r for r in measured.read_rows(cache) if ",".join(map(str, r.shape)) == shape]
        wrong = {(r.product, r.path, r.status) for r in rows if r.status != "ok"}
        assert wrong == {("dA", "triton", status)}
        assert {r.product for r in rows} == set(measured.SIZES) - {"forward"}

    @pytest.mark.parametrize("other", [{"triton": "2.0"}, {"capability": 86}, {"gpu": "Other"}], ids=str)
    def test_rows_of_another_machine_are_not_resumed(self, cache, other):
        assert run("--shapes", "20,24,32,4") == 0
        rows = measured.read_rows(cache)
        cache.unlink()
        write(cache, [dataclasses.replace(r, **other) for r in rows])
        assert run("--shapes", "20,24,32,4", "--resume") == 0
        assert len(measured.read_rows(cache)) == 2 * len(rows)

    def test_resumed(self, cache, monkeypatch, capsys):
        """What the file has is left alone, what an earlier run did not get to or through is measured."""
        assert run("--shapes", "20,24,32,4") == 0
        old = [r for r in measured.read_rows(cache) if (r.product, r.path) != ("y", "addmm")]
        old = [r for r in old if r.product != "g+dA"]
        cache.unlink()
        write(cache, [*old, row(gpu=H200, product="h", M=21, N=24, K=32, R=4)])
        drawn, draw = [], tune.draw_inputs
        monkeypatch.setattr(
            tune, "draw_inputs", lambda job, *rest: drawn.append(job.shape) or draw(job, *rest)
        )
        timer = fake_timer(triton=9e-6, addmm=8e-6)
        # Of the second shape, g and dA are those of the first.
        shapes = ["20,24,32,4", "20,24,40,4", "21,24,32,4"]
        assert run("--shapes", *shapes, "--resume", timer=timer) == 0
        new = [r for r in measured.read_rows(cache) if r.gpu == TEST_GPU.name and r not in old]
        assert {(r.product, r.dropout) for r in new if (r.M, r.K) == (20, 32)} == {
            ("y", False),
            ("g+dA", False),
        }
        second = {("h", False), ("y", False), ("dx", False), ("dB", False)}
        second |= {(name, True) for name in planner.DROPPED}
        assert {(r.product, r.dropout) for r in new if r.K == 40} == second
        third = tune.products(tune.Shape(21, 24, 32, 4))
        assert {(r.product, r.dropout) for r in new if r.M == 21} == set(third)
        assert len(drawn) == 3
        capsys.readouterr()
        assert run("--shapes", *shapes, "--resume", timer=lambda functions: pytest.fail("timed again")) == 0
        assert len(drawn) == 3
        assert "\n0 rows for Test GPU" in capsys.readouterr().out

    def test_resuming_takes_the_fastest_g_and_dA_from_the_file(self, cache, monkeypatch):
        assert run("--shapes", "20,24,32,4", timer=fake_timer(triton=1e-6)) == 0
        old = [r for r in measured.read_rows(cache) if r.product != "g+dA"]
        cache.unlink()
        write(cache, old)
        used, project = [], ops.run_project

        def spied(step, *args):
            used.append(step.path)
            return project(step, *args)

        monkeypatch.setattr(ops, "run_project", spied)
        timer = fake_timer()
        assert run("--shapes", "20,24,32,4", "--resume", timer=timer) == 0
        assert timer.seen == [{"together": 1, "apart": 1}]
        assert used[-1] == "triton"

    def test_another_file(self, cache, tmp_path):
        out = tmp_path / "folder" / "rows.csv"
        assert run("--shapes", "20,24,32,4", "--out", str(out)) == 0
        assert measured.read_rows(out)
        assert not cache.exists()

    def test_a_file_of_something_else(self, tmp_path, capsys):
        out = tmp_path / "notes.md"
        out.write_text("# Notes")
        assert run("--shapes", "20,24,32,4", "--out", str(out)) == 2
        assert "is not replaced: line 1: expected the columns" in capsys.readouterr().err
        assert out.read_text() == "# Notes"
        out.write_text("")
        assert run("--shapes", "20,24,32,4", "--out", str(out)) == 0
        assert measured.read_rows(out)

    def test_a_folder_that_cannot_be_written(self, tmp_path, capsys):
        (tmp_path / "file").touch()
        assert run("--shapes", "20,24,32,4", "--out", str(tmp_path / "file" / "rows.csv")) == 2
        assert "cannot be written" in capsys.readouterr().err

    def test_progress(self, monkeypatch, capsys):
        run("--shapes", "20,24,32,4")
        assert "tune" in capsys.readouterr().err
        monkeypatch.setitem(sys.modules, "tqdm", None)
        run("--shapes", "20,24,32,4", "21,24,32,4")
        err = capsys.readouterr().err.splitlines()
        assert [text.split()[0] for text in err] == ["[1/2]", "[2/2]"]

    @pytest.mark.parametrize(
        ("described", "words"),
        [
            (Device("cuda", "Tesla T4", 75, 40), "sm_80"),
            (Device("cuda", "MI300X", 94, 304, rocm=True), "ROCm"),
        ],
    )
    def test_a_gpu_without_kernels(self, cache, described, words, capsys):
        assert run("--shapes", "4,40,48,8", described=described) == 2
        assert words in capsys.readouterr().err
        assert not cache.exists()


def layers_of(*argv, capsys):
    """The shapes that --list prints."""
    assert tune.main(["--list", *argv]) == 0
    return sorted(text.split(maxsplit=1)[1] for text in capsys.readouterr().out.splitlines())


class TestArguments:
    def test_no_gpu(self, monkeypatch, capsys, cache):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert tune.main([]) == 2
        assert "no GPU" in capsys.readouterr().err
        assert not cache.exists()

    @pytest.mark.parametrize(
        "text", ["1,2,3", "1,2,3,4,5", "a,b,c,d", "0,1,1,1", "1,1,1,257", "-1,1,1,1", ""]
    )
    def test_malformed_shapes(self, text, capsys):
        with pytest.raises(SystemExit) as stop:
            tune.main(["--list", f"--shapes={text}"])
        assert stop.value.code == 2
        assert "expected M,N,K,R" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "argv",
        [
            ["--tokens", "0"],
            ["--ranks", "x"],
            ["--dtype", "fp32"],
            ["--adapter-dtype", "bf16"],
            ["--minutes", "nan"],
            ["--minutes", "0"],
            ["--minutes", "x"],
        ],
        ids=str,
    )
    def test_malformed_options(self, argv):
        with pytest.raises(SystemExit):
            tune.main(["--list", *argv])

    def test_decoding_and_long_batches_come_first(self):
        jobs = tune.job_list(tune._parser().parse_args([]))
        tokens = list(dict.fromkeys(job.shape.M for job in jobs))
        assert tokens == [1, 16, 8192, 4096, 2048, 1024, 512, 256, 64, 2, 4, 8]

    def test_list(self, capsys):
        assert (
            tune.main(["--list", "--shapes", "4,40,48,8", "1,2,3,4", "1,2,3,4", "--dtype", "fp16", "bf16"])
            == 0
        )
        assert capsys.readouterr().out.splitlines() == [
            f"{dtype:<9} {shape}"
            for dtype in ("float16", "bfloat16")
            for shape in ("M=1 N=2 K=3 R=4", "M=4 N=40 K=48 R=8")
        ]
        assert tune.main(["--list", "--shapes", "1,2,3,4", "--adapter-dtype", "base", "fp32"]) == 0
        listed = capsys.readouterr().out.splitlines()
        assert listed == ["bfloat16  M=1 N=2 K=3 R=4", "bfloat16+float32 M=1 N=2 K=3 R=4"]
        found = layers_of("--tokens", "7", "--ranks", "32", capsys=capsys)
        assert found == sorted(f"M=7 N={n} K={k} R=32" for n, k in tune.FEATURES)

    def test_model(self, tmp_path, capsys):
        """The linear layers of a transformers model, each shape once, no weights needed."""
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
        )
        config.save_pretrained(tmp_path)
        found = layers_of("--model", str(tmp_path), "--tokens", "3", "--ranks", "8", capsys=capsys)
        features = [(32, 32), (16, 32), (48, 32), (32, 48)]
        assert found == sorted(f"M=3 N={n} K={k} R=8" for n, k in features)
        for targets, kept in (
            (["q_proj", "up_proj"], [(32, 32), (48, 32)]),
            (r"model\.layers\.\d+\.self_attn\.v_proj", [(16, 32)]),
            ("all-linear", features),
        ):
            adapter = tmp_path / "adapter"
            adapter.mkdir(exist_ok=True)
            fields = {"base_model_name_or_path": str(tmp_path), "r": 5, "target_modules": targets}
            (adapter / "adapter_config.json").write_text(json.dumps(fields))
            found = layers_of("--model", str(adapter), "--tokens", "3", capsys=capsys)
            assert found == sorted(f"M=3 N={n} K={k} R=5" for n, k in kept)
        fields = {
            **fields,
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "exclude_modules": ["up_proj"],
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 7},
        }
        (adapter / "adapter_config.json").write_text(json.dumps(fields))
        found = layers_of("--model", str(adapter), "--tokens", "3", capsys=capsys)
        assert found == ["M=3 N=16 K=32 R=5", "M=3 N=32 K=32 R=5", "M=3 N=32 K=32 R=7"]

    def test_adapter_file(self, tmp_path, capsys):
        """N, K and the rank of each layer as the file holds them; no base model is looked for."""
        safetensors = pytest.importorskip("safetensors.torch")
        prefix = "base_model.model.layers"
        tensors = {
            f"{prefix}.0.q.lora_A.weight": torch.zeros(4, 24),
            f"{prefix}.0.q.lora_B.weight": torch.zeros(40, 4),
            f"{prefix}.1.q.lora_A.weight": torch.zeros(4, 24),
            f"{prefix}.1.q.lora_B.weight": torch.zeros(40, 4),
            f"{prefix}.1.k.lora_A.default.weight": torch.zeros(9, 24),
            f"{prefix}.1.k.lora_B.default.weight": torch.zeros(16, 9),
            f"{prefix}.conv.lora_A.weight": torch.zeros(4, 3, 3, 3),
            f"{prefix}.conv.lora_B.weight": torch.zeros(8, 4, 1, 1),
            f"{prefix}.score.weight": torch.zeros(2, 24),
        }
        safetensors.save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text("{}")
        found = layers_of("--model", str(tmp_path), "--tokens", "3", capsys=capsys)
        assert found == ["M=3 N=16 K=24 R=9", "M=3 N=40 K=24 R=4"]

    def test_models_that_cannot_be_read(self, tmp_path, capsys):
        pytest.importorskip("transformers")
        adapter = tmp_path / "adapter_config.json"
        missing = str(tmp_path / "missing")
        fields = {"base_model_name_or_path": missing, "r": 8, "target_modules": ["q_proj"]}
        bad = (
            {"target_modules": "("},
            {"r": 0},
            {"target_modules": None},
            {"base_model_name_or_path": None},
            {},
        )
        for content in (None, "{}", "[1]", "not json", *(json.dumps({**fields, **change}) for change in bad)):
            if content is not None:
                adapter.write_text(content)
            assert tune.main(["--list", "--model", str(tmp_path if content else missing)]) == 2
            assert "fastlora tune: " in capsys.readouterr().err
        (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
        assert tune.main(["--list", "--model", str(tmp_path)]) == 2
        assert "cannot be read" in capsys.readouterr().err

    @pytest.mark.parametrize("sizes", [{"hidden_size": "x"}, {"hidden_size": 30}, {"num_attention_heads": 0}])
    def test_models_that_cannot_be_built(self, tmp_path, capsys, sizes):
        pytest.importorskip("transformers")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
        assert tune.main(["--list", "--model", str(tmp_path)]) == 2
        assert "fastlora tune: transformers cannot build" in capsys.readouterr().err

    def test_extras_that_are_missing(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "transformers", None)
        assert tune.main(["--list", "--model", "some/model"]) == 2
        assert "pip install transformers" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="times a GPU that other tests use: -n0")
def test_on_this_gpu(cache):
    """Checked and timed for real; a large gemm takes longer than a small one."""
    assert tune.main(["--shapes", "1,1024,1024,16", "2048,4096,4096,16", "--dtype", "bf16", "fp16"]) == 0
    rows = measured.read_rows(cache)
    assert [r for r in rows if r.status != "ok"] == []
    y = {(r.dtype, r.M, r.path): r.microseconds for r in rows if r.product == "y"}
    assert y["bfloat16", 2048, "addmm"] > 2 * y["bfloat16", 1, "addmm"]
    device = describe(torch.device("cuda"))
    assert planned(device, 2048).reason.startswith("tuned here: ")
