"""A captured model as its stages see it: one ATen graph a mode, and who is who in it.

Nodes are named as in the graph. Per-sample values have the samples in dimension 0; only those cross stages.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

POSITION = "gpp_position"  # the placeholder of (step, first sample), int64, that keyed random nodes read


def symbol(size: Any) -> Any:
    """The expression of a symbolic size, None of a plain number."""
    node = getattr(size, "node", None)
    return None if node is None else node.expr


@dataclass(frozen=True)
class TracedMode:
    """The model in training or in evaluation.

    `graph` holds placeholders, calls and one output; `module` carries what `get_attr` nodes name. The four
    mappings say what each placeholder is. `operator_of` covers every call that depends on the batch and is
    not part of a scalar tail; tables and sizes are in none and are recomputed wherever they are needed.
    `attached` lists buffer updates without a batch input (counters), by operator. `boundary` are the nodes
    that other operators read, `needs_grad` those of all nodes that carry a gradient. `terms` maps a term's
    name to its node, `predictions` (of evaluation) that of a value for each sample that the user wants.
    """

    module: torch.fx.GraphModule
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    constants: Mapping[str, Tensor]
    batch_keys: Mapping[str, str]
    operator_of: Mapping[str, str]
    attached: Mapping[str, str]
    boundary: frozenset[str]
    needs_grad: frozenset[str]
    terms: Mapping[str, str]
    predictions: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def nodes(self) -> dict[str, torch.fx.Node]:
        """The nodes of the graph by name."""
        return {node.name: node for node in self.graph.nodes}

    @property
    def graph(self) -> torch.fx.Graph:
        """The graph of `module`."""
        return self.module.graph


@dataclass(frozen=True)
class TracedModel:
    """Both modes; `trainable` says of each parameter's full name whether it learns."""

    train: TracedMode
    evaluate: TracedMode
    trainable: Mapping[str, bool]
