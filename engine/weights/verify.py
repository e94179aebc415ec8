"""Weight sync, proved: the learner sends its weights to every rollout engine, and what arrived is
compared with what was sent.

A stale or partial sync is the worst kind of fault in RL post-training, because everything after it
looks plausible. So after every transfer:
  * every engine received the very parameters that were sent, with the same bytes (digests, per
    parameter);
  * every engine stamps its tokens with the new version;
  * the weights the engines compute with, in their own layout, are the same on all engines, and
    changed exactly if the sent ones did.
Anything else raises SyncError naming engine, parameter and both facts, and the run stops.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from tandem.engine.core.errors import SyncError
from tandem.engine.core.outcomes import SyncReport
from tandem.engine.weights.digest import combine

SHOWN = 5  # parameters that an error names


@dataclass(frozen=True)
class Synced:
    """What the last verified sync left in the engines, kept as `learner.synced`."""

    sent: str  # digest over all parameters as the learner sent them
    active_digest: str  # of the engines' own weights after it


def sync(learner, version: int) -> SyncReport:
    """Give every engine that the learner is connected with its present weights as `version`, and
    verify. Raises SyncError, or EngineDied if an engine is gone.
    """
    started = time.perf_counter()
    delivery = learner.send(version)
    if not delivery.installed:
        raise SyncError(
            f"weights {version} were sent to no engine: the pool has none alive; expected at "
            "least one"
        )
    for engine, found in enumerate(delivery.installed):
        compare(engine, delivery.sent, found.received, version)
        if found.version != version:
            raise SyncError(
                f"engine {engine} stamps its tokens with weight version {found.version} "
                f"after weights {version} were sent, expected {version}"
            )
    active = [found.active_digest for found in delivery.installed]
    if len(set(active)) > 1:
        raise SyncError(
            f"engines compute with different weights after version {version}: their digests are "
            f"{active}, expected all equal"
        )
    now = Synced(combine(delivery.sent), active[0])
    if learner.synced is not None:
        check_movement(learner.synced, now, version)
    learner.synced = now
    return SyncReport(time.perf_counter() - started, delivery.bytes, version)


def check_movement(last: Synced, now: Synced, version: int) -> None:
    """Raise SyncError unless the engines' weights changed exactly if the sent ones did."""
    same_sent = last.sent == now.sent
    same_active = last.active_digest == now.active_digest
    if same_sent == same_active:
        return
    words = {True: "are the same as", False: "differ from"}
    raise SyncError(
        f"weights {version} {words[same_sent]} those sent before, but the weights "
        f"the engines compute with {words[same_active]} "
        f"those before (digest {last.active_digest} -> {now.active_digest}): the engines did not "
        "take them, or not all of them"
    )


def compare(
    engine: int, sent: Mapping[str, str], received: Mapping[str, str], version: int
) -> None:
    """Raise SyncError naming the parameters that are missing, extra or different in what `engine`
    received.
    """
    missing, extra = sorted(sent.keys() - received.keys()), sorted(received.keys() - sent.keys())
    for what, names in (("did not receive", missing), ("received, without it being sent,", extra)):
        if names:
            raise SyncError(
                f"engine {engine} {what} {len(names)} parameter(s) of weights {version}: "
                f"{', '.join(names[:SHOWN])}; sent {len(sent)}, received {len(received)}"
            )
    wrong = [name for name in sorted(sent) if sent[name] != received[name]]
    if wrong:
        shown = [f"{name} (sent {sent[name]}, received {received[name]})" for name in wrong[:SHOWN]]
        raise SyncError(
            f"engine {engine} received other bytes than were sent for {len(wrong)} of "
            f"{len(sent)} parameter(s) of weights {version}: {', '.join(shown)}"
        )
