"""A process that ends others waits for its words to be read, but not for ever."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, time
from gpp.runtime.last_words import spoken
start = time.monotonic()
os.write(1, b"said")
spoken()
os.write(2, f"{time.monotonic() - start}".encode())
"""


def seconds(read_at_once: bool) -> float:
    """How long the process waits when its output is read at once, or only after its end."""
    out, out_end = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=out_end, stderr=subprocess.PIPE)
    os.close(out_end)
    if read_at_once:
        assert os.read(out, 100) == b"said"
    _, said = process.communicate(timeout=60)
    os.close(out)
    return float(said)


def test_it_waits_for_the_reader() -> None:
    assert 0.1 <= seconds(read_at_once=True) < 1.0


def test_a_reader_that_does_not_read_is_not_waited_for() -> None:
    assert 1.0 <= seconds(read_at_once=False)


def test_without_pipes_there_is_nothing_to_wait_for(tmp_path: os.PathLike[str]) -> None:
    with open(os.path.join(tmp_path, "out"), "w") as out, open(os.path.join(tmp_path, "err"), "w") as err:
        subprocess.run([sys.executable, "-c", PROGRAM], stdout=out, stderr=err, check=True, timeout=30)
    with open(os.path.join(tmp_path, "err")) as err:
        assert float(err.read()) < 0.1


@pytest.mark.parametrize(
    "loss", ["sys.stdout = None", "sys.stdout.close()", "sys.stdout = open('/dev/full', 'w')"]
)
def test_a_stream_that_takes_no_words_does_not_keep_it(loss: str) -> None:
    program = (
        f"import sys; from gpp.runtime.last_words import spoken; {loss}; print('x') if sys.stdout and not "
    )
    program += "sys.stdout.closed else None; spoken(); sys.stderr.write('on'); import os; os._exit(0)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "on")
