"""What is measured: an operator at sizes of the paper's models, as this project has it and as others do."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PASSES = ("forward", "backward", "both")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Inputs = tuple[Any, ...]  # tensors, lists of them, and constants
Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a pass has to do: bytes that each operator reads and writes at least once, and FLOPs."""

    bytes: float
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True, slots=True)
class Size:
    """`numbers` by name, and the model of the paper that has them. What has less `rank` is measured first."""

    model: str
    numbers: Mapping[str, int]
    dtypes: tuple[str, ...] = ("bf16",)
    rank: int = 1

    def __str__(self) -> str:
        return " ".join(f"{name}={number}" for name, number in self.numbers.items())


class Maker:
    """Makes random inputs, the same from the same seed."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(
        self, *shape: int, scale: float = 1.0, grad: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Normal numbers times `scale`; `grad`: a gradient is wanted."""
        made = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return made.normal_(0.0, scale, generator=self.generator).requires_grad_(grad)

    def integers(self, below: int, *shape: int) -> Tensor:
        """int64 from zero up to, not including, `below`."""
        return torch.randint(below, shape, generator=self.generator, device=self.device)


@dataclass(frozen=True, slots=True)
class Liger:
    """A function of liger_kernel.transformers.functional, and how it is called with our arguments."""

    name: str
    call: Callable[[Function], Function]


@dataclass(frozen=True)
class Kernel:
    """An operator: `ours` and what it is measured against, all functions of the same `inputs`.

    `library` calls a vendor's library in one go, forward alone where autograd does not know it. `costs` gives
    those of forward and backward from the numbers of a size and the bytes of an element. `tiny` is a size for
    tests, where `random` operators drop nothing. `fused`: a linear layer with more than its product.
    """

    name: str
    ours: Function
    eager: Function
    inputs: Callable[[Mapping[str, int], Maker], Inputs]
    costs: Callable[[Mapping[str, int], int], tuple[Cost, Cost]]
    sizes: tuple[Size, ...]
    tiny: Mapping[str, int]
    library: Function | None = None
    liger: Liger | None = None
    passes: tuple[str, ...] = PASSES
    random: bool = False
    fused: bool = False
    note: str = field(default="", kw_only=True)

    def cost(self, which: str, numbers: Mapping[str, int], itemsize: int) -> Cost:
        """Of one of the PASSES."""
        forward, backward = self.costs(numbers, itemsize)
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of inputs or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def bytes_of(inputs: Inputs) -> int:
    """Of all tensors."""
    return sum(t.numel() * t.element_size() for t in tensors(inputs))


def prepared(function: Function, inputs: Inputs, which: str) -> Callable[[], Any]:
    """A call of one pass without arguments. Backward alone is over a graph that is made here and kept.

    The gradients that it starts from are ones for a scalar, else random.
    """
    wanted = [t for t in tensors(inputs) if t.requires_grad]
    if which == "forward":
        return lambda: function(*inputs)
    first = list(tensors(function(*inputs)))
    if not first[0].requires_grad:
        raise NotBackward("it has no backward")
    given = [torch.ones_like(y) for y in first]
    for dy in given:
        if dy.dim() > 0:
            dy.normal_(generator=torch.Generator(dy.device).manual_seed(1))
    if which == "backward":
        return lambda: torch.autograd.grad(first, wanted, given, retain_graph=True)
    return lambda: torch.autograd.grad(list(tensors(function(*inputs))), wanted, given)


class NotBackward(Exception):
    """A rival that computes forward alone."""


def results(function: Function, inputs: Inputs) -> list[Tensor]:
    """What a function gives, and the gradients of what wants one from a gradient of ones."""
    y = function(*inputs)
    found = list(tensors(y if y is not None else inputs[0]))
    wanted = [t for t in tensors(inputs) if t.requires_grad]
    if wanted and found[0].requires_grad:
        found += torch.autograd.grad(found, wanted, [torch.ones_like(t) for t in found])
    return [t.detach() for t in found]


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest of the relative distances of tensors, in the norm of the second; infinity for NaN."""
    worst = 0.0
    for x, y in zip(a, b, strict=False):
        apart = (x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30)
        worst = max(worst, float("inf") if apart.isnan() else apart.item())
    return worst
