"""Numbers of objectives that leave no sense in them are refused when they are read."""

import math

import pytest

from tandem import PolicyLoss
from tandem.algorithms.parts.demos import DemoLoss
from tandem.algorithms.parts.objectives.proximal import ClippedRatio


@pytest.mark.parametrize("name", ["clip_low", "clip_high"])
@pytest.mark.parametrize("value", [-1.0, -1e-9, math.nan])
def test_a_clip_range_that_leaves_out_the_ratio_of_an_unchanged_policy(name, value):
    with pytest.raises(ValueError, match=rf"method.policy.{name} is .*, must be at least 0"):
        PolicyLoss(**{name: value})
    with pytest.raises(ValueError, match=rf"proximal.{name} is .*, must be at least 0"):
        ClippedRatio(**{name: value})


def test_a_clip_range_may_be_open():
    assert PolicyLoss(clip_low=math.inf, clip_high=0.0).clip_low == math.inf


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"low": 5, "high": 1}, "low is 5.0 and high is 1.0"),
        ({"low": 17}, "low is 17.0 and high is 16.0"),  # the sequence's own
        ({"level": "token", "high": 0.1}, "low is 0.2 and high is 0.1"),
    ],
)
def test_weights_are_clipped_to_an_interval(options, words):
    with pytest.raises(ValueError, match=words):
        DemoLoss("iw_sft", options)
