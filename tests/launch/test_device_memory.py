"""What is found out about device memory: by a job that may end in any way, and once."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpp.runtime.loopback import LoopbackWorld
from gpp.runtime.staging import OnHost
from launch import device_memory, transport
from launch.device_memory import Verdict, asked_for, verdict
from launch.mpirun import assemble, find_machine
from launch.problems import SettingsError
from tests.mpirun import run_mpi, why_no_mpi
from tests.thorough import thorough

from .test_settings import configuration

needs_mpi = pytest.mark.skipif(why_no_mpi() is not None, reason=why_no_mpi() or "")


def program(text: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time; {text}"]


def host_memory() -> list[str]:
    """The job itself, with buffers on the host: any MPI library takes those."""
    return assemble(find_machine(), 2, "gpp.runtime.device_probe", ["cpu"])[0]


@pytest.mark.mpi
@needs_mpi
def test_the_job_sends_and_receives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    assert verdict("mpi", "machine", tmp_path, host_memory()) == Verdict(True)
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == {
        "works": True,
        "reason": "",
        "library": "mpi",
        "machine": "machine",
    }


@thorough
@pytest.mark.mpi
@needs_mpi
def test_it_starts_inside_another_job(tmp_path: Path) -> None:
    script = tmp_path / "inside.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from gpp.runtime.mpi import connect\n"
        "from launch.device_memory import verdict\n"
        "from tests.launch.test_device_memory import host_memory\n"
        "comm = connect()\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "found = comm.broadcast_object(lambda: verdict('mpi', 'here', folder, host_memory()))\n"
        "print(found.works, found.reason)\n"
        "comm.close()\n"
    )
    job = run_mpi(2, str(script), timeout=120)
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.splitlines() == ["True "] * 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended with code -11 and said: nothing"),
        ("print('64 bytes arrived with other contents'); print('-----'); sys.exit(1)", "64 bytes arrived"),
        ("print('all is well')", "ended with code 0 and said: all is well"),
        ("time.sleep(60)", "was not done after 1 s"),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)", "was not done after 1 s"),
    ],
    ids=["crash", "contents", "no words", "hang", "stubborn hang"],
)
def test_every_end_is_a_verdict(
    text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "PATIENCE", 1.0 if "sleep" in text else 30.0)
    monkeypatch.setattr(device_memory, "MANNERS", 0.5)
    found = verdict("mpi", "machine", tmp_path, program(text))
    assert not found.works and reason in found.reason


def test_a_verdict_is_remembered_for_what_it_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = program(f"print({device_memory.WORKS!r})")
    assert verdict("mpi", "machine", tmp_path, works).works
    assert verdict("mpi", "machine", tmp_path, program("sys.exit(1)")).works  # not tried again
    assert not verdict("another mpi", "machine", tmp_path, program("sys.exit(1)")).works
    assert not verdict("mpi", "another machine", tmp_path, program("sys.exit(1)")).works
    monkeypatch.setenv("UCX_TLS", "tcp")
    assert not verdict("mpi", "machine", tmp_path, program("sys.exit(1)")).works
    for file in tmp_path.iterdir():
        file.write_text("{")
    assert verdict("mpi", "machine", tmp_path, works).works


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert verdict("mpi", "m", tmp_path / "file" / "folder", program(f"print({device_memory.WORKS!r})")).works


def test_what_a_job_inherits() -> None:
    mine = {"PATH": "/bin", "UCX_TLS": "tcp", "OMPI_MCA_pml": "ucx", "OMPI_ALLOW_RUN_AS_ROOT": "1"}
    job = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_MCA_num_procs": "4", "PMIX_RANK": "0", "PRTE_LAUNCHED": "1"}
    assert asked_for(mine | job) == mine


def staging(
    monkeypatch: pytest.MonkeyPatch, wanted: str, device: str, *, alone: bool = False, reduce: str = "auto"
):
    monkeypatch.setattr(transport, "pick_device", lambda _: torch.device(device))
    monkeypatch.setattr(transport, "machine_type", lambda: "a machine")
    monkeypatch.setattr(transport, "verdict", lambda *_: Verdict(False, "it ended with code -11"))
    fake = SimpleNamespace(
        rank=0,
        size=2,
        hosts=("here", "here"),
        broadcast_object=LoopbackWorld(1).communicators[0].broadcast_object,
        all_gather_object=lambda value: [value, value],
        library="mpi",
        device_memory=False,
    )
    settings = configuration(transport__name=wanted, transport__reduce=reduce)
    return transport.staging_of(settings, fake, alone=alone)


@pytest.mark.parametrize("wanted", ["auto", "host"])
def test_stages_on_the_host_share_its_memory(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(staging(monkeypatch, wanted, "cpu"), OnHost)


@pytest.mark.parametrize(
    ("device", "alone", "message"),
    [
        ("cpu", False, "stages run on the CPU here: use transport=auto or transport=host"),
        ("cuda", True, "no MPI in one process: start it with mpirun, or use transport=host"),
        ("cuda", False, r"\(it ended with code -11\); use transport=host, or an MPI library built with CUDA"),
    ],
)
def test_device_memory_that_cannot_be_is_refused(
    device: str, alone: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match=message):
        staging(monkeypatch, "device", device, alone=alone)


@pytest.mark.parametrize(
    ("device", "alone", "message"),
    [
        ("cpu", False, "stages run on the CPU here: use transport.reduce=mpi"),
        ("cuda:0", True, "there is no MPI in one process: use transport.reduce=mpi"),
        ("cuda:0", False, "2 ranks share 1: use transport.reduce=mpi"),
    ],
)
def test_nccl_that_cannot_be_is_refused(
    device: str, alone: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match=message):
        staging(monkeypatch, "host", device, alone=alone, reduce="nccl")


def test_auto_says_why_messages_go_through_the_host(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transport, "host_staging", lambda device: f"through the host of {device}")
    assert staging(monkeypatch, "auto", "cuda") == "through the host of cuda"
    assert "does not take device memory (it ended with code -11)" in capsys.readouterr().out
