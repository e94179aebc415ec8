"""Rewards: what each signature is given, what comes back, and which configs are refused.

Runners here are inline, check() aside.
"""

import math
import re
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from tandem.engine.config.schema import RewardConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.types import Prompt
from tandem.rollout.rewards.check import check
from tandem.rollout.rewards.runner import RewardFailure, RewardRunner


def score(config, texts, content="2+2?", ids=None, prompt_id="p", seed=0, **columns):
    """Outcomes of one group, scored in this process."""
    prompt = Prompt(id=prompt_id, tokens=np.zeros(1, np.int32), content=content, columns=columns)
    ids = ids or [np.arange(len(t), dtype=np.int32) for t in texts]
    result = RewardRunner(config, seed, inline=True).submit(prompt, texts, ids)
    assert isinstance(result, Future)
    return result.result(timeout=0)


def values(config, texts, **kwargs):
    outcomes = score(config, texts, **kwargs)
    assert [o.error for o in outcomes] == [None] * len(texts)
    return [o.value for o in outcomes]


def builtin(name, **options):
    return RewardConfig(functions=(name,), options={name: options})


@pytest.fixture
def user(tmp_path):
    """Write a reward file, get a config for its functions."""

    def make(source, *names, **kwargs):
        path = tmp_path / f"reward{len(list(tmp_path.iterdir()))}.py"
        path.write_text(source)
        specs = tuple(f"{path}:{n}" for n in names or ("score",))
        options = (
            {spec: kwargs.pop("options")[i] for i, spec in enumerate(specs)}
            if "options" in kwargs
            else {}
        )
        return RewardConfig(functions=specs, options=options, **kwargs)

    return make


# --- signatures

CHAT = [{"role": "user", "content": "2+2?"}]


def test_tandem_signature_gets_one_sample_and_its_columns(user):
    config = user(
        "def score(prompt, completion, **columns):\n    assert prompt == '2+2?' and "
        "columns['answer'] == '4', columns\n    return completion == columns['answer']"
    )
    assert values(config, ["4", "5"], answer="4") == [1.0, 0.0]


def test_tandem_signature_gets_only_the_columns_it_names_and_its_own_extras(user):
    config = user(
        "def score(completion, answer, completion_ids, sample_index, prompt_id):\n"
        "    assert prompt_id == 'p' and completion_ids == list(range(len(completion)))\n    "
        "return int(answer) * 10 + sample_index"
    )
    assert values(config, ["a", "bb"], answer="4", other=object()) == [40.0, 41.0]


def test_trl_signature_on_plain_prompts(user):
    config = user(
        "def score(completions, prompts, answer, **kwargs):\n"
        "    assert prompts == ['2+2?'] * 3 and answer == ['4'] * 3 and kwargs['level'] == "
        "[7] * 3 and len(kwargs['completion_ids']) == 3\n"
        "    assert 'prompt' not in kwargs and 'completion' not in kwargs\n"
        "    return [float(c == a) for c, a in zip(completions, answer)]"
    )
    assert values(config, ["4", "5", "4"], answer="4", level=7, prompt="2+2?", completion="x") == [
        1.0,
        0.0,
        1.0,
    ]


def test_trl_signature_on_chat_prompts_sees_messages(user):
    config = user(
        "def score(completions, **kwargs):\n    assert kwargs['prompts'][1][0]['content'] == "
        "'2+2?'\n"
        "    return [float(len(c[0]['content'])) for c in completions if c[0]['role'] == "
        "'assistant']"
    )
    assert values(config, ["a", "bbb"], content=CHAT) == [1.0, 3.0]


def test_trl_none_means_not_applicable(user):
    config = user(
        "def maths(completions, task, **kw):\n    return [1.0 if t == 'maths' else None for "
        "t in task]\n"
        "def code(completions, task, **kw):\n    return [2.0 if t == 'code' else None for t "
        "in task]\n",
        "maths",
        "code",
        weights=(1.0, 0.5),
    )
    (outcome,) = score(config, ["x"], task="code")
    assert outcome.value == 1.0 and outcome.parts == {config.functions[1]: 2.0}
    (outcome,) = score(config, ["x"], task="poetry")
    assert (
        outcome.value is None
        and outcome.error.kind == "not_finite"
        and "no reward applies" in outcome.error.message
    )


def test_async_functions_are_awaited(user):
    config = user(
        "import asyncio\nasync def score(completions, **kw):\n    await asyncio.sleep(0)\n   "
        " return [3.0 for _ in completions]"
    )
    assert values(config, ["a", "b"]) == [3.0, 3.0]


VERL = (
    "def score(data_source, solution_str, ground_truth, extra_info=None):\n    assert "
    "data_source == {source!r} and extra_info == {extra!r}\n    return {result}"
)


@pytest.mark.parametrize(
    "columns, source, extra, truth",
    [
        (
            {
                "data_source": "gsm8k",
                "reward_model": {"style": "rule", "ground_truth": "4"},
                "extra_info": {"index": 3},
                "answer": "wrong",
            },
            "gsm8k",
            {"index": 3},
            "4",
        ),
        ({"ground_truth": "4", "answer": "wrong"}, "", {}, "4"),
        ({"answer": "4"}, "", {}, "4"),
    ],
)
def test_verl_signature_reads_its_own_and_plain_columns(user, columns, source, extra, truth):
    config = user(
        VERL.format(
            source=source,
            extra=extra,
            result="{'score': solution_str == ground_truth, 'acc': True}",
        )
    )
    assert values(config, [truth, "5"], **columns) == [1.0, 0.0]
    # built-ins find the expected answer in the same places
    assert values(builtin("exact"), [truth, "5"], **columns) == [1.0, 0.0]


def test_options_reach_user_functions_and_win_over_columns(user):
    config = user(
        "def score(completion, bonus, *, scale=1):\n    return bonus * scale",
        options=[{"bonus": 5, "scale": 2}],
    )
    assert values(config, ["x"], bonus=1) == [10.0]


def test_parameters_after_the_star_are_never_filled_from_columns(user):
    config = user("def score(completion, *, scale=1, **columns):\n    return scale")
    assert values(config, ["x"], scale=99) == [1.0]


def test_a_reward_file_may_import_its_neighbour(user, tmp_path):
    (tmp_path / "neighbour_of_reward.py").write_text("VALUE = 4.5")
    assert values(
        user("from neighbour_of_reward import VALUE\ndef score(completion): return VALUE"), ["x"]
    ) == [4.5]


def test_weighted_sum_keeps_the_parts(user):
    config = user(
        "def a(completion): return 1\ndef b(completion): return len(completion)",
        "a",
        "b",
        weights=(2.0, -0.5),
    )
    first, second = score(config, ["xx", "xxxx"])
    assert (first.value, second.value) == (2.0 - 1.0, 2.0 - 2.0)
    assert second.parts == {config.functions[0]: 1.0, config.functions[1]: 4.0}


# --- what is refused


@pytest.mark.parametrize(
    "source, message",
    [
        ("def score(text): return 1", "fit no known signature"),
        ("def score(**anything): return 1", "fit no known signature"),
        ("def score(completion, /): return 1", "fit no known signature"),
        ("def score(completion, completions): return 1", "mix the signatures tandem and trl"),
        ("def score(completion, solution_str): return 1", "mix the signatures tandem and verl"),
        ("score = 3", "expected a function"),
        ("class score:\n    def __init__(self, completion): pass", "expected a function"),
        ("def other(completion): return 1", "has no 'score'"),
        ("def score(completion) return 1", "SyntaxError"),
        ("import no_such_module_at_all", "no_such_module_at_all"),
        ("def score(completions, trainer_state, **kw): return [1]", "only TRL's own trainer has"),
        ("def score(completion, *, target): return 1", "needs the option 'target'"),
        (
            "def score(solution_str, ground_truth, tolerance): return 1",
            "needs the option 'tolerance'",
        ),
    ],
)
def test_functions_that_cannot_be_used_are_refused(user, source, message):
    with pytest.raises(ConfigError, match=message):
        RewardRunner(user(source), inline=True)


@pytest.mark.parametrize(
    "config, message",
    [
        (RewardConfig(), "reward.functions is empty"),
        (RewardConfig(functions=("exakt",)), "did you mean 'exact'"),
        (RewardConfig(functions=("no_such.py:score",)), "there is no file"),
        (RewardConfig(functions=("exact", "exact")), "twice"),
        (RewardConfig(functions=("exact",), options={"exakt": {}}), "did you mean 'exact'"),
        (
            RewardConfig(functions=("exact",), options={"exact": {"tagg": "answer"}}),
            "did you mean 'tag'",
        ),
        (
            RewardConfig(functions=("exact",), options={"exact": {"completion": "x"}}),
            "no option 'completion'",
        ),
        (RewardConfig(functions=("exact",), options={"exact": "answer"}), "expected a section"),
        (
            RewardConfig(functions=("length",), options={"length": {"max_tokens": 5}}),
            "needs the option 'buffer_tokens'",
        ),
        (
            RewardConfig(
                functions=("length",),
                options={"length": {"max_tokens": "many", "buffer_tokens": 1}},
            ),
            "expected an integer",
        ),
        (
            RewardConfig(
                functions=("reasoning_gym",), options={"reasoning_gym": {"extract": "last"}}
            ),
            "expected one of answer_tags",
        ),
    ],
)
def test_wrong_configs_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        RewardRunner(config, inline=True)


def test_missing_columns_are_found_before_a_run(user):
    runner = RewardRunner(user("def score(completion, solution, level=1): return 1"), inline=True)
    runner.require_columns({"solution": "x"})
    with pytest.raises(
        ConfigError, match="needs the dataset column 'solution'; the row has answer"
    ):
        runner.require_columns({"answer": "x"})
    with pytest.raises(
        ConfigError, match=r"reward_model.ground_truth, ground_truth, answer; the row has none"
    ):
        RewardRunner(builtin("exact"), inline=True).require_columns({})


# --- outcomes


@pytest.mark.parametrize(
    "body, kind, message",
    [
        ("1 / 0", "exception", "ZeroDivisionError: division by zero"),
        ("__import__('sys').exit(3)", "exception", "SystemExit: 3"),
        ("float('nan')", "not_finite", "nan"),
        ("-float('inf')", "not_finite", "-inf"),
        ("None", "not_finite", "None"),
        ("'1.0'", "arity", "str '1.0'"),
        ("[1.0]", "arity", r"list \[1.0\]"),
        ("{'score': 1}", "arity", "expected a number"),
    ],
)
def test_bad_results_are_typed_outcomes_and_never_zero(user, body, kind, message):
    config = user(f"def score(completion):\n    return 1.0 if completion == 'good' else {body}")
    good, bad = score(config, ["good", "bad"])
    assert good.value == 1.0
    assert (
        bad.value is None and bad.error.kind == kind and bad.error.function == config.functions[0]
    )
    assert re.search(message, bad.error.message)


@pytest.mark.parametrize(
    "body, kinds",
    [
        # one value must not be spread over the group
        ("[1.0]", ["arity", "arity", "arity"]),
        ("1.0", ["arity", "arity", "arity"]),
        ("[0.5, float('nan'), 'x']", [None, "not_finite", "arity"]),
        ("__import__('numpy').array([1, 2, 3])", [None, None, None]),
        ("(x for x in [1, 2, 3])", [None, None, None]),
    ],
)
def test_group_results_are_checked_entry_by_entry(user, body, kinds):
    outcomes = score(user(f"def score(completions, **kw): return {body}"), ["a", "b", "c"])
    assert [o.error and o.error.kind for o in outcomes] == kinds


def test_numpy_scalars_and_booleans_are_numbers(user):
    config = user(
        "import numpy as np\ndef score(completion): return {'a': np.float32(0.5), 'b': "
        "np.array(2.0), 'c': np.bool_(True), 'd': True}[completion]"
    )
    assert values(config, list("abcd")) == [0.5, 2.0, 1.0, 1.0]


def test_one_failing_function_does_not_hide_the_others(user):
    config = user("def a(completion): raise KeyError('x')\ndef b(completion): return 2", "a", "b")
    (outcome,) = score(config, ["t"])
    assert outcome.value is None and outcome.parts == {config.functions[1]: 2.0}
    assert "KeyError" in outcome.error.message


def test_an_empty_group_is_scored_at_once(user):
    assert score(builtin("exact"), [], answer="4") == ()


def test_too_many_failures_stop_the_run_with_the_first_tracebacks(user):
    runner = RewardRunner(
        user(
            (
                "def score(completion):\n    if completion == 'bad':\n        raise "
                "RuntimeError('judge is down')\n    return 1.0"
            ),
            max_error_rate=0.1,
        ),
        inline=True,
    )
    prompt = Prompt(id="p", tokens=np.zeros(1, np.int32), content="?")

    def submit(*texts):
        return runner.submit(prompt, texts, [np.zeros(1, np.int32)] * len(texts))

    assert submit("bad", "bad").exception() is None  # 100 %, but of 2 samples only
    assert submit(*["good"] * 18).exception() is None  # 2 of 20 is the bound itself
    assert runner.error_rate == pytest.approx(0.1)
    tripped = submit("good", "bad").exception()
    assert isinstance(tripped, RewardFailure) and runner.failure is tripped
    assert (
        "3 of 22 samples" in str(tripped)
        and str(tripped).count("judge is down") >= 3
        and "Traceback" in str(tripped)
        and "line 3" in str(tripped)
    )
    with pytest.raises(RewardFailure):
        submit("good")


# --- built-ins


def test_exact():
    assert values(builtin("exact"), [" 4\n", "4.0", ""], answer=4) == [1.0, 0.0, 0.0]
    assert values(
        builtin("exact", tag="answer"),
        ["<answer>5</answer> no, <answer> 4 </answer>", "4", "<answer>5</answer>"],
        answer="4",
    ) == [1.0, 0.0, 0.0]
    assert values(
        builtin("exact", marker="####"), ["2+2 #### 5 #### 4", "4", "4 ####"], answer="4"
    ) == [1.0, 0.0, 0.0]
    assert values(
        builtin("exact", marker="####", tag="b"),
        ["<b>5</b> #### <b>4</b>", "<b>4</b> ####"],
        answer="4",
    ) == [1.0, 0.0]


def test_format():
    texts = [
        "<think>a\nb</think>\n<answer>4</answer>",
        "x <think>a</think><answer>4</answer>",
        "<think>a</think>",
    ]
    assert values(builtin("format"), texts) == [1.0, 0.0, 0.0]
    assert values(builtin("format", pattern=r"\d+"), ["12", "12a"]) == [1.0, 0.0]


def test_length_is_dapo_equation_13():
    """Section 14.3 of the methods dossier.

    L_max 10, L_cache 4: |y| <= 6: 0; 6 < |y| <= 10: (6 - |y|) / 4; |y| > 10: -1.
    """
    ids = [np.zeros(n, np.int32) for n in (0, 6, 7, 9, 10, 11, 50)]
    got = values(builtin("length", max_tokens=10, buffer_tokens=4), ["x"] * 7, ids=ids)
    assert got == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0, -1.0]
    assert math.copysign(1, got[0]) == 1


def test_math():
    assert values(
        builtin("math"),
        [r"so \boxed{\frac{2}{4}}", "0.5", r"\boxed{0.25}", r"it is $1/2$", "no idea", ""],
        answer=r"\frac{1}{2}",
    ) == [1, 1, 0, 1, 0, 0]
    assert values(builtin("math"), [r"\boxed{1 + x^2}", r"\boxed{x^2}"], answer="x^2+1") == [
        1.0,
        0.0,
    ]
    assert values(builtin("math"), ["1000"], answer="$1,000$") == [1.0]


def test_math_says_when_the_expected_answer_cannot_be_read():
    (outcome,) = score(builtin("math"), ["4"], answer="$ $")
    assert (
        outcome.error.kind == "exception"
        and "cannot read the expected answer" in outcome.error.message
    )


def test_math_works_off_the_main_thread():
    """math-verify's own alarms raise there, and that error once came back as 0."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(values, builtin("math"), ["0.5"], answer=r"\frac{1}{2}").result() == [
            1.0
        ]


def test_reasoning_gym():
    import reasoning_gym

    for task in ("chain_sum", "letter_counting"):
        entry = reasoning_gym.create_dataset(task, size=1, seed=3)[0]
        row = {
            "question": entry["question"],
            "answer": entry["answer"],
            "metadata": dict(entry["metadata"]),
            "source_dataset": task,
        }
        right = entry["answer"]
        wrong = str(int(right) + 1)

        def run(texts, row=row, **options):
            return values(builtin("reasoning_gym", **options), texts, **row)

        assert run([f"so <answer> {right} </answer>"]) == [1.0]
        assert max(run([f"<answer>{wrong}</answer>", f"{right} without tags"])) < 0.1
        assert run([f"first {wrong} then {right}."], extract="last_integer") == [1.0]
        assert run([f"first {right} then {wrong}."], extract="last_integer")[0] < 0.1
        assert run([right + "\n"], extract="whole") == [1.0]


def test_fake_depends_on_seed_prompt_and_sample_alone():
    config = RewardConfig(functions=("fake",))
    first = values(config, ["a", "b", "c"])
    assert (
        values(config, ["x", "y", "z"]) == first
        and len(set(first)) == 3
        and all(0 <= v < 1 for v in first)
    )
    assert (
        values(config, ["a", "b", "c"], prompt_id="q") != first
        and values(config, ["a", "b", "c"], seed=1) != first
    )


# --- check


def test_check_reports_values_of_three_rows(user):
    config = user("def score(completion, answer): return 1.0 if completion == answer else -1.0")
    report = check(config, [{"q": str(i), "answer": str(i)} for i in range(5)], prompt="q")
    assert (
        report.count("1.0   -1.0   returns float") == 3
        and "row 2: '2'" in report
        and "row 3" not in report
    )


def test_check_fails_with_the_error_in_its_report(user):
    config = user("def score(completion, answer): return answer.lower()")
    with pytest.raises(
        ConfigError,
        match=r"(?s)failed on 2 .*AttributeError: 'int' object has no attribute 'lower'",
    ):
        check(config, [{"prompt": "x", "answer": 3}])


# --- docs


@pytest.mark.parametrize(
    "number, name, expected",
    [(0, "score", [1.1, 0.1]), (1, "score", [1.0, 0.0]), (2, "compute_score", [1.0, 0.0])],
)
def test_the_examples_of_the_docs_work(user, number, name, expected):
    blocks = re.findall(
        r"```python\n(.*?)```",
        (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(),
        re.DOTALL,
    )
    assert len(blocks) == 3
    assert values(user(blocks[number], name), ["4", "5"], content=CHAT, answer="4") == expected
