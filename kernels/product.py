"""Matrix products with an epilogue: how they are laid on programs, and which of the two kernels makes them.

Products accumulate in float32, in blocks of the inner dimension in their order and never split over programs:
a row of the result does not depend on how many rows there are, and no result on timing. A product without an
epilogue is better left to torch, whose library's are faster.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .activation import ACTIVATIONS
from .keyed import threshold_and_scale
from .launch import address, architecture, blocks, launch, processors
from .product_kernels import described_product_kernel, product_kernel
from .tuning import tuned

DESCRIBING = (90, 100, 103)  # architectures with descriptors, and shared memory for the tiles
WORTH_A_COPY = 256  # the least size of a product for which an operand is copied to be described
DESCRIBED_BYTES = 16  # what the address and the rows of a matrix that a descriptor describes are multiples of


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of the result that one program computes, `inner` elements of the sum at a time.

    The epilogue takes the columns in `parts`. A multiprocessor holds `resident` programs.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    parts: int = 1
    resident: int = 1


@dataclass(frozen=True, slots=True)
class Dropout:
    """Dropout by the bits of `keyed`, of the element at `row * columns + column` of the result."""

    position: Tensor
    key: int
    elements: int
    p: float


def dropout_of(
    position: Tensor | None = None, key: int = 0, elements: int = 0, p: float = 0.0
) -> Dropout | None:
    """As operators take it."""
    return None if position is None else Dropout(position, key, elements, p)


def dropout_numbers(dropout: Dropout | None) -> tuple[Any, ...]:
    """As kernels take it."""
    if dropout is None:
        return None, 0, 0, 0, 0.0
    return dropout.position, dropout.key, dropout.elements, *threshold_and_scale(dropout.p)


def configuration(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    described: bool = False,
    drops: bool = False,
    ragged: bool = False,
) -> Tile:
    """A function of the result's shape, the dtype and the kernel; `inner` depends on the dtype alone.

    The widest tile is the fastest, where it leaves no multiprocessor without one and its epilogue stays in
    registers: that of dropout, which counts in 64 bits, does not, nor does a `ragged` one.
    """
    if dtype.itemsize > 2:
        return Tile(64, 64, 32, 4, 3, 4)
    if described and not drops and blocks(rows, 128) * blocks(columns, 256) >= 128:
        return Tile(128, 256, 64, 8, 3, 4)
    if blocks(rows, 128) * blocks(columns, 128) < 64:
        return Tile(64, 64, 64, 4, 4, 2, 2)
    if not described and (drops or ragged):
        return Tile(128, 64, 64, 8, 3, 4)
    return Tile(128, 128, 64, 8, 3, 4 if drops else 2)


def is_ragged(*widths: int) -> bool:
    """Whether a width is no multiple of 16: each element is then reached by an address of its own, which
    takes registers."""
    return any(width % 16 for width in widths)


def precision() -> str:
    """How float32 products are made: TF32 only where the user allowed it for torch's own."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def describable(matrix: Tensor) -> bool:
    """Whether a descriptor can describe a matrix whose rows lie one behind the other in memory: it and they
    start at multiples of 16 bytes."""
    rows, columns = matrix.shape
    stride = matrix.stride(0) * matrix.element_size()
    aligned = stride % DESCRIBED_BYTES == 0 and address(matrix) % DESCRIBED_BYTES == 0
    return rows > 0 and columns > 0 and matrix.stride(1) == 1 and matrix.stride(0) >= columns and aligned


def is_described(a: Tensor, b: Tensor, *ends: Tensor | None) -> bool:
    """Whether the product of a [rows, inner] and b [columns, inner] is made by descriptors: a function of the
    dtypes, shapes, strides and alignment and of the chip. `ends` are read and written by the epilogue.

    A large product is worth a copy of an operand that cannot be described: element by element it would be
    read many times, and nothing fetched ahead.
    """
    if a.dtype.itemsize != 2 or architecture(a) not in DESCRIBING:
        return False
    sizes = (*a.shape, b.shape[0])
    allowed = min(sizes) >= WORTH_A_COPY or all(describable(lying(m)) for m in (a, b))
    return min(sizes) > 0 and allowed and all(end is None or describable(end) for end in ends)


def described(matrix: Tensor) -> Tensor:
    """The matrix, or a copy of it whose rows, or columns if it is turned, begin where descriptors allow."""
    lies = lying(matrix)
    if describable(lies):
        return matrix
    unit = DESCRIBED_BYTES // lies.element_size()
    rows, columns = lies.shape
    copy = lies.new_empty((rows, blocks(columns, unit) * unit))[:, :columns].copy_(lies)
    return copy.t() if is_turned(matrix) else copy


def lying(matrix: Tensor) -> Tensor:
    """The matrix or its transpose, whichever has unit stride within rows if one has."""
    return matrix.t() if is_turned(matrix) else matrix


def is_turned(matrix: Tensor) -> bool:
    """Whether the transpose of a matrix is what lies in memory row by row."""
    return matrix.stride(1) != 1 and matrix.stride(0) == 1


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    kept: Tensor | None = None,
    saved: Tensor | None = None,
    dropout: Dropout | None = None,
    residual: Tensor | None = None,
) -> None:
    """out [rows, columns] = residual + dropout(activation(z)), z = a b^T + bias, of a [rows, inner] and b
    [columns, inner] of any strides; `kept` gets z. With `saved`, z is multiplied by the activation's
    derivative instead. `residual` can be `out` itself.
    """
    (rows, inner), columns = a.shape, b.shape[0]
    saved, residual, bias = (None if t is None else t.contiguous() for t in (saved, residual, bias))
    matrices = [None if t is None else t.view(rows, columns) for t in (out, kept, saved, residual)]
    by_descriptors = is_described(a, b, *matrices)
    tile = configuration(
        rows, columns, a.dtype, by_descriptors, dropout is not None, is_ragged(columns, inner)
    )
    sizes = {"rows": rows, "columns": columns, "inner": inner}
    if by_descriptors:
        a, b = described(a), described(b)
        ends = 1 << sum(1 << i for i, end in enumerate((kept, saved, dropout, residual)) if end is not None)
        tile = tuned("described_product", tile, a, **sizes, epilogue=ends)
    elif dropout is None:
        tile = tuned("product", tile, a, **sizes)
    tiles = blocks(rows, tile.rows) * blocks(columns, tile.columns)
    numbers = dropout_numbers(dropout)
    options = {
        "ACTIVATION": ACTIVATIONS.index(activation),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "INNER": tile.inner,
        "PARTS": tile.parts,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    if not by_descriptors:
        strides = (*a.stride(), *b.stride())
        arguments = (a, b, *matrices, bias, rows, columns, inner, *strides, *numbers)
        launch(product_kernel, (tiles,), *arguments, PRECISION=precision(), **options)
        return
    parts = [m if m is None else _descriptor(m, tile.rows, tile.columns // tile.parts) for m in matrices]
    operands = [
        _descriptor(lying(m), *((tile.inner, size) if is_turned(m) else (size, tile.inner)))
        for m, size in ((a, tile.rows), (b, tile.columns))
    ]
    launch(
        described_product_kernel,
        (min(tiles, processors(a) * tile.resident),),
        *(*operands, *parts, bias, rows, columns, inner, *numbers),
        A_TURNED=is_turned(a),
        B_TURNED=is_turned(b),
        **options,
    )


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of a matrix that is read or written in blocks of this size."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def matrix(tensor: Tensor) -> Tensor:
    """All leading dimensions as one; strides are kept wherever torch can."""
    count = 1
    for size in tensor.shape[:-1]:
        count *= size
    return tensor.reshape(count, tensor.shape[-1])
