"""GHPO: section 6 of the dossier on distillation and hints; its row in the table of hints."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from method_cases import rollouts

from tandem.algorithms.base import Budget
from tandem.algorithms.parts.hints import first_words, with_hint
from tandem.algorithms.registry import make_method
from tandem.engine.core.errors import MethodError
from tandem.engine.core.types import GenRequest, Prompt, Sampling
from tandem.launch.check_config import load
from tandem.launch.run.run import train

SOLUTION = "first add both, then halve it"


class Letters:
    """A codec of one id per character, for prompts of at most 80."""

    def encode(self, content):
        text = content if isinstance(content, str) else content[-1]["content"]
        return np.array([ord(c) for c in text], np.int32) if len(text) <= 80 else None

    def decode(self, response):
        return "".join(map(chr, response))


def asked(rewards, wave, content="What?", **options):
    """What the method asks for once `wave` - 1 waves brought these rewards."""
    solution = np.array([ord(c) for c in SOLUTION], np.int32)
    prompt = Prompt("p", np.array([1], np.int32), content, {}, solution)
    group = replace(rollouts(rewards), prompt=prompt)
    if wave > 1:  # with the hint of the wave before in its prompt
        hinted = replace(prompt, content="What? something")
        group = replace(group, prompt=hinted, earlier=(group,))
    request = GenRequest(group.group, group.prompt, 2, Sampling(8), wave=wave - 1)
    budget = Budget(1, 2, 1, 1, codec=Letters())
    return make_method("ghpo", {"template": " {hint}", **options}).again(
        group, wave, request, budget
    )


@pytest.mark.parametrize(
    "wave, hint",
    [(1, "first"), (2, "first add"), (3, "first add both, then")],
)
def test_a_group_that_is_all_wrong_sees_more_of_the_solution(wave, hint):
    """Row GHPO: 25, 50, 75 % of the characters, here 7, 14 and 22 of 29, to the end of a word; the
    hint of the wave before is gone."""
    request = asked((0, 0), wave)
    assert request.prompt.content == f"What? {hint}"
    assert request.prompt.tokens.tolist() == [ord(c) for c in f"What? {hint}"]
    assert request.samples == 2 and request.prompt.demonstration is not None


@pytest.mark.parametrize("rewards, wave", [((0, 1), 1), ((1, 1), 2), ((0, 0), 4)])
def test_no_further_request(rewards, wave):
    """Solved, or wrong with the last hint too."""
    assert asked(rewards, wave) is None


def test_what_counts_as_right_and_prompts_that_get_too_long():
    assert asked((0, 0.5), 1) is not None and asked((0, 0.5), 1, correct=0.5) is None
    assert asked((0, 0), 1, content="What? " * 13) is None


def test_where_a_hint_stands():
    assert with_hint("1+1", " ({hint})", "it is") == "1+1 (it is)"
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert [m["content"] for m in with_hint(chat, " {hint}", "h")] == ["a", "b", "c h"]
    assert chat[2]["content"] == "c", "the data's own row is left alone"
    with pytest.raises(MethodError, match="no place for a hint"):
        with_hint([{"role": "system", "content": "s"}], "{hint}", "h")


@pytest.mark.parametrize(
    "text, share, hint",
    [
        ("one two three", 0.25, "one"),
        ("one two three", 0.55, "one two"),
        ("one two three", 0.9, "one two"),
        ("one two three", 0.1, "o"),
        ("123456", 0.5, "123"),
        ("", 0.5, ""),
        ("one two", 1.0, "one two"),
    ],
)
def test_first_words(text, share, hint):
    assert first_words(text, share) == hint


@pytest.mark.parametrize(
    "options, words",
    [
        ({"amounts": [0.5, 1.0]}, r"amounts has 1.0, each must be a number in \(0, 1\)"),
        ({"amounts": ["half"]}, "amounts has 'half'"),
        ({"template": "hint"}, r"expected a text with \{hint\}"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        make_method("ghpo", options)


def run(tmp_path, name, *overrides):
    config = {
        "mode": "inline",
        "model": {"path": "tandem:tiny"},
        "reward": {"functions": ["exact"]},
        "data": {
            "prompts": {"path": "task:sort", "options": {"digits": 4}},
            "experts": {"path": "task:sort", "options": {"digits": 4, "size": 8}},
            "experts_per_step": 2,
            "max_prompt_tokens": 32,
            "max_expert_tokens": 16,
        },
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_tokens": 5},
        "run": {"steps": 3, "save_model": False, "dir": str(tmp_path / name), "name": "run"},
        "method": {"name": "ghpo", "template": "{hint}"},
    }
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config))
    assert train(load(file, overrides)) == 0
    folder = tmp_path / name / "run"
    read = {}
    for kind in ("metrics", "rollouts"):
        lines = (folder / f"{kind}.jsonl").read_text().splitlines()
        read[kind] = [json.loads(line) for line in lines]
    return folder, read


@pytest.mark.whole_run
def test_every_wave_is_recorded_and_replayed_and_a_resume_is_exact(tmp_path):
    folder, whole = run(tmp_path, "whole")
    waves = [line.get("wave", 0) for line in whole["rollouts"]]
    assert waves == [0, 0, 1, 1, 2, 2, 3, 3] * 6, "an untrained model solves nothing"
    replaced = [line.get("replaced", False) for line in whole["rollouts"]]
    assert replaced == [wave < 3 for wave in waves]
    prompts = {len(line["prompt"]) for line in whole["rollouts"]}
    assert len(prompts) == 4, "none, then 25, 50 and 75 % of the answer"
    assert [line["wave/asked_again"] for line in whole["metrics"]] == [1.0] * 3

    record = f"rollout.record={folder / 'rollouts.jsonl'}"
    _, replayed = run(tmp_path, "replayed", "rollout.backend=replay", record)
    run(tmp_path, "resumed", "run.steps=2")
    _, resumed = run(tmp_path, "resumed", "run.steps=3", "run.resume=true")
    for other in (replayed, resumed):
        assert len(other["metrics"]) == 3
        for a, b in zip(whole["metrics"], other["metrics"], strict=True):
            assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
        assert [line["tokens"] for line in other["rollouts"]] == [
            line["tokens"] for line in whole["rollouts"]
        ]
