"""The default experiment with this project's kernels themselves, run by Triton's interpreter."""

from pathlib import Path

import pytest

from .commands import losses, run_lines


def test_the_default_experiment_under_the_interpreter(tmp_path: Path) -> None:
    names = ("eager", "triton")
    lines = [
        [
            "train",
            f"kernels={name}",
            "train.steps=2",
            "train.mini_batch=4",
            "train.held_out=0",
            f"hydra.run.dir={name}",
        ]
        for name in names
    ]
    results = run_lines(tmp_path, lines, environment={"TRITON_INTERPRET": "1"})
    for name, result in zip(names, results, strict=True):
        result.passed()
        assert (tmp_path / name / "kernels.txt").exists() == (name == "triton")
    eager, triton = (losses(tmp_path / name) for name in names)
    assert len(eager) == 2 and triton == pytest.approx(eager, rel=1e-6)
