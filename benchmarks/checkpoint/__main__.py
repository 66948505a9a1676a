"""python -m benchmarks.checkpoint [section ...]: see `benchmarks.command`. TMPDIR says on which disk."""

from collections.abc import Callable

from benchmarks.command import run
from benchmarks.section import Section

from .disk import bytes_a_second
from .stall import stall_of_a_step


def sections() -> dict[str, Callable[[], Section]]:
    """All sections by name, in the order in which they are run."""
    return {"disk": bytes_a_second, "stall": stall_of_a_step}


if __name__ == "__main__":
    run("checkpoint", "Checkpoints, measured", sections())
