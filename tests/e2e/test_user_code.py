"""A user's own code where its files are not: in actors on other nodes, in a process that is started
later, in the next start of a run.

One process plays the driver: it loads methods of every kind and pickles what a run sends to its
actors, with Ray's own pickler. Then the files are deleted, and a second process, in another folder,
plays the actor. The last test does the same with a whole run on the real stack.
"""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from tandem.engine.core import loading

DOCS = Path(__file__).parents[2] / "docs" / "examples"

METHOD = """
from dataclasses import dataclass

import {neighbour}
from tandem.algorithms.base import Method, Term
from tandem.algorithms.parts.objectives.correction import RolloutCorrection

FACTOR = 2.0


def plain(tokens):
    return FACTOR * tokens, {{}}


def late(tokens):
    import {late}
    return {late}.scale(tokens), {{}}


@dataclass(frozen=True)
class Weighted:
    k: float

    def __call__(self, tokens):
        return self.k * {neighbour}.double(tokens), {{}}


class Correction(RolloutCorrection):
    def __call__(self, tokens):
        return FACTOR * tokens


def forward(policy, tokens):
    return {neighbour}.double(tokens)


@dataclass
class Mine(Method):
    option: float = 1.0

    forward = staticmethod(forward)

    def objective(self, tokens):
        return self.option * tokens, {{}}

    def rows(self, batch):
        return []

    def terms(self, batch):
        @dataclass
        class Local:
            k: float = 7.0

            def __call__(self, tokens):
                return self.k * tokens, {{}}

        half = 0.5
        return [Term("function", plain), Term("late", late), Term("dataclass", Weighted(3.0)),
                Term("lambda", lambda tokens: (half * tokens, {{}})), Term("local", Local()),
                Term("method", self.objective), Term("neighbour", {neighbour}.Objective()),
                Term("correction", Weighted(1.0), correction=Correction())]
"""
NEIGHBOUR = """
from {deeper} import FACTOR


def double(x):
    return FACTOR * x


class Objective:
    def __call__(self, tokens):
        return double(double(tokens)), {{}}
"""

DRIVER = """
import json, os, pickle, shutil, sys
from ray import cloudpickle
from tandem.algorithms.registry import configured
from tandem.engine.core.loading import user_code

os.chdir("project")
sent = {}
for spec in json.loads(sys.argv[1]):
    method = configured({"name": spec, "option": 5.0})
    sent[spec] = cloudpickle.dumps((method.terms(None), method.forward))
code = cloudpickle.dumps(user_code())
os.chdir("..")
with open("sent.pkl", "wb") as file:
    pickle.dump((code, sent), file)
shutil.rmtree("project")
"""
ACTOR = """
import json, pickle, sys, traceback
from tandem.algorithms.registry import configured
from tandem.engine.core.loading import install

with open(sys.argv[1], "rb") as file:
    code, sent = pickle.load(file)
install(pickle.loads(code))
found = {}
for spec, message in sent.items():
    method = configured({"name": spec, "option": 5.0})
    terms, forward = pickle.loads(message)
    found[spec] = {term.name: term.objective(1.0)[0] for term in terms}
    found[spec]["forward"] = forward(None, 1.0)
    found[spec]["a correction"] = terms[-1].correction(1.0)
    weighted = sys.modules[type(method).__module__].Weighted
    found[spec]["of the same class"] = type(terms[2].objective) is weighted
print(json.dumps(found))
"""
KINDS = [
    "one/mine.py:Mine",
    "two/mine.py:Mine",
    "package.inner.method:Mine",
    "one/no-identifier.v2.py:Mine",
]
EXPECTED = {
    "function": 2.0,
    "late": 9.0,
    "dataclass": 6.0,
    "lambda": 0.5,
    "local": 7.0,
    "method": 5.0,
    "neighbour": 4.0,
    "correction": 2.0,
    "forward": 2.0,
    "a correction": 2.0,
    "of the same class": True,
}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def python(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """{spec: {objective: its result}} in the process that plays the actor."""
    folder = tmp_path_factory.mktemp("user")
    project = folder / "project"
    for place in ("one", "two"):
        near, deep, late = f"near_{place}", f"deep_{place}", f"late_{place}"
        write(project / place / "mine.py", METHOD.format(neighbour=near, late=late))
        write(project / place / f"{near}.py", NEIGHBOUR.format(deeper=f"{deep}.values"))
        # a folder without __init__.py
        write(project / place / deep / "values.py", "FACTOR = 2.0\n")
        write(project / place / f"{late}.py", "def scale(x):\n    return 9.0 * x\n")
    shutil.copy(project / "one" / "mine.py", project / "one" / "no-identifier.v2.py")
    package = project / "package"
    imports = (
        METHOD.format(neighbour="near", late="late")
        .replace("import near\n", "from . import near\n")
        .replace("import late\n", "from .. import late\n")
    )
    write(package / "inner" / "method.py", imports)
    write(package / "inner" / "near.py", NEIGHBOUR.format(deeper="package.deep.values"))
    write(package / "late.py", "def scale(x):\n    return 9.0 * x\n")
    write(package / "deep" / "values.py", "FACTOR = 2.0\n")
    for place in (package, package / "inner", package / "deep"):
        write(place / "__init__.py", "")
    driver = python(DRIVER, json.dumps(KINDS), cwd=folder)
    assert driver.returncode == 0, driver.stderr
    assert not project.exists()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    actor = python(ACTOR, str(folder / "sent.pkl"), cwd=elsewhere)
    assert actor.returncode == 0, actor.stderr
    return json.loads(actor.stdout)


@pytest.mark.parametrize("spec", KINDS)
@pytest.mark.parametrize("what", EXPECTED)
def test_objectives_of_every_kind_run_where_no_file_of_theirs_is(computed, spec, what):
    assert computed[spec][what] == EXPECTED[what]


def test_a_module_has_one_name_in_every_process(tmp_path):
    """What is pickled in a checkpoint is found by the next start of the run."""
    write(tmp_path / "state.py", "class State:\n    def __init__(self): self.seen = 3\n")
    load = (
        "from tandem.engine.core.loading import load_object; State = "
        f"load_object({str(tmp_path / 'state.py')!r} + ':State', 'method');"
    )
    first = python(load + "import pickle; print(pickle.dumps(State()).hex())", cwd=tmp_path)
    again = python(
        load + "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).seen)",
        first.stdout.strip(),
        cwd=tmp_path,
    )
    assert again.stdout == "3\n", first.stderr + again.stderr


def test_neighbours_of_one_name_are_refused(tmp_path):
    """Silently, the second file would compute with the first one's neighbour."""
    for place in ("first", "second"):
        write(
            tmp_path / place / "reward.py",
            f"import same_name_{tmp_path.name}\n\ndef score(): return {place!r}\n".replace(
                "-", "_"
            ),
        )
        write(tmp_path / place / f"same_name_{tmp_path.name}.py".replace("-", "_"), "")
    loading.load_object(f"{tmp_path}/first/reward.py:score", "reward")
    with pytest.raises(
        ValueError, match=r"imports 'same_name_.*/second/same_name_.*/first/same_name_.*rename one"
    ):
        loading.load_object(f"{tmp_path}/second/reward.py:score", "reward")


def test_files_of_one_name_are_two_modules(tmp_path):
    for place in ("first", "second"):
        write(tmp_path / place / "reward.py", f"def score(): return {place!r}\n")
    scores = [
        loading.load_object(f"{tmp_path}/{place}/reward.py:score", "reward")
        for place in ("first", "second")
    ]
    assert [score() for score in scores] == ["first", "second"]
    assert scores[0].__module__ != scores[1].__module__


def test_installed_packages_stay_where_they_are(tmp_path):
    """Sources of torch would be megabytes, and without their compiled part of no use."""
    write(
        tmp_path / "mine.py",
        (
            "import json\nimport numpy\nimport torch.nn.functional\nfrom tandem.algorithms.base "
            "import Method\n\nclass Mine: pass\n"
        ),
    )
    loading.load_object(f"{tmp_path}/mine.py:Mine", "method")
    from tandem.engine.core.loading import user_code

    mine = loading.module_name(tmp_path / "mine.py")
    sources = user_code().sources
    assert mine in sources
    assert not {
        name
        for name in sources
        if name.partition(".")[0] in ("json", "numpy", "torch", "tandem", "pytest")
    }


RUN = """
import os, shutil, sys
from tandem.launch.check_config import load
from tandem.launch.run.run import train

config = load("config.yaml", sys.argv[1:])
shutil.rmtree("methods")
sys.exit(train(config))
"""


@pytest.mark.stack
def test_the_documented_example_trains_on_the_real_stack_without_its_file(tmp_path):
    """Ray, vLLM, DeepSpeed; the method's file is gone when the actors start, and its objective, in
    a neighbour, moves the process to another folder.
    """
    (tmp_path / "methods").mkdir()
    example = (DOCS / "my_method.py").read_text()
    head, objective, method = example.partition("@dataclass(frozen=True)\nclass FocalNLL:")
    objective, rest = (objective + method).split("\n\n\n", 1)
    moving = objective.replace("        p = tokens", "        os.chdir('/')\n        p = tokens")
    assert moving != objective
    write(
        tmp_path / "methods" / "focal_nll.py",
        "import os\nfrom dataclasses import dataclass\n\n\n" + moving + "\n",
    )
    write(
        tmp_path / "methods" / "my_method.py", head + "from focal_nll import FocalNLL\n\n\n" + rest
    )
    write(
        tmp_path / "my_rewards" / "short.py",
        "def score(prompt, completion):\n    return -float(len(completion))\n",
    )
    task = {"path": "task:sort", "options": {"digits": 3, "size": 16}}
    write(
        tmp_path / "config.yaml",
        yaml.safe_dump(
            {
                "mode": "cluster",
                "model": {"path": "tandem:tiny"},
                "method": {
                    "name": "methods/my_method.py:FocalMix",
                    "k": 1.5,
                    "policy": {"kl": 0.01},
                },
                "data": {
                    "prompts": task,
                    "experts": task,
                    "experts_per_step": 2,
                    "max_prompt_tokens": 32,
                    "max_expert_tokens": 32,
                },
                "rollout": {
                    "prompts_per_step": 2,
                    "samples_per_prompt": 2,
                    "max_tokens": 6,
                    "kv_cache_gib": 0.1,
                },
                "reward": {"functions": ["my_rewards.short:score"], "workers": 1},
                "cluster": {"learner_cpus": 0.5, "engine_cpus": 0.5},
                "run": {"name": "run", "steps": 2, "checkpoint_every": 1},
            }
        ),
    )
    run = python(RUN, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [
        json.loads(line)
        for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [line for line in lines if "grad_norm" in line]
    assert len(steps) == 2 and all(line["expert/p"] > 0 and line["grad_norm"] > 0 for line in steps)


@pytest.mark.parametrize(
    "held, said", [(threading.Lock(), "lock"), ((i for i in range(3)), "generator")]
)
def test_an_objective_that_cannot_be_sent_is_named(held, said):
    from tandem.algorithms.base import Term
    from tandem.engine.core.errors import ConfigError
    from tandem.engine.core.types import StepPlan
    from tandem.engine.learner.ray import check_sendable

    good = Term("good", lambda tokens: (tokens.logp, {}))
    bad = Term("bad", lambda tokens: (tokens.logp, {"held": held}))
    plan = StepPlan((good, bad), {}, (), learning_rate=1.0, temperature=1.0)
    with pytest.raises(ConfigError, match=f"the term 'bad' of the method cannot be sent .*{said}"):
        check_sendable(plan)


def test_an_environment_in_the_project_s_folder_is_not_the_user_s(tmp_path):
    """.venv beside the method's file: what was imported from it is installed."""
    package = tmp_path / ".venv" / "lib" / "site-packages" / "package_of_an_environment.py"
    write(package, "def helper(): pass\n")
    write(
        tmp_path / "mine.py",
        (
            f"import sys\nsys.path.append({str(package.parent)!r})\nimport "
            "package_of_an_environment\n\nclass Mine: pass\n"
        ),
    )
    loading.load_object(f"{tmp_path}/mine.py:Mine", "method")
    sources = loading.user_code().sources
    assert (
        loading.module_name(tmp_path / "mine.py") in sources
        and "package_of_an_environment" not in sources
    )
