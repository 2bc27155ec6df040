"""The configuration of a run: what is learned (`RunConfig`) and where it runs (its `profile`).

Every table is a frozen pydantic model that refuses unknown keys; the text under a field is its documentation, and
docs/configuration.md is generated from it. Reading files and reporting mistakes is slime.config_file's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base_dir")
    return Path(base, path) if base else path


FilePath = Annotated[Path, AfterValidator(_beside_the_file)]
"""A path that is relative to the file it is written in."""
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Seconds = Annotated[float, Field(gt=0)]
OFF_POLICY_IMPORTANCE_CAP = 2.0
MIXTURE_SLOTS = 1024
"""Positions after which the mixture of several prompt sources repeats: shares are kept to 1/1024."""


class Table(BaseModel):
    """Base of every table."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class ModelConfig(Table):
    path: FilePath
    """Hugging Face directory: config.json, safetensors weights and a tokenizer. Relative to the run file."""


class SourceConfig(Table):
    """One file of prompts, among several."""

    path: FilePath
    """Prompts, ``.jsonl`` or ``.parquet``."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """How many of the prompts that are issued come from here, relative to the other weights, whatever its size."""
    tags: tuple[str, ...] = ()
    """Added to the tags of each of its prompts."""


def _as_sources(value: Any) -> Any:
    return [{"path": value}] if isinstance(value, str | Path) else value


class DataConfig(Table):
    train: Annotated[tuple[SourceConfig, ...], BeforeValidator(_as_sources), Field(min_length=1)]
    """Prompts, ``.jsonl`` or ``.parquet``: ``messages`` or ``text``, and ``label``, ``tags``, ``metadata``, ``id``. One
    file, or several that are mixed by weight: ``[[data.train]]``."""
    eval: FilePath | None = None
    """Prompts of a separate evaluation set. Without it, `held_out` of the training prompts are set apart by hash."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the questions of `train` kept for evaluation. Chosen by hash: stable when rows are added or moved."""
    require_label: bool = True
    """Refuse rows without a label. Switch off for rewards that need none."""
    shuffle: bool = True
    """Visit prompts in a new order each epoch, a function of the seed alone."""

    @model_validator(mode="after")
    def _weights_fit(self) -> DataConfig:
        total = sum(source.weight for source in self.train)
        for source in self.train:
            if source.weight * MIXTURE_SLOTS < total:
                raise ValueError(
                    f"data.train: {source.path} has the weight {source.weight:g} of {total:g} in all, and shares below "
                    f"1/{MIXTURE_SLOTS} cannot be kept"
                )
        return self


class RolloutConfig(Table):
    prompts_per_step: PositiveInt = 16
    """Groups trained in one step."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Samples of each group; one alone would have nothing to be compared with."""
    max_response_tokens: PositiveInt = 512
    """A longer answer is cut there and counted as truncated."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Sampling temperature; the trainer divides its logits by the same."""
    generate: str | None = None
    """Hook ``"./file.py:name"``: ``async (prompt, sample, client)`` fills a sample; `client` is a rollout.Turns."""


class BufferConfig(Table):
    max_staleness: NonNegativeInt = 0
    """Highest age, in weight versions, of any trained token. 0 is strictly on-policy; more lets steps overlap."""
    oversample: Annotated[float, Field(ge=1)] | None = None
    """Groups generating or waiting to be trained, as a multiple of a step's; ``max_staleness + 1`` at most and by
    default."""
    stragglers: Literal["wait", "requeue"] = "wait"
    """A group that would be too old for every later step: the step waits for it, or it is begun again."""
    filter: str | tuple[str, ...] = "all"
    """Which graded groups are trained: ``"all"``, ``"informative"``, ``"not_truncated"``, ``"not_aborted"``, a hook
    ``"./file.py:name"``, or a list of them, of which the first to object drops the group."""
    difficulty: FilePath | None = None
    """File with the pass statistics of every prompt; runs that name the same one share it. By default
    ``difficulty.sqlite`` in `run_dir`."""

    @property
    def filters(self) -> tuple[str, ...]:
        """`filter` as a list."""
        return (self.filter,) if isinstance(self.filter, str) else self.filter

    @model_validator(mode="after")
    def _oversample_fits(self) -> BufferConfig:
        if self.oversample is not None and self.oversample > self.max_staleness + 1:
            raise ValueError(
                f"buffer.oversample = {self.oversample:g} is more than buffer.max_staleness + 1 = "
                f"{self.max_staleness + 1}: the groups beyond would be too old when their step comes"
            )
        return self


class RewardConfig(Table):
    fn: str
    """``"exact"``, ``"math"`` or a function of yours, ``"./reward.py:score"``; it is called with the sample."""
    timeout_s: Seconds = 10.0
    """A call that takes longer is killed with its worker process; it costs its sample, never the run."""
    num_workers: PositiveInt = 2
    """Worker processes."""
    max_failure_rate: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The run stops when more of the last step's worth of samples got no verdict: no training on rubbish."""


class LossConfig(Table):
    fn: str | None = None
    """Hook ``"./file.py:name"`` in place of the built-in policy loss; trainer.loss.policy_loss shows its signature."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower clip: the probability ratio is not pushed below ``1 - clip_low``."""
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    """Upper clip ("clip-higher"): not above ``1 + clip_high``."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on the loss of tokens with a negative advantage, as a multiple of it."""
    aggregation: Literal["sequence", "token", "prompt", "constant"] = "sequence"
    """How token losses become one: mean over rollouts of token means, over tokens, over prompts, or over a constant."""
    importance_cap: Annotated[float, Field(gt=0)] | None = None
    """Truncated importance weight ``min(exp(train_logprob - rollout_logprob), cap)``. By default none on-policy, and
    2.0 where ``buffer.max_staleness`` is above 0; a very large cap cuts nothing."""


class AdvantageConfig(Table):
    fn: str | None = None
    """Hook ``"./file.py:name"`` in place of the built-in group advantage: ``(groups) -> list[list[float]]``."""
    norm: Literal["std", "mean"] = "std"
    """``"std"``: (r - mean) / (std + 1e-6) within the group; ``"mean"``: r - mean."""


class OptimizerConfig(Table):
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6
    """Peak learning rate."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Final learning rate as a share of `lr`; 1.0 with the constant schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay after the warm-up, over `num_steps`."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay (AdamW); biases and norms are spared."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """AdamW's moment decays."""
    clip_grad: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm; a larger gradient is scaled down to it."""


class TrainerConfig(Table):
    updates_per_step: PositiveInt = 1
    """Optimizer updates a step; with more than one, log-probs before the first are recomputed for the ratio."""
    loss: LossConfig = LossConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    optimizer: OptimizerConfig = OptimizerConfig()


class EvalConfig(Table):
    every: PositiveInt = 10
    """Steps between evaluations; one also runs before the first step and one after the last."""
    num_prompts: PositiveInt = 128
    """At most so many held-out prompts."""
    samples_per_prompt: PositiveInt = 1
    """pass@1 is the mean over all samples; pass@k is reported for this k."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    """0 is greedy."""
    pass_reward: float = 1.0
    """A sample passes when its reward reaches this."""


class CheckpointConfig(Table):
    every: PositiveInt = 10
    """Steps between commits; the last step always commits."""
    keep: PositiveInt = 2
    """Older checkpoints are removed."""


class HooksConfig(Table):
    on_step: str | None = None
    """``"./file.py:name"``: ``(step, metrics)``, after every step."""


class SftConfig(Table):
    """`slime sft`: supervised fine-tuning with the same trainer."""

    data: FilePath
    """``.jsonl`` or ``.parquet`` with ``messages`` or ``text`` for the prompt and ``response``."""
    num_steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt = 64
    """Sequences a step."""
    output: FilePath
    """Hugging Face directory that is written at the end."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-5)


class PlacementConfig(Table):
    mode: Literal["colocated"] = "colocated"
    """``"colocated"``: trainer and engines take turns on the same devices."""
    ray_address: str | None = None
    """Join the Ray cluster at this address (``host:port`` or ``auto``). By default one is started for the run."""


class EngineConfig(Table):
    num_engines: PositiveInt = 1
    """SGLang servers, one device each."""
    max_running_requests: PositiveInt = 128
    """Sequences one engine decodes at a time."""
    start_timeout_s: Seconds = 300.0
    """An engine that is not healthy by then is an error that shows its last lines."""
    request_timeout_s: Seconds = 600.0
    """Deadline of one generation request."""
    deterministic: bool = False
    """Sample from seeds of (run seed, prompt, epoch, sample): a run repeats bit for bit. Slower decoding."""
    base_port: Annotated[int, Field(ge=1024, le=65000)] | None = None
    """First port to try; by default free ones are taken."""
    sglang: dict[str, Any] = {}
    """SGLang's own server options, by their names in its ServerArgs, e.g. ``mem_fraction_static = 0.8``."""


class RanksConfig(Table):
    num_ranks: PositiveInt = 1
    """Training processes, one a device; all data-parallel."""
    tokens_per_microbatch: PositiveInt = 8192
    """Tokens packed into one forward and backward pass; a longer sequence gets one of its own."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 keeps fp32 master weights, gradients and moments."""
    recompute: bool = False
    """Recompute activations in the backward pass: less memory, a third more work."""
    step_timeout_s: Seconds = 3600.0
    """A training step that takes longer ends the run."""
    distributed_timeout_s: Seconds = 600.0
    """A collective that takes longer ends the run."""
    megatron: dict[str, Any] = {}
    """Megatron-core's own TransformerConfig fields."""


class Profile(Table):
    """Where a run happens. Shipped: cpu, 1gpu, 8gpu; or a TOML file of your own."""

    device: Literal["cpu", "cuda"] = "cpu"
    """What computes."""
    threads_per_process: PositiveInt = 1
    """CPU threads of each engine and each training process."""
    buffer_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port on 127.0.0.1 at which a run takes rollouts from other programs; 0 is any that is free. By default none."""
    placement: PlacementConfig = PlacementConfig()
    engine: EngineConfig = EngineConfig()
    trainer: RanksConfig = RanksConfig()

    @property
    def num_devices(self) -> int:
        """Devices a colocated run takes turns on."""
        return max(self.engine.num_engines, self.trainer.num_ranks)


class RunConfig(Table):
    """One run of `slime train`."""

    run_dir: Path
    """Everything the run writes. The same command continues a run that stopped. Relative to the working directory."""
    num_steps: PositiveInt = 100
    """Training steps of the whole run."""
    seed: NonNegativeInt = 0
    """Seeds the order of the data, sampling in deterministic mode and initialisation."""
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    rollout: RolloutConfig = RolloutConfig()
    buffer: BufferConfig = BufferConfig()
    trainer: TrainerConfig = TrainerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    hooks: HooksConfig = HooksConfig()
    profile: Profile = Profile()

    @property
    def policy_trainer(self) -> TrainerConfig:
        """`trainer`, with the importance weight that tokens of older weights need unless another is asked for."""
        loss = self.trainer.loss
        if self.buffer.max_staleness == 0 or loss.importance_cap is not None:
            return self.trainer
        capped = loss.model_copy(update={"importance_cap": OFF_POLICY_IMPORTANCE_CAP})
        return self.trainer.model_copy(update={"loss": capped})

    @model_validator(mode="after")
    def _updates_fit(self) -> RunConfig:
        if self.trainer.updates_per_step > self.rollout.prompts_per_step:
            raise ValueError(
                f"trainer.updates_per_step = {self.trainer.updates_per_step} is more than "
                f"rollout.prompts_per_step = {self.rollout.prompts_per_step}: some updates would have no group"
            )
        return self

    @model_validator(mode="after")
    def _greedy_fits(self) -> RunConfig:
        if self.profile.engine.deterministic and self.eval.temperature == 0:
            raise ValueError(
                "eval.temperature = 0 does not go with profile.engine.deterministic = true: a greedy request changes "
                "what seeded ones beside it sample"
            )
        return self


class SftRunConfig(Table):
    """One run of `slime sft`."""

    seed: NonNegativeInt = 0
    """Seeds the order of the data."""
    model: ModelConfig
    sft: SftConfig
    profile: Profile = Profile()
