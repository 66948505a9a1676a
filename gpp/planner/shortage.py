"""Why a model has no plan: what is too large, and by how much."""

from gpp.plan import PlanError

from .intervals import Intervals
from .space import CHARGES, Space


def shortage(space: Space) -> PlanError:
    """The operator that is too large, or about how much the whole model is short of, as an error to raise."""
    alone = too_large(space)
    if alone is not None:
        return alone
    need, table = min(((_need(space, t), t) for t in _tables(space)), key=lambda pair: pair[0])
    count = f"{space.devices} device{'s' if space.devices > 1 else ''}"
    if need == float("inf"):
        return PlanError(
            f"no stages on {count} keep planner.constraints; use more devices or relax the constraints"
        )
    return PlanError(
        f"the model does not fit {count}: the fullest {_needs(space, need, table)}; use more devices, "
        f"devices with more memory or a smaller {_size(space)}"
    )


def too_large(space: Space) -> PlanError | None:
    """The operator that fits no device by itself, whatever it is planned with, as an error to raise."""
    runs = [(space.search(space.tree, t.micro_batch).heaviest_run(), t) for t in _tables(space)]
    (run, least), table = min(runs, key=lambda pair: pair[0][1])
    if least <= space.memory or least == float("inf"):
        return None
    operators = space.outline.operators(run, run + 1)
    name = space.problem.graph.operators[operators[0]].name
    others = f" with the {len(operators) - 1} after it" if operators[1:] else ""
    return PlanError(
        f"operator {name}{others} by itself {_needs(space, least, table)}; use devices with more memory, a "
        f"smaller {_size(space)} or an optimizer with less state"
    )


def _tables(space: Space) -> list[Intervals]:
    """A small micro-batch leaves less in flight, a large one may be split over more replicas."""
    sizes = space.problem.options.micro_batches
    few = sizes if space.problem.units.constrained else sorted({sizes[0], sizes[-1]})
    return [space.table(size) for size in few]


def _needs(space: Space, need: float, table: Intervals) -> str:
    return (
        f"needs about {need / 2**20:.1f} MiB at micro-batch {table.micro_batch}, a device of cluster "
        f"{space.problem.topology.name} has {space.memory / 2**20:.1f} MiB"
    )


def _size(space: Space) -> str:
    sizes = space.problem.options.micro_batches
    return "train.micro_batch" if len(sizes) == 1 and sizes[0] > 1 else "train.mini_batch"


def _need(space: Space, table: Intervals) -> float:
    """About the least memory of a device with which there is a plan."""
    need = 0.0
    for wariness in CHARGES:
        if need <= space.memory:
            both = [space.search(chain, table.micro_batch, wariness) for chain in (space.tree, space.leaves)]
            need = min(search.smallest() for search in both)
    return need
