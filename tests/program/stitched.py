"""A plan run by hand, one stage after the other in one process: no schedule, no messages, no threads."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gpp.capture.capture import Captured, capture
from gpp.capture.export import EXAMPLES
from gpp.capture.verify import verify
from gpp.cost import Roofline
from gpp.plan import Plan, Policy, check_plan
from gpp.planner.estimate import Group, Problem, assemble
from gpp.planner.options import Options
from gpp.program.build import Roots, build_stage, mode_plan
from gpp.program.carve import carve, interface
from gpp.program.stage import StageProgram, TrainFunctions
from gpp.topology import Device, DeviceTopology, Link

CPU = torch.device("cpu")
Batch = Mapping[str, Tensor]


@dataclass
class Ran:
    """What one forward and backward left: terms and gradients by name, buffers, the stash of each stage."""

    terms: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    stashes: list[list[Tensor]] = field(default_factory=list)
    weight_stashes: list[list[Tensor]] = field(default_factory=list)


def captured_and_verified(model: nn.Module, batch: Batch) -> Captured:
    first = {k: v[:EXAMPLES] for k, v in batch.items()}
    captured = capture(model, first, seed=3)
    verify(model, first, captured)
    return captured


def plan_of(captured: Captured, groups: Sequence[Sequence[int]] | None = None, size: int = 2) -> Plan:
    """One stage for each group of operators (by position), by default for each operator."""
    chosen = groups or [(i,) for i in range(len(captured.graph.operators))]
    device = Device("test", memory=1e12, flops=1e9, bandwidth=1e9)
    link = Link(0.0, 1e9)
    topology = DeviceTopology("test", (device,) * len(chosen), len(chosen), link, link)
    options = Options(mini_batch=size, micro_batch=size, policy=Policy("1f1b", 0), global_norm=False)
    problem = Problem(captured.graph, topology, Roofline(), options)
    plan = assemble(problem, [Group(tuple(g), 1) for g in chosen], size, "by hand")
    check_plan(plan, captured.graph)
    return mode_plan(plan, captured.traced.train)


def roots_of(captured: Captured) -> Roots:
    return Roots(captured.roots, captured.train.loss.weight is None)


def programs(captured: Captured, plan: Plan, size: int) -> list[StageProgram]:
    evaluation = mode_plan(plan, captured.traced.evaluate)
    return [
        build_stage(
            captured.traced, plan, evaluation, i, roots_of(captured),
            train_sizes=[size], evaluation_sizes=[size], device=CPU,
        )
        for i in range(len(plan.stage_graph.stages))
    ]  # fmt: skip


def run_stages(
    stages: Sequence[StageProgram], values: Mapping[str, Tensor], batch: Batch, step: int = 0, first: int = 0
) -> Ran:
    """Forward in order, backward in reverse order, on all samples of `batch`."""
    size = len(next(iter(batch.values())))
    position = torch.tensor([step, first])
    live: dict[str, Tensor] = {}
    ran = Ran({}, buffers={n: values[n].clone() for s in stages for n in s.buffers})
    for stage in stages:
        functions = _functions(stage, size)
        inputs = [live[v.name] for v in stage.train.inputs] + [batch[k] for k in stage.train.batch_keys]
        made = functions.forward(_parameters(stage, values), _buffers(stage, ran), inputs, position)
        for spec, value in zip(stage.train.outputs, made.outputs, strict=True):
            assert value.shape == (size, *spec.shape) and value.dtype == spec.dtype, (spec, value.shape)
            live[spec.name] = value.contiguous()
        ran.terms |= dict(zip(stage.train.terms, made.terms, strict=True))
        ran.stashes.append(list(made.stash))
    arrived: dict[str, list[Tensor]] = defaultdict(list)
    found: dict[str, list[Tensor]] = defaultdict(list)
    for stage in reversed(stages):
        functions = _functions(stage, size)
        tangents = [_sum(arrived[v.name], live[v.name]) for v in stage.train.outputs if v.needs_grad]
        stash = list(ran.stashes[stage.stage])
        back = functions.backward_input(_parameters(stage, values), stash, tangents)
        ran.weight_stashes.insert(0, list(back.stash))
        for spec, gradient in zip(
            (v for v in stage.train.inputs if v.needs_grad), back.gradients, strict=True
        ):
            arrived[spec.name].append(gradient.contiguous())
        learning = [n for n, t in zip(stage.parameters, stage.trainable, strict=True) if t]
        sums = [torch.zeros_like(values[name]) for name in learning]
        reached = functions.backward_weight(_parameters(stage, values), list(back.stash), sums)
        for name, gradient, is_reached in zip(learning, sums, reached, strict=True):
            if is_reached:
                found[name].append(gradient)
    ran.gradients = {n: _sum(gs, gs[0]) for n, gs in found.items()}
    return ran


def run_uncut(
    captured: Captured, values: Mapping[str, Tensor], batch: Batch, step: int = 0, first: int = 0
) -> Ran:
    """The same by autograd on the whole captured graph."""
    mode = captured.traced.train
    size = len(next(iter(batch.values())))
    operators = set(mode.operator_of.values())
    face = interface(mode, operators)
    parameters = {
        n: values[n].detach().clone().requires_grad_(t) for n, t in captured.traced.trainable.items()
    }
    buffers = {n: values[n].clone() for n in values if n not in parameters}
    forward = carve(mode, operators, size, list(parameters), list(buffers), device=CPU)
    keys = [batch[k] for k in face.batch_keys]
    made = forward(*parameters.values(), *buffers.values(), *keys, torch.tensor([step, first]))
    terms = dict(zip(face.terms, made, strict=True))
    roots = roots_of(captured)
    scale = size if roots.mean else 1
    pairs = [
        (terms[n], torch.full_like(terms[n], c * scale))
        for n, c in roots.coefficients.items()
        if terms[n].requires_grad
    ]
    torch.autograd.backward([r for r, _ in pairs], [s for _, s in pairs])
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    return Ran({n: t.detach() for n, t in terms.items()}, gradients, buffers)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.detach().clone() for n, v in (*model.named_parameters(), *model.named_buffers())}


def assert_same(found: Ran, expected: Ran, bound: float = 0.0) -> None:
    """Terms, gradients and buffers; `bound` 0 asks for equal bits."""
    assert found.gradients.keys() == expected.gradients.keys(), (
        found.gradients.keys() ^ expected.gradients.keys()
    )
    for what in ("terms", "gradients", "buffers"):
        ours, theirs = getattr(found, what), getattr(expected, what)
        for name, value in ours.items():
            _assert_close(value, theirs[name], bound, f"{what} {name}")


def assert_stash(stages: Sequence[StageProgram], values: Mapping[str, Tensor], ran: Ran) -> None:
    """No memory is kept twice, and no parameter."""
    owned = {values[n].untyped_storage().data_ptr() for s in stages for n in s.parameters}
    for kept in (*ran.stashes, *ran.weight_stashes):
        taken: set[int] = set()
        for tensor in kept:
            assert tensor.untyped_storage().data_ptr() not in owned or not tensor.numel()
            places = _places(tensor)
            assert not places & taken, tuple(tensor.shape)
            taken |= places


def _places(tensor: Tensor) -> set[int]:
    offsets = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
    inside = offsets.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).flatten().tolist()
    return {tensor.untyped_storage().data_ptr() + i * tensor.element_size() for i in inside}


def _assert_close(found: Tensor, expected: Tensor, bound: float, what: str) -> None:
    if bound == 0.0 or not expected.is_floating_point():
        assert torch.equal(found, expected), f"{what}: off by {(found - expected).abs().max()}"
    else:
        distance = (found.double() - expected.double()).norm()
        assert distance <= bound * expected.double().norm() + 1e-12, f"{what}: off by {distance}"


def _functions(stage: StageProgram, size: int) -> TrainFunctions:
    return stage.train.sizes[size]


def _parameters(stage: StageProgram, values: Mapping[str, Tensor]) -> list[Tensor]:
    return [values[n] for n in stage.parameters]


def _buffers(stage: StageProgram, ran: Ran) -> list[Tensor]:
    return [ran.buffers[n] for n in stage.buffers]


def _sum(gradients: Sequence[Tensor], like: Tensor) -> Tensor:
    if not gradients:
        return torch.zeros_like(like)
    total = gradients[0]
    for gradient in gradients[1:]:
        total = total + gradient
    return total
