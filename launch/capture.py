"""python -m launch.capture: captures the model and writes graph.json, for launch.plan profile=graph.json.

Plans are then made where there is no torch and no model. train.init=recorded captures on the meta device a
model that is larger than this machine.
"""

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from gpp.graph import graph_to_json

from .guard import first_rank
from .plans import graph_text
from .problems import Collected
from .settings import check_choices, check_keys, train_settings
from .start import launch, own_overrides, run_folder

if TYPE_CHECKING:
    from gpp.runtime.mpi import MpiCommunicator


def capture(config: DictConfig, mpi: "MpiCommunicator | None") -> None:
    """The task of this command."""
    first_rank(mpi, lambda: _capture(config))


def _capture(config: DictConfig) -> None:
    from .job import gather
    from .validation import check_material

    overrides = own_overrides()
    with Collected() as read:
        read(check_keys, config)
        read(check_choices, config)
        read(train_settings, config)
        read(check_material, config, overrides)
    graph = gather(config, overrides)[0].subject.graph
    target = run_folder().resolve() / "graph.json"
    target.write_text(graph_to_json(graph))
    print(f"{graph_text(graph)}: {target}", flush=True)


if __name__ == "__main__":
    launch(capture, "capture")
