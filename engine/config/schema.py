"""Every key of a config: its type, bounds, default and meaning. docs/config_keys.md is made of it.

The sections are plain dataclasses, so that `dataclasses.replace` works and text that names an
environment variable (secrets.Reference) stays what it is. pydantic checks what a file says against
them, in validation.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from tandem.engine.config.kinds import (
    AtLeastZero,
    Beta,
    Flag,
    FromOne,
    FromZero,
    Number,
    Options,
    Port,
    Positive,
    PositiveShare,
    Resume,
    Share,
    Stage,
)
from tandem.engine.config.names import DEFAULT_SOURCE
from tandem.engine.config.other_models import OtherModelConfig
from tandem.engine.config.scope import ScopeConfig


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained."""

    path: str = ""
    """Hugging Face folder or name, or `tandem:tiny` for the model that Tandem makes itself."""
    tokenizer: str | None = None
    """Folder or name of another tokenizer; null: the model's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in engines and learner."""
    attention: str = "sdpa"
    """`attn_implementation` of transformers; eager for Gemma 2."""
    trust_remote_code: Flag = False
    """Run Python code that comes with the model."""
    system_prompt: str | None = None
    """Put before every chat prompt; null: the chat template's own default."""


@dataclass(frozen=True)
class DatasetConfig:
    """Where rows come from, and which columns are used."""

    path: str = ""
    """.jsonl, .parquet, a Hugging Face dataset name, `reasoning_gym:TASK` or `task:sort`."""
    split: str = "train"
    """Split of a Hugging Face dataset or of generated data."""
    prompt: str = "prompt"
    """Column with the prompt: text or a list of chat messages."""
    response: str | None = None
    """Column with the expert's response; data.experts needs one. The same as `prompt`: a chat that
    ends with it."""
    chosen: str | None = None
    """Column with the better of two answers, in the place of `response`: the rows are pairs. The
    same as `prompt`: a chat that ends with it."""
    rejected: str | None = None
    """Column with the worse of two answers, in the form that `chosen` has."""
    train_on: Literal["last", "all", "all_and_calls"] = "last"
    """Of a chat in one column: its last assistant turn, all of them but tool calls, or those
    too."""
    role: str | None = None
    """Column with a word that tells demonstrations apart, for methods that ask for it."""
    scores: str | None = None
    """A .jsonl file of {id, name: number, ...}: columns that join the rows by id."""
    tools: str | None = None
    """Column with the tools that the chat template is told of: a list of JSON schemas."""
    limit: FromOne | None = None
    """Use the first so many rows."""
    options: Options = field(default_factory=dict)
    """For generated data: size, seed and options of the task; else of `datasets.load_dataset`."""


@dataclass(frozen=True)
class DataConfig:
    """Prompts and demonstrations."""

    prompts: DatasetConfig | None = None
    """Prompts to roll out."""
    experts: DatasetConfig | None = None
    """Expert demonstrations."""
    sources: dict[str, DatasetConfig] = field(default_factory=dict)
    """Further demonstrations by name, {NAME: a dataset}, for methods that ask for them."""
    evaluation: DatasetConfig | None = None
    """Held-out prompts."""
    chat: Flag | None = None
    """Apply the chat template; null: if the prompt is a list of messages."""
    max_prompt_tokens: FromOne = 1024
    """Longest prompt; what happens to longer ones says `overlong`."""
    max_expert_tokens: FromOne = 4096
    """Longest demonstration; a longer one is an error, not a cut."""
    experts_per_step: FromZero = 0
    """Demonstrations in each step."""
    shuffle: Flag = True
    """Rows in an order drawn from run.seed; false: as they stand."""
    overlong: Literal["error", "drop", "truncate_left"] = "error"
    """Rows beyond a limit; truncate_left cuts prompts, responses are never cut."""
    control_tokens: Literal["error", "escape", "allow"] = "error"
    """Control tokens in a row's text, such as <|im_end|> typed into a prompt; escape puts a space
    into them."""
    media: Literal["error", "ignore"] = "error"
    """Rows with images, video or audio; ignore trains on their text alone."""
    chat_template_kwargs: Options = field(default_factory=dict)
    """Variables of the chat template, e.g. {enable_thinking: false}."""
    template_changes: Literal["error", "allow"] = "error"
    """A chat template that drops or changes what a message says."""
    template_date: str | None = None
    """What templates take for today, e.g. '2026-01-31'; null: the day on which the run first
    started."""

    @property
    def demonstrations(self) -> dict[str, DatasetConfig]:
        """All sources of demonstrations by name, data.experts first."""
        if self.experts is None:
            return dict(self.sources)
        return {DEFAULT_SOURCE: self.experts, **self.sources}


@dataclass(frozen=True)
class RewardConfig:
    """How rollouts are scored (docs/rewards.md)."""

    functions: tuple[str, ...] = ()
    """exact, math, reasoning_gym, format, length, fake (random), or my_reward.py:score."""
    weights: tuple[Number, ...] = ()
    """One per function; none: each counts 1."""
    options: Options = field(default_factory=dict)
    """Keyword arguments of functions, by their name: {length: {max_tokens: 256}}."""
    timeout: Positive = 10.0
    """Seconds for one call."""
    workers: FromOne = 1
    """Processes that score."""
    on_error: Literal["drop", "zero", "fail"] = "drop"
    """A sample whose reward failed: drop it, count it as 0, or end the run."""
    max_error_rate: Share = 0.05
    """Share of failed rewards over the run; more stops it with the first tracebacks."""
    memory_gib: Positive | None = None
    """That a worker process may use; null: half of the machine's."""
    check_answers: Flag = True
    """exact and math: a row without a usable expected answer is refused before the run."""
    environment: tuple[str, ...] = ()
    """Names of variables that workers get beside the usual ones."""


@dataclass(frozen=True)
class RolloutConfig:
    """How engines sample."""

    backend: str = "auto"
    """auto (vllm with mode=cluster, hf with mode=inline), vllm, hf, replay, or a class of your own:
    my_backend.py:MyBackend."""
    backend_options: Options = field(default_factory=dict)
    """Keyword arguments of your own backend."""
    prompts_per_step: FromOne = 8
    """Prompts that are rolled out for one step."""
    samples_per_prompt: FromOne = 8
    """Rollouts of each prompt."""
    max_tokens: FromOne = 256
    """Longest response."""
    temperature: Number = 1.0
    """The learner divides all logits of a step with rollouts by it, those of expert tokens too; SFT
    steps use 1."""
    top_p: PositiveShare = 1.0
    """Sample from the likeliest tokens that have this much probability together."""
    staleness: FromZero = 0
    """How many versions old a rollout may be when it is trained on; 0: on-policy."""
    over_sample: FromZero = 0
    """Groups asked for beyond what a step needs; the last of them to end are aborted. More than 0
    is not reproducible."""
    max_model_len: FromOne | None = None
    """Longest sequence of an engine; null: max_prompt_tokens + max_tokens."""
    max_sequences: FromOne = 64
    """Sequences that an engine decodes at once."""
    gpu_memory_utilization: PositiveShare = 0.85
    """Share of its GPU's memory that an engine takes."""
    kv_cache_gib: Positive = 1.0
    """KV cache of an engine on CPU."""
    prefix_caching: Flag = True
    """Engines keep the KV cache of prompts that begin alike."""
    sleep: Flag = False
    """Engines give their GPU memory to the learner while it works (cluster.colocate, staleness
    0)."""
    request_timeout: Positive = 600.0
    """Seconds until an engine that does not answer counts as dead."""
    max_restarts: FromZero = 3
    """Restarts of engines in one run."""
    record: str | None = None
    """replay: the rollouts.jsonl to read."""


@dataclass(frozen=True)
class LearnerConfig:
    """How weights are trained."""

    learning_rate: Positive = 1e-6
    """Of AdamW, at the top of the schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate, over run.steps after the warm-up."""
    warmup_steps: FromZero = 0
    """Linear, counted for each set of optimizer moments from its first step (two stages: two
    warm-ups)."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Of AdamW."""
    weight_decay: AtLeastZero = 0.0
    """Of AdamW."""
    grad_clip: AtLeastZero = 1.0
    """Bound on the gradient's global norm; 0: off."""
    zero_stage: Stage = 1
    """DeepSpeed's ZeRO stage: what ranks share out (1 optimizer states, 2 gradients too, 3 weights
    too)."""
    offload_optimizer: Flag = False
    """Optimizer states in CPU memory."""
    micro_batch_tokens: FromOne = 4096
    """Packed tokens per forward and rank; a longer row gets a micro-batch of its own."""
    updates_per_batch: FromOne = 1
    """Optimizer steps per batch of rollouts; more than 1 computes old log-probs first. An SFT step
    is one."""
    epochs_per_batch: FromOne = 1
    """How often each batch is gone through, in updates_per_batch steps each time."""
    head_chunk: FromOne = 1024
    """Tokens whose logits exist at a time."""
    gradient_checkpointing: Flag = False
    """Compute activations again in the backward pass: less memory, slower steps."""
    offload_activations: Flag = False
    """What the forward pass keeps for the backward pass waits in CPU memory (learners on GPUs)."""
    offload_models: Flag = False
    """The reference and other models beside the policy wait in CPU memory while nobody asks them
    (learners on GPUs)."""
    liger: Flag = False
    """Liger's kernels for norms, rotary embeddings and MLPs (learners on GPUs; pip install
    liger-kernel)."""
    compile: Flag = False
    """torch.compile of the decoder layers: faster steps, a slower start; not with ZeRO-3."""
    entropy: Flag = True
    """Report the entropy of tokens."""
    max_skipped_steps: FromZero = 3
    """Consecutive steps with a gradient that is not finite until the run stops."""


@dataclass(frozen=True)
class SyncConfig:
    """How weights get from the learner to engines, and how both are compared."""

    transport: Literal["auto", "nccl", "ipc", "shm", "gloo"] = "auto"
    """auto: ipc where engines and learner share GPUs (cluster.colocate), nccl where they have GPUs
    of their own, shm on one machine without, else gloo."""
    bucket_mib: FromOne = 64
    """Weights that are sent at a time."""
    timeout: Positive = 300.0
    """Seconds for one transfer of all weights."""
    gate_steps: FromZero = 2
    """First steps on which log-probs of engines and learner are compared before training."""
    max_gap: AtLeastZero = 1e-4
    """float32: bound on max |engine logp - learner logp| at the gate, on its mean in every later
    step."""
    max_mean_gap: AtLeastZero = 0.08
    """bfloat16: bound on the mean, at the gate and in every step; a sixteenth of it around the
    first update."""


@dataclass(frozen=True)
class ClusterConfig:
    """Engines and learner ranks, and what each gets of the machines (mode=cluster)."""

    address: str | None = None
    """Of a running Ray cluster; null: start a local one."""
    engines: FromOne = 1
    """Rollout engines."""
    tensor_parallel: FromOne = 1
    """Tensor-parallel ranks of each engine."""
    engine_cpus: AtLeastZero = 1
    """CPUs of each engine."""
    engine_gpus: AtLeastZero = 0
    """GPUs of each engine; tensor_parallel > 1 on GPUs needs as many."""
    learner_ranks: FromOne = 1
    """Learner processes."""
    learner_cpus: AtLeastZero = 1
    """CPUs of each rank."""
    learner_gpus: AtLeastZero = 0
    """GPUs of each rank."""
    colocate: Flag = False
    """Engine i and learner rank i share a place: one node and, with fractions of a GPU, one GPU."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Of Ray's placement group."""
    deadline: Positive = 120.0
    """Seconds to wait for the placement group."""
    threads: FromOne = 1
    """OpenMP threads per process on CPU."""
    pin_cores: Flag = False
    """So many cores of its own for each engine and learner rank; one machine without GPUs."""
    port: Port | None = None
    """Rendezvous of the learner; null: any free one."""
    object_store_mib: FromOne = 150
    """Of a local Ray."""
    start_timeout: Positive = 600.0
    """Seconds until engines and learner must be up."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluations on data.evaluation."""

    every: FromZero = 0
    """Steps between evaluations; 0: only before and after."""
    temperature: AtLeastZero = 0.0
    """0: greedy."""
    samples: FromOne = 1
    """Responses to each prompt."""
    max_tokens: FromOne | None = None
    """Longest response; null: rollout.max_tokens."""
    limit: FromOne | None = None
    """Use the first so many prompts."""
    before: Flag = True
    """Evaluate before the first step too."""


@dataclass(frozen=True)
class RunConfig:
    """The run as a whole."""

    name: str = "run"
    """The run folder is dir/name."""
    dir: str = "runs"
    """Folder of run folders."""
    steps: FromOne = 10
    """Steps until the run ends."""
    token_budget: FromOne | None = None
    """End the run after so many generated and trained tokens, for comparisons at equal cost."""
    seed: FromZero = 0
    """Of every random draw."""
    checkpoint_every: FromZero = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: FromOne = 2
    """Newest checkpoints that stay."""
    resume: Resume = False
    """true: go on from the newest complete checkpoint of the run folder; auto: that, or start
    (over) where there is none yet: one command for all starts."""
    resume_changes: tuple[str, ...] = ()
    """Keys, or sections, that may differ from the config that the checkpoint was written with."""
    beside_files: Flag = False
    """Start in a folder that holds other files; those are never overwritten."""
    save_model: Flag = True
    """Write a plain Hugging Face folder at the end."""
    wandb: str | None = None
    """Name of a project of Weights & Biases."""
    tensorboard: Flag = False
    """Write TensorBoard's files into the run folder."""
    rollout_only: Flag = False
    """Generate and score, never train."""


@dataclass(frozen=True)
class Config:
    """A config as a whole."""

    __pydantic_config__: ClassVar = {
        "extra": "forbid",
        "allow_inf_nan": False,
        "use_attribute_docstrings": True,
    }

    mode: Literal["cluster", "inline"] = "cluster"
    """cluster: engines and learner ranks in processes of their own; inline: all in this one, for
    debugging."""
    model: ModelConfig = field(default_factory=ModelConfig)
    models: dict[str, OtherModelConfig] = field(default_factory=dict)
    """Models beside the one that is trained, {NAME: a model}, for methods that ask for them."""
    data: DataConfig = field(default_factory=DataConfig)
    method: Options = field(default_factory=dict)
    """`name` and the method's own options (docs/methods.md)."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    scope: ScopeConfig = field(default_factory=ScopeConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
