"""What the compiler reports about every shipped kernel configuration, without a GPU: static.csv.

    python benchmarks/static.py --out DIR [--arch 80 86 89 90 100 120] [--kernel NAME ...] [--every N]

Each row is one kernel with the configuration that ``fastlora.kernels.configs`` selects for one case on one
architecture, compiled as the launcher would compile it (16-byte aligned pointers, strides and sizes that are
multiples of 16). Registers, spills and warnings are those that ptxas reports; instructions are counted in the
machine code. After a run of all cases, static.json says which sources and which Triton the rows are of: while
these are the present ones, ``tests/test_aot.py`` reads the committed rows and compiles some of them anew,
otherwise all.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# When enabled, the interpreter replaces the compiler in the whole process.
os.environ["TRITON_INTERPRET"] = "0"

import triton
from results import source_digest
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from fastlora.kernels import (
    backward,
    configs,
    gemm,
    group,
    hopper,
    hopper_project,
    project,
    small,
    token_sum,
    update,
)
from fastlora.kernels.tiles import in_eights

ARCHS = (80, 86, 89, 90, 100, 120)
RANKS = (8, 32, 64, 128, 256)
# Tokens: a decoding step, a short prompt and a training batch, each with its own tile shapes.
ROWS = (16, 64, 8192)
FEATURES = 4096
# Output features for which the one-launch kernel uses each of its widths on SMS multiprocessors.
SMALL_FEATURES = (1024, 4096, 14336)
SMS = 132


@dataclass(frozen=True)
class Case:
    """One kernel on one architecture. ``adapter``: the adapters' dtype, which may differ from ``dtype``."""

    kernel: str
    arch: int
    M: int
    R: int
    dtype: str = "bf16"
    adapter: str = "bf16"
    dropout: bool = False
    backward: bool = False
    features: int = FEATURES
    branches: int = 1
    teams: int = 1

    @property
    def adapter_itemsize(self) -> int:
        return 4 if self.adapter == "fp32" else 2

    @property
    def eights(self) -> bool:
        """Whether the launcher treats the rank and row stride of h, g and A as multiples of 8, not of 16."""
        return in_eights(self.R, self.R, 1)


@dataclass(frozen=True)
class Row:
    """One line of static.csv."""

    kernel: str
    config: str
    arch: int
    dtype: str
    adapter: str
    rank: int
    rows: int
    dropout: bool
    backward: bool
    registers: int
    spills: int
    shared_bytes: int
    mma: str
    mma_count: int
    async_copies: int
    warnings: str


def cases(archs: tuple[int, ...] = ARCHS) -> list[Case]:
    """Every configuration that ``configs`` can select for half precision, in every variant of each kernel."""
    found = []
    for arch in archs:
        for R in RANKS:
            found += [Case("project", arch, M, R) for M in (16, 4096, 8192)]
            found += [Case("gemm", arch, M, R) for M in ROWS]
            found.append(Case("token_sum", arch, 8192, R))
            found.append(Case("project", arch, 8192, R, backward=True))
            found.append(Case("gemm", arch, 8192, R, backward=True))
            # The kernel most short of registers: with a number of rows that is no multiple of 16 too.
            found += [Case("update", arch, M, R, dropout=True, backward=True) for M in (8191, 8192)]
            found += [Case("backward", arch, M, R, backward=True) for M in (16, 8192)]
            found += [Case("small", arch, 16, R, features=N) for N in SMALL_FEATURES]
        for R in (16, *RANKS[1:]):
            found += [Case("project", arch, M, R, dropout=True) for M in (16, 4096, 8192)]
        for R in (16, 32, 64, 192):
            found += [Case("gemm", arch, M, R, dropout=True, backward=True) for M in ROWS]
            found.append(Case("token_sum", arch, 8192, R, dropout=True, backward=True))
        for kernel in ("project", "gemm", "token_sum"):
            found.append(Case(kernel, arch, 8192, 16, dtype="fp16", adapter="fp32"))
            found.append(Case(kernel, arch, 8192, 16, adapter="fp32", backward=True))
        found += [
            Case("small", arch, 16, 16, dtype="fp16", adapter="fp32", features=N) for N in SMALL_FEATURES
        ]
        # A wider adapter takes more shared memory: at high ranks, it has its own configurations.
        for R in (32, 64, 128, 256):
            found.append(Case("update", arch, 8192, R, adapter="fp32", dropout=True, backward=True))
            for M in (16, 4096, 8192):
                found.append(Case("project", arch, M, R, adapter="fp32", dropout=True))
                found.append(Case("project", arch, M, R, adapter="fp32", backward=True))
            for M in (16, 8192):
                found.append(Case("backward", arch, M, R, adapter="fp32", backward=True))
            found += [Case("small", arch, 16, R, adapter="fp32", features=N) for N in SMALL_FEATURES]
        found.append(Case("backward", arch, 8192, 16, dtype="fp16", adapter="fp32", backward=True))
        # Sums of ranks that need one block of each size, and several blocks.
        for R, branches in ((16, 2), (32, 3), (64, 4), (192, 3)):
            found += [Case("group_dx", arch, M, R, branches=branches, backward=True) for M in ROWS]
        found += [Case("group_dx", arch, M, 48, dropout=True, branches=3, backward=True) for M in ROWS]
        if arch not in (90, 100):
            # Ranks that are not multiples of 8 take more warps there.
            for R in (12, 20, 60):
                found.append(Case("gemm", arch, 8192, R))
                found.append(Case("group_dx", arch, 8192, R, branches=2, backward=True))
        found.append(
            Case("group_dx", arch, 8192, 48, dtype="fp16", adapter="fp16", branches=3, backward=True)
        )
        if arch == 90:
            for teams in (1, 2):
                for R in (0, 16, *RANKS[1:]):  # 0: the update off, for the benchmarks
                    found += [Case("hopper", arch, 8192, R, backward=dx, teams=teams) for dx in (False, True)]
                found.append(Case("hopper", arch, 8192, 16, dtype="fp16", adapter="fp16", teams=teams))
            for R in (8, 16, 32):
                found += [Case("hopper_project", arch, 8192, R, backward=dx) for dx in (False, True)]
    return found


def _project_source(case: Case):
    config = configs.select_project(case.arch, SMS, case.M, case.R, 2, case.adapter_itemsize, case.dropout)
    signature = {
        "p_ptr": f"*{case.dtype}", "stride_pm": "i32", "stride_pd": 1,
        "q_ptr": f"*{case.adapter}", "stride_qd": 1, "stride_qr": "i32",
        "h_ptr": f"*{case.dtype}", "stride_hm": "i32",
        "seed_ptr": "*i64" if case.dropout else None, "keep_threshold": "i32", "scale": "fp32",
        "M": "i32", "D": "i32", "R": "i32",
        "BLOCK_M": config.block_m, "BLOCK_D": config.block_d, "BLOCK_R": config.block_r,
        "Q_EIGHTS": case.backward and case.eights, "EVEN_D": True, "HAS_DROPOUT": case.dropout,
    }  # fmt: skip
    if case.backward:  # g = dy @ A, A: (N, R)
        signature["stride_qd"], signature["stride_qr"] = "i32", 1
    return project._project_kernel, signature, config


def _gemm_source(case: Case):
    config = configs.select_gemm(case.arch, case.M, FEATURES, case.R, 2, case.dropout)
    # Forward reads W: (N, K) and A: (N, R) transposed, backward reads W and B: (R, K) untransposed.
    matrix = ("i32", 1) if case.backward else (1, "i32")
    signature = {
        "p_ptr": f"*{case.dtype}", "stride_pm": "i32", "stride_pd": 1,
        "q_ptr": f"*{case.dtype}", "stride_qd": matrix[0], "stride_qe": matrix[1],
        "u_ptr": f"*{case.dtype}", "stride_um": "i32", "stride_ur": 1,
        "v_ptr": f"*{case.adapter}", "stride_vr": matrix[0], "stride_ve": matrix[1],
        "bias_ptr": None if case.backward else f"*{case.dtype}", "stride_bias": 1,
        "c_ptr": f"*{case.dtype}", "stride_cm": "i32",
        "seed_ptr": "*i64" if case.dropout else None, "keep_threshold": "i32", "scale": "fp32",
        "M": "i32", "D": "i32", "E": "i32", "R": "i32",
        "BLOCK_M": config.block_m, "BLOCK_E": config.block_e, "BLOCK_D": config.block_d,
        "BLOCK_R": config.block_r, "RANK_BLOCKS": -(-case.R // config.block_r), "GROUP_M": config.group_m,
        "U_EIGHTS": case.eights, "V_EIGHTS": not case.backward and case.eights,
        "EVEN_D": True, "HAS_BIAS": not case.backward, "HAS_DROPOUT": case.dropout,
    }  # fmt: skip
    return gemm._gemm_kernel, signature, config


def _token_sum_source(case: Case):
    config = configs.select_token_sum(case.arch, SMS, case.M, FEATURES, case.R, 2)
    signature = {
        "p_ptr": f"*{case.dtype}", "stride_pm": "i32", "stride_pd": 1,
        "u_ptr": f"*{case.dtype}", "stride_um": "i32", "stride_ur": 1,
        "g_ptr": "*fp32", "stride_gs": "i32",
        "stride_gd": 1 if case.backward else "i32", "stride_gr": "i32" if case.backward else 1,
        "seed_ptr": "*i64" if case.dropout else None, "keep_threshold": "i32",
        "M": "i32", "D": "i32", "R": "i32", "tokens_per_split": "i32",
        "BLOCK_M": config.block_m, "BLOCK_D": config.block_d, "BLOCK_R": config.block_r,
        "U_EIGHTS": case.eights, "HAS_DROPOUT": case.dropout,
    }  # fmt: skip
    return token_sum._token_sum_kernel, signature, config


def _small_source(case: Case):
    config = configs.select_small(case.arch, SMS, case.features, case.R, 2, case.adapter_itemsize)
    signature = {
        "x_ptr": f"*{case.dtype}", "stride_xm": "i32", "stride_xk": 1,
        "w_ptr": f"*{case.dtype}", "stride_wn": "i32", "stride_wk": 1,
        "a_ptr": f"*{case.adapter}", "stride_an": "i32", "stride_ar": 1,
        "b_ptr": f"*{case.adapter}", "stride_br": "i32", "stride_bk": 1,
        "bias_ptr": f"*{case.dtype}", "stride_bias": 1,
        "y_ptr": f"*{case.dtype}", "stride_ym": "i32",
        "h_ptr": f"*{case.dtype}", "stride_hm": "i32",
        "scale": "fp32",
        "M": "i32", "N": "i32", "K": "i32", "R": "i32",
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "BLOCK_R": config.block_r, "EVEN_K": True, "HAS_BIAS": True,
    }  # fmt: skip
    return small._small_kernel, signature, config


def _backward_source(case: Case):
    config = configs.select_backward(case.arch, SMS, case.M, FEATURES, case.R, 2, case.adapter_itemsize)
    signature = {
        "dy_ptr": f"*{case.dtype}", "stride_dym": "i32", "stride_dyn": 1,
        "a_ptr": f"*{case.adapter}", "stride_an": "i32", "stride_ar": 1,
        "h_ptr": f"*{case.dtype}", "stride_hm": "i32", "stride_hr": 1,
        "g_ptr": f"*{case.dtype}", "stride_gm": "i32",
        "dA_ptr": "*fp32", "stride_dAs": "i32", "stride_dAn": "i32", "stride_dAr": 1,
        "M": "i32", "N": "i32", "R": "i32", "rows": "i32",
        "BLOCK_M": config.block_m, "STEP_N": config.step_n, "BLOCK_N": config.block_n,
        "STEP_M": config.step_m, "BLOCK_R": config.block_r,
        "A_EIGHTS": case.eights, "H_EIGHTS": case.eights, "EVEN_N": True,
    }  # fmt: skip
    return backward._backward_kernel, signature, config


def _group_dx_source(case: Case):
    config = configs.select_gemm(case.arch, case.M, FEATURES, case.R, 2, case.dropout)
    signature = {}
    for i in range(configs.MAX_BRANCHES):
        used = i < case.branches
        pointer, size = (f"*{case.dtype}", "i32") if used else (None, 0)
        signature |= {
            f"p{i}_ptr": pointer, f"stride_p{i}m": size, f"stride_p{i}d": int(used),
            f"q{i}_ptr": pointer, f"stride_q{i}d": size, f"stride_q{i}e": int(used), f"D{i}": size,
        }  # fmt: skip
    signature |= {
        "u_ptr": f"*{case.dtype}", "stride_um": "i32", "stride_ur": 1,
        "v_ptr": f"*{case.dtype}", "stride_vr": "i32", "stride_ve": 1,
        "c_ptr": f"*{case.dtype}", "stride_cm": "i32",
        "seed_ptr": "*i64" if case.dropout else None, "keep_threshold": "i32", "scale": "fp32",
        "M": "i32", "E": "i32", "R": "i32",
        "BRANCHES": case.branches,
        "BLOCK_M": config.block_m, "BLOCK_E": config.block_e, "BLOCK_D": config.block_d,
        "BLOCK_R": config.block_r, "RANK_BLOCKS": -(-case.R // config.block_r), "GROUP_M": config.group_m,
        "U_EIGHTS": case.eights, "V_EIGHTS": False, "EVEN_D": True, "HAS_DROPOUT": case.dropout,
    }  # fmt: skip
    return group._group_dx_kernel, signature, config


def _update_source(case: Case):
    config = configs.select_update(case.R)
    signature = {
        "u_ptr": f"*{case.dtype}", "stride_um": "i32", "stride_ur": 1,
        "v_ptr": f"*{case.adapter}", "stride_vr": "i32", "stride_ve": 1,
        "c_ptr": f"*{case.dtype}", "stride_cm": "i32",
        "seed_ptr": "*i64", "keep_threshold": "i32", "scale": "fp32",
        "M": "i32", "E": "i32", "R": "i32",
        "BLOCK_M": config.block_m, "BLOCK_E": config.block_e,
        "BLOCK_R": config.block_r, "RANK_BLOCKS": -(-case.R // config.block_r),
        "U_EIGHTS": case.eights, "V_EIGHTS": False,
    }  # fmt: skip
    return update._update_kernel, signature, config


def _descriptors(blocks: dict[str, list[int]], case: Case) -> dict[str, str]:
    element = gl.bfloat16 if case.dtype == "bf16" else gl.float16
    found = {}
    for name, block in blocks.items():
        layout = gl.NVMMASharedLayout.get_default_for(block, element)
        found[name] = f"tensordesc<{case.dtype}[{block[0]},{block[1]}],{layout!r}>"
    return found


def _hopper_source(case: Case):
    config = configs.select_hopper(SMS, case.R, case.teams)
    signature = _descriptors(hopper.blocks(config, q_by_rows=case.backward), case) | {
        "bias_ptr": None if case.backward else f"*{case.dtype}", "scale": "fp32",
        "M": "i32", "D": "i32", "E": "i32",
        "BLOCK_R": config.block_r, "RANK_STEPS": -(-case.R // config.block_d), "GROUP_M": config.group_m,
        "SLOTS": config.slots, "Q_BY_ROWS": case.backward, "HAS_BIAS": not case.backward,
        "TEAMS": config.teams,
    }  # fmt: skip
    return hopper._hopper_kernel, signature, config


def _hopper_project_source(case: Case):
    config = configs.select_hopper_project(SMS, case.R)
    descriptors = _descriptors(hopper_project.blocks(config, q_by_rows=case.backward), case)
    # In the order of the kernel's arguments.
    signature = {f"{name}_desc": descriptors[f"{name}_desc"] for name in "pqzuvc"} | {
        "u_ptr": f"*{case.dtype}", "states_ptr": "*i32",
        "bias_ptr": None if case.backward else f"*{case.dtype}", "scale": "fp32",
        "M": "i32", "D": "i32", "E": "i32", "R": "i32",
        "BLOCK_R": config.block_r, "GROUP_M": config.group_m, "SLOTS": config.slots,
        "Q_BY_ROWS": case.backward, "HAS_BIAS": not case.backward,
    }  # fmt: skip
    return hopper_project._hopper_project_kernel, signature, config


_SOURCES = {
    "project": _project_source,
    "gemm": _gemm_source,
    "token_sum": _token_sum_source,
    "small": _small_source,
    "backward": _backward_source,
    "group_dx": _group_dx_source,
    "update": _update_source,
    "hopper": _hopper_source,
    "hopper_project": _hopper_project_source,
}
# In these cases, the launcher sees all other pointers, sizes and strides as multiples of 16, except for a
# number of rows or what equals the rank, if that is not such a multiple.
_NEVER_DIVISIBLE = {"keep_threshold", "scale"}


def compile_case(case: Case) -> tuple[Row, dict[str, str]]:
    """Compile one case for its architecture: what ptxas and nvdisasm report, and the TTGIR and PTX."""
    kernel, arguments, config = _SOURCES[case.kernel](case)
    signature, constexprs, attrs = {}, {}, {}
    for index, (name, value) in enumerate(arguments.items()):
        if not isinstance(value, str):
            signature[name], constexprs[(index,)] = "constexpr", value
            continue
        signature[name] = value
        rank_sized = name in ("R", "stride_um", "stride_hm", "stride_an", "stride_gm", "stride_dAn") or (
            (name == "stride_qd" and case.kernel == "project") or (name == "stride_ve" and not case.backward)
        )
        aligned = value.startswith("*") or value == "i32"
        odd = (rank_sized and case.R % 16) or (name == "M" and case.M % 16)
        if aligned and name not in _NEVER_DIVISIBLE and not odd:
            attrs[(index,)] = [["tt.divisibility", 16]]
    if case.kernel.startswith("hopper"):
        source, options = (
            GluonASTSource(kernel, signature, constexprs, attrs),
            {"num_warps": hopper.team_warps(config)},
        )
    else:
        source = ASTSource(kernel, signature, constexprs, attrs)
        options = {n: getattr(config, n) for n in ("num_warps", "num_stages") if hasattr(config, n)}
    compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    registers, spills, warnings = _ptxas(compiled.asm["ptx"])
    mma, mma_count, async_copies = _instructions(compiled.asm["cubin"])
    row = Row(
        kernel=case.kernel,
        config=" ".join(f"{key}={value}" for key, value in dataclasses.asdict(config).items()),
        arch=case.arch,
        dtype=case.dtype,
        adapter=case.adapter,
        rank=case.R,
        rows=case.M,
        dropout=case.dropout,
        backward=case.backward,
        registers=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
        mma=mma,
        mma_count=mma_count,
        async_copies=async_copies,
        warnings=warnings,
    )
    return row, {name: compiled.asm[name] for name in ("ttgir", "ptx")}


def _ptxas(ptx: str) -> tuple[int, int, str]:
    """Registers per thread, bytes spilled and the numbers of ptxas's warnings (C75xx: wgmma serialised)."""
    arch = re.search(r"\.target (sm_\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(int(re.sub(r"\D", "", arch))).path, "-v", f"--gpu-name={arch}"]
        log = subprocess.run(
            [*command, str(path), "-o", str(path.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    registers = int(re.search(r"Used (\d+) registers", log).group(1))
    spills = sum(int(size) for size in re.findall(r"(\d+) bytes spill", log))
    return registers, spills, " ".join(sorted(set(re.findall(r"C75\d\d", log))))


def _instructions(cubin: bytes) -> tuple[str, int, int]:
    """The machine code's matrix instruction, its count, and the count of asynchronous copies."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run(
            [triton.knobs.nvidia.nvdisasm.path, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("UTCHMMA", "HGMMA", "HMMA")}
    mma = max(counts, key=counts.get)
    return mma if counts[mma] else "none", counts[mma], len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", sass))


def origin(rows: Path) -> dict[str, str]:
    """What the rows depend on: Triton, the sources of the kernels and of this file; and the rows' digest."""
    return {
        "triton": triton.__version__,
        "sources": source_digest("kernels", "benchmarks/static.py"),
        "rows": hashlib.sha256(rows.read_bytes()).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of static.csv")
    parser.add_argument("--kernel", nargs="+", default=_SOURCES, choices=_SOURCES, help="kernels")
    parser.add_argument(
        "--arch", type=int, nargs="+", default=ARCHS, choices=ARCHS, help="compute capabilities"
    )
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="of each kernel and architecture only every N-th case",
    )
    parser.add_argument("--keep", action="store_true", help="also N.ttgir and N.ptx of the N-th row, from 0")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "static.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        seen: collections.Counter[tuple[str, int]] = collections.Counter()
        chosen = []
        for case in cases(tuple(arguments.arch)):
            if case.kernel in arguments.kernel and seen[case.kernel, case.arch] % arguments.every == 0:
                chosen.append(case)
            seen[case.kernel, case.arch] += 1
        for number, case in enumerate(chosen):
            compiled, texts = compile_case(case)
            row = dataclasses.asdict(compiled)
            writer.writerow(row)
            file.flush()
            if arguments.keep:
                for name, text in texts.items():
                    (arguments.out / f"{number}.{name}").write_text(text)
            print(*(row[key] for key in row if key != "config"), "|", row["config"])
    if chosen == cases():
        text = json.dumps(origin(arguments.out / "static.csv"), indent=2)
        (arguments.out / "static.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
