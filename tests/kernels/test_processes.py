"""What needs a process of its own: interpreted kernels, compiled ones, an import that touches no device."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kernels.ahead_of_time import SHARED_MEMORY
from tests.thorough import ALL, thorough

ROOT = Path(__file__).parents[2]
ATTENTION = ("forward", "query", "key_value")  # its kernels that multiply matrices


def python(*arguments: str, interpret: bool) -> str:
    """The output of a Python process that ended well."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_kernels_under_the_interpreter() -> None:
    output = python("-m", "pytest", "-p", "no:cacheprovider", "tests/kernels/numerics", interpret=True)
    assert " passed in" in output and "skipped" not in output, output[-2000:]


def compiled(architecture: int) -> list[dict[str, Any]]:
    asked = [str(architecture), *(["all"] if ALL else [])]
    output = python("-m", "benchmarks.kernels.variants", *asked, interpret=False)
    return [json.loads(line) for line in output.splitlines()]


@pytest.fixture(scope="module")
def tables() -> dict[int, list[dict[str, Any]]]:
    chips = list(SHARED_MEMORY) if ALL else [90]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(chips, pool.map(compiled, chips), strict=True))


@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=thorough)])
def test_kernels_compile_without_spilling(architecture: int, tables: dict[int, list[dict[str, Any]]]) -> None:
    table = tables[architecture]
    assert {row["kernel"] for row in table} == {
        "forward_kernel",
        "backward_input_kernel",
        "backward_weight_kernel",
        "finish_weight_kernel",
        "add_norm_kernel",
        "add_norm_backward_kernel",
        "dropout_kernel",
        "sum_kernel",
        "cross_entropy_kernel",
        "cross_entropy_backward_kernel",
        "pointwise_loss_kernel",
        "pointwise_loss_backward_kernel",
        "total_kernel",
        "product_kernel",
        "activation_backward_kernel",
        "column_sum_kernel",
        "bag_forward_kernel",
        "bag_key_kernel",
        "bag_sum_kernel",
        "bag_join_kernel",
        "interaction_forward_kernel",
        "interaction_backward_kernel",
        "join_forward_kernel",
        "join_weight_kernel",
        "attention_forward_kernel",
        "attention_delta_kernel",
        "attention_query_kernel",
        "attention_key_value_kernel",
        *(["join_described_kernel", "described_product_kernel"] if architecture == 90 else []),
    }
    assert [row for row in table if row["stack"] > 0] == []
    assert [row for row in table if row["shared"] > SHARED_MEMORY[architecture]] == []


def is_crowded(case: str) -> bool:
    """Beside a mask of each query, gradients of keys that heads share leave a tile too small for wgmma."""
    return "grouped" in case and any(mask in case for mask in ("of queries", "added"))


def test_half_precision_and_tf32_products_use_the_tensor_cores_of_hopper(
    tables: dict[int, list[dict[str, Any]]],
) -> None:
    kinds = ("product_kernel", *(f"attention_{kind}_kernel" for kind in ATTENTION))
    products = [
        row
        for row in tables[90]
        if any(kind in row["kernel"] for kind in kinds)
        and "torch.float32" not in row["case"]
        and not is_crowded(row["case"])
    ]
    assert len(products) >= 15
    assert [row for row in products if row["wgmma"] == 0] == []


def test_joins_in_half_precision_use_them_too(tables: dict[int, list[dict[str, Any]]]) -> None:
    joins = [r for r in tables[90] if r["kernel"].startswith("join_") and "float32" not in r["case"]]
    assert len(joins) >= 5
    assert [row for row in joins if row["wgmma"] == 0] == []


def test_any_number_of_samples_and_places_runs_the_same_compiled_kernels() -> None:
    code = """
import torch, triton
from benchmarks.kernels.variants import empty
from kernels.ahead_of_time import NoDevice
from kernels import add_norm, add_norm_backward, add_norm_forward, add_norm_gradient
from kernels import attention, attention_gradient, bag_sums, embedding_bag, embedding_bag_gradient
from kernels import gradient_sum, interaction, join_gradient, join_linear, linear, linear_gradient, product
triton.runtime.driver.set_active(NoDevice(90))
compiled = set()
def compile_only(kernel, grid, *arguments, **options):
    compiled.add((kernel.__name__, kernel.warmup(*arguments, grid=grid, **options).hash))
norms = (add_norm_backward, add_norm_forward)
for module in (*norms, bag_sums, embedding_bag, gradient_sum, interaction, product):
    module.launch = compile_only
attention.launch = attention_gradient.launch = compile_only
join_linear.launch = join_gradient.launch = compile_only
weight, total = empty(256, 64, dtype=torch.bfloat16), empty(256, 64, dtype=torch.float32)
for samples, places in ((16, 1000), (33, 999), (100, 4096)):
    indices = [empty(places + table, dtype=torch.int64) for table in range(2)]
    bags = (indices, [empty(samples, dtype=torch.int64)] * 2)
    embedding_bag.launch_forward([empty(10, 64, dtype=torch.float32)] * 2, *bags, "sum", False, False)
    dy = empty(2, samples, 64, dtype=torch.float32)
    embedding_bag_gradient.launch_dense(dy, *bags, [10, 10], "sum", False)
    x = empty(samples, 9, 64, dtype=torch.bfloat16)
    interaction.launch_backward(interaction.launch_forward(x, 1), x, 1)
    x = x[:, 0].contiguous()
    dz = linear.launch_forward_keeping(x, weight, None, "silu")[0]
    linear_gradient.launch_backward_input_activation(dz, weight, x, "silu")
    linear_gradient.launch_accumulate_weight(total, dz, x)
    x = empty(samples, 64, dtype=torch.float32)
    drop = (empty(2, dtype=torch.int64), (1 << 62) + samples, 64, 0.1)
    options = (x, x, None, None, 1e-5, True, torch.float32, *drop)
    y, s, mean, rstd = add_norm.launch_forward(*options)
    add_norm_gradient.launch_backward_both(y, s, s, mean, rstd, None, x.dtype, x.dtype, *drop)
    gradient_sum.launch_sum([x, x, x], torch.float32)
    q = empty(samples, 2, places, 32, dtype=torch.bfloat16)
    numbers = (None, empty(2, dtype=torch.int64), 1 << 62, 1 << 33, 0.1, False, None)
    y, *saved = attention.launch_forward(q, q, q, *numbers)
    delta = attention_gradient.launch_delta(y, y)
    attention_gradient.launch_query(y, q, q, q, *saved, delta, *numbers)
    attention_gradient.launch_key_value(y, q, q, q, *saved, delta, *numbers)
    for width in (64, 65):
        xs = [empty(samples, width, dtype=torch.bfloat16)] * 2
        y = join_linear.launch_forward(xs, empty(32, 2 * width, dtype=torch.bfloat16), None, "relu")
    join_gradient.launch_accumulate_weight(empty(32, 2 * width, dtype=torch.float32), y, xs)
print(*sorted(name for name, _ in compiled))
"""
    assert python("-c", code, interpret=False).split() == [
        "add_norm_backward_kernel",
        "add_norm_kernel",
        "attention_delta_kernel",
        "attention_forward_kernel",
        "attention_key_value_kernel",
        "attention_query_kernel",
        "bag_forward_kernel",
        "bag_join_kernel",
        "bag_key_kernel",
        "bag_sum_kernel",
        *["described_product_kernel"] * 3,
        "interaction_backward_kernel",
        "interaction_forward_kernel",
        "join_described_kernel",
        "join_forward_kernel",
        "join_weight_kernel",
        "sum_kernel",
    ]


def test_import_needs_no_device() -> None:
    code = """
import sys, torch, triton
def refuse(*_): raise AssertionError("a driver was asked for")
type(triton.runtime.driver).active = property(refuse)
import kernels.fuse, kernels.attention, kernels.embedding_bag, kernels.interaction
from kernels.linear import linear
print(linear(torch.ones(2, 3), torch.ones(4, 3), None, "relu").sum().item())
assert not torch.cuda.is_initialized() and not any(m.startswith("gpp.") for m in sys.modules)
"""
    assert python("-c", code, interpret=False).strip() == "24.0"
