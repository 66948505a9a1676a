"""`pipeline`: a module, an example batch and an optimizer to a pipeline, under mpirun or alone."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from gpp.capture.capture import Captured
from gpp.capture.weights import Initialised, build_plain
from gpp.cost import CostModel
from gpp.plan import Plan, PlanError, Policy, plan_from_json, plan_to_json
from gpp.planner.options import Constraints
from gpp.program.autocast import Autocast
from gpp.program.build import Hooks
from gpp.runtime.agreement import same
from gpp.runtime.communicator import as_bytes
from gpp.runtime.environment import local_rank
from gpp.runtime.nonfinite import CHOICES, MAX_SKIPS, OnNonfinite
from gpp.runtime.staging import OnDevice, Staging, host_staging
from gpp.runtime.state import MakeOptimizer, MakeScheduler
from gpp.runtime.watching import Rules
from gpp.topology import DeviceTopology

from .capture import capture
from .crew import Crew, RefusedError, connected
from .job import Training, arrange
from .optimizer import optimizer_factor
from .pipeline import Pipeline
from .plan import check_subject, machine
from .plan import plan as planned

if TYPE_CHECKING:
    from gpp.runtime.mpi import MpiCommunicator

ALONE = 4  # ranks without MPI, unless it is said otherwise
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}  # as a user and as plans call them

MakePlan = Callable[[Captured], Plan]


def pipeline(
    model: nn.Module | Initialised,
    example_batch: Mapping[str, Tensor],
    *,
    optimizer: MakeOptimizer,
    mini_batch: int,
    devices: int | None = None,
    cluster: DeviceTopology | None = None,
    plan: Plan | MakePlan | None = None,
    planner: str = "gpp",
    micro_batch: int | Literal["auto"] = "auto",
    schedule: Policy | None = None,
    max_replicas: int | None = 1,
    constraints: Constraints | None = None,
    costs: CostModel | None = None,
    lr_scheduler: MakeScheduler | None = None,
    clip_norm: float | None = None,
    log_norm: bool = False,
    ema: float | None = None,
    on_nonfinite: OnNonfinite | None = "stop",
    max_skips: int = MAX_SKIPS,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    transport: Literal["host", "device"] = "host",
    seed: int = 0,
    verify: bool = True,
    silence: float = 300.0,
    hooks: Hooks | None = None,
    **choices: Any,
) -> Pipeline:
    """Capture the model, plan, and set its stages up on the ranks; called by all ranks together.

    Every rank passes the same arguments, and a model with the same weights (call torch.manual_seed before you
    make it). Its weights are copied; of a model too large for one host `gpp.capture.weights.build_recorded`
    makes what each rank needs alone. `forward` takes the batch's tensors by name, samples in dimension 0, and
    returns the loss, (loss, metrics) or (loss, metrics, predictions).

    `optimizer(named)` makes any optimizer of torch from (name, parameter) pairs: of a rank's own parameters,
    in the same groups on every rank. `lr_scheduler(optimizer)` makes a scheduler, which steps once a step.

    `devices` is the number of ranks that get work: all of the MPI job, or 4 threads without MPI. `cluster`
    describes them (None: cores of one host). `plan` is a plan to run, or makes one on rank 0; without it
    `planner`, `micro_batch`, `schedule`, `max_replicas`, `constraints`, `costs` and `choices` say how it is
    made, see `gpp.api.plan.plan`.

    `silence`: seconds without a sign of life, of a rank or inside a call of all of them, after which the job
    is ended with a report of what each rank was at.

    `clip_norm`, `log_norm`, `ema`, `on_nonfinite`, `max_skips`: see `gpp.api.job.Training`. `hooks` rewrite
    and compile the stages. `transport`: messages of CUDA devices go through pinned host memory, or with
    "device" straight to an MPI that takes device memory (`launch.train transport=auto` finds out whether
    yours does). To accumulate gradients over parts, give a step all of them: it goes through the pipeline by
    micro-batches anyway.

    Raises CaptureError, PlanError, ProgramError or DeviceMemoryError on the rank that fails and RefusedError
    with the same words on the others.
    """
    _check_names(precision, device, transport)
    _check_training(clip_norm, ema, schedule)
    _check_nonfinite(on_nonfinite, max_skips)
    if plan is not None:
        _check_planned(
            planner=planner != "gpp",
            micro_batch=micro_batch != "auto",
            schedule=schedule is not None,
            max_replicas=max_replicas != 1,
            constraints=constraints is not None,
            costs=costs is not None,
            **dict.fromkeys(choices, True),
        )
    comm = connected()
    count = _devices(devices, cluster, plan, None if comm is None else comm.size)
    crew = Crew(comm, count, comm)
    crew.comm.watch_by(Rules(silence))
    if not crew.alone:
        scalars = (mini_batch, clip_norm, log_norm, ema, on_nonfinite, max_skips)
        asked = (*scalars, precision, transport, seed, count, plan is None)
        what = "mini_batch, clip_norm, log_norm, ema, on_nonfinite, max_skips, precision, transport, seed"
        same(crew.comm, f"pipeline's {what}, devices or plan", str(asked))
    target = crew.together(lambda: pick_device(device))
    staging = crew.together(lambda: staging_of(transport, target, comm))
    begun = model if isinstance(model, Initialised) else build_plain(lambda: model, seed)
    autocast = Autocast(target.type) if PRECISIONS[precision] == "bfloat16" else None

    def captured_model() -> Captured:
        return capture(begun.model, example_batch, autocast=autocast, seed=seed, verify=verify)

    captured = crew.together(captured_model)
    _check_same(crew, captured, begun)
    training = Training(
        make_optimizer=optimizer,
        make_scheduler=lr_scheduler,
        clip_norm=clip_norm,
        log_norm=log_norm,
        ema=ema,
        on_nonfinite=on_nonfinite,
        max_skips=max_skips,
    )
    wanted = clip_norm is not None or log_norm or on_nonfinite is not None

    def make() -> str:
        if plan is not None:
            made = plan if isinstance(plan, Plan) else plan(captured)
            check_subject(made, captured.graph, "plan", coupled=mini_batch if captured.loss_coupled else None)
            if made.precision != PRECISIONS[precision]:
                raise PlanError(
                    f"the plan is for {made.precision}, precision={precision!r} computes in "
                    f"{PRECISIONS[precision]}: plan with precision={PRECISIONS[precision]!r}"
                )
            if made.mini_batch != mini_batch or len(made.topology.devices) > crew.size:
                raise PlanError(
                    f"the plan is for mini-batches of {made.mini_batch} on {len(made.topology.devices)} "
                    f"devices, mini_batch is {mini_batch} and there are {crew.size} ranks"
                )
        else:
            made = planned(
                captured,
                mini_batch,
                cluster=cluster or machine(count),
                planner=planner,
                micro_batch=micro_batch,
                schedule=schedule,
                max_replicas=max_replicas,
                constraints=constraints,
                costs=costs,
                optimizer_factor=optimizer_factor(optimizer) + (ema is not None),
                precision=PRECISIONS[precision],
                **choices,
            )
        return plan_to_json(replace(made, global_norm=wanted))

    text = crew.together(lambda: crew.broadcast(make))
    job = crew.together(lambda: arrange(captured, plan_from_json(text)))
    return Pipeline(
        crew,
        job,
        training,
        begun.values,
        device=target,
        names=state_names(begun.model),
        hooks=hooks,
        staging=staging,
        seed=seed,
    )


def _check_names(precision: str, device: str, transport: str) -> None:
    known = {
        "precision": (precision, tuple(PRECISIONS)),
        "device": (device, ("auto", "cpu", "cuda")),
        "transport": (transport, ("host", "device")),
    }
    for name, (given, names) in known.items():
        if given not in names:
            raise RefusedError(f"{name} must be one of {', '.join(names)}, it is {given!r}")


def _check_training(clip_norm: float | None, ema: float | None, schedule: Policy | None) -> None:
    if clip_norm is not None and not clip_norm > 0:
        raise RefusedError(
            f"clip_norm, the largest norm of the gradients, must be above 0, it is {clip_norm}"
        )
    if ema is not None and not 0 < ema < 1:
        raise RefusedError(f"ema, the decay of the moving average, must be between 0 and 1, it is {ema}")
    if schedule is not None and not isinstance(schedule, Policy):
        raise RefusedError(f"schedule must be a gpp.plan.Policy, as Policy('1f1b'), it is {schedule!r}")


def _check_nonfinite(choice: object, max_skips: object) -> None:
    if choice not in (None, *CHOICES):
        raise RefusedError(f"on_nonfinite must be one of {', '.join(CHOICES)}, or None, it is {choice!r}")
    if not isinstance(max_skips, int) or max_skips < 1:
        raise RefusedError(
            f"max_skips, how many steps in a row may be skipped, must be at least 1, it is {max_skips!r}"
        )


def _check_planned(**given: bool) -> None:
    """Refuse what only a planner would read."""
    unused = [name for name, is_given in given.items() if is_given]
    if unused:
        raise RefusedError(f"with plan= nothing is planned: leave out {', '.join(unused)}")


def pick_device(wanted: str) -> torch.device:
    """cuda if asked for or, with auto, if there is one; each rank of a host takes its own. Raises
    RefusedError."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RefusedError("device=cuda, but torch sees no CUDA device here: use device=cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = (local_rank() or 0) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def staging_of(transport: str, device: torch.device, comm: "MpiCommunicator | None") -> Staging:
    """How messages get from device to device. Raises RefusedError for device memory without MPI or CUDA."""
    if transport != "device":
        return host_staging(device)
    if comm is None or device.type != "cuda":
        raise RefusedError(
            f'transport="device" hands memory of CUDA devices to MPI, but stages run on {device.type} '
            f'{"under" if comm is not None else "without"} MPI: use transport="host"'
        )
    comm.device_memory = True
    return OnDevice(device)


def state_names(model: nn.Module) -> dict[str, str]:
    """The keys of a module's state_dict, with the first name of the parameter or buffer behind each."""
    first = {id(v): n for n, v in [*model.named_buffers(), *model.named_parameters()]}
    entries = model.state_dict(keep_vars=True).items()
    return {key: first[id(value)] for key, value in entries if id(value) in first}


def _devices(
    devices: int | None, cluster: DeviceTopology | None, plan: Plan | MakePlan | None, world: int | None
) -> int:
    """How many devices are planned for."""
    said = [devices] if devices is not None else []
    said += [len(cluster.devices)] if cluster is not None else []
    said += [len(plan.topology.devices)] if isinstance(plan, Plan) else []
    if len(set(said)) > 1:
        raise RefusedError(
            f"devices, cluster and plan must be of as many devices, they are of {', '.join(map(str, said))}"
        )
    count = said[0] if said else world or ALONE
    if count < 1 or (world is not None and count > world):
        raise RefusedError(f"devices must be from 1 to the number of MPI ranks, {world}, it is {count}")
    return count


def _check_same(crew: Crew, captured: Captured, begun: Initialised) -> None:
    if crew.alone:
        return
    same(crew.comm, "captured model", captured.graph.fingerprint())
    digest = hashlib.blake2b(digest_size=8)
    for value in (*begun.model.parameters(), *begun.model.buffers()):
        if not value.is_meta:
            digest.update(as_bytes(value.detach().cpu().contiguous()).numpy().data)
    same(crew.comm, "model's weights (is the seed set before it is made?)", digest.hexdigest())
