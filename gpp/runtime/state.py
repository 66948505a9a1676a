"""What a rank keeps of its stages between steps: parameters, buffers, gradients, optimizer.

Gradients live in flat buffers, one for each group of ranks that sums them, so a reduction needs no copy.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from gpp.plan import StageGraph
from gpp.program.stage import StageProgram

from .communicator import Communicator
from .finite import FiniteCheck, is_finite
from .reduce import MakeSum, OrderedSum, Slots, Sum
from .sharding import HandRound, share_out

MakeOptimizer = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], LRScheduler]

ABSENT = -1.0  # in place of the norm of a gradient that a rank does not have


@dataclass(frozen=True)
class Clipping:
    """Clip by the global norm: `max_norm`, over all parameters in the order of `names` (the model's own).

    An infinite `max_norm` clips nothing: the norm is only wanted."""

    max_norm: float
    names: tuple[str, ...]


class StageState:
    """Parameters and buffers by full name, and everything an update needs, of all stages of a rank.

    `arguments[stage]` and `buffer_arguments[stage]` are what the stage's functions take. Gradients of the
    micro-batches are summed, scaled by one over the loss weight, clipped, and handed to the optimizer: any
    class of torch.optim. `rank` is needed where the plan shares the optimizer's state out over replicas.
    `scheduler` makes what changes the learning rates: on every rank, also where the stages learn nothing.
    `ema` is the decay of the parameters' moving average, `averages`, which starts from the initial values.
    With `check_finite` all ranks know before an update whether losses and gradients are finite, and can leave
    a step out.
    """

    def __init__(
        self,
        programs: Sequence[StageProgram],
        graph: StageGraph,
        values: Mapping[str, Tensor],
        make_optimizer: MakeOptimizer,
        clipping: Clipping | None = None,
        rank: int = -1,
        *,
        scheduler: MakeScheduler | None = None,
        ema: float | None = None,
        check_finite: bool = False,
    ) -> None:
        self.clipping = clipping
        learns = {
            name: trainable
            for program in programs
            for name, trainable in zip(program.parameters, program.trainable, strict=True)
        }
        self.parameters = {
            name: nn.Parameter(values[name], requires_grad=trainable) for name, trainable in learns.items()
        }
        self.buffers = {name: values[name] for program in programs for name in program.buffers}
        data = {name: p.detach() for name, p in self.parameters.items()}
        # parameters in lower precision, for the stages that compute with them
        wanted = {(p.parameters[c.position], c.dtype) for p in programs for c in p.casts}
        self._casts = {(name, dtype): data[name].to(dtype) for name, dtype in wanted}
        self.arguments = {
            p.stage: [
                *(data[name] for name in p.parameters),
                *(self._casts[p.parameters[c.position], c.dtype] for c in p.casts),
            ]
            for p in programs
        }
        self.buffer_arguments = {p.stage: [self.buffers[name] for name in p.buffers] for p in programs}
        self.learning = {p.stage: tuple(n for n in p.parameters if learns[n]) for p in programs}
        self.trainable = tuple(n for n, p in self.parameters.items() if p.requires_grad)
        self._flats = _flat_gradients(self, graph)
        self.gradients = {name: view for flat in self._flats.values() for name, view in flat.views.items()}
        self.sums = {
            stage: [self.gradients[name] for name in names] for stage, names in self.learning.items()
        }
        self._reached: set[str] = {n for (k, _), f in self._flats.items() if k.shared >= 0 for n in f.views}
        self._norms: dict[str, float] | None = None
        self.make_sum: MakeSum = OrderedSum  # of gradients, over replicas or tied copies
        # what ranks exchange in every step, made in the first one
        self._sums: dict[tuple[_Key, torch.dtype, tuple[int, ...]], Sum] = {}
        self._slots = Slots()
        self._hand_round: HandRound | None = None
        self.norm: float | None = None
        self.sharding = share_out(graph, programs, values) if rank >= 0 else None
        owner = self.sharding.owner if self.sharding is not None else {}
        self.updated = tuple(name for name in self.trainable if owner.get(name, rank) == rank)
        learning = [(name, self.parameters[name]) for name in self.updated]
        self.optimizer = make_optimizer(learning or [("", nn.Parameter(torch.zeros(1, 1)))])
        self._begun = deepcopy(self.optimizer.state_dict())
        self._makers = (make_optimizer, scheduler)
        self.scheduler = scheduler(self.optimizer) if scheduler is not None else None
        self.ema = ema
        self.averages = {n: data[n].clone() for n in self.trainable} if ema is not None else {}
        written = {name: self.buffers[name] for program in programs for name in program.written}
        self._check = (
            FiniteCheck([flat.memory for flat in self._flats.values()], written) if check_finite else None
        )

    def reach(self, stage: int, found: Sequence[bool]) -> None:
        """Which of the stage's trainable parameters have had a gradient added to their sums; the others are
        left alone by the optimizer."""
        self._reached.update(
            name for name, is_reached in zip(self.learning[stage], found, strict=True) if is_reached
        )

    def reduce(self, comm: Communicator, group: tuple[int, ...], stage: int, shared: int) -> None:
        """Sum a stage's untied gradients (shared = -1) or one tied group's over `group`."""
        wanted = _Key(shared) if shared >= 0 else _Key(stage=stage)
        for (key, dtype), flat in self._flats.items():
            if key == wanted:
                made = (key, dtype, group)
                if made not in self._sums:
                    self._sums[made] = self.make_sum(comm, group, flat.memory)
                self._sums[made].run()

    def scale(self, weight: float) -> None:
        """Divide the summed gradients by the loss weight."""
        for flat in self._flats.values():
            flat.memory.div_(weight)

    def norms(self) -> dict[str, float]:
        """The norm of each gradient."""
        return {
            name: float(torch.linalg.vector_norm(self.gradients[name]))
            for name in self.trainable
            if name in self._reached
        }

    @property
    def checks_finite(self) -> bool:
        """Whether a step that is not finite is to be undone."""
        return self._check is not None

    def begin(self) -> None:
        """Before a training step: remember what it changes before anybody knows how it ends."""
        if self._check is not None:
            self._check.begin()

    def undo(self) -> tuple[str, ...]:
        """Leave the step out, in place of an update. Returns the parameters whose gradients are not finite:
        on each rank, of its own."""
        wrong = tuple(name for name, gradient in self.gradients.items() if not is_finite(gradient))
        for flat in self._flats.values():
            flat.memory.zero_()
        self._norms = None
        if self._check is not None:
            self._check.undo()
        return wrong

    def gather_norms(self, comm: Communicator, group: tuple[int, ...], *, finite_loss: bool = True) -> bool:
        """Every rank's norms, each parameter's once: replicas and tied copies have the same gradient. Returns
        whether losses, gradients and their norm are finite on all ranks; True where nobody checks."""
        names = () if self.clipping is None else self.clipping.names
        mine = {} if self.clipping is None else self.norms()
        slots = [mine.get(name, ABSENT) for name in names]
        if self._check is not None:
            norms = mine.values()
            finite = all(map(math.isfinite, norms)) if self.clipping is not None else self._check.is_finite()
            slots.append(float(finite_loss and finite))
        gathered = self._slots.gather(comm, group, slots)
        good = self._check is None or all([row.pop() for row in gathered])  # a list: all are popped
        if self.clipping is None:
            return good
        self._norms = {}
        for name, column in zip(names, zip(*gathered, strict=True), strict=True):
            owned = [norm for norm in column if norm != ABSENT]  # not a number counts: it must not be hidden
            if owned:
                self._norms[name] = owned[0]
        self.norm = float(self._total(self._norms))
        return good and (self._check is None or math.isfinite(self.norm))

    def update(self) -> float | None:
        """Clip, step, and clear the gradients. Returns the global norm if it was asked for."""
        if self.clipping is not None:
            self._clip(self.clipping.max_norm)
        for name, parameter in self.parameters.items():
            parameter.grad = self.gradients[name] if name in self._reached else None
        with torch.enable_grad():
            self.optimizer.step()
        for flat in self._flats.values():
            flat.memory.zero_()
        return self.norm

    def spread(self, comm: Communicator) -> None:
        """After an update: what each replica has updated alone goes to the others, and all go into the
        moving average and into the copies in lower precision."""
        if self.sharding is not None:
            if self._hand_round is None:
                self._hand_round = HandRound(comm, self.sharding, self.parameters)
            self._hand_round.run()
        if self.ema is not None:
            for name, average in self.averages.items():
                average.lerp_(self.parameters[name].detach(), 1 - self.ema)
        self.renew_casts()

    def renew_casts(self) -> None:
        """The copies in lower precision anew: to be called by whoever has written to the parameters."""
        for (name, _), copy in self._casts.items():
            copy.copy_(self.parameters[name].detach())

    @property
    def learning_rate(self) -> float:
        """That of the first group of parameters; the same on every rank."""
        return float(self.optimizer.param_groups[0]["lr"])

    def advance(self) -> None:
        """The end of a step: the next one's learning rates. To be called on every rank."""
        if self.scheduler is not None:
            if not self.trainable:  # no update has stepped it, and the scheduler would warn of that
                self.optimizer.step()  # its one parameter has no gradient
            self.scheduler.step()

    def rewind(self, steps: int) -> None:
        """The optimizer as it was made, without any state, and the learning rates of step `steps`."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self.optimizer.load_state_dict(deepcopy(self._begun))
        make_scheduler = self._makers[1]
        if make_scheduler is not None:
            self.scheduler = make_scheduler(self.optimizer)
            if steps:
                self.optimizer.step()  # without gradients: a scheduler warns if none came before its own
            for _ in range(steps):
                self.scheduler.step()

    def kept_by_optimizer(self) -> dict[str, set[str]]:
        """What the optimizer keeps of each parameter once it has updated it, found by updating small ones of
        the same names and numbers of dimensions."""
        named = []
        for name in self.updated:
            like = self.parameters[name]
            small = nn.Parameter(torch.zeros((2,) * like.dim(), dtype=like.dtype, device=like.device))
            small.grad = torch.zeros_like(small)
            named.append((name, small))
        if not named:
            return {}
        optimizer = self._makers[0](named)
        with torch.enable_grad():
            optimizer.step()
        return {name: set(optimizer.state.get(small, {})) for name, small in named}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters have the values of their moving averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        with torch.no_grad():
            for name, average in self.averages.items():
                parameter = self.parameters[name].detach()
                kept = parameter.clone()
                parameter.copy_(average)
                average.copy_(kept)

    def _clip(self, max_norm: float) -> None:
        """As torch.nn.utils.clip_grad_norm_ does it on one device, to the bit."""
        total = self._total(self._norms if self._norms is not None else self.norms())
        self._norms = None
        self.norm = float(total)
        if math.isinf(max_norm):
            return
        coefficient = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for flat in self._flats.values():
            flat.memory.mul_(coefficient.to(flat.memory.device))

    def _total(self, norms: Mapping[str, float]) -> Tensor:
        """The global norm, from the parameters' own in the model's order."""
        assert self.clipping is not None
        found = [norms[name] for name in self.clipping.names if name in norms]
        total: Tensor = torch.linalg.vector_norm(torch.tensor(found, dtype=self._dtype()))
        return total

    def _dtype(self) -> torch.dtype:
        return next((f.memory.dtype for f in self._flats.values()), torch.float32)


@dataclass(frozen=True)
class _Flat:
    memory: Tensor
    views: dict[str, Tensor]


@dataclass(frozen=True)
class _Key:
    """Gradients that are summed together: of a tied group, or the untied ones of a stage."""

    shared: int = -1
    stage: int = -1


def _flat_gradients(state: StageState, graph: StageGraph) -> dict[tuple[_Key, torch.dtype], _Flat]:
    """Flat memory by what is summed together and data type."""
    tied = {name: _Key(shared) for shared, item in enumerate(graph.shared) for name in item.parameters}
    groups: dict[tuple[_Key, torch.dtype], list[str]] = {}
    for stage, names in state.learning.items():
        for name in names:
            key = (tied.get(name, _Key(stage=stage)), state.parameters[name].dtype)
            if name not in groups.setdefault(key, []):
                groups[key].append(name)
    return {key: _flat(names, state.parameters) for key, names in groups.items()}


def _flat(names: Iterable[str], parameters: Mapping[str, nn.Parameter]) -> _Flat:
    chosen = {name: parameters[name] for name in names}
    first = next(iter(chosen.values()))
    memory = torch.zeros(sum(p.numel() for p in chosen.values()), dtype=first.dtype, device=first.device)
    views, start = {}, 0
    for name, parameter in chosen.items():
        views[name] = memory[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    return _Flat(memory, views)
