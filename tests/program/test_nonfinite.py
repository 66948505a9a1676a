"""Where a graph's values that are not finite come from, and which line of the model that is."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from gpp.program.attribution import owner_of
from gpp.program.carve import carve
from gpp.program.joint import trace_joint
from gpp.program.nonfinite import Given, Inspector, Made, Place, not_a_number
from gpp.schedule.task import Samples

from .stitched import captured_and_verified

PLACE = Place(0, 1, Samples(4, 8), backward=False)


def marks(function, *arguments: Tensor):
    """Of the results of a function, in which what is given and is not finite has a name."""
    graph = make_fx(function)(*(torch.ones_like(a) for a in arguments))

    def label(position: int, _: Tensor, nan: bool) -> tuple[Given, ...]:
        return (Given(PLACE, "key", f"argument {position}", PLACE.samples, nan),)

    inspector = Inspector(graph, PLACE, label)
    return inspector.inspect(list(arguments))[1]


def made(mark) -> list[tuple[str, bool, bool]]:
    """Short: the operators that made it, whether NaN, whether of what is infinite."""
    return [(s.target, s.nan, bool(s.of)) for s in mark.sources if isinstance(s, Made)]


def given(mark) -> list[str]:
    return [s.name for s in mark.sources if isinstance(s, Given)]


def test_an_operator_that_makes_nan_of_finite_numbers() -> None:
    (mark,) = marks(lambda x: (torch.log(x - 2.0) * 3.0,), torch.ones(2))
    assert mark.nan and made(mark) == [("aten.log.default", True, False)]


def test_what_was_given_is_followed() -> None:
    (mark, nothing) = marks(lambda x, y: ((x @ y).relu(), y + 1), torch.full((2, 2), math.nan), torch.ones(2))
    assert mark.nan and given(mark) == ["argument 0"] and not made(mark) and nothing is None


def test_a_mask_of_infinities_is_no_error_until_it_is_all_there_is() -> None:
    def attend(x: Tensor, mask: Tensor):
        return (x.masked_fill(mask == 0, -math.inf).softmax(-1),)

    assert marks(attend, torch.ones(2, 3), torch.tensor([1.0, 0.0, 1.0])) == [None]
    (mark,) = marks(attend, torch.ones(2, 3), torch.zeros(3))
    assert made(mark) == [("aten._softmax.default", True, True)]
    (source,) = mark.sources[0].of
    assert source.target.startswith("aten.masked_fill") and source.meant and not source.nan


def test_an_overflow_beside_a_mask_is_told_from_it() -> None:
    def overflow(x: Tensor, mask: Tensor):
        return (x.masked_fill(mask == 0, -math.inf).exp(),)

    (mark,) = marks(overflow, torch.full((3,), 100.0), torch.tensor([1.0, 0.0, 1.0]))
    assert not mark.nan and made(mark) == [("aten.exp.default", False, False)]


def test_infinity_minus_infinity_names_both() -> None:
    (mark,) = marks(lambda x: (x.exp() - x.exp(),), torch.full((2,), 100.0))
    assert made(mark) == [("aten.sub.Tensor", True, True)]
    assert [s.target for s in mark.sources[0].of] == ["aten.exp.default", "aten.exp.default"]


def test_what_a_where_leaves_out_does_not_count() -> None:
    (mark,) = marks(lambda x: (torch.where(x > 0, x.log(), x),), torch.tensor([-1.0, 2.0]))
    assert mark is None


def test_a_sum_in_place_has_the_mark_of_what_is_added() -> None:
    def add(total: Tensor, x: Tensor):
        total.add_(x.sqrt())
        return (total,)

    (mark,) = marks(add, torch.ones(2), -torch.ones(2))
    assert made(mark) == [("aten.sqrt.default", True, False)]
    (mark,) = marks(add, torch.ones(2), torch.full((2,), math.inf))
    assert made(mark) == [] and given(mark) == ["argument 1"]
    (mark,) = marks(lambda total, x: (total.add_(x),), torch.full((2,), 3e38), torch.full((2,), 3e38))
    assert made(mark) == [("aten.add_.Tensor", False, False)]


def test_memory_that_was_overwritten_is_forgotten() -> None:
    def overwrite(x: Tensor):
        made = x.log()
        made.zero_()
        return (made + 1,)

    assert marks(overwrite, -torch.ones(2)) == [None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_large_numbers_are_finite(dtype: torch.dtype) -> None:
    """Their squares are not."""
    large = torch.full((2,), 1e38, dtype=dtype)
    assert not_a_number(large) is None
    assert not_a_number(large * math.inf) is not None
    assert not_a_number(large * math.nan) is True


class Rooted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return torch.sqrt(h * h).mean()


def test_nodes_of_the_backward_know_the_line_of_the_model() -> None:
    captured = captured_and_verified(Rooted(), {"x": torch.randn(4, 8)})
    mode = captured.traced.train
    parameters = tuple(mode.parameters.values())
    operators = set(mode.operator_of.values())
    forward = carve(mode, operators, 4, parameters, (), device=torch.device("cpu"))
    arguments = [torch.empty(4, 8), torch.empty(4), torch.empty(4, 8), torch.zeros(2, dtype=torch.int64)]
    joint = trace_joint(forward, arguments, [0, 1], [], [], [(0, 1.0)])
    owners = {n.name: owner_of(n) for n in joint.module.graph.nodes if n.op == "call_function"}
    (root,) = {o for name, o in owners.items() if name.startswith("div")}
    assert root is not None and root.module == "" and root.operator == "inner.0"
    assert root.line.startswith("test_nonfinite.py:") and root.line.endswith(
        "return torch.sqrt(h * h).mean()"
    )
    products = [o for name, o in owners.items() if name.startswith("mm") and o is not None]
    assert products and {o.module for o in products} == {"inner.0"}
    assert all("h = self.inner(x)" in o.line for o in products)
