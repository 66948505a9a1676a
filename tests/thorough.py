"""What takes minutes and seldom tells more than what takes seconds: run with GPP_ALL_TESTS=1 only."""

import os

import pytest

ALL = bool(os.environ.get("GPP_ALL_TESTS"))
thorough = pytest.mark.skipif(not ALL, reason="it takes long: GPP_ALL_TESTS=1 in the environment runs it")
