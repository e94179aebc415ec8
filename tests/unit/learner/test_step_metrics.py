"""Numbers of a step, added up over micro-batches and ranks."""

import math

import torch

from tandem.engine.learner.metrics import StepMetrics


def part(total, count, maximum):
    metrics = StepMetrics()
    metrics.add_sum("loss/sft", torch.tensor(total))
    metrics.add_max("gap/max", torch.tensor(maximum))
    metrics.add_mean("sft/p", torch.tensor(total), count_of="loss/sft")
    metrics.add_count("loss/sft", count)
    return metrics


def test_sums_maxima_and_means_of_parts():
    metrics = StepMetrics()
    metrics.merge(part(1.0, 1, 0.5))
    metrics.merge(part(2.0, 5, 0.25))
    host = StepMetrics()
    for one in (part(1.0, 1, 0.5), part(2.0, 5, 0.25)):  # as over ranks
        host.merge(one.on_host())
    for found in (metrics, metrics.on_host(), host):
        assert found.report() == {"loss/sft": 3.0, "gap/max": 0.5, "sft/p": 0.5}


def test_on_host_holds_floats_and_leaves_the_counts():
    host = part(1.5, 3, 0.5).on_host()
    assert host.sums == {"loss/sft": 1.5} and type(host.sums["loss/sft"]) is float
    assert host.counts == {"loss/sft": 3}
    assert StepMetrics().on_host() == StepMetrics()


def test_a_maximum_with_a_nan_is_nan_in_either_order():
    for first, second in ((math.nan, 1.0), (1.0, math.nan)):
        on_device, host = part(0.0, 1, first), part(0.0, 1, first).on_host()
        on_device.merge(part(0.0, 1, second))
        host.merge(part(0.0, 1, second).on_host())
        assert math.isnan(on_device.report()["gap/max"]) and math.isnan(host.report()["gap/max"])


def test_a_mean_that_a_part_lacks_is_over_all_that_was_counted():
    metrics = part(3.0, 2, 0.0)
    other = StepMetrics()
    other.add_count("loss/sft", 4)
    metrics.merge(other)
    assert metrics.report()["sft/p"] == 0.5


def test_a_mean_of_nothing_is_zero():
    metrics = StepMetrics()
    metrics.add_mean("sft/expert/p", torch.tensor(0.0), count_of="loss/sft/expert")
    metrics.add_count("loss/sft/expert", 0)
    assert metrics.report() == {"sft/expert/p": 0.0}
