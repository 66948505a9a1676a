"""Registration of operators with torch under the namespace gpp_kernels, and the checks of their arguments.

Every operator has a schema, a shape function (meta and fake tensors, export, compile), a kernel for CUDA
tensors and a reference in plain ATen for CPU tensors. Arguments are checked on all three ways, so a mistake
shows when a graph is traced.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .launch import INTERPRETED, on_cpu

NAMESPACE = "gpp_kernels"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

KERNELS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}  # what an operator runs on a GPU

_library = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def register(
    schema: str,
    *,
    check: Callable[..., None],
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
) -> torch._ops.OpOverload:
    """Define an operator by its schema, `name(arguments) -> results`; the four functions take its arguments.

    `check` raises TypeError or ValueError; `fake` makes results of the right shape, dtype and (contiguous)
    strides without computing.
    """

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def implementation(*arguments: Any, **options: Any) -> Any:
            check(*arguments, **options)
            return function(*arguments, **options)

        return implementation

    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _implement(name, checked(kernel), "CUDA")
    _implement(name, checked(on_cpu(kernel, reference)), "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", checked(fake), lib=_library)
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    KERNELS[overload] = kernel
    return overload


def register_autograd(
    operator: torch._ops.OpOverload, function: type[torch.autograd.Function] | Callable[..., Any]
) -> None:
    """Let `function`, which takes the operator's arguments, carry its gradient.

    Autograd does not look into lists of tensors: an operator that has some gives a plain function, which
    applies one of autograd to the tensors.
    The function may call other operators in its forward, so it saves what backward needs and the operator
    itself, run without gradients, computes nothing to save.
    """

    apply: Callable[..., Any] = getattr(function, "apply", function)

    def differentiable(*arguments: Any) -> Any:
        flat = (item for a in arguments for item in (a if isinstance(a, list | tuple) else (a,)))
        wanted = any(isinstance(item, Tensor) and item.requires_grad for item in flat)
        if torch.is_grad_enabled() and wanted:
            return apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    _implement(operator._schema.name.partition("::")[2], differentiable, "Autograd")


def _implement(name: str, function: Callable[..., Any], key: str) -> None:
    _library.impl(name, function, key)  # type: ignore[no-untyped-call]


def check_tensors(operator: str, **tensors: Tensor | None) -> None:
    """All on one device, and of a dtype that the kernels compute in.

    The CPU reference takes float64 too, for checks of gradients by finite differences.
    """
    (first, leader), *others = ((name, t) for name, t in tensors.items() if t is not None)
    kinds = ("cpu", "cuda", "meta")
    require(leader.device.type in kinds, operator, first, f"be on one of {kinds}", leader.device)
    allowed: tuple[torch.dtype, ...] = KERNEL_DTYPES
    if leader.device.type != "cuda" and not INTERPRETED:
        allowed = (*allowed, torch.float64)
    for name, tensor in ((first, leader), *others):
        same = tensor.device == leader.device
        require(same, operator, name, f"be on {leader.device} like {first}", tensor.device)
        if tensor.dtype not in allowed:
            raise TypeError(f"{_place(operator, name)} must be one of {allowed}, it is {tensor.dtype}")


def check_dtype(operator: str, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """`tensor` has one of the dtypes."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype) for dtype in dict.fromkeys(allowed))
        raise TypeError(f"{_place(operator, name)} must be {wanted}, it is {tensor.dtype}")


def require(condition: bool, operator: str, name: str, rule: str, given: object) -> None:
    """Raise ValueError naming operator, argument, rule and what was given, unless `condition`."""
    if not condition:
        raise ValueError(f"{_place(operator, name)} must {rule}, it is {given}")


def _place(operator: str, name: str) -> str:
    return f"{NAMESPACE}.{operator}: {name}"


def as_rows(tensor: Tensor, width: int) -> Tensor:
    """The tensor as [rows, width] with its last dimension contiguous; copied only if its strides force it."""
    count = 1
    for size in tensor.shape[:-1]:
        count *= size
    rows = tensor.reshape(count, width)
    return rows if width <= 1 or rows.stride(1) == 1 else rows.contiguous()
