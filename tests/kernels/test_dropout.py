"""Keyed dropout as torch sees it, and the pattern that puts it in a stage; on CPU, so by its reference."""

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from gpp.program.random import key_of, keyed_attention, keyed_bits, keyed_dropout
from kernels.dropout import dropout
from kernels.fuse import fuse
from kernels.patterns.match import Keyed

KEYED = Keyed(torch.ops.gpp.keyed_bits.default, keyed_dropout, keyed_attention)
POSITION = torch.tensor([3, 8])
KEY = key_of(0, "node")


def test_opcheck_and_finite_differences() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    torch.library.opcheck(dropout, (x, POSITION, KEY, 6, 0.25))
    wide = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout(x, POSITION, KEY, 6, 0.25), (wide,))


def test_export_and_compile() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            made: Tensor = dropout(x, position, KEY, 6, 0.25)
            return made

    module, x = Module(), torch.randn(5, 6)
    shapes = {"x": {0: torch.export.Dim("batch")}, "position": None}
    program = torch.export.export(module, (torch.randn(4, 6), POSITION), dynamic_shapes=shapes)
    expected = module(x, POSITION)
    assert torch.equal(program.module()(x, POSITION), expected)
    assert torch.equal(torch.compile(module, fullgraph=True)(x, POSITION), expected)
    assert module(x.to("meta"), POSITION.to("meta")).shape == (5, 6)


def test_mistakes_are_named() -> None:
    x = torch.randn(4, 6)
    for arguments, error, message in (
        ((x, POSITION[:1], KEY, 6, 0.1), ValueError, r"position must have shape \(2,\), it is \(1,\)"),
        ((x, POSITION.int(), KEY, 6, 0.1), TypeError, "position must be torch.int64, it is torch.int32"),
        ((x, POSITION, KEY, -1, 0.1), ValueError, "elements must be at least 0, it is -1"),
        ((x, POSITION, KEY, 6, 1.5), ValueError, r"p must lie in \[0, 1\], it is 1.5"),
        ((x.int(), POSITION, KEY, 6, 0.1), TypeError, "dropout: x must be one of"),
    ):
        with pytest.raises(error, match=message):
            dropout(*arguments)


def keyed_graph(dim: int, per_sample: int, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """x times 2, dropped, plus 1; as a stage's graph has it."""
    graph = fx.Graph()
    x, position = graph.placeholder("x"), graph.placeholder("position")
    doubled = graph.call_function(torch.ops.aten.mul.Tensor, (x, 2.0))
    sizes = [8, 5, 3]
    bits = graph.call_function(KEYED.bits, (position, KEY, sizes, dim, per_sample))
    dropped = graph.call_function(keyed_dropout, (doubled, bits, 0.3))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (dropped, 1.0)))
    for node in (x, doubled, dropped):
        node.meta["val"] = torch.empty(sizes, device="meta", dtype=dtype)
    bits.meta["val"] = torch.empty(sizes, device="meta", dtype=torch.int32)
    position.meta["val"] = POSITION.to("meta")
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize("dim, per_sample", [(0, 1), (0, 2), (-1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stage_drops_the_same_elements(dim: int, per_sample: int, dtype: torch.dtype) -> None:
    plain = keyed_graph(dim, per_sample, dtype)
    fused, report = fuse(plain, KEYED)
    assert [item.operator for item in report.fused] == ["gpp_kernels.dropout.default"] and not report.left
    x = torch.randn(8, 5, 3, dtype=dtype)
    assert torch.equal(fused(x, POSITION), plain(x, POSITION))


def test_samples_in_another_dimension_are_left_to_torch() -> None:
    plain = keyed_graph(1, 1)
    fused, report = fuse(plain, KEYED)
    assert not report.fused and "the samples are its dimension 1" in report.left[0].reason
    x = torch.randn(8, 5, 3)
    assert torch.equal(fused(x, POSITION), plain(x, POSITION))
    assert not fuse(plain)[1].left, "without names of keyed nodes there is nothing to look for"


def test_backward_makes_the_bits_again() -> None:
    fused, _ = fuse(keyed_graph(0, 1), KEYED)

    def gradient(x: Tensor, position: Tensor) -> Tensor:
        return torch.autograd.grad(fused(x, position).sum(), x)[0]

    x = torch.randn(8, 5, 3, requires_grad=True)
    expected = 2.0 * keyed_dropout(torch.ones(8, 5, 3), keyed_bits(POSITION, KEY, [8, 5, 3], 0, 1), 0.3)
    assert torch.equal(gradient(x, POSITION), expected)
    traced = make_fx(gradient)(x, POSITION)
    targets = [str(node.target) for node in traced.graph.nodes]
    assert targets.count("gpp_kernels.dropout.default") == 2 and not any("gpp.keyed" in t for t in targets)
