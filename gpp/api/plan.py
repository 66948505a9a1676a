"""A captured model to a plan, with plain arguments."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from gpp.cost import CostModel, Roofline
from gpp.graph import ComputationGraph
from gpp.made_for import Note, differences
from gpp.plan import Plan, PlanError, Policy, check_plan
from gpp.planner.named import planned
from gpp.planner.options import Constraints, Options
from gpp.topology import Device, DeviceTopology, Link

if TYPE_CHECKING:  # planning for a graph needs no torch
    from gpp.capture.capture import Captured

CORE = Device("core", memory=4.0e9, flops=4.0e10, bandwidth=8.0e9, overhead=1.0e-5)
CHOICES = {
    "gpp": ("eager", "split_backward", "greedy", "recompute", "shard_optimizer", "colocate"),
    "graphpipe": ("stage_micro_batches", "bursts"),
    "piper": ("collapse",),
}


def machine(devices: int, device: Device = CORE, *, per_host: int | None = None) -> DeviceTopology:
    """So many equal devices, `per_host` of them in each host (None: all in one); by default cores of a recent
    server, 4 GB each, with links of MPI's over shared memory, and of 10 Gb/s between hosts."""
    inside, between = Link(5.0e-5, 4.0e9), Link(1.0e-4, 1.0e9)
    return DeviceTopology(device.name, (device,) * devices, per_host or devices, inside, between)


def plan(
    captured: "Captured",
    mini_batch: int,
    *,
    devices: int | None = None,
    cluster: DeviceTopology | None = None,
    planner: str = "gpp",
    micro_batch: int | Literal["auto"] = "auto",
    schedule: Policy | None = None,
    max_replicas: int | None = 1,
    constraints: Constraints | None = None,
    costs: CostModel | None = None,
    optimizer_factor: float = 2.0,
    global_norm: bool = False,
    precision: str = "float32",
    **choices: Any,
) -> Plan:
    """Plan a training step of `mini_batch` samples on `devices` cores, or on a `cluster`.

    `planner` is gpp, graphpipe, sequential, pipedream or piper. `schedule` is what planners start from (None:
    1F1B); gpp chooses by itself unless one is given. `max_replicas` bounds the data parallelism of a stage
    (None: no bound). `optimizer_factor` is the optimizer's state in bytes per byte of parameters.
    `global_norm`: all ranks will want the norm of the gradients. `choices` are the planner's own, as
    `recompute=False` (see `gpp.planner.options.Options`). Raises PlanError saying why there is no plan.
    """
    on = {name: True for name in CHOICES["gpp"]} if planner == "gpp" else {}
    if schedule is not None:
        on |= {name: False for name in CHOICES["gpp"][:3] if name in on}
    known = (*CHOICES.get(planner, ()), *(CHOICES["graphpipe"] if planner == "gpp" else ()))
    unknown = [name for name in choices if name not in known]
    if unknown:
        raise PlanError(
            f"planner {planner!r} has no choice {unknown[0]!r}; it has {', '.join(known) or 'none'}"
        )
    options = Options(
        mini_batch=mini_batch,
        micro_batch=micro_batch_of(captured, mini_batch, micro_batch),
        policy=schedule or Policy(),
        optimizer_factor=optimizer_factor,
        global_norm=global_norm,
        max_replicas=max_replicas,
        precision=precision,
        constraints=constraints or Constraints(),
    )
    where = cluster or machine(devices or 1)
    options = replace(options, **{**on, **choices})
    found = planned(planner, captured.graph, where, costs or Roofline(), options)
    check_plan(found, captured.graph)
    return found


def micro_batch_of(
    captured: "Captured", mini_batch: int, wanted: int | Literal["auto"]
) -> int | Literal["auto"]:
    """A loss that mixes samples is only the user's own loss if it sees the whole mini-batch."""
    if not captured.loss_coupled or wanted == mini_batch:
        return wanted
    if wanted == "auto":
        return mini_batch
    raise PlanError(loss_is_coupled("micro_batch", mini_batch))


def loss_is_coupled(key: str, mini_batch: int) -> str:
    """What is said of micro-batches where the loss needs its mini-batch whole."""
    return (
        "the loss of a mini-batch is not the mean of its micro-batches' losses: it mixes samples (a "
        "contrastive loss), or divides by something else than their number (ignore_index). Return "
        f"(sum, weight) from forward in the second case, else set {key} to the whole mini-batch, {mini_batch}"
    )


def _difference(plan: Plan, graph: ComputationGraph) -> str:
    if plan.made_for:
        found = differences(plan.made_for, graph)
        if plan.loss_weighted != graph.loss_weighted:
            now, then = (
                "a sum with a weight" if w else "a mean" for w in (graph.loss_weighted, plan.loss_weighted)
            )
            found.append(f"its loss is {now}, {then} in the plan")
    else:  # of an older form: names are all that it has
        names = [Note(n, 0, 0, "") for stage in plan.stage_graph.stages for n in stage.operators]
        found = [text for text in differences(names, graph) if " lacks (" in text]
    prints = f"its graph is {graph.fingerprint()}, the plan's {plan.fingerprints.graph}"
    return "; ".join(found) or prints


def check_subject(plan: Plan, graph: ComputationGraph, name: str, *, coupled: int | None = None) -> None:
    """Raise PlanError, calling the plan `name`, where it is one for another model, or cuts the mini-batch of
    `coupled` samples for a loss that needs it whole."""
    if plan.fingerprints.graph != graph.fingerprint():
        raise PlanError(f"{name} was made for another model: {_difference(plan, graph)}; plan anew")
    check_plan(plan, graph)
    small = [s.name for s in plan.stage_graph.stages if s.terms and s.micro_batch != coupled]
    if coupled is not None and small:
        raise PlanError(
            f"{name} cuts the mini-batch for stage {small[0]}, this model's loss needs it whole: plan anew"
        )
