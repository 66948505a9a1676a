"""Makes Triton's interpreter right for bfloat16, and its loops run with every numpy.

The interpreter keeps bfloat16 as 16-bit integers and computes on those: products, sums and comparisons come
out wrong without a word, and a conversion from float32 truncates. Here conversions round to nearest even as a
GPU does, matrix products use the values, and any other arithmetic on bfloat16 is an error, because kernels
compute in float32 and convert at loads and stores. Triton 3.6 takes a loop's bound in a way that numpy 2.4
refuses; later ones do as is done here.
"""

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter


class BfloatArithmeticError(TypeError):
    """A kernel computes on bfloat16 values."""


def widen(bits: NDArray[Any]) -> NDArray[np.float32]:
    """The values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: NDArray[Any]) -> NDArray[np.uint16]:
    """The bit patterns of the nearest bfloat16 values, ties to even; not-a-number stays so."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def repair() -> None:
    """Patch the interpreter of this process; a second call changes nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "bfloat16_repaired", False):
        return
    builder.bfloat16_repaired = True
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return cast(self, source, target)
        if after == tl.bfloat16:
            return interpreter.TensorHandle(narrow(source.data), tl.bfloat16)
        return cast(self, interpreter.TensorHandle(widen(source.data), tl.float32), target)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _as_float32(a), _as_float32(b), *rest)

    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
    for name in ("binary_op", "unary_op", "create_fma"):
        setattr(builder, name, _refusing(name, getattr(builder, name)))
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_bounds(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda value: int(value.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_bounds
    interpreter.ReduceOps.apply_impl = _refusing("reduction", interpreter.ReduceOps.apply_impl)


def arithmetic() -> AbstractContextManager[Any]:
    """Floating-point arithmetic as on a GPU, where an overflow is an infinity and no warning."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")


def _as_float32(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle(widen(handle.data), tl.float32)


def _refusing(name: str, compute: Any) -> Any:
    def refuse_bfloat16(self: Any, *operands: Any) -> Any:
        flat = [o for operand in operands for o in (operand if isinstance(operand, tuple) else (operand,))]
        if any(getattr(getattr(o, "dtype", None), "scalar", None) == tl.bfloat16 for o in flat):
            raise BfloatArithmeticError(
                f"{name} on bfloat16 values: kernels compute in float32, convert with .to(tl.float32) first"
            )
        return compute(self, *operands)

    return refuse_bfloat16
