"""Two ranks on each of two hosts, which talk TCP over a slow link."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.pipeline.stage_graphs import chain, paced
from gpp.plan import plan_to_json
from gpp.runtime.emulation import with_links, with_messages
from gpp.timing import step_seconds
from gpp.topology import Link
from tests.thorough import thorough

from .hosts import Hosts, Wire, has_netem, two_hosts, why_no_hosts
from .program import NAMES

RATE = 25e6  # bytes per second
PAYLOAD = 0.95  # of what a link of Ethernet packets carries
MESSAGE = 256 << 10
NEAR = Link(1e-5, 2e9)  # between ranks of one host; how fast hardly matters here

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(why_no_hosts() is not None, reason=why_no_hosts() or ""),
]


@pytest.fixture(scope="module")
def wire() -> Wire:
    return Wire(RATE, 2e-3 if has_netem() else 0.0)


@pytest.fixture(scope="module")
def hosts(wire: Wire) -> Iterator[Hosts]:
    with two_hosts(wire) as made:
        yield made


@thorough
def test_training_is_the_reference(hosts: Hosts) -> None:
    job = hosts.run(2, "tests.multihost.program", "equality", timeout=120)
    assert job.returncode == 0, job.stdout + job.stderr
    assert sorted(job.stdout.split()[1::2]) == sorted(NAMES)


def test_ranks_know_their_hosts_and_ring_inside_them(hosts: Hosts) -> None:
    job = hosts.run(2, "tests.multihost.program", "bells", timeout=90)
    assert job.returncode == 0, job.stdout + job.stderr
    found = json.loads(job.stdout)
    assert found["hosts"] == [hosts.names[0]] * 2 + [hosts.names[1]] * 2
    assert all(slept < 30 for slept in found["slept"])  # woken, not slept out


@thorough
def test_a_slow_link_costs_what_the_simulation_says(hosts: Hosts, wire: Wire, tmp_path: Path) -> None:
    plan = with_messages(paced(chain(4), 6, unit=0.01), MESSAGE)
    plan = replace(plan, topology=replace(plan.topology, per_host=2))
    slow = step_seconds(with_links(plan, NEAR, Link(wire.delay, PAYLOAD * wire.rate)))
    fast = step_seconds(with_links(plan, NEAR, NEAR))
    assert slow > 1.2 * fast
    file = tmp_path / "plan.json"
    file.write_text(plan_to_json(plan))
    measured = []
    for _ in range(2):  # the better of two: the machine has other work too
        job = hosts.run(2, "tests.multihost.program", "pace", str(file), timeout=90)
        assert job.returncode == 0, job.stdout + job.stderr
        measured.append(json.loads(job.stdout)["step"])
    assert min(measured) > 1.1 * fast
    assert min(measured) == pytest.approx(slow, rel=0.15)
