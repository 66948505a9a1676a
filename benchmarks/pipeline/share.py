"""How much of the ideal step a runtime keeps: gpp, torch's pipelining and bare MPI, in turns."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from benchmarks.section import Cell, Section

from .jobs import measured


@dataclass(frozen=True)
class Case:
    """A chain (see `chains.Chain`), and the share that is to be reached."""

    ranks: int
    micro_batches: int
    forward: float
    bytes: int
    reach: float

    @property
    def ideal(self) -> float:
        """Seconds of a step without any cost but the passes: (M + P - 1)(F + B)."""
        return (self.micro_batches + self.ranks - 1) * 3 * self.forward


CASES = (
    Case(4, 8, 10e-3, 1 << 10, 0.97),
    Case(4, 16, 2e-3, 1 << 10, 0.92),
    Case(4, 16, 2e-3, 2 << 20, 0.80),
    Case(8, 16, 10e-3, 1 << 10, 0.96),
)
OF_BARE = 0.97
SECONDS = 2.0  # of steps for each side and round


def share_of_ideal(cases: Sequence[Case] = CASES, seconds: float = SECONDS) -> Section:
    """The ideal over the median step."""
    rows: list[tuple[Cell, ...]] = []
    reached = True
    shares: list[float] = []
    for case in cases:
        asked = {name: value for name, value in asdict(case).items() if name != "reach"}
        steps = 3 + int(seconds / case.ideal)
        found: Mapping[str, float] = measured(
            "benchmarks.pipeline.chains", case.ranks, {"case": asked, "steps": steps}
        )
        share = {side: case.ideal / step for side, step in found.items()}
        of_bare = share["gpp"] / share["bare"]
        good = share["gpp"] >= case.reach and share["gpp"] > share["torch"] and of_bare >= OF_BARE
        reached &= good
        shares.append(share["gpp"])
        rows.append(
            (
                *(case.ranks, case.micro_batches, case.forward * 1e3, case.bytes),
                *(case.reach, share["gpp"], share["torch"], share["bare"], of_bare, good),
            )
        )
    return Section(
        name="share",
        what="share of the ideal step (M + P - 1)(F + B), stages that sleep f forward and 2 f backward",
        reach=f"{' / '.join(f'{case.reach:.2f}' for case in cases)}, above torch's in each, at least "
        f"{OF_BARE} of "
        "the bare loop",
        measured=" / ".join(f"{share:.3f}" for share in shares),
        reached=reached,
        columns=(
            *("P", "M", "f (ms)", "message (bytes)", "to reach"),
            *("gpp", "torch.distributed.pipelining", "bare mpi4py loop", "gpp / bare", "reached"),
        ),
        rows=tuple(rows),
        note="The three sides run in turns in the same processes, medians over all rounds. torch: "
        "Schedule1F1B over "
        "gloo. The bare loop posts receives ahead and waits in MPI. All sleep with one function, whose "
        "timer slack "
        "is set to nothing; a backward is one sleep on every side.",
    )
