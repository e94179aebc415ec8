"""A small model folder and its tokenizer."""

import pytest

from tandem.engine.config.schema import ModelConfig
from tandem.engine.data.templates import WORKER
from tandem.engine.model.tiny import make_tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return str(make_tiny(folder, hidden=32, layers=1))


@pytest.fixture(scope="module")
def model(tiny_folder):
    yield ModelConfig(path=tiny_folder)
    WORKER.stop()


@pytest.fixture
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.path)
