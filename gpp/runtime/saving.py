"""A rank's state to and from a checkpoint.

The optimizer's state follows its parameter, whichever rank updates it next. Its options (learning rate,
weight decay) and what the scheduler makes of them come from the configuration of the run that goes on: the
scheduler is stepped as often as it was, which takes 2 to 4 seconds for a million steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpp.checkpoint.folder import Kept
from gpp.checkpoint.manifest import OptimizerEntry, Option, Part
from gpp.checkpoint.owners import Owners
from gpp.checkpoint.reader import buffers, optimizer, weights
from gpp.checkpoint.tensors import CheckpointError
from gpp.checkpoint.writer import Contents

from .state import StageState


@dataclass(frozen=True)
class Shares:
    """Who writes what: `owners` of parameters and buffers by full name; `keys` of the module's state_dict
    with the name behind each; values of `outside`, which are in no stage, are rank 0's to write. `hidden`:
    buffers that the state_dict lacks and training changes (of batch statistics with persistent=False)."""

    owners: Owners
    keys: Mapping[str, str]
    outside: Mapping[str, Tensor]
    hidden: tuple[str, ...] = ()


def contents(
    state: StageState | None, shares: Shares, rank: int, texts: Mapping[str, str] | None = None
) -> Contents:
    """What a rank writes, copied to the host: training may go on."""
    own = set(shares.owners.names_of(rank))
    held = {} if state is None else {**state.parameters, **state.buffers}
    files: dict[str, dict[str, Tensor]] = {}

    def into(kind: str, tensors: dict[str, Tensor]) -> str:
        """The file of that name gets the tensors, if there are any."""
        name = shares.owners.file(kind, rank)
        if tensors:
            files[name] = tensors
        return name

    saved = {key: _copy(held[name]) for key, name in shares.keys.items() if name in own and name in held}
    if rank == 0:
        saved |= {k: _copy(shares.outside[n]) for k, n in shares.keys.items() if n in shares.outside}
    weight_file = into("model", saved)
    kept = {} if state is None else state.averages
    averages = {key: _copy(kept[name]) for key, name in shares.keys.items() if name in own and name in kept}
    average_file = into("averages", averages)
    hidden = {name: _copy(held[name]) for name in shares.hidden if name in own and name in held}
    hidden_file = into("buffers", hidden)
    tensors, entries = ({}, {}) if state is None else _optimizer(state, own, rank, shares.owners)
    into("optimizer", tensors)
    return Contents(
        files,
        dict.fromkeys(saved, weight_file),
        dict.fromkeys(averages, average_file),
        entries,
        None if state is None else _class(state.optimizer),
        texts or {},
        dict.fromkeys(hidden, hidden_file),
    )


def _optimizer(
    state: StageState, own: set[str], rank: int, owners: Owners
) -> tuple[dict[str, Tensor], dict[str, OptimizerEntry]]:
    """The state of the parameters that this rank updates and, of those that others update too, writes."""
    sharded = state.sharding.owner if state.sharding is not None else {}
    names = {id(parameter): name for name, parameter in state.parameters.items()}
    tensors: dict[str, Tensor] = {}
    entries: dict[str, OptimizerEntry] = {}
    for group in state.optimizer.param_groups:
        options = {key: _option(key, value) for key, value in group.items() if key != "params"}
        for parameter in group["params"]:
            name = names.get(id(parameter))
            found = state.optimizer.state.get(parameter)
            if name is None or not found or (name not in own and sharded.get(name) != rank):
                continue
            kept = {key: value for key, value in found.items() if isinstance(value, Tensor)}
            tensors |= {f"{name}/{key}": _copy(value) for key, value in kept.items()}
            values = {key: _option(key, value) for key, value in found.items() if key not in kept}
            entries[name] = OptimizerEntry(owners.file("optimizer", rank), tuple(kept), values, options)
    return tensors, entries


def restore(
    state: StageState, kept: Kept, keys: Mapping[str, str], hidden: Sequence[str] = (), *, steps: int
) -> None:
    """Give a rank's stages what the checkpoint has of them, after `steps` updates. `keys`, `hidden`: see
    `Shares`.

    Raises CheckpointError for a name that is not there, another shape, and another optimizer's state.
    """
    key_of = {name: key for key, name in reversed(list(keys.items()))}
    held = {name: value for name, value in {**state.parameters, **state.buffers}.items() if name in key_of}
    found = weights(kept, (key_of[name] for name in held))
    unseen = buffers(kept, (name for name in hidden if name in state.buffers))
    there = kept.manifest.part.averages
    averages = weights(kept, (key_of[n] for n in state.averages if key_of[n] in there), averaged=True)
    state.rewind(steps)
    with torch.no_grad():
        for name, value in held.items():
            _write(kept, name, value.detach(), found[key_of[name]])
        for name, saved in unseen.items():
            _write(kept, name, state.buffers[name], saved)
        for name, value in state.averages.items():  # one that begins here begins with the weights
            _write(kept, name, value, averages.get(key_of[name], state.parameters[name].detach()))
    state.renew_casts()
    _restore_optimizer(state, kept)


def files_of(
    state: StageState | None, part: Part, keys: Mapping[str, str], hidden: Sequence[str] = ()
) -> set[str]:
    """The files of a checkpoint that `restore` reads. `keys`, `hidden`: see `Shares`."""
    if state is None:
        return set()
    held = {**state.parameters, **state.buffers}
    wanted = {key for key, name in keys.items() if name in held}
    found = {file for files in (part.weights, part.averages) for key, file in files.items() if key in wanted}
    found |= {file for name, file in part.buffers.items() if name in hidden and name in held}
    return found | {entry.file for name, entry in part.optimizer.items() if name in held}


def _restore_optimizer(state: StageState, kept: Kept) -> None:
    made, here = kept.manifest.part.optimizer_class, _class(state.optimizer)
    if made is not None and made != here:
        raise CheckpointError(
            f"{kept.path} was made with the optimizer {made}, this run has {here}: use the same, or take the "
            "weights alone (launch.export and train.init_from)"
        )
    names = {id(parameter): name for name, parameter in state.parameters.items()}
    packed = state.optimizer.state_dict()
    order = [
        (names.get(id(parameter)), parameter)
        for group in state.optimizer.param_groups
        for parameter in group["params"]
    ]
    places = [index for group in packed["param_groups"] for index in group["params"]]
    found = optimizer(kept, [name for name, _ in order if name is not None])
    _check_optimizer(state, kept, found)
    packed["state"] = {
        place: {**found[name][0], **found[name][1].values}
        for place, (name, _) in zip(places, order, strict=True)
        if name is not None and name in found
    }
    state.optimizer.load_state_dict(packed)
    for name, parameter in order:  # torch casts what is kept in a type of its own to the parameter's
        for key, value in found[name][0].items() if name is not None and name in found else ():
            loaded = state.optimizer.state[parameter][key]
            if loaded.dtype != value.dtype:
                state.optimizer.state[parameter][key] = value.to(loaded.device)


def _check_optimizer(
    state: StageState, kept: Kept, found: Mapping[str, tuple[Mapping[str, Tensor], OptimizerEntry]]
) -> None:
    """Raise CheckpointError for the state of another shape, or of an optimizer that keeps less."""
    wanted = state.kept_by_optimizer() if found else {}
    for name, (tensors, entry) in found.items():
        parameter = state.parameters[name]
        for key, value in tensors.items():
            if value.dim() == parameter.dim() and value.shape != parameter.shape and value.numel() > 1:
                raise _misfit(kept, f"{name}/{key}", value.shape, parameter.shape)
        lacking = wanted.get(name, set()) - tensors.keys() - entry.values.keys()
        if lacking:
            raise CheckpointError(
                f"{kept.path} was made with other options of the optimizer: it has no {min(lacking)} of "
                f"{name}. Use the same options, or take the weights alone (launch.export and train.init_from)"
            )


def _write(kept: Kept, name: str, target: Tensor, value: Tensor) -> None:
    if target.shape != value.shape:
        raise _misfit(kept, name, value.shape, target.shape)
    target.copy_(value)


def _misfit(kept: Kept, name: str, there: Sequence[int], here: Sequence[int]) -> CheckpointError:
    return CheckpointError(
        f"{kept.path} is of another model: its {name} has shape {tuple(there)}, the model's {tuple(here)}"
    )


def _copy(value: Tensor) -> Tensor:
    """On the host, shared with nobody."""
    return value.detach().to("cpu", copy=True).contiguous()


def _class(made: torch.optim.Optimizer) -> str:
    return f"{type(made).__module__}.{type(made).__qualname__}"


def _option(key: str, value: object) -> Option:
    """An option or number of an optimizer as JSON has it."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, tuple | list):
        return [_option(key, item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"the optimizer keeps {key}, a {type(value).__name__}: only tensors, numbers and texts can be kept "
        "in a checkpoint"
    )
