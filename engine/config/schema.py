"""Every key of a config: its meaning and its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    # Hugging Face folder or name, or `tandem:tiny` for the model the repo makes itself
    path: str = ""
    tokenizer: str | None = None  # default: the model's own
    dtype: Literal["float32", "bfloat16"] = "float32"
    # attn_implementation of transformers; eager for Gemma 2
    attention: str = "sdpa"
    trust_remote_code: bool = False
    # put before every chat prompt; None: the chat template's own default
    system_prompt: str | None = None


@dataclass(frozen=True)
class DatasetConfig:
    # .jsonl, .parquet, a Hugging Face dataset name, `reasoning_gym:TASK` or `task:sort`
    path: str = ""
    split: str = "train"  # of a Hugging Face dataset
    # column with the prompt: a string or a list of chat messages
    prompt: str = "prompt"
    # column with the expert's response; required for data.experts. The same as prompt: a chat that
    # ends with it
    response: str | None = None
    # column with the tools that the chat template is told of: a list of JSON schemas
    tools: str | None = None
    limit: int | None = None  # use the first so many rows
    # for generated data: size, seed and task options
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    prompts: DatasetConfig | None = None  # prompts to roll out
    experts: DatasetConfig | None = None  # expert demonstrations
    evaluation: DatasetConfig | None = None  # held-out prompts
    # apply the chat template; None: if the prompt is a message list
    chat: bool | None = None
    max_prompt_tokens: int = 1024
    max_expert_tokens: int = 4096  # a longer demonstration is an error, not a cut
    experts_per_step: int = 0
    shuffle: bool = True
    # rows beyond a limit; truncate_left cuts prompts, responses are never cut
    overlong: Literal["error", "drop", "truncate_left"] = "error"
    # in a row's text: <|im_end|> typed into a prompt; escape puts a space into it
    control_tokens: Literal["error", "escape", "allow"] = "error"
    # rows with images, video or audio: ignore trains on their text alone
    media: Literal["error", "ignore"] = "error"
    # variables of the chat template, e.g. {enable_thinking: false}
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    # a template that drops or changes what a message says
    template_changes: Literal["error", "allow"] = "error"
    # what templates take for today, e.g. '2026-01-31'; None: the day on which the run first started
    template_date: str | None = None


@dataclass(frozen=True)
class RewardConfig:
    # exact, math, reasoning_gym, format, length, or my_reward.py:score
    functions: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # one per function; () = all 1
    # keyword arguments per function, by its name: {length: {max_tokens: 256}}
    options: dict[str, Any] = field(default_factory=dict)
    timeout: float = 10.0  # seconds per call
    workers: int = 1  # processes
    on_error: Literal["drop", "zero", "fail"] = "drop"
    # over the run; more stops it with the first tracebacks
    max_error_rate: float = 0.05
    # that a worker process may use; None: half of the machine's
    memory_gib: float | None = None
    # exact and math: a row without a usable expected answer is refused before the run
    check_answers: bool = True
    # names of variables that workers get beside the usual ones (docs/rewards.md)
    environment: tuple[str, ...] = ()


@dataclass(frozen=True)
class RolloutConfig:
    # auto: vllm with mode=cluster, hf with mode=inline
    backend: Literal["auto", "vllm", "hf", "replay"] = "auto"
    prompts_per_step: int = 8
    samples_per_prompt: int = 8
    max_tokens: int = 256
    # the learner divides all logits of a step with rollouts by it, expert tokens' too; SFT steps
    # use 1
    temperature: float = 1.0
    top_p: float = 1.0
    # how many versions old a rollout may be when it is trained on; 0 = on-policy
    staleness: int = 0
    # groups asked for beyond what a step needs; the last of them to end are aborted. > 0 is not
    # reproducible
    over_sample: int = 0
    max_model_len: int | None = None  # default: max_prompt_tokens + max_tokens
    max_sequences: int = 64  # sequences an engine decodes at once
    gpu_memory_utilization: float = 0.85
    kv_cache_gib: float = 1.0  # CPU engines only
    prefix_caching: bool = True
    # engines give their GPU memory to the learner while it works (cluster.colocate, staleness 0)
    sleep: bool = False
    # seconds until an engine that does not answer counts as dead
    request_timeout: float = 600.0
    max_restarts: int = 3  # engine restarts per run
    record: str | None = None  # replay: rollouts.jsonl to read


@dataclass(frozen=True)
class LearnerConfig:
    learning_rate: float = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    # linear, counted for each set of optimizer moments from its first step (two stages: two
    # warm-ups)
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # global norm; 0 = off
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False  # optimizer states in CPU memory
    # packed tokens per forward and rank; a longer row gets a micro-batch of its own
    micro_batch_tokens: int = 4096
    # optimizer steps per batch of rollouts; > 1 computes old log-probs first. An SFT step is one
    updates_per_batch: int = 1
    # how often each batch is gone through, in updates_per_batch steps each time
    epochs_per_batch: int = 1
    head_chunk: int = 1024  # tokens whose logits exist at a time
    gradient_checkpointing: bool = False
    # what forward keeps for backward waits in CPU memory (GPU learners)
    offload_activations: bool = False
    # Liger's kernels for norms, rotary embeddings and MLPs (GPU learners; pip install liger-kernel)
    liger: bool = False
    # torch.compile of the decoder layers: faster steps, a slower start; not with ZeRO-3
    compile: bool = False
    entropy: bool = True  # report token entropy
    # consecutive non-finite gradients until the run stops
    max_skipped_steps: int = 3


@dataclass(frozen=True)
class SyncConfig:
    # auto: ipc where engines and learner share GPUs (cluster.colocate), nccl where they have GPUs
    # of their own, shm on one machine without, else gloo
    transport: Literal["auto", "nccl", "ipc", "shm", "gloo"] = "auto"
    bucket_mib: int = 64
    timeout: float = 300.0
    # first steps on which rollout and learner log-probs are compared before training
    gate_steps: int = 2
    # float32: bound on max |rollout logp - learner logp| at the gate, on its mean in every later
    # step
    max_gap: float = 1e-4
    # bfloat16: bound on the mean, at the gate and in every step; a sixteenth of it around the first
    # update
    max_mean_gap: float = 0.08


@dataclass(frozen=True)
class ClusterConfig:
    # of a running Ray cluster; None: start a local one
    address: str | None = None
    engines: int = 1
    tensor_parallel: int = 1
    engine_cpus: float = 1
    # per engine; tensor_parallel > 1 on GPUs needs as many
    engine_gpus: float = 0
    learner_ranks: int = 1
    learner_cpus: float = 1  # per rank
    learner_gpus: float = 0
    # engine i and learner rank i share a place: one node and, with fractions of a GPU, one GPU
    colocate: bool = False
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    deadline: float = 120.0  # seconds to wait for the placement group
    threads: int = 1  # OpenMP threads per process on CPU
    # so many cores of its own for each engine and learner rank; one machine without GPUs
    pin_cores: bool = False
    port: int | None = None  # rendezvous of the learner; None: any free one
    object_store_mib: int = 150  # of a local Ray
    start_timeout: float = 600.0  # seconds until engines and learner must be up


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0  # steps; 0 = only before and after
    temperature: float = 0.0
    samples: int = 1
    max_tokens: int | None = None  # default: rollout.max_tokens
    limit: int | None = None  # prompts
    before: bool = True


@dataclass(frozen=True)
class RunConfig:
    name: str = "run"
    dir: str = "runs"  # the run folder is dir/name
    steps: int = 10
    # end the run after so many generated + trained tokens, for comparisons at equal cost
    token_budget: int | None = None
    seed: int = 0
    checkpoint_every: int = 0  # steps; 0 = only at the end
    keep_checkpoints: int = 2
    # true: go on from the newest complete checkpoint of the run folder; auto: that, or start (over)
    # where there is none yet: one command for all starts
    resume: Literal[False, True, "auto"] = False
    # keys, or sections, that may differ from the config that the checkpoint was written with
    resume_changes: tuple[str, ...] = ()
    # start in a folder that holds other files; those are never overwritten
    beside_files: bool = False
    save_model: bool = True  # a plain Hugging Face folder at the end
    wandb: str | None = None  # project name
    tensorboard: bool = False
    rollout_only: bool = False  # generate and score, never train


@dataclass(frozen=True)
class Config:
    mode: Literal["cluster", "inline"] = "cluster"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: dict[str, Any] = field(default_factory=dict)  # name and the method's own options
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def engine_count(self) -> int:
        """Rollout engines that run: none where rollouts are replayed."""
        return 0 if self.rollout.backend == "replay" else self.cluster.engines
