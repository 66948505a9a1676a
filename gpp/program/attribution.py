"""Where each node of a joint graph comes from in the model, those that autograd has traced too.

Tracing makes new nodes, which know nothing of those of the captured graph. So it is noted how long the new
graph is when a node of the forward begins to run, and when autograd begins with what that node has left.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

OWNER = "owner"  # in a node's meta: an `Owner`

_FRAME = re.compile(r'File "([^"]*)", line (\d+), in .*\n *(.*)')
_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass(frozen=True, slots=True)
class Owner:
    """Where a node comes from: the operator of the captured graph, the path of the model's innermost module
    ("" for the model itself), and the line of the model's source, "net.py:12: h = torch.log(x)", or ""."""

    operator: str
    module: str
    line: str

    def __str__(self) -> str:
        inside = f" in module {self.module}" if self.module not in ("", self.operator) else ""
        return f"operator {self.operator}{inside}{f' ({self.line})' if self.line else ''}"


def owner(node: fx.Node, operator: str) -> Owner:
    """Of a node as torch.export makes them."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    frames: list[tuple[str, str, str]] = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f"{os.path.basename(f)}:{n}: {code}" for f, n, code in frames if not f.startswith(_TORCH)]
    return Owner(operator, str(stack[-1][0]) if stack else "", own[-1] if own else "")


class Ledger:
    """Who worked from which node of a graph on; `length` says how many it has so far."""

    def __init__(self, length: Callable[[], int]) -> None:
        self._length = length
        self._begins: list[tuple[int, Owner | None]] = []
        self._owners: dict[Any, Owner | None] = {}  # by autograd's node

    def begin(self, owner: Owner | None) -> None:
        """From here on it is the work of `owner`."""
        self._begins.append((self._length(), owner))

    def leave(self, result: Any, owner: Owner | None) -> None:
        """What autograd has noted for `result`, and for no earlier one, is the backward of `owner`."""
        queue = [leaf.grad_fn for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        while queue:
            function = queue.pop()
            if function is not None and function not in self._owners:
                self._owners[function] = owner
                queue += [before for before, _ in function.next_functions]

    def follow(self) -> None:
        """Note, from now on, who autograd works for."""
        for function, owner in self._owners.items():
            function.register_prehook(lambda _, owner=owner: self.begin(owner))

    def write(self, nodes: Sequence[fx.Node]) -> None:
        """Into the nodes' meta."""
        ends = [start for start, _ in self._begins[1:]] + [len(nodes)]
        for (start, owner), end in zip(self._begins, ends, strict=True):
            for node in nodes[start:end]:
                if owner is not None:
                    node.meta[OWNER] = owner


class Attributing(fx.Interpreter):
    """Runs a forward graph; keeps a ledger if there is one."""

    def __init__(self, module: fx.GraphModule, ledger: Ledger | None = None) -> None:
        super().__init__(module)
        self._ledger = ledger

    def run_node(self, n: fx.Node) -> Any:
        """The node's result."""
        owner = n.meta.get(OWNER)
        if self._ledger is not None:
            self._ledger.begin(owner)
        result = super().run_node(n)
        if self._ledger is not None and n.op == "call_function":
            self._ledger.leave(result, owner)
        return result


def owner_of(node: fx.Node) -> Owner | None:
    """Where a node comes from, else where the nearest of its arguments do."""
    layer, seen = [node], {node}
    while layer:
        for candidate in layer:
            found = candidate.meta.get(OWNER)
            if isinstance(found, Owner):
                return found
        layer = [n for n in dict.fromkeys(i for c in layer for i in c.all_input_nodes) if n not in seen]
        seen.update(layer)
    return None
