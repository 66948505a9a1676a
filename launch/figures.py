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


def draw(rows: Sequence[Row], folder: Path, title: str, device_memory: float) -> list[Path]:
    """throughput and memory over devices, each as PNG and SVG. Raises ImportError without matplotlib.

    `device_memory` are the bytes that a device has, drawn as a limit.
    """
    import matplotlib

    matplotlib.use("Agg")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # of its fonts it says nothing to a user
    written = _figure(
        rows,
        folder / "throughput",
        title,
        "throughput, samples/s",
        lambda row: row.samples_per_second,
        second=lambda row: _free(row),
    )
    return written + _figure(
        rows,
        folder / "memory",
        title,
        "memory of the fullest device, GiB",
        lambda row: None if row.peak_memory is None else row.peak_memory / 2**30,
        limit=device_memory / 2**30,
    )


def _free(row: Row) -> float | None:
    """Throughput of a linear plan's partition on its true stage graph."""
    if row.on_graph is None or not row.ratio or row.samples_per_second is None:
        return None
    return row.samples_per_second / row.ratio * row.on_graph


def _figure(
    rows: Sequence[Row],
    stem: Path,
    title: str,
    label: str,
    value: Callable[[Row], float | None],
    second: Callable[[Row], float | None] = lambda row: None,
    limit: float | None = None,
) -> list[Path]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    counts = sorted({row.devices for row in rows})
    for order, name in enumerate(dict.fromkeys(row.planner for row in rows)):
        size = 1.35**-order  # plans are often equal: the lines below remain to be seen
        own = [row for row in rows if row.planner == name]
        colour, mark = _STYLES.get(name, ("#000000", "x"))
        style = {"color": colour, "marker": mark, "linewidth": 5 * size, "markersize": 11 * size}
        _line(axes, own, value, label=name, **style)
        dotted = style | {"linestyle": ":", "linewidth": 1.5, "markerfacecolor": "white"}
        _line(axes, own, second, label=f"{name}, on its DAG", **dotted)
    if limit is not None:
        axes.axhline(limit, color="black", linewidth=1, linestyle="--", label="of a device")
    if counts[0] != counts[-1]:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="devices", ylabel=label, title=title)
    axes.set_ylim(bottom=0)
    axes.grid(True, axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    written = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in written:
        figure.savefig(path, dpi=160)
    return written


def _line(axes: Any, rows: Sequence[Row], value: Callable[[Row], float | None], **style: Any) -> None:
    points = [(row.devices, found) for row in rows if (found := value(row)) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style)
