"""From settings to files: tune if that is asked for, measure, write."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic

from torch._functorch import config as functorch_config

from benchmarks.report import text
from kernels.tuning import forget_tables, path_of, table_of, table_to_json

from . import ceilings, record
from .clock import Clock
from .kernels import KERNELS
from .measure import Measurement, Run, Task, Work, run, works
from .plots import draw
from .rivals import BACKEND
from .settings import Settings
from .stages import STAGES, Stage, stage_works
from .table import sections
from .tune import tune

TUNING = 0.5  # of the time that is allowed, where tuning comes first
Say = Callable[[str], None]


def _say(line: str) -> None:
    print(line, flush=True)


def tuned_and_measured(
    asked: Settings,
    clock: Clock,
    gpu: str,
    *,
    now: Callable[[], float] = monotonic,
    say: Say = _say,
    backend: str = BACKEND,
    stages: tuple[Stage, ...] = STAGES,
) -> None:
    """Everything that the settings ask for, within their seconds; `gpu` is the name of the device."""
    # what is saved of a compiled graph must last for several backwards over it
    with functorch_config.patch(donated_buffer=False):
        _tuned_and_measured(asked, clock, gpu, now, say, backend, stages)


def _tuned_and_measured(
    asked: Settings,
    clock: Clock,
    gpu: str,
    now: Callable[[], float],
    say: Say,
    backend: str,
    stages: tuple[Stage, ...],
) -> None:
    start = now()
    ordered = sorted(
        works(asked.kernels, asked.dtypes, asked.rivals, asked.passes, backend), key=lambda work: work.rank
    )
    machine = record.where(gpu)
    if asked.tune:
        end = start + TUNING * asked.limit
        _tuned(ordered, clock, gpu, lambda: end - now(), say, machine)
    tasks: list[Task] = [*ordered, *(stage_works(asked.dtypes, stages) if asked.stages else [])]
    tops = ceilings.measured(clock, dict.fromkeys((*asked.dtypes, "bf16")))
    path = asked.out / "kernels.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def keep(found: Run) -> None:
        """After every task, so that a run that is stopped keeps what it has."""
        new = record.content(found, tops, machine, now() - start)
        path.write_text(json.dumps(record.merged(new, path), indent=1) + "\n")

    keep(run(tasks, clock, tops, lambda: start + asked.limit - now(), say, keep))
    _finish(asked, say)


def _tuned(
    ordered: Sequence[Work],
    clock: Clock,
    gpu: str,
    left: Callable[[], float],
    say: Say,
    machine: dict[str, str],
) -> None:
    """Write the table of this GPU, for this run too."""
    before = table_of(gpu)
    found = tune(ordered, clock, gpu, left, say, before)
    measured = {key: machine[key] for key in (*record.SAME, "date")}
    path = path_of(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table_to_json(replace(found, measured=measured)))
    forget_tables()
    say(f"table: {path}")


def _finish(asked: Settings, say: Say) -> None:
    """Page, figures, and the targets on the terminal."""
    path = asked.out / "kernels.json"
    content = json.loads(path.read_text())
    found = record.measurements(content)
    notes = {kernel.name: kernel.note for kernel in KERNELS}
    made = sections(found, record.ceilings_of(content), content["skipped"], notes, is_complete(found))
    path.with_suffix(".md").write_text(record.page(made, content))
    for section in made[-4:]:
        say(text(section))
    say(f"table: {path.with_suffix('.md')}")
    if asked.plots:
        say(_drawn(found, asked, content["machine"]["gpu"]))


def is_complete(found: Sequence[Measurement]) -> bool:
    """Whether every operator and stage was measured at each of its sizes, in bf16 and fp32."""
    dtypes = ("bf16", "fp32")
    wanted = {(work.kernel.name, str(work.size), work.dtype) for work in works(KERNELS, dtypes, ())}
    wanted |= {("stage", f"samples={work.samples}", work.dtype) for work in stage_works(dtypes)}
    return wanted <= {(m.kernel, m.size, m.dtype) for m in found}


def _drawn(found: Sequence[Measurement], asked: Settings, gpu: str) -> str:
    try:
        written = draw(found, asked.out, gpu)
    except ImportError:
        return "no figures: matplotlib is not installed; pip install -e '.[plot]' in the checkout brings it"
    return f"figures: {', '.join(map(str, written))}" if written else "no figures: nothing was measured"
