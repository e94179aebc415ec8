"""One rank of the learner tests: `python zero_worker.py RANK RANKS PORT STAGE MODEL FOLDER`.
Results go to FOLDER/CASE_rankR.pt; see test_learner_zero.py.

One process group per process, and one ZeRO stage per group: engines of different stages in one
process have hung.
"""

import sys
from pathlib import Path

import torch
from learner_cases import (
    CLIP,
    SEEDS,
    SPEC,
    TERMS,
    budget_of,
    hook_plan,
    make_plan,
    make_policy,
    make_rows,
    only,
    poison,
    weights,
)
from safetensors.torch import load_file

from tandem.engine.config.schema import Config, LearnerConfig, ModelConfig
from tandem.engine.learner import local_engine
from tandem.engine.learner import zero_engine as zero
from tandem.engine.learner.rank import LearnerRank
from tandem.engine.learner.ray import plan_of_rank


class Probe(torch.optim.AdamW):
    """AdamW that on request puts the gradient it was given in the place of the weights (exact,
    unlike a difference of weights), and back.
    """

    mode = "train"

    def step(self, closure=None):
        if self.mode == "train":
            return super().step()
        for p in (p for group in self.param_groups for p in group["params"]):
            with torch.no_grad():
                if self.mode == "show":
                    self.kept = getattr(self, "kept", {}) | {p: p.clone()}
                    p.copy_(p.grad)
                else:
                    p.copy_(self.kept[p])


def build(case, stage, model, ranks, rank):
    learner = LearnerConfig(
        grad_clip=CLIP, zero_stage=stage, weight_decay=0.1, offload_optimizer=case == "offload"
    )
    config = Config(
        model=ModelConfig(path=model, dtype="bfloat16" if case == "bfloat16" else "float32"),
        learner=learner,
    )
    torch.manual_seed(rank)
    return LearnerRank(
        config,
        model,
        SPEC,
        zero.ZeroEngine(make_policy(config, model), learner, persistent=0),
        rank,
        ranks,
    )


def take(learner, plan):
    return learner.step(plan_of_rank(plan, learner.rank))


def gradients(learner, ranks):
    """{(term, micro-batches): (gradient, metrics)}; the weights are put back each time."""
    out, rows = {}, make_rows(count=17)
    for name in ("policy", "sft", "kl", "value", "all"):
        for count in (1, 3, 8):
            plan = make_plan(
                rows, ranks, budget_of(0, 17, ranks, count), TERMS if name == "all" else only(name)
            )
            Probe.mode = "show"
            metrics = dict(take(learner, plan).metrics)
            out[name, count] = weights(learner), metrics
            Probe.mode = "hide"
            take(learner, plan)
    return out


def hooks(learner, ranks):
    """{name: metrics} of steps that ask for more than token losses; the weights stay."""
    out = {}
    for name in ("ift", "carft", "measured", "pairs"):
        Probe.mode = "show"
        out[name] = dict(take(learner, hook_plan(name, ranks)).metrics)
        Probe.mode = "hide"
        take(learner, hook_plan(name, ranks))
    return out


def moments(learner):
    return [
        {k: v.clone() for k, v in learner.engine.inner.state.get(m, {}).items()}
        for m in learner.engine.moments.masters
    ]


def training(learner, ranks, folder):
    """A step, a poisoned step, steps with other moment sets, and a resume in the middle."""
    out = {"before": weights(learner)}
    out["first"] = dict(take(learner, make_plan(make_rows(0), ranks)).metrics)
    out["weights after first"], out["moments after first"] = weights(learner), moments(learner)
    report = take(learner, make_plan(poison(make_rows(1)), ranks))
    out["poisoned"] = report.skipped, report.metrics["grad_norm"]
    out["weights after poisoned"], out["moments after poisoned"] = (
        weights(learner),
        moments(learner),
    )
    out["streams"] = learner.compute_streams(make_rows(5), 0.8)
    take(learner, make_plan(make_rows(1), ranks, optimizer="sft"))
    learner.save(folder)
    out["noise"] = torch.rand(3)
    return out


def go_on(learner, ranks):
    for name, seed in SEEDS:
        take(learner, make_plan(make_rows(seed), ranks, optimizer=name))
    return weights(learner), moments(learner)


def main(rank, ranks, port, stage, model, folder):
    local_engine.join(rank, ranks, "127.0.0.1", port, 120.0)
    zero.adamw = lambda parameters, learner: Probe(
        parameters, lr=0.0, betas=learner.betas, weight_decay=learner.weight_decay
    )
    folder = Path(folder)
    for case in ("plain", "offload", "bfloat16") if stage else ("plain", "bfloat16"):
        if case == "offload":
            zero.check_offload(stage)
        learner = build(case, stage, model, ranks, rank)
        out = (
            {"gradients": gradients(learner, ranks), "hooks": hooks(learner, ranks)}
            if case != "bfloat16"
            else {}
        )
        Probe.mode = "train"
        engine = learner.engine.engine
        out["offloaded"] = bool(engine.zero_use_cpu_optimizer())
        out["local elements"] = sum(p.numel() for p in learner.engine.module.parameters())
        out |= training(learner, ranks, folder / f"{case}_checkpoint")
        out["straight on"] = go_on(learner, ranks)
        # on all ranks: at stage 3 they gather it together
        learner.export(folder / f"{case}_model")
        if rank == 0:
            out["exported"] = load_file(folder / f"{case}_model" / "model.safetensors")
        learner.load(folder / f"{case}_checkpoint")
        out["noise again"] = torch.rand(3)
        out["after load"] = go_on(learner, ranks)
        learner.engine.engine.destroy()
        learner = build(case, stage, model, ranks, rank)
        learner.load(folder / f"{case}_checkpoint")
        out["after load in a new engine"] = go_on(learner, ranks)
        torch.save(out, folder / f"{case}_rank{rank}.pt")
        learner.engine.engine.destroy()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(
        int(sys.argv[1]),
        int(sys.argv[2]),
        int(sys.argv[3]),
        int(sys.argv[4]),
        sys.argv[5],
        sys.argv[6],
    )
