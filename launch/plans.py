"""From a configuration and a computation graph to a plan, made or read; all without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf

from gpp.graph import ComputationGraph, GraphError, graph_from_json
from gpp.plan import Plan, PlanError, Policy, check_plan, plan_from_json
from gpp.planner import graphpipe
from gpp.planner.options import Options

from .settings import (
    SettingsError,
    TrainSettings,
    check_choices,
    check_keys,
    costs,
    max_replicas,
    policy,
    topology,
    train_settings,
)


@dataclass(frozen=True)
class Subject:
    """What is planned for. `loss_coupled`: the loss must see the whole mini-batch; `optimizer_factor`: bytes
    of the optimizer's state per byte of parameters."""

    graph: ComputationGraph
    loss_coupled: bool
    optimizer_factor: float


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

    def options(self, settings: TrainSettings, subject: Subject | None = None) -> Options:
        """What a planner is asked. Without a subject only what the configuration alone says."""
        return Options(
            mini_batch=settings.mini_batch,
            micro_batch=settings.micro_batch if subject is None else _micro_batch(settings, subject),
            policy=policy(self.config),
            optimizer_factor=0.0 if subject is None else subject.optimizer_factor,
            global_norm=settings.clip_norm is not None,
            max_replicas=max_replicas(self.config),
        )


def check_request(request: Request) -> None:
    """Everything that can be wrong before there is a model: capture may take long."""
    check_keys(request.config)
    check_choices(request.config)
    settings = train_settings(request.config)
    request.options(settings)
    topology(request.config, request.count, request.hosts)
    costs(request.config)


def make_plan(request: Request, subject: Subject) -> Plan:
    """Plan, or check and return the plan that `plan=` names. Raises PlanError or SettingsError."""
    settings = train_settings(request.config)
    path = request.plan_path
    if path is not None:
        plan = replay(request, path)
        _check_subject(path, plan, subject)
        return replace(plan, global_norm=settings.clip_norm is not None)
    plan = graphpipe.plan(
        subject.graph,
        topology(request.config, request.count, request.hosts),
        costs(request.config),
        request.options(settings, subject),
    )
    check_plan(plan, subject.graph)
    return plan


def replay(request: Request, path: str) -> Plan:
    """The plan of a file, checked against the configuration, the model's graph left aside."""
    plan, settings = read_plan(path), train_settings(request.config)
    have = len(plan.topology.devices)
    if have != request.count:
        raise PlanError(
            f"{path} is a plan for {have} devices, this run has {request.count}: start {have} ranks (without "
            f"MPI, set cluster.devices={have}), or plan anew"
        )
    if plan.mini_batch != settings.mini_batch:
        raise PlanError(
            f"{path} is a plan for mini-batches of {plan.mini_batch}, train.mini_batch is "
            f"{settings.mini_batch}"
        )
    sizes = sorted({stage.micro_batch for stage in plan.stage_graph.stages})
    if settings.micro_batch != "auto" and sizes != [settings.micro_batch]:
        raise PlanError(
            f"{path} is a plan with micro-batches of {', '.join(map(str, sizes))}, train.micro_batch is "
            f"{settings.micro_batch}: leave it at auto, or plan anew"
        )
    named = {override.lstrip("+~").partition("=")[0].partition(".")[0] for override in request.overrides}
    wanted = policy(request.config)
    if "schedule" in named and wanted != plan.policy:
        raise PlanError(
            f"{path} is a plan for schedule {_policy_text(plan.policy)}, the command line asks for "
            f"{_policy_text(wanted)}: leave schedule away, or plan anew"
        )
    return plan


def read_plan(path: str) -> Plan:
    """The plan of a file. Raises PlanError naming the file."""
    text = _text(path, "plan")
    try:
        return plan_from_json(text)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def read_subject(path: str, optimizer: Mapping[str, Any]) -> Subject:
    """A graph's file as something to plan for. Raises GraphError naming the file.

    A file does not say which of its terms are the loss: a term that mixes samples counts as one.
    """
    text = _text(path, "graph")
    try:
        graph = graph_from_json(text)
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from None
    coupled = any(op.batch_coupled and op.terms for op in graph.operators)
    return Subject(graph, coupled, state_factor(optimizer))


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
        return file.read_text()
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is no {what} file: {error}") from None


def _micro_batch(settings: TrainSettings, subject: Subject) -> int | Literal["auto"]:
    """A loss that mixes samples is only the user's own loss if it sees the whole mini-batch."""
    if not subject.loss_coupled:
        return settings.micro_batch
    if settings.micro_batch in ("auto", settings.mini_batch):
        return settings.mini_batch
    raise SettingsError(
        "the loss of a mini-batch is not the mean of its micro-batches' losses: it mixes samples (a "
        "contrastive loss), or divides by something else than their number (ignore_index). Return "
        "(sum, weight) from forward in the second case, else set train.micro_batch to the whole mini-batch, "
        f"{settings.mini_batch}"
    )


def _check_subject(path: str, plan: Plan, subject: Subject) -> None:
    found = subject.graph.fingerprint()
    if plan.fingerprints.graph != found:
        raise PlanError(
            f"{path} was made for another model: its graph is {plan.fingerprints.graph}, this one's {found}; "
            "plan anew"
        )
    check_plan(plan, subject.graph)
    small = [s.name for s in plan.stage_graph.stages if s.terms and s.micro_batch != plan.mini_batch]
    if subject.loss_coupled and small:
        raise PlanError(
            f"{path} cuts the mini-batch for stage {small[0]}, this model's loss needs it whole: plan anew"
        )
