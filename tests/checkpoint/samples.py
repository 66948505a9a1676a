"""Small checkpoints, written as ranks write them."""

from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from gpp.checkpoint.folder import Kept, check_bytes
from gpp.checkpoint.manifest import Manifest, OptimizerEntry, Part
from gpp.checkpoint.owners import Owners
from gpp.checkpoint.reader import buffers, optimizer, weights
from gpp.checkpoint.writer import CheckpointWriter, Contents

RANKS = 2
NAMES = (("a.weight", "a.bias"), ("b.weight",))  # of each rank


def value(name: str, step: int, kind: str = "") -> Tensor:
    generator = torch.Generator().manual_seed(crc32(f"{name} {step} {kind}".encode()))
    return torch.randn(3, 2, generator=generator)


def manifest(step: int) -> Manifest:
    return Manifest(step, 16, 7, 0.9, Part({}, {}, {}, {}))


def contents(rank: int, step: int, texts: bool = True) -> Contents:
    """What a rank has after so many steps."""
    names, owners = NAMES[rank], Owners({}, RANKS)
    kinds = {kind: owners.file(kind, rank) for kind in ("model", "averages", "optimizer")}
    return Contents(
        {
            kinds["model"]: {name: value(name, step) for name in names},
            kinds["averages"]: {name: value(name, step, "average") for name in names},
            kinds["optimizer"]: {f"{name}/exp_avg": value(name, step, "state") for name in names},
        },
        dict.fromkeys(names, kinds["model"]),
        dict.fromkeys(names, kinds["averages"]),
        {n: OptimizerEntry(kinds["optimizer"], ("exp_avg",), {"step": step}, {"lr": 0.1}) for n in names},
        "torch.optim.adamw.AdamW",
        {"config.yaml": f"step: {step}\n"} if texts and rank == 0 else {},
    )


def write(folder: Path, step: int, keep: int = 2, content: int | None = None) -> None:
    """All ranks' parts one after the other, in this thread. `content`: as of another step."""
    made = step if content is None else content
    for rank in reversed(range(RANKS)):
        writer = CheckpointWriter(folder, rank, RANKS, keep)
        writer._write(contents(rank, made), manifest(step))
        writer.check()


def read_all(kept: Kept) -> None:
    """Everything that a run reads."""
    for rank in range(RANKS):
        check_bytes(kept, rank, RANKS)
    part = kept.manifest.part
    weights(kept, part.weights)
    weights(kept, part.averages, averaged=True)
    buffers(kept, part.buffers)
    optimizer(kept, part.optimizer)


def assert_is_of(kept: Kept, content: int) -> None:
    """The checkpoint is whole, and what was written at that step."""
    read_all(kept)
    part = kept.manifest.part
    names = [name for own in NAMES for name in own]
    for name, found in weights(kept, names).items():
        assert torch.equal(found, value(name, content))
    for name, found in weights(kept, names, averaged=True).items():
        assert torch.equal(found, value(name, content, "average"))
    for name, (tensors, entry) in optimizer(kept, names).items():
        assert torch.equal(tensors["exp_avg"], value(name, content, "state"))
        assert entry.values == {"step": content} and entry.options == {"lr": 0.1}
    assert part.optimizer_class == "torch.optim.adamw.AdamW"
    assert (kept.path / "config.yaml").read_text() == f"step: {content}\n"
