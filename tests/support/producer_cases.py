"""A producer whose pool and rewards are scripted; the real ones have suites of their own."""

from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np

from tandem.algorithms.base import Budget, Demand, Method
from tandem.engine.core.types import Finish, Prompt, RewardOutcome, Sampling
from tandem.engine.learner.by_hand import trajectory
from tandem.engine.loop.producer import Producer
from tandem.engine.loop.scoring import Scorer


class Prompts:
    def __init__(self):
        self.n = 0

    def take(self, n):
        self.n += n
        return [Prompt(f"p{i}", np.array([1], np.int32), "", {}) for i in range(self.n - n, self.n)]


class Pool:
    """Collects requests; the test says when and with which version they finish."""

    def __init__(self, instant=True):
        self.version, self.instant, self.waiting, self.requests, self.aborted = (
            0,
            instant,
            [],
            [],
            [],
        )

    def submit(self, request):
        future = Future()
        self.requests.append(request)
        self.waiting.append((request, future))
        if self.instant:
            self.finish()
        return future

    def finish(self, order=None):
        waiting, self.waiting = self.waiting, []
        for i in order or range(len(waiting)):
            request, future = waiting[i]
            future.set_result(tuple(self.answer(request) for _ in range(request.samples)))

    def answer(self, request):
        found = trajectory(
            request.prompt.tokens,
            [5, 6],
            [-1.0, -1.0],
            version=self.version,
            prompt_id=request.prompt.id,
            group=request.group,
        )
        return replace(found, wave=request.wave)

    def abort(self, request):
        """The future stays open, as a real engine's does for a moment; `answer_aborted` is that
        moment: one sample had ended, one had a token.
        """
        self.aborted.append(request)

    def answer_aborted(self):
        for request, future in self.waiting:
            if any(request is r for r in self.aborted):
                kw = dict(version=self.version, prompt_id=request.prompt.id, group=request.group)
                future.set_result(
                    (
                        trajectory([1], [5, 6], [-1.0, -1.0], **kw),
                        replace(trajectory([1], [5], [-1.0], **kw), finish=Finish.ABORT),
                    )
                )
        self.waiting = [(r, f) for r, f in self.waiting if not f.done()]


class Rewards:
    def __init__(self, outcome=lambda prompt, i: RewardOutcome(float(i))):
        self.outcome = outcome

    def submit(self, prompt, texts, ids):
        self.prompts = [*getattr(self, "prompts", []), prompt.id]
        future = Future()
        future.set_result(tuple(self.outcome(prompt, i) for i in range(len(texts))))
        return future


@dataclass
class Plain(Method):
    def demand(self, step, budget, signals):
        return Demand(prompts=budget.prompts)


def make(
    pool,
    method=None,
    staleness=0,
    rewards=None,
    on_error="drop",
    restart_and_sync=lambda: None,
    over_sample=0,
):
    method = method or Plain()
    scorer = Scorer(
        rewards or Rewards(), lambda ids, finish: "", on_error, method.scores_demonstrations
    )
    return Producer(
        method=method,
        prompts=Prompts(),
        pool=pool,
        scorer=scorer,
        budget=Budget(3, 2, 0, 10),
        sampling=Sampling(8),
        staleness=staleness,
        seed=7,
        restart_and_sync=restart_and_sync,
        over_sample=over_sample,
    )
