"""launch.plan: the planners by name, their switches and constraints, profiles that others published."""

import json
from pathlib import Path

import pytest

from gpp.graph import graph_from_json, graph_to_json
from gpp.plan import Plan, plan_from_json

from ..graphs import make_graph, towers
from .commands import Result, run_lines

GRAPH = make_graph(towers(3, 4), flops=1e9)
PIPEDREAM = "\n".join(
    [
        *(
            f"node{i} -- Linear -- forward_compute_time={i}.0, backward_compute_time={2 * i}.0, "
            f"activation_size=64000.0, parameter_size=4096.0"
            for i in (1, 2, 3)
        ),
        "\tnode1 -- node2",
        "\tnode2 -- node3",
    ]
)
PIPER = json.dumps(
    {
        "maxDevices": 2,
        "maxMemoryPerDevice": 1e9,
        "bandwidth": 1e9,
        "mbsInBatch": 8,
        "nodes": [
            {
                "id": i,
                "name": f"layer{i}",
                "TMPCs": {
                    "1": [
                        {
                            **{"id": "plain", "timePerSample": 0.5 + i, "parameterSize": 1e6},
                            **{"memoryUsageA": 1e6, "memoryUsageB": 4e6},
                            **{"syncTimeFw": {}, "syncTimeBw": {}},
                        }
                    ]
                },
            }
            for i in range(3)
        ],
        "edges": [{"sourceId": i, "destId": i + 1, "communicationCost": 64e3} for i in range(2)],
    }
)


def plan(name: str, *arguments: str) -> list[str]:
    return ["plan", *arguments, f"hydra.run.dir={name}"]


def mine(name: str, *arguments: str) -> list[str]:
    return plan(
        name,
        *("profile=graph.json", "train.mini_batch=16", "train.micro_batch=2", "cluster.devices=6"),
        *("cluster.flops=1e10", *arguments),
    )


LINES = {
    "graphpipe": mine("graphpipe", "planner=graphpipe"),
    "sequential": mine("sequential", "planner=sequential"),
    "pipedream": mine("pipedream", "planner=pipedream"),
    "piper": mine("piper", "planner=piper", "planner.max_replicas=1"),
    "collapsed": mine("collapsed", "planner=piper", "planner.max_replicas=1", "planner.collapse=true"),
    "replicas": mine(
        "replicas", "planner=sequential", "planner.max_replicas=2", "planner.constraints.replicas={t0.*: 2}"
    ),
    "pinned": mine("pinned", "planner=graphpipe", "planner.constraints.pins={t0.l0: a, t0.l3: a}"),
    "together": mine("together", "planner=graphpipe", "planner.constraints.together=[[t1.*],[join,t2.l3]]"),
    "uncut": mine("uncut", "planner=sequential", "planner.constraints.uncut=[[t0.l1,t0.l2]]"),
    "pipedream's": plan("pd", "profile=graph.txt", "train.mini_batch=640", "cluster.devices=2"),
    "piper's": plan("pp", "profile=piper.json", "train.mini_batch=640", "cluster.devices=2"),
    "unknown operator": mine("no", "planner=graphpipe", "planner.constraints.together=[[nowhere]]"),
    "pin shape": mine("no", "planner.constraints.pins=[a]"),
    "no such planner": mine("no", "planner.name=best"),
    "another's key": mine("no", "planner=sequential", "+planner.bursts=[2]"),
    "truncated": plan("no", "profile=short.json"),
    "no object": plan("no", "profile=list.json"),
    "cycle": plan("no", "profile=cycle.json"),
    "cycle of ours": plan("no", "profile=ring.json"),
    "negative time": plan("no", "profile=negative.txt"),
    "negative work": plan("no", "profile=negative.json"),
    "no device": mine("no", "cluster.memory=1e6"),
    "contradiction": mine("no", "planner.constraints.pins={t0.l0: a, t0.l1: b, t0.l2: a}"),
    "no costs": mine("no", "cost=profiled", "cost.path=short.json"),
    "no profile": plan("no", "profile=letter.txt"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("plan")
    (made / "graph.json").write_text(graph_to_json(GRAPH))
    (made / "graph.txt").write_text(PIPEDREAM)
    (made / "piper.json").write_text(PIPER)
    (made / "short.json").write_text(PIPER[:100])
    (made / "letter.txt").write_text("Dear planner,\n")
    (made / "list.json").write_text("[1, 2]")
    (made / "negative.txt").write_text(PIPEDREAM.replace("compute_time=2.0", "compute_time=-2.0"))
    piper, ours = json.loads(PIPER), json.loads(graph_to_json(GRAPH))
    piper["edges"].append({"sourceId": 2, "destId": 0, "communicationCost": 1.0})
    (made / "cycle.json").write_text(json.dumps(piper))
    first, second = ours["operators"][:2]
    first["inputs"].append(second["outputs"][0]["name"])
    (made / "ring.json").write_text(json.dumps(ours))
    first["inputs"].pop()
    second["forward"]["flops"] = -1.0
    (made / "negative.json").write_text(json.dumps(ours))
    return made


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Result]:
    return dict(zip(LINES, run_lines(folder, list(LINES.values())), strict=True))


def made(folder: Path, name: str) -> Plan:
    return plan_from_json((folder / name / "plan.json").read_text())


def stage_of(found: Plan) -> dict[str, int]:
    return {name: i for i, stage in enumerate(found.stage_graph.stages) for name in stage.operators}


@pytest.mark.parametrize("name", ["graphpipe", "sequential", "pipedream"])
def test_planners_by_name(name: str, folder: Path, done: dict[str, Result]) -> None:
    out = done[name].passed()
    assert f"planner {name}: " in out and "graph.json: 13 operators" in out
    found = made(folder, name)
    assert (found.planner, found.mini_batch, len(found.topology.devices)) == (name, 16, 6)
    assert found.estimate >= found.lower_bound > 0


def test_equal_branches_need_not_be_told_apart(folder: Path, done: dict[str, Result]) -> None:
    for name in ("piper", "collapsed"):
        done[name].passed()
    assert made(folder, "collapsed").estimate == pytest.approx(made(folder, "piper").estimate)


def test_constraints_from_the_command_line(folder: Path, done: dict[str, Result]) -> None:
    for name in ("replicas", "pinned", "together", "uncut"):
        done[name].passed()
    replicated = made(folder, "replicas").stage_graph.stages
    assert {len(stage.devices) for stage in replicated if stage.operators[0].startswith("t0")} == {2}
    stages = stage_of(made(folder, "pinned"))
    assert stages["t0.l0"] == stages["t0.l3"]
    stages = stage_of(made(folder, "together"))
    assert len({stages[f"t1.l{i}"] for i in range(4)}) == 1 and stages["join"] == stages["t2.l3"]
    stages = stage_of(made(folder, "uncut"))
    assert stages["t0.l1"] == stages["t0.l2"]


@pytest.mark.parametrize(
    "name, kind, target", [("pipedream's", "PipeDream", "pd"), ("piper's", "Piper", "pp")]
)
def test_published_profiles_bring_their_own_times(
    name: str, kind: str, target: str, folder: Path, done: dict[str, Result]
) -> None:
    out = done[name].passed()
    assert f"a profile of {kind}'s, 3 operators" in out and "is taken as 64 samples" in out
    assert len(graph_from_json((folder / target / "graph.json").read_text()).operators) == 3
    found = made(folder, target)
    profiled = {"pipedream's": (1 + 2 + 3) * 3e-3, "piper's": 0.5 + 1.5 + 2.5}[name]
    stages = found.stage_graph.stages
    total = sum(
        (stage.seconds.forward + stage.seconds.backward) * 64 * len(stage.devices) / stage.micro_batch
        for stage in stages
    )
    assert total == pytest.approx(profiled, rel=1e-6)


@pytest.mark.parametrize(
    "name, message",
    [
        ("unknown operator", "nowhere"),
        ("pin shape", "planner.constraints.pins must be a table {pattern: label}"),
        ("no such planner", "planner.name must be one of gpp, graphpipe, sequential, pipedream, piper"),
        ("another's key", "planner sequential has no key planner.bursts"),
        ("truncated", "short.json: not a computation graph: malformed JSON"),
        ("no profile", "letter.txt"),
        ("no object", 'list.json: not a computation graph: the key "format" must be'),
        ("cycle", "cycle.json: the graph must be acyclic, node 0 is on a cycle"),
        ("cycle of ours", "ring.json: operator t0.l0 reads t0.l1.out, which no earlier operator produces"),
        ("negative time", "node node1: backward_compute_time must be a number of at least 0, it is '-2.0'"),
        ("negative work", "operators[1] (t0.l1).forward: work must not be negative"),
        ("no device", "operator t0.l0 by itself needs about"),
        ("contradiction", "operator t0.l0 is given a and t0.l1 b"),
        ("no costs", "short.json: costs: malformed JSON"),
    ],
)
def test_what_it_refuses(name: str, message: str, done: dict[str, Result]) -> None:
    assert message in done[name].refused()
