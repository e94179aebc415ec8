"""Prompts that a method writes are read as those of the data are."""

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from tandem.engine.config.schema import DataConfig, DatasetConfig, ModelConfig
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
