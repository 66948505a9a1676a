"""Why a model has no plan: what is too large, and by how much."""

from gpp.plan import PlanError

from .intervals import Intervals
from .space import CHARGES, Space


def shortage(space: Space) -> PlanError:
    """The operator that is too large, or about how much the whole model is short of, as an error to raise."""
    options = space.problem.options
    sizes = options.micro_batches
    count = f"{space.devices} device{'s' if space.devices > 1 else ''}"
    # a small micro-batch leaves less in flight, a large one may be split over more replicas
    tables = [space.table(size) for size in sorted({sizes[0], sizes[-1]})]
    if space.problem.units.constrained:
        tables = [space.table(size) for size in sizes]
    runs = [(space.search(space.tree, t.micro_batch).heaviest_run(), t) for t in tables]
    (run, least), table = min(runs, key=lambda pair: pair[0][1])
    need = least
    if least <= space.memory:
        need, table = min(((_need(space, t), t) for t in tables), key=lambda pair: pair[0])
    if need == float("inf"):
        return PlanError(
            f"no stages on {count} keep planner.constraints; use more devices or relax the constraints"
        )
    has = f"a device of cluster {space.problem.topology.name} has {space.memory / 2**20:.1f} MiB"
    needs = f"needs about {need / 2**20:.1f} MiB at micro-batch {table.micro_batch}, {has}"
    less = "train.micro_batch" if len(sizes) == 1 and sizes[0] > 1 else "train.mini_batch"
    if least <= space.memory:
        return PlanError(
            f"the model does not fit {count}: the fullest {needs}; use more devices, devices with more "
            f"memory or a smaller {less}"
        )
    operators = space.outline.operators(run, run + 1)
    name = space.problem.graph.operators[operators[0]].name
    others = f" with the {len(operators) - 1} after it" if operators[1:] else ""
    return PlanError(
        f"operator {name}{others} by itself {needs}; use devices with more memory, a smaller {less} or "
        "an optimizer with less state"
    )


def _need(space: Space, table: Intervals) -> float:
    """About the least memory of a device with which there is a plan."""
    need = 0.0
    for wariness in CHARGES:
        if need <= space.memory:
            both = [space.search(chain, table.micro_batch, wariness) for chain in (space.tree, space.leaves)]
            need = min(search.smallest() for search in both)
    return need
