"""Measures fastlora on this machine's GPU: correctness first, then tables as CSV and pictures.

    python benchmarks/gpu.py --out DIR [--only both decode ...] [--minutes 9] [--proof FILE]

The package need not be installed. The script stops within its minutes and says what it left out. Nothing is
timed unless the tests marked cuda and fastlora's own checks pass, or --anyway is given. The proof,
DIR/correctness.json or FILE, records their outcome for the same source, GPU and versions, so that a later
call goes straight to the tables. To save time, these tests leave out TestFuzz of tests/test_faults.py, layers
and autocast in float32, tune's own timing, and the Hopper loops, which are off by default: the last three
sections test them before timing.

DIR/gpu.csv        every row, stamped with GPU, driver, torch, triton, commit and date; a later call appends
DIR/checks.csv     the checks before the tables
DIR/*.png          the ratios (with --no-pictures, benchmarks/plot.py can draw them later from gpu.csv)
DIR/summary.json   environment, what the latest call measured and what it left out
DIR/*.log          output of the tests

Exit status: 0 everything asked for was measured or left out for time, 1 something is wrong with fastlora or a
measurement, 2 no GPU, 3 a measurement hung.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import source_tree

source_tree.install()

import tiles  # noqa: E402
import torch  # noqa: E402
from measure import (  # noqa: E402
    Checks,
    Measurement,
    Plan,
    base_row,
    device_works,
    failed_rows,
    measure,
    one_line,
)
from plot import draw  # noqa: E402
from primitives import PROJECTS, measure_products  # noqa: E402
from providers import Provider  # noqa: E402
from results import (  # noqa: E402
    OK,
    CsvWriter,
    Environment,
    Row,
    environment,
    newest,
    noise_warning,
    ratio_table,
    read_csv,
    source_digest,
    step_table,
    write_json,
)
from shapes import (  # noqa: E402
    DECODE_SHAPES,
    DECODE_TOKENS,
    GROUP_SHAPES,
    MODEL_SHAPES,
    TINY_GROUP_SHAPES,
    TINY_MODEL_SHAPES,
    TINY_SHAPES,
    TRAINING_SHAPES,
    AnyShape,
    GroupShape,
    Shape,
    llm_shapes,
)
from tables import KINDS, TRAINING, select  # noqa: E402
from timing import Budget  # noqa: E402

from fastlora.device import describe  # noqa: E402

SECTIONS = {
    "correctness": "the tests marked cuda and each provider's check",
    "mainloop": "the kernels of the products against BLAS, y and dx with the update off too",
    "forward": "training forward",
    "backward": "dx, dA and dB of a kept forward",
    "both": "forward and backward",
    "decode": "inference of 1 and 16 tokens",
    "host": "host time of a call with one token",
    "dropout": "forward and backward with dropout 0.1",
    "group": "q/k/v and gate/up as groups: forward, backward, both, inference",
    "model": "a decoder layer: forward and backward, training step",
    "tiles": "other tile shapes of the kernels beside the shipped ones",
    "hopper": "the warp-specialised loop: its tests, then y and dx against BLAS and the classic loop",
    "hopper-project": "its tests, then h and y, g and dx in one launch against two and against BLAS",
    "hopper-pingpong": "as hopper, for the loop's other schedule",
}
PRODUCTS = ("y", "dx", "h", "g", "dA", "dB", "g+dA", "dx+dropout")
# For the check only: odd sizes and ranks, and an LLM layer.
CHECK_SHAPES = [Shape(333, 515, 1029, 24), Shape(70, 1000, 77, 3), Shape(512, 4096, 4096, 16)]
CHECK_GROUPS = [GroupShape(333, (515, 260, 64), 1029, 24)]
# The sections of the Hopper kernels with their products, the most promising first.
HOPPER_PRODUCTS = {"hopper": ("y", "dx"), PROJECTS: ("h+y", "g+dx"), "hopper-pingpong": ("y", "dx")}
# Share of the minutes reserved for pictures and tables, and its upper bound in seconds.
RESERVE, MOST_RESERVE = 0.1, 20.0
PICTURES = {
    "training": ("training", "dropout"),
    "decode": ("decode", "host"),
    "mainloop": ("mainloop", *HOPPER_PRODUCTS),
    "group": ("group",),
    "model": ("model",),
}
# Compiling takes longer than measuring, so torch.compile runs only on layers of this rank and, among the
# decoder layers, on the first.
COMPILE_RANK = 16
# Seconds that the first unit of a section may take.
GUESSES = {"training": 45.0, "dropout": 30.0, "group": 30.0, "model": 60.0, "tiles": 30.0}
GUESSES |= dict.fromkeys(HOPPER_PRODUCTS, 40.0)
# The tests without which the tables are worthless. Left out: fuzzing, which compiles hundreds of kernels and
# would take longer than a call's minutes, layers that are float32 throughout, whose kernels compile several
# times as long and are never chosen unasked, and tune's own test, whose timing other tests would disturb.
TESTS = (
    "tests -m cuda -k 'not float32-float32' "
    "--ignore=tests/test_hopper.py --ignore=tests/test_hopper_project.py "
    "--deselect=tests/test_faults.py::TestFuzz --deselect=tests/test_tune.py::test_on_this_gpu"
)
# Seconds that they may take, in several processes: the remaining time is for the tables.
TESTS_SECONDS, MOST_TEST_PROCESSES = 300.0, 12
CHECK_SECONDS = 90.0  # and those that the check of the providers may take
NO_TESTS = 5  # pytest's exit status if it collected no tests
HOPPER_TESTS = {
    "hopper": ("tests/test_hopper.py", "-k", "not pingpong"),
    "hopper-pingpong": ("tests/test_hopper.py", "-k", "pingpong"),
    PROJECTS: ("tests/test_hopper_project.py",),
}
HOPPER_SECONDS, HOPPER_PROCESSES = 90.0, 4


@dataclass(frozen=True)
class Unit:
    """A piece of work that is either measured or left out as a whole."""

    name: str
    run: Callable[[], Measurement]
    guess: float = 0.0


@dataclass(frozen=True)
class Target:
    """Where and how to measure: a GPU, or a CPU with tiny shapes to try out the script itself."""

    device: torch.device
    dtype: torch.dtype
    timers: tuple[str, ...]
    dry: bool
    seconds: float

    def plan(self, section: str, modes: tuple[str, ...], **changes) -> Plan:
        plan = Plan(section, modes, self.timers, self.dtype, self.device, seconds=self.seconds, min_rounds=7)
        if self.dry:
            plan = replace(plan, min_rounds=2, min_sample=0.0)
        return replace(plan, **changes)


# --- Work ------------------------------------------------------------------------------------------------


Providers = Mapping[type[AnyShape], list[Provider]]
TINY = {"training": TINY_SHAPES, "group": TINY_GROUP_SHAPES, "model": TINY_MODEL_SHAPES}


def shapes_of(section: str, target: Target) -> tuple[list[AnyShape], list[AnyShape]]:
    """A section's shapes: those that every run should measure, and those for the remaining time."""
    if target.dry:
        return TINY.get(section, TINY_SHAPES[1:]), []
    if section in ("mainloop", *HOPPER_PRODUCTS):
        return llm_shapes((8192,), ranks=(16,)), []
    if section == "host":
        return [Shape(1, 4096, 4096, 16)], []
    if section == "dropout":
        return llm_shapes((8192, 4096), ranks=(16,)), []
    if section == "model":
        return MODEL_SHAPES, []
    shapes = {"training": TRAINING_SHAPES, "decode": DECODE_SHAPES, "group": GROUP_SHAPES}[section]
    first = [s for s in shapes if s.R == 16 and (s.M >= 4096 or s.M in DECODE_TOKENS)]
    return first, [s for s in shapes if s not in first]


def units(wanted: set[str], providers: Providers, target: Target, out: Path) -> list[Unit]:
    """The work in order of importance: what even a run that is cut short must have comes first."""
    modes = tuple(mode for mode in TRAINING if mode in wanted)
    plans = {
        "mainloop": target.plan("mainloop", PRODUCTS),
        "training": target.plan("training", modes),
        "decode": target.plan("decode", ("inference",)),
        "host": target.plan("host", ("inference", "both"), timers=("cpu" if target.dry else "host",)),
        "dropout": target.plan("dropout", ("both",), dropout=0.1),
        "group": target.plan("group", ()),
        "model": target.plan("model", ()),
        "tiles": target.plan("tiles", ()),
    }
    sections = [name for name in plans if name in wanted or (name == "training" and modes)]
    work = []
    for part in (0, 1):
        work += _in_turns(
            [_unit(shape, plans[section], providers) for shape in shapes_of(section, target)[part]]
            for section in sections
            if section != "tiles"
        )
    if "tiles" in wanted:
        swept = [("h", TINY_SHAPES[1]), ("dA", TINY_SHAPES[1])] if target.dry else tiles.work()
        work += [_tile_unit(product, shape, plans["tiles"], target) for product, shape in swept]
    loops = []
    for section, found in HOPPER_PRODUCTS.items():
        if section in wanted:
            plan, tests = target.plan(section, found), _hopper_tests(section, target, out)
            loops.append([_product_unit(shape, plan, tests) for shape in shapes_of(section, target)[0]])
    work += _in_turns(loops)
    return [
        replace(unit, guess=0.0 if target.dry else GUESSES.get(unit.name.split()[0], 0.0)) for unit in work
    ]


def _in_turns(lists: Iterable[list[Unit]]) -> list[Unit]:
    """The first of each list, then the second of each, and so on: each has its share when time runs out."""
    return [unit for turn in itertools.zip_longest(*lists) for unit in turn if unit is not None]


def _unit(shape: AnyShape, plan: Plan, providers: Providers) -> Unit:
    return _product_unit(shape, plan) if plan.section == "mainloop" else _layer_unit(shape, plan, providers)


def _layer_unit(shape: AnyShape, plan: Plan, providers: Providers) -> Unit:
    kind, chosen = KINDS[type(shape)], providers[type(shape)]
    plan = replace(plan, modes=plan.modes or kind.modes(shape))
    if shape.R != COMPILE_RANK or shape in MODEL_SHAPES[1:]:
        chosen = [provider for provider in chosen if provider.name != "compile"]
    return Unit(f"{plan.section} {shape}", lambda: measure(shape, chosen, plan, kind.make))


def _tile_unit(product: str, shape: Shape, plan: Plan, target: Target) -> Unit:
    # Candidates are measured to be ranked, not reported: the first timer is enough.
    plan = replace(plan, timers=plan.timers[:1])
    few = (3, False) if target.dry else ()
    return Unit(f"tiles {product} {shape}", lambda: tiles.measure_tiles(product, shape, plan, *few))


def _hopper_tests(section: str, target: Target, out: Path) -> Callable[[], str]:
    """Runs a section's tests of a Hopper kernel, once; a hang of one does not cost the others."""
    tests = [*HOPPER_TESTS[section], "-m", "cuda"]
    log = out / f"{section}.log"
    return functools.cache(
        lambda: OK if target.dry else run_tests(tests, log, HOPPER_SECONDS, HOPPER_PROCESSES)
    )


def _product_unit(shape: Shape, plan: Plan, tests: Callable[[], str] = lambda: OK) -> Unit:
    def run() -> Measurement:
        status = tests()
        if status == OK:
            return measure_products(shape, plan)
        failed = replace(base_row(shape, plan), provider=plan.section, status=f"check failed: {status}")
        return Measurement(failed_rows(failed, plan))

    return Unit(f"{plan.section} {shape}", run)


# --- Correctness -----------------------------------------------------------------------------------------


def proof(stamp: Environment, tests: list[str]) -> dict[str, object]:
    """What the outcome of a test run is valid for."""
    return {
        "source": source_digest(),
        "device": stamp.device,
        "torch": stamp.torch,
        "triton": stamp.triton,
        "tests": tests,
    }


_testing: list[subprocess.Popen] = []


def run_tests(arguments: list[str], log: Path, seconds: float, processes: int = 1) -> str:
    """OK, or what is wrong: a failure, no test that passed, or no end within ``seconds``.

    ``processes``: how many share the tests (tests/conftest.py distributes them), as most time is compilation.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running = []
        for part in range(processes):
            command = [sys.executable, str(Path(source_tree.__file__)), "-m", "pytest", *arguments]
            command += ["-q", "-p", "no:cacheprovider", f"--junitxml={folder / f'{part}.xml'}"]
            with (folder / f"{part}.log").open("w", encoding="utf-8") as output:
                # A session of its own, so that a hung test's children end with it.
                process = subprocess.Popen(
                    command,
                    cwd=source_tree.ROOT,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**os.environ, "FASTLORA_TEST_PART": f"{part}/{processes}"},
                )
            running.append(process)
        _testing.extend(running)
        end = time.monotonic() + max(seconds, 0.0)
        statuses, hung = [], 0
        for process in running:
            try:
                statuses.append(process.wait(timeout=max(end - time.monotonic(), 0.0)))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                hung += 1
        _testing.clear()
        outputs = [(folder / f"{part}.log").read_text(encoding="utf-8") for part in range(processes)]
        # Failed processes last, because it is the end of the log that is printed.
        order = sorted(range(processes), key=lambda part: running[part].returncode not in (0, NO_TESTS))
        log.write_text("".join(outputs[part] for part in order), encoding="utf-8")
        if hung:
            return f"the tests did not end within {seconds:.0f} s"
        # A part may have no tests, but not all of them.
        ended = [status for status in statuses if status != NO_TESTS] or [NO_TESTS]
        if failed := next(filter(None, ended), 0):
            return f"pytest ended with status {failed}"
        reports = [ElementTree.parse(report).getroot() for report in folder.glob("*.xml")]
        suites = [suite for report in reports for suite in report.iter("testsuite")]
        counts = {
            key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")
        }
        passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
        return OK if passed > 0 else f"no test passed ({counts['skipped']} skipped)"


def check_providers(providers: Providers, target: Target, seconds: float = CHECK_SECONDS) -> list[Row]:
    """The status of each provider except torch.compile on the check shapes; nothing is timed.

    A case that is not checked in time, or whose process dies even alone, counts as fastlora's fault.
    """
    shapes, groups = (TINY_SHAPES, TINY_GROUP_SHAPES) if target.dry else (CHECK_SHAPES, CHECK_GROUPS)
    dtypes = (target.dtype,) if target.dry else (torch.bfloat16, torch.float16)
    cases = [
        (shape, target.plan("correctness", (), dtype=dtype, bias=True, dropout=dropout))
        for shape in (*shapes, *groups)
        for dropout in ((0.0,) if shape in groups else (0.0, 0.1))
        # float16 takes the same paths, but every kernel is compiled again for it: one shape is enough.
        for dtype in (dtypes if shape == shapes[-1] else dtypes[:1])
    ]
    names = ",".join(dict.fromkeys(p.name for chosen in providers.values() for p in chosen))
    if target.dry:
        return [row for case in cases for row in check_case(names, *case)]
    # Nearly all the time is compilation, which the processes share. One that dies takes the others along: the
    # cases that it leaves are checked again, one at a time.
    end = time.monotonic() + min(seconds, CHECK_SECONDS)
    calls = [(names, *case) for case in cases]
    rows = []
    for call, outcome in zip(calls, tiles.outcomes(check_case, calls, end - time.monotonic()), strict=True):
        if isinstance(outcome, Exception) and time.monotonic() < end:
            (outcome,) = tiles.outcomes(check_case, [call], end - time.monotonic())
        if isinstance(outcome, Exception):
            status = f"error: in a process that checks all providers: {one_line(outcome)}"
            outcome = [replace(base_row(*call[1:]), provider="fastlora", status=status)]
        rows += outcome
    tiles.end_pool()  # Even idle processes hold memory of the GPU.
    return rows


def check_case(names: str, shape: AnyShape, plan: Plan) -> list[Row]:
    """:func:`check_providers` of those in ``names`` (a comma-separated list) for one shape."""
    make = KINDS[type(shape)].make
    checks = Checks(make(shape, plan.dtype, plan.device, bias=plan.bias, dropout=plan.dropout))
    base = base_row(shape, plan)
    chosen = [provider for provider in select(names)[type(shape)] if provider.name != "compile"]
    return [replace(base, provider=p.name, status=checks.status(p)) for p in chosen]


def wrong_rows(rows: list[Row]) -> list[Row]:
    """The failed rows of fastlora and its kernels; a rival that fails is only reported and not timed."""
    fine, ours = (OK, "unavailable"), ("fastlora", "triton", "hopper", "blas-triton")
    return [row for row in rows if row.provider.startswith(ours) and not row.status.startswith(fine)]


def correctness(
    out: Path, proof_file: Path, providers: Providers, target: Target, stamp, tests, seconds, anyway
) -> str:
    """OK, or why nothing may be timed. An earlier call's proof is reused while it is valid.

    ``anyway``: reuse a proof of failure too, instead of running the tests again.
    """
    valid_for = proof(stamp, tests)
    earlier = json.loads(proof_file.read_text()) if proof_file.exists() else {}
    status = earlier.pop("status", None)
    if earlier == valid_for and (status == OK or anyway):
        print(f"correctness: shown by an earlier call ({proof_file}): {status}", flush=True)
        return status
    status = run_checks(out, providers, target, stamp, tests, seconds)
    write_json(proof_file, {**valid_for, "status": status})
    return status


def run_checks(out: Path, providers: Providers, target: Target, stamp, tests, seconds) -> str:
    processes = 1 if target.dry else max(1, min(MOST_TEST_PROCESSES, (os.cpu_count() or 1) - 2))
    start = time.monotonic()
    status = run_tests(tests, out / "tests.log", min(seconds, TESTS_SECONDS), processes)
    print(f"correctness: pytest {' '.join(tests)}: {status}", flush=True)
    if status != OK:
        print((out / "tests.log").read_text(encoding="utf-8")[-3000:], flush=True)
        return status
    rows = check_providers(providers, target, seconds - (time.monotonic() - start))
    writer = CsvWriter(out / "checks.csv", stamp)
    writer.write(rows)
    writer.close()
    for row in rows:
        if row.status != OK:
            print(
                f"  {row.provider} M{row.M}-N{row.N}-K{row.K}-R{row.R} {row.dtype}: {row.status}", flush=True
            )
    wrong = wrong_rows(rows)
    return f"{len(wrong)} of fastlora's checks failed" if wrong else OK


# --- The run ---------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What a run has so far, so that even one that hangs can be reported."""

    summary: dict[str, object] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def report(self, out: Path, timers: tuple[str, ...] | None) -> None:
        """Write summary.json and print the tables."""
        wrong = self.wrong + [
            f"{r.provider} M{r.M}-N{r.N}-K{r.K}-R{r.R} {r.mode}: {r.status}" for r in wrong_rows(self.rows)
        ]
        write_json(out / "summary.json", {**self.summary, "left_out": self.left_out, "wrong": wrong})
        for line in wrong:
            print(f"WRONG: {line}")
        print(ratio_table([row for row in self.rows if row.section != "tiles"], timers))
        if any(row.section == "tiles" for row in self.rows):
            print(tiles.tile_table(self.rows, timers))
        if any(row.section == "model" for row in self.rows):
            print(step_table(self.rows))
        if warning := noise_warning(self.rows):
            print(warning)
        if self.left_out:
            print(f"left out for lack of time, {len(self.left_out)}: {', '.join(self.left_out)}")
        sys.stdout.flush()


def run_units(work: list[Unit], budget: Budget, writer: CsvWriter, progress: Progress, device) -> None:
    """Measure what the budget allows, writing each unit's rows immediately."""
    progress.left_out = budget.left_out

    def run(unit: Unit) -> None:
        start = time.monotonic()
        measured = unit.run().rows
        writer.write(measured)
        progress.rows += measured
        print(f"{unit.name}: {time.monotonic() - start:.1f} s", flush=True)

    for unit in work:
        try:
            budget.run(unit.name, functools.partial(run, unit), unit.guess)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        except torch.OutOfMemoryError as error:
            progress.wrong.append(f"{unit.name}: {str(error).splitlines()[0]}")
        except Exception as error:
            traceback.print_exc()
            reason = f"{unit.name}: {type(error).__name__}: {error}"
            if not device_works(device):
                # Every later call would fail too.
                progress.wrong.append(f"{reason}; timing ended there")
                return
            progress.wrong.append(reason)


def pictures(rows: list[Row], stamp: Environment, out: Path) -> None:
    """Draw those of PICTURES that there are rows for; without matplotlib, print a line that says so."""
    try:
        for name, sections in PICTURES.items():
            draw([row for row in rows if row.section in sections], str(stamp), out / f"{name}.png")
    except ImportError as error:
        print(f"no pictures: {error}; benchmarks/plot.py draws them from the CSV elsewhere")


def watchdog(seconds: float, report: Callable[[], None] = lambda: None) -> threading.Timer:
    """End the process with status 3 after ``seconds``: there is no other way to interrupt a hung kernel."""

    def stop() -> None:
        try:
            report()
        finally:
            print(
                "stopped: the last measurement did not end; gpu.csv has what was measured before it",
                flush=True,
            )
            # Otherwise, these would keep the output open or hold the GPU.
            for child in multiprocessing.active_children():
                child.kill()
            for process in _testing:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            os._exit(3)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    return timer


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    sections = "; ".join(f"{name}: {what}" for name, what in SECTIONS.items())
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"(default: all) {sections}"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all of it (default 9)")
    parser.add_argument("--seconds", type=float, default=0.8, help="to spend on one table cell's providers")
    parser.add_argument("--providers", default=None, help="comma-separated (default: all)")
    parser.add_argument("--without", default=None, help="providers to leave out, comma-separated")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument(
        "--timers",
        nargs="+",
        choices=("graph", "eager"),
        default=["graph", "eager"],
        help="CUDA graphs or eager calls (default: both); the tables at the end show the first",
    )
    parser.add_argument("--tests", default=None, help=f"pytest's arguments (default: {TESTS})")
    parser.add_argument("--proof", type=Path, metavar="FILE", help="of correctness (DIR/correctness.json)")
    parser.add_argument(
        "--anyway", action="store_true", help="time even if tests fail; the rows' commit says that they did"
    )
    parser.add_argument("--no-pictures", action="store_true", help="leave them to benchmarks/plot.py")
    parser.add_argument(
        "--dry-run-cpu",
        action="store_true",
        help="try this script itself: tiny float32 layers on the CPU, figures without meaning",
    )
    arguments = parser.parse_args(argv)
    if arguments.minutes <= 0:
        parser.error(f"--minutes {arguments.minutes}: expected more than 0")
    if arguments.dtype == "float16" and PROJECTS in (arguments.only or ()):
        parser.error(f"--only {PROJECTS} takes bfloat16 alone: alpha * h may overflow in float16")
    if arguments.only is None:
        arguments.only = [name for name in SECTIONS if name != PROJECTS or arguments.dtype == "bfloat16"]
    try:
        arguments.providers = select(arguments.providers, arguments.without)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.dry_run_cpu:
        torch.set_num_threads(1)
        target = Target(torch.device("cpu"), torch.float32, ("cpu",), dry=True, seconds=0.01)
    elif torch.cuda.is_available():
        dtype = getattr(torch, arguments.dtype)
        target = Target(
            torch.device("cuda"), dtype, tuple(arguments.timers), dry=False, seconds=arguments.seconds
        )
    else:
        message = (
            "no NVIDIA GPU that torch can use: nothing was measured (`pytest benchmarks/` measures a CPU)"
        )
        print(message, file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    timers = None if target.dry else (arguments.timers[0], "host")
    guard = watchdog(arguments.minutes * 60, lambda: progress.report(arguments.out, timers))
    try:
        return run(arguments, target, progress, timers)
    finally:
        guard.cancel()


def run(
    arguments: argparse.Namespace, target: Target, progress: Progress, timers: tuple[str, ...] | None
) -> int:
    """Correctness, tables, summary, pictures; the exit status."""
    start = time.monotonic()
    seconds = arguments.minutes * 60
    allowed = seconds - min(MOST_RESERVE, RESERVE * seconds)
    stamp = environment(target.device)
    print(stamp, describe(target.device), sep="\n", flush=True)
    out, providers = arguments.out, arguments.providers
    tests = shlex.split(TESTS if arguments.tests is None else arguments.tests)

    progress.summary = {
        "environment": asdict(stamp),
        "device": asdict(describe(target.device)),
        "sections": arguments.only,
        "correctness": "not ended",
    }
    proof_file = arguments.proof or out / "correctness.json"
    status = correctness(out, proof_file, providers, target, stamp, tests, allowed, anyway=arguments.anyway)
    progress.summary["correctness"] = status
    if status != OK:
        progress.wrong.append(status)
        if not arguments.anyway:
            print(f"correctness: {status}; nothing was timed")
            write_json(out / "summary.json", {**progress.summary, "left_out": [], "wrong": [status]})
            return 1
        stamp = replace(stamp, commit=f"{stamp.commit}+failing-tests")

    budget = Budget(allowed - (time.monotonic() - start))
    writer = CsvWriter(out / "gpu.csv", stamp, append=True)
    work = units(set(arguments.only), providers, target, out)
    run_units(work, budget, writer, progress, target.device)
    writer.close()
    progress.report(out, timers)
    if not arguments.no_pictures:
        pictures(newest(read_csv(out / "gpu.csv")[0]), stamp, out)
    print(f"{time.monotonic() - start:.0f} s; results in {out}")
    return 1 if progress.wrong or wrong_rows(progress.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
