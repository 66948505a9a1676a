"""Figures of the measurements, where matplotlib is installed (the extra `plot`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measure import Measurement
from .rivals import OURS, RIVALS

# Okabe and Ito's colours, told apart by the colour-blind
_COLOURS = dict(zip((OURS, *RIVALS), ("#D55E00", "#555555", "#0072B2", "#009E73", "#CC79A7"), strict=True))


def draw(found: Sequence[Measurement], folder: Path, title: str) -> list[Path]:
    """kernels-speed: the rivals' time over ours, forward and backward; kernels-share: our share of the
    ceiling over the bytes of a call. Both as SVG. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = [_speed(found, folder / "kernels-speed.svg", title)]
    drawn.append(_share(found, folder / "kernels-share.svg", title))
    return [path for path in drawn if path is not None]


def _speed(found: Sequence[Measurement], path: Path, title: str) -> Path | None:
    """A row a case, a mark a rival; right of 1 ours is faster."""
    ours = {m.case: m.gpu.median for m in found if m.provider == OURS and m.gpu is not None}
    both = {case[:-1] for case in ours if case[-1] == "both"}
    cases = [c for c in ours if c[0] != "stage" and (c[-1] == "both" or c[:-1] not in both)]
    if not cases:
        return None
    from matplotlib.ticker import ScalarFormatter

    figure, axes = _page(title, 1.4 + 0.2 * len(cases))
    for rival in RIVALS:
        points = [
            (m.gpu.median / ours[m.case], cases.index(m.case))
            for m in found
            if m.provider == rival and m.gpu is not None and m.case in cases
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=_COLOURS[rival], label=rival)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(-0.5, len(cases) - 0.5)
    axes.set_yticks(range(len(cases)), [f"{c[0]} {c[2]} {c[3]}" for c in cases], fontsize="x-small")
    axes.invert_yaxis()
    axes.set(xlabel="a rival's GPU time over ours, forward and backward")
    figure.legend(loc="outside lower right", ncols=len(RIVALS), frameon=False, fontsize="small")
    figure.savefig(path)
    return path


def _share(found: Sequence[Measurement], path: Path, title: str) -> Path | None:
    own = [m for m in found if m.provider == OURS and m.share is not None]
    if not own:
        return None
    figure, axes = _page(title, 4.4)
    for by, mark in (("bytes", "o"), ("FLOPs", "s")):
        points = [(m.bytes / 1e6, m.share) for m in own if m.by == by]
        if points:
            axes.plot(
                *zip(*points, strict=True), mark, color=_COLOURS[OURS], label=f"bound by {by}", alpha=0.7
            )
    axes.axhline(0.85, color="#555555", linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.1)
    axes.set(xlabel="MB that a call moves", ylabel="share of the measured ceiling")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)
    return path


def _page(title: str, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize="medium")
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes
