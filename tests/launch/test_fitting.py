from dataclasses import replace

import pytest

from gpp.api.plan import machine
from gpp.plan import Plan, PlanError, device_memory
from gpp.topology import DeviceTopology
from launch.fitting import check_cluster, with_optimizer

from ..strategies import make_plan

PLAN = replace(make_plan([(0, 1), (1, 2)], [2, 2, 2], 4, replicas=[2, 1, 1]), topology=machine(4, per_host=2))
NEED = max(device_memory(PLAN))
ROOMY = machine(4, per_host=2)


def cluster(memory: float) -> DeviceTopology:
    return replace(ROOMY, name="small", devices=tuple(replace(d, memory=memory) for d in ROOMY.devices))


def refusal(plan: Plan, where: DeviceTopology, hosts: tuple[str, ...] | None = None) -> str:
    with pytest.raises(PlanError) as caught:
        check_cluster(plan, "p.json", where, hosts)
    return str(caught.value)


def test_a_plan_that_fits() -> None:
    check_cluster(PLAN, "p.json", cluster(NEED), None)
    check_cluster(PLAN, "p.json", ROOMY, ("a", "a", "b", "b"))
    check_cluster(PLAN, "p.json", ROOMY, ("a",) * 4)  # nearer to each other than planned


def test_how_many_bytes_are_too_many_and_where() -> None:
    text = refusal(PLAN, cluster(NEED - 7))
    over = [d for d, need in enumerate(device_memory(PLAN)) if need > NEED - 7]
    assert text.startswith(f"p.json does not fit the memory of cluster small: device {over[0]} (stage stage")
    assert f"needs {NEED:.0f} B, 7 B more than its {NEED - 7:.0f} B" in text
    assert "It was made for core with 3.73 GiB a device" in text and "else plan anew" in text


def test_another_optimizer_may_need_more() -> None:
    needs = max(device_memory(with_optimizer(PLAN, 2.0)))
    assert needs == NEED + 200 and with_optimizer(PLAN, 0.0) == PLAN
    assert "200 B more than" in refusal(with_optimizer(PLAN, 2.0), cluster(NEED))


def test_devices_that_were_to_share_a_host() -> None:
    assert refusal(PLAN, ROOMY, ("a", "b", "b", "b")) == (
        "p.json has devices 0-1 on one host, here ranks 1 are on b and rank 0 is on a: start 2 ranks a host, "
        "or plan anew"
    )
