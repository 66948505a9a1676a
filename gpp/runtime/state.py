"""What a rank keeps of its stages between steps: parameters, buffers, gradients, optimizer.

Gradients live in flat buffers, one for each group of ranks that sums them, so a reduction needs no copy.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpp.plan import StageGraph
from gpp.program.stage import StageProgram

from .communicator import Communicator
from .reduce import ordered_sum, slot_sum
from .sharding import hand_round, share_out

MakeOptimizer = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


ABSENT = -1.0  # in place of the norm of a gradient that a rank does not have


@dataclass(frozen=True)
class Clipping:
    """Clip by the global norm: `max_norm`, over all parameters in the order of `names` (the model's own)."""

    max_norm: float
    names: tuple[str, ...]


class StageState:
    """Parameters and buffers by full name, and everything an update needs, of all stages of a rank.

    `arguments[stage]` and `buffer_arguments[stage]` are what the stage's functions take. Gradients of the
    micro-batches are summed, scaled by one over the loss weight, clipped, and handed to the optimizer: any
    class of torch.optim. `rank` is needed where the plan shares the optimizer's state out over replicas.
    """

    def __init__(
        self,
        programs: Sequence[StageProgram],
        graph: StageGraph,
        values: Mapping[str, Tensor],
        make_optimizer: MakeOptimizer,
        clipping: Clipping | None = None,
        rank: int = -1,
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
        self.arguments = {p.stage: [data[name] for name in p.parameters] for p in programs}
        self.buffer_arguments = {p.stage: [self.buffers[name] for name in p.buffers] for p in programs}
        self.learning = {p.stage: tuple(n for n in p.parameters if learns[n]) for p in programs}
        self.trainable = tuple(n for n, p in self.parameters.items() if p.requires_grad)
        self._flats = _flat_gradients(self, graph)
        self.gradients = {name: view for flat in self._flats.values() for name, view in flat.views.items()}
        self._reached: set[str] = {n for (k, _), f in self._flats.items() if k.shared >= 0 for n in f.views}
        self._norms: dict[str, float] | None = None
        self.sharding = share_out(graph, programs, values) if rank >= 0 else None
        owner = self.sharding.owner if self.sharding is not None else {}
        learning = [(name, self.parameters[name]) for name in self.trainable if owner.get(name, rank) == rank]
        self.optimizer = make_optimizer(learning) if learning else None

    def accumulate(self, stage: int, gradients: Sequence[Tensor | None]) -> None:
        """Add one micro-batch's gradients, in the order of the stage's trainable parameters."""
        for name, gradient in zip(self.learning[stage], gradients, strict=True):
            if gradient is not None:
                self.gradients[name].add_(gradient)
                self._reached.add(name)

    def reduce(self, comm: Communicator, group: tuple[int, ...], stage: int, shared: int) -> None:
        """Sum a stage's untied gradients (shared = -1) or one tied group's over `group`."""
        wanted = _Key(shared) if shared >= 0 else _Key(stage=stage)
        for (key, _), flat in self._flats.items():
            if key == wanted:
                host = flat.memory.cpu()  # the same tensor on a CPU: messages lie in host memory
                ordered_sum(comm, group, host)
                if host is not flat.memory:
                    flat.memory.copy_(host)

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

    def gather_norms(self, comm: Communicator, group: tuple[int, ...]) -> None:
        """Every rank's norms, each parameter's once: replicas and tied copies have the same gradient."""
        assert self.clipping is not None
        mine = self.norms()
        slots = [mine.get(name, ABSENT) for name in self.clipping.names]
        gathered = slot_sum(comm, group, slots)
        self._norms = {}
        for name, column in zip(self.clipping.names, zip(*gathered, strict=True), strict=True):
            owned = [norm for norm in column if norm != ABSENT]  # not a number counts: it must not be hidden
            if owned:
                self._norms[name] = owned[0]

    def update(self) -> float | None:
        """Clip, step, and clear the gradients. Returns the global norm if it was asked for."""
        norm = self._clip() if self.clipping is not None else None
        for name, parameter in self.parameters.items():
            parameter.grad = self.gradients[name] if name in self._reached else None
        if self.optimizer is not None:
            with torch.enable_grad():
                self.optimizer.step()
        for flat in self._flats.values():
            flat.memory.zero_()
        return norm

    def spread(self, comm: Communicator) -> None:
        """After an update: what each replica has updated alone goes to the others."""
        if self.sharding is not None:
            hand_round(comm, self.sharding, self.parameters)

    def _clip(self) -> float:
        """As torch.nn.utils.clip_grad_norm_ does it on one device, to the bit."""
        assert self.clipping is not None
        norms = self._norms if self._norms is not None else self.norms()
        self._norms = None
        found = [norms[name] for name in self.clipping.names if name in norms]
        total = torch.linalg.vector_norm(torch.tensor(found, dtype=self._dtype()))
        coefficient = torch.clamp(self.clipping.max_norm / (total + 1e-6), max=1.0)
        for flat in self._flats.values():
            flat.memory.mul_(coefficient.to(flat.memory.device))
        return float(total)

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
