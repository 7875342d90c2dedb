"""The Gluon kernel for Hopper without one: what the compiler makes of it, counted and emulated."""

import ast
import csv
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
import ttgir_emulator
from cases import assert_matches, differentiate, eager_errors, exact, fused, tensors
from tolerance import assert_as_accurate

import fastlora
from fastlora import measured, planner
from fastlora.device import Device
from fastlora.kernels import configs

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
RANKS = (0, 16, 32, 64, 128, 256)
both_schedules = pytest.mark.parametrize("teams", [1, 2], ids=["cooperative", "pingpong"])
both_forms = pytest.mark.parametrize("q_by_rows", [False, True], ids=["forward", "dx"])


def matrices(M, D, E, R, dtype=torch.bfloat16, q_by_rows=False, bias=True):
    """p, q, u, v and bias as the kernel takes them."""

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).to(dtype)

    q, v = normal(E, D, scale=D**-0.5), normal(E, R, scale=max(R, 1) ** -0.5)
    if q_by_rows:
        q, v = q.t().contiguous(), v.t().contiguous()
    return normal(M, D), q, normal(M, R), v, normal(E) if bias else None


def compile_kernel(kernel, folder):
    """What the compiler makes of a kernel, in a process of its own: the interpreter is on in this one."""
    command = [sys.executable, str(BENCHMARKS / "static.py"), "--out", str(folder), "--keep"]
    subprocess.run([*command, "--kernel", kernel, "--arch", "90"], check=True, capture_output=True)
    with open(folder / "static.csv", newline="") as file:
        found = list(csv.DictReader(file))
    for number, row in enumerate(found):
        row |= {name: (folder / f"{number}.{name}").read_text() for name in ("ttgir", "ptx")}
        # It is compiled for multiples of 16, but run for all sizes: nothing of this form depends on it.
        row["ttgir"] = row["ttgir"].replace(" {tt.divisibility = 16 : i32}", "")
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return compile_kernel("hopper", tmp_path_factory.mktemp("static"))


def compiled(rows, teams, R=16, dtype="bf16", q_by_rows=False):
    """The row of the kernel that has been compiled for the next rank from R on."""
    rank = min(rank for rank in RANKS if rank >= R)
    wanted = (f"teams={teams}", str(rank), dtype, str(q_by_rows))
    (row,) = (
        row
        for row in rows
        if (row["config"].split()[-1], row["rank"], row["dtype"], row["backward"]) == wanted
    )
    return row


def assert_right(ttgir, M, D, E, R, programs, dtype=torch.bfloat16, q_by_rows=False, seed=0):
    p, q, u, v, bias = matrices(M, D, E, R, dtype, q_by_rows, bias=not q_by_rows)
    scale = 1.5
    actual = torch.full((M, E), float("nan"), dtype=dtype)
    arguments = {"p_desc": p, "q_desc": q, "u_desc": u if R else p, "v_desc": v if R else q, "c_desc": actual}
    arguments |= {"bias_ptr": bias, "scale": scale, "M": M, "D": D, "E": E}
    ttgir_emulator.run(ttgir, (programs,), arguments, seed)
    right, update = (q, v) if q_by_rows else (q.t(), v.t())

    def formula(cast):
        c = cast(p) @ cast(right) + scale * (cast(u) @ cast(update))
        return c if bias is None else c + cast(bias)

    assert_as_accurate(actual, formula(lambda t: t), formula(torch.Tensor.double), "c")


@both_schedules
@both_forms
@pytest.mark.parametrize(
    ("M", "D", "E", "programs"),
    [
        (1, 8, 8, 1),
        (128, 64, 256, 1),
        (129, 72, 520, 50),  # programs without a tile, teams without one
        (100, 192, 776, 1),  # an odd number of tiles
        (300, 1032, 264, 2),  # many times around the ring
        (1200, 320, 520, 7),
    ],
)
def test_values(rows, M, D, E, programs, q_by_rows, teams):
    ttgir = compiled(rows, teams, q_by_rows=q_by_rows)["ttgir"]
    for seed in range(3):
        assert_right(ttgir, M, D, E, 16, programs, q_by_rows=q_by_rows, seed=seed)


@both_schedules
@both_forms
@pytest.mark.parametrize("R", [0, 8, 24, 64, 104, 200])
def test_ranks(rows, R, q_by_rows, teams):
    assert_right(
        compiled(rows, teams, R, q_by_rows=q_by_rows)["ttgir"], 200, 136, 384, R, 2, q_by_rows=q_by_rows
    )


@both_schedules
def test_float16(rows, teams):
    assert_right(compiled(rows, teams, dtype="fp16")["ttgir"], 200, 136, 384, 16, 2, torch.float16)


# Edits of the compiled text that the emulation has to notice.
FAULTS = {
    "slots freed one step too early": (r"pendings = 1 ", "pendings = 2 "),
    "slots never freed": (r"ttng\.arrive_barrier .*", ""),
    # What triton makes of a slot's alias, see test_no_loop_assigns_a_name_to_a_name.
    "always the same slot freed": (
        r"(iter_args\(%slot\w* = )(%[\w#]+)(, %phase\w* = [^)]*%acc(?:.|\n)*?memdesc_index %\w+\[)%\w+"
        r"(\][^\n]*\n\s*ttng\.arrive_barrier %\w+, 1, %(?!true))",
        r"\1\2\3\2\4",
    ),
    "the bytes of half a slot": (
        r"(ttng\.barrier_expect %\w+, )(\d+)",
        lambda match: f"{match[1]}{int(match[2]) // 2}",
    ),
    "a slot before the first": (
        r"arith\.select (%\w+), %c\d+_i32\w*, (%\w+) (?=.*\n.*memdesc_index.*\n.*arrive)",
        r"arith.select \1, \2, \2 ",
    ),
    "every program takes every tile": (
        r"(%\w+) = tt\.get_(?:program_id|num_programs) x : i32",
        lambda match: f"{match[1]} = arith.constant {int('num' in match[0])} : i32",
    ),
    "no fence before a store": (r"ttng\.fence_async_shared .*", ""),
    "a buffer reused too early": (
        r"(async_tma_store_wait .pendings =) (\d)(?=.*\n.*local_store)",
        lambda match: f"{match[1]} {int(match[2]) + 1}",
    ),
    "no turns": (r"ttng\.wait_barrier %\w+, %turn_phase.*", ""),
}


@both_schedules
@pytest.mark.parametrize("fault", FAULTS)
def test_emulation_finds(rows, fault, teams):
    ttgir = compiled(rows, teams)["ttgir"]
    if fault == "no turns" and teams == 1:
        pytest.skip("one team takes no turns")
    broken = re.sub(*FAULTS[fault], ttgir)
    assert broken != ttgir

    def run():
        for seed in range(5):
            assert_right(broken, 200, 1032, 300, 16, 2, seed=seed)

    with pytest.raises((AssertionError, ttgir_emulator.Deadlock)):
        run()


def _may_be_a_name(node):
    parts = {ast.Tuple: lambda n: n.elts, ast.IfExp: lambda n: (n.body, n.orelse)}.get(type(node))
    return isinstance(node, ast.Name) or (parts is not None and any(map(_may_be_a_name, parts(node))))


KERNELS = sorted(Path(configs.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", KERNELS, ids=[path.stem for path in KERNELS])
def test_no_loop_assigns_a_name_to_a_name(path):
    """After ``last = slot`` in a loop, triton takes ``last`` for what it was before the loop.

    It looks for the variables that a loop changes by running its body once with their first values, where
    ``last`` and ``slot`` are the same value. Neither the source nor the interpreter shows it. This finds the
    plain cases; the emulation of compiled kernels is there for the others.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    loops = [node for node in ast.walk(tree) if isinstance(node, (ast.For, ast.While))]
    inside = chain.from_iterable(map(ast.walk, loops))
    aliases = [node for node in inside if isinstance(node, ast.Assign) and _may_be_a_name(node.value)]
    assert not [f"line {node.lineno}: {ast.unparse(node)}" for node in aliases]


def test_compiled(rows):
    """Bounds with their reasons; the counts are those of triton 3.6 to 3.8."""
    variants = {(int(row["rank"]), row["config"].split()[-1]) for row in rows}
    assert variants == {(rank, f"teams={n}") for rank in RANKS for n in (1, 2)}
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
        assert int(row["mma_count"]) == teams**2 * (4 + min(rank, 64) // 16), row
        # Two steps load through TMA, or more where the loop over the ranks is unrolled; a box is at most 64
        # columns wide, so W by rows takes four for 256, and two for 128.
        each = 1 + (config.block_e // 64 if row["backward"] == "True" else 1)
        assert int(row["async_copies"]) >= (2 if rank else 1) * each, row
        assert int(row["async_copies"]) % each == 0, row


@both_schedules
def test_a_slot_is_freed_by_the_whole_team(rows, teams):
    """One thread arrives for its team, so a barrier must stand between a product's end and the arrival."""
    ptx = compiled(rows, teams)["ptx"]
    steps = re.findall(r"wgmma\.wait_group|bar\.sync|mbarrier\.arrive\.shared", ptx)
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
@both_forms
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
    [
        ((64, 1), 0, True),
        ((72, 1), 8, True),
        ((68, 1), 0, False),
        ((64, 1), 4, False),
        ((0, 1), 0, False),
        ((128, 2), 0, False),
    ],
)
def test_what_tma_can_read(strides, offset, readable):
    from fastlora.kernels import hopper

    matrix = torch.zeros(8192, dtype=torch.float16).as_strided((40, 64), strides, offset)
    assert (hopper.why_not(matrix) is None) is readable
    assert hopper.why_not(matrix[:1].float()) is not None


def test_tma_reads_one_dtype():
    from fastlora.kernels import hopper

    matrix = torch.zeros(40, 64, dtype=torch.float16)
    assert hopper.why_not(matrix, matrix) is None
    assert "expected one half-precision dtype" in hopper.why_not(matrix, matrix.bfloat16())
