"""A captured graph under autocast: every cast becomes a node.

Each call runs once on fake tensors under autocast's own rules for the device. What autocast does to its
arguments is then done by casts in front of it, and the call must dispatch to the same kernels with the same
data types as under autocast, else it keeps autocast switched on for itself. So the result is what eager
autocast computes, runs on any device, and needs none to be captured.

Parameters stay as they are, and their gradients come out of the casts in the parameters' own precision.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gpp.program.autocast import Autocast, insert_cast, rules, switch_on
from gpp.program.traced import POSITION

from .dependence import Dependence, Dependences
from .explain import quiet
from .export import EXAMPLES, CaptureError, Exported, path_of
from .inline import in_own_autocast
from .mutation import is_view, written

_LOW = (torch.float16, torch.bfloat16)
_CASTS = ("aten::to", "aten::_to_copy", "aten::type_as")  # the model's own


def under_rules(
    exported: Exported, facts: Dependences, tail: frozenset[str], autocast: Autocast
) -> tuple[Exported, Dependences]:
    """Rewrite the graph in place; `tail` are the calls that no stage computes. Returns the graph and the
    facts with the casts in them. Raises CaptureError naming the module whose call fails."""
    with FakeTensorMode(allow_non_fake_inputs=True), quiet(), torch.no_grad():
        pass_ = _Pass(exported, tail, autocast)
        pass_.run()
    exported.module.recompile()
    kinds, per_sample = dict(facts.kind), set(facts.per_sample)
    together = [set(group) for group in exported.together]
    for cast, source in pass_.casts.items():
        data = kinds[source] in (Dependence.KEY, Dependence.SAMPLES)
        kinds[cast] = Dependence.SAMPLES if data else Dependence.TABLE
        if source in per_sample:
            per_sample.add(cast)
        for group in together:
            if source in group:
                group.add(cast)
    return (
        replace(exported, together=tuple(map(frozenset, together))),
        replace(facts, kind=kinds, per_sample=frozenset(per_sample)),
    )


class _Pass:
    """Walks the graph once: the value of every node on fake tensors, and the casts that are put in."""

    def __init__(self, exported: Exported, tail: frozenset[str], autocast: Autocast) -> None:
        self.module = exported.module
        self.tail = tail
        self.autocast = autocast
        self.env: dict[fx.Node, Any] = {}
        self.casts: dict[str, str] = {}  # name of a cast to that of what it casts

    def run(self) -> None:
        for node in list(self.module.graph.nodes):
            if node.op == "output":
                continue
            try:
                self.env[node] = self._value(node)
            except Exception as error:
                raise CaptureError(
                    f"module {path_of(node) or 'the model'!r} does not run under autocast to "
                    f"{self.autocast.dtype}: {str(error).strip().splitlines()[0]}. Cast in the module "
                    "(x.to(y.dtype)), or use precision=fp32"
                ) from error
            _note_dtype(node, self.env[node])

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return _placeholder(node, torch.device(self.autocast.device))
        if node.op == "get_attr":
            return _attribute(self.module, str(node.target))
        call = _Call.of(node, self.env, torch.device(self.autocast.device))
        if not self._is_covered(node):
            return call.run()
        with rules(self.autocast.device, self.autocast.dtype):
            wanted = call.traced()
        for casts in (wanted.casts, call.all_to(self.autocast.dtype), call.all_to(torch.float32)):
            made = call.attempt(casts)
            if made is not None and (made.does(wanted) or _is_raised(casts, made, wanted)):
                self._put_in(node, casts)
                return made.result
        if not is_view(node):
            switch_on(node, self.autocast)
        return wanted.result

    def _is_covered(self, node: fx.Node) -> bool:
        if node.name in self.tail or in_own_autocast(node) or written(node):
            return False
        if not isinstance(node.target, torch._ops.OpOverload):
            return _is_attention(node)
        return node.target._schema.name not in _CASTS

    def _put_in(self, node: fx.Node, casts: "Casts") -> None:
        made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

        def changed(at: int, item: Any) -> Any:
            dtype = casts.get(at)
            if dtype is None or not isinstance(item, fx.Node):
                return item
            if (item, dtype) not in made:
                made[item, dtype] = insert_cast(node, item, dtype)
                self.casts[made[item, dtype].name] = item.name
            return made[item, dtype]

        leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)), is_leaf=_is_leaf)
        args, kwargs = pytree.tree_unflatten([changed(i, leaf) for i, leaf in enumerate(leaves)], spec)
        node.args, node.kwargs = args, kwargs
        for cast in made.values():
            self.env[cast] = self.env[cast.all_input_nodes[0]].to(cast.meta["val"].dtype)


Casts = Mapping[int, torch.dtype]  # position among a call's flattened arguments to the type it is cast to


@dataclass(frozen=True)
class _Traced:
    """A call's result, the casts of its own arguments, and the kernels it came down to with the data types
    of their tensors; casts, views and queries left out."""

    result: Any
    casts: Casts
    kernels: tuple[tuple[str, tuple[torch.dtype, ...], Any], ...]

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [v.dtype for v in pytree.tree_leaves(self.result) if isinstance(v, Tensor)]

    def does(self, other: "_Traced") -> bool:
        return self.dtypes == other.dtypes and self.kernels == other.kernels


def _is_raised(casts: Casts, made: _Traced, wanted: _Traced) -> bool:
    """Whether everything was raised to float32 for a result that is: a sum that autocast gives a wider
    accumulator, a loss of which it raises a part."""
    raised = set(casts.values()) == {torch.float32}
    return raised and made.dtypes == wanted.dtypes == [torch.float32]


@dataclass(frozen=True)
class _Call:
    """A call with its fake arguments, flattened."""

    target: Callable[..., Any]
    leaves: Sequence[Any]
    spec: Any
    attention: bool

    @classmethod
    def of(cls, node: fx.Node, env: Mapping[fx.Node, Any], device: torch.device) -> "_Call":
        leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)), is_leaf=_is_leaf)

        def value(item: Any) -> Any:
            if isinstance(item, fx.Node):
                return env[item]
            return device if isinstance(item, torch.device) else item

        assert callable(node.target)
        return cls(node.target, [value(leaf) for leaf in leaves], spec, _is_attention(node))

    def run(self, casts: Casts = {}) -> Any:  # noqa: B006
        given = [v.to(casts[i]) if i in casts else v for i, v in enumerate(self.leaves)]
        args, kwargs = pytree.tree_unflatten(given, self.spec)
        return self.target(*args, **kwargs)

    def traced(self) -> _Traced:
        """As it is under the rules that hold now."""
        if self.attention:  # ours, in the place of torch's, of which autocast lowers all arguments
            casts = self.all_to(torch.get_autocast_dtype(self._device()))
            with torch.autocast(self._device(), enabled=False):
                return replace(self._recorded(casts), casts=casts)
        return self._recorded({})

    def attempt(self, casts: Casts) -> _Traced | None:
        """As it is with these casts and no rules; None where it cannot run so."""
        try:
            return self._recorded(casts)
        except (RuntimeError, TypeError, ValueError):
            return None

    def all_to(self, dtype: torch.dtype) -> Casts:
        other = (torch.float32,) if dtype in _LOW else _LOW
        return {i: dtype for i, v in enumerate(self.leaves) if isinstance(v, Tensor) and v.dtype in other}

    def _recorded(self, casts: Casts) -> _Traced:
        with _Recorder(self.leaves) as seen:
            result = self.run(casts)
        return _Traced(result, seen.casts, tuple(seen.kernels))

    def _device(self) -> str:
        return next(v.device.type for v in self.leaves if isinstance(v, Tensor))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What a call does to its arguments, and with what."""

    def __init__(self, leaves: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at = {id(v): i for i, v in enumerate(leaves) if isinstance(v, Tensor)}
        self.casts: dict[int, torch.dtype] = {}
        self.kernels: list[tuple[str, tuple[torch.dtype, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            if id(args[0]) in self.at and kwargs.get("dtype") is not None:
                self.casts[self.at[id(args[0])]] = kwargs["dtype"]
        elif not func.is_view and func.namespace != "prim":
            tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
            self.kernels.append((str(func), tuple(v.dtype for v in tensors), kwargs.get("dtype")))
        return func(*args, **kwargs)


def _is_leaf(item: Any) -> bool:
    return isinstance(item, fx.Node | Tensor)


def _is_attention(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "keyed_attention"


def _placeholder(node: fx.Node, device: torch.device) -> Tensor:
    if node.target == POSITION:
        return torch.zeros(2, dtype=torch.int64, device=device)
    value = node.meta["val"]
    shape = [EXAMPLES if isinstance(size, torch.SymInt) else size for size in value.shape]
    return torch.empty(shape, dtype=value.dtype, device=device)


def _attribute(module: fx.GraphModule, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _note_dtype(node: fx.Node, value: Any) -> None:
    """The value that the node stands for, in the type that it now has."""

    def changed(known: Any, found: Any) -> Any:
        if isinstance(known, Tensor) and isinstance(found, Tensor) and known.dtype != found.dtype:
            return known.to(found.dtype)
        return known

    known = node.meta.get("val")
    if isinstance(known, tuple | list) and isinstance(value, tuple | list):
        node.meta["val"] = type(known)(changed(k, v) for k, v in zip(known, value, strict=True))
    else:
        node.meta["val"] = changed(known, value)
