"""Pairs: two trajectories of one group, from columns of answers or of whole chats."""

import pytest
from source_cases import chat, demonstrations, rows_file

from tandem.engine.core.errors import ConfigError
from tandem.engine.core.types import Source

COLUMNS = {"chosen": "chosen", "rejected": "rejected"}
WHOLE = {"prompt": "chosen", **COLUMNS}
ROWS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(3)]
CHATS = {
    "chosen": chat("user: 1+1", "assistant: 2", "user: sure?", "assistant: yes"),
    "rejected": chat("user: 1+1", "assistant: 2", "user: sure?", "assistant: no"),
}


@pytest.fixture
def pairs(tmp_path, tokenizer, model):
    def make(rows, **options):
        return demonstrations(rows_file(tmp_path, rows), tokenizer, model, **options)

    return make


def responses(trajectories, tokenizer) -> list[str]:
    found = [t.tokens[t.source == Source.EXPERT] for t in trajectories]
    return [tokenizer.decode(ids) for ids in found]


def test_a_row_is_two_neighbours_of_one_group(pairs, tokenizer):
    source = pairs(ROWS, **COLUMNS)
    found = source.take(2)
    assert len(source) == 3 and len(found) == 4
    assert [t.role for t in found] == ["chosen", "rejected"] * 2
    assert [t.group for t in found] == [0, 0, 1, 1]
    assert responses(found, tokenizer) == ["0<eos>", "1<eos>", "2<eos>", "3<eos>"]
    for a, b in (found[:2], found[2:]):
        assert a.prompt_id == b.prompt_id and a.columns == b.columns
        assert a.tokens[:4].tolist() == b.tokens[:4].tolist()
    # a pair of the next epoch is another group
    assert [t.group for t in source.take(3)] == [2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_resumed_source_goes_on_with_the_next_pair_and_number(pairs, shuffle):
    whole = pairs(ROWS, **COLUMNS, shuffle=shuffle)
    expected = [(t.group, t.role, t.tokens.tolist()) for t in whole.take(8)]
    for cut in (0, 2, 3, 5):
        first, second = pairs(ROWS, **COLUMNS, shuffle=shuffle), None
        first.take(cut)
        second = pairs(ROWS, **COLUMNS, shuffle=shuffle)
        second.load_state_dict(first.state_dict())
        found = [(t.group, t.role, t.tokens.tolist()) for t in second.take(8 - cut)]
        assert found == expected[2 * cut :]


def test_whole_chats_and_single_messages(pairs, tokenizer):
    expected = ["yes<eos>", "no<eos>"]
    assert responses(pairs([CHATS], **WHOLE).take(1), tokenizer) == expected
    prompt = CHATS["chosen"][:-1]
    apart = {"prompt": prompt, "chosen": CHATS["chosen"][-1:], "rejected": CHATS["rejected"][-1:]}
    ours = pairs([apart], **COLUMNS).take(1)
    assert responses(ours, tokenizer) == expected
    assert ours[0].tokens.tolist() == pairs([CHATS], **WHOLE).take(1)[0].tokens.tolist()


def different(place: int, text: str) -> dict:
    """CHATS with another message in the rejected chat."""
    rejected = list(CHATS["rejected"])
    rejected[place : place + 1] = chat(text)
    return {**CHATS, "rejected": rejected}


@pytest.mark.parametrize(
    "row, columns, words",
    [
        ({"prompt": "a", "chosen": "b"}, COLUMNS, ["no column 'rejected'", "`rejected:`"]),
        ({"prompt": "a", "rejected": "b"}, COLUMNS, ["no column 'chosen'", "`chosen:`"]),
        ({"prompt": "a", "chosen": "b", "rejected": None}, COLUMNS, ["'rejected' is null"]),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, COLUMNS, ["same answer, 'b'"]),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, COLUMNS, ["'rejected') is empty"]),
        ({"prompt": "a", **CHATS}, COLUMNS, ["'chosen' must hold", "`prompt: chosen`"]),
        ({**CHATS, "rejected": CHATS["chosen"]}, WHOLE, ["same answer, 'yes'"]),
        (different(2, "user: why?"), WHOLE, ["begin differently", "'sure?'", "'why?'"]),
        ({**CHATS, "rejected": CHATS["rejected"][-4:2]}, WHOLE, ["differently", "and None"]),
    ],
)
def test_rows_that_are_no_pairs(row, columns, words, pairs):
    good = CHATS if columns is WHOLE else ROWS[0]
    with pytest.raises(ConfigError) as error:
        pairs([good, row], **columns)
    assert all(word in str(error.value) for word in ["rows.jsonl:2", *words]), str(error.value)


def test_a_pair_with_one_answer_too_long_is_left_out_as_a_whole(pairs):
    rows = [*ROWS, {"prompt": "a", "chosen": "b", "rejected": "c" * 9}]
    source = pairs(rows, **COLUMNS, max_expert_tokens=8, overlong="drop")
    assert len(source) == 3 and source.dropped == 1
    with pytest.raises(ConfigError, match=r"rows.jsonl:4: .*10 tokens"):
        pairs(rows, **COLUMNS, max_expert_tokens=8)
