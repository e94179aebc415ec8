"""`tandem score`: numbers of a model about demonstrations, which a dataset then joins by id."""

import json

import pytest
import torch
import yaml
from source_cases import demonstrations, rows_file

from tandem.engine.core.types import Source
from tandem.engine.model.resolve import load_tokenizer
from tandem.engine.model.tiny import make_tiny
from tandem.launch import cli, score
from tandem.launch.check_config import load

TEXTS = ["41=", "3052=", "7=", "998877="]
ROWS = [
    {"id": f"r{i}", "prompt": f"sort {text}", "response": text[::-1], "worse": text}
    for i, text in enumerate(TEXTS)
]
SINGLE = {"path": "rows.jsonl", "response": "response"}
PAIRS = {"path": "rows.jsonl", "chosen": "response", "rejected": "worse"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b")):
        make_tiny(folder / name, hidden=32, layers=2, seed=seed)
    return folder


@pytest.fixture
def config(in_tmp, models):
    """Writes c.yaml and rows.jsonl into the current folder."""

    def write(experts=SINGLE, method="sft", rows=ROWS, **data):
        rows_file(in_tmp, rows)
        limits = {"max_prompt_tokens": 32, "max_expert_tokens": 16}
        values = {
            "mode": "inline",
            "model": {"path": str(models / "a")},
            "data": {"experts": dict(experts), "experts_per_step": 2, **limits, **data},
            "learner": {"micro_batch_tokens": 24, "head_chunk": 5},
            "method": {"name": method},
        }
        (in_tmp / "c.yaml").write_text(yaml.safe_dump(values))
        return "c.yaml"

    return write


def run(capsys, *words):
    capsys.readouterr()
    code = cli.main(["score", *words])
    return code, *capsys.readouterr()


def lines(path="s.jsonl"):
    with open(path) as file:
        return [json.loads(line) for line in file]


def by_transformers(folder, trajectory):
    """(log-probs, entropies) [n] of the expert's tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.as_tensor(trajectory.tokens, dtype=torch.long)
    with torch.no_grad():
        log_p = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
    mine = torch.as_tensor(trajectory.source == Source.EXPERT)[1:]
    logp = log_p.gather(-1, tokens[1:, None]).squeeze(-1)
    return logp[mine], -(log_p.exp() * log_p).sum(-1)[mine]


def trajectories(path, **columns):
    """What a run reads, in the order of the file."""
    model = load(path).model
    source = demonstrations("rows.jsonl", load_tokenizer(model), model, **columns)
    return [source[i] for i in range(len(ROWS))]


def test_scores_are_those_of_transformers(config, models, capsys):
    path = config()
    every = "nll,entropy,sum_logp,mean_logp,tokens"
    code, out, err = run(capsys, path, "--what", every, "--out", "s.jsonl")
    assert code == 0 and "of 4 rows written to s.jsonl" in out and "4 of 4 rows" in err
    found = lines()
    assert [line["id"] for line in found] == ["r0", "r1", "r2", "r3"]
    for line, trajectory in zip(found, trajectories(path, response="response"), strict=True):
        logp, entropy = by_transformers(models / "a", trajectory)
        assert line["tokens"] == len(logp) == (trajectory.source == Source.EXPERT).sum()
        assert line["sum_logp"] == pytest.approx(float(logp.sum()), rel=1e-5)
        assert line["mean_logp"] == pytest.approx(float(logp.mean()), rel=1e-5)
        assert line["nll"] == -line["mean_logp"]
        assert line["entropy"] == pytest.approx(float(entropy.mean()), rel=1e-5)


def test_both_answers_of_a_pair_under_two_models(config, models, capsys):
    path = config(PAIRS, "dpo")
    words = ("--what", "sum_logp", "--prefix", "my_", "--reference", f"old={models / 'b'}")
    assert run(capsys, path, *words, "--out", "s.jsonl")[0] == 0
    pairs = trajectories(path, chosen="response", rejected="worse")
    for line, pair in zip(lines(), pairs, strict=True):
        assert len(line) == 5
        for answer in pair:
            for prefix, name in (("my_", "a"), ("old_", "b")):
                logp, _ = by_transformers(models / name, answer)
                given = line[f"{prefix}{answer.role}_sum_logp"]
                assert given == pytest.approx(float(logp.sum()), rel=1e-5)


def test_the_file_joins_the_rows_that_it_is_about(config, capsys):
    """It is written where the config says that it is read."""
    path = config({**SINGLE, "scores": "mine.jsonl", "limit": 3}, "poft")
    assert run(capsys, path)[0] == 0
    settings = {"response": "response", "limit": 3, "scores": "mine.jsonl"}
    model = load(path).model
    source = demonstrations("rows.jsonl", load_tokenizer(model), model, **settings)
    joined = [source[i].columns["mean_logp"] for i in range(len(source))]
    assert joined == [line["mean_logp"] for line in lines("mine.jsonl")] and len(joined) == 3
    assert cli.main(["train", path, "run.steps=1", "run.save_model=false"]) == 0


def test_rows_without_an_id_are_called_by_their_place(config, capsys):
    rows = [{"prompt": row["prompt"], "response": row["response"]} for row in ROWS]
    assert run(capsys, config(rows=rows), "--out", "s.jsonl")[0] == 0
    assert [line["id"] for line in lines()] == [f"rows.jsonl:{i}" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "words, told",
    [
        (["--what", "nil"], "--what has 'nil' (did you mean 'nll'?)"),
        (["--what", "nll,nll"], "names a score twice"),
        (["--source", "exprts"], "--source is 'exprts' (did you mean 'experts'?)"),
        (["--out", "taken.jsonl"], "taken.jsonl exists"),
        (["--out", "no/s.jsonl"], "in a folder that exists"),
        (["--out", "s.txt"], "expected a file NAME.jsonl"),
        (["--reference", "./none"], "there is no such folder"),
        (["--reference", "tandem:tiny", "--reference", "tandem:tiny"], "begin with 'reference_'"),
        (["--what", "tokens", "--prefix", "n_"], "has a column 'n_tokens'"),
        (["data.max_expert_tokens=5", "data.overlong=drop"], "2 rows are too long and left out"),
        (["data.experts.path=twice.jsonl"], "twice.jsonl:2 has the id 'r', as has twice.jsonl:1"),
        (["cluster.learner_gpus=1", "cluster.engine_gpus=1"], "torch finds no GPU here"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(config, capsys, monkeypatch, words, told):
    monkeypatch.setattr(score, "load_policy", lambda model: pytest.fail("loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = config(rows=[{**row, "n_tokens": 1} for row in ROWS])
    for name in ("taken.jsonl", "twice.jsonl"):
        with open(name, "w") as file:
            for row in ROWS[:2]:
                file.write(json.dumps({**row, "id": "r"}) + "\n")
    if "--out" not in words:
        words = [*words, "--out", "s.jsonl"]
    code, out, err = run(capsys, path, *words)
    assert (code, out) == (2, "") and told in err


def test_a_place_for_the_file_is_needed(config, capsys):
    code, _, err = run(capsys, config())
    assert code == 2 and "--out is not set, and neither is `scores:` of the dataset" in err
