"""The products of a layer: for each, its Triton kernel against the BLAS call that it has to beat.

y and dx are measured with the rank-R update and without it (rank 0). The latter shows how good the main loop
alone is, on which everything else depends. In both cases, their BLAS call is the frozen product. For at most
16 tokens, y also has the kernel that computes h as well. "g+dA" computes both in one launch, against two
kernels and two BLAS calls. So do "h+y" and "g+dx", in one launch of a Hopper kernel. "dx+dropout" is the dx
of training with dropout: in one launch, and as the BLAS call plus the kernel that adds the update with
dropout, against the BLAS call without an update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from check import FACTOR, SLACK, Error, error
from measure import CLOCKS, Measurement, Plan, base_row, device_works, failed_rows, one_line, with_times
from problem import Problem, make_problem
from shapes import Shape
from timing import alternate, captured, input_sets
from torch import Tensor

from fastlora.device import sums_in_float32
from fastlora.ops import raise_out_of_memory
from fastlora.tune import DROPOUT, in_turn, least_read

FLOOR = "blas"
TRITON = "triton"
OFF = "-update-off"
# The warp-specialised loop's schedules: provider and section -> how many teams multiply.
SCHEDULES = {"hopper": 1, "hopper-pingpong": 2}
# The provider and section of the loop that projects too.
PROJECTS = "hopper-project"
ONE_LAUNCH = "triton-one-launch"
BLAS_AND_UPDATE = "blas-triton-update"


@dataclass(frozen=True)
class Product:
    """One product of one problem: its BLAS form, its kernels by name, and the float64 value for each name.

    Products with more than one result use tuples. ``eager``: the plain forms of the kernels that compute more
    than the BLAS form, for the check.
    """

    blas: Callable[[], Tensor | tuple[Tensor, ...]]
    kernels: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]]
    exact: dict[str, Tensor | tuple[Tensor, ...]]
    eager: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]] = field(default_factory=dict)


# Name of a product, its shipped configuration (None if it has none) -> the configurations to launch, by name.
Tiles = Callable[[str, object], Mapping[str, object]]


def products(
    problem: Problem, schedule: str | None = None, tiles: Tiles | None = None
) -> dict[str, Callable[[], Product]]:
    """Each product of a layer by name; made when called, so that few exist at a time.

    ``schedule``: on sm_90, also this schedule of the warp-specialised loop, or, if PROJECTS, the loop that
    projects too. ``tiles``: the configurations of each kernel to measure instead of everything else.
    """
    from fastlora import masks, reference
    from fastlora.device import describe
    from fastlora.kernels.backward import g_and_dA
    from fastlora.kernels.configs import select_update
    from fastlora.kernels.gemm import gemm
    from fastlora.kernels.project import project
    from fastlora.kernels.small import small
    from fastlora.kernels.token_sum import token_sum
    from fastlora.kernels.update import add_update
    from fastlora.planner import Problem as Planned
    from fastlora.planner import backward_config, kernel_step, make_plan, small_config

    p, s = problem, problem.shape
    planned = Planned(describe(p.device), p.dtype, s.M, s.N, s.K, s.R)
    make_plan(planned, "triton")  # raises if the kernels cannot run
    config = {name: kernel_step(planned, name).config for name in ("h", "y", "g", "dx", "dA", "dB")}
    x = p.x.detach()
    h, g = x @ p.B.t(), p.dy @ p.A
    launched = tiles or (lambda name, shipped: {TRITON: shipped})

    def projected(name: str, rows: Tensor, right: Tensor) -> Product:
        kernels = {key: partial(project, rows, right, c) for key, c in launched(name, config[name]).items()}
        exact = rows.double() @ right.double()
        return Product(lambda: torch.mm(rows, right), kernels, dict.fromkeys((FLOOR, *kernels), exact))

    def updated(name: str, rows: Tensor, right: Tensor, u: Tensor, v: Tensor) -> Product:
        kernels = {
            key: partial(gemm, rows, right, u, v, p.alpha, c)
            for key, c in launched(name, config[name]).items()
        }
        base = rows.double() @ right.double()
        whole = base + p.alpha * (u.double() @ v.double())
        product = Product(
            lambda: torch.mm(rows, right),
            kernels,
            {FLOOR: base, **dict.fromkeys(kernels, whole)},
            dict.fromkeys(kernels, lambda: torch.mm(rows, right).addmm_(u, v, alpha=p.alpha)),
        )
        if tiles is not None:
            return product
        # Rank 0: the same kernel and tiles, but the loop over the ranks is empty.
        product.kernels[TRITON + OFF] = partial(gemm, rows, right, u[:, :0], v[:0], p.alpha, config[name])
        product.exact[TRITON + OFF] = base
        if schedule in SCHEDULES and planned.device.capability == 90 and s.M >= 128:
            _add_hopper(product, schedule, rows, right, u, v, p.alpha)
            product.exact[schedule], product.eager[schedule] = whole, product.eager[TRITON]
        return product

    def forward() -> Product:
        """The kernel that computes h and y, if the tokens are few enough for it."""
        one = small_config(planned)
        named = {} if one is None else launched("forward", one) if tiles else {ONE_LAUNCH: one}
        right = p.weight.t()
        exact = x.double() @ right.double() + p.alpha * (x.double() @ p.B.double().t()) @ p.A.double().t()
        kernels = {key: lambda c=c: small(x, p.weight, p.A, p.B, p.alpha, c)[0] for key, c in named.items()}
        base = x.double() @ right.double()
        return Product(
            lambda: torch.mm(x, right),
            kernels,
            {FLOOR: base, **dict.fromkeys(kernels, exact)},
            dict.fromkeys(kernels, lambda: torch.mm(x, right).addmm_(x @ p.B.t(), p.A.t(), alpha=p.alpha)),
        )

    def y() -> Product:
        product = updated("y", x, p.weight.t(), h, p.A.t())
        if tiles is None and small_config(planned) is not None:
            one = forward()
            product.kernels.update(one.kernels)
            product.exact.update({**one.exact, **product.exact})
            product.eager.update(one.eager)
        return product

    def summed(name: str, rows: Tensor, u: Tensor) -> Product:
        kernels = {
            key: partial(token_sum, rows, u, 1.0, c, p.dtype)
            for key, c in launched(name, config[name]).items()
        }
        exact = rows.double().t() @ u.double()
        return Product(lambda: torch.mm(rows.t(), u), kernels, dict.fromkeys((FLOOR, *kernels), exact))

    def together() -> Product:
        one = backward_config(planned)
        kernels = {
            key: partial(g_and_dA, p.dy, p.A, h, 1.0, c, p.dtype)
            for key, c in (launched("g+dA", one) if tiles else {ONE_LAUNCH: one}).items()
        }
        if tiles is None:
            kernels[TRITON] = lambda: (
                project(p.dy, p.A, config["g"]),
                token_sum(p.dy, h, 1.0, config["dA"], p.dtype),
            )
        exact = p.dy.double() @ p.A.double(), p.dy.double().t() @ h.double()
        return Product(
            lambda: (torch.mm(p.dy, p.A), torch.mm(p.dy.t(), h)),
            kernels,
            dict.fromkeys((FLOOR, *kernels), exact),
        )

    def with_projection(names: str, rows: Tensor, right: Tensor, down: Tensor, up: Tensor) -> Product:
        """h and y, or g and dx: U = rows @ down and rows @ right + alpha * U @ up."""
        first, second = (config[name] for name in names.split("+"))

        def apart() -> tuple[Tensor, Tensor]:
            u = project(rows, down, first)
            return u, gemm(rows, right, u, up, p.alpha, second)

        def eager() -> tuple[Tensor, Tensor]:
            u = torch.mm(rows, down)
            return u, torch.mm(rows, right).addmm_(u, up, alpha=p.alpha)

        u, base = rows.double() @ down.double(), rows.double() @ right.double()
        product = Product(
            lambda: (torch.mm(rows, down), torch.mm(rows, right)),
            {TRITON: apart},
            {FLOOR: (u, base), TRITON: (u, base + p.alpha * (u @ up.double()))},
            {TRITON: eager},
        )
        if schedule == PROJECTS and planned.device.capability == 90 and s.M >= 128:
            _add_projecting_hopper(
                product, rows, right, down, up, p.alpha, partial(project, rows, down, first)
            )
        return product

    def dropped() -> Product:
        """dx with dropout. Its tiles are never swept: tune compares its two forms."""
        one = kernel_step(replace(planned, dropout=True), "dx").config
        update = select_update(s.R)
        seed = torch.zeros(1, dtype=torch.int64, device=p.dy.device)
        threshold, scale = masks.keep_threshold(DROPOUT), p.alpha * masks.keep_scale(DROPOUT)
        kernels = {
            TRITON: lambda: gemm(p.dy, p.weight, g, p.B, scale, one, None, seed, threshold),
            BLAS_AND_UPDATE: lambda: add_update(
                torch.mm(p.dy, p.weight), g, p.B, scale, update, seed, threshold
            ),
        }
        base = p.dy.double() @ p.weight.double()
        keep = reference.keep_mask(seed, s.M, s.K, DROPOUT).double()
        whole = base + scale * keep * (g.double() @ p.B.double())
        exact = {FLOOR: base, **dict.fromkeys(kernels, whole)}

        def eager() -> Tensor:
            return torch.mm(p.dy, p.weight).addcmul_(torch.mm(g, p.B), keep.to(p.dtype), value=scale)

        return Product(lambda: torch.mm(p.dy, p.weight), kernels, exact, dict.fromkeys(kernels, eager))

    return {
        "y": y,
        "dx": lambda: updated("dx", p.dy, p.weight, g, p.B),
        "h": lambda: projected("h", x, p.B.t()),
        "g": lambda: projected("g", p.dy, p.A),
        "dA": lambda: summed("dA", p.dy, h),
        "dB": lambda: summed("dB", x, g),
        "g+dA": together,
        "h+y": lambda: with_projection("h+y", x, p.weight.t(), p.B.t(), p.A.t()),
        "g+dx": lambda: with_projection("g+dx", p.dy, p.weight, p.A, p.B),
        "dx+dropout": dropped,
        "forward": forward,
    }


def _add_hopper(
    product: Product, name: str, rows: Tensor, right: Tensor, u: Tensor, v: Tensor, alpha: float
) -> None:
    """Add a schedule of the warp-specialised loop to the product, with and without the update."""
    from fastlora.kernels import configs, hopper

    by_rows = right.stride(1) == 1
    right, v = (right, v) if by_rows else (right.t(), v.t())
    off = (u[:, :0], v[:0] if by_rows else v[:, :0])
    sms = torch.cuda.get_device_properties(rows.device).multi_processor_count
    config = configs.select_hopper(sms, u.shape[1], SCHEDULES[name])
    product.kernels[name] = lambda: hopper.gemm(rows, right, u, v, alpha, config, None, by_rows)
    product.kernels[name + OFF] = lambda: hopper.gemm(rows, right, *off, alpha, config, None, by_rows)
    product.exact[name + OFF] = product.exact[FLOOR]


def _add_projecting_hopper(
    product: Product,
    rows: Tensor,
    right: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: float,
    projected: Callable[[], Tensor],
) -> None:
    """Add the warp-specialised loop that computes alpha * U too, and the other one after ``projected``."""
    from fastlora.kernels import configs, hopper
    from fastlora.kernels.hopper_project import project_and_gemm

    by_rows = right.stride(1) == 1
    q, z, v = (right, down, up) if by_rows else (right.t(), down.t(), up.t())
    sms = torch.cuda.get_device_properties(rows.device).multi_processor_count
    loop = configs.select_hopper(sms, down.shape[1])
    projecting = configs.select_hopper_project(sms, down.shape[1])

    def apart() -> tuple[Tensor, Tensor]:
        u = projected()
        return u, hopper.gemm(rows, q, u, v, alpha, loop, None, by_rows)

    def together() -> tuple[Tensor, Tensor]:
        c, u = project_and_gemm(rows, q, z, v, alpha, projecting, None, by_rows)
        return u, c

    product.kernels.update({"hopper": apart, PROJECTS: together})
    u, c = product.exact[TRITON]
    product.exact.update({"hopper": (u, c), PROJECTS: (alpha * u, c)})
    eager = product.eager[TRITON]
    product.eager.update({"hopper": eager, PROJECTS: lambda: (alpha * eager()[0], eager()[1])})


@sums_in_float32()
def failures(product: Product, device: torch.device) -> dict[str, str]:
    """What is wrong with each kernel; its error may be at most twice that of its eager form, plus 1e-6."""
    wrong = {}
    for name, kernel in product.kernels.items():
        try:
            errors = _errors(kernel(), product.exact[name])
        except Exception as failure:
            raise_out_of_memory(failure)
            if not device_works(device):
                raise
            wrong[name] = f"error: {one_line(failure)}"
            continue
        allowed = _errors(product.eager.get(name, product.blas)(), product.exact[name])
        for found, bound in zip(errors, allowed, strict=True):
            for kind in ("largest", "rms"):
                value, limit = getattr(found, kind), FACTOR * getattr(bound, kind) + SLACK
                if not value <= limit:
                    wrong[name] = f"check failed: {kind} error {value:.3g}, allowed {limit:.3g}"
    return wrong


def _errors(results: Tensor | tuple[Tensor, ...], exact: Tensor | tuple[Tensor, ...]) -> list[Error]:
    if isinstance(exact, Tensor):
        results, exact = (results,), (exact,)
    return [error(result, value) for result, value in zip(results, exact, strict=True)]


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
        raise_out_of_memory(reason)
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
                [{FLOOR: s.blas, **s.kernels} for s in sets],
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
