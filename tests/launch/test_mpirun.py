import sys
from pathlib import Path

import pytest

from launch.mpirun import CHECKOUT, Machine, assemble, check_module, main, physical_cores

PYTHON = [sys.executable, "-m", "launch.train"]


def machine(*, open_mpi: bool = True, cores: int = 8, root: bool = False, **environment: str) -> Machine:
    return Machine("/opt/mpirun", open_mpi, cores, root, environment)


def test_each_rank_has_cores_of_its_own() -> None:
    command, added = assemble(machine(), 4, "launch.train", ["train.steps=3"])
    assert command[:3] == ["/opt/mpirun", "-n", "4"]
    assert command[3:7] == ["--map-by", "slot:PE=2", "--bind-to", "core:if-supported"]
    assert command[-4:] == [*PYTHON, "train.steps=3"]
    assert added == {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "2"}


def test_more_ranks_than_cores_share_them() -> None:
    command, added = assemble(machine(cores=2), 4, "launch.train", [])
    assert "--oversubscribe" in command and command[command.index("--bind-to") + 1] == "none"
    assert added["OMP_NUM_THREADS"] == "1"


def test_root_is_allowed_and_said_so_only_to_open_mpi() -> None:
    assert assemble(machine(root=True), 2, "launch.train", [])[1]["OMPI_ALLOW_RUN_AS_ROOT"] == "1"
    assert not any("ROOT" in name for name in assemble(machine(), 2, "launch.train", [])[1])
    assert not any(
        "ROOT" in name for name in assemble(machine(root=True, open_mpi=False), 2, "launch.train", [])[1]
    )


@pytest.mark.parametrize("cores", [2, 8])
def test_mpich_needs_no_flags(cores: int) -> None:
    command, added = assemble(machine(open_mpi=False, cores=cores), 4, "launch.train", ["a=1"])
    assert command == ["/opt/mpirun", "-n", "4", *PYTHON, "a=1"]
    assert added == {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": str(max(1, cores // 4))}


def test_the_users_own_environment_stays() -> None:
    command, added = assemble(machine(PYTHONPATH="/mine", OMP_NUM_THREADS="3"), 2, "launch.train", [])
    assert added == {"PYTHONPATH": f"{CHECKOUT}:/mine"}
    assert command[-7:-3] == ["-x", "PYTHONPATH", "-x", "OMP_NUM_THREADS"]
    again = assemble(machine(PYTHONPATH=f"{CHECKOUT}:/mine"), 2, "launch.train", [])[1]
    assert again["PYTHONPATH"] == f"{CHECKOUT}:/mine"


def test_hosts_have_their_own_slots() -> None:
    command, added = assemble(machine(cores=2), 8, "launch.train", [], ["--hostfile", "hosts"])
    assert "--oversubscribe" not in command and "--map-by" not in command
    assert command[command.index("--hostfile") + 1] == "hosts"
    assert "OMP_NUM_THREADS" not in added and "OMP_NUM_THREADS" not in command


def test_two_threads_of_a_core_count_once(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(["0,2\n", "1,3\n", "0,2\n", "1,3\n"]):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings)
    assert physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert physical_cores({0, 2}, tmp_path) == 1
    assert physical_cores({0, 1, 7}, tmp_path / "nowhere") == 3
    assert physical_cores() >= 1


def test_a_dry_run_shows_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.mpirun.find_machine", lambda: machine())
    main(["-n", "2", "--dry-run", "launch.train", "-m", "train.steps=1,2"])
    out = capsys.readouterr().out
    assert out.startswith(f"PYTHONPATH={CHECKOUT} OMP_NUM_THREADS=4 /opt/mpirun -n 2 ")
    assert out.endswith("-m launch.train -m train.steps=1,2\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["-n", "0", "launch.train"], "-n must be at least 1, it is 0"),
        (["-n", "two", "launch.train"], "invalid int value: 'two'"),
        (["launch.train"], "required: -n"),
        (["-n", "2", "--hostfile", "/nowhere", "launch.train"], "there is no hostfile /nowhere"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", ["train", "launch.trian", "launch.train.steps", ""])
def test_a_module_that_is_not_there(module: str) -> None:
    with pytest.raises(SystemExit, match=r"there is no module .*; the commands are launch.train"):
        check_module(module)


def test_no_mpirun_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("launch.mpirun.sys.executable", str(tmp_path / "python"))
    monkeypatch.setattr("launch.mpirun.shutil.which", lambda name: None)
    with pytest.raises(SystemExit, match="there is no mpirun: pip install"):
        main(["-n", "2", "launch.train"])
