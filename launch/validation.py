"""What can be said of a run before anything of it is made: model, data set, optimizer, device, folders."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from gpp.api.optimizer import optimizer_factor
from gpp.runtime.communicator import Communicator
from gpp.runtime.padding import pads

from .elastic import check_elastic
from .job import autocast_of, pick_device
from .objects import Arguments, chosen, data_keys, locate, made_of, reason
from .optimizers import optimizer_maker, scheduler_maker
from .problems import Collected, SettingsError
from .resume import begins_from, check_folder
from .settings import checkpoint_settings, own_path, train_settings, weight_files
from .transport import check_transport

if TYPE_CHECKING:
    from gpp.runtime.mpi import MpiCommunicator


def check_material(config: DictConfig, overrides: Sequence[str]) -> None:
    """Raise SettingsError with all that is wrong with the settings of what capture takes.

    Nothing is built or read: what only the model's or the data set's own code can say comes when they are
    made. A data set's class may say more by `problems(**arguments)`, a static method that returns sentences.
    """
    with Collected() as read:
        read(lambda: optimizer_factor(optimizer_maker(chosen(config, "optimizer", overrides))))
        read(
            lambda: scheduler_maker(
                config, overrides, optimizer_maker(chosen(config, "optimizer", overrides))
            )
        )
        read(lambda: autocast_of(config, pick_device(config)))
        read(lambda: _check_object(chosen(config, "model", overrides), "model"))
        read(lambda: _check_data(chosen(config, "data", overrides)))
        read(_check_weight_files, config)


def check_training(
    config: DictConfig,
    overrides: Sequence[str],
    comm: Communicator,
    mpi: "MpiCommunicator | None",
    run: Path,
) -> Path | None:
    """The checkpoint that a run in the folder `run` goes on from, looked for by rank 0; raises SettingsError
    with everything that is wrong beside what `plans.request_of` says."""
    source = None
    with Collected() as read:
        read(check_material, config, overrides)
        read(check_transport, config, alone=mpi is None)
        read(lambda: check_elastic(train_settings(config), mpi))
        if comm.rank == 0:
            source = read(lambda: begins_from(checkpoint_settings(config), run))
            read(lambda: check_folder(checkpoint_settings(config), run))
    return source


def _check_object(arguments: Arguments, group: str) -> None:
    """That the class is there and takes these arguments."""
    target = str(arguments["_target_"])
    found = locate(target, group)
    given = {name: value for name, value in arguments.items() if not name.startswith("_")}
    if "_args_" in arguments or "_partial_" in arguments:
        return
    try:
        signature = inspect.signature(found)
    except (ValueError, TypeError):  # some of C have none
        return
    try:
        signature.bind(**given)
    except TypeError as error:
        raise SettingsError(f"{group}._target_={target}: {error}") from None
    say = getattr(found, "problems", None)
    if isinstance(inspect.getattr_static(found, "problems", None), staticmethod) and say is not None:
        try:
            said = list(say(**given))
        except Exception as error:
            raise SettingsError(f"{group}._target_={target}: {reason(error)}") from error
        if said:
            raise SettingsError(*map(str, said))


def _check_data(arguments: Arguments) -> None:
    with Collected() as read:
        read(data_keys, arguments)
        read(lambda: pads(arguments.get("pad") or {}))
        read(_check_object, made_of(arguments), "data")


def _check_weight_files(config: DictConfig) -> None:
    missing = [w.file for w in weight_files(config) if not own_path(w.file).is_file()]
    if missing:
        raise SettingsError(*(f"train.init_from: there is no file {name} on this host" for name in missing))
