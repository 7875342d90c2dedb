"""Measured times of the paths: the rows that the planner prefers to its estimate, and their files.

A row is one path of one product of a layer, timed at one shape on one GPU. The user's own rows (written by
``python -m fastlora tune`` to a file in the cache folder) take precedence over those shipped with the
package. A file is read once, when the first plan for a GPU is made; unusable ones are ignored with a warning.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import importlib.metadata
import io
import math
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastlora.atomic import one_at_a_time, replace_file
from fastlora.kernels.configs import ALIGNED

# Incremented when the meaning of a row changes, or the kernels change so much that older times are useless.
VERSION = 3
OK = "ok"
# The products of a layer and the sizes that each depends on. "forward" is h and y computed in one launch, for
# few tokens; "g+dA" is g and dA computed in one launch, which reads dy once.
SIZES = {"h": "K", "y": "NK", "g": "N", "dx": "NK", "dA": "N", "dB": "K", "forward": "NK", "g+dA": "N"}
# The paths of each product. "together" is the one launch, "apart" is g and dA each on its own fastest path.
# For dx with dropout, "addmm" is the BLAS product followed by the kernel that adds the update.
PATHS = {
    **dict.fromkeys(SIZES, ("triton", "addmm")),
    "forward": ("small", "triton", "addmm"),
    "g+dA": ("together", "apart"),
}
DTYPES = ("float16", "bfloat16")
# What adapters wider than the base are measured with (PEFT's default).
WIDE = "float32"
# A row applies if N and K differ from its own by at most a factor of 2**_NEAR; M and R are bucketed.
_NEAR = 0.5
HOPPER = "+hopper"
_SHIPPED = Path(__file__).with_name("measured.csv")


def is_aligned(product: str, N: int, K: int) -> bool:
    """Whether the kernels can read the operands of a product 16 bytes at a time."""
    sizes = {"N": N, "K": K}
    return not any(sizes[size] % ALIGNED for size in SIZES[product])


@dataclass(frozen=True)
class Row:
    """One path of one product at one shape; ``microseconds`` is None if ``status`` is not "ok".

    ``adapter_dtype``: that of A and B, ``dtype`` or "float32".

    Raises:
        ValueError: a value that no measurement can give.
    """

    gpu: str
    capability: int
    triton: str
    dtype: str
    adapter_dtype: str
    product: str
    M: int
    N: int
    K: int
    R: int
    dropout: bool
    path: str
    microseconds: float | None
    status: str = OK

    def __post_init__(self) -> None:
        choices = {"dtype": DTYPES, "adapter_dtype": (self.dtype, WIDE), "product": tuple(SIZES)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if self.path not in PATHS[self.product]:
            raise ValueError(
                f"path is {self.path!r}, but those of {self.product} are {', '.join(PATHS[self.product])}"
            )
        sizes = *self.shape, self.capability
        if min(sizes) < 1 or max(sizes) >= 2**63 or not self.gpu or not self.status:
            raise ValueError(f"expected positive sizes of tensors, a GPU and a status, got {self}")
        timed = self.microseconds is not None and math.isfinite(self.microseconds) and self.microseconds > 0
        if timed != (self.status == OK):
            raise ValueError(f"microseconds is {self.microseconds}, but status is {self.status!r}")

    @property
    def family(self) -> Family:
        """The key shared by all rows that a failed check of this row's path disqualifies."""
        return Family._make(getattr(self, name) for name in Family._fields)

    @property
    def ranks(self) -> int:
        """The bucket of the rank."""
        return rank_bucket(self.R)

    @property
    def time(self) -> float:
        """Microseconds, infinite if not measured."""
        return math.inf if self.microseconds is None else self.microseconds

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.M, self.N, self.K, self.R


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def bucket(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``size``, but no less than ``least``."""
    return max(least, 1 << (size - 1).bit_length())


def rank_bucket(R: int) -> int:
    return bucket(R, 16)  # ranks below 16 fill the same tensor-core tile


class Family(NamedTuple):
    """What rows share whose path runs the same code; see :class:`Row`."""

    gpu: str
    capability: int
    triton: str
    dtype: str
    adapter_dtype: str
    product: str
    ranks: int
    dropout: bool


@dataclass(frozen=True)
class Finding:
    """The result for a product: its fastest path that passed its check, and a reason with the times."""

    path: str
    reason: str


class Table:
    """The rows of one file. ``source``: its name in reasons, with ``{gpu}`` in place of the GPU."""

    def __init__(self, rows: Iterable[Row] = (), source: str = "") -> None:
        self.machines: set[tuple[str, int, str]] = set()
        self._source = source
        self._rows: dict[Family, dict[tuple[int, int, int, int], list[Row]]] = {}
        self._failed: dict[Family, set[str]] = {}
        for row in rows:
            self.machines.add((row.gpu, row.capability, row.triton))
            self._rows.setdefault(row.family, {}).setdefault(row.shape, []).append(row)
            if row.status != OK:
                self._failed.setdefault(row.family, set()).add(row.path)

    def failed(self, key: Family) -> frozenset[str]:
        """The paths that failed a check in this family."""
        return frozenset(self._failed.get(key, ()))

    def find(self, key: Family, M: int, N: int, K: int, R: int, refused: frozenset[str]) -> Finding | None:
        """The finding for the nearest shape in this family, None if none is near or no path is allowed.

        ``refused``: paths not allowed even if they passed at this shape. Unaligned sizes, which the kernels
        read slowly, only match themselves.
        """
        asked = {"N": N, "K": K}

        def ratios(shape: tuple[int, int, int, int]) -> list[float]:
            known = {"N": shape[1], "K": shape[2]}
            return [abs(math.log2(asked[size] / known[size])) for size in SIZES[key.product]]

        def near(shape: tuple[int, int, int, int]) -> float:
            both = is_aligned(key.product, N, K) and is_aligned(key.product, *shape[1:3])
            return _NEAR if both else 0.0

        shapes = [
            shape
            for shape in self._rows.get(key, ())
            if bucket(shape[0]) == bucket(M) and max(ratios(shape)) <= near(shape)
        ]
        if not shapes:
            return None
        shape = min(shapes, key=lambda known: (sum(ratios(known)), abs(known[0] - M), abs(known[3] - R)))
        rows = sorted(self._rows[key][shape], key=lambda row: PATHS[row.product].index(row.path))
        usable = [row for row in rows if row.status == OK and row.path not in refused]
        if not usable:
            return None
        figures = ", ".join(
            f"{row.path} {row.microseconds:.1f} us" if row in usable else f"{row.path} failed its check"
            for row in rows
        )
        where = f" at M={shape[0]}, N={shape[1]}, K={shape[2]}" if sum(ratios(shape)) else ""
        best = min(usable, key=lambda row: row.time)
        return Finding(best.path, f"{self._source.format(gpu=key.gpu)}{where}: {figures}")


def user_file() -> Path | None:
    """The path of the user's own rows, None if there is no cache folder; the file need not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification says to ignore relative paths.
        folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "fastlora" / f"tuned-v{VERSION}.csv"


def read_rows(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a file, or has another version; names the line.
    """
    with open(path, newline="", encoding="utf-8") as file:
        try:
            reader = csv.reader(file, strict=True)
            header = next(reader, None)
            if header is None or tuple(header) != COLUMNS:
                raise ValueError(f"line 1: expected the columns {','.join(COLUMNS)}")
            return [_parse(line, reader.line_num) for line in reader if line]
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error


def _parse(line: list[str], number: int) -> Row:
    if len(line) != len(COLUMNS):
        raise ValueError(f"line {number}: {len(line)} columns, expected {len(COLUMNS)}")
    fields: dict[str, Any] = dict(zip(COLUMNS, line, strict=True))
    try:
        for name in ("capability", "M", "N", "K", "R"):
            fields[name] = int(fields[name])
        fields["dropout"] = {"True": True, "False": False}[fields["dropout"]]
        fields["microseconds"] = float(fields["microseconds"]) if fields["microseconds"] else None
        return Row(**fields)
    except KeyError as error:
        raise ValueError(f"line {number}: dropout is {error}, expected True or False") from error
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _warn(message: str) -> None:
    warnings.warn(f"fastlora: {message}", RuntimeWarning, stacklevel=2)


@functools.cache
def _user_table() -> Table:
    path = user_file()
    return Table() if path is None else _load(path, "tuned here")


@functools.cache
def _shipped_table() -> Table:
    return _load(_SHIPPED, "measured on {gpu} (shipped)")


def _load(path: Path, source: str) -> Table:
    try:
        return Table(read_rows(path), source)
    except FileNotFoundError:
        return Table()
    except (OSError, ValueError) as error:
        _warn(f"ignoring the measured times in {path}: {error}")
        return Table()


def hopper_asked_for() -> bool:
    """Whether ``FASTLORA_HOPPER=1`` requests the warp-specialised loop, which has not been measured."""
    return os.environ.get("FASTLORA_HOPPER", "0") == "1"


@functools.cache
def installed_triton() -> str:
    """The installed Triton as "major.minor", "" if none."""
    try:
        found = re.match(r"\d+\.\d+", importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        return ""
    return found.group() if found else ""


def triton_version() -> str:
    """The version that rows name; those of other versions are not used.

    ``FASTLORA_HOPPER=1`` changes the kernel of y and dx, so its rows are distinguished by a suffix.
    """
    version = installed_triton()
    return version + HOPPER if version and hopper_asked_for() else version


@functools.cache
def _tables(gpu: str, capability: int) -> tuple[Table, ...]:
    """The tables with rows for this GPU and the installed Triton, the user's own first.

    Warns once if the user's file has rows, but none for them.
    """
    machine = gpu, capability, triton_version()
    user = _user_table()
    if user.machines and machine not in user.machines:
        others = ", ".join(f"{name} with Triton {triton}" for name, _, triton in sorted(user.machines))
        _warn(
            f"ignoring the measured times in {user_file()}: they are for {others}, none for {gpu} "
            f"with Triton {machine[2]} (python -m fastlora tune measures this GPU)"
        )
    return tuple(table for table in (user, _shipped_table()) if machine in table.machines)


def _families(key: Family) -> list[Family]:
    """Those whose rows tell of a product: of its own adapters, then of adapters of the base's dtype."""
    return list(dict.fromkeys((key, key._replace(adapter_dtype=key.dtype))))


def find(key: Family, M: int, N: int, K: int, R: int) -> Finding | None:
    """The finding for a product at this shape, from the user's rows first. Never raises.

    Without rows for float32 adapters on a half-precision base, those for adapters of the base's dtype decide.
    """
    tables = _tables(key.gpu, key.capability)
    if not tables or not (M and N and K and R):
        return None
    refused = failed(key)
    for each in _families(key):
        found = next(filter(None, (table.find(each, M, N, K, R, refused) for table in tables)), None)
        if found is not None:
            other = f", with {each.adapter_dtype} adapters" if each != key else ""
            return Finding(found.path, found.reason + other)
    return None


def failed(key: Family) -> frozenset[str]:
    """The paths that failed a check on this GPU, at any shape of this family.

    A path that failed for adapters of the base's dtype is not trusted with wider ones either.
    """
    tables = _tables(key.gpu, key.capability)
    return frozenset().union(*(table.failed(each) for table in tables for each in _families(key)))


def forget() -> None:
    """Read the files again when the next plan is made."""
    for cached in (_user_table, _shipped_table, _tables):
        cached.cache_clear()


def save_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file, replacing older ones of the same path, product and shape.

    The file is replaced atomically: readers, and interrupted runs, find either the old rows or the new ones.
    Processes that save at the same time take turns, so that none loses another's rows. A file with other
    contents is replaced.

    Raises:
        OSError: the folder cannot be written.
    """

    def key(row: Row) -> tuple:
        return *row.family[:6], *row.shape, row.dropout, row.path

    path.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(path):
        kept = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            kept = {key(row): row for row in read_rows(path)}
        kept.update({key(row): row for row in rows})
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        writer.writerows(dataclasses.astuple(kept[name]) for name in sorted(kept))
        replace_file(path, text.getvalue().encode())
