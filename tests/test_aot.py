"""Every shipped configuration compiled for its own architecture, no GPU needed: the rows of static.csv."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from fastlora.kernels import configs

ROOT = Path(__file__).parents[1]
STATIC = ROOT / "benchmarks" / "static.py"
RESULTS = ROOT / "benchmarks" / "results"
ARCHS = sorted(configs.SHARED_MEMORY)
# Bytes per thread. The configurations are chosen for Triton 3.6. Of the same cases, none spills with 3.7.1,
# two spill 8 or 16 bytes with 3.8.0, three with 3.9.0.
SPILLS = 0 if triton.__version__.startswith(("3.6.", "3.7.")) else 16


def rows_in(folder):
    with open(folder / "static.csv", newline="") as file:
        return list(csv.DictReader(file))


def compiled_by_two(make_folder, *options):
    """The rows of all architectures, compiled by two processes of their own with the interpreter off."""
    halves = {make_folder("static"): archs for archs in (ARCHS[::2], ARCHS[1::2])}
    workers = [
        subprocess.Popen(
            [sys.executable, str(STATIC), "--out", str(folder), "--arch", *map(str, archs), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for folder, archs in halves.items()
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
    return [row for folder in halves for row in rows_in(folder)]


@pytest.fixture(scope="session")
def origins():
    """What the committed rows are of, and what they would be of if they were made now."""
    program = "import json, pathlib, sys; sys.path[0] = sys.argv[1]; import static; "
    program += "print(json.dumps(static.origin(pathlib.Path(sys.argv[2]))))"
    command = [sys.executable, "-c", program, str(STATIC.parent), str(RESULTS / "static.csv")]
    now = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return json.loads((RESULTS / "static.json").read_text()), now


@pytest.fixture(scope="session")
def static_rows(origins, tmp_path_factory):
    """The committed rows if they are of the present sources and Triton, else new ones: that takes minutes."""
    committed, now = origins
    return rows_in(RESULTS) if committed == now else compiled_by_two(tmp_path_factory.mktemp)


def test_committed_rows_are_what_the_compiler_makes(origins, static_rows, tmp_path_factory):
    """All rows if the sources have changed since, else some of every kernel on every architecture."""
    committed, now = origins
    if committed["triton"] != now["triton"]:
        pytest.skip(f"they are of Triton {committed['triton']}")
    expected = rows_in(RESULTS)
    assert committed["rows"] == now["rows"], "static.csv is not the one that static.json was written with"
    made = static_rows
    if committed == now:
        made = compiled_by_two(tmp_path_factory.mktemp, "--every", "15")
        kernels = {(row["kernel"], row["arch"]) for row in expected}
        assert {(row["kernel"], row["arch"]) for row in made} == kernels
    else:
        assert len(made) == len(expected), "run benchmarks/static.py"
    for row in made:
        assert row in expected, f"run benchmarks/static.py: {describe(row)}"


@pytest.fixture(params=ARCHS)
def arch_rows(request, static_rows):
    rows = [row for row in static_rows if int(row["arch"]) == request.param]
    kernels = {"project", "gemm", "token_sum", "small", "group_dx", "backward", "update"}
    if request.param == 90:
        kernels |= {"hopper", "hopper_project"}
    assert {row["kernel"] for row in rows} == kernels
    return rows


def describe(row):
    return " ".join(f"{key}={value}" for key, value in row.items())


def test_no_spills(arch_rows):
    for row in arch_rows:
        assert int(row["spills"]) <= SPILLS, describe(row)


def test_shared_memory_is_within_the_device_and_the_estimate(arch_rows):
    classes = {
        "project": configs.ProjectConfig,
        "gemm": configs.GemmConfig,
        "token_sum": configs.TokenSumConfig,
        "small": configs.SmallConfig,
        "hopper": configs.HopperConfig,
        "hopper_project": configs.HopperProjectConfig,
        "group_dx": configs.GemmConfig,
        "backward": configs.BackwardConfig,
        "update": configs.UpdateConfig,
    }
    for row in arch_rows:
        used = int(row["shared_bytes"])
        assert used <= configs.SHARED_MEMORY[int(row["arch"])], describe(row)
        fields = {key: int(value) for key, value in (part.split("=") for part in row["config"].split())}
        config = classes[row["kernel"]](**fields)
        adapter = (
            (4,) if row["adapter"] == "fp32" and row["kernel"] in ("project", "small", "backward") else ()
        )
        estimate = config.shared_bytes(2, *adapter)
        # What select() trusts is a bound, to which a few barriers come; the mask of dropout passes through
        # shared memory too, and so does the one tile of a wider adapter that gemm reads.
        spare = 1024 + (estimate // 2 if row["dropout"] == "True" or row["adapter"] == "fp32" else 0)
        assert used <= estimate + spare, describe(row)


def test_matrix_instructions(arch_rows):
    """Tensor cores everywhere; wgmma on sm_90 and tcgen05 on sm_100 for every tile of 64 rows or more."""
    for row in arch_rows:
        arch, mma = int(row["arch"]), row["mma"]
        # wgmma takes 64 rows, tcgen05 at least as many.
        large = not any(f"block_m={rows} " in row["config"] for rows in (16, 32))
        wide = {90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA")
        if row["kernel"] == "backward" and not large:
            # g's tiles have 16 rows, dA's 64: the row names the one that stands there more often.
            assert mma in ("HMMA", wide), describe(row)
        else:
            assert mma == (wide if large else "HMMA"), describe(row)


def test_loads_are_asynchronous(arch_rows):
    for row in arch_rows:
        if row["kernel"] != "update":  # It has no loop whose loads could run ahead.
            assert int(row["async_copies"]) > 0, describe(row)


def test_wgmma_is_not_serialised(static_rows):
    rows = [row for row in static_rows if row["arch"] == "90"]
    for row in rows:
        assert row["warnings"] == "", describe(row)


@pytest.mark.parametrize("arch", [80, 90])
def test_a_large_gemm_tile(static_rows, arch):
    tiles = [
        (int(fields["block_m"]), int(fields["block_e"]))
        for row in static_rows
        if row["kernel"] in ("gemm", "group_dx") and int(row["arch"]) == arch and row["rows"] == "8192"
        for fields in [dict(part.split("=") for part in row["config"].split())]
    ]
    assert tiles
    assert all(min(tile) >= 128 for tile in tiles)


def test_every_selectable_configuration_is_compiled(static_rows):
    def key(arch, kernel, config):
        parts = (part for part in config.split() if not part.startswith(("splits=", "rows=")))
        return arch, kernel, " ".join(parts)

    def text(config):
        return " ".join(f"{name}={getattr(config, name)}" for name in config.__dataclass_fields__)

    compiled = {key(int(row["arch"]), row["kernel"], row["config"]) for row in static_rows}
    for arch in ARCHS:
        for M in (1, 16, 17, 64, 65, 500, 4095, 4096, 10**6):
            for R in (1, 16, 17, 33, 65, 129, 256):
                for kernel, config in (
                    ("project", configs.select_project(arch, 108, M, R, 2)),
                    ("project", configs.select_project(arch, 108, M, R, 2, 4)),
                    ("project", configs.select_project(arch, 108, M, R, 2, 2, True)),
                    ("project", configs.select_project(arch, 108, M, R, 2, 4, True)),
                    ("gemm", configs.select_gemm(arch, M, 4096, R, 2, dropout=True)),
                    ("update", configs.select_update(R)),
                    ("gemm", configs.select_gemm(arch, M, 4096, R, 2, dropout=False)),
                    ("token_sum", configs.select_token_sum(arch, 108, M, 4096, R, 2)),
                    ("backward", configs.select_backward(arch, 108, M, 4096, R, 2)),
                    ("backward", configs.select_backward(arch, 108, M, 4096, R, 2, 4)),
                    ("group_dx", configs.select_gemm(arch, M, 4096, R, 2, dropout=False)),
                ):
                    assert key(arch, kernel, text(config)) in compiled, f"sm_{arch} {kernel} {config}"
        for N in (1, 1024, 2048, 4096, 5000, 14336, 10**6):
            for R in (1, 16, 17, 33, 65, 129, 256):
                for adapter_itemsize in (2, 4):
                    config = configs.select_small(arch, 132, N, R, 2, adapter_itemsize)
                    assert key(arch, "small", text(config)) in compiled, f"sm_{arch} small {config}"
