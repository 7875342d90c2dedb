"""The products of a layer: for each, its Triton kernel against the BLAS call that it has to beat.

y and dx are measured with the rank-R update and without it (rank 0). The latter shows how good the main loop
alone is, on which everything else depends. In both cases, their BLAS call is the frozen product. "forward" is
y by the kernel for at most 16 tokens, which computes h as well. "g+dA" computes both in one launch, against
two kernels and two BLAS calls. So do "h+y" and "g+dx", in one launch of a Hopper kernel. "dx+dropout" is the
dx of training with dropout: in one launch, and as the BLAS call plus the kernel that adds the update with
dropout, against the BLAS call without an update.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from check import FACTOR, SLACK, Error, error, poison_free_memory
from measure import CLOCKS, Measurement, Plan, base_row, device_works, failed_rows, one_line, with_times
from problem import Problem, make_problem
from shapes import Shape
from timing import alternate, captured
from torch import Tensor

from fastlora import ops, planner, reference
from fastlora.device import describe, sums_in_float32
from fastlora.kernels import configs
from fastlora.tune import DROPOUT, as_tuple, in_turn, input_sets, least_read

FLOOR = "blas"
TRITON = "triton"
OFF = "-update-off"
# The warp-specialised loop's schedules: provider and section -> how many teams multiply.
SCHEDULES = {"hopper": 1, "hopper-pingpong": 2}
# The provider and section of the loop that projects too.
PROJECTS = "hopper-project"
ONE_LAUNCH = "triton-one-launch"
BLAS_AND_UPDATE = "blas-triton-update"

Result = Tensor | tuple[Tensor, ...]
Kernels = dict[str, Callable[[], Result]]


@dataclass(frozen=True)
class Product:
    """One product of one problem: its BLAS form and its kernels by name, and what they compute.

    ``blas`` takes the operands. ``formulas``: what a kernel computes, in PyTorch operations on the operands,
    where this is more than the BLAS form. In float64 it is the value, in the operands' dtype the yardstick.
    """

    operands: tuple[Tensor, ...]
    blas: Callable[..., Result]
    kernels: Kernels
    formulas: dict[str, Callable[..., Result]] = field(default_factory=dict)


# Name of a product, its shipped configuration -> the configurations to launch, by name.
Tiles = Callable[[str, configs.Config], Mapping[str, configs.Config]]


def shipped_config(problem: planner.Problem, product: str) -> configs.Config | None:
    """The configuration that a product's kernel is launched with, None if it cannot run."""
    if product == "forward":
        return planner.small_config(problem)
    if product == "g+dA":
        return planner.backward_config(problem)
    return planner.kernel_step(problem, product).config


def products(
    problem: Problem, schedule: str | None = None, tiles: Tiles | None = None
) -> dict[str, Callable[[], Product]]:
    """Each product of a layer by name; made when called, so that few exist at a time.

    ``schedule``: on sm_90, also this schedule of the warp-specialised loop, or, if PROJECTS, the loop that
    projects too. ``tiles``: the configurations of each kernel to measure instead of everything else.
    RuntimeError if the kernels cannot run.
    """
    make, p = _Products(problem, schedule, tiles), problem
    x, h, g = p.x.detach(), p.x.detach() @ p.B.t(), p.dy @ p.A
    return {
        "y": lambda: make.gemm("y", x, p.weight.t(), h, p.A.t()),
        "dx": lambda: make.gemm("dx", p.dy, p.weight, g, p.B),
        "h": lambda: make.project("h", x, p.B.t()),
        "g": lambda: make.project("g", p.dy, p.A),
        "dA": lambda: make.token_sum("dA", p.dy, h),
        "dB": lambda: make.token_sum("dB", x, g),
        "g+dA": lambda: make.g_and_dA(p.dy, p.A, h),
        "h+y": lambda: make.project_and_gemm("h+y", x, p.weight.t(), p.B.t(), p.A.t()),
        "g+dx": lambda: make.project_and_gemm("g+dx", p.dy, p.weight, p.A, p.B),
        "dx+dropout": lambda: make.dropped_gemm(p.dy, p.weight, g, p.B),
        "forward": lambda: make.forward(x, p.weight, p.A, p.B),
    }


class _Products:
    """Makes the products of one problem; see :func:`products`."""

    def __init__(self, problem: Problem, schedule: str | None, tiles: Tiles | None) -> None:
        s = problem.shape
        self.planned = planner.Problem(describe(problem.device), problem.dtype, s.M, s.N, s.K, s.R)
        planner.make_plan(self.planned, "triton")  # raises if the kernels cannot run
        self.alpha = problem.alpha
        self.tiles = tiles
        on_hopper = self.planned.device.capability == 90 and s.M >= 128
        self.schedule = schedule if on_hopper and tiles is None else None

    def launched(self, product: str, name: str = TRITON) -> Mapping[str, configs.Config]:
        """The configurations to launch: the shipped one as ``name``, or those to measure instead."""
        shipped = shipped_config(self.planned, product)
        if shipped is None:
            return {}
        return {name: shipped} if self.tiles is None else self.tiles(product, shipped)

    def project(self, name: str, p: Tensor, q: Tensor) -> Product:
        from fastlora.kernels.project import project

        return Product(
            (p, q), torch.mm, {key: partial(project, p, q, c) for key, c in self.launched(name).items()}
        )

    def gemm(self, name: str, p: Tensor, q: Tensor, u: Tensor, v: Tensor) -> Product:
        from fastlora.kernels.gemm import gemm

        named = self.launched(name)
        kernels: Kernels = {key: partial(gemm, p, q, u, v, self.alpha, c) for key, c in named.items()}
        formulas = dict.fromkeys(kernels, self._updated)
        if self.tiles is None:
            # Rank 0: the same kernel and tiles, but the loop over the ranks is empty.
            kernels[TRITON + OFF] = partial(gemm, p, q, u[:, :0], v[:0], self.alpha, named[TRITON])
        if self.schedule in SCHEDULES:
            kernels |= self._hopper_gemm(self.schedule, p, q, u, v)
            formulas[self.schedule] = self._updated
        return Product((p, q, u, v), _frozen, kernels, formulas)

    def _updated(self, p: Tensor, q: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return torch.mm(p, q).addmm_(u, v, alpha=self.alpha)

    def _hopper_gemm(self, schedule: str, p: Tensor, q: Tensor, u: Tensor, v: Tensor) -> Kernels:
        """A schedule of the warp-specialised loop, with and without the update."""
        from fastlora.kernels import hopper

        by_rows = q.stride(1) == 1
        q, v = (q, v) if by_rows else (q.t(), v.t())
        off = v[:0] if by_rows else v[:, :0]
        config = configs.select_hopper(self.planned.device.sms, u.shape[1], SCHEDULES[schedule])
        return {
            schedule: partial(hopper.gemm, p, q, u, v, self.alpha, config, None, by_rows),
            schedule + OFF: partial(hopper.gemm, p, q, u[:, :0], off, self.alpha, config, None, by_rows),
        }

    def dropped_gemm(self, p: Tensor, q: Tensor, u: Tensor, v: Tensor) -> Product:
        """dx with dropout. Its tiles are never swept: tune compares its two forms."""
        problem = replace(self.planned, dropout=True)
        seed = torch.zeros(1, dtype=torch.int64, device=p.device)
        drop = ops.Dropout(seed, DROPOUT, problem.M, problem.K)
        paths = {TRITON: "triton", BLAS_AND_UPDATE: "addmm"}
        steps = {name: planner.step_of(problem, "dx", path, "") for name, path in paths.items()}

        def updated(p: Tensor, q: Tensor, u: Tensor, v: Tensor) -> Tensor:
            keep = reference.keep_mask(seed, problem.M, problem.K, DROPOUT).to(p.dtype)
            return torch.mm(p, q).addcmul_(torch.mm(u, v), keep, value=self.alpha * drop.scale)

        kernels: Kernels = {
            name: partial(ops.run_gemm, step, p, q, u, v, self.alpha, None, drop)
            for name, step in steps.items()
        }
        return Product((p, q, u, v), _frozen, kernels, dict.fromkeys(kernels, updated))

    def forward(self, x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Product:
        """y by the kernel that computes h and y, if the tokens are few enough for it."""
        from fastlora.kernels.small import small

        def updated(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
            return torch.mm(x, weight.t()).addmm_(x @ B.t(), A.t(), alpha=self.alpha)

        kernels: Kernels = {
            key: lambda c=c: small(x, weight, A, B, self.alpha, c)[0]
            for key, c in self.launched("forward", ONE_LAUNCH).items()
        }
        operands = x, weight, A, B
        return Product(
            operands, lambda x, weight, *_: torch.mm(x, weight.t()), kernels, dict.fromkeys(kernels, updated)
        )

    def token_sum(self, name: str, p: Tensor, u: Tensor) -> Product:
        from fastlora.kernels.token_sum import token_sum

        kernels: Kernels = {
            key: partial(token_sum, p, u, 1.0, c, p.dtype) for key, c in self.launched(name).items()
        }
        return Product((p, u), lambda p, u: torch.mm(p.t(), u), kernels)

    def g_and_dA(self, dy: Tensor, A: Tensor, h: Tensor) -> Product:
        from fastlora.kernels.backward import g_and_dA

        kernels: Kernels = {
            key: partial(g_and_dA, dy, A, h, 1.0, c, dy.dtype)
            for key, c in self.launched("g+dA", ONE_LAUNCH).items()
        }
        if self.tiles is None:
            parts = [made.kernels[TRITON] for made in (self.project("g", dy, A), self.token_sum("dA", dy, h))]
            kernels[TRITON] = lambda: tuple(part() for part in parts)
        return Product((dy, A, h), lambda dy, A, h: (torch.mm(dy, A), torch.mm(dy.t(), h)), kernels)

    def project_and_gemm(self, names: str, p: Tensor, q: Tensor, down: Tensor, up: Tensor) -> Product:
        """h and y, or g and dx: U = p @ down, and p @ q + alpha * U @ up."""
        from fastlora.kernels.gemm import gemm
        from fastlora.kernels.project import project

        first, second = (shipped_config(self.planned, name) for name in names.split("+"))

        def apart() -> Result:
            u = project(p, down, first)
            return u, gemm(p, q, u, up, self.alpha, second)

        def frozen(p: Tensor, q: Tensor, down: Tensor, up: Tensor) -> Result:
            return torch.mm(p, down), torch.mm(p, q)

        def updated(p: Tensor, q: Tensor, down: Tensor, up: Tensor) -> Result:
            u = torch.mm(p, down)
            return u, self._updated(p, q, u, up)

        def scaled(*operands: Tensor) -> Result:
            u, c = updated(*operands)
            return self.alpha * u, c

        product = Product((p, q, down, up), frozen, {TRITON: apart}, {TRITON: updated})
        if self.schedule == PROJECTS:
            product.kernels.update(self._hopper_project(p, q, down, up, partial(project, p, down, first)))
            product.formulas.update({"hopper": updated, PROJECTS: scaled})
        return product

    def _hopper_project(
        self, p: Tensor, q: Tensor, down: Tensor, up: Tensor, projected: Callable[[], Tensor]
    ) -> Kernels:
        """The warp-specialised loop that computes alpha * U too, and the other one after ``projected``."""
        from fastlora.kernels import hopper
        from fastlora.kernels.hopper_project import project_and_gemm

        by_rows = q.stride(1) == 1
        right, z, v = (q, down, up) if by_rows else (q.t(), down.t(), up.t())
        sms = self.planned.device.sms
        loop = configs.select_hopper(sms, down.shape[1])
        projecting = configs.select_hopper_project(sms, down.shape[1])

        def apart() -> Result:
            u = projected()
            return u, hopper.gemm(p, right, u, v, self.alpha, loop, None, by_rows)

        def together() -> Result:
            c, u = project_and_gemm(p, right, z, v, self.alpha, projecting, None, by_rows)
            return u, c

        return {"hopper": apart, PROJECTS: together}


def _frozen(p: Tensor, q: Tensor, *_: Tensor) -> Tensor:
    """The product that an update is added to."""
    return torch.mm(p, q)


@sums_in_float32()
def failures(product: Product, device: torch.device) -> dict[str, str]:
    """What is wrong with each kernel; its error may be at most twice that of its formula, plus 1e-6."""
    wide = [operand.double() for operand in product.operands]

    @functools.cache  # many kernels compute the same
    def exact_and_allowed(formula: Callable[..., Result]) -> tuple[Result, list[Error]]:
        exact = formula(*wide)
        return exact, _errors(formula(*product.operands), exact)

    wrong = {}
    for name, kernel in product.kernels.items():
        exact, allowed = exact_and_allowed(product.formulas.get(name, product.blas))
        poison_free_memory(device, sum(t.numel() for t in (*product.operands, *as_tuple(exact))))
        try:
            errors = _errors(kernel(), exact)
        except Exception as failure:
            ops.raise_out_of_memory(failure)
            if not device_works(device):
                raise
            wrong[name] = f"error: {one_line(failure)}"
            continue
        for found, bound in zip(errors, allowed, strict=True):
            for kind in ("largest", "rms"):
                value, limit = getattr(found, kind), FACTOR * getattr(bound, kind) + SLACK
                if not value <= limit:
                    wrong[name] = f"check failed: {kind} error {value:.3g}, allowed {limit:.3g}"
    return wrong


def _errors(results: Result, exact: Result) -> list[Error]:
    pairs = zip(as_tuple(results), as_tuple(exact), strict=True)
    return [error(result, value) for result, value in pairs]


def measure_products(shape: Shape, plan: Plan, tiles: Tiles | None = None) -> Measurement:
    """Check the kernels of each product of ``plan.modes``, then time them alternating with its BLAS call.

    If the kernels cannot run, the rows say why. ``tiles``: as in :func:`products`.
    """
    bytes_per_set = plan.dtype.itemsize * least_read(shape.M, shape.N, shape.K)
    problems = [
        make_problem(shape, plan.dtype, plan.device, bias=False, seed=seed)
        for seed in range(input_sets(bytes_per_set, plan.device))
    ]
    measurement = Measurement()
    try:
        schedule = plan.section if plan.section in (*SCHEDULES, PROJECTS) else None
        makers = [products(problem, schedule, tiles) for problem in problems]
    except RuntimeError as reason:
        ops.raise_out_of_memory(reason)
        row = replace(base_row(shape, plan), provider=TRITON, status=f"unavailable: {reason}")
        measurement.rows = failed_rows(row, plan)
        return measurement
    for name in plan.modes:
        sets = [maker[name]() for maker in makers]
        wrong = failures(sets[0], plan.device)
        base = replace(base_row(shape, plan), mode=name)
        for timer in plan.timers:
            measurement.rows += [
                replace(base, timer=timer, provider=kernel, status=status) for kernel, status in wrong.items()
            ]
            right = [FLOOR, *(kernel for kernel in sets[0].kernels if kernel not in wrong)]
            _time(
                measurement,
                [{FLOOR: partial(s.blas, *s.operands), **s.kernels} for s in sets],
                right,
                replace(base, timer=timer),
                plan,
            )
    return measurement


def _time(measurement: Measurement, sets: list[dict], names: list[str], base, plan: Plan) -> None:
    functions = {name: in_turn(functions[name] for functions in sets) for name in names}
    if base.timer == "graph":
        stream = torch.cuda.Stream()
        for name, function in list(functions.items()):
            try:
                functions[name] = captured(function, stream)
            except Exception as failure:
                if name == FLOOR or not device_works(plan.device):
                    raise
                del functions[name]
                status = f"error: captured: {one_line(failure)}"
                measurement.rows.append(replace(base, provider=name, status=status))
    timings = alternate(
        functions,
        CLOCKS[base.timer](),
        seconds=plan.seconds,
        calls_each=len(sets),
        min_rounds=plan.min_rounds,
        min_sample=plan.min_sample,
    )
    for name, timing in timings.items():
        measurement.timings[base.mode, base.timer, name] = timing
        measurement.rows.append(with_times(replace(base, provider=name), timing, timings[FLOOR]))
