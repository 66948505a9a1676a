"""Hold a reader to what it promises of a file that is damaged: one sentence that names it, or a result."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.guard import explain

from .thorough import ALL

SECONDS = 20  # that no file may take, however large the numbers in it
EXAMPLES = 2000 if ALL else 30


class StuckError(Exception):
    """A file that keeps its reader busy for ever."""


def survives(
    strategy: st.SearchStrategy[Any],
    use: Callable[[Any], object],
    errors: tuple[type[Exception], ...],
    names: str = "",
    *,
    share: float = 1.0,
) -> None:
    """Give `use` many damaged files: it works, or raises one of `errors` (of subclasses none) with a sentence
    that has `names` in it. `share` of the examples is tried."""

    @settings(
        max_examples=max(5, int(EXAMPLES * share)), deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def try_one(content: Any) -> None:
        try:
            with at_most(SECONDS):
                use(content)
        except ValueError as error:
            assert type(error) in errors, repr(error)
            text = explain(error)
            assert text and "Traceback" not in text and len(text) < 2000, text
            assert names in text, text

    try_one()


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise StuckError where it takes longer."""

    def stop(*_: object) -> None:
        raise StuckError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def written(path: Path, content: str | bytes) -> Path:
    """The file with this content, whatever characters it has."""
    data = content if isinstance(content, bytes) else content.encode(errors="surrogatepass")
    path.write_bytes(data)
    return path
