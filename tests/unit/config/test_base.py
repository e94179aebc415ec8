"""A config laid over another: what merges, what replaces, and where a mistake was made."""

import pytest
import yaml

from tandem import load
from tandem.engine.config.parse import to_dict
from tandem.engine.core.errors import ConfigError

BASE = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {
        "prompts": {"path": "task:sort", "options": {"size": 9, "seed": 1}},
        "evaluation": {"path": "task:sort", "split": "test"},
    },
    "method": {"name": "grpo", "policy": {"preset": "dr_grpo", "reduction_length": 12}},
    "reward": {"functions": ["exact", "length"], "options": {"length": {"max_tokens": 9}}},
    "run": {"steps": 7, "name": "first"},
}


@pytest.fixture
def files(in_tmp):
    """Write {name: tree or text}; the last one is loaded by `load`."""

    def files(**trees):
        for name, tree in trees.items():
            path = in_tmp / f"{name}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return path

    return files


def error(path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides))
    return str(caught.value)


def test_sections_merge_all_the_way_down_and_the_rest_replaces(files):
    config = load(
        files(
            base=BASE,
            top={
                "base": "base.yaml",
                "data": {"prompts": {"options": {"size": 4}}, "evaluation": None},
                "method": {"policy": {"reduction_length": 5}},
                "reward": {"functions": ["exact"], "options": None},
                "run": {"name": "second"},
            },
        ),
        ["reward.options={}", "run.seed=3"],
    )
    assert config.data.prompts.options == {"size": 4, "seed": 1}
    assert config.data.evaluation is None  # null replaces
    assert config.method == {
        "name": "grpo",
        "policy": {"preset": "dr_grpo", "reduction_length": 5},
    }
    assert config.reward.functions == ("exact",)  # a list replaces
    assert (config.run.name, config.run.steps, config.run.seed) == ("second", 7, 3)


def test_another_method_takes_no_options_of_the_first(files):
    path = files(base=BASE, top={"base": "base.yaml", "method": {"name": "ppo"}})
    assert load(path).method == {"name": "ppo"}


def test_chains_are_relative_to_the_file_that_names_them(files, in_tmp):
    (in_tmp / "inner").mkdir()
    (in_tmp / "inner" / "middle.yaml").write_text("base: ../base.yaml\nrun: {steps: 8}\n")
    config = load(files(base=BASE, top={"base": "inner/middle.yaml", "run": {"name": "top"}}))
    assert (config.run.steps, config.run.name, config.model.path) == (8, "top", "tandem:tiny")


def test_a_config_of_the_package_is_a_base_by_its_name(files):
    path = files(top={"base": "tandem:methods/luffy", "run": {"steps": 3}})
    config = load(path)
    assert (config.method["name"], config.run.steps) == ("luffy", 3)
    message = error(files(top={"base": "tandem:methods/lufy"}))
    assert "did you mean 'methods/luffy'" in message and str(path) in message


def test_what_is_written_into_the_run_folder_stands_alone(files):
    config = load(files(base=BASE, top={"base": "base.yaml", "run": {"steps": 3}}))
    assert load(files(resolved=to_dict(config))) == config


@pytest.mark.parametrize(
    "base, words",
    [
        ("bse.yaml", ["top.yaml: its base is 'bse.yaml'", "did you mean 'base.yaml'"]),
        ("top.yaml", ["top.yaml: its base is", "must end"]),
        ("round.yaml", ["round.yaml: its base is", "top.yaml, which is the file itself or"]),
        (3, ["base: found 3, expected the name of a config file", "top.yaml"]),
        ([], ["base: found []", "top.yaml"]),
        (".", ["its base is '.'", "no file"]),
        ("x" * 5000, ["top.yaml: its base is 'xxx", "no file"]),
        ("broken.yaml", ["broken.yaml", "not valid YAML"]),
        ("list.yaml", ["list.yaml", "expected a mapping"]),
    ],
)
def test_bases_that_cannot_be_read_are_named_with_the_file_that_names_them(files, base, words):
    message = error(
        files(
            base=BASE,
            round={"base": "top.yaml"},
            broken="a: [",
            list="- a\n",
            top={"base": base},
        )
    )
    for word in words:
        assert word in message, message
    assert len(message) < 1000


def test_a_base_is_named_in_a_file(files):
    assert "not on the command line" in error(files(base=BASE), "base=other.yaml")


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"run": {"steps": "ten"}}, "run.steps: found 'ten', expected an integer, set in {}"),
        ({"run": {"steps": 0}}, "run.steps is 0, must be at least 1, set in {}"),
        ({"run": {"stepz": 1}}, "unknown key 'run.stepz' (did you mean 'steps'?), set in {}"),
        ({"run": {"name": True}}, "run.name: found true, which YAML reads as true"),
        ({"run": {"name": True}}, "set in {}"),
        ({"model": 3}, "model: found 3, expected a section, set in {}"),
        ({"reward": {"weights": [1]}}, "reward.weights has 1 entries"),
        ({"reward": {"weights": [1]}}, "in {} reward.functions, reward.weights"),
    ],
)
def test_a_mistake_in_a_base_names_the_base(files, in_tmp, wrong, words):
    merged = {**BASE, **{key: value for key, value in wrong.items() if value == 3}}
    for section, keys in wrong.items():
        if keys != 3:
            merged[section] = BASE[section] | keys
    message = error(files(base=merged, top={"base": "base.yaml", "run": {"seed": 1}}))
    assert words.format(in_tmp / "base.yaml") in message


def test_a_mistake_above_a_base_names_the_file_and_on_top_the_command_line(files, in_tmp):
    path = files(base=BASE, top={"base": "base.yaml", "run": {"steps": 0}})
    assert f"run.steps is 0, must be at least 1, set in {path}" in error(path)
    assert "run.steps is -1, must be at least 1, set on the command line" in error(
        path, "run.steps=-1"
    )


def test_what_yaml_read_in_a_base_is_forgotten_where_it_is_replaced(files):
    base = BASE | {"run": {"name": True}}
    assert load(files(base=base, top={"base": "base.yaml", "run": {"name": "x"}})).run.name == "x"


def test_a_file_that_is_a_base_only_can_be_named_as_one(files):
    config = load(
        files(top={"base": "tandem:methods/_tiny_sort_rl", "mode": "inline", "method": "grpo"}),
        ["method={name: grpo}"],
    )
    assert config.data.prompts.path == "task:sort"
    assert "tandem:methods/_tiny_sort'" in error("tandem:methods/_tiny_sort")


@pytest.mark.parametrize("key", ["bse", "Base"])
def test_a_misspelt_base_is_named(files, key):
    assert "did you mean 'base'" in error(files(top=BASE | {key: "base.yaml"}))


def test_an_empty_base_is_no_file(files):
    assert "base: found '', expected the name" in error(files(top=BASE | {"base": ""}))


@pytest.mark.parametrize("overrides", [["method.name=gpro"], ["method.policy.clip_hgh=1"]])
def test_a_mistake_in_a_method_says_where_its_options_were_set(files, overrides):
    said = error(files(top=BASE), *overrides)
    key = overrides[0].partition("=")[0]
    assert f"on the command line {key}" in said


def test_a_mistake_in_the_method_of_a_base_names_the_base(files):
    bad = BASE | {"method": {"name": "gpro"}}
    said = error(files(bad=bad, top={"base": "bad.yaml"}))
    assert "bad.yaml method.name" in said
