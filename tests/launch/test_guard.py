from collections.abc import Callable

import pytest

from gpp.runtime.agreement import DisagreementError
from gpp.runtime.communicator import CommunicationError
from gpp.runtime.loopback import LoopbackCommunicator, LoopbackWorld, run
from launch.guard import TRACEBACK, Leaving, explain, first_rank, guarded, together


def failing(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    "error",
    [ValueError("a rule"), OSError("a disk"), DisagreementError("ranks"), CommunicationError("a link")],
)
def test_what_a_user_can_mend_is_its_message(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACEBACK, raising=False)
    assert explain(error) == str(error)
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(type(error)) as caught:
        failing(error)()
    assert "Traceback" in explain(caught.value) and str(error) in explain(caught.value)


def test_a_fault_of_the_program_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Leaving) as end:
        guarded(None, failing(RuntimeError("a fault")))
    assert end.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith("error: Traceback") and "RuntimeError: a fault" in err


@pytest.mark.parametrize(
    "error, code, words",
    [
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (SystemExit(3), 1, "error: something called sys.exit(3)"),
        (ValueError("a rule"), 1, "error: a rule\n"),
    ],
)
def test_a_guarded_task_ends_with_one_message(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Leaving) as end:
        guarded(None, failing(error))
    assert end.value.code == code
    assert capsys.readouterr().err.startswith(words)


def test_a_message_is_said_once() -> None:
    with pytest.raises(Leaving):
        guarded(None, failing(Leaving(1)))


@pytest.mark.parametrize("bad", [0, 1])
def test_if_one_rank_fails_all_leave(bad: int, capsys: pytest.CaptureFixture[str]) -> None:
    ended = []

    def rank(comm: LoopbackCommunicator) -> None:
        try:
            together(comm, failing(ValueError("no such file")) if comm.rank == bad else lambda: None)
        except Leaving:
            ended.append(comm.rank)

    run(LoopbackWorld(3), rank)
    assert sorted(ended) == [0, 1, 2]
    who = "" if bad == 0 else f"rank {bad}: "
    assert capsys.readouterr().err == f"error: {who}no such file\n"


def test_work_of_the_first_rank_ends_all_if_it_fails(capsys: pytest.CaptureFixture[str]) -> None:
    seen, ended = [], []

    def rank(comm: LoopbackCommunicator) -> None:
        first_rank(comm, lambda: seen.append(comm.rank))
        try:
            first_rank(comm, failing(ValueError("no such file")))
        except Leaving:
            ended.append(comm.rank)

    run(LoopbackWorld(3), rank)
    assert (seen, sorted(ended)) == ([0], [0, 1, 2])
    assert capsys.readouterr().err == "error: no such file\n"
