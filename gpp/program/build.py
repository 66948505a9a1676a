"""A stage of a plan to the program that its rank executes: carve, trace jointly, cut, compile.

Runs serially before any rank's thread starts: tracing is not thread-safe.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from gpp.plan import Edge, Plan, StageGraph

from .carve import Interface, ProgramError, carve, example_inputs, interface, value_spec
from .functions import Compile, Fuse, Layout, train_functions
from .halves import cut, writers
from .joint import trace_joint
from .stage import (
    ForwardResult,
    Port,
    StageFunctions,
    StageProgram,
    TrainFunctions,
    ValueSpec,
)
from .traced import TracedMode, TracedModel
from .weights import weight_casts, with_weight_casts


@dataclass(frozen=True)
class Hooks:
    """What kernels are used: `fuse` rewrites a forward graph before the joint trace, `backward` each half of
    its backward after the cut, the weight half with its sums, `compile` makes each graph callable after that.
    `warm_up`: call each once on zeros, where compiling waits for the first call and must not happen in a
    rank's thread."""

    fuse: Fuse = lambda module: module
    backward: Fuse = lambda module: module
    compile: Compile = lambda module: module
    warm_up: bool = False


@dataclass(frozen=True)
class Roots:
    """The seeds of the loss terms: coefficient by term; a mean's is multiplied by the samples of the call."""

    coefficients: Mapping[str, float]
    mean: bool


def stage_of(plan: Plan) -> dict[str, int]:
    """Operator name to its stage."""
    return {name: i for i, stage in enumerate(plan.stage_graph.stages) for name in stage.operators}


def edges_of(mode: TracedMode, stages: Mapping[str, int]) -> dict[tuple[int, int], tuple[str, ...]]:
    """(source, target) stage to the values that cross, in graph order."""
    found: dict[tuple[int, int], dict[str, None]] = {}
    for node in mode.graph.nodes:
        source = stages.get(mode.operator_of.get(node.name, ""))
        if source is None:
            continue
        for user in node.users:
            target = stages.get(mode.operator_of.get(user.name, ""))
            if target is not None and target != source:
                found.setdefault((source, target), {})[node.name] = None
    return {pair: tuple(found[pair]) for pair in sorted(found)}


def mode_plan(plan: Plan, mode: TracedMode) -> Plan:
    """The plan with the edges, batch keys and terms of one mode.

    Evaluation may read other values than training does (no dropout masks, another head); it must still follow
    the order of the stages. Raises ProgramError if it does not. The plan's edges that are orders alone stay
    where no value crosses.
    """
    stages = stage_of(plan)
    crossing = edges_of(mode, stages)
    edges = [e for e in plan.stage_graph.edges if e.is_order and (e.source, e.target) not in crossing]
    for (source, target), names in crossing.items():
        if source > target:
            raise ProgramError(
                f"evaluation sends {names[0]} from stage {plan.stage_graph.stages[source].name} back to "
                f"{plan.stage_graph.stages[target].name}, which training runs first: let forward take the "
                "same order in both modes"
            )
        specs = [value_spec(mode, name) for name in names]
        edges.append(
            Edge(
                source,
                target,
                names,
                sum(s.bytes for s in specs),
                sum(s.bytes for s in specs if s.needs_grad),
            )
        )
    faces = [interface(mode, stage.operators) for stage in plan.stage_graph.stages]
    graph = StageGraph(
        stages=tuple(
            replace(stage, batch_keys=face.batch_keys, terms=face.terms)
            for stage, face in zip(plan.stage_graph.stages, faces, strict=True)
        ),
        edges=tuple(sorted(edges, key=lambda e: (e.source, e.target))),
        shared=plan.stage_graph.shared,
    )
    return replace(plan, stage_graph=graph)


def build_stage(
    traced: TracedModel,
    plan: Plan,
    evaluation: Plan,
    index: int,
    roots: Roots,
    *,
    train_sizes: Iterable[int],
    evaluation_sizes: Iterable[int],
    device: torch.device,
    hooks: Hooks | None = None,
) -> StageProgram:
    """The program of stage `index`; `plan` and `evaluation` as `mode_plan` gives them.

    `train_sizes` and `evaluation_sizes` are the numbers of samples of one call that its ranks will see.
    """
    hooks = hooks or Hooks()
    operators = plan.stage_graph.stages[index].operators
    train_face = interface(traced.train, operators)
    evaluation_face = interface(traced.evaluate, operators)
    _check_learned_here(traced, plan, index, train_face, evaluation_face)
    parameters = tuple(dict.fromkeys((*train_face.parameters, *evaluation_face.parameters)))
    buffers = tuple(dict.fromkeys((*train_face.buffers, *evaluation_face.buffers)))
    build = _Builder(traced, operators, parameters, buffers, roots, device, hooks)
    return StageProgram(
        stage=index,
        parameters=parameters,
        trainable=tuple(traced.trainable[p] for p in parameters),
        buffers=buffers,
        train=_functions(
            traced.train,
            plan,
            index,
            train_face,
            {n: build.train(train_face, n) for n in sorted(set(train_sizes))},
        ),
        evaluate=_functions(
            traced.evaluate,
            evaluation,
            index,
            evaluation_face,
            {n: build.evaluate(evaluation_face, n) for n in sorted(set(evaluation_sizes))},
        ),
    )


@dataclass(frozen=True)
class Alone:
    """Some operators as a stage of their own, to be measured: what they read and give, their functions at one
    size, and empty tensors in the places of parameters, buffers, inputs, batch keys and position."""

    face: Interface
    functions: TrainFunctions
    examples: tuple[Tensor, ...]


def alone(
    traced: TracedModel,
    operators: Sequence[str],
    size: int,
    roots: Roots,
    device: torch.device,
    hooks: Hooks | None = None,
) -> Alone:
    """The training functions that a stage of these operators would execute for calls of `size` samples."""
    face = interface(traced.train, operators)
    build = _Builder(traced, tuple(operators), face.parameters, face.buffers, roots, device, hooks or Hooks())
    return Alone(face, build.train(face, size), tuple(build.examples(traced.train, face, size)))


def _check_learned_here(
    traced: TracedModel, plan: Plan, index: int, train_face: Interface, evaluation_face: Interface
) -> None:
    """A parameter that evaluation alone reads in this stage, and training in another, never learns here."""
    extra = {p for p in evaluation_face.parameters if traced.trainable[p]} - set(train_face.parameters)
    stages = plan.stage_graph.stages
    for other, stage in enumerate(stages):
        held = extra & set(interface(traced.train, stage.operators).parameters) if other != index else None
        if held:
            raise ProgramError(
                f"evaluation reads {min(held)} in stage {stages[index].name}, training only in {stage.name}: "
                "the copy here would keep its initial value. Read it in both modes, or choose another plan"
            )


def _functions(
    mode: TracedMode, plan: Plan, index: int, face: Interface, sizes: Mapping[int, TrainFunctions]
) -> StageFunctions:
    def port(edge: int) -> Port:
        names = plan.stage_graph.edges[edge].tensors
        return Port(edge, tuple(value_spec(mode, name) for name in names))

    edges = plan.stage_graph.edges
    return StageFunctions(
        inputs=_specs(mode, face.inputs),
        outputs=_specs(mode, face.outputs),
        batch_keys=face.batch_keys,
        receives=tuple(port(i) for i, e in enumerate(edges) if e.target == index),
        sends=tuple(port(i) for i, e in enumerate(edges) if e.source == index),
        terms=face.terms,
        sizes=sizes,
        predictions=face.predictions,
    )


def _specs(mode: TracedMode, names: Sequence[str]) -> tuple[ValueSpec, ...]:
    return tuple(value_spec(mode, name) for name in names)


@dataclass(frozen=True)
class _Builder:
    traced: TracedModel
    operators: tuple[str, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    roots: Roots
    device: torch.device
    hooks: Hooks

    def forward_graph(self, mode: TracedMode, size: int) -> fx.GraphModule:
        module = carve(mode, self.operators, size, self.parameters, self.buffers, device=self.device)
        return self.hooks.fuse(module)

    def examples(self, mode: TracedMode, face: Interface, size: int) -> list[Tensor]:
        known = {full: mode.nodes[name] for name, full in {**mode.parameters, **mode.buffers}.items()}
        state = []
        for name in (*self.parameters, *self.buffers):
            node = known.get(name)
            value = None if node is None else node.meta["val"]
            state.append(
                torch.empty(0, device=self.device)
                if value is None
                else torch.empty(tuple(value.shape), dtype=value.dtype, device=self.device)
            )
        return [*state, *example_inputs(mode, face, size, self.device)]

    def train(self, face: Interface, size: int) -> TrainFunctions:
        mode = self.traced.train
        count = len(self.parameters)
        outputs = _specs(mode, face.outputs)
        first_input = count + len(self.buffers)
        forward = self.forward_graph(mode, size)
        casts = weight_casts(forward, count)
        joint = trace_joint(
            forward,
            self.examples(mode, face, size),
            learning=[i for i, p in enumerate(self.parameters) if self.traced.trainable[p]],
            flowing=[first_input + i for i, s in enumerate(_specs(mode, face.inputs)) if s.needs_grad],
            outputs=[i for i, s in enumerate(outputs) if s.needs_grad],
            seeds=[
                (len(outputs) + i, self.roots.coefficients[t] * (size if self.roots.mean else 1))
                for i, t in enumerate(face.terms)
                if t in self.roots.coefficients
            ],
        )
        halves = cut(with_weight_casts(joint, count, casts), count + len(casts))
        layout = Layout(
            parameters=count,
            casts=casts,
            outputs=len(outputs),
            results=halves.results,
            gradients=halves.gradients,
            flowing=tuple(s for s in _specs(mode, face.inputs) if s.needs_grad),
            size=size,
            device=self.device,
        )
        functions = train_functions(
            halves, self.hooks.backward, self.hooks.compile, layout, self.written(halves.forward, layout.held)
        )
        if self.hooks.warm_up:
            with torch.no_grad():
                made = self.called(functions, mode, face, size)
                tangents = [
                    torch.zeros_like(v) for v, s in zip(made.outputs, outputs, strict=True) if s.needs_grad
                ]
                state = [torch.zeros_like(v) for v in self.examples(mode, face, size)[:count]]
                back = functions.backward_input(state, list(made.stash), tangents)
                learning = [self.traced.trainable[p] for p in self.parameters]
                sums = [torch.zeros_like(v) for v, t in zip(state, learning, strict=False) if t]
                functions.backward_weight(state, list(back.stash), sums)
        return functions

    def written(self, forward: fx.GraphModule, first: int) -> tuple[int, ...]:
        """The positions of the buffers that a forward writes to, the first of which is argument `first`."""
        changed = writers(forward.graph)
        arguments = [node for node in forward.graph.nodes if node.op == "placeholder"]
        buffers = arguments[first : first + len(self.buffers)]
        # the schemas of torch's older batch norms do not say that they write to running means
        norms = {node for node in buffers if any("batch_norm" in str(user.target) for user in node.users)}
        return tuple(i for i, node in enumerate(buffers) if node in changed or node in norms)

    def called(
        self, functions: TrainFunctions, mode: TracedMode, face: Interface, size: int
    ) -> ForwardResult:
        """One forward on zeros."""
        given = [torch.zeros_like(v) for v in self.examples(mode, face, size)]
        first, second = len(self.parameters), len(self.parameters) + len(self.buffers)
        return functions.forward(given[:first], given[first:second], given[second:-1], given[-1])

    def evaluate(self, face: Interface, size: int) -> TrainFunctions:
        run = self.hooks.compile(self.forward_graph(self.traced.evaluate, size))
        outputs = len(face.outputs)
        terms = outputs + len(face.terms)

        def forward(
            parameters: Sequence[Tensor],
            buffers: Sequence[Tensor],
            inputs: Sequence[Tensor],
            position: Tensor,
        ) -> ForwardResult:
            results = run(*parameters[: len(self.parameters)], *buffers, *inputs, position)
            return ForwardResult(results[:outputs], results[outputs:terms], (), results[terms:])

        functions = TrainFunctions(forward, _no_backward, _no_backward)
        if self.hooks.warm_up:
            with torch.no_grad():
                self.called(functions, self.traced.evaluate, face, size)
        return functions


def _no_backward(*_: Any) -> Any:
    raise ProgramError("evaluation has no backward pass")
