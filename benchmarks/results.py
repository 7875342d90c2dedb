"""The rows that a benchmark writes, their CSV form, and the environment that they are stamped with."""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
import math
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

import torch
from source_tree import ROOT

UNKNOWN = "unknown"
OK = "ok"


@dataclass(frozen=True)
class Environment:
    """What a figure depends on besides the code that it measures."""

    device: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str
    threads: int

    def __str__(self) -> str:
        return (
            f"{self.device}, driver {self.driver}, torch {self.torch}, triton {self.triton}, "
            f"commit {self.commit}, {self.date}"
        )


def environment(device: torch.device) -> Environment:
    return Environment(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        driver=_driver_version() if device.type == "cuda" else "none",
        torch=torch.__version__,
        triton=_package_version("triton"),
        commit=_commit(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        threads=torch.get_num_threads(),
    )


def source_digest(*sources: str) -> str:
    """Digest of Python files and of those in folders, by default the package, its kernels and the tests."""
    digest = hashlib.sha256()
    for source in sources or ("fastlora", "kernels", "tests"):
        where = ROOT / source
        for path in [where] if where.is_file() else sorted(where.rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _output_of(*command: str) -> str:
    """The first line that a command prints; "unknown" if the command is missing or fails."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return next(iter(run.stdout.split("\n"))).strip() or UNKNOWN


def _commit() -> str:
    # A copy of the checkout may belong to another user, which git does not trust by default.
    git = ("git", "-c", f"safe.directory={ROOT}")
    commit = _output_of(*git, "rev-parse", "--short=12", "HEAD")
    # A different repository that contains an unpacked archive would answer too.
    if commit == UNKNOWN or not (ROOT / ".git").exists():
        return f"source-{source_digest()[:12]}"
    changed = _output_of(*git, "status", "--porcelain", "--untracked-files=no") != UNKNOWN
    return f"{commit}+changes" if changed else commit


def _driver_version() -> str:
    return _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@dataclass(frozen=True)
class Row:
    """One provider on one shape and mode; figures that were not measured are None, and status says why.

    timer: "cpu" (perf_counter), "graph" (CUDA graph replay), "eager" (CUDA events) or "host" (host time of
    the calls). ratio: to the frozen linear, median over the rounds; ratio_low and ratio_high: its quartiles.
    spread: the interquartile range of the time divided by its median. peak_mib: device memory that one
    training step takes. saved_mib: memory kept for backward besides x and the parameters.

    N of a group is the sum of its layers' output features; a decoder layer ("model") has its sequence length
    as N and its hidden size as K.
    """

    section: str
    M: int
    N: int
    K: int
    R: int
    dtype: str
    bias: bool
    dropout: float
    mode: str
    timer: str
    provider: str
    status: str = OK
    median_ms: float | None = None
    spread: float | None = None
    rounds: int | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    peak_mib: float | None = None
    saved_mib: float | None = None
    path: str = ""


ROW_COLUMNS = tuple(field.name for field in fields(Row))
STAMP_COLUMNS = tuple(field.name for field in fields(Environment))
COLUMNS = ROW_COLUMNS + STAMP_COLUMNS


def _text(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


class CsvWriter:
    """Writes a CSV file and flushes after every write, so that a run that is stopped keeps what it measured.

    ``append``: to an existing file, if there is one; ValueError if its columns differ.
    """

    def __init__(self, path: Path, stamp: Environment, *, append: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        append = append and path.exists()
        if append:
            read_csv(path)
        self._file = path.open("a" if append else "w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        if not append:
            self._writer.writerow(COLUMNS)
        self._stamp = list(asdict(stamp).values())
        self._file.flush()

    def write(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._writer.writerow([_text(value) for value in (*asdict(row).values(), *self._stamp)])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


_INTEGERS = {"M", "N", "K", "R", "rounds"}
_FLOATS = {"dropout", "median_ms", "spread", "ratio", "ratio_low", "ratio_high", "peak_mib", "saved_mib"}


def _value(column: str, text: str) -> object:
    if column in _INTEGERS:
        return int(text) if text else None
    if column in _FLOATS:
        return float(text) if text else None
    return text == "True" if column == "bias" else text


def read_csv(path: Path) -> tuple[list[Row], str]:
    """The rows of a file that CsvWriter wrote, and its stamp as a line of text ("" if there are no rows).

    ValueError if the columns differ.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: columns {reader.fieldnames}, expected {list(COLUMNS)}")
        records = list(reader)
    rows = [Row(**{name: _value(name, record[name]) for name in ROW_COLUMNS}) for record in records]
    if not records:
        return rows, ""
    stamp = {name: records[0][name] for name in STAMP_COLUMNS}
    return rows, str(Environment(**{**stamp, "threads": int(stamp["threads"])}))


def newest(rows: Iterable[Row]) -> list[Row]:
    """The latest row for each shape, mode, timer and provider."""
    last = {}
    for row in rows:
        shape = (row.section, row.M, row.N, row.K, row.R, row.dtype, row.bias, row.dropout)
        last[(*shape, row.mode, row.timer, row.provider)] = row
    return list(last.values())


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


NOISE = "frozen-again"
PEFT, PEFT_ALIKE = "peft", "peft-same-dtype"


def ratio_table(rows: Iterable[Row], timers: Sequence[str] | None = None) -> str:
    """Ratio to the floor, providers by modes, one block for each (section, dtype, timer, rank).

    A cell has the geometric mean over the block's shapes and the worst shape's ratio. If a provider was not
    timed on all of the block's shapes, their number follows: such means are not comparable with the others.
    ``timers``: only these.
    """
    blocks: dict[tuple, dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        if row.ratio is not None and (timers is None or row.timer in timers):
            block = blocks.setdefault((row.section, row.dtype, row.timer, row.R), {})
            block.setdefault(row.provider, {}).setdefault(row.mode, []).append(row.ratio)
    if not blocks:
        return "no ratio was measured"
    lines = ["time over the floor's: geometric mean (worst)"]
    for (section, dtype, timer, rank), block in sorted(blocks.items()):
        modes = list(dict.fromkeys(mode for cells in block.values() for mode in cells))
        shapes = {mode: max(len(cells.get(mode, ())) for cells in block.values()) for mode in modes}
        lines.append(f"{section}, {dtype}, rank {rank}, {timer} timer, {max(shapes.values())} shapes")
        lines.append(" " * 26 + "".join(f"{mode:<19}" for mode in modes).rstrip())
        for provider, cells in block.items():
            texts = [_cell(cells.get(mode, ()), shapes[mode]) for mode in modes]
            lines.append(f"  {provider:<24}" + "".join(f"{text:<18} " for text in texts).rstrip())
    return "\n".join(lines)


def _cell(ratios: Sequence[float], shapes: int) -> str:
    if not ratios:
        return "-"
    count = "" if len(ratios) == shapes else f" [{len(ratios)}]"
    return f"{geometric_mean(ratios):.3f} ({max(ratios):.3f}){count}"


def step_table(rows: Iterable[Row], timers: Sequence[str] | None = None) -> str:
    """The training steps of section "model": time, tokens per second, PEFT's times over it, memory.

    PEFT's adapters, and therefore its products, are float32 by default; "alike" has the base's dtype.

    One block for each (shape, dtype, timer). ``timers``: only these.
    """
    blocks: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.mode == "step" and row.median_ms is not None and (timers is None or row.timer in timers):
            blocks.setdefault((row.M, row.N, row.K, row.R, row.dtype, row.timer), []).append(row)
    if not blocks:
        return "no training step was measured"
    lines = ["a training step of one decoder layer: forward, backward, AdamW on the adapters"]
    for (M, N, K, R, dtype, timer), block in blocks.items():
        lines.append(f"{M // N} x {N} tokens, hidden {K}, rank {R}, {dtype}, {timer} timer")
        heads = ("step ms", "tokens/s", "over PEFT", "over alike", "peak MiB", "kept MiB")
        lines.append(" " * 28 + "".join(f"{head:>11}" for head in heads))
        medians = {row.provider: row.median_ms for row in block}
        pefts = [medians.get(PEFT), medians.get(PEFT_ALIKE)]
        for row in block:
            cells = (
                f"{row.median_ms:.3f}",
                f"{M / row.median_ms * 1e3:.0f}",
                *("-" if peft is None else f"{peft / row.median_ms:.3f}x" for peft in pefts),
                "-" if row.peak_mib is None else f"{row.peak_mib:.0f}",
                "-" if row.saved_mib is None else f"{row.saved_mib:.1f}",
            )
            lines.append(f"  {row.provider:<26}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def noise_warning(rows: Iterable[Row], allowed: float = 1.02) -> str | None:
    """A warning line if the floor, timed twice in a run, differs too much from itself."""
    ratios = [max(row.ratio, 1 / row.ratio) for row in rows if row.provider == NOISE and row.ratio]
    noisy = sum(ratio > allowed for ratio in ratios)
    if not noisy:
        return None
    return (
        f"noise: the frozen linear, timed twice, differs from itself by more than {allowed - 1:.0%} in "
        f"{noisy} of {len(ratios)} runs (at most {max(ratios):.2f}x); a smaller difference there says nothing"
    )


def write_json(path: Path, content: object) -> None:
    """Write all of it or nothing, as the process may be killed at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.new")
    scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    scratch.replace(path)
