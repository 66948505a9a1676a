"""Loss and metrics from terms."""

import math

from gpp.program.stage import TermSum
from gpp.runtime.results import Total, combine, local_weight


def test_a_mean_is_weighted_by_the_samples_of_each_piece() -> None:
    loss = TermSum("loss", (("a", 1.0), ("b", 0.5)), 0.25, None)
    terms = {"a": [(0, 2, 1.0), (2, 3, 4.0)], "b": [(0, 3, 2.0)]}
    assert combine(loss, terms, 3).mean == (1.0 * 2 + 4.0) / 3 + 0.5 * 2.0 + 0.25


def test_a_pair_is_summed_before_it_is_divided() -> None:
    loss = TermSum("loss", (("s", 1.0),), 0.0, (("w", 2.0),))
    terms = {"s": [(0, 2, 3.0), (2, 4, 5.0)], "w": [(0, 2, 1.0), (2, 4, 3.0)]}
    assert combine(loss, terms, 4) == Total(8.0, 8.0)
    assert local_weight(loss, {"s": [(0, 2, 3.0)]}) == 0.0
    assert local_weight(loss, terms) == 8.0


def test_pieces_are_added_in_the_order_of_samples() -> None:
    values = [1e16, 1.0, -1e16]
    pieces = [(i, i + 1, v) for i, v in enumerate(values)]
    loss = TermSum("loss", (("a", 1.0),), 0.0, (("a", 1.0),))
    assert combine(loss, {"a": pieces}, 3).value == combine(loss, {"a": pieces[::-1]}, 3).value


def test_nothing_with_weight_is_not_a_number() -> None:
    assert math.isnan(Total(1.0, 0.0).mean)
