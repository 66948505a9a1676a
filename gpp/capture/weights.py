"""Initial weights that do not depend on the plan.

"plain" builds the model on the host under the seed, as the user's own script would, and a stage keeps what it
owns. "recorded" builds it on the meta device, notes what its initialisers do, and replays that for a stage's
own parameters only, each under a seed of its own: the way for models that fit no single host.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .export import CaptureError

Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Initialised:
    """A built model (on the meta device if recorded), and its values for any of its names."""

    model: nn.Module
    values: Callable[[Iterable[str]], dict[str, Tensor]]


def build_plain(build: Build, seed: int) -> Initialised:
    """Build on the host right after torch.manual_seed(seed); the global generator is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    state = _state(model)
    return Initialised(model, lambda names: {n: state[n].detach().clone() for n in names})


def build_recorded(build: Build, seed: int) -> Initialised:
    """Build on the meta device and record. Raises CaptureError where the constructor needs real numbers."""
    recorder = _Recorder()
    try:
        with torch.device("meta"), recorder, _skipping_recorded():
            model = build()
    except (NotImplementedError, RuntimeError) as error:
        raise CaptureError(
            f"the model cannot be built on the meta device ({str(error).splitlines()[0]}): "
            "use train.init=plain"
        ) from error
    state = _state(model)

    def values(names: Iterable[str]) -> dict[str, Tensor]:
        made = {n: recorder.replay(state[n], _seed(seed, n)) for n in names}
        for name, value in made.items():
            if value.is_floating_point() and bool(value.isnan().any()):
                raise CaptureError(
                    f"the constructor sets no values of {name} on the meta device (it leaves torch.empty as "
                    "it is, or its initialiser skips meta tensors): use train.init=plain"
                )
        return made

    return Initialised(model, values)


# Initialisers of torch that skip meta tensors without a word; the one of trunc_normal_ is what it calls.
_SKIPPING = ("orthogonal_", "_no_grad_trunc_normal_", "dirac_", "sparse_")


@torch.library.custom_op("gpp::initialise_", mutates_args=("weight",))
def _initialise(weight: Tensor, name: str, options: Sequence[float]) -> None:
    """Run an initialiser of torch.nn.init by name."""
    numbers = (int(option) for option in options) if name == "dirac_" else options
    getattr(nn.init, name)(weight, *numbers)


@_initialise.register_fake
def _(weight: Tensor, name: str, options: Sequence[float]) -> None:
    return None


@contextmanager
def _skipping_recorded() -> Iterator[None]:
    """Record that such an initialiser was asked for."""
    originals = {name: getattr(nn.init, name) for name in _SKIPPING}

    def recorded(name: str) -> Callable[..., Tensor]:
        signature = inspect.signature(originals[name])

        def initialise(*args: Any, **kwargs: Any) -> Tensor:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            tensor, *options = (v for k, v in given.arguments.items() if k != "generator")
            _initialise(tensor.detach(), name, [float(option) for option in options])
            return cast(Tensor, tensor)

        return initialise

    try:
        for name in _SKIPPING:
            setattr(nn.init, name, recorded(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(nn.init, name, original)


def _state(model: nn.Module) -> Mapping[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"init:{seed}:{name}".encode()).digest()[:7], "big")


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


@dataclass(frozen=True)
class _Call:
    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    result: Any

    def tensors(self) -> list[Tensor]:
        return [
            t
            for t in pytree.tree_leaves((self.arguments, self.options, self.result))
            if isinstance(t, Tensor)
        ]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every call on meta tensors, in order, with the tensors themselves."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        self.calls.append(_Call(func, tuple(args), kwargs, result))
        return result

    def replay(self, wanted: Tensor, seed: int) -> Tensor:
        """The real value of a recorded tensor: the calls that touched its storage, and what those read."""
        needed = {_storage(wanted)}
        chosen: list[_Call] = []
        for call in reversed(self.calls):
            storages = {_storage(t) for t in call.tensors()}
            if storages & needed and _writes(call, needed):
                needed |= storages
                chosen.append(call)
        real: dict[int, Tensor] = {}  # by recorded storage: a real tensor on its twin
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for call in reversed(chosen):
                _run(call, real)
        return _twin(wanted, real).clone()


def _writes(call: _Call, needed: set[int]) -> bool:
    """Whether the call makes or changes one of the storages, or makes a view of it."""
    made = {_storage(t) for t in pytree.tree_leaves(call.result) if isinstance(t, Tensor)}
    return bool(made & needed) or call.function._schema.is_mutable


def _twin(recorded: Tensor, real: Mapping[int, Tensor]) -> Tensor:
    """The real tensor that lies where the recorded one does. A Parameter is another object than the tensor it
    was made of, so storages tell who is who."""
    base = real.get(_storage(recorded))
    if base is None:
        raise CaptureError(
            "the constructor fills a parameter from data that was not computed in it: use train.init=plain"
        )
    return base.detach().as_strided(recorded.size(), recorded.stride(), recorded.storage_offset())


_OVERWRITE = ("aten::zero_", "aten::fill_", "aten::uniform_", "aten::normal_", "aten::copy_")


def _run(call: _Call, real: dict[int, Tensor]) -> None:
    def value(item: Any) -> Any:
        if isinstance(item, Tensor):
            return _twin(item, real) if item.is_meta else item
        return torch.device("cpu") if isinstance(item, torch.device) and item.type == "meta" else item

    first = call.arguments[0] if call.arguments else None
    if call.function._schema.name in _OVERWRITE and isinstance(first, Tensor) and first.is_contiguous():
        # torch.tensor(0) leaves no trace on the meta device; what is overwritten whole needs none
        real.setdefault(_storage(first), torch.empty(first.size(), dtype=first.dtype))
    arguments, options = pytree.tree_map(value, (call.arguments, call.options))
    made = call.function(*arguments, **options)
    if "empty" in call.function._schema.name and made.is_floating_point():
        made.fill_(float("nan"))  # what is never written is found
    for recorded, actual in zip(pytree.tree_leaves(call.result), pytree.tree_leaves(made), strict=True):
        if isinstance(recorded, Tensor):
            real.setdefault(_storage(recorded), actual)
