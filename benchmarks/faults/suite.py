"""Runs cases, a few jobs at once, and says how each ended."""

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from gpp.plan import plan_to_json
from launch.mpirun import Machine, find_machine

from .cases import STEPS, Case, Place, Shape
from .jobs import Ended, run_job
from .verdict import Verdict, judge, losses_of

NEVER = 1_000_000  # an occurrence that no rank reaches


class Suite:
    """Has what elastic jobs are held against: made once for each shape, when the first of them is run."""

    def __init__(self, machine: Machine | None = None) -> None:
        self._machine = machine or find_machine()
        self._lock = threading.Lock()
        self._plans: dict[Shape, str] = {}
        self._losses: dict[Shape, Sequence[float]] = {}

    def run(self, case: Case) -> tuple[Verdict, Ended]:
        """One case, in a folder of its own that is removed."""
        losses = self._losses_of(case) if case.elastic else ()
        folder = _folder()
        try:
            ended = self._job(case, folder)
            return judge(case, ended, folder, losses), ended
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def run_all(
        self, cases: Iterable[Case], at_once: int, tell: Callable[[Case, Verdict], None]
    ) -> dict[Case, Verdict]:
        """All of them; `tell` as soon as one has ended."""
        lock = threading.Lock()

        def work(case: Case) -> tuple[Case, Verdict]:
            verdict, _ = self.run(case)
            with lock:
                tell(case, verdict)
            return case, verdict

        with ThreadPoolExecutor(at_once) as pool:
            try:
                return dict(pool.map(work, cases))
            except BaseException:  # Ctrl-C: what has begun ends, no other begins
                pool.shutdown(cancel_futures=True)
                raise

    def _job(self, case: Case, folder: Path) -> Ended:
        if not case.elastic:
            return run_job(case, folder, self._machine)
        with self._lock:
            if case.shape not in self._plans:
                self._plans[case.shape] = _plan_text(case.shape)
        plan = folder / "plan.json"
        plan.write_text(self._plans[case.shape])
        return run_job(case, folder, self._machine, plan)

    def _losses_of(self, case: Case) -> Sequence[float]:
        with self._lock:
            known = self._losses.get(case.shape)
        if known is not None:
            return known
        folder = _folder()
        try:
            calm = replace(case, place=Place.UPDATE, occurrence=NEVER, second=None)
            ended = self._job(calm, folder)
            found = losses_of(folder)
            if ended.code != 0 or len(found) != STEPS:
                raise RuntimeError(f"a job without a fault ended with {ended.code}: {ended.err}{ended.out}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        with self._lock:
            self._losses[case.shape] = [found[step] for step in range(STEPS)]
            return self._losses[case.shape]


def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="gf-"))  # short: sockets lie in there


def _plan_text(shape: Shape) -> str:
    from gpp.api.capture import capture

    from .scene import Branched, Samples, plan_of

    data = Samples()
    return plan_to_json(plan_of(shape)(capture(Branched(), data.read(range(4), data.keys), verify=False)))
