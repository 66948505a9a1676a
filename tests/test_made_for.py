from dataclasses import replace

from gpp.api.plan import check_subject, machine
from gpp.cost import Roofline
from gpp.graph import ComputationGraph, Operator, Parameter
from gpp.made_for import differences, notes
from gpp.plan import Plan, PlanError, plan_from_json, plan_to_json
from gpp.planner.named import planned
from gpp.planner.options import Options

from .graphs import make_graph

MODEL = make_graph({"left": "", "right": "", "join": "left right"})


def with_operator(name: str, **changes: object) -> ComputationGraph:
    operators = [replace(op, **changes) if op.name == name else op for op in MODEL.operators]
    return replace(MODEL, operators=tuple(operators))


def made() -> Plan:
    return planned("sequential", MODEL, machine(2), Roofline(), Options(mini_batch=4))


def refusal(plan: Plan, graph: ComputationGraph) -> str:
    try:
        check_subject(plan, graph, "p.json")
    except PlanError as error:
        return str(error)
    raise AssertionError("it was taken")


def test_a_model_is_like_itself() -> None:
    assert differences(notes(MODEL), MODEL) == []
    check_subject(made(), MODEL, "p.json")
    assert made().made_for == notes(MODEL)


def test_what_has_changed_is_named() -> None:
    left = MODEL.operators[0]
    wide = tuple(replace(p, bytes=3 * p.bytes) for p in left.parameters)
    size = sum(p.bytes for p in left.parameters)
    assert differences(notes(MODEL), with_operator("left", parameters=wide)) == [
        f"left has {3 * size} bytes of parameters, {size} in the plan"
    ]
    out = tuple(replace(t, shape=(7, *t.shape)) for t in left.outputs)
    size = sum(t.bytes for t in left.outputs)
    assert differences(notes(MODEL), with_operator("left", outputs=out)) == [
        f"left gives {7 * size} bytes a sample, {size} in the plan"
    ]
    frozen = tuple(replace(p, trainable=False) for p in left.parameters)
    assert differences(notes(MODEL), with_operator("left", parameters=frozen)) == [
        "1 operator of the same sizes read, compute or keep something else (left)"
    ]
    turned = replace(MODEL, operators=(MODEL.operators[1], MODEL.operators[0], MODEL.operators[2]))
    assert differences(notes(MODEL), turned) == ["its operators come in another order"]


def test_of_many_the_first_are_named() -> None:
    more = tuple(
        Operator(f"new{i}", "linear", (), (), ("x",), (Parameter(f"w{i}", 4, True),)) for i in range(6)
    )
    assert differences(notes(MODEL), replace(MODEL, operators=more)) == [
        "the model has 6 operators that the plan lacks (new0, new1, new2, new3, and 2 more)",
        "the plan has 3 operators that the model lacks (left, right, join)",
    ]


def test_a_plan_of_an_older_form_is_read_and_knows_names() -> None:
    text = plan_to_json(replace(made(), made_for=())).replace('"gpp.plan/3"', '"gpp.plan/2"')
    older = plan_from_json(text)
    assert older == replace(made(), made_for=())
    other = make_graph({"left": "", "middle": "", "join": "left middle"})
    assert refusal(older, other) == (
        "p.json was made for another model: the model has 1 operator that the plan lacks (middle); the plan "
        "has 1 operator that the model lacks (right); plan anew"
    )
    changed = with_operator("left", stash=1.0)
    assert f"its graph is {changed.fingerprint()}, the plan's {MODEL.fingerprint()}" in refusal(
        older, changed
    )
    assert "the same sizes read, compute or keep something else (left); plan anew" in refusal(made(), changed)
    weighted = replace(MODEL, loss_weighted=True)
    assert "its loss is a sum with a weight, a mean in the plan" in refusal(made(), weighted)
