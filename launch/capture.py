"""python -m launch.capture: captures the model and writes graph.json, for launch.plan profile=graph.json.

Plans are then made where there is no torch and no model. train.init=recorded captures on the meta device a
model that is larger than this machine.
"""

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from gpp.graph import graph_to_json

from .guard import first_rank
from .plans import graph_text
from .settings import check_choices, check_keys
from .start import launch, own_overrides, run_folder

if TYPE_CHECKING:
    from gpp.runtime.mpi import MpiCommunicator


def capture(config: DictConfig, mpi: "MpiCommunicator | None") -> None:
    """The task of this command."""
    first_rank(mpi, lambda: _capture(config))


def _capture(config: DictConfig) -> None:
    from .job import gather

    check_keys(config)
    check_choices(config)
    graph = gather(config, own_overrides())[0].subject.graph
    target = run_folder().resolve() / "graph.json"
    target.write_text(graph_to_json(graph))
    print(f"{graph_text(graph)}: {target}", flush=True)


if __name__ == "__main__":
    launch(capture, "capture")
