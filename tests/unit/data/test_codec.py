"""Prompts that a method writes are read as those of the data are."""

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from tandem.engine.config.schema import DataConfig, DatasetConfig, ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.data.codec import PromptCodec
from tandem.engine.data.sources import PromptSource
from tandem.engine.model.tiny import make_tiny

PLAIN = {"prompt": "4+4=", "response": "8"}
CHAT = {"prompt": [{"role": "user", "content": "1+1"}], "response": "2"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_tiny(tmp_path_factory.mktemp("model") / "tiny", hidden=32, layers=1)
    return ModelConfig(path=str(folder))


def source(tmp_path, model, row, **data):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    dataset = DatasetConfig(path=str(path), response="response")
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    return PromptSource(dataset, DataConfig(shuffle=False, **data), tokenizer, model, 0)


@pytest.mark.parametrize("row", [PLAIN, CHAT])
def test_a_prompt_of_the_data_has_its_own_tokens(tmp_path, model, row):
    if row is CHAT:
        model = replace(model, system_prompt="Hi")
    prompts = source(tmp_path, model, row)
    (prompt,) = prompts.take(1)
    codec = PromptCodec(prompts.encoder)
    found = codec.encode(prompt.content)
    assert found is not None and found.dtype == np.int32
    np.testing.assert_array_equal(found, prompt.tokens)
    assert codec.decode(prompt.demonstration) == row["response"]


def test_another_prompt_is_longer_or_too_long(tmp_path, model):
    prompts = source(tmp_path, model, CHAT, max_prompt_tokens=12)
    (prompt,) = prompts.take(1)
    codec = PromptCodec(prompts.encoder)
    hinted = [{"role": "user", "content": "1+1 2"}]
    assert len(codec.encode(hinted)) == len(prompt.tokens) + 2
    assert codec.encode([{"role": "user", "content": "1+1" * 20}]) is None


@pytest.mark.parametrize("row", [PLAIN, CHAT])
def test_what_a_method_writes_is_not_cut(tmp_path, model, row):
    """Else the question's beginning were lost behind the hint."""
    prompts = source(tmp_path, model, row, max_prompt_tokens=12, overlong="truncate_left")
    codec = PromptCodec(prompts.encoder)
    text = "1+1" * 20
    content = text if row is PLAIN else [{"role": "user", "content": text}]
    assert codec.encode(content) is None


@pytest.mark.parametrize("row", [PLAIN, CHAT])
def test_control_tokens_in_what_a_method_writes(tmp_path, model, row):
    def codec(**data):
        return PromptCodec(source(tmp_path, model, row, **data).encoder)

    def content(text):
        return text if row is PLAIN else [{"role": "user", "content": text}]

    end = codec().encoder.control.stops[0]
    with pytest.raises(ConfigError, match=r"a prompt that the method wrote: .* spells"):
        codec().encode(content(f"1{end}2"))
    escaped = f"1{end[0]} {end[1:]}2"
    found = codec(control_tokens="escape").encode(content(f"1{end}2"))
    np.testing.assert_array_equal(found, codec().encode(content(escaped)))
    allowed = codec(control_tokens="allow")
    ends = []
    for text in ("12", f"1{end}2"):
        tokens = allowed.encode(content(text))
        ends.append(np.count_nonzero(tokens == allowed.encoder.stop[0]))
    assert ends[1] == ends[0] + 1
