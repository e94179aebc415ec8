"""The datasets of a run, opened and checked: which a method needs, and what is told of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tandem.algorithms.base import Method
from tandem.engine.config.names import DEFAULT_SOURCE, source_key
from tandem.engine.config.schema import Config, DataConfig, DatasetConfig
from tandem.engine.data.codec import PromptCodec
from tandem.engine.data.pairs import demonstration_source
from tandem.engine.data.sources import ExpertSource, PromptSource, RowSource


@dataclass(frozen=True)
class Sources:
    """What a run reads. None: the method needs none, or the config names none."""

    prompts: Any  # PromptSource, or the recorded prompts of a replay
    experts: Mapping[str, ExpertSource]  # by name; those of a method that trains on any
    # demonstrations with their prompts, where the method wants these together
    expert_prompts: PromptSource | None
    evaluation: PromptSource | None

    def named(self) -> dict[str, RowSource]:
        """Those that are read from datasets."""
        every = {**self.cursors(), "evaluation": self.evaluation}
        found = {}
        for name, source in every.items():
            if isinstance(source, RowSource):
                found[name] = source
        return found

    def cursors(self) -> dict[str, Any]:
        """Those of which a checkpoint says how far they are read."""
        every: dict[str, Any] = {"prompts": self.prompts}
        for name, source in self.experts.items():
            key = source_key(name).removeprefix("data.")
            every[key] = source
        every["aligned"] = self.expert_prompts
        return {name: source for name, source in every.items() if source is not None}

    def codec(self) -> PromptCodec | None:
        """How the prompts of the run are written."""
        every = (self.prompts, self.expert_prompts, *self.experts.values())
        for source in every:
            if isinstance(source, RowSource):
                return PromptCodec(source.encoder)
        return None

    def by_key(self) -> dict[str, Any]:
        """What training reads, by the key of the config that names it."""
        found = {
            "data.prompts": self.prompts,
            "data.experts": self.expert_prompts,
        }
        for name, source in self.experts.items():
            key = source_key(name)
            found[key] = source
        return found

    def lengths(self) -> dict[str, int]:
        """The rows in an epoch of each source of demonstrations."""
        found = {name: len(source) for name, source in self.experts.items()}
        if self.expert_prompts is not None:
            found[DEFAULT_SOURCE] = len(self.expert_prompts)
        return found

    def facts(self) -> dict[str, dict[str, Any]]:
        return {name: source.facts() for name, source in self.named().items()}

    def describe(self) -> Iterator[str]:
        """Lines about what datasets hold and the run does not use."""
        for source in self.named().values():
            yield from source.describe()


def open_sources(config: Config, data: DataConfig, method: Method, tokenizer) -> Sources:
    """`data` is config.data, with the date that templates tell. Raises ConfigError."""

    def opened(kind: type[RowSource], dataset: DatasetConfig | None) -> Any:
        if dataset is None:
            return None
        return kind(dataset, data, tokenizer, config.model, config.run.seed)

    prompts = None
    expert_prompts = None
    experts: dict[str, ExpertSource] = {}
    if method.uses_rollouts:
        prompts = opened(PromptSource, data.prompts)
    if config.rollout.backend == "replay":
        from tandem.rollout.backends.replay import RecordedPrompts, check_record

        record = config.rollout.record
        assert record is not None, "replay without a record: refused by the config's rules"
        check_record(record)
        prompts = prompts or RecordedPrompts(record)
    if method.prompts_from_experts:
        assert data.experts is not None, "refused by the config's rules"
        response = data.experts.response or "response"  # the name it has in generated rows
        expert_prompts = opened(PromptSource, replace(data.experts, response=response))
    if method.uses_experts:
        for name, dataset in data.demonstrations.items():
            if name == DEFAULT_SOURCE and method.prompts_from_experts:
                continue  # opened above
            kind = demonstration_source(dataset)
            experts[name] = opened(kind, dataset)
    evaluation = None
    if data.evaluation is not None:  # the same problems for all seeds
        evaluation = PromptSource(data.evaluation, data, tokenizer, config.model, 0, True)
    return Sources(prompts, experts, expert_prompts, evaluation)
