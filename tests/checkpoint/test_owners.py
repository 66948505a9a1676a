from hypothesis import given
from hypothesis import strategies as st

from gpp.checkpoint.owners import owners

HOLDERS = st.dictionaries(st.text(min_size=1, max_size=3), st.lists(st.integers(0, 4), min_size=1))


@given(HOLDERS, st.data())
def test_each_name_is_written_once_by_one_that_holds_it(holders: dict, data: st.DataObject) -> None:
    sizes = {name: data.draw(st.integers(0, 100)) for name in holders}
    found = owners(holders, sizes, 5)
    assert list(found.writer) == list(holders)
    assert all(found.writer[name] in holders[name] for name in holders)
    assert sorted(name for rank in range(5) for name in found.names_of(rank)) == sorted(holders)


def test_the_load_is_shared_out() -> None:
    holders = {**{f"p{i}": (0, 1, 2) for i in range(9)}, "own": (0,)}
    sizes = {name: 10 for name in holders} | {"own": 30}
    found = owners(holders, sizes, 3)
    assert [sum(sizes[n] for n in found.names_of(r)) for r in range(3)] == [40, 40, 40]
    assert found.file("model", 1) == "model-00002-of-00003.safetensors"
