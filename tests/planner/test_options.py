import pytest

from gpp.plan import PlanError
from gpp.planner.options import Options, divisors


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mini_batch": 0}, "train.mini_batch must be at least 1, it is 0"),
        ({"mini_batch": 8, "micro_batch": 0}, "train.micro_batch must be auto or at least 1 sample, it is 0"),
        ({"mini_batch": 8, "micro_batch": "big"}, "it is 'big'"),
        (
            {"mini_batch": 12, "micro_batch": 8},
            "does not divide train.mini_batch 12; use one of 1, 2, 3, 4, 6",
        ),
        ({"mini_batch": 8, "max_replicas": 0}, "planner.max_replicas must be at least 1, it is 0"),
        ({"mini_batch": 8, "optimizer_factor": -1.0}, "the factor is -1.0"),
    ],
)
def test_bad_options_say_the_rule_the_value_and_the_remedy(settings, message):
    with pytest.raises(PlanError, match=message):
        Options(**settings)


def test_micro_batches():
    assert Options(mini_batch=24).micro_batches == (1, 2, 4, 8, 24)
    assert Options(mini_batch=7).micro_batches == (1, 7)
    assert Options(mini_batch=1).micro_batches == (1,)
    assert Options(mini_batch=24, micro_batch=6).micro_batches == (6,)


@pytest.mark.parametrize(
    "micro_batch, devices, limit, expected",
    [
        (8, 8, None, (1, 2, 4, 8)),
        (8, 5, None, (1, 2, 4)),
        (12, 16, None, (1, 2, 4)),
        (7, 16, None, (1,)),
        (2, 16, None, (1, 2)),
        (8, 8, 3, (1, 2)),
        (8, 8, 1, (1,)),
    ],
)
def test_replicas_split_a_micro_batch_evenly(micro_batch, devices, limit, expected):
    options = Options(mini_batch=8 * micro_batch, max_replicas=limit)
    assert options.degrees(micro_batch, devices) == expected


def test_divisors():
    assert divisors(36) == (1, 2, 3, 4, 6, 9, 12, 18, 36)
    assert divisors(1) == (1,)
