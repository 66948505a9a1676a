"""What all ranks must agree on before they go on, so that one speaks and none hangs."""

from .communicator import Communicator


class DisagreementError(RuntimeError):
    """Ranks that should do the same thing are about to do different ones. Raised on all of them."""


def agree(comm: Communicator, error: str | None) -> str | None:
    """The error of the first rank that has one, the same text on every rank, or None. Called by all."""
    for rank, text in enumerate(comm.all_gather_object(error)):
        if text is not None:
            return f"rank {rank}: {text}"
    return None


def same(comm: Communicator, name: str, digest: str) -> None:
    """Raise DisagreementError on every rank unless all have the same digest of what is called `name`."""
    digests = comm.all_gather_object(digest)
    owners: dict[str, list[int]] = {}
    for rank, found in enumerate(digests):
        owners.setdefault(found, []).append(rank)
    if len(owners) > 1:
        report = ", ".join(f"{found} on {_ranks(ranks)}" for found, ranks in owners.items())
        raise DisagreementError(
            f"the {name} must be the same on all ranks, it is {report}; start all of them with the same "
            "code, files and command line"
        )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
