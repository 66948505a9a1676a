"""Figures of a comparison, where matplotlib is installed (the extra `plot`)."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .comparison import Row

# one colour and one mark a planner whatever the others are: Okabe and Ito's, told apart by the colour-blind
_STYLES = {
    "gpp": ("#D55E00", "o"),
    "graphpipe": ("#0072B2", "s"),
    "piper": ("#009E73", "^"),
    "pipedream": ("#CC79A7", "D"),
    "sequential": ("#555555", "v"),
}
OCTAVES = 4  # throughputs this far apart are drawn on a logarithmic axis
_Value = Callable[[Row], float | None]


def draw(rows: Sequence[Row], folder: Path, title: str, device_memory: float) -> list[Path]:
    """throughput (in samples a second, and over the linear plan's) and memory over devices, each as PNG and
    SVG. Raises ImportError without matplotlib.

    `device_memory` are the bytes that a device has, drawn as a limit.
    """
    import matplotlib

    matplotlib.use("Agg")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # of its fonts it says nothing to a user
    return [*_throughput(rows, folder, title), *_memory(rows, folder, title, device_memory)]


def _throughput(rows: Sequence[Row], folder: Path, title: str) -> list[Path]:
    ratios = any(row.ratio for row in rows)
    figure, panels = _page(rows, title, 2 if ratios else 1)
    _lines(panels[0], rows, lambda row: row.samples_per_second)
    panels[0].set(ylabel="samples/s")
    found = [row.samples_per_second for row in rows if row.samples_per_second is not None]
    if max(found) > OCTAVES * min(found):
        from matplotlib.ticker import NullFormatter, ScalarFormatter

        panels[0].set_yscale("log", base=2)
        panels[0].yaxis.set_major_formatter(ScalarFormatter())
        panels[0].yaxis.set_minor_formatter(NullFormatter())
    else:
        panels[0].set_ylim(bottom=0)
    if ratios:
        _lines(panels[1], rows, lambda row: row.ratio)
        _lines(panels[1], rows, lambda row: row.on_graph, dotted=True)
        panels[1].set(ylabel="throughput over the linear plan's")
    return _saved(figure, panels, folder / "throughput")


def _memory(rows: Sequence[Row], folder: Path, title: str, limit: float) -> list[Path]:
    figure, panels = _page(rows, title, 1)
    _lines(panels[0], rows, lambda row: None if row.peak_memory is None else row.peak_memory / 2**30)
    panels[0].axhline(
        limit / 2**30, color="black", linewidth=1, linestyle="--", label="all that a device has"
    )
    panels[0].set(ylabel="memory of the fullest device, GiB")
    panels[0].set_ylim(bottom=0)
    return _saved(figure, panels, folder / "memory")


def _page(rows: Sequence[Row], title: str, panels: int) -> tuple[Any, list[Any]]:
    """A figure with so many panels beside each other, devices along each."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    figure = Figure(figsize=(1.4 + 4.3 * panels, 4.2), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    counts = sorted({row.devices for row in rows})
    found = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in found:
        if counts[0] != counts[-1]:
            axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(counts))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="devices")
        axes.grid(True, axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def _lines(axes: Any, rows: Sequence[Row], value: _Value, *, dotted: bool = False) -> None:
    """A line for each planner; dotted ones are the same partitions run on their own graphs."""
    for order, name in enumerate(dict.fromkeys(row.planner for row in rows)):
        own = [row for row in rows if row.planner == name]
        points = [(row.devices, found) for row in own if (found := value(row)) is not None]
        if not points:
            continue
        colour, mark = _STYLES.get(name, ("#000000", "x"))
        size = 9 * 0.85**order  # plans are often equal: the marks below remain to be seen
        style = {"color": colour, "marker": mark, "linewidth": 1.8, "markersize": size, "label": name}
        if dotted:
            style |= {"linestyle": ":", "linewidth": 1.4, "markerfacecolor": "white", "markersize": 5}
            style["label"] = f"{name}'s stages as a graph"
        axes.plot(*zip(*points, strict=True), **style)


def _saved(figure: Any, panels: Sequence[Any], stem: Path) -> list[Path]:
    drawn = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    shown = {label: handle for handle, label in drawn}
    figure.legend(
        shown.values(),
        shown.keys(),
        loc="outside lower center",
        ncols=4 if len(shown) > 6 else 3,
        frameon=False,
        fontsize="small",
    )
    written = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in written:
        figure.savefig(path, dpi=160)
    return written
