"""Prompts and demonstrations: exact tokens, saved cursor, every kind of file, and errors that name
the row.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tandem.engine.config.schema import DataConfig, DatasetConfig, ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.types import Finish, Source
from tandem.engine.data.pairs import demonstration_source
from tandem.engine.data.sources import ExpertSource, PromptSource
from tandem.engine.model.tiny import make_tiny
from tandem.launch.check_config import load

CONFIGS = Path(__file__).parents[3] / "configs"
ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i), "response": str(2 * i)} for i in range(7)]
CHAT = [
    {
        "prompt": [{"role": "user", "content": f"{i}+{i}"}],
        "response": [{"role": "assistant", "content": str(2 * i)}],
    }
    for i in range(3)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ModelConfig(
        path=str(make_tiny(tmp_path_factory.mktemp("model") / "tiny", hidden=32, layers=1))
    )


@pytest.fixture
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.path)


def jsonl(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


def prompts(path, tokenizer, model, seed=0, data=None, **dataset):
    return PromptSource(
        DatasetConfig(path=path, **dataset),
        data or DataConfig(shuffle=False),
        tokenizer,
        model,
        seed,
    )


def experts(path, tokenizer, model, seed=0, data=None, **dataset):
    return ExpertSource(
        DatasetConfig(path=path, **{"response": "response", **dataset}),
        data or DataConfig(shuffle=False),
        tokenizer,
        model,
        seed,
    )


def test_plain_text_prompt_and_demonstration_tokens(tmp_path, tokenizer, model):
    path = jsonl(tmp_path, ROWS)
    prompt, expert = (
        prompts(path, tokenizer, model).take(5)[4],
        experts(path, tokenizer, model).take(5)[4],
    )
    ids = tokenizer.convert_tokens_to_ids
    assert (
        prompt.tokens.tolist() == ids(["<bos>", "4", "+", "4", "="])
        and prompt.tokens.dtype == np.int32
    )
    assert prompt.content == "4+4=" and prompt.columns == ROWS[4] and prompt.demonstration is None
    assert (
        expert.tokens.tolist() == ids(["<bos>", "4", "+", "4", "=", "8", "<eos>"])
        and expert.tokens.dtype == np.int32
    )
    assert (
        expert.source.tolist() == [Source.PROMPT] * 5 + [Source.EXPERT] * 2
        and expert.source.dtype == np.int8
    )
    assert expert.finish is Finish.STOP and expert.behaviour_logp is None
    assert prompt.id == expert.prompt_id == f"{path}:5"


def test_chat_prompt_and_demonstration_tokens(tmp_path, tokenizer, model):
    path, ids = jsonl(tmp_path, CHAT), tokenizer.convert_tokens_to_ids
    model = replace(model, system_prompt="Hi")
    prompt, expert = (
        prompts(path, tokenizer, model).take(2)[1],
        experts(path, tokenizer, model).take(2)[1],
    )
    expected = ids(
        ["<bos>", "<system>", "H", "i", "<eos>", "<user>", "1", "+", "1", "<eos>", "<assistant>"]
    )
    assert prompt.tokens.tolist() == expected
    assert prompt.content == [
        {"role": "system", "content": "Hi"},
        {"role": "user", "content": "1+1"},
    ]
    assert expert.tokens.tolist() == expected + ids(
        ["2", "<eos>"]
    ) and expert.response.tolist() == ids(["2", "<eos>"])
    text = prompts(
        jsonl(tmp_path, ROWS, "text.jsonl"),
        tokenizer,
        model,
        data=DataConfig(chat=True, shuffle=False),
    ).take(1)[0]
    # plain text becomes one user message
    assert text.content[-1] == {"role": "user", "content": "0+0="}


def test_demonstration_stops_where_the_model_stops(tmp_path, tokenizer, model):
    """The template closes a turn with a token that is not the tokenizer's EOS, and a line break:
    the generation config knows the token.
    """
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<unk>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((Path(model.path) / "config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [tokenizer.eos_token_id, tokenizer.unk_token_id]})
    )
    path = jsonl(tmp_path, CHAT)
    expert = experts(path, tokenizer, replace(model, path=str(folder))).take(2)[1]
    assert tokenizer.decode(expert.response) == "2<unk>"
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokenizer.eos_token_id})
    )
    expert = experts(path, tokenizer, replace(model, path=str(folder))).take(2)[1]
    # not a stop token of this model: it is text, and EOS ends the response
    assert tokenizer.decode(expert.response) == "2<unk>\n<eos>"


def test_token_over_the_border_is_split_as_a_rollout_would_write_it(tmp_path, model):
    """A tokenizer that merges 'ab' into one token: the prompt part stays what a rollout gets."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<eos>": 2, "ab": 3}, merges=[("a", "b")]))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    path = jsonl(
        tmp_path, [{"prompt": "ba", "response": "ba"}, {"prompt": "ba", "response": "bab"}]
    )
    assert tokenizer("baba").input_ids == [1, 3, 0]
    prompt = prompts(path, tokenizer, model).take(1)[0]
    assert prompt.tokens.tolist() == [1, 0]
    assert [t.tokens.tolist() for t in experts(path, tokenizer, model).take(2)] == [
        [1, 0, 1, 0, 2],
        [1, 0, 1, 3, 2],
    ]


def test_aligned_demonstrations_and_ids(tmp_path, tokenizer, model):
    path = jsonl(tmp_path, [{**row, "id": f"row-{i}"} for i, row in enumerate(ROWS)])
    aligned, expert = (
        prompts(path, tokenizer, model, response="response").take(7),
        experts(path, tokenizer, model).take(7),
    )
    assert (
        [p.id for p in aligned] == [e.prompt_id for e in expert] == [f"row-{i}" for i in range(7)]
    )
    for p, e in zip(aligned, expert, strict=True):
        assert np.array_equal(np.concatenate([p.tokens, p.demonstration]), e.tokens)


def test_order_depends_on_seed_and_epoch_and_continues_from_its_state(tmp_path, tokenizer, model):
    path, data = jsonl(tmp_path, ROWS), DataConfig(shuffle=True)

    def make(seed=0):
        return prompts(path, tokenizer, model, seed, data)

    order = [p.content for p in make().take(21)]
    epochs = [order[i : i + 7] for i in (0, 7, 14)]
    # every row once per epoch
    assert all(sorted(e) == [r["prompt"] for r in ROWS] for e in epochs)
    assert (
        len({tuple(e) for e in epochs}) == 3 and [p.content for p in make(1).take(7)] != epochs[0]
    )
    for cut in (0, 3, 7, 10, 14):
        first, second = make(), make()
        head = first.take(cut)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [p.content for p in head + second.take(21 - cut)] == order
    with pytest.raises(ConfigError, match=r"7 rows.*|3 rows"):
        prompts(path, tokenizer, model, limit=3).load_state_dict(make().state_dict())


def test_generated_prompts_continue_from_their_state(tokenizer, model):
    def make():
        return prompts("task:sort", tokenizer, model, options={"seed": 3})

    first, second = make(), make()
    first.take(5)
    second.load_state_dict(first.state_dict())
    assert (
        [p.id for p in second.take(4)]
        == [p.id for p in first.take(4)]
        == [f"task:sort/train/seed3:{i}" for i in (5, 6, 7, 8)]
    )


@pytest.mark.parametrize("kind", ["parquet", "saved", "folder"])
def test_other_formats_give_the_same_tokens(kind, tmp_path, tokenizer, model, monkeypatch):
    import datasets
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = str(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CHAT), path)
    if kind == "saved":
        path = str(tmp_path / "saved")
        datasets.DatasetDict({"train": datasets.Dataset.from_list(CHAT)}).save_to_disk(path)
    elif kind == "folder":
        path = str(tmp_path / "folder")
        Path(path).mkdir()
        jsonl(Path(path), CHAT, "train.jsonl")
    expected = [t.tokens.tolist() for t in experts(jsonl(tmp_path, CHAT), tokenizer, model).take(3)]
    source = experts(path, tokenizer, model)
    assert len(source) == 3 and [t.tokens.tolist() for t in source.take(3)] == expected
    last = prompts(path, tokenizer, model).take(3)[2]
    assert last.columns == CHAT[2] and last.id == {"parquet": f"{path}:3"}.get(
        kind, f"{path}/train:2"
    )
    if kind != "parquet":
        with pytest.raises(ConfigError, match=r"no split 'test'.*train"):
            prompts(path, tokenizer, model, split="test")


@pytest.mark.parametrize(
    "rows, words",
    [
        ([], ["is empty"]),
        (["", "  "], ["is empty"]),
        ([ROWS[0], "{broken"], [":2", "not valid JSON"]),
        ([ROWS[0], "", "[1]"], [":3", "list"]),
        ([ROWS[0], {"promt": "x", "response": "y"}], [":2", "'prompt'", "did you mean 'promt'"]),
        ([{"prompt": "x", "answer": "y"}], [":1", "'response'", "answer"]),
        ([ROWS[0], {"prompt": " ", "response": "y"}], [":2", "prompt", "empty"]),
        ([{"prompt": "x", "response": "\n"}], [":1", "response", "empty"]),
        ([{"prompt": "x", "response": None}], [":1", "response", "null"]),
        ([{"prompt": 3, "response": "y"}], [":1", "prompt", "found 3"]),
        ([{"prompt": [], "response": "y"}], [":1", "prompt", "messages"]),
        ([{"prompt": [{"role": "user"}], "response": "y"}], [":1", "role and content"]),
        (
            [{"prompt": [{"role": "assistant", "content": "x"}], "response": "y"}],
            [":1", "assistant's"],
        ),
        (
            [{"prompt": "x", "response": [{"role": "user", "content": "y"}]}],
            [":1", "one assistant message"],
        ),
        ([{"prompt": "x", "response": "y<eos>z"}], [":1", "<eos>", "goes on"]),
        (
            [ROWS[0], {"prompt": "1" * 40, "response": "y"}],
            [":2", "41 tokens", "max_prompt_tokens=32"],
        ),
        (
            [ROWS[0], {"prompt": "1", "response": "y" * 16}],
            [":2", "17 tokens", "max_expert_tokens=16"],
        ),
    ],
)
def test_bad_rows_are_found_before_the_run_and_named(rows, words, tmp_path, tokenizer, model):
    with pytest.raises(ConfigError) as error:
        experts(
            jsonl(tmp_path, rows),
            tokenizer,
            model,
            data=DataConfig(max_prompt_tokens=32, max_expert_tokens=16),
        )
    assert all(word in str(error.value) for word in words), str(error.value)


def test_rows_far_behind_are_checked_before_the_run(tmp_path, tokenizer, model, monkeypatch):
    monkeypatch.setattr("tandem.engine.data.sources.TOKENISED_ROWS", 2)
    data = DataConfig(max_prompt_tokens=8, shuffle=False)
    with pytest.raises(ConfigError, match=r":4: .*response.* is empty"):
        experts(
            jsonl(tmp_path, [*ROWS[:3], {"prompt": "x", "response": ""}]),
            tokenizer,
            model,
            data=data,
        )
    with pytest.raises(ConfigError, match=":4: the prompt has 9 tokens"):
        experts(
            jsonl(tmp_path, [*ROWS[:3], {"prompt": "1" * 8, "response": "y"}]),
            tokenizer,
            model,
            data=data,
        )


@pytest.mark.parametrize(
    "rows, data, system, template, words",
    [
        (CHAT, DataConfig(chat=False), None, "", ["data.chat is false"]),
        (ROWS, DataConfig(), "Hi", "", ["system_prompt", "plain text"]),
        (
            [
                {
                    "prompt": [
                        {"role": "system", "content": "a"},
                        {"role": "user", "content": "b"},
                    ],
                    "response": "c",
                }
            ],
            DataConfig(),
            "Hi",
            "",
            ["system message of its own"],
        ),
        (CHAT, DataConfig(), None, None, ["no chat template"]),
        (
            CHAT,
            DataConfig(),
            None,
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            ["differently once the response is there"],
        ),
        (CHAT, DataConfig(), None, "{{ raise_exception('no thanks') }}", ["refuses", "no thanks"]),
    ],
)
def test_contradictions_of_chat_and_data_are_errors(
    rows, data, system, template, words, tmp_path, tokenizer, model
):
    if template != "":
        tokenizer.chat_template = template
    with pytest.raises(ConfigError) as error:
        experts(jsonl(tmp_path, rows), tokenizer, replace(model, system_prompt=system), data=data)
    assert all(word in str(error.value) for word in [":1", *words]), str(error.value)


@pytest.mark.parametrize(
    "path, words",
    [
        ("rowz.jsonl", ["rowz.jsonl", "did you mean 'rows.jsonl'"]),
        ("rows.txt", ["rows.txt", ".jsonl"]),
        ("broken.parquet", ["broken.parquet", "Parquet"]),
    ],
)
def test_bad_paths(path, words, tmp_path, tokenizer, model):
    jsonl(tmp_path, ROWS)
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "broken.parquet").write_text("x")
    with pytest.raises(ConfigError) as error:
        prompts(str(tmp_path / path), tokenizer, model)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_generated_data_keeps_training_and_evaluation_apart(tokenizer, model):
    fixed = DatasetConfig("task:sort", options={"size": 5})
    test = replace(fixed, split="test")
    PromptSource(test, DataConfig(evaluation=test), tokenizer, model, 0, evaluation=True)
    with pytest.raises(ConfigError, match=r"split: test in data.evaluation"):
        PromptSource(fixed, DataConfig(evaluation=fixed), tokenizer, model, 0, evaluation=True)
    with pytest.raises(ConfigError, match="for training"):
        ExpertSource(test, DataConfig(experts=test), tokenizer, model, 0)
    with pytest.raises(ConfigError, match=r"options.size is not set"):
        ExpertSource(DatasetConfig("task:sort"), DataConfig(), tokenizer, model, 0)


@pytest.mark.whole_run
@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("[!_]*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS))
)
def test_every_config_loads_and_its_data_fits_its_limits(path, tokenizer, model):
    config = load(path)
    if config.model.path == "tandem:tiny":
        for dataset in config.data.demonstrations.values():
            demonstration_source(dataset)(dataset, config.data, tokenizer, model, 0).take(500)
        sources = {
            name: PromptSource(dataset, config.data, tokenizer, model, 0, name == "evaluation")
            for name in ("prompts", "evaluation")
            if (dataset := getattr(config.data, name))
        }
        trained = {
            str(p.content) for name in sources for p in sources[name].take(500) if name == "prompts"
        }
        assert not trained & {
            str(p.content) for p in sources["evaluation"].take(len(sources["evaluation"]))
        }
        assert all(
            len(p.columns["answer"]) < config.rollout.max_tokens
            for p in sources["evaluation"].take(5)
        )
