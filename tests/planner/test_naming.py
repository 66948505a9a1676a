import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.planner.naming import LONGEST, stage_names
from tests.graphs import make_graph


def names(*stages: str) -> tuple[str, ...]:
    """Names of stages given as "operator operator"; the graph is all of them in that order."""
    operators = [name for stage in stages for name in stage.split()]
    graph = make_graph(dict.fromkeys(operators, ""))
    start, spans = 0, []
    for stage in stages:
        spans.append(range(start, start + len(stage.split())))
        start = spans[-1].stop
    return stage_names(graph, spans)


@pytest.mark.parametrize(
    "stages, expected",
    [
        (["embed"], ("embed",)),
        (["model.a model.b"], ("model",)),
        (["a.0.x a.0.y", "a.1.x a.1.y"], ("a.0", "a.1")),
        (["t.0.x t.0.y t.1.x", "t.1.y head"], ("t.0…1.x", "t.1.y…head")),
        (["a.x a.x#2", "a.y"], ("a.x…x#2", "a.y")),
        # an operator may have the name of a module that has others
        (["a", "a.b", "a.c a.d"], ("a", "a.b", "a.c…d")),
        (["a a.b", "a.c"], ("a…b", "a.c")),
        (["x", "embed head", "tail"], ("x", "embed…head", "tail")),
    ],
)
def test_names_are_the_modules_that_a_stage_is_made_of(stages, expected):
    assert names(*stages) == expected


def test_equal_names_are_numbered():
    graph = make_graph(dict.fromkeys(["a.0", "a.1", "a.2", "a.3", "a.4", "b"], ""))
    assert stage_names(graph, [(0, 1, 4), (2, 3), (5,)]) == ("a.0…4", "a.2…3", "b")
    assert stage_names(graph, [(0, 2, 4), (0, 1, 4), (5,)]) == ("a.0…4 (1)", "a.0…4 (2)", "b")


def test_long_names_lose_their_outer_modules():
    deep = "encoder.modalities.docstring.transformer.layers"
    found = names(f"{deep}.0 {deep}.11.ffn.out", f"{deep}.11.ffn.in", "classifier.norm")
    assert found == ("transformer.layers.0…11.ffn.out", f"{deep}.11.ffn.in", "classifier")
    assert len(found[0]) <= LONGEST


path = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join)


@settings(max_examples=100, deadline=None)
@given(st.lists(path, min_size=1, max_size=8, unique=True), st.data())
def test_names_are_unique(operators, data):
    graph = make_graph(dict.fromkeys(operators, ""))
    owner = [data.draw(st.integers(0, 2)) for _ in operators]
    stages = [[i for i, o in enumerate(owner) if o == s] for s in sorted(set(owner))]
    found = stage_names(graph, stages)
    assert len(set(found)) == len(found)
    assert all(set(name) <= set("abc.… ()12") for name in found)
