"""Rows with views, and learners with other models beside the policy."""

import numpy as np
from learner_cases import make_plan

from tandem.algorithms.base import Term
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.teachers import DIVERGENCE, Measured
from tandem.engine.config.other_models import OtherModelConfig
from tandem.engine.config.schema import Config, LearnerConfig, ModelConfig
from tandem.engine.core.types import Row, Source
from tandem.engine.learner.protocol import PolicySpec
from tandem.engine.learner.ray import plan_of_rank
from tandem.engine.model.quantities import Divergence

SPEC = PolicySpec(uses_rollouts=True)
SFT = Term("sft", NLL())
VIEWS = {4: [1, 9, 30, 31, 32], 6: [1, 40], 3: [1, 9, 33]}  # by tokens of the response


def make_row(n, **changes) -> Row:
    prompt, response = [1, 9, 11], list(range(20, 20 + n))
    tokens = np.array(prompt + response, np.int32)
    mask = (np.arange(len(tokens)) >= 3).astype(np.float32)
    source = np.where(mask > 0, Source.POLICY, Source.PROMPT).astype(np.int8)
    views = {"informed": np.array(VIEWS[n], np.int32)}
    return Row(tokens, source, {"sft": mask}, group=n, prompt_id=f"p{n}", views=views, **changes)


ROWS = [make_row(n) for n in VIEWS]


def config_of(start, models, **learner) -> Config:
    return Config(
        model=ModelConfig(path=start),
        models=models,
        learner=LearnerConfig(head_chunk=4, micro_batch_tokens=24, **learner),
    )


def measured(model, beta) -> Term:
    """A divergence to the model as the loss."""
    return Term("sft", Measured(), quantities={DIVERGENCE: Divergence(model, beta)})


# -- what each rank of a learner does in tests of several

NAMES = ("policy", "teacher", "slow")


def models_of(folder):
    return {
        "teacher": OtherModelConfig(path=str(folder / "teacher")),
        "slow": OtherModelConfig(kind="ema", rate=0.25),
    }


def train(learner, steps, model="teacher@informed"):
    term = measured(model, 0.5)
    plan = make_plan(ROWS, learner.ranks, 9, [term], quantities=term.quantities)
    return [learner.step(plan_of_rank(plan, learner.rank)).metrics["loss"] for _ in range(steps)]


def scores(learner):
    return {name: learner.logprobs(ROWS, 0.8, name) for name in NAMES}
