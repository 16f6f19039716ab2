"""The trainer's settings: optimizer, learning rate, governor, workers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from esper.config.section import PositiveFloat, PositiveInt, Section

Optimizers = Literal[
    "adamw", "sgd", "adadelta", "adafactor", "adagrad", "adam", "adamax", "asgd", "nadam", "radam", "rmsprop", "rprop",
]  # fmt: skip
"""The classes of torch.optim, but for those that cannot follow a network that grows (`tolaria.optim.UNSUITED`)."""


class OptimizerConfig(Section):
    """The host's optimizer; grafted kernels join it."""

    type: Annotated[Optimizers, BeforeValidator(lambda name: name.lower() if isinstance(name, str) else name)] = "adamw"
    """A class of torch.optim, in capitals or not."""
    lr: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Of classes that have one."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD only; of others by `options`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """More arguments of the class, such as `betas: [0.9, 0.95]`."""


class SchedulerConfig(Section):
    """Learning rate over steps."""

    type: Literal["constant", "cosine", "wsd", "onecycle"] = "constant"
    """`wsd`: warm up, stay, decay. `onecycle`: from a 25th up to the optimizer's rate and down again to almost none."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """`onecycle` takes 0 for its usual 0.3."""
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """WSD only."""


class GovernorConfig(Section):
    """When a run is sick and goes back to its last good state, besides values that are not finite."""

    window: PositiveInt = 100
    """Losses of history, against which each new one is judged."""
    min_history: PositiveInt = 20
    """No judgement of losses before so many."""
    z: PositiveFloat = 8.0
    """A loss that stands more than so many robust deviations above the history is suspect."""
    strikes: PositiveInt = 5
    """So many suspect losses in a row set the run back; one bad batch is no reason."""
    min_spread: Annotated[float, Field(ge=0)] = 0.05
    """This share of the median always counts as noise, so that a flat history does not flag a whisper."""
    watch_steps: Annotated[int, Field(ge=0)] = 10
    """Steps after a graft or a removal in which the norm of all live weights is watched. A host that grows by itself is
    nobody's fault: one with small initial weights does."""
    norm_growth: Annotated[float, Field(gt=1)] = 10.0
    """Factor by which that norm may grow meanwhile. A grower was seen to write 2e15 into weights while the loss right
    after was normal."""
    graft_weight: PositiveFloat = 1000.0
    """A kernel on trial is out of line when the root mean square of its weights exceeds the host's by this factor."""
    graft_update: PositiveFloat = 100.0
    """The same of what one step changed of them."""
    snapshots: PositiveInt = 2
    """Good states kept in memory, one an epoch: where going back to the last one did not help, it was sick itself, and
    the one before is next. Each costs what weights, buffers and the optimizer's state take (3 times the weights under
    AdamW), on their device; while a kernel is on trial the state from before its graft is kept besides. Checkpoints of
    deterministic runs hold them all."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 3
    """So often a run is set back without a healthy epoch between; then it fails: going back cannot help."""

    @model_validator(mode="after")
    def _history_fits(self) -> GovernorConfig:
        if self.min_history > self.window:
            raise ValueError(
                f"min_history {self.min_history} is more than window {self.window}: nothing is ever judged"
            )
        return self


class TolariaConfig(Section):
    """The trainer."""

    epochs: PositiveInt = 30
    batch_size: PositiveInt = 64
    """Samples a step over all workers together."""
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """0 trains in the driver's own process (laptops); 1..N starts Ray Train workers."""
    find_unused_parameters: bool = False
    """Whether workers look, at each step, which parameters of the host it did not use. A host that leaves some unused
    needs it; others pay for another walk through the graph."""
    cpus_per_worker: PositiveFloat = 0.5
    use_gpu: bool = False
    num_threads: PositiveInt = 1
    """Threads of torch in each trainer."""
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    freeze_host: bool = False
    """Whether the host's parameters stand still while a kernel that is blended in has not proven itself: only kernels
    learn then. Statistics of batch norm follow the data all the same."""
    clip_norm: PositiveFloat | None = 1.0
    """Gradient norm limit, host and seeds counted apart; null is no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of forwards, shadows and validation among them; `bf16` is autocast. Weights and losses stay in float32."""
    accumulate: PositiveInt = 1
    """Parts into which each worker's share of a step is split, one after the other: less memory, the same step (but for
    batch norm, which sees one part at a time). A kernel in TRAINING is updated once for each part."""
    patience: PositiveInt | None = None
    """Stop after so many epochs without a better `best_metric`, once no adaptation is under way; null never stops."""
    best_metric: Literal["val_loss", "val_metric"] = "val_loss"
    checkpoint_every: PositiveInt = 1
    """Epochs between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    agree_s: PositiveFloat = 60.0
    """A worker that has not got a kernel after so long, or does not answer to a command, makes all of them go on
    without it. Deterministic mode waits for it instead."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """How often Ray Train restarts workers that died."""
    governor: GovernorConfig = GovernorConfig()
