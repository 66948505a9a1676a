from benchmarks.checkpoint.disk import bytes_a_second
from benchmarks.checkpoint.stall import stall_of_a_step


def test_the_disk_is_measured_both_ways() -> None:
    found = bytes_a_second(4, rounds=1)
    assert [row[0] for row in found.rows] == ["write", "torch.save and fsync", "read", "torch.load"]
    assert all(float(str(row[1])) > 0 for row in found.rows)


def test_the_stall_is_measured() -> None:
    found = stall_of_a_step(rounds=1, every=1)
    assert len(found.rows) == 1 and found.measured.endswith(" ms") and "50 MB in 1 steps" in found.what
