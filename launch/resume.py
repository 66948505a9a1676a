"""The checkpoints of a training command: where they are kept, and which one it goes on from."""

from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor, nn

from gpp.api.checkpoints import Checkpoints, find
from gpp.api.memory import InMemory, found_copy
from gpp.checkpoint.folder import Kept, check_place, check_space, newest
from gpp.checkpoint.shelf import Copy, Shelf
from gpp.checkpoint.tensors import CheckpointError
from gpp.plan import Plan, plan_to_json
from gpp.runtime.communicator import Communicator

from .settings import CheckpointSettings, own_path, own_yaml
from .writable import check_writable

AUTO = "auto"


def folder_of(settings: CheckpointSettings, run: Path) -> Path:
    """Where checkpoints are kept."""
    named = settings.checkpoint_folder
    return run / "checkpoints" if named is None else own_path(named)


def checkpoints(
    config: DictConfig, settings: CheckpointSettings, plan: Plan, run: Path, shelf: Shelf | None
) -> Checkpoints | None:
    """When and where they are written, if they are. Configuration and plan are kept with each. `shelf` is for
    copies in memory."""
    if settings.checkpoint_every is None:
        return None
    kept = kept_of(config, settings, plan, run)
    if shelf is None or settings.checkpoint_memory is None:
        return kept
    return replace(kept, memory=InMemory(shelf, settings.checkpoint_memory, _say))


def _say(text: str) -> None:
    print(text, flush=True)


def kept_of(config: DictConfig, settings: CheckpointSettings, plan: Plan, run: Path) -> Checkpoints:
    """Where they are, and how many stay; also of a run that writes none unless it is asked to stop."""
    return Checkpoints(
        folder=folder_of(settings, run),
        every=settings.checkpoint_every,
        keep=settings.checkpoint_keep,
        texts={"config.yaml": own_yaml(config), "plan.json": plan_to_json(plan)},
    )


def begins_from(settings: CheckpointSettings, run: Path) -> Path | None:
    """The checkpoint that train.resume means, or a folder that has one; None: training begins.

    Raises CheckpointError if there is none where one is named, or where there are damaged ones alone; and,
    before anything of an older run is written over, if the folder's checkpoints are of later steps. The bytes
    of its files are not looked at: that is for all ranks.
    """
    path, kept = _asked_for(settings, run)
    if settings.checkpoint_every is not None:
        check_place(folder_of(settings, run), 0 if kept is None else kept.manifest.step)
    return None if kept is None else path


def check_folder(settings: CheckpointSettings, run: Path) -> None:
    """Raise SettingsError if checkpoints are to be written, and none can be made in their folder."""
    if settings.checkpoint_every is not None:
        check_writable(folder_of(settings, run), "train.checkpoint_folder")


def check_room(
    settings: CheckpointSettings, run: Path, model: nn.Module, factor: float, *, averaged: bool
) -> None:
    """Raise CheckpointError if the disk has no room for the checkpoints of a model, of which the optimizer
    keeps `factor` bytes for each that is trained; known once the model is built, before it is captured."""
    if settings.checkpoint_every is None:
        return
    saved = sum(
        value.nbytes for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)
    )
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    check_space(folder_of(settings, run), saved + trained * (factor + averaged), settings.checkpoint_keep)


def copy_to_take(shelf: Shelf, source: Path | None, comm: Communicator) -> Copy | None:
    """The newest copy in memory, unless the checkpoint that the run would begin from is newer; called by all
    ranks together."""
    copy = found_copy(shelf, comm)
    if copy is None or source is None:
        return copy
    on_disk = comm.broadcast_object(lambda: find(source, {})[0].manifest.step)
    return copy if copy.manifest.step >= on_disk else None


def _asked_for(settings: CheckpointSettings, run: Path) -> tuple[Path, Kept | None]:
    folder = folder_of(settings, run)
    if settings.resume is None:
        return folder, None
    if settings.resume == AUTO:
        kept, wrong = newest(folder)
        if kept is None and wrong:
            raise CheckpointError(f"train.resume: no checkpoint in {folder} is whole: {wrong[0]}")
        return folder, kept
    path = own_path(settings.resume)
    try:
        return path, find(path, {})[0]
    except CheckpointError as error:
        raise CheckpointError(f"train.resume: {error}") from None
