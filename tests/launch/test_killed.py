"""A process that is killed at any moment, and resumed, has the losses of one that was not."""

from pathlib import Path

import pytest

from tests.thorough import thorough

from .commands import foreign, read, run_command
from .killed import MORE


@pytest.mark.parametrize(
    ("seed", "kills"),
    [pytest.param(0, 1, marks=thorough), *(pytest.param(seed, 8, marks=thorough) for seed in range(1, 11))],
)
def test_a_killed_run_goes_on(seed: int, kills: int, tmp_path: Path) -> None:
    done = run_command("tests.launch.killed", str(seed), str(kills), cwd=foreign(tmp_path), timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = (read(tmp_path / name, "metrics.jsonl") for name in ("killed", "whole"))
    steps = read(tmp_path / "whole", "result.json")["steps"]
    assert [line["step"] for line in found] == list(range(steps)) and steps >= kills + MORE
    assert [(line["loss"], line["mae"]) for line in found] == [
        (line["loss"], line["mae"]) for line in expected
    ]
    for key in ("eval", "eval_ema", "final_loss", "steps"):
        assert read(tmp_path / "killed", "result.json")[key] == read(tmp_path / "whole", "result.json")[key]
    assert "goes on at step " in (tmp_path / "killed.txt").read_text()
    names = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (steps - 1, steps)]
