"""Chats of several turns: exactly what the model would have sampled is trained. Masks by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
from source_cases import chat, demonstrations, rows_file, tool_call

from tandem.engine.core.errors import ConfigError
from tandem.engine.core.types import Source

TURN = "{{ '<' + m['role'] + '>' + m['content'] + '<eos>' }}"
HEADER = "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + HEADER
# earlier answers lose what stands before a mark, as reasoning is stripped
STRIPS = (
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last %}{% set c = c.split('#')[-1] %}{% endif %}"
    "{{ '<' + m['role'] + '>' + c + '<eos>' }}{% endfor %}" + HEADER
)
# the end of a turn is written by the next one
LATE_END = (
    "{% for m in messages %}{% if not loop.first %}{{ '<eos>' }}{% endif %}"
    "{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<eos><assistant>' }}{% endif %}"
)
WITH_CALLS = PLAIN.replace(
    "m['content']", "m['content'] + (m['tool_calls'] | tojson if 'tool_calls' in m else '')"
)
FOUR = chat("system: S", "user: 1+1", "assistant: 2", "user: 3+3", "assistant: 66")
CALL = [
    *chat("user: go"),
    tool_call("add"),
    *chat("tool: 8", "assistant: it is 8", "user: ok", "assistant: 9"),
]


@pytest.fixture
def shown(tmp_path, tokenizer, model):
    """The trajectory of a chat as text: trained tokens, each run of them in brackets."""

    def show(messages, template=PLAIN, model=model, data=None, **dataset):
        tokenizer.chat_template = template
        path = rows_file(tmp_path, [{"messages": messages}])
        dataset = {"prompt": "messages", "response": "messages", "train_on": "all", **dataset}
        source = demonstrations(path, tokenizer, model, **(data or {}), **dataset)
        (trajectory,) = source.take(1)
        trained = trajectory.source == Source.EXPERT
        text = ""
        for place, token in enumerate(trajectory.tokens):
            if trained[place] and not trained[place - 1]:
                text += "["
            text += tokenizer.decode([token])
            if trained[place] and not trained[place + 1 : place + 2].any():
                text += "]"
        return text.replace("<assistant>", "<a>").replace("<user>", "<u>").replace("<eos>", "|")

    return show


def test_every_turn_of_the_assistant_with_its_end_and_nothing_else(shown):
    assert shown(FOUR) == "<system>S|<u>1+1|<a>[2|]<u>3+3|<a>[66|]"
    assert shown(FOUR, train_on="last") == "<system>S|<u>1+1|<a>2|<u>3+3|<a>[66|]"
    assert shown(FOUR[:3]) == shown(FOUR[:3], train_on="last") == "<system>S|<u>1+1|<a>[2|]"
    # several in a row, as the speakers of a dialogue
    said = chat("system: S", "assistant: a", "assistant: b")
    assert shown(said) == "<system>S|<a>[a|]<a>[b|]"


def test_tool_calls_are_untrained_unless_asked_for(shown):
    text = shown(CALL, WITH_CALLS, control_tokens="allow")
    call = text[text.index("<a>") + 3 : text.index("|<tool>")]
    assert '"add"' in call
    assert text == f"<u>go|<a>{call}|<tool>8|<a>[it is 8|]<u>ok|<a>[9|]"
    text = shown(CALL, WITH_CALLS, train_on="all_and_calls")
    assert text == f"<u>go|<a>[{call}|]<tool>8|<a>[it is 8|]<u>ok|<a>[9|]"
    # a call at the end is cut off with what led to it; alone there is nothing to train
    end = [*chat("user: a", "assistant: b", "user: c"), tool_call("add")]
    assert shown(end, WITH_CALLS) == "<u>a|<a>[b|]"
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: every turn .* is a tool call"):
        shown([*chat("user: c"), tool_call("add")], WITH_CALLS)


def test_a_template_that_rewrites_earlier_turns_is_refused_by_row_and_turn(shown):
    reasons = chat("user: a", "assistant: why#b", "user: c", "assistant: so#d")
    allowed = {"template_changes": "allow"}
    with pytest.raises(ConfigError) as error:
        shown(reasons, STRIPS, data=allowed)
    for words in ("rows.jsonl:1: message 2 (assistant)", "'why#b", "became 'b<eos>", "train_on"):
        assert words in str(error.value)
    # the same chat is fine where nothing is stripped, and its last turn always
    kept = chat("user: a", "assistant: b", "user: c", "assistant: so#d")
    assert shown(kept, STRIPS) == "<u>a|<a>[b|]<u>c|<a>[so#d|]"
    assert shown(reasons, STRIPS, data=allowed, train_on="last") == "<u>a|<a>b|<u>c|<a>[so#d|]"


def test_the_system_prompt_of_the_config_is_no_message_of_the_row(shown, model):
    reasons = chat("user: a", "assistant: why#b", "user: c", "assistant: d")
    with pytest.raises(ConfigError, match=r":1: message 2 \(assistant\)"):
        shown(
            reasons,
            STRIPS,
            replace(model, system_prompt="S"),
            {"template_changes": "allow"},
        )


def test_a_turn_without_an_end_is_refused(shown):
    with pytest.raises(ConfigError, match=r"message 3 \(assistant\).* ends it without a token"):
        shown(FOUR, LATE_END)
    assert shown(FOUR[:3], LATE_END) == "<system>S|<u>1+1|<a>[2|]"


@pytest.mark.parametrize(
    "messages, words",
    [
        (FOUR[:4], "its last message must be the assistant's"),
        (chat("assistant: a", "user: b", "assistant: c"), "no message comes before"),
        (chat("user: a", "assistant:  ", "user: b", "assistant: c"), "is empty"),
        (chat("user: a", "assistant: b<eos>c", "user: b", "assistant: c"), "goes on after"),
    ],
)
def test_bad_chats(messages, words, shown):
    with pytest.raises(ConfigError, match=f"rows.jsonl:1: .*{words}"):
        shown(messages, data={"control_tokens": "allow"})


def test_lengths_count_from_the_first_trained_turn(shown):
    """Prompt: <user> a <eos> <assistant>; behind it b, its end, 5 tokens of the user's turn and
    header, cc and its end.
    """
    messages = chat("user: a", "assistant: b", "user: zz", "assistant: cc")
    text = "<u>a|<a>[b|]<u>zz|<a>[cc|]"
    assert shown(messages, data={"max_prompt_tokens": 4, "max_expert_tokens": 10}) == text
    with pytest.raises(ConfigError, match=r"10 tokens, more than data.max_expert_tokens=9"):
        shown(messages, data={"max_expert_tokens": 9})
    with pytest.raises(ConfigError, match=r"4 tokens, more than data.max_prompt_tokens=3"):
        shown(messages, data={"max_prompt_tokens": 3})


def test_the_run_is_told_of_turns_that_are_not_trained(tmp_path, tokenizer, model):
    tokenizer.chat_template = PLAIN
    path = rows_file(tmp_path, [{"messages": FOUR}, {"messages": FOUR[:3]}])
    columns = {"prompt": "messages", "response": "messages"}
    (line,) = demonstrations(path, tokenizer, model, **columns).describe()
    assert "of 1 rows only the last turn" in line and "train_on: all" in line
    assert not list(demonstrations(path, tokenizer, model, **columns, train_on="all").describe())


def test_rows_behind_the_tokenised_ones_are_checked(tmp_path, tokenizer, model, monkeypatch):
    """Those of a known shape by the characters that it adds to the words."""
    monkeypatch.setattr("tandem.engine.data.sources.TOKENISED_ROWS", 1)
    tokenizer.chat_template = PLAIN
    long = json.loads(json.dumps(FOUR).replace("66", "6" * 40))
    path = rows_file(tmp_path, [{"messages": FOUR}, {"messages": FOUR}, {"messages": long}])
    columns = {"prompt": "messages", "response": "messages", "train_on": "all"}
    with pytest.raises(ConfigError, match=r":3: .*max_expert_tokens=48"):
        demonstrations(path, tokenizer, model, max_expert_tokens=48, **columns)
    source = demonstrations(path, tokenizer, model, max_expert_tokens=60, **columns)
    lengths = [np.count_nonzero(t.source == Source.EXPERT) for t in source.take(3)]
    assert lengths == [5, 5, 43]
