"""`kernels=`: the two hooks by which a stage's graphs are rewritten and compiled."""

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import fx

from gpp.program.build import Hooks
from gpp.program.random import keyed_attention, keyed_dropout

from .settings import choice


def hooks(config: DictConfig) -> Hooks:
    """The hooks of the `kernels` group."""
    match choice(config, "kernels.name", ("eager", "inductor", "triton")):
        case "triton":
            from kernels.fuse import fuse
            from kernels.in_place import accumulate
            from kernels.patterns.match import Keyed

            keyed = Keyed(torch.ops.gpp.keyed_bits.default, keyed_dropout, keyed_attention)
            return Hooks(fuse=lambda module: fuse(module, keyed)[0], accumulate=accumulate)
        case "inductor":
            return Hooks(compile=_inductor, warm_up=True)
        case _:
            return Hooks()


def _inductor(module: fx.GraphModule) -> Callable[..., Any]:
    """Compile one graph; those that take one list and empty it keep doing so."""
    if "_Boxed" not in type(module.graph._codegen).__name__:
        return torch.compile(module, fullgraph=True, dynamic=False)
    module.graph.set_codegen(fx.graph.CodeGen())
    module.recompile()
    compiled = torch.compile(module, fullgraph=True, dynamic=False)

    def boxed(arguments: list[Any]) -> Any:
        given = tuple(arguments)
        arguments.clear()
        return compiled(*given)

    return boxed
