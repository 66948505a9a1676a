"""Every kernel in its production configurations, compiled for one GPU architecture on a machine without one.

    python -m benchmarks.kernels.variants 90

prints one JSON object a line, as `kernels.ahead_of_time` has them; with `all` behind it those of seldom used
variants too.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain

import torch

from kernels import (
    add_norm,
    add_norm_backward,
    add_norm_gradient,
    attention,
    attention_gradient,
    bias_gradient,
    cross_entropy,
    dropout,
    embedding_bag,
    embedding_bag_gradient,
    gradient_sum,
    interaction,
    join_gradient,
    join_linear,
    layer_norm,
    linear,
    linear_gradient,
    pointwise_loss,
    rms_norm,
)
from kernels.activation import NEEDS_PREACTIVATION
from kernels.ahead_of_time import Case, compiled
from kernels.rows import WHOLE_ROW


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def layer_norm_cases() -> Iterator[Case]:
    """(name, function, arguments) over widths in registers, the widest of them, and in a loop."""
    for dtype, widths in ((torch.bfloat16, (128, 1024)), (torch.float32, ())):
        for width in (*widths, WHOLE_ROW, WHOLE_ROW + 1000):
            x = empty(64, width, dtype=dtype)
            vector = empty(width, dtype=dtype)
            number = empty(64, dtype=torch.float32)
            case = f"{dtype} width {width}"
            yield case, layer_norm.launch_forward, (x, vector, vector, 1e-5)
            yield case, layer_norm.launch_backward_input, (x, x, number, number, vector)
        yield str(dtype), layer_norm.launch_backward_weight, (x, x, number, number, dtype)


def rms_norm_cases() -> Iterator[Case]:
    """(name, function, arguments) in registers and in a loop, of the kernels that layer norm has too."""
    for width in (1024, WHOLE_ROW, WHOLE_ROW + 1000):
        x = empty(64, width, dtype=torch.bfloat16)
        vector, number = empty(width, dtype=torch.float32), empty(64, dtype=torch.float32)
        case = f"rms norm width {width}"
        yield case, rms_norm.launch_forward, (x, vector, 1e-5)
        yield case, rms_norm.launch_backward_input, (x, x, number, vector)
    yield "rms norm", rms_norm.launch_backward_weight, (x, x, number, torch.float32)


def add_norm_cases(every: bool) -> Iterator[Case]:
    """bfloat16 dropped and added to a float32 stream takes most registers; whole rows and a loop."""
    position = empty(2, dtype=torch.int64)
    half, single = torch.bfloat16, torch.float32
    for dtype, stream, width, centred, dropped in (
        (half, single, 1024, True, True),
        (half, single, add_norm_backward.WHOLE_ROW, True, True),
        (half, single, WHOLE_ROW + 1000, True, True),
        *(((half, half, 1024, False, True), (half, half, WHOLE_ROW, True, False)) if every else ()),
        *(((single, single, w, c, True) for w in (64, WHOLE_ROW) for c in (True, False)) if every else ()),
    ):
        x, residual, dy = (empty(64, width, dtype=t) for t in (dtype, stream, dtype))
        if every:  # as a layer has them that puts its samples in dimension 1
            x = x.view(8, 8, width).transpose(0, 1)
            residual, dy = residual.view(8, 8, width), dy.view(8, 8, width).transpose(0, 1)
        vector, number = empty(width, dtype=stream), empty(*x.shape[:-1], dtype=single)
        drop = (position, 1 << 62, width, 0.1) if dropped else (None, 0, 0, 0.0)
        bias, mean = (vector, number) if centred else (None, None)
        case = f"add norm {dtype} {stream} width {width} {centred} {dropped}"
        yield case, add_norm.launch_forward, (x, residual, vector, bias, 1e-5, centred, dtype, *drop)
        given = dy, residual, residual, mean, number, vector, stream
        if dropped:
            yield case, add_norm_gradient.launch_backward_both, (*given, dtype, *drop)
        else:
            yield case, add_norm_gradient.launch_backward, given


def loss_cases() -> Iterator[Case]:
    """Cross entropy in registers and in a loop, with and without smoothing; the losses of elements."""
    for dtype, kind, smoothing in ((torch.bfloat16, "mean", 0.0), (torch.float32, "none", 0.1)):
        for classes in (10, WHOLE_ROW, WHOLE_ROW + 1000):
            x, target = empty(64, classes, dtype=dtype), empty(64, dtype=torch.int64)
            options = (kind, -100, smoothing)
            case = f"cross entropy {dtype} {kind} {classes} classes"
            loss, *statistics = cross_entropy.empty_forward(x, target, *options)
            yield case, cross_entropy.launch_forward, (x, target, *options)
            yield case, cross_entropy.launch_backward, (loss, x, target, *statistics, *options)
        for code in (pointwise_loss.MSE, pointwise_loss.BCE):
            loss = pointwise_loss.empty_forward(x, x, kind)
            case = f"loss {code} {dtype} {kind}"
            yield case, pointwise_loss.launch_forward, (code, x, x, kind)
            yield case, pointwise_loss.launch_backward, (code, loss, x, x, kind)


def linear_cases(every: bool) -> Iterator[Case]:
    """(name, function, arguments): the fullest epilogues of every tile of both kernels and of each precision,
    and the products of training."""
    half, whole = torch.bfloat16, torch.float32
    drop = (empty(2, dtype=torch.int64), 1 << 62, 1000, 0.1)
    fewer = [
        (half, "none", 4096, 1024, ()),
        (half, "relu", 4096, 1024, ("drop",)),
        (half, "gelu_tanh", 4096, 1024, ()),
        (half, "silu", 1024, 1024, ("residual",)),
        (half, "gelu_erf", 4096, 942, ("residual",)),
        (torch.float16, "gelu_erf", 4096, 1024, ()),
    ]
    for dtype, activation, rows, inner, ends in (
        *(fewer if every else ()),
        (half, "gelu_erf", 4096, 1024, ("residual",)),
        (half, "gelu_erf", 4096, 1024, ("residual", "drop")),
        (half, "gelu_erf", 4096, 942, ("residual", "drop")),  # a descriptor has no such rows: a copy is made
        (half, "gelu_erf", 128, 1024, ("residual", "drop")),
        (half, "gelu_erf", 128, 942, ("residual", "drop")),
        (whole, "gelu_erf", 4096, 1024, ("residual", "drop")),
    ):
        x, weight = empty(rows, inner, dtype=dtype), empty(4096, inner, dtype=dtype)
        dz, z = empty(rows, 4096, dtype=dtype), empty(rows, inner, dtype=dtype)
        residual, keyed = dz if "residual" in ends else None, drop if "drop" in ends else ()
        keeps = linear.keeps_z(activation, residual)
        forward = linear.launch_forward_keeping if keeps else linear.launch_forward
        case = f"{dtype} {activation} {rows} rows of {inner} {' '.join(ends)}"
        yield case, forward, (x, weight, empty(4096, dtype=dtype), activation, residual, *keyed)
        if rows == 128 or activation == "none":
            continue
        backward = linear_gradient.launch_backward_input_activation
        yield case, backward, (dz, weight, z, activation, *keyed)
        if inner == 1024:
            yield case, linear_gradient.launch_backward_activation, (dz, dz, activation, *keyed)
        if dtype == half:
            yield case, linear_gradient.launch_accumulate_weight, (empty(4096, inner, dtype=whole), dz, x)
        else:
            yield case, bias_gradient.launch_backward_bias, (dz,)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    arguments = (x, weight, empty(4096, dtype=dtype), activation, residual, *drop)
    yield "tf32 gelu_erf", linear.launch_forward_keeping, arguments
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def ragged_cases(every: bool) -> Iterator[Case]:
    """Layers of which no row starts at a multiple of 16, and none can be described: every element is reached
    by an address of its own, which takes registers."""
    drop = (empty(2, dtype=torch.int64), 1 << 62, 1000, 0.1)
    for dtype, activation, inner, columns, keyed in (
        (torch.bfloat16, "gelu_erf", 100, 1001, ()),
        (torch.float32, "gelu_tanh", 942, 1001, drop),
        *(((torch.bfloat16, "gelu_erf", 101, 4099, drop),) if every else ()),
        *(((torch.bfloat16, "gelu_erf", 4096, 150, ()),) if every else ()),
        *(((torch.float32, "gelu_erf", 4096, 1, drop),) if every else ()),
    ):
        rows = 65536 if columns < 256 else 8192
        x, weight = empty(rows, inner, dtype=dtype), empty(columns, inner, dtype=dtype)
        dz, z = empty(rows, columns, dtype=dtype), empty(rows, inner, dtype=dtype)
        case = f"{dtype} {activation} ragged {rows} x {inner} to {columns}"
        biases = (None, empty(columns, dtype=dtype)) if every else (None,)
        for bias in biases:
            yield case, linear.launch_forward_keeping, (x, weight, bias, activation, dz, *keyed)
        yield case, linear_gradient.launch_backward_input_activation, (dz, weight, z, activation, *keyed)
        if every and dtype != torch.float32:
            total = empty(columns, inner, dtype=torch.float32)
            yield case, linear_gradient.launch_accumulate_weight, (total, dz, x)


def sum_cases() -> Iterator[Case]:
    """Most parts of one launch; a float32 sum of bfloat16 parts."""
    half, single = torch.bfloat16, torch.float32
    for parts, dtype in (([single] * 8, single), ([half] * 8, half), ([single, half], single)):
        tensors = [empty(64, 1000, dtype=part) for part in parts]
        yield f"sum of {len(parts)} {parts[-1]} to {dtype}", gradient_sum.launch_sum, (tensors, dtype)


def join_cases(every: bool) -> Iterator[Case]:
    """The seven towers of CANDLE-Uno at once, more parts than a launch takes, widths that descriptors cannot
    describe, large tiles and small ones."""
    for dtype, activation, rows, width, parts in (
        (torch.bfloat16, "relu", 1024, 4096, 7),
        (torch.bfloat16, "gelu_tanh", 64, 4096, 10),
        (torch.bfloat16, "gelu_erf", 1024, 1024, 4),
        (torch.bfloat16, "relu", 1024, 942, 7),
        (torch.float32, "none", 1024, 4096, 4),
        (torch.bfloat16, "relu", 8192, 1024, 12),
        *(((torch.float32, "gelu_erf", 8192, 942, 12),) if every else ()),
    ):
        xs = [empty(rows, width, dtype=dtype)] * parts
        weight, bias = empty(4096, width * parts, dtype=dtype), empty(4096, dtype=dtype)
        case = f"join {dtype} {activation} {parts} parts of {rows} x {width}"
        smooth = activation in NEEDS_PREACTIVATION
        forward = join_linear.launch_forward_keeping if smooth else join_linear.launch_forward
        yield case, forward, (xs, weight, bias, activation)
        if activation == "relu" and width == 4096:
            total = empty(*weight.shape, dtype=torch.float32)
            dz = empty(rows, 4096, dtype=dtype)
            yield case, join_gradient.launch_accumulate_weight, (total, dz, xs)


def dropout_cases() -> Iterator[Case]:
    """In both widths of elements."""
    for dtype in (torch.bfloat16, torch.float32):
        position = empty(2, dtype=torch.int64)
        x = empty(64, 1000, dtype=dtype)
        yield f"{dtype}", dropout.launch_forward, (x, position, 1 << 62, 1000, 0.1)


def embedding_bag_cases() -> Iterator[Case]:
    """The paper's seven tables, ragged bags of one table, and the three forms of the gradient."""
    for dtype, tables, width, mode, ragged in (
        (torch.bfloat16, 7, 64, "sum", False),
        (torch.float32, 1, 128, "mean", True),
        (torch.float16, 32, 20, "mean", False),
    ):
        weights = [empty(10**6, width, dtype=dtype)] * tables
        shape, offsets = ((1000,), [empty(64, dtype=torch.int64)] * tables) if ragged else ((64, 100), [])
        bags = ([empty(*shape, dtype=torch.int64)] * tables, offsets)
        dy = empty(tables, 64, width, dtype=dtype)
        case = f"{dtype} {tables} tables of {width} {mode}"
        yield case, embedding_bag.launch_forward, (weights, *bags, mode, False, False)
        rows = [10**6] * tables
        yield f"{case} dense", embedding_bag_gradient.launch_dense, (dy, *bags, rows, mode, False)
        if dtype != torch.float16:
            yield f"{case} sparse", embedding_bag_gradient.launch_sparse, (dy, *bags, rows, mode, False)
            sums = [empty(10**6, width, dtype=torch.float32)] * tables
            yield f"{case} add", embedding_bag_gradient.launch_accumulate, (sums, dy, *bags, mode, False)


def interaction_cases() -> Iterator[Case]:
    """The smallest tile, the one of 27 features and the largest, which is also that of more features."""
    for dtype, features, width in (
        (torch.bfloat16, 9, 64),
        (torch.bfloat16, 27, 128),
        (torch.bfloat16, 100, 128),
        (torch.float16, 27, 64),
        (torch.float32, 27, 128),
        (torch.float32, 100, 64),
    ):
        x = empty(1024, features, width, dtype=dtype)
        dy = empty(1024, interaction.out_width(x, 1), dtype=dtype)
        case = f"{dtype} {features} features of {width}"
        yield case, interaction.launch_forward, (x, 1)
        yield case, interaction.launch_backward, (dy, x, 1)


def attention_cases(every: bool) -> Iterator[Case]:
    """Half precision with the largest heads, float32, and the head that leaves least room for registers; with
    every every head size, mask and option, heads that fill no block or are copied into larger ones, and heads
    that share keys."""
    bfloat, single = torch.bfloat16, torch.float32
    cases = [
        (bfloat, 128, True, 0.1, "none"),
        (single, 64, False, 0.1, "padding"),
        (bfloat, 100, False, 0.1, "added float32"),
    ]
    groups = [1] * len(cases)
    if every:
        masks = ("none", "padding", "of queries", "added")
        cases += list(itertools.product((bfloat,), (128, 64, 32), (False,), (0.0, 0.1), masks))
        cases += list(itertools.product((bfloat,), (128, 64, 32), (True,), (0.0, 0.1), masks[:1]))
        cases += list(itertools.product((single,), (128, 64, 32), (False,), (0.1,), masks))
        cases += [(single, head, True, 0.1, "none") for head in (128, 32)]
        wide = ("added float32", "padding of float32")
        cases += list(itertools.product((bfloat,), (80, 40), (False,), (0.1,), (*masks, *wide)))
        cases += list(itertools.product((bfloat,), (80, 40), (False, True), (0.0,), masks[:1]))
        cases += list(itertools.product((bfloat,), (128, 96, 64, 32, 16), (False,), (0.1,), wide))
        cases += list(itertools.product((bfloat,), (100, 96, 80, 40), (True,), (0.1,), masks[:1]))
        groups = [1] * len(cases)
        shared = list(itertools.product((bfloat,), (128, 96, 64, 16), (False,), (0.1,), (*masks, wide[0])))
        shared += list(itertools.product((single,), (128, 64, 16), (False,), (0.1,), ("none", "added")))
        cases, groups = cases + shared, groups + [4] * len(shared)
    for (dtype, head, causal, p, mask), group in zip(cases, groups, strict=True):
        query, key, value = empty(8, 512, 3, 16, head, dtype=dtype).permute(2, 0, 3, 1, 4)
        key, value = key[:, ::group], value[:, ::group]
        given = {
            "none": None,
            "padding": empty(8, 1, 1, 512, dtype=torch.bool),
            "padding of float32": empty(8, 1, 1, 512, dtype=single),
            "of queries": empty(8, 1, 512, 512, dtype=torch.bool),
            "added": empty(8, 1, 512, 512, dtype=dtype),
            "added float32": empty(8, 1, 512, 512, dtype=single),
        }[mask]
        position = empty(2, dtype=torch.int64)
        options = (given, position, 1 << 62, 16 * 512 * 512, p, causal, None)
        case = f"attention {dtype} head {head} causal {causal} p {p} mask {mask}"
        case += f" grouped by {group}" if group > 1 else ""
        yield case, attention.launch_forward, (query, key, value, *options)
        y, peak, log_sum = attention.empty_forward(query)
        yield case, attention_gradient.launch_delta, (y, y)
        arguments = (y, query, key, value, peak, log_sum, log_sum, *options)
        yield case, attention_gradient.launch_query, arguments
        yield case, attention_gradient.launch_key_value, arguments


def cases(every: bool) -> Iterator[Case]:
    """All of them, one after the other: the last change how torch makes products."""
    return chain(
        layer_norm_cases(),
        rms_norm_cases(),
        add_norm_cases(every),
        loss_cases(),
        dropout_cases(),
        sum_cases(),
        embedding_bag_cases(),
        interaction_cases(),
        attention_cases(every),
        join_cases(every),
        ragged_cases(every),
        linear_cases(every),
    )


if __name__ == "__main__":
    for variant in compiled(cases("all" in sys.argv[2:]), int(sys.argv[1])):
        print(json.dumps(asdict(variant)), flush=True)
