"""Sync under faults: engines that die while they are connected, sent weights or probed.

Learner and pool are scripted; the real ones: tests/faults.
"""

from types import SimpleNamespace

import pytest

from tandem.engine.config.schema import Config, RolloutConfig
from tandem.engine.core.errors import EngineDied
from tandem.engine.core.outcomes import Delivery, Installed
from tandem.engine.loop.state import RunState
from tandem.engine.loop.sync import Sync


class Rig:
    """A learner and a pool; each of `faults` (connect, send, probe) raises EngineDied so many
    times, and leaves an engine dead if `dead`.
    """

    def __init__(self, dead=True, **faults):
        self.faults, self.dead, self.down, self.calls = faults, dead, 0, []
        self.synced = None
        self.state = RunState()
        self.sync = Sync(
            config=Config(rollout=RolloutConfig(staleness=1)),
            state=self.state,
            learner=self,
            pool=self,
            telemetry=SimpleNamespace(event=lambda kind, **facts: None),
            display=SimpleNamespace(message=lambda text: None),
        )
        self.sync.probe = lambda version: self.happen("probe")

    def happen(self, what):
        self.calls.append(what)
        if self.faults.get(what, 0):
            self.faults[what] -= 1
            self.down += self.dead
            raise EngineDied(what)

    def connect(self, pool):
        self.happen("connect")

    def send(self, version):
        self.happen("send")
        return Delivery({"w": "1"}, [Installed({"w": "1"}, version, "held")], 4)

    def restart_dead(self):
        self.calls.append("restart_dead")
        down, self.down = self.down, 0
        return down


@pytest.mark.parametrize(
    "fault, calls",
    [
        ("connect", ["connect", "restart_dead", "connect", "send", "probe"]),
        ("send", ["connect", "send", "restart_dead", "connect", "send", "probe"]),
        ("probe", ["connect", "send", "probe", "restart_dead", "connect", "send", "probe"]),
    ],
)
def test_an_engine_that_dies_at_any_moment_of_a_sync_is_replaced_and_sent_the_weights(fault, calls):
    rig = Rig(**{fault: 1})
    rig.sync.publish(3)
    assert rig.calls == calls and rig.state.version == 3
    rig.sync.publish(3)
    assert rig.calls == calls, "engines that have the weights are left alone"


def test_a_sync_that_fails_with_all_engines_alive_ends_the_run_instead_of_being_tried_forever():
    rig = Rig(dead=False, send=100)
    with pytest.raises(EngineDied, match="send"):
        rig.sync.publish(1)
    assert rig.calls == ["connect", "send", "restart_dead"] and rig.state.version is None


def test_recovery_from_a_death_during_generation_sends_the_present_weights_again():
    rig = Rig()
    rig.sync.publish(2)
    rig.down, rig.calls[:] = 1, []
    rig.sync.restart_and_sync()
    assert rig.calls == ["restart_dead", "connect", "send", "probe"] and rig.state.version == 2
