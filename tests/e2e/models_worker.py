"""One rank of test_models_zero.py: `python models_worker.py RANK RANKS PORT STAGE FOLDER`, where
FOLDER has the models `start` and `teacher`."""

import sys
from pathlib import Path

import torch
from model_cases import SPEC, config_of, models_of, scores, train

from tandem.engine.core.errors import MethodError
from tandem.engine.learner import local_engine
from tandem.engine.learner import zero_engine as zero
from tandem.engine.learner.rank import LearnerRank, build_policy


def build(rank, ranks, stage, folder):
    start = str(folder / "start")
    config = config_of(start, models_of(folder), zero_stage=stage)
    torch.manual_seed(rank)
    engine = zero.ZeroEngine(build_policy(config, start, SPEC), config.learner, persistent=0)
    return LearnerRank(config, start, SPEC, engine, rank, ranks)


def refused(learner):
    """What is said of a quantity beside the live policy."""
    try:
        train(learner, 1, "policy@informed")
    except MethodError as error:
        return str(error)
    return ""


def main(rank, ranks, port, stage, folder):
    local_engine.join(rank, ranks, "127.0.0.1", port, 120.0)
    learner = build(rank, ranks, stage, folder)
    out = {"losses": train(learner, 2)}
    learner.save(folder / "checkpoint")
    out["losses"] += train(learner, 1)
    out["scores"] = scores(learner)
    learner.engine.engine.destroy()
    learner = build(rank, ranks, stage, folder)
    learner.load(folder / "checkpoint")
    train(learner, 1)
    out["resumed"] = scores(learner)
    out["refused"] = refused(learner)
    torch.save(out, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    rank, ranks, port, stage = map(int, sys.argv[1:5])
    main(rank, ranks, port, stage, Path(sys.argv[5]))
