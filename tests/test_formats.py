import json
import os
from pathlib import Path
from typing import Any

import pytest

from gpp.formats import read_profile
from gpp.formats.piper import piper_profile, read_piper
from gpp.formats.profile import ProfileError
from gpp.graph import graph_from_json, graph_to_json

PROFILES = Path(os.environ.get("GPP_PROFILES", Path(__file__).parents[2] / "shared" / "profiles"))


def variant(**changes: Any) -> dict[str, Any]:
    plain = {
        "id": "vanilla",
        "timePerSample": 3.0,
        "parameterSize": 100,
        "memoryUsageA": 640,
        "memoryUsageB": 450,
        "syncTimeFw": {},
        "syncTimeBw": {},
    }
    return plain | changes


def node(number: int, **changes: Any) -> dict[str, Any]:
    return {"id": number, "name": "layer", "TMPCs": {"1": [variant(**changes)]}}


def piper(nodes: list[dict[str, Any]], edges: list[tuple[int, int, float]]) -> dict[str, Any]:
    return {
        "maxDevices": 4,
        "maxMemoryPerDevice": 1e9,
        "bandwidth": 1e9,
        "mbsInBatch": 8,
        "nodes": nodes,
        "edges": [{"sourceId": u, "destId": v, "communicationCost": size} for u, v, size in edges],
    }


def small() -> dict[str, Any]:
    """7 feeds 3 and 5 with different bytes, both feed 1; numbered against the edges."""
    nodes = [node(1), node(3, parameterSize=0, memoryUsageB=50), node(5, memoryUsageB=400), node(7)]
    return piper(nodes, [(7, 3, 1280), (7, 5, 128), (3, 1, 0), (5, 1, 129)])


def test_a_piper_profile_keeps_times_bytes_and_memory() -> None:
    profile = read_profile(json.dumps(small()), "small.json")
    graph, factor = profile.graph, profile.optimizer_factor
    names = [op.name for op in graph.operators]
    assert sorted(names) == ["layer.1", "layer.3", "layer.5", "layer.7"] and names[0] == "layer.7"
    assert factor == 2.0  # the least room for it: 400 bytes for 100 of parameters
    for op in graph.operators:
        timing = profile.costs.by_name[op.name]
        assert timing.forward[0] + timing.backward_input[0] + timing.backward_weight[0] == pytest.approx(3.0)
        assert timing.samples == (64.0,)
        weight = sum(p.bytes for p in op.parameters)
        assert (2 + factor) * weight + op.buffer_bytes == {"3": 50, "5": 400}.get(op.name[-1], 450)
        assert op.stash == 10.0 and op.has_backward
    sizes = {
        (names[u], names[v]): [(t.bytes, t.needs_grad) for t in tensors]
        for (u, v), tensors in graph.edges.items()
    }
    assert sizes == {
        ("layer.7", "layer.3"): [(20, True)],
        ("layer.7", "layer.5"): [(2, True)],
        ("layer.3", "layer.1"): [(0, False)],
        ("layer.5", "layer.1"): [(4, True)],  # 129 / 64, rounded up to whole numbers
    }
    assert graph_from_json(graph_to_json(graph)) == graph


def test_memory_is_right_where_a_node_has_no_room_for_its_gradients() -> None:
    profile = piper_profile(read_piper(json.dumps(piper([node(0, memoryUsageB=150)], [])), "x"), 64)
    (op,) = profile.graph.operators
    assert profile.optimizer_factor == 0.0 and op.parameters[0].bytes == 75 and op.buffer_bytes == 0


def test_the_variant_that_recomputes_is_not_the_profiles() -> None:
    nodes = [node(0)]
    nodes[0]["TMPCs"] = {"1": [variant(id="activation recomp", timePerSample=9.0), variant()]}
    profile = read_profile(json.dumps(piper(nodes, [])), "x")
    assert profile.costs.timings[0].forward[0] == pytest.approx(1.0)


def test_names_are_told_apart() -> None:
    data = small()
    for item, name in zip(data["nodes"], ("a", "a", "a.1", "a.3"), strict=True):
        item["name"] = name
    names = {op.name for op in read_profile(json.dumps(data), "x").graph.operators}
    assert len(names) == 4 and {"a.1", "a.3"} <= names


def test_a_byte_order_mark_is_skipped() -> None:
    assert len(read_profile("\ufeff" + json.dumps(small()), "x").graph.operators) == 4


def test_max_batch_size_is_another_name() -> None:
    data = small()
    data["maxBatchSize"] = data.pop("mbsInBatch") + 1
    assert read_piper(json.dumps(data), "x").micro_batches == 9


def broken(change: str) -> str:
    data = small()
    match change:
        case "missing":
            del data["nodes"][1]["TMPCs"]["1"][0]["timePerSample"]
        case "negative":
            data["nodes"][1]["TMPCs"]["1"][0]["timePerSample"] = -2.5
        case "text":
            data["bandwidth"] = "fast"
        case "cycle":
            data["edges"].append({"sourceId": 1, "destId": 7, "communicationCost": 1})
        case "unknown":
            data["edges"].append({"sourceId": 1, "destId": 99, "communicationCost": 1})
        case "edge twice":
            data["edges"].append(data["edges"][0])
        case "node twice":
            data["nodes"].append(node(3))
        case "no nodes":
            data["nodes"] = []
        case "nodes no list":
            data["nodes"] = {}
        case "exchanged":
            data["nodes"][1]["TMPCs"]["1"][0]["syncTimeFw"] = {"42": 1.0}
        case "exchanged by no number":
            data["nodes"][1]["TMPCs"]["1"][0]["syncTimeFw"] = {"--1": 1.0}
        case "exchanged without an edge":
            data["nodes"][1]["TMPCs"]["1"][0]["syncTimeBw"] = {"7": 1.0}
        case "degree":
            data["nodes"][1]["TMPCs"]["none"] = []
        case "degree twice":
            data["nodes"][1]["TMPCs"]["01"] = []
        case "no degree":
            data["nodes"][1]["TMPCs"] = {}
        case "parts":
            data["mbsInBatch"] = 8.5
        case "absurd":
            data["nodes"][1]["TMPCs"]["1"][0]["timePerSample"] = 10**400
        case "name":
            data["nodes"][1]["name"] = ["layer"]
        case "lines":
            data["nodes"][1]["name"] = "two\nlines"
        case "list":
            return json.dumps([data])
        case "deep":
            return '{"nodes": ' * 100_000
        case "digits":
            return '{"nodes": ' + "9" * 5000 + "}"
        case "not finite":
            data["nodes"][1]["TMPCs"]["1"][0]["memoryUsageA"] = float("nan")
        case _:
            return "{nodes: 1}"
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", r"node 3 \(layer\), TMPCs 1: timePerSample is missing"),
        ("negative", r"node 3 \(layer\), TMPCs 1: timePerSample must be a number of at least 0, it is -2.5"),
        ("text", "bandwidth must be a number of at least 1e-09, it is 'fast'"),
        ("cycle", "must be acyclic, node 1 is on a cycle"),
        ("unknown", r"edges\[4\]: names node 99, which is not in the file"),
        ("edge twice", r"edges\[4\]: edge 7 -> 3 appears twice"),
        ("node twice", "node 3 appears twice"),
        ("no nodes", "nodes must not be empty"),
        ("nodes no list", "nodes: must be a list"),
        ("exchanged", "syncTimeFw names node '42'"),
        ("exchanged by no number", "syncTimeFw names node '--1', which is not in the file"),
        ("exchanged without an edge", "syncTimeBw names node '7', to which it has no edge"),
        ("degree", "one is 'none'"),
        ("degree twice", "each once, one is '01'"),
        ("no degree", r"x.json: node 3 \(layer\) has no variant without tensor parallelism"),
        ("parts", "mbsInBatch must be a whole number, it is 8.5"),
        ("absurd", r"timePerSample must be at most 1e\+24, it is 1000"),
        ("name", r"node 3: name: must be a text, it is"),
        ("lines", r"name must be one line of text, it is 'two\\nlines'"),
        ("list", r"x.json: must be an object, it is"),
        ("deep", "cannot be read as JSON, maximum recursion depth"),
        ("digits", "cannot be read as JSON, Exceeds the limit"),
        ("not finite", "memoryUsageA must be a number of at least 0, it is nan"),
        ("json", "x.json, line 1: not JSON"),
    ],
)
def test_a_malformed_piper_profile_is_refused_in_one_sentence(change: str, said: str) -> None:
    with pytest.raises(ProfileError, match=said) as error:
        read_profile(broken(change), "x.json")
    assert str(error.value).startswith("x.json") and "\n" not in str(error.value)


LINES = """\
node4 -- Linear(in_features=4, out_features=4) -- forward_compute_time=2.000, backward_compute_time=6.0, \
activation_size=[640.0; 64.0], parameter_size=400.0
node1 -- Input0 -- forward_compute_time=500.0, backward_compute_time=0, activation_size=64, parameter_size=0 
node2 -- Embedding(5, 4) -- forward_compute_time=1, backward_compute_time=3, activation_size=128, \
parameter_size=80
node3 -- Add -- forward_compute_time=0, backward_compute_time=0, activation_size=128.0, parameter_size=0
node5 -- __getitem__(1) -- forward_compute_time=0, backward_compute_time=0, activation_size=4, \
parameter_size=0
INDENTnode1 -- node2
INDENTnode2 -- node3
INDENTnode1 -- node3
INDENTnode3 -- node4
INDENTnode4 -- node5
"""


@pytest.mark.parametrize("indent", ["\t", "  "])
def test_a_pipedream_profile(indent: str) -> None:
    profile = read_profile(LINES.replace("INDENT", indent), "graph.txt", 64)
    operators = {op.name: op for op in profile.graph.operators}
    assert list(operators) == ["node2.Embedding", "node3.Add", "node4.Linear"]
    times = {
        t.operator: (t.forward[0], t.backward_input[0], t.backward_weight[0]) for t in profile.costs.timings
    }
    assert times["node2.Embedding"] == pytest.approx((1e-3, 0.0, 3e-3))  # nothing to send a gradient to
    assert times["node4.Linear"] == pytest.approx((2e-3, 3e-3, 3e-3))
    assert operators["node2.Embedding"].batch_keys == operators["node3.Add"].batch_keys == ("node1.Input0",)
    assert operators["node2.Embedding"].outputs[0].bytes == 2
    assert operators["node3.Add"].outputs[0].needs_grad
    assert operators["node4.Linear"].terms and not operators["node4.Linear"].outputs
    assert operators["node4.Linear"].stash == 11.0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("parameter_size=80", "", "line 3: node node2 has no parameter_size"),
        ("forward_compute_time=1,", "forward_compute_time=-1,", "line 3: node node2: forward_compute_time"),
        ("activation_size=128,", "activation_size=many,", "activation_size must be .* it is 'many'"),
        ("activation_size=128,", "activation_size=1_28,", "activation_size must be .* it is '1_28'"),
        ("activation_size=128,", "activation_size=[1; 28,", r"activation_size must be .* it is '\[1;'"),
        ("activation_size=128,", "activation_size=1e300,", r"activation_size must be at most 1e\+24"),
        ("\tnode2 -- node3", "\tnode2 -- node9", "line 7: edge node2 -- node9 names node node9"),
        ("\tnode4 -- node5", "\tnode4 -- node2", "must be acyclic, node node"),
        ("node3 -- Add", "node2 -- Add", "line 4: node node2 appears twice"),
        ("node3 -- Add --", "node3", "line 4: must be 'node -- description -- costs'"),
    ],
)
def test_a_malformed_pipedream_profile_is_refused_in_one_sentence(old: str, new: str, said: str) -> None:
    text = LINES.replace("INDENT", "\t")
    assert old in text
    with pytest.raises(ProfileError, match=said) as error:
        read_profile(text.replace(old, new), "graph.txt")
    assert str(error.value).startswith("graph.txt") and "\n" not in str(error.value)


def test_other_files_are_refused() -> None:
    with pytest.raises(ProfileError, match="neither Piper's JSON nor PipeDream's"):
        read_profile("", "empty")
    with pytest.raises(ProfileError, match="line 1: must be"):
        read_profile("torch is not a profile", "words.txt")
    only = "node1 -- Input -- " + ", ".join(
        f"{f}=0"
        for f in ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")
    )
    with pytest.raises(ProfileError, match="nothing is left to compute"):
        read_profile(only, "inputs.txt")


@pytest.mark.skipif(not PROFILES.is_dir(), reason="needs the published profiles (GPP_PROFILES)")
@pytest.mark.parametrize(
    "path",
    sorted([*PROFILES.glob("*/*.json"), *PROFILES.glob("*/*.txt")]),
    ids=lambda path: path.name,
)
def test_every_published_profile_is_read(path: Path) -> None:
    text = path.read_text()
    profile = read_profile(text, path.name)
    total = sum(
        sum(t.forward) + sum(t.backward_input) + sum(t.backward_weight) for t in profile.costs.timings
    )
    if path.suffix == ".json":
        nodes = json.loads(text)["nodes"]
        assert len(profile.graph.operators) == len(nodes)
        expected = sum(n["TMPCs"]["1"][0]["timePerSample"] for n in nodes)
        assert total == pytest.approx(expected, rel=1e-9)
    else:
        assert 0 < len(profile.graph.operators) <= text.count("forward_compute_time") and total > 0
