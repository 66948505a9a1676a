"""Every kernel test: unwritten memory holds no sensible number, and the interpreter checks each address."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from kernels.launch import INTERPRETED
from tests.kernels.numerics.bounds import check_bounds
from tests.thorough import ALL

# a draw of very few numbers may be decided by the luck of rounding: new ones are drawn only if all is asked
settings.register_profile("numerics", derandomize=not ALL)
settings.load_profile("numerics")


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        made = allocate(self, *arguments, **options)
        return made.fill_(float("nan") if made.is_floating_point() else torch.iinfo(made.dtype).min)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture(autouse=True)
def checked_bounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if INTERPRETED:
        check_bounds(monkeypatch)
    yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and "numerics" in str(item.path):
            item.add_marker(pytest.mark.gpu)
