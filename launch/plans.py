"""From a configuration and a computation graph to a plan, made or read; all without torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf

from gpp.api.plan import check_subject, loss_is_coupled
from gpp.cost import CostModel
from gpp.graph import ComputationGraph, GraphError, graph_from_json
from gpp.plan import Plan, PlanError, Policy, check_plan, plan_from_json
from gpp.plan_table import readable_bytes
from gpp.planner.named import planned
from gpp.planner.options import Options

from .cluster import device_count, topology
from .fitting import check_cluster, with_optimizer
from .planner_settings import SCHEDULES, planner_settings
from .problems import Collected, SettingsError
from .settings import (
    TrainSettings,
    burst,
    check_choices,
    check_keys,
    costs,
    policy,
    precision_name,
    train_settings,
)


@dataclass(frozen=True)
class Subject:
    """What is planned for. `loss_coupled`: the loss must see the whole mini-batch; `optimizer_factor`: bytes
    of the optimizer's state per byte of parameters; `costs`: a profile's own, None for the `cost` group's;
    `source`: what was read from which file, in a line."""

    graph: ComputationGraph
    loss_coupled: bool
    optimizer_factor: float
    costs: CostModel | None = None
    source: str = ""


@dataclass(frozen=True)
class Request:
    """What is asked for. `hosts` names each rank's host under MPI, `overrides` is the command line."""

    config: DictConfig
    overrides: Sequence[str]
    count: int
    hosts: Sequence[str] | None = None

    @property
    def plan_path(self) -> str | None:
        """The file of `plan=`, if a plan is to be replayed."""
        path = OmegaConf.select(self.config, "plan")
        return None if path is None else str(path)

    @property
    def named(self) -> frozenset[str]:
        """Groups and keys of the first level that the command line sets."""
        return frozenset(o.lstrip("+~").partition("=")[0].partition(".")[0] for o in self.overrides)

    def options(self, settings: TrainSettings, subject: Subject | None = None) -> Options:
        """What a planner is asked. Without a subject only what the configuration alone says.

        A schedule that the command line names is fixed; else a planner may choose another one.
        """
        asked = planner_settings(self.config)
        average = 1.0 if settings.ema is not None else 0.0  # as many bytes as the parameters
        on = asked.switches - (SCHEDULES if "schedule" in self.named else set())
        return Options(
            mini_batch=settings.samples,
            micro_batch=settings.micro_batch if subject is None else _micro_batch(settings, subject),
            policy=policy(self.config),
            optimizer_factor=0.0 if subject is None else subject.optimizer_factor + average,
            global_norm=settings.norm_wanted,
            precision=precision_name(self.config),
            max_replicas=asked.max_replicas,
            constraints=asked.constraints,
            stage_micro_batches=asked.stage_micro_batches,
            bursts=asked.bursts,
            collapse=asked.collapse,
            eager="eager" in on,
            split_backward="split_backward" in on,
            greedy="greedy" in on,
            recompute="recompute" in on,
            shard_optimizer="shard_optimizer" in on,
            colocate="colocate" in on,
        )


def request_of(
    config: DictConfig,
    overrides: Sequence[str],
    world: int | None = None,
    hosts: Sequence[str] | None = None,
    *,
    reads: bool = True,
) -> Request:
    """What is asked for, checked as far as it can be before there is a model; `world` is the number of MPI
    ranks, `reads`: files too, which other hosts need not see. Raises SettingsError with all problems."""
    with Collected() as read:
        read(check_keys, config)
        read(check_choices, config)
        read(train_settings, config)
        read(planner_settings, config)
        read(policy, config)
        read(burst, config)
        request = Request(config, overrides, read(device_count, config, world) or 1, hosts)
        read(lambda: request.options(train_settings(config)))
        read(topology, config, request.count, hosts)
        if reads:
            read(costs, config)
        if reads and request.plan_path is not None:
            read(replay, request, request.plan_path)
    return request


def make_plan(request: Request, subject: Subject) -> Plan:
    """Plan, or check and return the plan that `plan=` names. Raises PlanError or SettingsError."""
    settings = train_settings(request.config)
    path = request.plan_path
    if path is not None:
        plan = replay(request, path)
        coupled = settings.mini_batch if subject.loss_coupled else None
        with Collected() as read:
            read(check_subject, plan, subject.graph, path, coupled=coupled)
            needs = with_optimizer(plan, request.options(settings, subject).optimizer_factor)
            cluster = topology(request.config, request.count, request.hosts)
            read(check_cluster, needs, path, cluster, request.hosts)
        return replace(plan, global_norm=settings.norm_wanted)
    plan = planned(
        str(request.config.planner.name),
        subject.graph,
        topology(request.config, request.count, request.hosts),
        subject.costs or costs(request.config, subject.graph),
        request.options(settings, subject),
        k=burst(request.config),
    )
    check_plan(plan, subject.graph)
    return plan


def replay(request: Request, path: str) -> Plan:
    """The plan of a file, checked against the configuration, the model's graph left aside."""
    plan = read_plan(path)
    with Collected() as read:
        for check in (_check_devices, _check_samples, _check_precision, _check_micro_batch, _check_schedule):
            read(check, request, plan, path)
        if request.config.device != "emulated":  # there neither memory nor hosts are real
            cluster = read(topology, request.config, request.count, request.hosts)
            read(check_cluster, plan, path, cluster, request.hosts)
    return plan


def _check_devices(request: Request, plan: Plan, path: str) -> None:
    have = len(plan.topology.devices)
    if have != request.count:
        raise PlanError(
            f"{path} is a plan for {have} devices, this run has {request.count}: start {have} ranks (without "
            f"MPI, set cluster.devices={have}), or plan anew"
        )


def _check_samples(request: Request, plan: Plan, path: str) -> None:
    settings = train_settings(request.config)
    if plan.mini_batch != settings.samples:
        times = f", {settings.accumulate} of them a step" if settings.accumulate > 1 else ""
        raise PlanError(
            f"{path} is a plan for mini-batches of {plan.mini_batch}, train.mini_batch is "
            f"{settings.mini_batch}{times}"
        )


def _check_precision(request: Request, plan: Plan, path: str) -> None:
    precision = precision_name(request.config)
    if plan.precision != precision:
        raise PlanError(
            f"{path} is a plan for {plan.precision}, precision={request.config.precision.name} asks for "
            f"{precision}: plan anew"
        )


def _check_micro_batch(request: Request, plan: Plan, path: str) -> None:
    wanted = train_settings(request.config).micro_batch
    sizes = sorted({stage.micro_batch for stage in plan.stage_graph.stages})
    if wanted != "auto" and sizes != [wanted]:
        raise PlanError(
            f"{path} is a plan with micro-batches of {', '.join(map(str, sizes))}, train.micro_batch is "
            f"{wanted}: leave it at auto, or plan anew"
        )


def _check_schedule(request: Request, plan: Plan, path: str) -> None:
    wanted = policy(request.config)
    if "schedule" in request.named and wanted != plan.policy:
        raise PlanError(
            f"{path} is a plan for schedule {_policy_text(plan.policy)}, the command line asks for "
            f"{_policy_text(wanted)}: leave schedule away, or plan anew"
        )


def read_plan(path: str) -> Plan:
    """The plan of a file. Raises PlanError naming the file."""
    text = _text(path, "plan")
    try:
        return plan_from_json(text)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def read_subject(path: str, optimizer: Mapping[str, Any]) -> Subject:
    """A file as something to plan for: a graph.json, or a published profile, Piper's JSON or PipeDream's
    graph.txt, whose times are its own. Raises GraphError or ProfileError naming the file.

    A file does not say which of its terms are the loss: a term that mixes samples counts as one.
    """
    text = _text(path, "graph")
    kind = profile_kind(text, path)
    if kind is not None:
        from gpp.formats import read_profile
        from gpp.formats.profile import ProfileError

        try:
            profile = read_profile(text, path)
        except ProfileError as error:
            raise ProfileError(str(error) if path in str(error) else f"{path}: {error}") from None
        source = (
            f"{path}: {kind}, {graph_text(profile.graph)}, its own times; what it calls a batch is taken as "
            f"{profile.unit} samples"
        )
        return Subject(profile.graph, False, profile.optimizer_factor, profile.costs, source)
    try:
        graph = graph_from_json(text)
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from None
    coupled = any(op.batch_coupled and op.terms for op in graph.operators)
    return Subject(graph, coupled, state_factor(optimizer), source=f"{path}: {graph_text(graph)}")


def profile_kind(text: str, path: str) -> str | None:
    """Whose profile a file is; None for a computation graph of our own, or what should be one."""
    if not text.lstrip().startswith("{") and not path.endswith(".json"):
        return "a profile of PipeDream's"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, a number too long, or nested too deep
        return None
    return "a profile of Piper's" if isinstance(found, dict) and "nodes" in found else None


def graph_text(graph: ComputationGraph) -> str:
    """How large a graph is, in a line."""
    sizes = {p.name: p.bytes for op in graph.operators for p in op.parameters}
    stash = sum(op.stash for op in graph.operators)
    return (
        f"{len(graph.operators)} operators, {readable_bytes(sum(sizes.values()))} of parameters, "
        f"{readable_bytes(stash)} of stash a sample"
    )


def state_factor(optimizer: Mapping[str, Any]) -> float:
    """Bytes of state per byte of parameters, by the class's name; 2 for one that is not torch's."""
    name = str(optimizer.get("_target_", "")).rpartition(".")[2]
    momentum = bool(optimizer.get("momentum"))
    match name:
        case "SGD":
            return float(momentum)
        case "Adagrad":
            return 1.0
        case "RMSprop":
            return 1.0 + momentum + bool(optimizer.get("centered"))
        case "Adam" | "AdamW" if optimizer.get("amsgrad"):
            return 3.0
        case _:
            return 2.0


def _policy_text(wanted: Policy) -> str:
    return wanted.name + (f" with {wanted.extra_warm_up} extra_warm_up" if wanted.extra_warm_up else "")


def _text(path: str, what: str) -> str:
    file = Path(to_absolute_path(path) if HydraConfig.initialized() else path)
    if not file.is_file():
        raise SettingsError(f"there is no {what} file {path}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is no {what} file: {error}") from None


def _micro_batch(settings: TrainSettings, subject: Subject) -> int | Literal["auto"]:
    """A loss that mixes samples is only the user's own loss if it sees the whole mini-batch."""
    if not subject.loss_coupled:
        return settings.micro_batch
    if settings.micro_batch in ("auto", settings.mini_batch):
        return settings.mini_batch
    raise SettingsError(loss_is_coupled("train.micro_batch", settings.mini_batch))
