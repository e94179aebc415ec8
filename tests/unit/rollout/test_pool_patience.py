"""The rollout pool's deadline is for an engine that is silent, not for a long queue.

The engine is a thread here; real ones: tests/faults/test_engine_death.py.
"""

import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from tandem.engine.config.schema import Config, RolloutConfig
from tandem.engine.core.types import GenRequest, Prompt, Sampling
from tandem.rollout.engine_slots import EngineSlot
from tandem.rollout.pool import EnginePool


class OneAtATime:
    """Works on one request after the other, `seconds` each."""

    def __init__(self, seconds):
        self.seconds, self.turn, self.generate = seconds, threading.Lock(), self
        self.queued = []

    def remote(self, request):
        future = Future()
        self.queued.append(future)
        return SimpleRef(future)

    def work(self):
        for future in self.queued:
            time.sleep(self.seconds)
            future.set_result(())


class SimpleRef:
    def __init__(self, answer):
        self.answer = answer

    def future(self):
        return self.answer


def test_requests_that_queue_longer_than_the_deadline_are_answered_while_the_engine_works():
    pool = EnginePool(replace(Config(), rollout=RolloutConfig(request_timeout=1.5)), "", None, ".")
    engine, dead = OneAtATime(0.5), []
    pool.kill_engine = lambda slot, handle, reason: dead.append(reason)
    pool.slots = [EngineSlot(0, engine)]
    pool.thread.start()
    futures = [
        pool.submit(GenRequest(i, Prompt("p", np.array([1], np.int32), ""), 1, Sampling(4)))
        for i in range(6)
    ]
    engine.work()  # three seconds
    assert [f.result(10) for f in futures] == [()] * 6 and not dead
    silent = pool.submit(GenRequest(9, Prompt("p", np.array([1], np.int32), ""), 1, Sampling(4)))
    while not dead:
        time.sleep(0.1)
    assert "request_timeout" in dead[0] and not silent.done()
    pool.answers.put(None)


def test_a_silent_engine_is_found_while_another_answers_without_a_pause():
    pool = EnginePool(replace(Config(), rollout=RolloutConfig(request_timeout=1.0)), "", None, ".")
    silent, busy, dead = OneAtATime(0), OneAtATime(0), []
    pool.kill_engine = lambda slot, handle, reason: dead.append(handle)
    pool.slots = [EngineSlot(0, silent), EngineSlot(1, busy)]
    pool.thread.start()
    request = GenRequest(0, Prompt("p", np.array([1], np.int32), ""), 100, Sampling(4))
    pool.submit(request)  # its load keeps the silent one from getting more
    for number in range(1, 61):  # three seconds, and never one without an answer
        pool.submit(replace(request, group=number, samples=1))
        busy.queued[-1].set_result(())
        time.sleep(0.05)
    pool.answers.put(None)
    pool.thread.join()
    assert silent in dead and busy not in dead
