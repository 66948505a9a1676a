"""The fault suite: its choice of cases and its judgement, and a few of its cases for real."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.faults.cases import (
    DEATHS,
    ELASTIC,
    FIRST_RANK,
    PIECES,
    RANKS,
    READERS,
    Case,
    Fault,
    Place,
    Shape,
    chosen,
    elastic_kinds,
    kinds,
    numbered,
    occurrences,
    ranks,
)
from benchmarks.faults.inject import PASSES
from benchmarks.faults.jobs import Ended
from benchmarks.faults.notes import Phase, Struck, read_case, read_note, write_case, write_note
from benchmarks.faults.scene import Branched, Samples, plan_of
from benchmarks.faults.suite import Suite
from benchmarks.faults.table import by_fault, by_job, by_place
from benchmarks.faults.verdict import Verdict, judge, lost, named
from benchmarks.report import text
from gpp.api.capture import capture
from gpp.checkpoint.manifest import Manifest, Part
from gpp.checkpoint.writer import CheckpointWriter, Contents
from gpp.schedule.lower import lower
from gpp.schedule.task import Compute, Instruction, Receive, Reduce, Send, Update
from tests.mpirun import is_open_mpi, why_no_mpi
from tests.thorough import ALL

REASON = why_no_mpi() or (None if is_open_mpi() else "faults are put into jobs of Open MPI")
needs_mpi = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def case(**more: object) -> Case:
    plain = {"number": 0, "shape": Shape.CHAIN, "rank": 1, "place": Place.FORWARD, "fault": Fault.KILL}
    return Case(**{**plain, "occurrence": 5, "share": 0.5, **more})  # type: ignore[arg-type]


def test_two_hundred_cases_cover_all_kinds_evenly() -> None:
    cases = chosen(200, 0)
    plain = [c for c in cases if not c.elastic]
    elastic = [c for c in cases if c.elastic]
    pairs = Counter((c.place, c.fault) for c in plain)
    assert set(pairs) == set(kinds()) or len(plain) < len(kinds())
    assert max(pairs.values()) <= 1 + len(plain) // len(kinds())
    assert {c.place for c in plain} == set(Place) and {c.fault for c in plain} == set(Fault)
    assert len(elastic) == 25 and {(c.place, c.fault) for c in elastic} <= set(elastic_kinds())
    assert {c.fault for c in elastic} == set(DEATHS) and {c.place for c in elastic} <= set(ELASTIC)
    shapes = Counter(c.shape for c in cases)
    assert set(shapes) == set(Shape) and min(shapes.values()) > 55
    assert {c.rank for c in cases} == set(range(4))
    assert 8 < sum(c.second is not None for c in cases) < 25


def test_cases_are_those_of_their_seed_and_possible() -> None:
    assert chosen(60, 3) == chosen(200, 3)[:60] != chosen(60, 4)
    assert numbered(17, 3) == chosen(18, 3)[17]
    for found in chosen(300, 1):
        assert found.rank in ranks(found.shape, found.place) and found.rank < RANKS[found.shape]
        assert 0 <= found.occurrence < occurrences(found.place)
        assert found.rank == 0 or found.place not in FIRST_RANK
        assert found.rank in READERS[found.shape] or found.place is not Place.READ
        assert found.second != found.rank and 0 <= found.share < 1


def test_ranks_come_to_their_places() -> None:
    data = Samples()
    captured = capture(Branched(), data.read(range(4), data.keys), verify=False)
    for shape in Shape:
        plan = plan_of(shape)(captured)
        read = {rank for s in plan.stage_graph.stages if s.batch_keys for rank in s.devices}
        assert read == set(READERS[shape])
        for rank, instructions in enumerate(lower(replace(plan, global_norm=True)).programs):
            kinds_of = Counter(place for one in instructions if (place := PLACES.get(kind_of(one))))
            for place in (Place.FORWARD, Place.BACKWARD, Place.WEIGHT, Place.SEND, Place.RECEIVE):
                comes = rank in ranks(shape, place)
                assert (kinds_of[place] >= PIECES) == comes and bool(kinds_of[place]) == comes, (shape, rank)
            assert kinds_of[Place.REDUCE] >= 1 == kinds_of[Place.UPDATE]


PLACES: dict[object, Place] = {Send: Place.SEND, Receive: Place.RECEIVE, Reduce: Place.REDUCE}
PLACES |= {Update: Place.UPDATE, **PASSES}


def kind_of(instruction: Instruction) -> object:
    return instruction.task.kind if isinstance(instruction, Compute) else type(instruction)


def test_notes_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_note(tmp_path) is None
    struck = Struck(3.5, 12, Phase.TRAINING, ("step-00000002",))
    write_note(tmp_path, struck)
    asked = case(second=2, delay=0.25, elastic=True)
    write_case(tmp_path, asked)
    assert read_note(tmp_path) == struck and read_case(tmp_path) == asked


REPORT = "error: rank 1 on here ended without a word (killed): the log says more\n  rank 0: forward\n"


def ended(**more: object) -> Ended:
    struck = Struck(0.0, 1, Phase.TRAINING, ())
    good = {"code": 137, "out": "", "err": REPORT, "struck": struck, "last_rank": 0.4, "launcher": 0.5}
    return Ended(**{**good, "orphans": (), **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("how", "wrong"),
    [
        ({}, ""),
        ({"code": 0}, "exit code is 0"),
        ({"code": None, "launcher": None}, "not all ranks were gone"),
        ({"last_rank": 10.5}, "not all ranks were gone"),
        ({"orphans": ("python -m program",)}, "left behind: python"),
        ({"err": ""}, "there are 0 reports"),
        ({"err": REPORT + "error: rank 0: why\n"}, "there are 2 reports"),
        ({"err": REPORT.replace("rank 1 on", "rank 2 on")}, "a report names [2]"),
        ({"struck": None}, "the fault did not come"),
    ],
)
def test_a_job_is_judged(how: dict[str, object], wrong: str, tmp_path: Path) -> None:
    found = judge(case(), ended(**how), tmp_path).wrong
    assert (found == ()) if not wrong else any(wrong in words for words in found), found


def test_an_elastic_job_is_judged_by_its_losses(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    losses = [1.0 / (1 + n) for n in range(9)]
    lines = [{"step": n, "loss": 9.0 if n == 3 else losses[n]} for n in range(6)]
    lines += [{"step": n, "loss": losses[n] * (1 + 1e-6)} for n in range(2, 9)]  # again from a checkpoint
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    good = ended(code=0, err="")
    assert judge(case(elastic=True), good, tmp_path, losses).wrong == ()
    assert "the losses of steps [4]" in str(
        judge(case(elastic=True), good, tmp_path, [*losses[:4], 3.0, *losses[5:]]).wrong
    )
    assert "exit code is 1" in str(judge(case(elastic=True), ended(code=1), tmp_path, losses).wrong)


def test_ranks_that_a_report_names() -> None:
    assert named("error: rank 12: RuntimeError: rank 3 is no rank") == {12}
    assert named("error: ranks 0, 2 on here, there ended without a word") == {0, 2}
    assert named("error: nothing moved for 3 s: ranks 0 and 1 did not go on") == {0, 1}
    assert named("error: there is no plan") == set()


def test_a_lost_checkpoint_is_seen(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 0, 1, keep=2)
    for step in (2, 4, 6):
        writer.write(
            Contents({}, {}, {}, {}, None, {"note": "kept"}), Manifest(step, 1, 0, None, Part({}, {}, {}, {}))
        )
        writer.wait()
    names = [f"step-{step:08d}" for step in (2, 4, 6)]

    def after(*whole: str) -> str:
        return lost(Struck(0.0, 1, Phase.TRAINING, whole), tmp_path)

    assert after(*names) == "" == after(*names[1:])  # the first has made way for two later ones
    (tmp_path / names[1]).rename(tmp_path / f"{names[1]}.part")
    assert names[1] in after(*names[1:])
    (tmp_path / names[2] / "note").write_text("lost")
    assert "damaged" in after(names[2])


def test_tables_of_verdicts() -> None:
    good, late = Verdict("", "", "", (), 0.5), Verdict("late", "", "", (), 14.0, 3.0)
    judged = {case(): good, case(number=1, fault=Fault.HANG): late, case(number=2, elastic=True): good}
    for make in (by_fault, by_place, by_job):
        section = make(judged)
        assert section.rows[-1] == ("all", 3, 1, 1, 0, 0, 5.75, 11.0) and section.reached is False
        assert "1 hangs" in text(section)
    assert [row[0] for row in by_job(judged).rows] == ["chain", "chain, elastic", "all"]


SHORT = (
    case(rank=2, place=Place.UPDATE, fault=Fault.HANG),
    case(place=Place.BYTES, occurrence=2, share=0.61803),
)
LONG = (
    case(shape=Shape.REPLICAS, place=Place.REDUCE, fault=Fault.RUNTIME),
    case(place=Place.RECEIVE),
    case(rank=0, place=Place.MANIFEST, occurrence=1),
    case(rank=0, place=Place.RENAME, occurrence=1, fault=Fault.EXIT_0),
    case(shape=Shape.DIAMOND, rank=3, place=Place.WEIGHT, fault=Fault.STOP),
    case(shape=Shape.DIAMOND, rank=2, place=Place.FORWARD, fault=Fault.VALUE, second=0, delay=0.1),
    case(place=Place.SETUP, occurrence=0, fault=Fault.SYS_EXIT),
    case(place=Place.LEAVING, occurrence=0, fault=Fault.SYS_EXIT),
    case(rank=0, place=Place.STOPPING, occurrence=0),
    case(place=Place.BACKWARD, elastic=True),
)


@pytest.mark.mpi
@needs_mpi
@pytest.mark.parametrize("chosen_case", SHORT + (LONG if ALL else ()), ids=lambda c: c.text)
def test_a_fault_ends_all_ranks_and_loses_nothing(chosen_case: Case) -> None:
    verdict, found = Suite().run(chosen_case)
    assert verdict.wrong == (), f"{verdict.wrong}\n{found.out}{found.err}"
    assert verdict.seconds is not None
