from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.interpreter import narrow, repair, widen
from kernels.launch import INTERPRETED, launch
from kernels.layer_norm import layer_norm

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="about the interpreter alone")


@triton.jit
def cast_kernel(source, target, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(target + index, tl.load(source + index).to(target.dtype.element_ty))


@triton.jit
def add_kernel(source, target, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(target + index, tl.load(source + index) + tl.load(source + index))


@triton.jit
def sum_kernel(source, target, SIZE: tl.constexpr):
    tl.store(target, tl.sum(tl.load(source + tl.arange(0, SIZE)), axis=0))


@triton.jit
def dot_kernel(a, b, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    offset = index[:, None] * SIZE + index[None, :]
    tl.store(out + offset, tl.dot(tl.load(a + offset), tl.load(b + offset)))


@triton.jit
def overrun_kernel(source, target, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(target + index, tl.load(source + index))


def test_bfloat16_bits_round_to_nearest_even() -> None:
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8), 3.4e38, 1e-40, 0.0])
    values = torch.cat([torch.randn(4000), ties, torch.tensor([float("inf"), float("-inf")])])
    expected = values.bfloat16()
    bits = narrow(values.numpy())
    assert np.array_equal(bits.view(np.int16), expected.view(torch.int16).numpy())
    assert np.array_equal(widen(bits), expected.float().numpy())
    assert np.isnan(widen(narrow(np.array([np.nan], dtype=np.float32)))).all()


def test_bfloat16_conversions_and_products_are_exact() -> None:
    values = torch.randn(1024)
    narrowed = torch.zeros(1024, dtype=torch.bfloat16)
    launch(cast_kernel, (1,), values, narrowed, SIZE=1024)
    assert torch.equal(narrowed, values.bfloat16())
    widened = torch.zeros(1024)
    launch(cast_kernel, (1,), narrowed, widened, SIZE=1024)
    assert torch.equal(widened, narrowed.float())
    out = torch.zeros(32, 32)
    launch(dot_kernel, (1,), narrowed, widened.bfloat16(), out, SIZE=32)
    matrix = narrowed.view(32, 32).double()
    torch.testing.assert_close(out.double(), matrix @ matrix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [add_kernel, sum_kernel])
def test_bfloat16_arithmetic_is_refused(kernel: object) -> None:
    source = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="compute in float32"):
        launch(kernel, (1,), source, source.clone(), SIZE=16)


@triton.jit
def described_kernel(source, target, SIZE: tl.constexpr):
    target.store([0, SIZE // 2], source.load([0, SIZE // 2]))


def test_blocks_of_descriptors_may_reach_beyond_the_tensor_and_descriptors_may_not() -> None:
    memory, out = torch.ones(16, 8), torch.zeros(16, 8)
    block = [16, 8]
    launch(
        described_kernel, (1,), *(TensorDescriptor(t, [16, 8], [8, 1], block) for t in (memory, out)), SIZE=8
    )
    assert torch.equal(out[:, 4:], memory[:, 4:]) and not out[:, :4].any()
    launch(
        described_kernel,
        (1,),
        *(TensorDescriptor(t, [3, 6], [8, 1], block) for t in (memory, out * 0)),
        SIZE=8,
    )
    beyond = TensorDescriptor(memory[:4], [16, 8], [8, 1], block)
    with pytest.raises(InterpreterError, match="load of 48 elements out of bounds"):
        launch(described_kernel, (1,), beyond, TensorDescriptor(out, [16, 8], [8, 1], block), SIZE=8)


def test_repair_twice_is_once() -> None:
    before = tl.bfloat16, triton.runtime.interpreter.InterpreterBuilder.cast_impl
    repair()
    assert (tl.bfloat16, triton.runtime.interpreter.InterpreterBuilder.cast_impl) == before


def test_addresses_out_of_bounds_are_seen() -> None:
    memory = torch.zeros(64)
    with pytest.raises(InterpreterError, match="load of 6 elements out of bounds"):
        launch(overrun_kernel, (1,), memory[:10], memory[16:32], SIZE=16)


def test_threads_take_turns() -> None:
    inputs = [torch.randn(5 + i, 33) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: layer_norm(x, None, None, 1e-5), inputs))
    for x, y in zip(inputs, results, strict=True):
        torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (33,)))
