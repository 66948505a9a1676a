"""What each node costs, from one run on fake tensors under autograd: no arithmetic, any size of model.

Gives per node the FLOPs, bytes moved and kernels of forward, exactly what autograd saves, and whether a
gradient flows (an exported graph's own `requires_grad` is False everywhere).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gpp.program.autocast import is_cast
from gpp.program.traced import POSITION

from .export import EXAMPLES, Exported


@dataclass
class NodeCost:
    """Totals over EXAMPLES samples; `saved` maps storages that backward needs to their bytes.

    `rows` are the bytes of a table's rows that a lookup read, the table itself then being no part of `bytes`.
    """

    flops: float = 0.0
    bytes: float = 0.0
    kernels: int = 0
    rows: float = 0.0
    saved: dict[int, int] = field(default_factory=dict)
    requires_grad: bool = False
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None


def measure(exported: Exported, trainable: Mapping[str, bool]) -> dict[str, NodeCost]:
    """Run the graph on fake tensors and note every node's cost."""
    costs: dict[str, NodeCost] = {}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        values = {
            node.name: fake_value(node, exported, trainable, mode)
            for node in exported.module.graph.nodes
            if node.op == "placeholder"
        }
        state = {_storage(v) for k, v in values.items() if k not in exported.batch_keys and v is not None}
        shared = {name for group in exported.together for name in group}
        _Measured(exported.module, values, state, shared, costs).run()
    return costs


def fake_value(
    node: fx.Node, exported: Exported, trainable: Mapping[str, bool], mode: FakeTensorMode
) -> Tensor:
    """A fake tensor for one placeholder at EXAMPLES samples."""
    if node.target == POSITION:
        return torch.zeros(2, dtype=torch.int64)
    if node.name in exported.constants:
        return mode.from_tensor(exported.constants[node.name])
    value = node.meta["val"]
    shape = [EXAMPLES if isinstance(size, torch.SymInt) else size for size in value.shape]
    made = torch.empty(shape, dtype=value.dtype)
    if node.name in exported.parameters and trainable[exported.parameters[node.name]]:
        made.requires_grad_()
    return made


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _total(tensors: Sequence[Tensor]) -> int:
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)


class _Measured(fx.Interpreter):
    def __init__(
        self,
        module: fx.GraphModule,
        values: Mapping[str, Tensor],
        state: set[int],
        shared: set[str],
        costs: dict[str, NodeCost],
    ) -> None:
        super().__init__(module)
        self.values = values
        self.state = state
        self.costs = costs
        self.shared: dict[str, Any] = dict.fromkeys(
            shared
        )  # by name: values of storages that are written later on
        self.kept: list[Tensor] = []  # keeps storages alive, so that their addresses stay theirs

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            value = self.values[node.name]
            self.costs[node.name] = _shaped(NodeCost(), value)
            return value
        if node.op == "output":
            for name, tensor in self.shared.items():
                self.costs[name].requires_grad = isinstance(tensor, Tensor) and tensor.requires_grad
            return None
        cost = self.costs[node.name] = NodeCost()

        def save(tensor: Tensor) -> Tensor:
            storage = _storage(tensor)
            if storage not in self.state:
                cost.saved[storage] = tensor.untyped_storage().nbytes()
                self.kept.append(tensor)
            return tensor

        with _Counter(cost), torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            result = super().run_node(node)
        if node.name in self.shared:
            self.shared[node.name] = result
        if is_cast(node) and _storage(self.env[node.all_input_nodes[0]]) in self.state:
            self.state.add(_storage(result))  # of a parameter: made once a step, no part of the stash
            self.kept.append(result)
        return _shaped(cost, result) and result


def _shaped(cost: NodeCost, value: Any) -> NodeCost:
    if isinstance(value, Tensor):
        cost.shape, cost.dtype = tuple(value.shape), value.dtype
        cost.requires_grad = value.requires_grad
    elif isinstance(value, tuple | list):
        cost.requires_grad = any(isinstance(v, Tensor) and v.requires_grad for v in value)
    return cost


def _attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Of the CPU's fused attention, which torch's table lacks: a product with keys, one with values."""
    rows = math.prod(query.shape[:-1])
    return 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])


_LOOKUPS = (
    torch.ops.aten.embedding,
    torch.ops.aten._embedding_bag,
    torch.ops.aten._embedding_bag_forward_only,
)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what is dispatched below autograd while one node runs."""

    def __init__(self, cost: NodeCost) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = cost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or func.namespace not in ("aten", "gpp"):
            return result
        tensors = [a for a in [*args, *kwargs.values()] if isinstance(a, Tensor)]
        made = [
            r for r in (result if isinstance(result, tuple | list) else [result]) if isinstance(r, Tensor)
        ]
        if not made or func in (torch.ops.aten.detach.default, torch.ops.aten.sym_size.int):
            return result
        self.cost.kernels += 1
        if func._overloadpacket in _LOOKUPS:
            table, indices = tensors[:2]
            read = math.prod(indices.shape) * math.prod(table.shape[1:])
            self.cost.flops += read
            self.cost.rows += read * table.element_size()
            self.cost.bytes += read * table.element_size() + _total([*tensors[1:], *made])
            return result
        self.cost.bytes += _total([*tensors, *made])
        formula = flop_registry.get(func._overloadpacket)
        if func._overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.cost.flops += _attention_flops(*args[:3])
        elif formula is not None:
            self.cost.flops += formula(*args, **kwargs, out_val=result)
        else:
            self.cost.flops += max(math.prod(t.shape) for t in [*tensors, *made])
        return result
