"""The Gluon kernel for Hopper without one: its source emulated, and what the compiler makes of it."""

import csv
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gluon_emulator
import pytest
import torch
from cases import assert_matches, differentiate, eager_errors, exact, fused, tensors
from tolerance import assert_as_accurate

import fastlora
from fastlora import measured, planner
from fastlora.device import Device
from fastlora.kernels import configs

KERNEL = Path(configs.__file__).with_name("hopper.py")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
# Small tiles with the proportions of the real ones keep the emulation quick.
CONFIG = configs.HopperConfig(block_m=16, block_e=32, block_d=8, block_r=8, group_m=2, slots=4, programs=3)
both_schedules = pytest.mark.parametrize("teams", [1, 2], ids=["cooperative", "pingpong"])


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


@both_schedules
@pytest.mark.parametrize("q_by_rows", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("M", "D", "E", "R"),
    [(16, 8, 32, 8), (1, 1, 1, 1), (50, 41, 70, 5), (33, 8, 97, 8), (16, 80, 32, 3), (70, 24, 40, 20)],
)
def test_values(M, D, E, R, dtype, bias, q_by_rows, teams):
    assert_right(M, D, E, R, dtype, q_by_rows, bias, replace(CONFIG, teams=teams))


@both_schedules
@pytest.mark.parametrize("slots", [2, 3, 5])
@pytest.mark.parametrize("programs", [1, 2, 7, 50])
def test_any_ring_and_any_number_of_programs(slots, programs, teams):
    config = replace(CONFIG, group_m=3, slots=slots, programs=programs, teams=teams)
    assert_right(90, 30, 130, 17, config=config, programs=programs)


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


@both_schedules
@pytest.mark.parametrize(
    "fault", [_free_before_waiting, _never_free, _no_fence, _no_store_wait, _expect_too_little]
)
def test_emulation_finds(fault, teams, monkeypatch):
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 0.3)
    with pytest.raises((AssertionError, gluon_emulator.Deadlock)):
        assert_right(32, 80, 32, 8, config=replace(CONFIG, teams=teams), programs=1, change=fault)


@pytest.mark.parametrize("D", [64, 80])
def test_emulation_finds_teams_that_do_not_wait_for_their_turns(D, monkeypatch):
    class Open(gluon_emulator.Barriers):
        def index(self, i):
            return SimpleNamespace(
                init=lambda count: None, arrive=lambda count: None, wait=lambda parity: None
            )

    def change(module):
        allocate = module.gl.allocate_shared_memory
        module.gl.allocate_shared_memory = lambda dtype, shape, layout: (
            Open(2) if dtype is gluon_emulator.Barriers and shape[0] == 2 else allocate(dtype, shape, layout)
        )

    monkeypatch.setattr(gluon_emulator, "PATIENCE", 0.3)
    with pytest.raises((AssertionError, gluon_emulator.Deadlock)):
        assert_right(64, D, 64, 8, config=replace(CONFIG, teams=2), programs=1, change=change)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What the compiler makes of the kernel, in a process of its own: the interpreter is on in this one."""
    folder = tmp_path_factory.mktemp("static")
    command = [sys.executable, str(BENCHMARKS / "static.py"), "--out", str(folder)]
    subprocess.run([*command, "--kernel", "hopper", "--arch", "90"], check=True, capture_output=True)
    with open(folder / "static.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_compiled(rows):
    """Bounds with their reasons; the counts are those of triton 3.6 to 3.8."""
    variants = {(int(row["rank"]), row["config"].split()[-1]) for row in rows}
    assert variants == {(rank, f"teams={n}") for rank in (16, 32, 64, 128, 256) for n in (1, 2)}
    for row in rows:
        rank, teams = int(row["rank"]), int(row["config"].rpartition("=")[2])
        assert int(row["spills"]) == 0, row
        # 12 warps share 65,536 registers; the accumulator alone takes 128 of each multiplying thread's.
        assert int(row["registers"]) <= 168, row
        assert int(row["shared_bytes"]) <= configs.SHARED_MEMORY[90], row
        config = configs.select_hopper(132, rank, teams)
        assert int(row["shared_bytes"]) <= config.shared_bytes(2), row
        assert row["warnings"] == "", "ptxas serialised wgmma"
        assert row["mma"] == "HGMMA", row
        # wgmma is 16 deep: four for a slot of the main loop, and those of one slot of the update. It has 64
        # rows: a team that has the tile's 128 to itself takes two of each, and each team has its own code.
        assert int(row["mma_count"]) == teams**2 * (4 + min(max(rank, 16), 64) // 16), row
        # Two steps load through TMA, or more where the loop over the ranks is unrolled; a box is at most 64
        # columns wide, so W by rows takes four for 256, and two for 128.
        each = 1 + (config.block_e // 64 if row["backward"] == "True" else 1)
        assert int(row["async_copies"]) >= 2 * each, row
        assert int(row["async_copies"]) % each == 0, row


@both_schedules
def test_a_slot_is_freed_by_the_whole_team(teams, tmp_path):
    """One thread arrives for its team, so a barrier must stand between a product's end and the arrival."""
    script = tmp_path / "ptx.py"
    script.write_text(
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "import static\n"
        f"case = static.Case('hopper', 90, 8192, 16, teams={teams})\n"
        "real = static._ptxas\n"
        "static._ptxas = lambda ptx: print(ptx) or real(ptx)\n"
        "static.compile_case(case)\n"
    )
    run = subprocess.run(
        [sys.executable, str(script), str(BENCHMARKS)], check=True, capture_output=True, text=True
    )
    steps = re.findall(r"wgmma\.wait_group|bar\.sync|mbarrier\.arrive\.shared", run.stdout)
    arrivals = [i for i, step in enumerate(steps) if step.startswith("mbarrier")]
    waits = [steps[i - 2] for i in arrivals if steps[i - 1] == "bar.sync"]
    # The update, the main loop, its end and, before this, the end of a turn, for which no product is awaited.
    assert len(waits) == len(arrivals) == (3 if teams == 1 else 8)
    assert waits.count("wgmma.wait_group") == 3 * teams


H100 = Device("cuda", "H100", 90, 132)


def problem(**changes):
    fields = {"device": H100, "dtype": torch.bfloat16, "M": 4096, "N": 1024, "K": 4096, "R": 16}
    return planner.Problem(**{**fields, **changes})


@pytest.fixture
def asked_for(monkeypatch):
    monkeypatch.setenv("FASTLORA_HOPPER", "1")
    planner.forget_plans()
    yield
    planner.forget_plans()


def test_off_unless_asked_for():
    planner.forget_plans()
    plan = planner.make_plan(problem())
    assert not isinstance(plan.y.config, configs.HopperConfig)


@pytest.mark.parametrize("N", [1024, 1032])  # the other kernels would read 1032 element by element
def test_plan(asked_for, N):
    plan = planner.make_plan(problem(N=N))
    for step in (plan.y, plan.dx):
        assert step.config == configs.select_hopper(132, 16)
        assert step.path == "triton"
        assert "has not been measured" in step.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"device": Device("cuda", "A100", 80, 108)},
        {"device": Device("cuda", "B200", 100, 148)},
        {"M": 64},
        {"N": 1020},
        {"K": 4092},
        {"R": 12},
        {"dtype": torch.float32},
    ],
)
def test_plan_where_it_cannot_run(asked_for, changes):
    plan = planner.make_plan(problem(**changes), "triton")
    assert isinstance(plan.y.config, configs.GemmConfig | configs.SmallConfig)


def test_its_measured_rows_are_kept_apart(asked_for, monkeypatch):
    assert measured.triton_version().endswith("+hopper")
    monkeypatch.delenv("FASTLORA_HOPPER")
    planner.forget_plans()
    assert re.fullmatch(r"\d+\.\d+", measured.triton_version())


def test_plan_with_dropout(asked_for):
    plan = planner.make_plan(problem(dropout=True))
    assert isinstance(plan.y.config, configs.HopperConfig)
    assert isinstance(plan.dx.config, configs.GemmConfig | configs.UpdateConfig)


@pytest.mark.cuda
@pytest.mark.skipif(not HOPPER, reason="no GPU of sm_90")
@both_schedules
@pytest.mark.parametrize("q_by_rows", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("M", "D", "E", "R"),
    [
        (128, 64, 256, 16),
        (1000, 1032, 520, 8),
        (77, 200, 4096, 64),
        (4096, 4096, 1024, 136),
        (513, 64, 264, 256),
    ],
)
def test_on_a_gpu(M, D, E, R, dtype, q_by_rows, teams, poisoned_empty):
    from fastlora.kernels import hopper

    matrices_ = [t.cuda() for t in matrices(M, D, E, R, dtype, q_by_rows)]
    p, q, u, v, bias = matrices_
    config = configs.select_hopper(torch.cuda.get_device_properties(0).multi_processor_count, R, teams)
    actual = hopper.gemm(p, q, u, v, 1.5, config, bias, q_by_rows)
    right, update = (q, v) if q_by_rows else (q.t(), v.t())

    def formula(cast):
        return cast(p) @ cast(right) + 1.5 * (cast(u) @ cast(update)) + cast(bias)

    assert_as_accurate(actual, formula(lambda t: t), formula(lambda t: t.double()), "c")
    for _ in range(20):  # the same bits again and again: a race would show
        assert torch.equal(hopper.gemm(p, q, u, v, 1.5, config, bias, q_by_rows), actual)


@pytest.mark.cuda
@pytest.mark.skipif(not HOPPER, reason="no GPU of sm_90")
def test_layer_on_a_gpu(asked_for):
    case = tensors(640, 512, 1024, 16, torch.bfloat16, torch.float32, device="cuda")
    wanted = ("x", "A", "B", "bias")
    assert isinstance(
        fastlora.plan(case.x, case.weight, case.A, case.B, case.bias).y.config, configs.HopperConfig
    )
    actual = differentiate(fused(1.5), case, wanted)
    assert_matches(actual, exact(case, 1.5), eager_errors(case, 1.5))


@pytest.mark.parametrize(
    ("strides", "offset", "readable"),
    [((64, 1), 0, True), ((72, 1), 8, True), ((68, 1), 0, False), ((64, 1), 4, False), ((0, 1), 0, False)],
)
def test_what_tma_can_read(strides, offset, readable):
    from fastlora.kernels import hopper

    matrix = torch.zeros(8192, dtype=torch.float16).as_strided((40, 64), strides, offset)
    assert (hopper.why_not(matrix) is None) is readable
    assert hopper.why_not(matrix[:1].float()) is not None
