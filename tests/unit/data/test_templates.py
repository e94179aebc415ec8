"""What templates, tokenizers and datasets do to a row: nothing is dropped, changed or added
silently.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tandem.engine.config.schema import DataConfig, DatasetConfig, ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.data.sources import ExpertSource, PromptSource
from tandem.engine.data.templates import WORKER
from tandem.engine.model.tiny import make_tiny

TURN = "{{ '<' + m['role'] + '>' + %s + '<eos>' }}"
LOOP = (
    "{%% for m in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}{{ '<assistant>' "
    "}}{%% endif %%}"
)
PLAIN = LOOP % (TURN % "m['content']")
ROW = {
    "prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2+2?"}],
    "response": "it is 4",
}


@pytest.fixture(scope="module", autouse=True)
def no_worker_left():
    yield
    WORKER.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ModelConfig(
        path=str(make_tiny(tmp_path_factory.mktemp("model") / "tiny", hidden=32, layers=1))
    )


@pytest.fixture
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.path)


def write(folder: Path, *rows, name="rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def expert(path, tokenizer, model, dataset=None, **data):
    if dataset is None:
        dataset = {}
    settings = DatasetConfig(**{"path": path, "response": "response", **dataset})
    return ExpertSource(settings, DataConfig(shuffle=False, **data), tokenizer, model, 0)


def texts(source, tokenizer) -> tuple[str, str]:
    trajectory = source.take(1)[0]
    split = len(trajectory.tokens) - len(trajectory.response)
    return tokenizer.decode(trajectory.tokens[:split]), tokenizer.decode(trajectory.response)


def prompt_source(path, tokenizer, model, dataset=None, **data):
    if dataset is None:
        dataset = {}
    return PromptSource(
        DatasetConfig(**{"path": path, **dataset}),
        DataConfig(shuffle=False, **data),
        tokenizer,
        model,
        0,
    )


CHANGES = {
    "drops the system turn": LOOP
    % ("{%% if m['role'] != 'system' %%}%s{%% endif %%}" % (TURN % "m['content']")).replace(
        "%%", "%"
    ),
    "cuts contents": LOOP % (TURN % "m['content'][:3]"),
    "changes case": LOOP % (TURN % "m['content'] | upper"),
    "forgets the answer": LOOP
    % ("{%% if m['role'] != 'assistant' %%}%s{%% endif %%}" % (TURN % "m['content']")).replace(
        "%%", "%"
    ),
    "reverses the turns": PLAIN.replace("in messages", "in messages[::-1]"),
}


@pytest.mark.parametrize("template", CHANGES.values(), ids=CHANGES)
def test_a_template_that_drops_or_changes_a_message_is_refused(
    template, tmp_path, tokenizer, model
):
    path = write(tmp_path, ROW)
    tokenizer.chat_template = PLAIN
    prompt, response = texts(expert(path, tokenizer, model), tokenizer)
    assert "Be short." in prompt and "2+2?" in prompt and response == "it is 4<eos>"
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: "):
        expert(path, tokenizer, model)


def test_reasoning_that_a_template_strips_and_the_key_that_allows_it(tmp_path, tokenizer, model):
    tokenizer.chat_template = LOOP % (TURN % "m['content'].split('</think>')[-1]")
    path = write(tmp_path, {**ROW, "response": "<think>two and two</think>4"})
    with pytest.raises(ConfigError, match=r"(?s)rows.jsonl:1: .*two and two.*template_changes"):
        expert(path, tokenizer, model)
    assert texts(expert(path, tokenizer, model, template_changes="allow"), tokenizer)[1] == "4<eos>"


@pytest.mark.parametrize("role", ["human", "critic", "User", ""])
def test_a_role_that_the_template_does_not_know_is_named(role, tmp_path, tokenizer, model):
    known = (
        "{% if m['role'] in ('system', 'user', 'assistant') %}"
        + TURN % "m['content']"
        + "{% endif %}"
    )
    tokenizer.chat_template = LOOP % known
    path = write(tmp_path, {"prompt": [{"role": role, "content": "2+2?"}], "response": "4"})
    if role == "human":
        assert "<user>2+2?" in texts(expert(path, tokenizer, model), tokenizer)[0]
        return
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: "):
        expert(path, tokenizer, model)


def test_sharegpt_nulls_parts_and_one_column_of_messages_give_the_same_tokens(
    tmp_path, tokenizer, model
):
    tokenizer.chat_template = PLAIN
    system, user = ROW["prompt"]
    answer = {"role": "assistant", "content": ROW["response"]}
    wanted = texts(expert(write(tmp_path, ROW), tokenizer, model), tokenizer)
    nulls = [{**message, "tool_calls": None, "name": None} for message in (system, user)]
    parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in (system, user)
    ]
    for prompt in (nulls, parts):
        assert (
            texts(expert(write(tmp_path, {**ROW, "prompt": prompt}), tokenizer, model), tokenizer)
            == wanted
        )
    chat = {"messages": [system, user, answer]}
    same = {"prompt": "messages", "response": "messages"}
    assert texts(expert(write(tmp_path, chat), tokenizer, model, same), tokenizer) == wanted
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    share = {
        "conversations": [
            {"from": names[m["role"]], "value": m["content"]} for m in chat["messages"]
        ]
    }
    column = {"prompt": "conversations", "response": "conversations"}
    assert texts(expert(write(tmp_path, share), tokenizer, model, column), tokenizer) == wanted


FAILURES = {
    "type": "{{ messages[0]['content'] + 1 }}",
    "division": "{{ 1/0 }}",
    "undefined": "{{ messages[5].content.x.y }}",
    "syntax": "{% for m in messages %}",
    "raise": "{{ raise_exception('no such role') }}",
    "range": "{% for a in range(10**9) %}{% endfor %}x",
    "security": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "memory": "{{ 'a'*(10**11) }}",
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x",
}


@pytest.mark.whole_run
@pytest.mark.parametrize("template", FAILURES.values(), ids=FAILURES)
def test_a_template_that_fails_or_does_not_end_names_the_row(template, tmp_path, tokenizer, model):
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: "):
        prompt_source(write(tmp_path, ROW), tokenizer, model)
    tokenizer.chat_template = PLAIN
    assert prompt_source(write(tmp_path, ROW), tokenizer, model).take(1)


def test_the_clock_of_a_template_stands_and_is_recorded(tmp_path, tokenizer, model):
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d %H:%M') }}" + PLAIN
    path = write(tmp_path, ROW)
    source = prompt_source(path, tokenizer, model, template_date="2020-02-29")
    assert tokenizer.decode(source.take(1)[0].tokens).startswith("2020-02-29 00:00")
    later = prompt_source(path, tokenizer, model)
    later.load_state_dict(source.state_dict())
    assert tokenizer.decode(later[0].tokens).startswith("2020-02-29")


def test_variables_and_tools_reach_prompts_and_demonstrations_alike(tmp_path, tokenizer, model):
    tokenizer.chat_template = (
        "{{ 'thinking' if enable_thinking else 'brief' }}{% for t in tools or [] %}{{ "
        "t['name'] }}{% endfor %}"
    ) + PLAIN
    row = {**ROW, "functions": [{"name": "add", "unit": None}]}
    for kwargs, word in (
        ({"enable_thinking": True}, "thinking"),
        ({"enable_thinking": False}, "brief"),
        ({}, "brief"),
    ):
        options = {"chat_template_kwargs": kwargs}
        prompt, _ = texts(
            expert(write(tmp_path, row), tokenizer, model, {"tools": "functions"}, **options),
            tokenizer,
        )
        assert prompt.startswith(f"{word}add<system>")
        rolled = prompt_source(
            write(tmp_path, row), tokenizer, model, {"tools": "functions"}, **options
        ).take(1)[0]
        assert tokenizer.decode(rolled.tokens) == prompt


@pytest.mark.parametrize("where", ["system", "user", "response"])
@pytest.mark.parametrize("token", ["<eos>", "<assistant>", "<bos>"])
def test_text_that_spells_a_control_token(where, token, tmp_path, tokenizer, model):
    tokenizer.chat_template = PLAIN
    system, user = ROW["prompt"]
    text = f"a{token}b"
    row = {
        "prompt": [
            {**system, "content": text if where == "system" else "s"},
            {**user, "content": text if where == "user" else "u"},
        ],
        "response": text if where == "response" else "r",
    }
    path = write(tmp_path, row)
    with pytest.raises(ConfigError, match=r"(?s)rows.jsonl:1: .*control_tokens"):
        expert(path, tokenizer, model)
    special = tokenizer.convert_tokens_to_ids(token)
    plain = {
        **row,
        "prompt": [{**system, "content": "s"}, {**user, "content": "u"}],
        "response": "r",
    }
    usual = expert(write(tmp_path, plain, name="plain.jsonl"), tokenizer, model).take(1)[0].tokens
    escaped = expert(path, tokenizer, model, control_tokens="escape").take(1)[0].tokens
    assert (escaped == special).sum() == (usual == special).sum()


def test_what_tokenizers_and_templates_add_at_the_end(tmp_path, tokenizer, model):
    from tokenizers import processors

    path = write(tmp_path, {"prompt": "2+2=", "response": "4"})
    wanted = expert(path, tokenizer, model).take(1)[0].tokens.tolist()
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=ids
    )
    assert tokenizer("x").input_ids[-1] == ids[1][1]
    assert expert(path, tokenizer, model).take(1)[0].tokens.tolist() == wanted
    assert prompt_source(path, tokenizer, model).take(1)[0].tokens.tolist() == wanted[:-2]
    # an end-of-turn token of the model's, and EOS behind the whole conversation
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((Path(model.path) / "config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [tokenizer.eos_token_id, tokenizer.unk_token_id]})
    )
    turn = "{{ '<' + m['role'] + '>' + m['content'] + '<unk>\n' }}"
    tokenizer.chat_template = (LOOP % turn).replace(
        "{% endif %}", "{% else %}{{ '<eos>' }}{% endif %}"
    )
    chat = write(tmp_path, ROW, name="chat.jsonl")
    assert (
        texts(expert(chat, tokenizer, replace(model, path=str(folder))), tokenizer)[1]
        == "it is 4<unk>"
    )


LONG = [
    {"prompt": "1" * n, "response": "2" * m} for n, m in ((3, 3), (40, 3), (3, 3), (3, 60), (5, 3))
]


def test_overlong_rows_are_refused_left_out_or_cut_and_counted(
    tmp_path, tokenizer, model, monkeypatch
):
    monkeypatch.setattr("tandem.engine.data.sources.TOKENISED_ROWS", 1)
    limits = {"max_prompt_tokens": 16, "max_expert_tokens": 32}
    path = write(tmp_path, *LONG)
    with pytest.raises(ConfigError, match=r"rows.jsonl:2: .*max_prompt_tokens"):
        expert(path, tokenizer, model, **limits)
    source = expert(path, tokenizer, model, overlong="drop", **limits)
    assert len(source) == 3 and source.dropped == 2 and "2 left out" in next(source.describe())
    assert [len(t.tokens) for t in source.take(4)] == [8, 8, 10, 8]
    other = expert(path, tokenizer, model, overlong="drop", **limits)
    other.load_state_dict(source.state_dict())
    assert other.take(1)[0].prompt_id == source.take(1)[0].prompt_id
    cut = prompt_source(path, tokenizer, model, overlong="truncate_left", **limits)
    assert [len(p.tokens) for p in cut.take(5)] == [4, 16, 4, 4, 6] and cut.truncated == 1
    with pytest.raises(ConfigError, match=r"rows.jsonl:4: .*max_expert_tokens"):
        expert(path, tokenizer, model, overlong="truncate_left", **limits)


def test_a_demonstration_beyond_the_models_context(tmp_path, tokenizer, model):
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((Path(model.path) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    path = write(tmp_path, {"prompt": "1", "response": "2" * 70})
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: .*64"):
        expert(path, tokenizer, replace(model, path=str(folder)))
    assert expert(path, tokenizer, model).take(1)


@pytest.mark.parametrize(
    "extra", [{"images": ["a.png"]}, {"image": {"bytes": "x"}}, {"video": "v.mp4"}]
)
def test_media_are_refused_unless_ignored(extra, tmp_path, tokenizer, model):
    path = write(tmp_path, {"prompt": "how many?", "response": "4", **extra})
    with pytest.raises(ConfigError, match=f"(?s)rows.jsonl:1: .*{next(iter(extra))}.*data.media"):
        expert(path, tokenizer, model)
    assert expert(path, tokenizer, model, media="ignore").take(1)
    assert expert(
        write(tmp_path, {"prompt": "x", "response": "y", **dict.fromkeys(extra)}), tokenizer, model
    ).take(1)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 \ud83d", "response": "4"},
        {"prompt": "2", "response": "4\udfff"},
        {"prompt": [{"role": "user", "content": "\ud83d"}], "response": "4"},
    ],
)
def test_lone_surrogates_name_the_row(row, tmp_path, tokenizer, model):
    tokenizer.chat_template = PLAIN
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: "):
        expert(write(tmp_path, row), tokenizer, model)
