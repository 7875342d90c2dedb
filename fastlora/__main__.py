"""What this machine can run: versions, GPUs, and the path of each product for every dtype, with its reason.

python -m fastlora               # the report; needs no GPU, no Triton and no PEFT
python -m fastlora tune [...]    # measures the paths on this GPU: python -m fastlora tune --help
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from importlib import metadata

import torch

import fastlora
from fastlora import measured, ops, planner
from fastlora.checks import dtype_name
from fastlora.device import Device, describe
from fastlora.planner import Plan, Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TOKENS = (4096, 1)  # training, and decoding one token
FEATURES = 4096
RANK = 16


def version(package: str) -> str | None:
    """The installed version of a package, None if there is none; does not import it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> list[str]:
    """One line for each relevant package; NumPy is one if Triton's interpreter is on."""
    lines = [
        f"fastlora     {fastlora.__version__}",
        f"python       {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch        {torch.__version__}",
        f"triton       {(version('triton') or 'installed') if planner.has_triton() else 'not installed'}",
    ]
    optional = ("peft", "safetensors", *(("numpy",) if planner.interpreting() else ()))
    return lines + [f"{name:<13}{found}" for name in optional if (found := version(name))]


def driver() -> str:
    """The version of NVIDIA's driver, as reported by nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (result.stdout.split() or ["unknown"])[0]


def label(device: Device) -> str:
    if device.kind == "cpu":
        return "CPU"
    return f"{device.name}, {'ROCm' if device.rocm else f'sm_{device.capability}'}"


def gpus() -> tuple[list[str], list[Device]]:
    """A line for each GPU, or one that says why there is none; and the GPUs that responded."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch finds no usable GPU" if built else "this torch is built without CUDA"
        return [f"GPU          none: {why}"], []
    lines, devices = [], []
    for index in range(torch.cuda.device_count()):
        try:
            device = describe(torch.device("cuda", index))
        except RuntimeError as error:
            lines.append(f"GPU {index:<9}does not answer: {str(error).splitlines()[0]}")
            continue
        lines.append(f"GPU {index:<9}{label(device)}, {device.sms} multiprocessors")
        if planner.why_not_triton(Problem(device, torch.float16, 1, 1, 1, 1)) is None:
            ops.exclude_if_no_kernel_starts(torch.device("cuda", index))
        devices.append(device)
    if not torch.version.hip:
        lines.append(f"driver       {driver()}, CUDA {torch.version.cuda}")
    return lines, devices


def interpreter() -> str:
    if not planner.interpreting():
        return "interpreter  off (TRITON_INTERPRET=1 runs the kernels on CPU tensors, to test them)"
    return "interpreter  on (TRITON_INTERPRET): use_path('triton') runs fp16 and fp32 on CPU tensors, slowly"


def tuned() -> str:
    """The state of the rows written by `python -m fastlora tune`, which plans prefer to all else."""
    path = measured.user_file()
    try:
        rows = measured.read_rows(path) if path else []
    except FileNotFoundError:
        rows = []
    except (OSError, ValueError) as error:
        return f"tuned        {path} is ignored: {error}"
    if not rows:
        return "tuned        no rows yet (python -m fastlora tune measures a GPU)"
    gpus = sorted({f"{row.gpu} with Triton {row.triton}" for row in rows})
    return f"tuned        {len(rows):,} rows for {', '.join(gpus)} in {path}"


def plan_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """(product, path, reason) of each product, or a single row if all six agree."""
    steps = [(name, getattr(plan, name)) for name in Plan.__dataclass_fields__]
    rows = [(f"{name:<3}{step.primitive}", step.path, step.reason) for name, step in steps]
    if len({row[1:] for row in rows}) == 1:
        return [(", ".join(name for name, _ in steps), *rows[0][1:])]
    return rows


def path_table(device: Device) -> list[str]:
    """The plan of each dtype and number of tokens on one device; dtypes with equal plans share rows."""
    lines = [f"Paths of a layer, {FEATURES} -> {FEATURES} features, rank {RANK}, on {label(device)}:"]
    for tokens in TOKENS:
        groups: dict[tuple[tuple[str, str, str], ...], list[str]] = {}
        for dtype in DTYPES:
            problem = Problem(device, dtype, tokens, FEATURES, FEATURES, RANK)
            rows = tuple(plan_rows(planner.make_plan(problem)))
            groups.setdefault(rows, []).append(dtype_name(dtype))
        for rows, dtypes in groups.items():
            lines.append(f"  {', '.join(dtypes)}; {tokens:,} token{'s' * (tokens > 1)}")
            lines += [f"    {product:<20}{path:<11}{reason}" for product, path, reason in rows]
    return lines


def report() -> str:
    gpu_lines, devices = gpus()
    lines = [*versions(), *gpu_lines, interpreter(), tuned()]
    for device in dict.fromkeys(devices or [Device("cpu")]):
        problem = Problem(device, torch.bfloat16, TOKENS[0], FEATURES, FEATURES, RANK)
        obstacle = planner.why_not_triton(problem)
        lines += ["", f"kernels      {obstacle or 'can run here'}", *path_table(device)]
    lines += ["", "h, g: project; y, dx: gemm with the rank-R update; dA, dB: token sum"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the report, or pass the remaining arguments to ``tune``. Returns the exit status.

    Args:
        arguments: those of the command line if None.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["tune"]:
        from fastlora import tune

        return tune.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m fastlora",
        description="What this machine can run: versions, GPUs, and the path per dtype with its reason.",
        epilog="The demo: python -m fastlora.demo --help",
    )
    parser.add_argument(
        "command", nargs="?", choices=["tune"], help="measure the paths on this GPU (see tune --help)"
    )
    parser.parse_args(arguments)
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
