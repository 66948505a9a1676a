from pathlib import Path

import pytest

from benchmarks.plain import train


def test_it_trains_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    accuracy = train(sequence=12, layers=1, hidden=16, ffn=16, trigrams=509, steps=40, learning_rate=5e-3)
    said = capsys.readouterr().out
    assert f"({accuracy:.1%}), the largest class is" in said
    assert accuracy > 0.2
