"""Learners whose `scope` trains a part of the model, shared by the tests of both engines."""

from learner_cases import CLIP, SPEC, make_policy

from tandem.engine.config.schema import Config, LearnerConfig, ModelConfig
from tandem.engine.config.scope import ScopeConfig
from tandem.engine.learner.local_engine import LocalEngine
from tandem.engine.learner.rank import LearnerRank

SCOPES = {
    "lora": ScopeConfig("lora", rank=4),
    "layers": ScopeConfig("layers", train=("1", "embed_tokens")),
    "random_half": ScopeConfig("random_half", every=2),
}


def config_of(model, scope, dtype="float32", **learner):
    return Config(
        model=ModelConfig(path=model, dtype=dtype),
        learner=LearnerConfig(grad_clip=CLIP, weight_decay=0.1, **learner),
        scope=scope,
    )


def scoped_policy(config):
    return make_policy(config, config.model.path)


def inline(model, scope, **changes):
    config = config_of(model, scope, **changes)
    engine = LocalEngine(scoped_policy(config), config.learner)
    return LearnerRank(config, model, SPEC, engine)
