"""One rank of test_scope_zero.py: `python scope_worker.py RANK RANKS PORT STAGE MODEL FOLDER`."""

import sys
from pathlib import Path

import torch
from learner_cases import SPEC, equal, make_plan, make_rows, weights
from safetensors.torch import load_file
from scope_cases import SCOPES, config_of, scoped_policy

from tandem.engine.learner import local_engine
from tandem.engine.learner import zero_engine as zero
from tandem.engine.learner.rank import LearnerRank
from tandem.engine.learner.ray import plan_of_rank


def cases(stage):
    """(name, scope, settings) of every learner; offload is for what a stage shares out."""
    for name, scope in SCOPES.items():
        yield name, scope, {}
    yield "bfloat16", SCOPES["random_half"], {"dtype": "bfloat16"}
    if stage:
        yield "offload", SCOPES["random_half"], {"offload_optimizer": True}


def build(scope, settings, stage, model, rank, ranks):
    config = config_of(model, scope, zero_stage=stage, **settings)
    torch.manual_seed(rank)
    engine = zero.ZeroEngine(scoped_policy(config), config.learner, persistent=0)
    return LearnerRank(config, model, SPEC, engine, rank, ranks)


def train(learner, steps):
    """Gradient norm of each step."""
    norms = []
    for step in steps:
        plan = make_plan(make_rows(step), learner.ranks, step=step)
        report = learner.step(plan_of_rank(plan, learner.rank))
        norms.append(report.metrics["grad_norm"])
    return norms


def main(rank, ranks, port, stage, model, folder):
    local_engine.join(rank, ranks, "127.0.0.1", port, 120.0)
    for name, scope, settings in cases(stage):
        learner = build(scope, settings, stage, model, rank, ranks)
        out = {"at first": weights(learner), "norms": train(learner, (0, 1))}
        out["after one round"] = weights(learner)
        learner.save(folder / f"{name}_checkpoint")
        out["norms"] += train(learner, (2, 3))
        out["weights"] = weights(learner)
        out["reference"] = learner.logprobs(make_rows(5), 0.8, model="reference")
        learner.export(folder / f"{name}_model")
        if rank == 0:
            out["exported"] = load_file(folder / f"{name}_model" / "model.safetensors")
        learner.engine.engine.destroy()
        learner = build(scope, settings, stage, model, rank, ranks)
        learner.load(folder / f"{name}_checkpoint")
        train(learner, (2, 3))
        out["resumed exactly"] = equal(weights(learner), out["weights"])
        learner.engine.engine.destroy()
        torch.save(out, folder / f"{name}_rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(
        int(sys.argv[1]),
        int(sys.argv[2]),
        int(sys.argv[3]),
        int(sys.argv[4]),
        sys.argv[5],
        Path(sys.argv[6]),
    )
