"""The peak of resident memory since a moment."""

import sys

import pytest
import torch

from gpp.runtime.memory import peak, start_of_peak

SIZE = 64 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark can only be set back on Linux")
def test_what_was_freed_before_does_not_count() -> None:
    big = torch.ones(4 * SIZE, dtype=torch.uint8)
    del big
    base = start_of_peak()
    assert peak() - base < SIZE
    held = torch.ones(SIZE, dtype=torch.uint8)
    del held
    assert 0.9 * SIZE < peak() - base < 2 * SIZE
