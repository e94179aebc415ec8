"""A backend of the user's own that does not fit is refused, before anything starts."""

from dataclasses import replace
from pathlib import Path

import pytest

from tandem.engine.config.schema import Config, SyncConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.weights.transport import transport
from tandem.launch.check_config import load
from tandem.rollout.backend import backend_class

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "my_backend.py"
CALLS = """
from tandem.rollout.backend import Backend


class Mine(Backend):
    def __init__(self, model_path, config, seed, *, room, depth=2): ...
    async def generate(self, request): ...
    async def start_weight_update(self): ...
    async def update_weights(self, update_info): ...
    async def finish_weight_update(self, version): ...
    async def weight_version(self): ...
    async def active_digest(self): ...


class Started(Mine):
    @classmethod
    async def start(cls, model_path, config, seed, *, url): ...


class Short(Backend):
    async def generate(self, request): ...
    async def weight_version(self): ...


class Plain(Mine):
    def generate(self, request): ...


class Typed(Mine):
    def __init__(self, model_path, config, seed, *, rows: int = 4, share: float = 0.5, room=1): ...


class Other: ...


a_function = print
"""


def config(folder, name, options=None, **rollout):
    (folder / "mine.py").write_text(CALLS)
    own = replace(
        Config().rollout,
        backend=f"{folder}/mine.py:{name}",
        backend_options=options or {},
        **rollout,
    )
    return replace(Config(), rollout=own)


@pytest.mark.parametrize(
    "name, options, complaint",
    [
        ("Nobody", {}, "has no 'Nobody'"),
        ("Other", {}, "which is <class .*Other'>; expected a class that inherits tandem.rollout"),
        ("a_function", {}, "which is <.*>; expected a class that inherits"),
        (
            "Short",
            {},
            "lacks active_digest, finish_weight_update, start_weight_update, update_weights;",
        ),
        ("Plain", {"room": 1}, "generate must be written with `async def`"),
        ("Mine", {}, r"needs the option 'room': set rollout.backend_options: \{room: ...\}"),
        (
            "Mine",
            {"rom": 1},
            r"no option 'rom' \(did you mean 'room'\?\), .*; its options: room, depth",
        ),
        ("Mine", {"room": 1, "seed": 1}, "no option 'seed'"),
        ("Started", {"room": 1}, "no option 'room'.*its options: url"),
        ("Typed", {"rows": "many"}, "backend_options.rows: found 'many', expected an integer"),
        ("Typed", {"rows": 2.5}, "backend_options.rows: found 2.5, expected an integer"),
        ("Typed", {"share": "0.5"}, "backend_options.share: found '0.5', .*without quotes"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, name, options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        backend_class(config(tmp_path, name, options))


def test_what_fits_is_taken(tmp_path):
    assert backend_class(config(tmp_path, "Mine", {"room": 1})).__name__ == "Mine"
    assert backend_class(config(tmp_path, "Started", {"url": "x"})).__name__ == "Started"
    typed = {"rows": 2, "share": 1, "room": "any"}
    assert backend_class(config(tmp_path, "Typed", typed)).__name__ == "Typed"
    for name in ("auto", "hf", "replay"):
        backend_class(replace(Config(), rollout=replace(Config().rollout, backend=name)))


def test_built_in_backends_have_no_options():
    own = replace(Config().rollout, backend="hf", backend_options={"rows": 2})
    with pytest.raises(ConfigError, match=r"'hf' has no option 'rows'.*its options: none"):
        backend_class(replace(Config(), rollout=own))


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no `sleep`"):
        backend_class(config(tmp_path, "Mine", {"room": 1}, sleep=True))
    mine = config(tmp_path, "Mine", {"room": 1})
    with pytest.raises(ConfigError, match=r"sync.transport is nccl, .*use auto, shm"):
        backend_class(replace(mine, sync=SyncConfig(transport="nccl")))


def test_its_weights_take_a_cpu_channel_wherever_it_computes(tmp_path):
    mine = config(tmp_path, "Mine")
    on_gpus = replace(mine, cluster=replace(mine.cluster, engine_gpus=1, learner_gpus=1))
    assert transport(on_gpus) == "shm"
    assert transport(replace(mine, cluster=replace(mine.cluster, address="auto"))) == "gloo"


def test_paths_are_resolved_once_and_unknown_names_refused(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(
        "mode: inline\nmodel: {path: 'tandem:tiny'}\nmethod: {name: grpo}\n"
        "data: {prompts: {path: 'task:sort'}}\nreward: {functions: [exact]}\n"
    )
    (tmp_path / "mine.py").write_text(CALLS)
    monkeypatch.chdir(tmp_path)
    found = load(
        "config.yaml",
        [
            "rollout.backend=mine.py:Mine",
            "rollout.backend_options={room: lib/hall.py:Hall, depth: 3}",
        ],
    ).rollout
    assert found.backend == f"{tmp_path}/mine.py:Mine"
    assert found.backend_options == {"room": f"{tmp_path}/lib/hall.py:Hall", "depth": 3}
    with pytest.raises(ConfigError, match=r"there is no file .*nobody.py"):
        load("config.yaml", ["rollout.backend=nobody.py:Mine"])
    with pytest.raises(ConfigError, match=r"is 'vlm' \(did you mean 'vllm'\?\).*my_backend.py:"):
        load("config.yaml", ["rollout.backend=vlm"])
