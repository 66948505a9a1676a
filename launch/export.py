"""python -m launch.export checkpoint=PATH: the weights of a checkpoint as one file for plain torch.

It needs neither the model nor MPI: `model.load_state_dict(safetensors.torch.load_file("model.safetensors"))`.
"""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from .guard import first_rank
from .problems import Collected, SettingsError
from .settings import own_path
from .start import launch
from .writable import check_writable

if TYPE_CHECKING:
    from gpp.runtime.mpi import MpiCommunicator


def export(config: DictConfig, mpi: "MpiCommunicator | None") -> None:
    """The task of this command."""
    first_rank(mpi, lambda: _export(config))


def _export(config: DictConfig) -> None:
    from gpp.api.checkpoints import find_sound
    from gpp.api.crew import Crew
    from gpp.checkpoint.reader import weights
    from gpp.checkpoint.tensors import CheckpointError, write_tensors
    from gpp.plan_table import readable_bytes

    with Collected() as read:
        output, averaged = read(_output, config), read(_averaged, config)
        found = read(lambda: find_sound(_path(config, "checkpoint"), Crew(None)))
    kept, wrong = found
    for text in wrong:
        print(f"passed over: {text}")
    part = kept.manifest.part
    if averaged and not part.averages:
        raise CheckpointError(f"{kept.path} has no moving average of the weights: train.ema keeps one")
    tensors = weights(kept, part.weights)
    if averaged:
        tensors |= weights(kept, part.averages, averaged=True)
    half = output.with_name(f"{output.name}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        size = write_tensors(half, tensors).bytes
        half.replace(output)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            half.unlink()
    what = "moving averages" if averaged else "weights"
    print(f"{len(tensors)} {what} of step {kept.manifest.step}, {readable_bytes(size)}: {output}", flush=True)


def _averaged(config: DictConfig) -> bool:
    if not isinstance(config.averaged, bool):
        raise SettingsError(f"averaged must be true or false, it is {config.averaged!r}")
    return config.averaged


def _output(config: DictConfig) -> Path:
    output = _path(config, "output")
    check_writable(output.parent, "output")
    if output.is_dir():
        raise SettingsError(f"output must be a file, {output} is a folder")
    return output


def _path(config: DictConfig, key: str) -> Path:
    value = OmegaConf.select(config, key)
    if not isinstance(value, str) or not value:
        raise SettingsError(f"say which file: {key}=path, it is {value!r}")
    return own_path(value)


if __name__ == "__main__":
    launch(export, "export")
