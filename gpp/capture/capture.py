"""A torch module to its computation graph and to the traced graphs that its stages are carved from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.fx import Node

from gpp.graph import ComputationGraph
from gpp.program.autocast import Autocast
from gpp.program.random import arguments
from gpp.program.stage import Results, TermSum
from gpp.program.traced import TracedMode, TracedModel, symbol

from .dependence import Dependence, Dependences, dependences
from .export import CaptureError, Exported, export_mode
from .grouping import Grouping, base_name, group
from .measure import NodeCost, measure
from .operators import boundary, build_graph
from .precision import under_rules
from .tail import Tails, split_tails

MANY = 4  # heavy nodes: more than torch's own attention has


@dataclass(frozen=True)
class Captured:
    """A captured model: `graph` to plan with, `traced` to run; `coupled` names operators that mix samples.

    `roots` are the seeds of the loss terms' gradients. `loss_coupled` is set where the loss of a batch does
    not follow from its halves' losses: it mixes samples, or divides by something else than their number.
    `coupled_metrics` are metrics of that kind: they are averaged over micro-batches. `merged` counts the
    heavy nodes of operators that hold many, because the values between them do not have the samples in
    dimension 0.
    """

    graph: ComputationGraph
    traced: TracedModel
    train: Results
    evaluate: Results
    roots: Mapping[str, float]
    coupled: tuple[str, ...]
    loss_coupled: bool
    coupled_metrics: tuple[str, ...]
    merged: Mapping[str, int]


def capture(
    model: nn.Module, batch: Mapping[str, Tensor], *, seed: int = 0, autocast: Autocast | None = None
) -> Captured:
    """Capture `model` with an example batch of export.EXAMPLES samples on the model's device (meta works).

    With `autocast` the graph computes what the model computes under it. Raises CaptureError naming the module
    and the reason.
    """
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    if not any(trainable.values()):
        raise CaptureError(f"{type(model).__name__} has no trainable parameter")
    modes = {
        training: _Mode.make(model, export_mode(model, batch, training=training, seed=seed), batch, autocast)
        for training in (True, False)
    }
    train, evaluate = modes[True], modes[False]
    costs = measure(train.exported, trainable)
    _keep_gradients_of_loss(train, costs)
    if not any(costs[name].requires_grad for name in train.tails.roots):
        raise CaptureError(f"the loss of {type(model).__name__} depends on no trainable parameter")
    sizes = {
        name: value.numel() * value.element_size()
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    }
    loss_coupled = _mixing(train, train.tails.loss)
    graph = build_graph(train.exported, train.facts, train.tails, train.grouping, costs, trainable, sizes)
    if loss_coupled:  # its stages see whole micro-batches: no replicas
        graph = replace(
            graph,
            operators=tuple(
                replace(
                    op, batch_coupled=op.batch_coupled or not train.tails.roots.keys().isdisjoint(op.terms)
                )
                for op in graph.operators
            ),
        )
    learning = frozenset(name for name, cost in costs.items() if cost.requires_grad)
    return Captured(
        graph=graph,
        traced=TracedModel(
            train=replace(train.traced(), needs_grad=learning),
            evaluate=_matched(evaluate, graph).traced(),
            trainable=trainable,
        ),
        train=Results(train.tails.loss, train.tails.metrics, train.tails.ignored),
        evaluate=Results(evaluate.tails.loss, evaluate.tails.metrics, evaluate.tails.ignored),
        roots=train.tails.roots,
        coupled=tuple(op.name for op in graph.operators if op.batch_coupled),
        loss_coupled=loss_coupled,
        coupled_metrics=tuple(m.name for m in train.tails.metrics if _mixing(train, m)),
        merged={name: n for name, n in train.grouping.heavy.items() if n > MANY},
    )


@dataclass(frozen=True)
class _Mode:
    exported: Exported
    facts: Dependences
    tails: Tails
    grouping: Grouping

    @classmethod
    def make(
        cls, model: nn.Module, exported: Exported, batch: Mapping[str, Tensor], autocast: Autocast | None
    ) -> "_Mode":
        facts = dependences(exported, _values(model, exported, batch))
        _check_predictions(type(model).__name__, exported, facts)
        tails = split_tails(exported)
        if autocast is not None:  # only now: who mixes samples shows in full precision
            exported, facts = under_rules(exported, facts, tails.nodes, autocast)
        return cls(exported, facts, tails, group(exported, facts, tails))

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Data types of the graph's tensors."""
        values = {n.name: n.meta.get("val") for n in self.exported.module.graph.nodes}
        return {name: value.dtype for name, value in values.items() if isinstance(value, Tensor)}

    def traced(self) -> TracedMode:
        return TracedMode(
            module=self.exported.module,
            parameters=self.exported.parameters,
            buffers=self.exported.buffers,
            constants=self.exported.constants,
            batch_keys=self.exported.batch_keys,
            operator_of=self.grouping.operator_of,
            attached=self.grouping.attached,
            boundary=frozenset(n.name for ns in boundary(self.exported, self.grouping).values() for n in ns),
            needs_grad=frozenset(),
            terms={n.name: n.name for n in self.exported.module.graph.nodes if n.name in self.tails.terms},
            predictions={name: node.name for name, node in self.exported.predictions.items()},
        )


def _check_predictions(model: str, exported: Exported, facts: Dependences) -> None:
    """Raise CaptureError for a prediction that micro-batches would change."""
    mixed = set(facts.coupled)
    for node in exported.module.graph.nodes:
        if any(used.name in mixed for used in node.all_input_nodes):
            mixed.add(node.name)
    for name, node in exported.predictions.items():
        if node.name not in facts.per_sample or node.name in mixed:
            raise CaptureError(
                f"the prediction {name!r} of {model}.forward is no value for each sample: its shape is "
                f"{tuple(node.meta['val'].shape)}, and samples must be in dimension 0, none depending on "
                "another"
            )


def _values(model: nn.Module, exported: Exported, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Real values for the probe, or None for a model on the meta device."""
    state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    state |= dict(model.named_buffers(remove_duplicate=False))
    values = {k: state[v] for k, v in {**exported.parameters, **exported.buffers}.items()}
    values |= exported.constants
    values |= {k: batch[v] for k, v in exported.batch_keys.items()}
    return None if any(v.is_meta for v in values.values()) else values


def _matched(mode: _Mode, graph: ComputationGraph) -> _Mode:
    """Evaluation's operators under the names of training's.

    Both are grouped by the same rule, so they carry the same names where both have them; an operator that
    only evaluation has goes with the operator before it in evaluation's order.
    """
    names = {}
    last = graph.operators[0].name
    for name in mode.grouping.names:
        last = names[name] = name if name in graph.index else last
    if all(k == v for k, v in names.items()):
        return mode
    return replace(
        mode,
        grouping=replace(
            mode.grouping,
            names=tuple(dict.fromkeys(names.values())),
            operator_of={k: names[v] for k, v in mode.grouping.operator_of.items()},
            attached={k: names[v] for k, v in mode.grouping.attached.items()},
        ),
    )


def _sums_over_batch(mode: _Mode, node: Node) -> int:
    """How many operands are scalars that depend on the batch."""
    return sum(
        mode.facts.kind[used.name] is Dependence.SAMPLES
        and isinstance(used.meta.get("val"), Tensor)
        and used.meta["val"].dim() == 0
        for used in node.args
        if isinstance(used, Node)
    )


def _keep_gradients_of_loss(mode: _Mode, costs: Mapping[str, NodeCost]) -> None:
    """What the loss does not depend on (a metric's inside) receives no gradient."""
    reached = {node.name for node in _upstream(mode, mode.tails.roots)}
    for name, cost in costs.items():
        if name not in reached:
            cost.requires_grad = False


def _mixing(mode: _Mode, result: TermSum) -> bool:
    """Whether a result of a batch is not what its halves' results say.

    A mean must be the mean of the halves' means, the parts of a pair the sums. Where nothing was run a term
    that was computed from pairs of samples (a contrastive matrix) gives it away.
    """
    scalars = mode.facts.scalars
    if result.weight is None and _divides_unevenly(mode, {name for name, _ in result.terms}):
        return True
    if not scalars:
        return _reads_pairs(mode, {name for name, _ in result.terms})
    share = 0.5 if result.weight is None else 1.0
    for name, _ in (*result.terms, *(result.weight or ())):
        if name in scalars:
            whole, first, second = scalars[name]
            joined = share * (first + second)
            # both sides sum the same numbers; a square root of a mean differs in its third digit at best
            rounding = 1e-2 if mode.dtypes[name].itemsize < 4 else 1e-5
            if abs(whole - joined) > rounding * max(abs(whole), abs(first), abs(second), 1e-6):
                return True
    return False


def _upstream(mode: _Mode, terms: Iterable[str]) -> list[Node]:
    """The terms and all that they are computed from, last first."""
    found: set[str] = set()
    more = set(terms)
    while more:
        found |= more
        nodes = []
        for node in reversed(mode.exported.module.graph.nodes):
            if node.name in found or any(u.name in found for u in node.users):
                found.add(node.name)
                nodes.append(node)
        # who writes into a storage is read by whoever reads it, without being its argument
        more = {name for group in mode.exported.together if group & found for name in group - found}
    return nodes


def _reads_pairs(mode: _Mode, terms: set[str]) -> bool:
    return any(
        sum(symbol(size) is not None for size in node.meta["val"].shape) > 1
        for node in _upstream(mode, terms)
        if isinstance(node.meta.get("val"), Tensor)
    )


def _divides_unevenly(mode: _Mode, terms: set[str]) -> bool:
    """Whether a mean divides by what the data say, even where those of the example happen to be even: a mean
    of class losses that leaves out or weighs classes, a quotient of two sums over the batch."""
    for node in _upstream(mode, terms):
        name = base_name(node)
        if name == "div" and _sums_over_batch(mode, node) == 2:
            return True
        if name in ("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d"):
            given = arguments(node)
            if given["reduction"] == 1 and (given["weight"] is not None or given["ignore_index"] >= 0):
                return True
    return False
