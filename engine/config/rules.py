"""The rules that span keys of a config, and the bounds of single ones: checked by `parse.load`.

What only the method can tell is checked in launch/check_config.py.
"""

from __future__ import annotations

import datetime

from tandem.engine.config.keys import hint_of, setting
from tandem.engine.config.names import RESERVED, name_fault
from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def validate(c: Config) -> None:
    """Every rule that spans keys.

    Raises ConfigError naming both values and what to change; never edits.
    """
    require(
        bool(c.model.path),
        "model.path is not set: name a Hugging Face folder or model, or tandem:tiny",
    )
    require(
        isinstance(c.method.get("name"), str),
        (
            f"method.name is {c.method.get('name', 'not set')}: choose one of `tandem methods`, "
            "or a path my_method.py:MyMethod"
        ),
    )
    for key, low in (
        ("rollout.prompts_per_step", 1),
        ("rollout.samples_per_prompt", 1),
        ("rollout.max_tokens", 1),
        ("rollout.staleness", 0),
        ("rollout.over_sample", 0),
        ("rollout.max_sequences", 1),
        ("data.max_prompt_tokens", 1),
        ("data.max_expert_tokens", 1),
        ("data.experts_per_step", 0),
        ("reward.workers", 1),
        ("learner.micro_batch_tokens", 1),
        ("learner.updates_per_batch", 1),
        ("learner.epochs_per_batch", 1),
        ("learner.head_chunk", 1),
        ("learner.warmup_steps", 0),
        ("cluster.engines", 1),
        ("cluster.tensor_parallel", 1),
        ("cluster.learner_ranks", 1),
        ("cluster.threads", 1),
        ("eval.every", 0),
        ("eval.samples", 1),
        ("run.steps", 1),
        ("run.checkpoint_every", 0),
        ("run.keep_checkpoints", 1),
        ("run.seed", 0),
        ("run.token_budget", 1),
        ("rollout.max_restarts", 0),
        ("reward.max_error_rate", 0),
        ("learner.grad_clip", 0),
        ("learner.weight_decay", 0),
        ("learner.max_skipped_steps", 0),
        ("sync.gate_steps", 0),
        ("sync.max_gap", 0),
        ("sync.max_mean_gap", 0),
        ("sync.bucket_mib", 1),
        ("cluster.engine_cpus", 0),
        ("cluster.engine_gpus", 0),
        ("cluster.learner_cpus", 0),
        ("cluster.learner_gpus", 0),
        ("cluster.port", 1),
        ("cluster.object_store_mib", 1),
        ("eval.temperature", 0),
        ("eval.limit", 1),
        ("eval.max_tokens", 1),
    ):
        value = setting(c, key)
        require(value is None or value >= low, f"{key} is {value}, must be at least {low}")
    for key in (
        "reward.timeout",
        "rollout.kv_cache_gib",
        "rollout.request_timeout",
        "sync.timeout",
        "cluster.deadline",
        "cluster.start_timeout",
    ):
        require(setting(c, key) > 0, f"{key} is {setting(c, key)}, must be > 0")
    require(
        c.reward.memory_gib is None or c.reward.memory_gib > 0,
        (
            f"reward.memory_gib is {c.reward.memory_gib}, must be > 0, or null for half of the "
            "machine's memory"
        ),
    )
    for key, high in (("reward.max_error_rate", 1), ("cluster.port", 65535)):
        require(
            (setting(c, key) or 0) <= high, f"{key} is {setting(c, key)}, must be at most {high}"
        )
    for key in ("rollout.top_p", "rollout.gpu_memory_utilization"):
        require(0 < setting(c, key) <= 1, f"{key} is {setting(c, key)}, must be in (0, 1]")
    require(
        all(0 <= beta < 1 for beta in c.learner.betas),
        f"learner.betas is {list(c.learner.betas)}, both must be in [0, 1)",
    )
    fault = name_fault(c.run.name)
    require(
        not fault,
        (
            f"run.name is {c.run.name!r}, which {fault}; it names one folder in run.dir: use "
            "letters, digits, - and _, and run.dir for the place"
        ),
    )
    for key in c.run.resume_changes:
        require(
            hint_of(tuple(key.split("."))) is not None,
            (
                f"run.resume_changes names {key!r}, which is no key of a config, such as "
                "learner.learning_rate"
            ),
        )
    require(
        c.rollout.temperature > 0,
        (
            f"rollout.temperature is {c.rollout.temperature}, must be > 0: greedy samples have "
            "no log-prob to train on (eval.temperature may be 0)"
        ),
    )
    require(
        c.rollout.top_p == 1 or c.sync.gate_steps == 0,
        f"rollout.top_p is {c.rollout.top_p}, so engines sample from a truncated "
        "distribution, which the learner's log-probs are not of: the comparison of both "
        "would stop "
        "the run at once; set rollout.top_p=1, or give that check up with sync.gate_steps=0",
    )
    require(
        c.learner.learning_rate > 0,
        f"learner.learning_rate is {c.learner.learning_rate}, must be > 0",
    )
    require(
        len(c.reward.weights) in (0, len(c.reward.functions)),
        (
            f"reward.weights has {len(c.reward.weights)} entries for {len(c.reward.functions)} "
            "reward.functions; give one weight per function or none"
        ),
    )
    require(
        c.mode == "inline" or c.learner.zero_stage < 3 or not c.learner.compile,
        (
            "learner.compile is true with learner.zero_stage 3, whose parameters come and go "
            "inside the layers; use zero_stage 2 or less, or set learner.compile=false"
        ),
    )
    for key in ("learner.liger", "learner.offload_activations"):
        require(
            not setting(c, key) or c.cluster.learner_gpus > 0,
            (
                f"{key} is true, which is for learners on GPUs, but cluster.learner_gpus is 0; "
                f"set {key}=false"
            ),
        )
    require(
        c.learner.zero_stage > 0 or not c.learner.offload_optimizer,
        (
            "learner.offload_optimizer is true with learner.zero_stage 0, which has nothing to "
            "offload; use zero_stage 1, 2 or 3, or switch it off"
        ),
    )
    name = c.method["name"]
    require(
        c.mode == "inline" or not name.startswith("__main__:"),
        f"method.name is {name!r}, a class of the script or notebook that runs, which the "
        "processes of mode=cluster do not have; "
        "write the class into a file and name it my_method.py:MyMethod, or use mode=inline",
    )
    require(
        c.rollout.backend != "replay" or c.rollout.record is not None,
        "rollout.backend is replay, but rollout.record names no rollouts.jsonl",
    )
    require(
        c.rollout.backend != "replay" or c.data.evaluation is None,
        (
            "rollout.backend is replay, which cannot answer new prompts, but data.evaluation is "
            "set; set data.evaluation=null and evaluate the saved model"
        ),
    )
    require(
        c.rollout.over_sample == 0 or (c.mode == "cluster" and c.rollout.backend != "replay"),
        f"rollout.over_sample is {c.rollout.over_sample}, but "
        f"{'rollout.backend is replay' if c.rollout.backend == 'replay' else 'mode is inline'}, "
        "where the groups of a step end together and none can be aborted; set "
        "rollout.over_sample=0, or use mode=cluster with vLLM",
    )
    require(
        not (c.mode == "cluster" and c.rollout.backend == "hf"),
        (
            "rollout.backend hf runs in one process, but mode is cluster; use mode=inline or "
            "backend vllm"
        ),
    )
    require(
        not (c.mode == "inline" and c.rollout.backend == "vllm"),
        (
            "mode=inline runs without vLLM, but rollout.backend is vllm; use mode=cluster or "
            "backend hf"
        ),
    )
    require(
        not (c.mode == "inline" and c.cluster.learner_ranks > 1),
        (
            "mode=inline is one process, but cluster.learner_ranks is "
            f"{c.cluster.learner_ranks}; use mode=cluster or learner_ranks=1"
        ),
    )
    check_templates(c)
    check_sharing(c)
    require(
        c.cluster.colocate
        or c.cluster.engine_gpus == 0
        or c.cluster.engine_gpus >= c.cluster.tensor_parallel,
        (
            f"cluster.engine_gpus is {c.cluster.engine_gpus} for tensor_parallel "
            f"{c.cluster.tensor_parallel}; an engine needs one GPU per tensor-parallel rank"
        ),
    )
    require(
        (c.cluster.engine_gpus > 0) == (c.cluster.learner_gpus > 0)
        or c.sync.transport in ("shm", "gloo"),
        f"cluster.engine_gpus is {c.cluster.engine_gpus} and cluster.learner_gpus is "
        f"{c.cluster.learner_gpus}; with GPUs on one side only set sync.transport=shm "
        "(one machine) or gloo",
    )
    require(
        c.sync.transport != "nccl" or (c.cluster.engine_gpus > 0 and c.cluster.learner_gpus > 0),
        (
            "sync.transport is nccl, which needs GPUs on both sides, but cluster.engine_gpus is "
            f"{c.cluster.engine_gpus} and cluster.learner_gpus {c.cluster.learner_gpus}; use "
            "auto or gloo"
        ),
    )
    require(
        c.sync.transport != "ipc"
        or (c.cluster.colocate and c.cluster.engine_gpus > 0 and c.cluster.learner_gpus > 0),
        "sync.transport is ipc, which needs engines and learner on the same GPUs, but "
        "cluster.colocate is "
        f"{str(c.cluster.colocate).lower()}, cluster.engine_gpus {c.cluster.engine_gpus} and "
        f"cluster.learner_gpus {c.cluster.learner_gpus}; use auto",
    )
    need = c.data.max_prompt_tokens + max(c.rollout.max_tokens, c.eval.max_tokens or 0)
    require(
        c.rollout.max_model_len is None or c.rollout.max_model_len >= need,
        (
            f"rollout.max_model_len is {c.rollout.max_model_len}, but data.max_prompt_tokens + "
            f"rollout.max_tokens (or eval.max_tokens, if larger) is {need}; raise it or lower "
            "them"
        ),
    )


def check_templates(c: Config) -> None:
    """What is given to chat templates. Raises ConfigError."""
    for name in c.data.chat_template_kwargs:
        require(
            name not in RESERVED,
            f"data.chat_template_kwargs has {name!r}, which Tandem sets itself; remove it",
        )
    if c.data.template_date is not None:
        try:
            datetime.datetime.fromisoformat(c.data.template_date)
        except ValueError:
            require(
                False,
                (
                    f"data.template_date is {c.data.template_date!r}, expected a date such as "
                    "'2026-01-31', or null"
                ),
            )


def check_sharing(c: Config) -> None:
    """Who shares what: colocated engines and ranks, engines that sleep, processes with cores of
    their own. Raises ConfigError.
    """
    k, gpus = (
        c.cluster,
        (
            f"cluster.engine_gpus is {c.cluster.engine_gpus:g} and cluster.learner_gpus is "
            f"{c.cluster.learner_gpus:g}"
        ),
    )
    if k.colocate:
        require(
            c.mode == "cluster",
            (
                "cluster.colocate is true, but mode=inline is one process anyway; set "
                "cluster.colocate=false"
            ),
        )
        require(
            k.engines == k.learner_ranks,
            (
                "cluster.colocate pairs each engine with a learner rank, but cluster.engines is "
                f"{k.engines} and cluster.learner_ranks {k.learner_ranks}; make them equal"
            ),
        )
        require(
            k.tensor_parallel == 1,
            (
                "cluster.colocate gives an engine the one GPU of its learner rank, but "
                f"cluster.tensor_parallel is {k.tensor_parallel}; set it to 1"
            ),
        )
        require(
            k.engine_gpus + k.learner_gpus == 0 or 0.5 < k.engine_gpus + k.learner_gpus <= 1,
            f"{gpus}; with cluster.colocate they are shares of one GPU: together at most 1, "
            "and more than 0.5, or two pairs could get the same GPU; "
            "0.5 each will do",
        )
        require(
            c.sync.transport != "nccl",
            (
                "sync.transport is nccl, which cannot connect two processes on one GPU, but "
                "cluster.colocate is true; use auto"
            ),
        )
    if c.rollout.sleep:
        require(
            k.colocate and k.engine_gpus > 0 and k.learner_gpus > 0,
            "rollout.sleep is true: an engine gives its GPU memory to the learner rank on "
            "the same GPU, but cluster.colocate is "
            f"{str(k.colocate).lower()}, {gpus}; set cluster.colocate=true and 0.5 GPUs for "
            "each, or rollout.sleep=false",
        )
        require(
            c.rollout.backend != "replay",
            (
                "rollout.sleep is true, but rollout.backend is replay, which has no engines; set "
                "rollout.sleep=false"
            ),
        )
        require(
            c.rollout.staleness == 0,
            f"rollout.sleep is true, but rollout.staleness is {c.rollout.staleness}, with "
            "which engines generate while the learner works; set it to 0, "
            "or rollout.sleep=false",
        )
    if k.pin_cores:
        fix = "set cluster.pin_cores=false"
        require(
            c.mode == "cluster", f"cluster.pin_cores is true, but mode=inline is one process; {fix}"
        )
        require(
            k.address is None,
            (
                f"cluster.pin_cores is true, but cluster.address is {k.address!r}: the cores of "
                f"other nodes are not known here; {fix}"
            ),
        )
        require(
            k.engine_gpus == 0 and k.learner_gpus == 0,
            f"cluster.pin_cores is true, which is for machines without GPUs, but {gpus}; {fix}",
        )
