"""Generated data: deterministic, disjoint splits, right answers, and the model that learns it."""

import re

import pytest

from tandem.engine.config.schema import DatasetConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.data.tasks import UNLIMITED, GeneratedRows
from tandem.engine.model.tiny import complete_folder, make_tiny

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def rows(path, split="train", **options):
    return GeneratedRows(DatasetConfig(path=path, split=split, options=options))


def test_answers_and_steps_are_right():
    for row in (rows("task:sort", digits=6)[i] for i in range(50)):
        digits = re.fullmatch(r"sort (\d{6})=", row["prompt"])[1]
        assert row["answer"] == "".join(sorted(digits))
        assert row["steps"].split(",") == ["".join(sorted(digits[:n])) for n in range(1, 7)]
    for row in (rows("task:chain", numbers=4)[i] for i in range(50)):
        numbers = [int(n) for n in row["prompt"].rstrip("=").split("+")]
        assert int(row["answer"]) == sum(numbers) and row["steps"].split(",") == [
            str(sum(numbers[:n])) for n in (2, 3, 4)
        ]


def test_a_dialogue_has_a_speaker_for_every_turn():
    for row in (rows("task:talk", digits=3)[i] for i in range(20)):
        assert row["messages"][0] == {"role": "user", "content": row["prompt"]}
        ann, bob = (message["content"] for message in row["messages"][1:])
        assert ann == f"Ann: {row['answer']}" and bob == f"Bob: {row['answer'][::-1]}"
        assert row["speakers"] == ["Ann", "Bob"]


@pytest.mark.whole_run
def test_reasoning_gym_rows_are_scored_right_by_its_own_verifier():
    import reasoning_gym

    for task, options in (("chain_sum", SUMS), ("gcd", {}), ("number_sorting", {})):
        row = rows(f"reasoning_gym:{task}", **options)[3]
        assert row["source_dataset"] == task
        score = reasoning_gym.get_score_answer_fn(task)
        assert score(row["answer"], row) == 1.0 and score("no answer", row) < 0.1


@pytest.mark.parametrize(
    "path, options",
    [
        ("task:sort", {"digits": 3}),
        ("task:chain", {"numbers": 3}),
        ("reasoning_gym:chain_sum", SUMS),
    ],
)
def test_no_test_problem_is_ever_trained_on(path, options):
    """Small problem spaces, so that hundreds of draws with different seeds would meet if anything
    let them.
    """
    held_out = {row["prompt"] for row in rows(path, "test", size=35, **options).fixed}
    trained = {
        rows(path, seed=seed, **options)[i]["prompt"] for seed in range(3) for i in range(200)
    }
    demonstrated = {row["prompt"] for row in rows(path, seed=1, size=100, **options).fixed}
    assert len(held_out) == 35 and len(demonstrated) == 100
    assert len(trained) > 100
    assert not held_out & (trained | demonstrated)


def test_rows_depend_on_seed_and_number_alone():
    one, two, other = (
        rows("task:sort", seed=5),
        rows("task:sort", seed=5),
        rows("task:sort", seed=6),
    )
    assert len(one) == UNLIMITED
    assert one[10**9] == two[10**9]  # without making the rows before
    two[3], two[1]
    assert [one[i] for i in range(20)] == [two[i] for i in range(20)]
    shifted = {one[i]["prompt"] for i in range(200)} & {other[i]["prompt"] for i in range(200)}
    # reasoning-gym's own seeding would give the same problems, shifted by one
    assert len(shifted) < 5
    # it also draws from the global generator
    assert (
        rows("reasoning_gym:list_functions", seed=5)[7]
        == rows("reasoning_gym:list_functions", seed=5)[7]
    )
    gym = {
        seed: {
            rows("reasoning_gym:chain_sum", seed=seed, min_digits=5, max_digits=5)[i]["prompt"]
            for i in range(50)
        }
        for seed in (5, 6)
    }
    assert not gym[5] & gym[6]


def test_response_template():
    row = rows("task:chain", numbers=3, response=r"{steps} so \boxed{{answer}} {unknown}")[0]
    assert row["response"] == f"{row['steps']} so \\boxed{{{row['answer']}}} {{unknown}}"
    assert rows("task:chain")[0]["response"] == rows("task:chain")[0]["answer"]
    # the task names no answer: never a demonstration that says "None"
    assert rows("reasoning_gym:rush_hour")[0]["response"] is None


@pytest.mark.parametrize(
    "path, split, options, words",
    [
        ("task:sotr", "train", {}, ["sotr", "did you mean 'sort'"]),
        ("task:sort", "validation", {}, ["validation", "train or test"]),
        ("task:sort", "train", {"digit": 3}, ["digit", "did you mean 'digits'"]),
        ("task:sort", "train", {"digits": "many"}, ["digits", "many", "integer"]),
        ("task:sort", "train", {"size": 0}, ["size", "0"]),
        (
            "task:chain",
            "test",
            {"size": 1000, "numbers": 2},
            ["1000", "different problems", "lower the size"],
        ),
        ("reasoning_gym:chainsum", "train", {}, ["chainsum", "did you mean 'chain_sum'"]),
        ("reasoning_gym:chain_sum", "train", {"terms": 3, "size": 3}, ["chain_sum", "terms"]),
        (
            "reasoning_gym:chain_sum",
            "train",
            {"min_terms": 9, "max_terms": 2, "size": 3},
            ["chain_sum", "min_terms"],
        ),
    ],
)
def test_bad_options_say_what_and_where(path, split, options, words):
    with pytest.raises(ConfigError) as error:
        rows(path, split, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_tiny_model_is_reproducible_and_ties_its_embeddings(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    state = torch.get_rng_state()
    folders = [
        make_tiny(tmp_path / name, hidden=64, layers=2, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert torch.equal(state, torch.get_rng_state())
    files = sorted(f.name for f in folders[0].iterdir())
    assert all((folders[0] / f).read_bytes() == (folders[1] / f).read_bytes() for f in files)
    assert (folders[0] / "model.safetensors").read_bytes() != (
        folders[2] / "model.safetensors"
    ).read_bytes()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folders[0]),
        AutoTokenizer.from_pretrained(folders[0]),
    )
    assert (
        model.lm_head.weight is model.model.embed_tokens.weight
        and len(tokenizer) == model.config.vocab_size
    )
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    text = "sort 12=\nA~ b"
    ids = tokenizer(text).input_ids
    assert (
        ids[0] == tokenizer.bos_token_id
        and len(ids) == 1 + len(text)
        and tokenizer.decode(ids, skip_special_tokens=True) == text
    )


def test_complete_folder_is_complete_or_absent(tmp_path):
    with pytest.raises(RuntimeError), complete_folder(tmp_path / "model") as temporary:
        (temporary / "config.json").write_text("{}")
        raise RuntimeError("torn")
    assert list(tmp_path.iterdir()) == []
    with complete_folder(tmp_path / "model") as temporary:
        (temporary / "config.json").write_text("{}")
    with pytest.raises(FileExistsError), complete_folder(tmp_path / "model"):
        pass
    assert [f.name for f in (tmp_path / "model").iterdir()] == ["config.json"] and len(
        list(tmp_path.iterdir())
    ) == 1
