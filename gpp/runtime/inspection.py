"""One rank's part of running a step once more, to see where what is not finite came from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, fx

from gpp.program.nonfinite import Given, Inspector, Mark, Passed, Place, Source, not_a_number
from gpp.program.stage import StageProgram, TermSum, TrainFunctions
from gpp.schedule.task import Pass, Samples

from .binding import Call

Name = tuple[bool, str]  # of a value between stages, or (True) of its gradient
_Argument = tuple[str, str] | Passed | Mark | None  # (what, name) of something given; marks of the stash


@dataclass
class Found:
    """What a rank has seen: the values that it sent and were not finite, with the samples that they are of,
    and where those in the loss and in the gradients of parameters come from."""

    sent: dict[Name, list[tuple[Samples, tuple[Source, ...]]]] = field(default_factory=dict)
    ends: dict[Source, None] = field(default_factory=dict)


class Inspection:
    """Makes functions of a rank's stages that look at everything they compute."""

    def __init__(self, rank: int, programs: Sequence[StageProgram], loss: TermSum) -> None:
        self.found = Found()
        self._rank = rank
        self._programs = {program.stage: program for program in programs}
        self._loss = {name for name, _ in (*loss.terms, *(loss.weight or ()))}
        self._stash: dict[tuple[int, Samples], list[Mark | None]] = {}  # what a pass leaves to the next

    def functions(self, call: Call) -> TrainFunctions:
        """Those of a pass."""
        made = call.functions.with_graphs_run_by
        assert made is not None  # emulated devices compute nothing that could be wrong
        return made(partial(self._run, call))

    def _run(self, call: Call, kind: Pass, graph: fx.GraphModule, arguments: list[Tensor]) -> Sequence[Any]:
        samples, face = call.task.samples, self._programs[call.task.stage].train
        place = Place(self._rank, call.task.stage, samples, kind is not Pass.FORWARD)
        key = (call.task.stage, samples)
        known = self._known(call, kind, len(arguments))
        sums = [i for i, argument in enumerate(known) if argument == _SUM]
        for i in sums:
            if not_a_number(arguments[i]) is not None:
                arguments[i].zero_()  # by an earlier pass, which has been seen

        def label(position: int, value: Tensor, nan: bool) -> tuple[Source, ...]:
            match known[position]:
                case Mark() as mark:
                    return mark.sources
                case Passed() as passed:
                    return (passed,)
                case ("key", name):
                    return (Given(place, "key", name, _rows(value, samples), nan),)
                case (what, name):
                    return (Given(place, what, name, samples, nan),)
                case None:
                    return ()

        inspector = Inspector(graph, place, label)
        results, marks = inspector.inspect(arguments)
        match kind:
            case Pass.FORWARD:
                outputs, terms = len(face.outputs), len(face.outputs) + len(face.terms)
                self._send([(False, v.name) for v in face.outputs], samples, marks[:outputs])
                of_terms = zip(face.terms, marks[outputs:terms], strict=True)
                self._end(mark for name, mark in of_terms if name in self._loss)
                self._stash[key] = marks[terms:]
            case Pass.BACKWARD_INPUT:
                names = [(True, v.name) for v in face.inputs if v.needs_grad]
                self._send(names, samples, marks[: len(names)])
                self._stash[key] = marks[len(names) :]
            case _:
                left = inspector.arguments()
                self._end(left[i] for i in sums)
        return results

    def _known(self, call: Call, kind: Pass, count: int) -> list[_Argument]:
        """What the `count` arguments of a pass's graph are."""
        program = self._programs[call.task.stage]
        samples, face = call.task.samples, program.train
        names = [*program.parameters, *(program.parameters[c.position] for c in call.functions.casts)]
        known: list[_Argument] = [("parameter", name) for name in names]
        stash = self._stash.get((call.task.stage, samples), [])
        match kind:
            case Pass.FORWARD:
                known += [("buffer", name) for name in program.buffers]
                known += [Passed(False, value.name, samples) for value in face.inputs]
                known += [("key", name) for name in face.batch_keys]
            case Pass.BACKWARD_INPUT:
                known += stash
                known += [Passed(True, value.name, samples) for value in face.outputs if value.needs_grad]
            case _:
                known += [_SUM] * (count - len(known) - len(stash))
                known += stash
        return [*known, *[None] * (count - len(known))]  # a forward's last one is the position

    def _send(self, names: Sequence[Name], samples: Samples, marks: Sequence[Mark | None]) -> None:
        for name, mark in zip(names, marks, strict=True):
            if mark is not None:
                self.found.sent.setdefault(name, []).append((samples, mark.sources))

    def _end(self, marks: Iterable[Mark | None]) -> None:
        self.found.ends |= dict.fromkeys(source for mark in marks if mark for source in mark.sources)


_SUM = ("sum", "")


def _rows(value: Tensor, samples: Samples) -> Samples:
    """The first to the last sample of which something is not finite."""
    wrong = (~value.flatten(1).isfinite()).any(1) if value.dim() > 1 else ~value.isfinite()
    rows = wrong.nonzero().flatten().tolist()
    return Samples(samples.start + rows[0], samples.start + rows[-1] + 1)
