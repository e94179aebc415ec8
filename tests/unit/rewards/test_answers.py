"""Expected answers: a missing or mistyped one is an error of its row, words are not multiplied, and
the last box counts.
"""

import datetime
import json
from decimal import Decimal

import numpy as np
import pytest

from tandem.engine.core.errors import ConfigError
from tandem.engine.core.types import RewardError
from tandem.launch.check_config import load
from tandem.rollout.rewards.answers import check_answers
from tandem.rollout.rewards.api import Call
from tandem.rollout.rewards.builtin import exact
from tandem.rollout.rewards.functions import load_function
from tandem.rollout.rewards.mathematics import equal
from tandem.rollout.rewards.words import last_box, literal

NO_ANSWERS = [
    None,
    float("nan"),
    float("inf"),
    np.float32("nan"),
    Decimal("NaN"),
    "",
    "  \n",
    ["4"],
    [],
    {"a": 4},
    b"4",
    np.array(["4", "5"]),
]


@pytest.mark.parametrize("answer", NO_ANSWERS, ids=repr)
@pytest.mark.parametrize("name", ["exact", "math"])
def test_what_is_no_answer_is_an_error_and_no_score(name, answer):
    function = load_function(name, {}, 0)
    for text in ("None", "nan", "4", "['4']", ""):
        reply = function(Call("p", "1+1=", {"answer": answer}, (text,), (np.array([1], np.int32),)))
        (value,) = reply.values
        assert (
            isinstance(value, RewardError)
            and value.kind == "exception"
            and "the expected answer is" in value.message
        )


@pytest.mark.parametrize(
    "answer, right, wrong",
    [
        ("72", ["72", " 72\n"], ["72.0", "7"]),
        ("72.0", ["72.0"], ["72"]),  # a text is what it is
        (72, ["72"], ["72.0"]),
        (72.0, ["72", "72.0"], ["7", "72.", "720"]),  # an integer that its column made a float
        (np.int64(-3), ["-3"], ["3"]),
        (0.5, ["0.5"], [".5", "0"]),
        (True, ["True"], ["1"]),
        (Decimal("1.50"), ["1.50"], ["1.5"]),
        (datetime.date(2023, 5, 6), ["2023-05-06"], ["2012"]),
    ],
)
def test_exact_takes_numbers_for_what_they_were(answer, right, wrong):
    assert [exact(text, answer) for text in right] == [1.0] * len(right)
    assert [exact(text, answer) for text in wrong] == [0.0] * len(wrong)


@pytest.mark.parametrize(
    "completion, answer, value",
    [
        # words are not products of letters
        (r"\boxed{AB}", "BA", 0),
        (r"\boxed{BA}", "BA", 1),
        (r"\boxed{tea}", "eat", 0),
        (r"\boxed{\text{Tea}}", "tea", 1),
        ("$AB$", "BA", 0),
        ("AB", "BA", 0),
        (r"\boxed{\text{no solution}}", "No solution.", 1),
        (r"\boxed{solution no}", "no solution", 0),
        (r"\boxed{listen}", "silent", 0),
        (r"the answer is $\text{silent}$", "silent", 1),
        ("so it is $\\text{listen}$", "silent", 0),
        (r"\boxed{tea}", r"\boxed{eat}", 0),
        ("The answer is yes.", "yes", 1),
        ("The answer is no.", "yes", 0),
        (r"\boxed{True}", True, 1),
        (r"\boxed{True}", False, 0),
        (r"\boxed{été}", "été", 1),
        # dates are not differences
        (r"\boxed{2012}", "2023-05-06", 0),
        (r"\boxed{2023-05-06}", "2012", 0),
        (r"\boxed{2023-05-06}", "2023-05-06", 1),
        (r"\boxed{2012}", datetime.date(2023, 5, 6), 0),
        (r"\boxed{1/4046}", "1/2/2023", 0),
        (r"\boxed{2023-06-05}", "2023-05-06", 0),
        # a letter for a choice
        ("The answer is B.", "B", 1),
        ("The answer is (B) because", "B", 1),
        ("**Answer:** C", "C", 1),
        (r"\boxed{\textbf{(C)}}", "C", 1),
        (r"\boxed{(A)}", "B", 0),
        ("B", "B", 1),
        ("The answer is a cat", "A", 0),
        ("I would say A or B", "B", 0),
        # variables are still variables
        (r"\boxed{a \cdot b}", "ab", 1),
        (r"\boxed{2yx}", "2xy", 1),
        (r"\boxed{x}", "x", 1),
        (r"\boxed{y+x}", "x+y", 1),
        (r"\boxed{\pi r^2}", r"r^2\pi", 1),
        (r"\boxed{\infty}", r"$\infty$", 1),
        (r"\boxed{x=5}", "5", 1),
        # the last box is the answer
        (r"\boxed{1}, so the final answer is $7$. I hope it is correct", "1", 1),
        (r"\boxed{1}, so the final answer is $7$. I hope it is correct", "7", 0),
        (r"\boxed{1} then \boxed{2}", "2", 1),
        (r"\boxed{1} then \boxed{2}", "1", 0),
        (r"$\boxed{1}$ and $\boxed{2}$", "1", 0),
        (r"\boxed{1}, \boxed{2}", "2", 1),
        (r"\boxed{\frac{1}{2}} by $x = 9$ and 10", "0.5", 1),
        (r"\boxed{\boxed{3}}", "3", 1),
        (r"\boxed{4} and \boxed{", "4", 1),
        (r"\fbox{3} of 4", "3", 1),
        (r"so \boxed 7", "7", 1),
        ("Final answer is \\boxed{5}.\n\nCheck: $5 = 2 + 3$, answer: 6", "5", 1),
        (r"\boxed{}", "5", 0),
        # numbers of every type
        ("72", 72.0, 1),
        ("72.0", 72, 1),
        ("it is 72", np.int64(72), 1),
        ("1/2", 0.5, 1),
    ],
    ids=str,
)
def test_math_compares_what_was_meant(completion, answer, value):
    assert equal(completion, answer) == value


@pytest.mark.parametrize(
    "answer",
    [
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
        "She sold 24 clips in May and then sold 48 more clips",
    ],
)
def test_a_solution_is_no_answer(answer):
    with pytest.raises(ValueError, match=r"the expected answer is (a solution|prose)"):
        equal("72", answer)


@pytest.mark.parametrize(
    "text, box",
    [
        ("no box", None),
        (r"\boxed{a}", "a"),
        (r"\boxed {a}", "a"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{a} \boxed{b", "a"),
        (r"\boxed{x \boxed{y} z}", "y"),
        (r"\boxed{}", ""),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed", None),
    ],
)
def test_last_box(text, box):
    assert last_box(text) == box


def test_long_texts_are_read_in_a_moment():
    for text in (
        r"\boxed{" * 3_000,
        "{" * 200_000 + r"\boxed{1}",
        "answer is " * 50_000,
        "a " * 100_000,
        "\\text{" * 20_000,
    ):
        last_box(text)
        literal(text)
        assert equal(text, "no solution") == 0.0


class Rows(list):
    def label(self, number):
        return f"rows.jsonl:{number + 1}"


class Dataset:
    def __init__(self, rows):
        self.rows = Rows(rows)

    def __len__(self):
        return len(self.rows)


@pytest.mark.parametrize(
    "row",
    [
        {"answer": None},
        {"answer": ["4"]},
        {"ground_truth": float("nan")},
        {"reward_model": {"ground_truth": ""}},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["exact", "math"])
def test_every_row_is_looked_at_before_a_run(name, row):
    rows = [{"answer": "4"}] * 40 + [row] + [{"answer": 5}] * 10
    with pytest.raises(
        ConfigError,
        match=(
            f"(?s)rows.jsonl:41: reward '{name}': the expected answer.*1 of the 51 rows of "
            "data.prompts can never be scored.*reward.check_answers=false"
        ),
    ):
        check_answers(["format", name], Dataset(rows), "data.prompts")
    # a function of the user's may know what null means
    check_answers(["format", "mine.py:score"], Dataset(rows), "data.prompts")


def test_the_first_rows_are_named_and_the_others_counted():
    with pytest.raises(ConfigError, match=r"(?s)jsonl:1:.*jsonl:2:.*jsonl:3:.*and 5 more rows"):
        check_answers(["exact"], Dataset([{"answer": None}] * 8), "data.evaluation")


@pytest.mark.whole_run
@pytest.mark.parametrize("allowed", [False, True])
def test_a_run_refuses_rows_without_answers_unless_told_otherwise(tmp_path, allowed):
    from tandem.launch.run.run import train

    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(7)] + [
        {"prompt": "7+7=", "answer": None}
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(
        json.dumps(
            {
                "mode": "inline",
                "model": {"path": "tandem:tiny"},
                "data": {
                    "prompts": {"path": str(tmp_path / "rows.jsonl")},
                    "max_prompt_tokens": 16,
                    "shuffle": False,
                },
                "method": {"name": "grpo"},
                "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_tokens": 4},
                "reward": {
                    "functions": ["exact"],
                    "check_answers": not allowed,
                    "max_error_rate": 1.0,
                },
                "learner": {"learning_rate": 1e-3},
                "run": {"name": "r", "dir": str(tmp_path), "steps": 1, "save_model": False},
            }
        )
    )
    if allowed:
        assert train(load(tmp_path / "c.yaml")) == 0
        return
    with pytest.raises(
        ConfigError, match=r"rows.jsonl:8: reward 'exact': the expected answer is missing"
    ):
        train(load(tmp_path / "c.yaml"))
