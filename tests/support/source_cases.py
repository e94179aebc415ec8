"""Small datasets for tests of data sources."""

import json
from dataclasses import fields

from tandem.engine.config.schema import DataConfig, DatasetConfig
from tandem.engine.data.pairs import demonstration_source

DATA_KEYS = {field.name for field in fields(DataConfig)}


def chat(*said: str) -> list[dict]:
    """Messages of texts such as "user: hello"."""
    messages = []
    for text in said:
        role, _, content = text.partition(": ")
        messages.append({"role": role, "content": content})
    return messages


def tool_call(name: str) -> dict:
    call = {"type": "function", "function": {"name": name, "arguments": {}}}
    return {"role": "assistant", "tool_calls": [call]}


def rows_file(folder, rows, name="rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def demonstrations(path, tokenizer, model, seed=0, **options):
    """A source of demonstrations or pairs, in the order of the file unless `shuffle` is given.
    options: keys of a dataset and of data.
    """
    data = {key: value for key, value in options.items() if key in DATA_KEYS}
    dataset = {key: value for key, value in options.items() if key not in DATA_KEYS}
    settings = DatasetConfig(path=path, **dataset)
    source = demonstration_source(settings)
    return source(settings, DataConfig(**{"shuffle": False, **data}), tokenizer, model, seed)
