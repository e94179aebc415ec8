"""The rules that span keys of a config, one function for each section.

Bounds of single keys stand in schema.py; what only the method can tell is checked in
launch/check_config.py. Each error names the values in question and what to change.
"""

from __future__ import annotations

import datetime

from tandem.engine.config.keys import hint_of
from tandem.engine.config.names import RESERVED, model_fault, name_fault, source_fault
from tandem.engine.config.other_models import OtherModelConfig
from tandem.engine.config.schema import ClusterConfig, Config, DatasetConfig
from tandem.engine.config.scope import ScopeConfig
from tandem.engine.config.words import written
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import brief, closest

BACKENDS = ("auto", "vllm", "hf", "replay")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_rules(c: Config) -> None:
    """Every rule that spans keys. Raises ConfigError; never edits."""
    check_model(c)
    check_data(c)
    check_method(c)
    check_rollout(c)
    check_reward(c)
    check_learner(c)
    check_scope(c.scope)
    check_sync(c)
    check_cluster(c)
    check_run(c)


def check_model(c: Config) -> None:
    require(
        bool(c.model.path),
        "model.path is not set: name a Hugging Face folder or model, or tandem:tiny",
    )
    for name, other in c.models.items():
        fault = model_fault(name)
        require(not fault, f"models has {name!r}, which {fault}")
        require(
            (other.kind == "path") == bool(other.path),
            f"models.{name}.kind is {other.kind} and models.{name}.path is {other.path!r}: kind "
            "path needs a path, and no other kind has one",
        )
        require(
            other.kind == "ema" or other.rate == OtherModelConfig.rate,
            f"models.{name}.rate is {other.rate:g}, but only kind ema has a rate, and "
            f"models.{name}.kind is {other.kind}",
        )


def check_data(c: Config) -> None:
    """Datasets, and what is given to chat templates."""
    for name in c.data.sources:
        fault = source_fault(name)
        require(not fault, f"data.sources has {name!r}, which {fault}")
    if c.data.experts is not None:
        check_demonstrations("data.experts", c.data.experts)
    for name, source in c.data.sources.items():
        check_demonstrations(f"data.sources.{name}", source)
    for name in ("prompts", "evaluation"):
        check_prompts(f"data.{name}", getattr(c.data, name) or DatasetConfig())
    for name in c.data.chat_template_kwargs:
        require(
            name not in RESERVED,
            f"data.chat_template_kwargs has {name!r}, which Tandem sets itself; remove it",
        )
    date = c.data.template_date
    try:
        if date is not None:
            datetime.datetime.fromisoformat(date)
    except ValueError:
        raise ConfigError(
            f"data.template_date is {date!r}, expected a date such as '2026-01-31', or null"
        ) from None


def check_demonstrations(key: str, dataset: DatasetConfig) -> None:
    """Which columns make a demonstration or a pair."""
    chosen, rejected = dataset.chosen, dataset.rejected
    require(
        (chosen is None) == (rejected is None),
        f"{key}.chosen is {chosen!r} and {key}.rejected is {rejected!r}: a pair needs both columns",
    )
    require(
        chosen is None or chosen != rejected,
        f"{key}.chosen and {key}.rejected are the same column, {chosen!r}",
    )
    for name in ("response", "role"):
        value = getattr(dataset, name)
        require(
            chosen is None or value is None,
            f"{key}.chosen is {chosen!r}, so the rows are pairs, but {key}.{name} is {value!r} as "
            "well; set one of them to null",
        )
    require(
        dataset.train_on == "last" or dataset.response == dataset.prompt,
        f"{key}.train_on is {dataset.train_on!r}, which chooses turns of a chat in one column, but "
        f"{key}.prompt is {dataset.prompt!r} and {key}.response {dataset.response!r}; name the "
        "column of the chat in both, or leave train_on out",
    )


def check_prompts(key: str, dataset: DatasetConfig) -> None:
    """What only demonstrations have."""
    unused = DatasetConfig()
    for name in ("chosen", "rejected", "train_on", "role"):
        require(
            getattr(dataset, name) == getattr(unused, name),
            f"{key}.{name} is {getattr(dataset, name)!r}, but only demonstrations have it "
            "(data.experts and data.sources); leave it out",
        )


def check_method(c: Config) -> None:
    name = c.method.get("name")
    if not isinstance(name, str):
        found = c.method.get("name", "not set")
        raise ConfigError(
            f"method.name is {found}: choose one of `tandem methods`, or a path "
            "my_method.py:MyMethod"
        )
    require(
        c.mode == "inline" or not name.startswith("__main__:"),
        f"method.name is {name!r}, a class of the script or notebook that runs, which the "
        "processes of mode=cluster do not have; write the class into a file and name it "
        "my_method.py:MyMethod, or use mode=inline",
    )


def check_rollout(c: Config) -> None:
    rollout = c.rollout
    require(
        rollout.temperature > 0,
        f"rollout.temperature is {rollout.temperature}, must be > 0: greedy samples have no "
        "log-prob to train on (eval.temperature may be 0)",
    )
    require(
        rollout.top_p == 1 or c.sync.gate_steps == 0,
        f"rollout.top_p is {rollout.top_p}, so engines sample from a truncated distribution, which "
        "the learner's log-probs are not of: the comparison of both would stop the run at once; "
        "set rollout.top_p=1, or give that check up with sync.gate_steps=0",
    )
    need = c.data.max_prompt_tokens + max(rollout.max_tokens, c.eval.max_tokens or 0)
    require(
        rollout.max_model_len is None or rollout.max_model_len >= need,
        f"rollout.max_model_len is {rollout.max_model_len}, but data.max_prompt_tokens + "
        f"rollout.max_tokens (or eval.max_tokens, if larger) is {need}; raise it or lower them",
    )
    check_backend(c)
    check_over_sample(c)
    if rollout.sleep:
        check_sleep(c)


def check_backend(c: Config) -> None:
    """vLLM is for mode=cluster, hf for mode=inline, replay and a user's own for both."""
    backend = c.rollout.backend
    require(
        backend in BACKENDS or ":" in backend,
        f"rollout.backend is {backend!r}{closest(backend, BACKENDS)}, expected one of "
        f"{', '.join(BACKENDS)}, or a class of your own: my_backend.py:MyBackend",
    )
    require(
        c.mode == "inline" or not backend.startswith("__main__:"),
        f"rollout.backend is {backend!r}, a class of the script or notebook that runs, which the "
        "processes of mode=cluster do not have; write the class into a file and name it "
        "my_backend.py:MyBackend, or use mode=inline",
    )
    require(
        not (c.mode == "cluster" and backend == "hf"),
        "rollout.backend hf runs in one process, but mode is cluster; use mode=inline or backend "
        "vllm",
    )
    require(
        not (c.mode == "inline" and backend == "vllm"),
        "mode=inline runs without vLLM, but rollout.backend is vllm; use mode=cluster or backend "
        "hf",
    )
    if backend == "replay":
        require(
            c.rollout.record is not None,
            "rollout.backend is replay, but rollout.record names no rollouts.jsonl",
        )
        require(
            c.data.evaluation is None,
            "rollout.backend is replay, which cannot answer new prompts, but data.evaluation is "
            "set; set data.evaluation=null and evaluate the saved model",
        )


def check_over_sample(c: Config) -> None:
    """Only vLLM's engines can abort groups that a step does not need."""
    if c.rollout.over_sample == 0:
        return
    reason = ""
    if c.mode == "inline":
        reason = "mode is inline"
    if c.rollout.backend == "replay":
        reason = "rollout.backend is replay"
    require(
        not reason,
        f"rollout.over_sample is {c.rollout.over_sample}, but {reason}, where the groups of a step "
        "end together and none can be aborted; set rollout.over_sample=0, or use mode=cluster with "
        "vLLM",
    )


def check_sleep(c: Config) -> None:
    """An engine that sleeps needs a learner rank on its GPU, and must not generate meanwhile."""
    cluster = c.cluster
    require(
        cluster.colocate and cluster.engine_gpus > 0 and cluster.learner_gpus > 0,
        "rollout.sleep is true: an engine gives its GPU memory to the learner rank on the same "
        f"GPU, but cluster.colocate is {written(cluster.colocate)}, {gpus(cluster)}; set "
        "cluster.colocate=true and 0.5 GPUs for each, or rollout.sleep=false",
    )
    require(
        c.rollout.backend != "replay",
        "rollout.sleep is true, but rollout.backend is replay, which has no engines; set "
        "rollout.sleep=false",
    )
    require(
        c.rollout.staleness == 0,
        f"rollout.sleep is true, but rollout.staleness is {c.rollout.staleness}, with which "
        "engines generate while the learner works; set it to 0, or rollout.sleep=false",
    )


def check_reward(c: Config) -> None:
    weights, functions = len(c.reward.weights), len(c.reward.functions)
    require(
        weights in (0, functions),
        f"reward.weights has {weights} entries for {functions} reward.functions; give one weight "
        "per function or none",
    )


def check_learner(c: Config) -> None:
    learner = c.learner
    require(
        c.mode == "inline" or learner.zero_stage < 3 or not learner.compile,
        "learner.compile is true with learner.zero_stage 3, whose parameters come and go inside "
        "the layers; use zero_stage 2 or less, or set learner.compile=false",
    )
    for_gpus = {
        "learner.liger": learner.liger,
        "learner.offload_activations": learner.offload_activations,
        "learner.offload_models": learner.offload_models,
    }
    for key, is_set in for_gpus.items():
        require(
            not is_set or c.cluster.learner_gpus > 0,
            f"{key} is true, which is for learners on GPUs, but cluster.learner_gpus is 0; set "
            f"{key}=false",
        )
    require(
        learner.zero_stage > 0 or not learner.offload_optimizer,
        "learner.offload_optimizer is true with learner.zero_stage 0, which has nothing to "
        "offload; use zero_stage 1, 2 or 3, or switch it off",
    )


def check_scope(scope: ScopeConfig) -> None:
    """That no key is set which another kind of scope would read."""
    owners = {"train": "layers", "every": "random_half"}
    for name in ("rank", "alpha", "targets", "dropout", "rslora", "export"):
        owners[name] = "lora"
    default = ScopeConfig()
    for name, kind in owners.items():
        value = getattr(scope, name)
        require(
            scope.kind == kind or value == getattr(default, name),
            f"scope.{name} is {brief(value)}, which only scope.kind={kind} reads, but scope.kind "
            f"is {scope.kind}; set scope.kind={kind}, or leave scope.{name} out",
        )
    require(
        scope.kind != "layers" or bool(scope.train),
        "scope.kind is layers, but scope.train names none; name what trains, such as "
        "scope.train=[20-27, lm_head]",
    )


def check_sync(c: Config) -> None:
    """Which transports the GPUs of both sides admit."""
    transport, cluster = c.sync.transport, c.cluster
    engine_gpus, learner_gpus = cluster.engine_gpus, cluster.learner_gpus
    both = engine_gpus > 0 and learner_gpus > 0
    require(
        transport != "nccl" or both,
        "sync.transport is nccl, which needs GPUs on both sides, but cluster.engine_gpus is "
        f"{engine_gpus} and cluster.learner_gpus {learner_gpus}; use auto or gloo",
    )
    require(
        transport != "ipc" or (cluster.colocate and both),
        "sync.transport is ipc, which needs engines and learner on the same GPUs, but "
        f"cluster.colocate is {written(cluster.colocate)}, cluster.engine_gpus {engine_gpus} and "
        f"cluster.learner_gpus {learner_gpus}; use auto",
    )


def check_cluster(c: Config) -> None:
    cluster = c.cluster
    require(
        not (c.mode == "inline" and cluster.learner_ranks > 1),
        f"mode=inline is one process, but cluster.learner_ranks is {cluster.learner_ranks}; use "
        "mode=cluster or learner_ranks=1",
    )
    if cluster.colocate:
        check_colocation(c)
    else:
        require(
            cluster.engine_gpus == 0 or cluster.engine_gpus >= cluster.tensor_parallel,
            f"cluster.engine_gpus is {cluster.engine_gpus} for tensor_parallel "
            f"{cluster.tensor_parallel}; an engine needs one GPU per tensor-parallel rank",
        )
    if cluster.pin_cores:
        check_pinning(c)


def check_colocation(c: Config) -> None:
    """Pairs of one engine and one learner rank, each pair on a GPU of its own."""
    cluster = c.cluster
    require(
        c.mode == "cluster",
        "cluster.colocate is true, but mode=inline is one process anyway; set "
        "cluster.colocate=false",
    )
    require(
        cluster.engines == cluster.learner_ranks,
        "cluster.colocate pairs each engine with a learner rank, but cluster.engines is "
        f"{cluster.engines} and cluster.learner_ranks {cluster.learner_ranks}; make them equal",
    )
    require(
        cluster.tensor_parallel == 1,
        "cluster.colocate gives an engine the one GPU of its learner rank, but "
        f"cluster.tensor_parallel is {cluster.tensor_parallel}; set it to 1",
    )
    shared = cluster.engine_gpus + cluster.learner_gpus
    require(
        shared == 0 or 0.5 < shared <= 1,
        f"{gpus(cluster)}; with cluster.colocate they are shares of one GPU: together at most 1, "
        "and more than 0.5, or two pairs could get the same GPU; 0.5 each will do",
    )
    require(
        c.sync.transport != "nccl",
        "sync.transport is nccl, which cannot connect two processes on one GPU, but "
        "cluster.colocate is true; use auto",
    )


def check_pinning(c: Config) -> None:
    """Cores are given out on this machine, to processes without GPUs."""
    cluster, fix = c.cluster, "set cluster.pin_cores=false"
    require(
        c.mode == "cluster", f"cluster.pin_cores is true, but mode=inline is one process; {fix}"
    )
    require(
        cluster.address is None,
        f"cluster.pin_cores is true, but cluster.address is {cluster.address!r}: the cores of "
        f"other nodes are not known here; {fix}",
    )
    require(
        cluster.engine_gpus == 0 and cluster.learner_gpus == 0,
        "cluster.pin_cores is true, which is for machines without GPUs, but "
        f"{gpus(cluster)}; {fix}",
    )


def check_run(c: Config) -> None:
    fault = name_fault(c.run.name)
    require(
        not fault,
        f"run.name is {c.run.name!r}, which {fault}; it names one folder in run.dir: use letters, "
        "digits, - and _, and run.dir for the place",
    )
    for key in c.run.resume_changes:
        require(
            hint_of(tuple(key.split("."))) is not None,
            f"run.resume_changes names {key!r}, which is no key of a config, such as "
            "learner.learning_rate",
        )


def gpus(cluster: ClusterConfig) -> str:
    return (
        f"cluster.engine_gpus is {cluster.engine_gpus:g} and cluster.learner_gpus is "
        f"{cluster.learner_gpus:g}"
    )
