"""`kernels=`: the hooks by which a stage's graphs are rewritten and compiled."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import fx

from gpp.program.build import Hooks
from gpp.program.random import keyed_attention, keyed_dropout
from gpp.runtime.communicator import Communicator

from .settings import ATTENTION, KERNELS, choice

if TYPE_CHECKING:
    from kernels.fuse import FuseReport


def kernels_name(config: DictConfig, device: torch.device) -> str:
    """Which kernels run on the device: `auto` is triton on a GPU, torch's own operators elsewhere."""
    name = choice(config, "kernels.name", KERNELS)
    if name != "auto":
        return name
    return "triton" if device.type == "cuda" else "eager"


def described(config: DictConfig, device: torch.device) -> str:
    """The kernels in words, which say all of them that times depend on."""
    name = kernels_name(config, device)
    own = name == "triton" and config.kernels.attention == "triton"
    return f"{name}, own attention" if own else name


def hooks(
    config: DictConfig, device: torch.device, report: Callable[["FuseReport"], None] | None = None
) -> Hooks:
    """The hooks of the `kernels` group; `report` is told what became of each forward graph."""
    match kernels_name(config, device):
        case "triton":
            from kernels.backward import rewrite_backward
            from kernels.fuse import fuse
            from kernels.patterns.match import Keyed

            keyed = Keyed(torch.ops.gpp.keyed_bits.default, keyed_dropout, keyed_attention)
            own_attention = choice(config, "kernels.attention", ATTENTION) == "triton"

            def fused(module: fx.GraphModule) -> fx.GraphModule:
                made, found = fuse(module, keyed, attention=own_attention)
                if report is not None:
                    report(found)
                return made

            return Hooks(fuse=fused, backward=rewrite_backward)
        case "inductor":
            return Hooks(compile=_inductor, warm_up=True)
        case _:
            return Hooks()


def write_reports(comm: Communicator, reports: list["FuseReport"], folder: Path) -> None:
    """Let rank 0 write what every rank's graphs were fused to as kernels.txt, and say how many nodes were.

    Called by all ranks together. Graphs that differ in their sizes alone have one report.
    """
    mine = [(sum(len(i.nodes) for i in r.fused), len(r.fused), len(r.left), str(r)) for r in reports]
    ranks = comm.all_gather_object(list(dict.fromkeys(mine)))
    if comm.rank != 0:
        return
    nodes, operators, left = (sum(graph[i] for rank in ranks for graph in rank) for i in range(3))
    print(
        f"kernels: {nodes} nodes of forward graphs became {operators} fused operators, {left} were left "
        "(kernels.txt says why)",
        flush=True,
    )
    texts = [f"rank {number}: {graph[3]}" for number, rank in enumerate(ranks) for graph in rank]
    (folder / "kernels.txt").write_text("\n".join([*texts, ""]))


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
