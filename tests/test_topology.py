import dataclasses

import pytest

from gpp.topology import Device, DeviceTopology, Link

DEVICE = Device("gpu", memory=16e9, flops=1e13, bandwidth=9e11)
INSIDE, BETWEEN = Link(1e-6, 1e11), Link(1e-5, 1e10)
TWO_HOSTS = DeviceTopology("two hosts", (DEVICE,) * 5, 3, INSIDE, BETWEEN)


def test_a_message_takes_latency_and_bytes_over_bandwidth():
    assert Link(0.5, 100.0).seconds(50) == 1.0
    assert Link(0.5, 100.0).seconds(0) == 0.5


def test_devices_sit_in_hosts_in_order():
    assert [TWO_HOSTS.host(d) for d in range(5)] == [0, 0, 0, 1, 1]
    assert TWO_HOSTS.link(0, 2) is INSIDE and TWO_HOSTS.link(4, 3) is INSIDE
    assert TWO_HOSTS.link(2, 3) is BETWEEN and TWO_HOSTS.link(3, 2) is BETWEEN


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Link(-1.0, 1.0), "latency >= 0 and bandwidth > 0, it has -1.0 and 1.0"),
        (lambda: Link(0.0, 0.0), "latency >= 0 and bandwidth > 0"),
        (lambda: Device("d", 0.0, 1.0, 1.0), "device d: memory, flops and bandwidth must be positive"),
        (lambda: Device("d", 1.0, 1.0, 1.0, overhead=-1.0), "overhead must not be negative"),
        (lambda: DeviceTopology("c", (), 1, INSIDE, BETWEEN), "cluster c has no devices"),
        (lambda: DeviceTopology("c", (DEVICE,), 0, INSIDE, BETWEEN), "per_host must be at least 1, it is 0"),
    ],
)
def test_impossible_clusters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_fingerprint_depends_on_everything():
    others = [
        dataclasses.replace(TWO_HOSTS, name="other"),
        dataclasses.replace(TWO_HOSTS, devices=(DEVICE,) * 4),
        dataclasses.replace(TWO_HOSTS, devices=(*(DEVICE,) * 4, dataclasses.replace(DEVICE, memory=8e9))),
        dataclasses.replace(TWO_HOSTS, per_host=4),
        dataclasses.replace(TWO_HOSTS, inside=BETWEEN),
        dataclasses.replace(TWO_HOSTS, between=INSIDE),
    ]
    prints = {t.fingerprint() for t in (TWO_HOSTS, *others)}
    assert len(prints) == 1 + len(others)
    assert dataclasses.replace(TWO_HOSTS).fingerprint() == TWO_HOSTS.fingerprint()
