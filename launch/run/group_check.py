"""Whether rewards can teach anything with the samples per prompt that a config asks for."""

from __future__ import annotations

from tandem.algorithms.base import Method
from tandem.algorithms.parts.advantages import GROUP_RELATIVE
from tandem.algorithms.parts.policy import PolicyLoss
from tandem.algorithms.registry import configured
from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError

INSTEAD = (
    "set rollout.samples_per_prompt to at least 2, or method.policy.advantage to one that needs "
    "no group: reinforce_pp (compares over the batch), raw (the reward itself) or gae (a critic; "
    "preset ppo)"
)


def check_group_size(config: Config) -> str | None:
    """Raise ConfigError if every advantage of a run would be 0, or every group redrawn, because a
    prompt has one sample only. Returns a warning where the method trains on rollouts in another
    way as well, else None.

    LUFFY's and ViSurf's groups hold the demonstration too, so one rollout is enough there.
    """
    method = configured(config.method)
    policy = method.policy
    trains = (
        method.uses_rollouts and not config.run.rollout_only and config.rollout.backend != "replay"
    )
    if not trains or config.rollout.samples_per_prompt > 1:
        return None
    if not isinstance(policy, PolicyLoss) or asks_by_itself(method):
        return None
    if method.prompts_from_experts and method.scores_demonstrations:
        return None
    if policy.advantage in GROUP_RELATIVE:
        text = (
            "rollout.samples_per_prompt is 1, but method.policy.advantage is "
            f"{policy.advantage!r}, which compares the samples of a prompt: alone, each "
            f"has advantage 0, and the policy loss learns nothing; {INSTEAD}"
        )
        if method.needs_groups:
            raise ConfigError(text)
        return text
    if policy.advantage == "reinforce_pp" and config.rollout.prompts_per_step == 1:
        raise ConfigError(
            "rollout.prompts_per_step and rollout.samples_per_prompt are both 1, but "
            "method.policy.advantage is 'reinforce_pp', which compares the samples of a "
            "step: alone, each has advantage 0; raise one of them"
        )
    if policy.dynamic_sampling and not method.prompts_from_experts:
        raise ConfigError(
            "method.policy.dynamic_sampling is true, which redraws groups whose rewards are "
            "all equal, but rollout.samples_per_prompt is 1: every group would be redrawn; "
            "set rollout.samples_per_prompt to at least 2, or dynamic_sampling=false"
        )
    return None


def asks_by_itself(method: Method) -> bool:
    """A user's own method with a `request` of its own, which may ask for any number of samples."""
    own = not type(method).__module__.startswith("tandem.")
    return own and type(method).request is not Method.request
