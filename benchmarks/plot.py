"""Draws a results file: the ratios to the frozen linear over the shapes, a panel for each mode and dtype.

python benchmarks/plot.py RESULTS.csv PICTURE.png [--mode both] [--rank 16] [--providers peft fastlora]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from results import Row, read_csv

MARKERS = "osD^vP*X<>phd"


def _shapes(rows: Sequence[Row]) -> list[tuple[int, int, int, int]]:
    return sorted({(row.R, row.M, row.N, row.K) for row in rows})


def _panel_of(row: Row) -> tuple[str, str, str, str]:
    return row.section, row.mode, row.timer, row.dtype


def _panel(axes, rows: Sequence[Row], providers: Sequence[str]) -> None:
    """Ratios of one mode, timer and dtype; the bars span the quartiles over the rounds."""
    shapes = _shapes(rows)
    for index, provider in enumerate(providers):
        ours = {(r.R, r.M, r.N, r.K): r for r in rows if r.provider == provider}
        xs = [x for x, shape in enumerate(shapes) if shape in ours]
        if not xs:
            continue
        found = [ours[shapes[x]] for x in xs]
        spread = [
            [max(0.0, r.ratio - r.ratio_low) for r in found],
            [max(0.0, r.ratio_high - r.ratio) for r in found],
        ]
        # Providers are shifted slightly against each other, so that equal ratios stay visible.
        shift = 0.6 * (index / max(1, len(providers) - 1) - 0.5)
        axes.errorbar(
            [x + shift for x in xs],
            [r.ratio for r in found],
            yerr=spread,
            label=provider,
            color=f"C{index % 10}",
            marker=MARKERS[index % len(MARKERS)],
            markersize=6 if provider == "fastlora" else 4,
            linestyle="none",
            linewidth=0.7,
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xticks(
        range(len(shapes)),
        [f"{M}\n{N}x{K}\nr{R}" for R, M, N, K in shapes],
        fontsize=6,
    )
    axes.set_xlim(-0.6, len(shapes) - 0.4)
    axes.grid(axis="y", linewidth=0.3)


def draw(rows: Sequence[Row], stamp: str, path: Path) -> bool:
    """Write the picture of all rows that have a ratio; False, and no file, if there are none.

    Raises ImportError if matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.ratio is not None]
    if not rows:
        return False
    panels = list(dict.fromkeys(_panel_of(row) for row in rows))
    # The floor itself is drawn as the line at 1.
    providers = [name for name in dict.fromkeys(row.provider for row in rows) if name != "frozen"]
    width = max(7.0, 0.45 * len(_shapes(rows)) + 3.0)
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(width, 3.2 * len(panels) + 1.0), squeeze=False, layout="constrained"
    )
    handles = {}
    for panel_axes, panel in zip(axes[:, 0], panels, strict=True):
        _panel(panel_axes, [row for row in rows if _panel_of(row) == panel], providers)
        section, mode, timer, dtype = panel
        panel_axes.set_title(f"{section}: {mode} ({timer}, {dtype})", fontsize=9)
        panel_axes.set_ylabel("time / floor", fontsize=8)
        handles.update(
            {label: line for line, label in zip(*panel_axes.get_legend_handles_labels(), strict=True)}
        )
    axes[-1, 0].set_xlabel("tokens, out x in (of a decoder layer: sequence x hidden), rank", fontsize=8)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle(stamp, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="a CSV that a benchmark wrote")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--section", help="only this section")
    parser.add_argument("--mode", help="only this mode")
    parser.add_argument("--timer", help="only this timer")
    parser.add_argument("--rank", type=int, help="only this rank")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these")
    arguments = parser.parse_args()
    wanted = {
        "section": arguments.section,
        "mode": arguments.mode,
        "timer": arguments.timer,
        "R": arguments.rank,
    }
    rows, stamp = read_csv(arguments.results)
    rows = [
        row
        for row in rows
        if all(value is None or getattr(row, name) == value for name, value in wanted.items())
        and (arguments.providers is None or row.provider in arguments.providers)
    ]
    if not draw(rows, stamp, arguments.picture):
        parser.error(f"{arguments.results} has no ratio for this choice")
    print(arguments.picture)


if __name__ == "__main__":
    main()
