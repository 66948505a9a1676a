"""What every node of an exported graph depends on, and whether its samples can be told apart.

A value is per-sample iff it depends on a batch key, its dimension 0 is exactly the batch symbol and no other
dimension grows with it, and a probe agrees: the graph on n samples against the graph on their halves. Shape
alone is not enough: `arange(0, 4 * batch, 4)` and batch norm pass it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx

from gpp.program.traced import POSITION, symbol

from .export import EXAMPLES, CaptureError, Exported, path_of

# Halves of a batch run through other kernels than the whole: a sum may differ in its last bits. What mixes
# samples differs in the first ones.
_TOLERANCE = 1e-3


class Dependence(Enum):
    """Where a value comes from."""

    STATE = "state"  # a parameter, buffer or constant
    KEY = "key"  # an input of the batch
    SIZE = "size"  # a number computed from sizes
    TABLE = "table"  # a tensor computed from state and sizes alone
    SAMPLES = "samples"  # depends on the batch


@dataclass(frozen=True)
class Dependences:
    """By node name: the dependence, whether samples are in dimension 0, whether the node mixes samples.

    `scalars` holds for every scalar that depends on the batch its value on all samples and on both halves;
    it is empty where nothing was run.
    """

    kind: Mapping[str, Dependence]
    per_sample: frozenset[str]
    coupled: frozenset[str]
    scalars: Mapping[str, tuple[float, float, float]]


def classify(exported: Exported) -> dict[str, Dependence]:
    """The dependence of every node. Raises CaptureError where a number is read off a tensor's values."""
    written: set[str] = set()
    while True:
        kinds = _classify(exported, written)
        # a table that values of samples are written into holds samples from the start
        found = {
            name
            for group in exported.together
            if any(kinds[name] is Dependence.SAMPLES for name in group)
            for name in group
            if kinds[name] is Dependence.TABLE
        }
        if not found:
            return kinds
        written |= found


def _classify(exported: Exported, written: set[str]) -> dict[str, Dependence]:
    state = {*exported.parameters, *exported.buffers, *exported.constants}
    kinds: dict[str, Dependence] = {}
    for node in exported.module.graph.nodes:
        if node.op == "output":
            continue
        if node.op in ("placeholder", "get_attr"):
            kinds[node.name] = Dependence.KEY if node.name in exported.batch_keys else Dependence.STATE
            if node.op == "placeholder" and node.name not in state and node.name not in exported.batch_keys:
                kinds[node.name] = Dependence.SIZE if node.target == POSITION else Dependence.STATE
            continue
        inputs = {kinds[i.name] for i in node.all_input_nodes}
        if _is_number(node.meta.get("val")):
            if Dependence.SAMPLES in inputs and "sym_size" not in str(node.target):
                raise CaptureError(
                    f"module {path_of(node) or 'the model'!r} reads a number off a tensor ({node.target}): "
                    "its value would differ between micro-batches. Use tensor arithmetic"
                )
            kinds[node.name] = Dependence.SIZE
        elif inputs & {Dependence.KEY, Dependence.SAMPLES} or node.name in written:
            kinds[node.name] = Dependence.SAMPLES
        else:
            kinds[node.name] = Dependence.TABLE
    return kinds


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)


def has_sample_shape(node: fx.Node, batch: Any) -> bool:
    """Whether dimension 0 is exactly the batch symbol and no other dimension contains it."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() == 0:
        return False
    first, *rest = value.shape
    return symbol(first) == batch and all(symbol(size) is None for size in rest)


def dependences(exported: Exported, values: Mapping[str, Tensor] | None) -> Dependences:
    """Classify every node; with real `values` of the placeholders (EXAMPLES samples) probe them too.

    Without values (a model on the meta device) shapes decide, and batch norm in training is known to mix.
    """
    kinds = classify(exported)
    shaped = {
        node.name
        for node in exported.module.graph.nodes
        if kinds.get(node.name) in (Dependence.SAMPLES, Dependence.KEY)
        and has_sample_shape(node, exported.batch)
    }
    if values is None:
        coupled = {n.name for n in exported.module.graph.nodes if _known_to_mix(n)}
        return Dependences(kinds, frozenset(shaped), frozenset(coupled), {})
    probe = _Probe(exported, kinds, shaped)
    probe.compare(values)
    per_sample = frozenset(shaped - probe.relative)
    return Dependences(kinds, per_sample, frozenset(probe.coupled), probe.scalars)


def _known_to_mix(node: fx.Node) -> bool:
    if node.op != "call_function" or "batch_norm" not in str(node.target):
        return False
    arguments = [*node.args, *node.kwargs.values()]
    return True in arguments[5:6] if "aten.batch_norm" in str(node.target) else True


class _Probe:
    """Runs the graph on all samples and on both halves, node by node.

    After each per-sample node the halves go on with what is cut from the whole, so a difference is the next
    node's own doing: it mixes samples. Integers that differ are row numbers of the batch: they have a meaning
    within their micro-batch alone, so the halves keep their own, and they are not per-sample (`relative`).
    """

    def __init__(self, exported: Exported, kinds: Mapping[str, Dependence], shaped: set[str]) -> None:
        self.exported = exported
        self.kinds = kinds
        self.shaped = shaped
        self.coupled: set[str] = set()
        self.relative: set[str] = set()
        self.shared = {name for group in exported.together for name in group}
        self.scalars: dict[str, tuple[float, float, float]] = {}

    def compare(self, values: Mapping[str, Tensor]) -> None:
        half = EXAMPLES // 2
        whole = _Run(self.exported.module, values, 0)
        halves = [
            _Run(
                self.exported.module,
                {k: v[s : s + half] if k in self.exported.batch_keys else v for k, v in values.items()},
                s,
            )
            for s in (0, half)
        ]
        users = {n: len(n.users) for n in self.exported.module.graph.nodes}
        for node in self.exported.module.graph.nodes:
            if node.op == "output":
                break
            try:
                full = whole.step(node)
            except Exception as error:
                kinds = ", ".join(f"{k} {v.dtype}" for k, v in self._keys(values).items())
                raise CaptureError(
                    f"module {path_of(node) or 'the model'!r} fails on the data set's first samples: "
                    f"{str(error).strip().splitlines()[0]}. The batch has {kinds}: does the data set give "
                    "the dtypes and values that the model expects?"
                ) from error
            parts = [run.attempt(node) for run in halves]
            if node.name in self.shaped and isinstance(full, Tensor):
                self._per_sample(node, halves, [full[:half], full[half:]], parts)
            elif isinstance(full, Tensor) and full.dim() == 0 and not full.is_complex():
                if all(isinstance(part, Tensor) for part in parts):
                    self.scalars[node.name] = (float(full), float(parts[0]), float(parts[1]))
            for used in node.all_input_nodes:
                users[used] -= 1
                if users[used] == 0:
                    for run in (whole, *halves):
                        run.env.pop(used, None)

    def _keys(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: values[node] for node, key in self.exported.batch_keys.items()}

    def _per_sample(self, node: fx.Node, halves: list["_Run"], cut: list[Tensor], parts: list[Any]) -> None:
        agree = all(_close(a, b) for a, b in zip(cut, parts, strict=True))
        ran = all(isinstance(part, Tensor) for part in parts)
        if not agree and ran and not (cut[0].is_floating_point() or cut[0].is_complex()):
            self.relative.add(node.name)
            return
        if not agree:
            self.coupled.add(node.name)
        if node.name not in self.shared or not ran:  # views of a storage that is written go on as they are
            for run, piece in zip(halves, cut, strict=True):
                run.env[node] = piece


class _Run:
    """One interpretation of the graph, advanced a node at a time by its owner."""

    def __init__(self, module: fx.GraphModule, values: Mapping[str, Tensor], first: int) -> None:
        # Buffers are updated by some nodes: every run gets its own copy.
        self.values = {k: v.detach().clone() for k, v in values.items()}
        self.values[POSITION] = torch.tensor([0, first])
        self.interpreter = fx.Interpreter(module)
        self.env: dict[fx.Node, Any] = self.interpreter.env

    def attempt(self, node: fx.Node) -> Any:
        """`step`, or None where the node cannot run on what it is given (row numbers of a larger batch)."""
        try:
            return self.step(node)
        except (IndexError, RuntimeError, TypeError):
            self.env[node] = None
            return None

    def step(self, node: fx.Node) -> Any:
        with torch.no_grad():
            if node.op == "placeholder":
                key = POSITION if node.target == POSITION else node.name
                self.env[node] = self.values.get(key)
            else:
                self.env[node] = self.interpreter.run_node(node)
        return self.env[node]


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    if not a.dtype.is_floating_point:
        # A rounding may tip an argmax or a comparison: a few elements may differ.
        return bool((a != b).float().mean() <= 0.05) if a.numel() else True
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-6) if a.numel() else 1.0
    return bool((a - b).abs().max() <= _TOLERANCE * scale) if a.numel() else True
