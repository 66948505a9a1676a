"""The project's own planner: the least simulated step time under each device's memory.

GraphPipe minimises the bottleneck of a stage, for one schedule. What a user waits for is the step: fill,
steady state, drain and whatever all-reduce is not hidden. So the simulator judges here, and what it can judge
may be chosen: partition, replicas, micro-batch size, schedule, what is recomputed or shared out, and places.
The search starts from the other planners' partitions, prices thousands of drafts by `pace`, and lets the
exact simulation choose among the best and the other planners' own plans: it is never worse than any of these,
which `rivals` names.
Deterministic: budgets count simulated tasks, not seconds.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from gpp.cost import CostModel
from gpp.graph import ComputationGraph
from gpp.plan import Choice, Plan, PlanError
from gpp.topology import DeviceTopology

from . import graphpipe
from .bound import bound
from .colocate import Shared, colocated
from .draft import Drafts, Part
from .estimate import Group, Problem, assemble, estimated, fits
from .exhaustive import every_memory_choice, every_partition, every_sharing
from .memory_choices import spared
from .moves import Parts
from .options import Options
from .places import matters, placed
from .polish import Shape, clipped, polish, shaped
from .rhythm import Kind, limits
from .rivals import Rivals, rivals
from .rivals import partitions as rival_partitions
from .schedules import rescheduled
from .sizes import better
from .units import check_constraints

NAME = "gpp"
SIZES = 3  # micro-batch sizes that are searched in depth
WORSE = 1.25  # how much slower the plain plan of such a size may be than the best
STARTS = (4, 2, 2)  # shapes that are polished, in each round
TASKS = 2_000_000  # simulated in polishing, at half a microsecond
DRAFT = 300  # a draft takes as long as so many
FIRST = 12  # shapes that are tried with other schedules, or less memory
EXACT = 3  # plans that the simulator compares after each choice
ORDERED = 4  # plans that get every schedule, those on a clock too
LENDERS = 24  # shapes from which stages are made that share devices
SHARED = 6  # of these that the simulator compares
FEW = 300  # partitions of a model of which all are tried for every micro-batch size
DONE = 1.001  # of the lower bound: nothing is worth a search


def plan(graph: ComputationGraph, topology: DeviceTopology, costs: CostModel, options: Options) -> Plan:
    """The plan for one training step, with its estimate, its lower bound and what each choice bought.

    Raises PlanError if no planner finds one. Takes the other planners' time twice, and about 0.5 us
    for each of `TASKS`.
    """
    problem = Problem(graph, topology, costs, options)
    least, which = bound(problem)
    others = rivals(problem)
    search = _Search(problem, others, least)
    best = search.run()
    if best is None:
        raise _refusal(others.refusals[0], options)
    choices = tuple(search.choices)
    return replace(best, planner=NAME, lower_bound=least, bound_by=which, choices=choices)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A shape and how it was made."""

    drafts: Drafts
    kind: Kind
    shape: Shape


class _Search:
    """The candidates so far, and the best plan after each choice."""

    def __init__(self, problem: Problem, others: Rivals, least: float) -> None:
        self.problem, self.others, self.least = problem, others, least
        self.found: dict[tuple[int, Kind, Parts], _Candidate] = {}
        self.short: dict[tuple[int, Parts], Drafts] = {}  # parts that do not fit memory
        self.plans: dict[tuple[int, Kind, Parts], Plan] = {}
        self.best: Plan | None = None
        self.choices: list[Choice] = []
        self.all = {size: Drafts(problem, size) for size in problem.options.micro_batches}

    def run(self) -> Plan | None:
        """Choice by choice, until there is next to nothing left to gain."""
        for rival in self.others.plans:
            self._offer(rival)
        self._settle(self.best.planner if self.best else "")
        for _ in self._choices():
            if self.best is not None and self.best.estimate <= self.least * DONE:
                break
        return self.best

    def _choices(self) -> Iterator[None]:
        sizes = self._sizes()
        for size in sizes[:1]:
            self._partition(self.all[size])
        self._settle("partition")
        yield
        for size in sizes[1:]:
            self._partition(self.all[size])
        self._settle("micro-batch")
        yield
        self._schedule()
        self._settle("schedule")
        yield
        if self._spare:
            self._spare_memory()
            self._settle("memory")
            yield
        self._polish()
        self._settle("polish")
        yield
        self._order()
        self._settle("order")
        yield
        if self.problem.options.colocate:
            self._colocate()
            self._settle("colocate")
            yield
        if any(self._few(drafts) for drafts in self.all.values()):
            self._exhaust()
            self._settle("every partition")
            yield

    @cached_property
    def _kinds(self) -> tuple[Kind, ...]:
        """The user's schedule first, then what else may be chosen."""
        options = self.problem.options
        policy = options.policy
        kinds = [Kind(extra=policy.extra_warm_up, gpipe=policy.name == "gpipe")]
        if policy.name in ("zero-bubble", "greedy"):
            kinds = [Kind(reach=1.0)]
        if options.eager:
            kinds += [Kind(extra=1), Kind(extra=2)]
        if options.split_backward:
            kinds += [Kind(reach=1.0), Kind(reach=1.5), Kind(reach=2.0)]
        return tuple(dict.fromkeys(kinds))

    @property
    def _spare(self) -> bool:
        """Whether memory is scarce, and something may be done about it."""
        options = self.problem.options
        if not (options.recompute or options.shard_optimizer):
            return False
        return bool(self.short) or any(clipped(c.drafts, c.shape) for c in self._ranked()[:FIRST])

    def _sizes(self) -> list[int]:
        """Micro-batch sizes worth a search, the best rival's first, then by their plain plan's step."""
        seconds: dict[int, float] = {}
        for size, drafts in self.all.items():
            if self.best is not None and self.problem.least_seconds[size] > self.best.estimate:
                continue
            for groups in graphpipe.candidates(self.problem, size, limit=1):
                self._try(drafts, drafts.parts(groups), self._kinds[0])
            own = [c.shape.seconds for c in self.found.values() if c.drafts is drafts]
            if own:
                seconds[size] = min(own)
        least = min(seconds.values(), default=0.0)
        first = self.best.stage_graph.stages[0].micro_batch if self.best else None
        if any(self._few(drafts) for drafts in self.all.values()):
            return sorted(seconds, key=seconds.__getitem__) or list(self.all)
        close = [size for size in sorted(seconds, key=seconds.__getitem__) if seconds[size] <= WORSE * least]
        if not close:
            return list(self.all)[:SIZES] if first is None else [first]
        ordered = close if first is None else [first, *(size for size in close if size != first)]
        return ordered[:SIZES]

    def _partition(self, drafts: Drafts) -> None:
        """Every way there is to cut the model for one micro-batch size."""
        kind = self._kinds[0]
        found = rival_partitions(self.problem, drafts.micro_batch)
        starts = [drafts.parts(groups) for groups in found]
        for rival in self.others.plans:
            if {stage.micro_batch for stage in rival.stage_graph.stages} == {drafts.micro_batch}:
                starts.append(drafts.parts_of(rival))
        for parts in (*starts, *every_partition(drafts)):
            self._try(drafts, parts, kind)

    def _schedule(self) -> None:
        """Other schedules for the best partitions."""
        for candidate in self._ranked()[:FIRST]:
            for kind in self._kinds[1:]:
                self._try(candidate.drafts, candidate.shape.parts, kind)

    def _spare_memory(self) -> None:
        """What does not fit, or has less in flight than it wants, with less memory."""
        for (_, parts), drafts in list(self.short.items()):
            for kind in self._kinds:
                self._try(drafts, parts, kind, spare=True)
        topology, options = self.problem.topology, self.problem.options
        for candidate in self._ranked()[:FIRST]:
            drafts, shape = candidate.drafts, candidate.shape
            while clipped(drafts, shape):
                leaner = spared(shape.draft, shape.parts, limits(shape.draft, topology), options)
                found = shaped(drafts, leaner, candidate.kind) if leaner != shape.parts else None
                if found is None:
                    break
                shape = found
                for kind in self._kinds:
                    self._try(drafts, shape.parts, kind)

    def _polish(self) -> None:
        """Local search from the best few shapes, then from fewer with other moves."""
        for seed, starts in enumerate(STARTS):
            for candidate in self._distinct()[:starts]:
                drafts, shape = candidate.drafts, candidate.shape
                rounds = min(drafts.rounds, 3 * max(shape.rhythm.warms) + 4)
                each = DRAFT + 4 * rounds * len(shape.parts)
                tries = TASKS // (len(STARTS) * starts * each)
                better = polish(drafts, shape, candidate.kind, tries, spare=self._spare, seed=seed)
                if matters(drafts):
                    better = placed(drafts, better, candidate.kind, tries // 4, spare=self._spare)
                for kind in self._kinds:
                    self._try(drafts, better.parts, kind)
                key = (drafts.micro_batch, candidate.kind, better.parts)
                self.found[key] = _Candidate(drafts, candidate.kind, better)

    def _order(self) -> None:
        """Other orders for the stages of the best shapes, those chosen on a clock too."""
        for candidate in self._distinct()[:ORDERED]:
            plan = realised(candidate.drafts, candidate.shape)
            for other in rescheduled(plan, self.problem.options):
                self._offer(other)

    def _colocate(self) -> None:
        """Stages that share devices, from all shapes: a bad one may be a good start. The best balanced ones
        are simulated."""
        found: dict[frozenset[Group], tuple[float, int, tuple[Group, ...]]] = {}
        for candidate in self._distinct()[:LENDERS]:
            drafts = candidate.drafts
            for shared in colocated(drafts, candidate.shape.draft):
                key = frozenset(shared.groups)
                found.setdefault(key, (shared.load, drafts.micro_batch, shared.groups))
        for load, size, groups in sorted(found.values(), key=lambda item: item[0])[:SHARED]:
            self._share(Shared(groups, load), size)

    def _share(self, shared: Shared, size: int) -> None:
        if self.best is not None and shared.load >= self.best.estimate:
            return
        check_constraints(self.problem, shared.groups)
        plan = assemble(self.problem, shared.groups, size, NAME)
        if fits(plan):
            self._offer(estimated(plan))
        for other in rescheduled(plan, self.problem.options):
            self._offer(other)

    def _few(self, drafts: Drafts) -> bool:
        """Whether all partitions can be timed, with everything else there is to choose."""
        return 0 < len(every_partition(drafts)) <= FEW

    def _exhaust(self) -> None:
        """Every partition of a small model with every memory choice, schedule and way to share devices,
        those left out whose busiest device alone takes longer than the best plan."""
        options = self.problem.options
        for drafts in self.all.values():
            if not self._few(drafts):
                continue
            for bare in every_partition(drafts):
                for parts in (bare, *every_memory_choice(bare, options)):
                    self._time(drafts, parts)
            if options.colocate:
                for shared in every_sharing(drafts):
                    self._share(shared, drafts.micro_batch)

    def _time(self, drafts: Drafts, parts: Parts) -> None:
        """The exact step of these parts with every schedule, unless they cannot be the best."""
        plan = None
        for kind in self._kinds:
            within = math.inf if self.best is None else self.best.estimate
            shape = shaped(drafts, parts, kind, within=within)
            if shape is not None:
                plan = realised(drafts, shape)
                self._offer(estimated(plan))
        if plan is not None:
            for other in rescheduled(plan, self.problem.options):
                self._offer(other)

    def _try(self, drafts: Drafts, parts: Parts, kind: Kind, *, spare: bool = False) -> None:
        key = (drafts.micro_batch, kind, parts)
        if key in self.found:
            return
        shape = shaped(drafts, parts, kind, spare=spare)
        if shape is None:
            self.short[drafts.micro_batch, parts] = drafts
        else:
            self.found[drafts.micro_batch, kind, shape.parts] = _Candidate(drafts, kind, shape)

    def _ranked(self) -> list[_Candidate]:
        return sorted(self.found.values(), key=lambda c: c.shape.seconds)

    def _distinct(self) -> list[_Candidate]:
        """The best of every way to cut the model."""
        found: dict[tuple[int, Parts], _Candidate] = {}
        for candidate in self._ranked():
            found.setdefault((candidate.drafts.micro_batch, _cut(candidate.shape.parts)), candidate)
        return list(found.values())

    def _settle(self, choice: str) -> None:
        """Let the simulator compare the best few, and note what the choice bought."""
        for candidate in self._ranked()[:EXACT]:
            key = (candidate.drafts.micro_batch, candidate.kind, candidate.shape.parts)
            if key not in self.plans:
                self.plans[key] = estimated(realised(candidate.drafts, candidate.shape))
                self._offer(self.plans[key])
        if self.best is not None:
            self.choices.append(Choice(choice, self.best.estimate))

    def _offer(self, plan: Plan) -> None:
        if self.best is None or better(plan, self.best):
            self.best = plan


def realised(drafts: Drafts, shape: Shape) -> Plan:
    """The shape as a plan, without its estimate. Raises PlanError if it broke the user's constraints."""
    problem, draft, rhythm = drafts.problem, shape.draft, shape.rhythm
    groups = drafts.groups(draft)
    check_constraints(problem, groups)
    plan = assemble(problem, groups, drafts.micro_batch, NAME, policy=rhythm.policy)
    names = [problem.graph.operators[group.operators[0]].name for group in groups]
    held = dict(zip(names, zip(rhythm.warms, rhythm.lags, strict=True), strict=True))
    stages = []
    for stage in plan.stage_graph.stages:
        warm, lag = held[stage.operators[0]]
        stages.append(replace(stage, in_flight=(warm + lag) * drafts.micro_batch, weight_lag=lag))
    return replace(plan, stage_graph=replace(plan.stage_graph, stages=tuple(stages)))


def _refusal(first: PlanError, options: Options) -> PlanError:
    """What the first planner says, and what was tried besides."""
    tried = [name for name in ("recompute", "shard_optimizer") if getattr(options, name)]
    return PlanError(f"{first} (nor does it with planner.{' and planner.'.join(tried)})") if tried else first


def _cut(parts: Iterable[Part]) -> Parts:
    """Where the model is cut, whatever else is chosen."""
    return tuple(Part(part.units, part.devices) for part in parts)
