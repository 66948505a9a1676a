"""How many kernels a function launches, counted on any machine: nothing is computed.

It runs on fake tensors. An operator of this package counts as the kernels that it would launch on a GPU and
the ATen operators that it calls; every other operator as one kernel, unless it makes a view or memory alone.
ATen is counted below autograd, as it is dispatched on a CPU: a GPU may take more kernels for a sort.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from .launch import counting
from .library import KERNELS

aten = torch.ops.aten
_FREE = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._unsafe_view.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
}


def launches(function: Callable[..., Any], *arguments: Any) -> Counter[str]:
    """The kernels of `function(*arguments)` by name. Tensors are looked at for shape, dtype and whether they
    require gradients; so are the parameters of a module, which may have gradients made of itself inside."""
    counter: Counter[str] = Counter()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value: Any) -> Any:
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        given = tree_map(fake, arguments)
        with counting(counter), _Counter(counter):
            function(*given)
    return counter


def with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that runs this one and its backward: the gradients of every result that has one, with
    respect to every argument, and every parameter of a module, that requires one."""

    def both(*arguments: Any) -> Any:
        run, leaves = function, [a for a in tree_flatten(arguments)[0] if isinstance(a, Tensor)]
        if isinstance(function, nn.Module):
            state = {n: p.detach().requires_grad_(p.requires_grad) for n, p in function.named_parameters()}
            leaves += state.values()

            def run(*given: Any) -> Any:
                return torch.func.functional_call(function, state, given)

        results = [r for r in tree_flatten(run(*arguments))[0] if isinstance(r, Tensor) and r.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        ones = [torch.empty_like(r) for r in results]
        return results, torch.autograd.grad(results, wanted, ones, allow_unused=True) if wanted else ()

    return both


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched below autograd; an operator of this package does what it does on a GPU."""

    def __init__(self, counter: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in KERNELS:
            with self:
                return KERNELS[func](*args, **kwargs)
        result = func(*args, **kwargs)
        makes = any(isinstance(value, Tensor) for value in tree_flatten(result)[0])
        if makes and not func.is_view and func not in _FREE and func.namespace != "prim":
            self.counter[str(func)] += 1
        return result
