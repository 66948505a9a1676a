"""Random numbers that depend on nothing but (seed, operator, step, sample, element).

So the same sample sees the same dropout mask under every plan, in every micro-batch, on every device. A
number is the top 24 bits of a 64-bit mix (Steele, Lea and Flood's SplitMix64 finaliser) of a counter; the
arithmetic is that of wrapping 64-bit integers, which a GPU kernel can repeat bit for bit.
"""

import hashlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .traced import POSITION, symbol

RESOLUTION = 1 << 24
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


class RandomNodeError(ValueError):
    """A random operator that cannot be keyed."""


def key_of(seed: int, name: str) -> int:
    """A 63-bit key of one random node."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _shift(value: Tensor, bits: int) -> Tensor:
    """A logical shift to the right (torch's is arithmetic)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix(value: Tensor) -> Tensor:
    """64 well-mixed bits from 64 bits, elementwise on int64."""
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)


@torch.library.custom_op("gpp::keyed_bits", mutates_args=())
def keyed_bits(position: Tensor, key: int, shape: Sequence[int], dim: int, per_sample: int) -> Tensor:
    """24 random bits for each element of `shape`, int32.

    `position` is int64 (step, first sample). Dimension `dim` holds `per_sample` rows for each sample, the
    samples from the first on; dim = -1 means that no dimension does, and only the step counts.
    """
    device = position.device
    stream = mix(mix(position[0] * _GOLDEN + key) + key)
    count = math.prod(shape)
    if dim < 0:
        counter = torch.arange(count, device=device).view(shape)
    else:
        before, after = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        rows = torch.arange(shape[dim], device=device)
        sample = position[1] + torch.div(rows, per_sample, rounding_mode="floor")
        outer = torch.arange(before, device=device)[:, None] * per_sample + (rows % per_sample)
        elements = before * per_sample * after
        counter = (sample * elements + outer * after)[:, :, None] + torch.arange(after, device=device)
        counter = counter.view(shape)
    return (_shift(mix(stream + (counter + 1) * _GOLDEN), 40)).to(torch.int32)


@keyed_bits.register_fake
def _(position: Tensor, key: int, shape: Sequence[int], dim: int, per_sample: int) -> Tensor:
    return position.new_empty(shape, dtype=torch.int32)


def keyed_uniform(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in [0, 1) from 24-bit integers."""
    return bits.to(torch.float32).mul(1.0 / RESOLUTION).to(dtype)


def keyed_normal(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers from two sets of bits (Box and Muller)."""
    radius = torch.sqrt(-2.0 * torch.log((first.to(torch.float32) + 1.0) / (RESOLUTION + 1)))
    angle = second.to(torch.float32) * (2.0 * math.pi / RESOLUTION)
    return (radius * torch.cos(angle)).to(dtype)


def keyed_exponential(bits: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    """Exponential numbers of that rate, never 0 (their logarithm is taken)."""
    return (torch.log((bits.to(torch.float32) + 0.5) * (1.0 / RESOLUTION)) * (-1.0 / rate)).to(dtype)


def keyed_bernoulli(uniform: Tensor, probability: Tensor | float, dtype: torch.dtype) -> Tensor:
    """One where a uniform number lies in the upper part of that size, as dropout keeps."""
    return (uniform >= 1.0 - probability).to(dtype)


def keyed_dropout(value: Tensor, bits: Tensor, p: float) -> Tensor:
    """Inverted dropout: kept elements are scaled by 1 / (1 - p)."""
    if p >= 1.0:
        return value * 0.0
    keep = bits >= threshold(p)
    return value * keep.to(value.dtype) * (1.0 / (1.0 - p))


def threshold(p: float) -> int:
    """The least 24-bit number that survives dropout with probability p."""
    return round(p * RESOLUTION)


def keyed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bits: Tensor,
    mask: Tensor | None,
    p: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
) -> Tensor:
    """Scaled dot-product attention written out, with keyed dropout on the weights.

    A query that no key is left for gets zeros, as in torch's.
    """
    if gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    factor = 1.0 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if causal:
        allowed = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(allowed.logical_not(), float("-inf"))
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(mask.logical_not(), float("-inf"))
        else:
            scores = scores + mask
    weights: Tensor = torch.ops.aten._safe_softmax(scores, -1)
    return keyed_dropout(weights, bits, p) @ value


def keyed(module: fx.GraphModule, seed: int, names: Mapping[fx.Node, str], batch: Any) -> None:
    """Replace every random node of `module`'s graph, in place, by keyed ones.

    `names` gives each random node's stable name; `batch` is the symbol of the batch size, by which the
    dimension that holds the samples is found. Raises RandomNodeError for operators that have no keyed form.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if not is_random(node):
            continue
        with graph.inserting_before(node):
            replacement = _keyed_node(graph, node, seed, names[node], batch)
        if replacement is None:
            continue
        replacement.meta.update(node.meta)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)


def is_random(node: fx.Node) -> bool:
    """Whether running the node draws random numbers."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name
    given = arguments(node)
    if name == "aten::scaled_dot_product_attention":
        return bool(given["dropout_p"] > 0)
    if name in _DROPOUTS:
        return bool(given["p"] > 0 and given["train"])
    if name in _RECURRENT:
        return bool(given["dropout"] > 0 and given["train"])
    return torch.Tag.nondeterministic_seeded in node.target.tags


_DROPOUTS = ("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::dropout_")
_RECURRENT = ("aten::gru", "aten::lstm", "aten::rnn_tanh", "aten::rnn_relu")


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an ATen call by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            bound[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def _keyed_node(graph: fx.Graph, node: fx.Node, seed: int, name: str, batch: Any) -> fx.Node | None:
    assert isinstance(node.target, torch._ops.OpOverload)
    op = node.target._schema.name.removeprefix("aten::")
    given = arguments(node)
    value = node.meta["val"]

    def call(target: Callable[..., Any], *args: Any) -> fx.Node:
        return graph.call_function(target, args)

    def bits(shape: Sequence[Any], salt: str = "") -> fx.Node:
        dim, rows = _sample_dimension(shape, batch, name)
        sizes = [_size_node(graph, node, size) for size in shape]
        position = next(n for n in graph.nodes if n.op == "placeholder" and n.target == POSITION)
        made = call(torch.ops.gpp.keyed_bits.default, position, key_of(seed, name + salt), sizes, dim, rows)
        made.meta["val"] = node.meta.get("val")
        made.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        return made

    if op in ("dropout", "dropout_"):
        return call(
            keyed_dropout, given["input" if "input" in given else "self"], bits(value.shape), given["p"]
        )
    if op == "native_dropout":
        raise RandomNodeError(f"{name}: native_dropout has no keyed form; use torch.nn.functional.dropout")
    if op == "feature_dropout":
        shape = [*value.shape[:2], *([1] * (value.dim() - 2))]
        return call(keyed_dropout, given["input"], bits(shape), given["p"])
    if op == "scaled_dot_product_attention":
        query, key = given["query"].meta["val"], given["key"].meta["val"]
        shape = [*query.shape[:-1], key.shape[-2]]
        return call(
            keyed_attention,
            *(given[k] for k in ("query", "key", "value")),
            bits(shape),
            given["attn_mask"],
            given["dropout_p"],
            given["is_causal"],
            given["scale"],
            given["enable_gqa"],
        )
    if op in ("rand_like", "rand"):
        return call(keyed_uniform, bits(value.shape), value.dtype)
    if op in ("randn_like", "randn"):
        return call(keyed_normal, bits(value.shape), bits(value.shape, "second"), value.dtype)
    if op == "uniform":
        return call(_between, call(keyed_uniform, bits(value.shape), value.dtype), given["from"], given["to"])
    if op == "normal_functional":
        drawn = call(keyed_normal, bits(value.shape), bits(value.shape, "second"), value.dtype)
        return call(_between, drawn, given["mean"], given["mean"] + given["std"])
    if op == "exponential":
        return call(keyed_exponential, bits(value.shape), given["lambd"], value.dtype)
    if op == "bernoulli":
        probability = given["p"] if given.get("p") is not None else given["self"]
        drawn = call(keyed_uniform, bits(value.shape), torch.float32)
        return call(keyed_bernoulli, drawn, probability, value.dtype)
    if f"aten::{op}" in _RECURRENT:
        raise RandomNodeError(
            f"{name} drops elements between its layers, inside one operator: build it of single layers with "
            "nn.Dropout between them, or set its dropout to 0"
        )
    raise RandomNodeError(
        f"{name} draws random numbers by {op}, which has no keyed form: the model would give other numbers "
        "under every plan. Use dropout, rand, randn, bernoulli, uniform_, normal_ or exponential_, "
        "or draw them in the data set"
    )


def _between(drawn: Tensor, low: float, high: float) -> Tensor:
    return drawn * (high - low) + low


def _sample_dimension(shape: Sequence[Any], batch: Any, name: str) -> tuple[int, int]:
    """Which dimension holds the samples, and how many rows of it each sample has; (-1, 1) if none does."""
    found = []
    for dim, size in enumerate(shape):
        if (count := symbol(size)) is not None:
            rows = count / batch
            if not rows.is_Integer:
                raise RandomNodeError(f"{name} is drawn for {count} rows of a batch of {batch} samples")
            found.append((dim, int(rows)))
    if len(found) > 1:
        raise RandomNodeError(f"{name} is drawn for pairs of samples, shape {tuple(shape)}: it has no owner")
    return found[0] if found else (-1, 1)


def _size_node(graph: fx.Graph, node: fx.Node, size: Any) -> Any:
    """An argument for one size of a shape: the integer, or a node that computes it from the batch size."""
    wanted = symbol(size)
    if wanted is None:
        return size
    for earlier in graph.nodes:
        if earlier is node:
            break
        if symbol(earlier.meta.get("val")) == wanted:
            return earlier
    source = next(n for n in graph.nodes if n.op == "placeholder" and _first_symbol(n) is not None)
    length = graph.call_function(torch.ops.aten.sym_size.int, (source, 0))
    length.meta["val"] = source.meta["val"].shape[0]
    factor = wanted / symbol(length.meta["val"])
    if factor == 1:
        return length
    product = graph.call_function(operator.mul, (length, int(factor)))
    product.meta["val"] = size
    return product


def _first_symbol(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return symbol(value.shape[0]) if isinstance(value, Tensor) and value.dim() else None
