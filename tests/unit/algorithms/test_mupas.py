"""MuPaS, method 38 of the catalogue: the role masks of a dialogue are disjoint, and together they
are all utterances.
"""

from dataclasses import replace

import numpy as np
import pytest
from method_cases import EXPERTS, batch, ids, look
from source_cases import chat, demonstrations, rows_file

from tandem.algorithms.registry import make_method
from tandem.algorithms.sft.mupas import role_masks
from tandem.engine.config.schema import ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.types import Finish, Source, Trajectory
from tandem.engine.model.resolve import load_tokenizer, resolve_model

# context, Ann 2 tokens, header, Bob 3, header, Ann 1
SOURCE = np.array([0, 0, 2, 2, 0, 2, 2, 2, 0, 2], np.int8)
ANN = np.array([0, 0, 1, 1, 0, 0, 0, 0, 0, 1])
BOB = np.array([0, 0, 0, 0, 0, 1, 1, 1, 0, 0])


def dialogue(speakers=("Ann", "Bob", "Ann"), role="") -> Trajectory:
    columns = {"speakers": list(speakers)} if speakers else {}
    tokens = np.arange(5, 15, dtype=np.int32)
    return Trajectory("d", tokens, SOURCE, Finish.STOP, columns=columns, role=role)


def test_masks_by_hand():
    masks = role_masks(dialogue(), "speakers")
    assert list(masks) == ["Ann", "Bob"]
    assert masks["Ann"].tolist() == ANN.tolist() and masks["Bob"].tolist() == BOB.tolist()
    one = role_masks(dialogue(None, "Eve"), "speakers")
    assert list(one) == ["Eve"] and one["Eve"].tolist() == (SOURCE == Source.EXPERT).tolist()


def test_roles_are_disjoint_and_together_all_utterances(tmp_path):
    """On real tokens of a dialogue with four speakers."""
    said = [("Ann", "hi"), ("Bob", "yes?"), ("Cy", "no"), ("Ann", "but"), ("Di", "x"), ("Bob", "y")]
    messages = chat("system: a room", *(f"assistant: {who}: {text}" for who, text in said))
    row = {"messages": messages, "who": [who for who, _ in said]}
    model = ModelConfig(path="tandem:tiny")
    path, tokenizer = rows_file(tmp_path, [row]), load_tokenizer(model)
    columns = {"prompt": "messages", "response": "messages", "train_on": "all"}
    (found,) = demonstrations(path, tokenizer, ModelConfig(resolve_model(model)), **columns).take(1)
    masks = role_masks(found, "who")
    assert list(masks) == ["Ann", "Bob", "Cy", "Di"]
    assert (sum(masks.values()) == (found.source == Source.EXPERT)).all()
    heard = {role: tokenizer.decode(found.tokens[mask == 1]) for role, mask in masks.items()}
    assert heard["Bob"] == "Bob: yes?<eos>Bob: y<eos>" and heard["Di"] == "Di: x<eos>"


def test_with_the_token_mean_all_roles_are_sft():
    experts = (dialogue(), *EXPERTS)
    ours = look(make_method("mupas", {}), batch((), experts), ids)
    sft = look(make_method("sft", {}), batch((), experts), ids)
    assert len(ours.rows) == 4 and ours.denominators == sft.denominators == {"sft": 6 + 5}
    assert ours.loss == pytest.approx(sft.loss)
    assert sum(ours.gradients[:2]) == pytest.approx(sft.gradients[0])


def test_a_role_has_the_same_weight_however_much_it_says():
    """Ann 3 tokens, Bob 3, at log p = -0.1 (position + 1): means 0.3, 0.4, 1.0 -> 1.7/3 and 0.7."""
    method = make_method("mupas", {"demos": {"reduction": "seq_mean_token_mean"}})
    out = look(method, batch((), (dialogue(),)))
    ann, bob = (0.3 + 0.4 + 1.0) / 3, (0.6 + 0.7 + 0.8) / 3
    assert out.loss == pytest.approx((ann + bob) / 2)


def test_some_roles_alone_and_micro_batches():
    method = make_method("mupas", {"roles": ["Bob"], "demos": {"entropy_bonus": 0.1}})
    experts = (dialogue(), dialogue(("Ann", "Ann", "Bob")))
    whole = look(method, batch((), experts), ids)
    assert [row.trained.sum() for row in whole.rows] == [3, 1]
    parts = look(method, batch((), experts), ids, ranks=2, micro_batch_tokens=10)
    assert parts.loss == pytest.approx(whole.loss)


def test_a_speaker_too_few_is_told_with_the_row():
    with pytest.raises(ConfigError, match=r"d: column 'speakers' names 2 .* 3 trained turns"):
        make_method("mupas", {}).rows(batch((), (dialogue(("Ann", "Bob")),)))


@pytest.mark.parametrize(
    "options, column, words",
    [
        ({"speakers": "who"}, ["Ann", "Bob", "Ann"], "column 'who' .*its columns: speakers"),
        ({}, "Ann", "column 'speakers' is 'Ann', expected a list of names"),
        ({"roles": ["Cy"]}, ["Ann", "Bob", "Ann"], "is Cy, but none .* 1 dialogues .*: Ann, Bob"),
    ],
)
def test_dialogues_of_nobody(options, column, words):
    one = replace(dialogue(), columns={"speakers": column})
    with pytest.raises(ConfigError, match=words):
        make_method("mupas", options).rows(batch((), (one,)))


def test_a_later_step_may_be_without_a_role():
    assert not make_method("mupas", {"roles": ["Cy"]}).rows(batch((), (dialogue(),), step=1))
