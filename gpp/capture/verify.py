"""Before planning: the captured graph against the user's own module, loss and every gradient.

It catches what export drops in silence: the backward of a custom autograd.Function, hooks,
`torch.utils.checkpoint` with side effects. Nothing is drawn at random: both sides keep every element that a
dropout would drop (scaled as if it were drawn). Both run in the module's own precision, autocast's casts
taken out: half of the digits would hide what is looked for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gpp.program.autocast import without_casts
from gpp.program.carve import carve, interface
from gpp.program.random import RESOLUTION, keyed_bernoulli, keyed_exponential, keyed_normal, keyed_uniform
from gpp.program.stage import TermSum

from .capture import Captured
from .export import CaptureError, parts_of

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def verify(model: nn.Module, batch: Mapping[str, Tensor], captured: Captured) -> None:
    """Raise CaptureError naming the first result or parameter whose value or gradient differs.

    `model` has real weights and `batch` a few samples; the model is left as it was.
    """
    results, gradients, buffers = _eager(model, batch)
    terms, found, updated = _graph(model, batch, captured)
    for result in (captured.train.loss, *captured.train.metrics):
        value = _value(result, terms)
        if not _close(value, results[result.name]):
            raise CaptureError(
                f"the captured graph of {type(model).__name__} gives {result.name} = {float(value):.6g}, the "
                f"module itself {float(results[result.name]):.6g}: it computes something that torch.export "
                "does not see (a hook, global state, a custom autograd.Function)"
            )
    # A gradient that cancels (of a scale in front of a normalisation) is rounding noise of the others.
    noise = 1e-5 * max((float(g.double().norm()) for g in gradients.values()), default=0.0)
    for name, expected in gradients.items():
        actual = found.get(name)
        if not _close(torch.zeros_like(expected) if actual is None else actual, expected, noise):
            module, _, _ = name.rpartition(".")
            raise CaptureError(
                f"the captured graph of {type(model).__name__} gives another gradient for {name} than the "
                f"module itself: something at or behind module {module or type(model).__name__!r} has a "
                "backward that torch.export does not see (a custom autograd.Function, a hook). Write it as a "
                "torch.library operator with register_autograd, or in plain tensor operations"
            )

    for name, expected in buffers.items():
        if not _close(updated[name], expected):
            raise CaptureError(
                f"the captured graph of {type(model).__name__} leaves another value in buffer {name} than "
                "the module itself: update it in forward by an in-place operation or an assignment"
            )


Values = dict[str, Tensor]


def _eager(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Values, Values, Values]:
    """Results, gradients and buffers after one forward and backward of the module itself."""
    flags = {module: module.training for module in model.modules()}
    owned = [
        (m, key, b, b.clone()) for m in model.modules() for key, b in m._buffers.items() if b is not None
    ]
    kept = {p: p.grad for p in model.parameters()}  # of the user's, not to be added to ours
    try:
        for parameter in kept:
            parameter.grad = None
        model.train()
        with torch.enable_grad(), _Undrawn():  # type: ignore[no-untyped-call]
            returned = model(**{k: v.clone() for k, v in batch.items()})
            loss, metrics, _ = parts_of(returned)
            _ratio(loss).backward()  # type: ignore[no-untyped-call]
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        values = {"loss": _ratio(loss).detach()}
        values |= {str(k): _ratio(v).detach() for k, v in metrics.items()}
        return values, gradients, {n: b.detach().clone() for n, b in model.named_buffers()}
    finally:
        for module, flag in flags.items():
            module.training = flag
        with torch.no_grad():
            for module, key, buffer, before in owned:
                module._buffers[key] = buffer
                buffer.copy_(before)
        for parameter, gradient in kept.items():
            parameter.grad = gradient


def _ratio(value: Any) -> Tensor:
    if isinstance(value, tuple | list):
        return value[0] / value[1].detach()  # type: ignore[no-any-return]
    assert isinstance(value, Tensor)
    return value


def _graph(
    model: nn.Module, batch: Mapping[str, Tensor], captured: Captured
) -> tuple[Values, Values, Values]:
    mode = captured.traced.train
    operators = set(mode.operator_of.values())
    face = interface(mode, operators)
    parameters = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in model.named_parameters()}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    size = len(next(iter(batch.values())))
    device = next(iter(parameters.values())).device
    forward = without_casts(carve(mode, operators, size, list(parameters), list(buffers), device=device))
    keys = [batch[k].clone() for k in face.batch_keys]
    position = torch.zeros(2, dtype=torch.int64, device=device)
    with torch.enable_grad(), _AllKept():  # type: ignore[no-untyped-call]
        results = forward(*parameters.values(), *buffers.values(), *keys, position)
        terms = dict(zip(face.terms, results, strict=True))
        loss = _value(captured.train.loss, terms)
        loss.backward()  # type: ignore[no-untyped-call]
    return (
        {k: v.detach() for k, v in terms.items()},
        {n: p.grad for n, p in parameters.items() if p.grad is not None},
        buffers,
    )


def _value(result: TermSum, terms: Mapping[str, Tensor]) -> Tensor:
    total = sum((c * terms[n] for n, c in result.terms), torch.tensor(result.constant))
    if result.weight is None:
        return total
    return total / sum((c * terms[n] for n, c in result.weight), torch.tensor(0.0)).detach()


def _close(a: Tensor, b: Tensor, noise: float = 1e-7) -> bool:
    tolerance = _TOLERANCE.get(b.dtype, 1e-3)
    a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (a.detach(), b.detach()))
    a, b = a.double(), b.double()
    if not bool(torch.isfinite(b).all()):
        return bool((torch.isfinite(a) == torch.isfinite(b)).all())
    return float((a - b).norm()) <= tolerance * float(b.norm()) + noise


class _AllKept(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keyed bits are all ones: no dropout drops anything."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.gpp.keyed_bits.default:
            return torch.full(args[2], RESOLUTION - 1, dtype=torch.int32, device=args[0].device)
        return func(*args, **(kwargs or {}))


class _Undrawn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The eager counterpart of `_AllKept`: what eager draws is what all-ones bits give."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = _UNDRAWN.get(func._schema.name.removeprefix("aten::"))
        return replacement(*args, **(kwargs or {})) if replacement else func(*args, **(kwargs or {}))


def _native_dropout(value: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    kept = torch.ones_like(value, dtype=torch.bool)
    return (value * (1.0 / (1.0 - p)) if train and p < 1 else value.clone()), kept


def _ones(like: Tensor) -> Tensor:
    return torch.full(like.shape, RESOLUTION - 1, dtype=torch.int32, device=like.device)


def _rand_like(like: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return keyed_uniform(_ones(like), dtype or like.dtype)


def _randn_like(like: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return keyed_normal(_ones(like), _ones(like), dtype or like.dtype)


def _rand(size: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return _rand_like(torch.empty(tuple(size), dtype=dtype or torch.get_default_dtype()))


def _randn(size: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return _randn_like(torch.empty(tuple(size), dtype=dtype or torch.get_default_dtype()))


def _bernoulli(value: Tensor, p: float | None = None, **_: Any) -> Tensor:
    drawn = keyed_uniform(_ones(value), torch.float32)
    return keyed_bernoulli(drawn, value if p is None else p, value.dtype)


def _bernoulli_(value: Tensor, p: float | Tensor = 0.5, **_: Any) -> Tensor:
    """How dropout draws its mask, and a drop-path."""
    return value.copy_(keyed_bernoulli(keyed_uniform(_ones(value), torch.float32), p, value.dtype))


def _uniform_(value: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
    return value.copy_(_rand_like(value) * (high - low) + low)


def _normal_(value: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return value.copy_(_randn_like(value) * std + mean)


def _exponential_(value: Tensor, rate: float = 1.0, **_: Any) -> Tensor:
    return value.copy_(keyed_exponential(_ones(value), rate, value.dtype))


_UNDRAWN: Mapping[str, Callable[..., Any]] = {
    "native_dropout": _native_dropout,
    "bernoulli_": _bernoulli_,
    "uniform_": _uniform_,
    "normal_": _normal_,
    "exponential_": _exponential_,
    "bernoulli": _bernoulli,
    "rand_like": _rand_like,
    "randn_like": _randn_like,
    "rand": _rand,
    "randn": _randn,
}
