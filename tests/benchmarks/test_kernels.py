"""benchmarks.kernels without a GPU: cases on tiny inputs with a clock that is made up, verdicts, tables."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from benchmarks.kernels import ceilings, counts, record, report, resources, stages, targets
from benchmarks.kernels.ceilings import Ceilings
from benchmarks.kernels.clock import Call, CudaClock, Spread, spread
from benchmarks.kernels.kernels import KERNELS
from benchmarks.kernels.measure import Measurement, Run, run, works
from benchmarks.kernels.rivals import MISSING, OURS, RIVALS, version
from benchmarks.kernels.settings import chosen, settings
from benchmarks.kernels.table import sections
from benchmarks.kernels.tune import tune
from benchmarks.kernels.work import PASSES, Cost, Kernel, Size
from benchmarks.report import text
from kernels import dropout, tuning
from kernels.tuning import Table, tuned, using
from launch.problems import SettingsError
from launch.start import CONF
from tests.thorough import thorough

GPU = "Made-up GPU"
TOPS = Ceilings(copy=4e12, product={"bf16": 8e14, "fp32": 5e13})
ROOT = Path(__file__).parents[2]


class MadeUpClock:
    """Runs every call once; its seconds are made up."""

    device = torch.device("cpu")

    def __init__(self, seconds: Callable[[], float] = lambda: 1e-4) -> None:
        self.seconds = seconds

    def sets(self, size: int) -> int:
        return 2

    def scope(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def gpu(self, calls: Sequence[Call]) -> Spread:
        for call in calls:
            call()
        return spread([self.seconds()] * 3)

    def wall(self, calls: Sequence[Call]) -> Spread:
        return spread([2 * self.seconds()])

    def forget(self) -> None:
        torch.compiler.reset()


def tiny(kernel: Kernel, dtypes: tuple[str, ...] = ("bf16", "fp32")) -> Kernel:
    return replace(kernel, sizes=(Size("tiny", kernel.tiny, dtypes),))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_case_runs_and_all_sides_compute_the_same(kernel: Kernel) -> None:
    for work in works([tiny(kernel)], ("bf16", "fp32"), RIVALS, backend="eager"):
        found = list(work.run(MadeUpClock(), TOPS))
        wrong = [m for m in found if m.note not in ("", MISSING)]
        assert wrong == []
        timed = {(m.provider, m.which) for m in found if m.gpu is not None}
        assert {(side, which) for side in (OURS, "eager", "compiled") for which in kernel.passes} <= timed
        if kernel.library is not None:
            assert ("library", "forward") in timed
        if kernel.liger is not None and version("liger-kernel") == MISSING:
            assert all(m.note == MISSING and m.gpu is None for m in found if m.provider == "liger")
            assert any(m.provider == "liger" for m in found)
        assert all(m.bytes > 0 and m.ceiling for m in found)


def test_a_rival_that_computes_something_else_is_told() -> None:
    kernel = tiny(KERNELS[0], ("fp32",))
    other = replace(kernel, eager=lambda x, weight, bias: x * weight + bias)
    (work,) = works([other], ("fp32",), ("eager",))
    assert {m.note[:7] for m in work.run(MadeUpClock(), TOPS) if m.provider == "eager"} == {"differs"}

    def fail(*_: Any) -> Any:
        raise RuntimeError("no such thing\nand more")

    (work,) = works([replace(kernel, eager=fail)], ("fp32",), ("eager",))
    failed = [m for m in work.run(MadeUpClock(), TOPS) if m.provider == "eager"]
    assert len(failed) == 3 and {m.note for m in failed} == {"RuntimeError: no such thing"}


def test_kernels_have_sizes_of_the_paper_and_costs() -> None:
    names = [kernel.name for kernel in KERNELS]
    assert len(set(names)) == len(names) and all(set(kernel.passes) <= set(PASSES) for kernel in KERNELS)
    assert {"MMT", "CANDLE", "DLRM"} <= {size.model for kernel in KERNELS for size in kernel.sizes}
    linear = next(kernel for kernel in KERNELS if kernel.name == "linear_gelu")
    numbers = {"rows": 1024, "inner": 1024, "columns": 4096}
    assert linear.cost("forward", numbers, 2).flops == 2 * 1024 * 1024 * 4096
    assert linear.cost("both", numbers, 2) == linear.cost("forward", numbers, 2) + linear.cost(
        "backward", numbers, 2
    )
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


@pytest.mark.parametrize("stage", stages.STAGES, ids=lambda stage: stage.name)
def test_stages_run_with_our_kernels_and_without(stage: stages.Stage) -> None:
    small = replace(stage, sizes=stage.tiny, samples=(4,))
    (work,) = stages.stage_works(("bf16",), (small,))
    both = replace(work, providers=(OURS, "eager"))
    found = list(both.run(MadeUpClock(), TOPS))
    assert [m.note for m in found] == ["", ""] and all(m.gpu is not None for m in found)


def made(
    kernel: str,
    provider: str,
    seconds: float | None,
    *,
    size: str = "rows=2048",
    which: str = "both",
    bytes: float = 1e8,
    share: float = 0.9,
    by: str = "bytes",
    fused: bool = False,
) -> Measurement:
    gpu = None if seconds is None else Spread(seconds, 0.9 * seconds, 1.1 * seconds)
    return Measurement(
        *(kernel, "MMT", size, "bf16", which, provider, gpu, gpu, bytes, 1e9),
        *(None if seconds is None else share * seconds, by, fused, 2048),
        note="" if seconds else "OutOfMemoryError",
    )


def verdicts(found: list[Measurement], complete: bool = True) -> list[bool | None]:
    return [section.reached for section in targets.targets(found, complete)]


GOOD = [
    made("norm", OURS, 1e-4),
    made("norm", "eager", 1.2e-4),
    made("linear", OURS, 2e-4, fused=True, by="FLOPs"),
    made("linear", "eager", 2.1e-4, fused=True, by="FLOPs"),
    made("linear", "compiled", 1.9e-4, fused=True, by="FLOPs"),
    made("stage", OURS, 1e-3),
    made("stage", "eager", 1.4e-3),
    made("stage", "inductor", 1.1e-3),
]


@pytest.mark.parametrize(
    ("changes", "reached"),
    [
        ([], [True, True, True, True]),
        ([made("norm", OURS, 1e-4, share=0.8)], [False, True, True, True]),
        ([made("norm", OURS, 1e-4, share=0.8, bytes=6e7)], [None, True, True, True]),  # too small to count
        ([made("norm", OURS, None)], [False, True, False, True]),
        ([made("norm", OURS, 1.6e-4)], [True, True, False, True]),  # below 0.8 of eager's speed
        ([made("norm", OURS, 1.3e-4)], [True, True, False, True]),  # above, but the mean is below 1
        ([made("linear", OURS, 2.2e-4, fused=True, by="FLOPs")], [True, False, True, True]),
        ([made("stage", OURS, 1.2e-3)], [True, True, True, False]),
        ([made("stage", "inductor", 0.9e-3)], [True, True, True, False]),
        ([made("stage", "inductor", None)], [True, True, True, False]),
    ],
)
def test_targets(changes: list[Measurement], reached: list[bool | None]) -> None:
    replaced = {m.key: m for m in changes}
    assert verdicts([replaced.get(m.key, m) for m in GOOD]) == reached


def test_targets_of_a_part_are_not_reached() -> None:
    assert verdicts([]) == [None] * 4
    assert verdicts(GOOD, complete=False) == [None] * 4
    worse = [made("norm", OURS, 1.6e-4), *GOOD[1:]]
    assert verdicts(worse, complete=False) == [None, None, False, None]
    assert targets.PART in targets.targets(GOOD, False)[0].measured
    assert not report.is_complete(GOOD)


def test_the_page(tmp_path: Path) -> None:
    found = [*GOOD, made("norm", "liger", None), made("norm", OURS, 5e-5, which="forward")]
    page = sections(found, TOPS, ["norm rows=1 bf16"], {"norm": "A note."}, True)
    names = [section.name for section in page]
    assert names[:4] == ["ceilings", "norm", "linear", "stage"] and len(set(names)) == len(names)
    assert names[-5:] == ["skipped", "bandwidth", "fused-linear", "fastest", "stages"]
    for section in page:
        assert all(len(row) == len(section.columns) for row in section.rows) and text(section)
    written = record.page(page, {"seconds": 3.0, "machine": record.where(GPU)})
    assert f"{GPU} (driver" in written and "| 100 (90-110) |" in written and "OutOfMemoryError" in written
    assert "A note." in written and "4000 GB/s" in written


def test_later_runs_keep_what_was_measured_on_the_same_gpu(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    first = record.content(Run(tuple(GOOD[:2]), ()), TOPS, record.where(GPU), 1.0)
    path.write_text(json.dumps(first))
    faster = made("norm", OURS, 5e-5)
    second = record.content(Run((faster,), ()), TOPS, record.where(GPU), 1.0)
    assert set(record.measurements(record.merged(second, path))) == {faster, GOOD[1]}
    other = {**second, "machine": record.where("another GPU")}
    assert record.measurements(record.merged(other, path)) == [faster]
    assert record.ceilings_of(json.loads(path.read_text())) == TOPS


def test_what_there_is_no_time_for_is_named() -> None:
    kernel = tiny(KERNELS[0], ("fp32",))
    late = replace(kernel.sizes[0], model="late", rank=2)
    tasks = works([replace(kernel, sizes=(late, kernel.sizes[0]))], ("fp32",), ())
    left = iter((1.0, -1.0))
    said: list[str] = []
    done = run(tasks, MadeUpClock(), TOPS, lambda: next(left), said.append)
    assert {m.model for m in done.measurements} == {"tiny"} and len(said) == 1
    assert done.skipped == (str(tasks[0]),) == ("layer_norm rows=5 width=24 fp32",)


@pytest.mark.parametrize("capturable", [True, False])
def test_the_clock_of_a_gpu_counts_calls(capturable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that takes a tenth of a millisecond for a call, in a graph or by itself."""
    done, held = [0], [0]
    capturing = [False]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0

        def record(self, stream: object) -> None:
            self.at = done[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return 0.1 * (end.at - self.at)

    class Graph:
        def replay(self) -> None:
            done[0] += held[0]

    @contextmanager
    def graph(made: Graph, stream: object) -> Iterator[None]:
        capturing[0] = True
        yield
        capturing[0] = False

    def call() -> None:
        if not capturing[0]:
            done[0] += 1
        elif capturable:
            held[0] += 1
        else:
            capturing[0] = False
            raise RuntimeError("operation not permitted when stream is capturing")

    for name, value in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "Stream": lambda device: SimpleNamespace(synchronize=lambda: None),
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=50, total_memory=4096),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    clock = CudaClock(0.01, torch.device("cuda", 0))
    found = clock.gpu([call] * 3)
    assert found.median == pytest.approx(1e-4) and found.graph == capturable
    assert held[0] % 3 == 0 and (held[0] > 3) == capturable
    assert clock.wall([call] * 3).median > 0
    assert [clock.sets(size) for size in (1, 10, 30, 1000)] == [64, 10, 4, 1]


class OnGpu:
    is_cuda = True
    device = torch.device("cuda", 0)
    dtype = torch.float32


@pytest.fixture
def table_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tuned")
    monkeypatch.setattr(tuning, "gpu_name", lambda index: GPU)
    tuning.forget_tables()
    yield tmp_path / "tuned"
    tuning.forget_tables()


def choose() -> Any:
    return tuned("dropout", dropout.STATIC, OnGpu(), count=1000)


def toy(fails: int = 0) -> Kernel:
    """An operator that asks for a configuration, and whose launch is refused with `fails` elements."""

    def ours(x: torch.Tensor) -> torch.Tensor:
        if choose().elements == fails:
            raise tuning.REFUSALS[1](1, 2, "shared memory")
        return 2 * x

    return Kernel(
        name="toy",
        ours=ours,
        eager=lambda x: x + x,
        inputs=lambda numbers, make: (make.normal(numbers["rows"], grad=True),),
        costs=lambda numbers, itemsize: (Cost(8.0), Cost(8.0)),
        sizes=(Size("tiny", {"rows": 3}, ("fp32",)),),
        tiny={"rows": 3},
    )


def seconds() -> float:
    """Fastest with 4096 elements, then with 2048, and with as many warps as can be."""
    return 1.0 / (choose().elements + choose().warps)


@pytest.mark.parametrize(("fails", "elements"), [(0, 4096), (4096, 2048)])
def test_tuning_finds_the_fastest_that_runs(table_folder: Path, fails: int, elements: int) -> None:
    said: list[str] = []
    before = Table(GPU, {"dropout": {"float32 count=2": {"warps": 2}}})
    found = tune(
        works([toy(fails)], ("fp32",), ()), MadeUpClock(seconds), GPU, lambda: 1.0, said.append, before
    )
    bucket = "float32 count=1024"
    assert found.operators["dropout"] == {"float32 count=2": {"warps": 2}, bucket: {"elements": elements}}
    assert said == [f"dropout {bucket}: {{'elements': {elements}}}"]
    assert choose() == dropout.STATIC  # nothing is left behind
    with using(found):
        assert choose().elements == elements
    none = tune(works([toy()], ("fp32",), ()), MadeUpClock(seconds), GPU, lambda: 0.0, said.append)
    assert none == Table(GPU, {})


def test_a_whole_run(tmp_path: Path, table_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "COPY", 1024)
    monkeypatch.setattr(ceilings, "MATRIX", 16)
    config = OmegaConf.merge(
        OmegaConf.load(CONF / "benchmark_kernels.yaml"), {"tune": True, "stages": False, "out": str(tmp_path)}
    )
    del config["hydra"], config["defaults"]
    asked = replace(settings(config), kernels=(toy(), tiny(KERNELS[1])))
    said: list[str] = []
    report.tuned_and_measured(asked, MadeUpClock(seconds), GPU, say=said.append, backend="eager")
    assert {path.name for path in tmp_path.iterdir()} >= {"kernels.json", "kernels.md"}
    written = tuning.read_table(table_folder / "made_up_gpu.json")
    assert written.operators == {"dropout": {"float32 count=1024": {"elements": 4096}}}
    assert written.measured["gpu"] == GPU and choose().elements == 4096
    page = (tmp_path / "kernels.md").read_text()
    assert "| toy: microseconds of a call |" in page and targets.PART in page
    assert any(line.startswith("== stages") for line in said)
    if version("matplotlib") != MISSING:
        assert (tmp_path / "kernels-speed.svg").stat().st_size > 1000


def test_resources() -> None:
    row = {"kernel": "product_kernel", "case": "torch.bfloat16 relu", "registers": 98, "stack": 0}
    row |= {"shared": 98304, "wgmma": 16}
    right = resources.section(90, [row, row | {"kernel": "dropout_kernel", "wgmma": 0}])
    assert right.reached and "2 kernels in 2 variants" in right.what and text(right)
    for wrong in ({"stack": 8}, {"shared": 232449}, {"wgmma": 0}):
        assert resources.section(90, [row | wrong]).reached is False
    assert resources.section(80, [row | {"wgmma": 0}]).reached
    assert resources.section(90, [row | {"case": "torch.float32 none", "wgmma": 0}]).reached


def test_launch_counts() -> None:
    tiny = replace(stages.STAGES[2], sizes=stages.STAGES[2].tiny)
    section = counts.launch_counts({"DLRM": stages.traced(tiny, "fp32", torch.device("cpu"))})
    ((_, before, after, share, own),) = section.rows
    assert section.reached and 0 < int(own or 0) <= int(after or 0) < int(before or 0)
    assert share == int(after or 0) / int(before or 1) and text(section)


def test_settings(tmp_path: Path) -> None:
    assert [kernel.name for kernel in chosen(["linear", "rms_norm"])] == [
        "rms_norm",
        *(kernel.name for kernel in KERNELS if kernel.name.startswith("linear_")),
    ]
    assert chosen(["all"]) == KERNELS and chosen(["none"]) == ()
    whole = OmegaConf.load(CONF / "benchmark_kernels.yaml")
    del whole["hydra"], whole["defaults"]
    for change, message in (
        ({"kernel": "gemm"}, "kernel must be all, none or some of layer_norm, "),
        ({"dtype": ["bf17"]}, "dtype must be some of bf16, fp16, fp32, one is 'bf17'"),
        ({"tune": 1}, "tune must be true or false, it is 1"),
        ({"limit_seconds": 0}, "limit_seconds must be larger than 0, it is 0"),
        ({"kernels": "x"}, "there is no key kernels"),
    ):
        with pytest.raises(SettingsError, match=message):
            settings(OmegaConf.merge(whole, change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("several", [(), pytest.param(("-m",), marks=thorough)])
def test_without_a_gpu_one_line_is_said_and_nothing_written(tmp_path: Path, several: tuple[str]) -> None:
    asked = (*several, f"out={tmp_path}/results", "dtype=bf16", "tune=true")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", *asked],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "benchmarks.kernels: there is no GPU here, so nothing is measured and nothing is written\n"
    )
    assert list(tmp_path.iterdir()) == []
