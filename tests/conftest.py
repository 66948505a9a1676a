"""What holds for all tests."""

import gc


def pytest_collection_finish() -> None:
    """Modules are never garbage: to look through all of torch again and again takes a sixth of the time."""
    gc.collect()
    gc.freeze()
