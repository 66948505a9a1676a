"""Rules of the house, kept by tools: layers, types, style; and what each room may load."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


def tool(*command: str) -> str:
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def own(name: str) -> str:
    """A tool installed beside this Python."""
    return str(Path(sys.executable).with_name(name))


def test_layers() -> None:
    assert "0 broken" in tool(own("lint-imports"), "--no-cache")


def test_types() -> None:
    tool(sys.executable, "-m", "mypy")


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=["lint", "format"])
def test_style(command: tuple[str, ...]) -> None:
    tool(own("ruff"), *command, ".")


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("gpp.planner.graphpipe", ("torch", "mpi4py", "hydra", "scipy")),
        ("gpp.simulate", ("torch", "mpi4py", "hydra")),
        ("launch.simulate", ("torch", "mpi4py", "triton")),
        ("gpp.runtime.trainer", ("mpi4py", "hydra", "triton._C")),
        ("gpp", ("torch", "numpy", "networkx")),
        ("gpp.api.plan", ("torch", "mpi4py", "hydra")),
        ("gpp.api.start", ("mpi4py", "hydra")),
        ("gpp.models.mmt", ("mpi4py", "hydra", "gpp.runtime")),  # it loads torch: the check can fail
    ],
)
def test_what_is_loaded(module: str, forbidden: tuple[str, ...]) -> None:
    found = tool(sys.executable, "-c", f"import sys, {module}; print(*sys.modules)").split()
    assert module in found
    assert [name for name in forbidden if name in found] == []
    assert ("torch" in found) == ("torch" not in forbidden and module != "gpp")


def test_planning_starts_quickly() -> None:
    program = "import time; t = time.process_time(); import gpp.planner.gpp; print(time.process_time() - t)"
    assert min(float(tool(sys.executable, "-c", program)) for _ in range(3)) < 0.5
