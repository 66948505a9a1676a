"""Whether a job ended as it should: what was left undone, in words."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path

from gpp.checkpoint.folder import Kept, check_bytes, newest, opened
from gpp.checkpoint.tensors import CheckpointError

from .cases import KEEP, SETUP_SILENCE, SILENCE, SILENT, STEPS, Case, patience
from .jobs import Ended
from .notes import Phase, Struck

CLOSE = 1e-4  # of losses of the same training, summed in other orders
_NAMED = re.compile(r"\branks? (\d+(?:(?:, | and )\d+)*)")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was wrong; nothing if all of it is empty. `seconds` from the fault to the last rank gone,
    of which `silence` were only waited for."""

    hang: str
    orphans: str
    lost: str
    other: tuple[str, ...]
    seconds: float | None
    silence: float = 0.0

    @property
    def wrong(self) -> tuple[str, ...]:
        """All that was wrong, in words."""
        return tuple(filter(None, (self.hang, self.orphans, self.lost, *self.other)))


def judge(case: Case, ended: Ended, folder: Path, losses: Sequence[float] = ()) -> Verdict:
    """`folder` is the job's; `losses` of the same job without a fault, if it is to go on."""
    if ended.struck is None:
        return Verdict("", "", "", (f"the fault did not come; code {ended.code}",), ended.last_rank)
    struck = ended.struck
    late = ended.code is None or ended.last_rank is None or ended.last_rank > patience(case)
    hang = f"not all ranks were gone {patience(case):g} s after the fault" if late else ""
    orphans = f"left behind: {'; '.join(ended.orphans)}" if ended.orphans else ""
    other = [] if late else _survived(ended, folder, losses) if case.elastic else _ended(case, ended, struck)
    return Verdict(
        hang, orphans, lost(struck, folder / "kept"), tuple(other), ended.last_rank, _silence(case, struck)
    )


def _silence(case: Case, struck: Struck) -> float:
    if case.fault not in SILENT:
        return 0.0
    return SILENCE if struck.phase is Phase.TRAINING else SETUP_SILENCE


def _ended(case: Case, ended: Ended, struck: Struck) -> list[str]:
    wrong = [] if ended.code else ["the exit code is 0"]
    if struck.phase in (Phase.SETUP, Phase.CLOSED):  # nobody watches: mpirun says something
        return wrong
    found = reports(ended.err)
    if len(found) != 1:
        wrong.append(f"there are {len(found)} reports")
    culprits = {case.rank, case.second}
    wrong += [f"a report names {sorted(n)}" for n in map(named, found) if not n & culprits]
    return wrong


def reports(text: str) -> list[str]:
    """The lines that begin reports."""
    return [line for line in text.splitlines() if line.startswith("error:")]


def named(report: str) -> set[int]:
    """The ranks whose fault it is by a report's first line."""
    match = _NAMED.search(report)
    return {int(number) for number in re.findall(r"\d+", match[1])} if match else set()


def _survived(ended: Ended, folder: Path, losses: Sequence[float]) -> list[str]:
    wrong = [] if ended.code == 0 else [f"the exit code is {ended.code}: {_last(ended.err)}"]
    found = losses_of(folder)
    if sorted(found) != list(range(STEPS)):
        return [*wrong, f"there are losses of steps {sorted(found)}"]
    off = [n for n in found if not isclose(found[n], losses[n], rel_tol=CLOSE)]
    return [*wrong, *([f"the losses of steps {off} are others"] if off else [])]


def losses_of(folder: Path) -> dict[int, float]:
    """The loss of each step of a job of launch.train, the one that counts where it was made twice."""
    file = folder / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def lost(struck: Struck, folder: Path) -> str:
    """What is wrong with the checkpoints that there were when the fault came, and should still be there."""
    try:
        whole = [path.name for path in sorted(folder.glob("step-*")) if _verified(path)]
        found, _ = newest(folder)
    except CheckpointError as error:
        return str(error)
    for name in struck.whole:
        if name not in whole and sum(other > name for other in whole) < KEEP:
            return f"{name} was whole, and of it and later ones there are {whole}"
    if found is not None and found.path.name not in whole:
        return f"{found.path} can be opened, and its bytes are damaged"
    if struck.whole and found is None:
        return "none can be opened"
    return ""


def _verified(path: Path) -> Kept | None:
    """A checkpoint that can be opened, None for what a crash left; its bytes are looked at."""
    try:
        kept = opened(path)
    except CheckpointError:
        return None
    if path.suffix:
        return None
    check_bytes(kept)
    return kept


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing was said"
