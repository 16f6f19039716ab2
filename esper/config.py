"""The configuration of a run: frozen pydantic models, read from YAML, then dotted overrides (`tolaria.epochs=2`).

Parsing needs neither torch nor ray, so that `--help`, `--dry-run` errors and completion answer at once. What a key
means is said where it stands; defaults suit a laptop.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from esper.leyline.errors import ConfigError
from esper.leyline.limits import IRLimits
from esper.leyline.messages import Topic

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


Strategy = Literal["ramp", "direct", "grad_norm_gated", "drift_controlled", "performance_linked"]
"""How a kernel enters the live path."""

# ---------------------------------------------------------------- data


class DigitsData(Section):
    """The digits set inside scikit-learn: 1,797 real 8x8 images, ten classes."""

    type: Literal["digits"] = "digits"
    layout: Literal["flat", "image"] = "image"
    """`flat` gives (B, 64), `image` gives (B, 1, 8, 8)."""
    val_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    test_fraction: Annotated[float, Field(ge=0, lt=0.5)] = 0.2


class SyntheticData(Section):
    """Made-up pictures, a problem for each `seed`: every class is a mixture of smooth random templates, moved about and
    drowned in noise. What policies are trained on, so that real data are left to examine them.
    """

    type: Literal["synthetic"] = "synthetic"
    layout: Literal["flat", "image"] = "image"
    """`flat` gives (B, channels * size * size), `image` gives (B, channels, size, size)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of templates and samples. That of the run changes neither."""
    samples: Annotated[int, Field(ge=40)] = 1800
    """In all three parts together."""
    classes: Annotated[int, Field(ge=2)] = 10
    clusters: PositiveInt = 3
    """Templates of each class."""
    size: Annotated[int, Field(ge=2)] = 8
    """Side in pixels."""
    channels: PositiveInt = 1
    shift: Annotated[int, Field(ge=0)] = 1
    """Pixels by which a template is moved at most, each way; what leaves on one side comes back on the other."""
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    """Standard deviation of what is added, in that of the templates."""
    val_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    test_fraction: Annotated[float, Field(ge=0, lt=0.5)] = 0.2


class ParquetImageData(Section):
    """Encoded images in parquet files of the Hugging Face schema: `<path>/train.parquet`, `<path>/test.parquet`."""

    type: Literal["parquet_images"] = "parquet_images"
    path: str
    """Folder or any fsspec address. A relative path is also looked up below `ESPER_DATA`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the fsspec driver, for a path with a scheme. Secrets belong in its environment variables."""
    image_column: str = "image"
    label_column: str = "label"
    train_limit: PositiveInt | None = None
    """Use the first so many training rows (before the validation split)."""
    test_limit: PositiveInt | None = None
    val_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1


class TextData(Section):
    """A text file for a character model: the first 90% train, then validation and test halves."""

    type: Literal["text"] = "text"
    path: str
    """A file or any fsspec address. A relative path is also looked up below `ESPER_DATA`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the fsspec driver, for a path with a scheme. Secrets belong in its environment variables."""
    context: PositiveInt = 64
    """Characters a sample."""
    train_samples: PositiveInt = 8192
    """Samples an epoch, drawn at random places."""
    val_samples: PositiveInt = 512


class GivenData(Section):
    """Data handed over in Python (`esper.grow`): they cannot be named in a file."""

    type: Literal["given"] = "given"


Data = Annotated[DigitsData | SyntheticData | ParquetImageData | TextData | GivenData, Field(discriminator="type")]

# ---------------------------------------------------------------- hosts


class _Host(Section):
    """What every host may start from."""

    weights: str | None = None
    """Trained weights to start from, a `state_dict` of this very host: a safetensors file, or one of `torch.save`; a
    path or any fsspec address. Null starts from new ones."""
    weights_options: dict[str, Any] = Field(default_factory=dict)
    """Of the fsspec driver, for an address with a scheme. Secrets belong in its environment variables."""


class MlpHost(_Host):
    """Linear layers with ReLU: inputs -> hidden... -> classes."""

    type: Literal["mlp"] = "mlp"
    hidden: tuple[PositiveInt, ...] = (8, 10)


class CnnHost(_Host):
    """Stages of 3x3 convolution, batch norm and ReLU; each but the first halves the resolution. A linear head."""

    type: Literal["cnn"] = "cnn"
    patch: PositiveInt = 1
    """Side in pixels of the squares that a convolution before the first stage reads, without overlap; 1 is none."""
    channels: tuple[PositiveInt, ...] = (4, 8)
    blocks_per_stage: PositiveInt = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class ResNetHost(_Host):
    """Stages of residual blocks (two 3x3 convolutions with batch norm); each but the first halves the resolution."""

    type: Literal["resnet"] = "resnet"
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (8, 16)
    blocks_per_stage: PositiveInt = 1


class VitHost(_Host):
    """A vision transformer on square patches: pre-norm, learned positions, the mean over positions in a linear head."""

    type: Literal["vit"] = "vit"
    patch: PositiveInt = 2
    """Side of a patch in pixels."""
    width: PositiveInt = 32
    depth: PositiveInt = 2
    heads: PositiveInt = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class GptHost(_Host):
    """A decoder-only transformer, pre-norm, learned positions, tied or untied head."""

    type: Literal["gpt"] = "gpt"
    width: PositiveInt = 64
    depth: PositiveInt = 2
    heads: PositiveInt = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    tied: bool = False


class ImportedHost(_Host):
    """Your own model: `target: package.module:function`, called with `args`; must return an `nn.Module`."""

    type: Literal["import"] = "import"
    target: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    args: dict[str, Any] = Field(default_factory=dict)


class RunHost(_Host):
    """The network that a run left, what it grew included, which is an ordinary part of this host."""

    type: Literal["run"] = "run"
    run: Annotated[str, Field(min_length=1)]
    """The run's folder, a path or any address that `storage_options` open; `esper train --from RUN` finds it."""
    epoch: Annotated[int, Field(ge=0)] | None = None
    """Of its checkpoint, as its folder is numbered. Null: the last, whose number a run notes when it begins."""


class GivenHost(_Host):
    """A model handed over in Python (`esper.grow`)."""

    type: Literal["given"] = "given"


Host = Annotated[
    MlpHost | CnnHost | ResNetHost | VitHost | GptHost | ImportedHost | RunHost | GivenHost, Field(discriminator="type")
]

# ---------------------------------------------------------------- the systems


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


class KasminaConfig(Section):
    """Sites and seeds."""

    sites: Literal["auto"] | tuple[str, ...] = "auto"
    """`auto` takes block outputs; else module paths, globs (`blocks.*`) or names of classes (`TransformerBlock`). Of an
    output with several tensors one is named: `blocks.*#0` of a tuple, `blocks.*#hidden` of a dict."""
    telemetry_every: PositiveInt = 10
    """Steps between samples of health, at least."""
    telemetry_share: Annotated[float, Field(gt=0, le=1)] | None = 0.02
    """What samples of health may cost, as a share of the time of all steps: where they cost more, they come less often
    (but in every epoch). null keeps to `telemetry_every`, as deterministic mode always does."""
    chunks: PositiveInt = 1
    """Runs of neighbouring channels into which each site is cut; health is also told of each. Seeds and kernels are of
    all channels."""
    shadow_every: PositiveInt | Literal["auto"] = "auto"
    """Steps between shadow updates of seeds in TRAINING. `auto` is 12, where an update costs about a fifth of that many
    steps at most, but no fewer than 64 updates an epoch: in short epochs a kernel has no time to lose."""
    shadow_lr: PositiveFloat = 3e-3
    """Learning rate of a kernel in TRAINING (AdamW)."""
    race: PositiveInt = 1
    """Kernels that may train at one site at once, each behind the host and apart from the others; the one with the best
    paired evidence is grafted and the others are culled. Each costs its own replays."""
    min_training_epochs: PositiveInt = 2
    max_training_epochs: PositiveInt = 6
    """A seed that shows no gain within so many epochs asks to be culled."""
    max_slowdown: PositiveFloat | None = 10.0
    """A kernel whose update behind the host takes more than so many times a step of the host is culled: it would slow
    the host down. null, and deterministic mode, where no clock decides, never do."""
    ramp_epochs: PositiveFloat = 1.0
    """How long alpha takes from 0 to 1."""
    ramp: Literal["linear", "cosine", "sigmoid"] = "cosine"
    gate_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0
    """`grad_norm_gated`: alpha holds while the gradient's norm exceeds its running mean by this factor."""
    drift_limit: Annotated[float, Field(gt=0, le=1)] = 0.05
    """`drift_controlled`: the site's output moves by no more than this share of itself at a step."""
    max_ramp_epochs: PositiveInt = 20
    """A seed whose strategy has held alpha below 1 for so long asks to be removed."""
    stabilize_epochs: PositiveInt = 1
    fine_tune_epochs: PositiveInt = 1
    evidence_z: Annotated[float, Field(ge=0)] = 2.0
    """The paired gain must exceed so many standard errors before a graft."""
    harm_tolerance: Annotated[float, Field(ge=0)] = 0.25
    """After a graft, validation loss may exceed its pre-graft level by this share before the gate asks for removal."""
    embargo_epochs: Annotated[int, Field(ge=0)] = 5
    """A culled site waits so long before it is DORMANT again."""
    cache_mb: PositiveInt = 256
    """Verified kernels that a worker keeps at hand."""
    breaker_failures: PositiveInt = 3
    """Calls to Urza in a row that fail before the trainer asks no more for a while."""
    breaker_s: PositiveFloat = 10.0
    """That while; then one call tries whether Urza is back."""
    public_key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Ed25519 key whose signature kernels must carry; null takes the public half of `tezzeret.key_file` at the start
    of the run. It is pinned in the run's saved configuration and never read from the storage."""


class BanditConfig(Section):
    """The `bandit` policy: when and where are the heuristic's, the kernel is chosen by what its design came to."""

    choice: Literal["thompson", "ucb", "epsilon_greedy", "weighted"] = "thompson"
    exploration: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Of ucb: how many errors of its mean an arm is given in advance, at first."""
    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Of epsilon_greedy: how often any kernel is as good as any other."""
    rent: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    """Share of the loss that a kernel must gain to pay for all that is left of the budget."""


class CanaryConfig(Section):
    """What a nominated policy must show in shadow, beside the one that decides, before it is promoted."""

    decisions: PositiveInt = 50
    """So many are compared."""
    min_agreement: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.8
    """Share of decisions in which both want the same."""
    require_value: bool = True
    """Whether one that predicts no value fails."""
    max_value_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Its mean predicted value may be less by so much than that of the one before; where that one predicts none, less
    than 0, which is what not growing is worth."""


class GnnConfig(Section):
    """The `gnn` policy: a graph network that Simic has trained decides all of it."""

    version: Annotated[str, Field(pattern=r"^(promoted|[0-9a-f]{6,64})$")] = "promoted"
    """Which one: a version, the beginning of one, or the one that is promoted when the run starts. The run's saved
    configuration names the version it came to."""
    max_uncertainty: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = 0.75
    """Where the network's own forecast of what comes of its choice is less certain than this, it waits, and where that
    was never measured. 0 is certain, 0.5 as uncertain as knowing nothing but how such choices went on the average, 0.75
    three times as far off. null asks for no certainty."""
    min_confidence: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.3
    """Where `choice` is `likeliest`, it also waits where what it would do has a probability below this."""
    top_k: Annotated[int, Field(ge=1, le=64)] = 16
    """Kernels that it may choose from at a site: those of the largest expected value per cost."""
    strategies: tuple[Strategy, ...] = ("ramp", "direct", "grad_norm_gated", "drift_controlled", "performance_linked")
    """Ways into the live path that it may choose, beside `tamiyo.strategy`."""
    choice: Literal["drawn", "likeliest"] = "drawn"
    """`drawn`: what is done is drawn from its probabilities, the same for the same seed of the run and epoch, and then
    done in the likeliest way. A wait costs nothing for one epoch, so `likeliest` may wait in every one."""
    explore: bool = False
    """Draws all of it from its probabilities, however uncertain: to gather experience."""


class TrialsConfig(Section):
    """Trials by fork: before an adaptation begins, forks of the run show what it would cause (docs/adr/0013)."""

    enabled: bool = False
    """Where nothing is idle, or the budget of trials is spent, Tamiyo decides on shadow evidence alone."""
    candidates: PositiveInt = 3
    """Ways to grow that are compared, at most; beside them one fork does not grow."""
    strategies: tuple[Strategy, ...] = ()
    """Ways into the live path that are compared for each kernel; none: `tamiyo.strategy`."""
    steps: Annotated[int, Field(ge=5)] = 100
    """That each fork trains: 40% behind the host, 20% blending in, and the rest on the live path."""
    seeds: PositiveInt = 1
    """Pairs of forks for each candidate, all but the first over other orders of data."""
    at_once: PositiveInt = 2
    """Forks that run at once, at most."""
    cpus: PositiveFloat = 0.5
    """CPUs of the cluster that a fork takes, if they are idle; no fork waits for them."""
    z: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    """Standard errors by which a candidate's gain must exceed 0 before it begins."""
    flops_share: PositiveFloat = 0.5
    """What trials may cost, as a share of what the run itself has cost so far."""
    late_epochs: PositiveInt = 10
    """A trial that has not ended after so many epochs is given up."""

    @model_validator(mode="after")
    def _can_be_tried(self) -> TrialsConfig:
        if "performance_linked" in self.strategies:
            raise ValueError("performance_linked goes by validations between epochs, which a fork has none of")
        return self


class TamiyoConfig(Section):
    """The controller."""

    policy: Literal["heuristic", "bandit", "gnn", "none", "random", "schedule"] = "heuristic"
    warmup_epochs: Annotated[int, Field(ge=0)] = 3
    """No growth before."""
    plateau_window: PositiveInt = 3
    """Epochs the heuristic looks back."""
    plateau_threshold: Annotated[float, Field(ge=0)] = 0.05
    """The host has stopped learning when the validation loss falls by less than this over the window: as a share of
    itself, or of all that it has fallen so far."""
    max_concurrent: PositiveInt = 1
    """Adaptations under way at once."""
    max_adaptations: Annotated[int, Field(ge=0)] = 4
    """Grafts in one run, failed ones counted."""
    last_epoch_fraction: Annotated[float, Field(gt=0, le=1)] = 0.7
    """No new seed germinates after this share of the epochs: it could not be proven any more."""
    max_risk: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """Kernels whose `risk_score` (Urabrask's, from 0 to 1) is above this are not used, nor those without one; null
    allows all that were validated."""
    strategy: Strategy = "ramp"
    lr_factor: PositiveFloat = 1.0
    """Learning rate of a kernel on the live path, as a factor of the host's."""
    ask_before_graft: bool = False
    """Whether no kernel enters the live path before a person says so (`esper runs approve`). Without the setting a
    person may still veto."""
    schedule: tuple[ScheduledGraft, ...] = ()
    """For the `schedule` policy."""
    bandit: BanditConfig = BanditConfig()
    """For the `bandit` policy."""
    gnn: GnnConfig = GnnConfig()
    """For the `gnn` policy."""
    trials: TrialsConfig = TrialsConfig()
    """Whether growth is tried on forks of the run first."""
    deadline_s: PositiveFloat = 5.0
    """Outside deterministic mode training goes on without an answer after so long."""
    startup_s: PositiveFloat = 60.0
    """The first decision waits so long for the controller to come up and for the kernels that are being built."""
    control: Literal["ask", "listen"] = "ask"
    """`ask`: the trainer asks Tamiyo after each epoch and waits for the answer. `listen`: it tells its state on the
    bus, and obeys what AutonomousTamiyo, who watches all runs, sends of its own accord; not in deterministic mode."""
    listen_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2
    """A run that listens waits so long for a command about the epoch that has just ended; one that comes later is heard
    after the next."""
    canary: CanaryConfig = CanaryConfig()
    """For the platform: the first run's setting holds for all that share it."""
    poll_s: PositiveFloat = 2.0
    """Likewise: so often Tamiyo looks which policy is promoted or nominated."""
    breaker_failures: PositiveInt = 3
    """Outside deterministic mode: decisions in a row without an answer before the trainer asks no more for a while. It
    decides itself meanwhile: by the same policy, or by `heuristic` where that one needs weights."""
    breaker_s: PositiveFloat = 30.0
    """That while; then one decision tries whether Tamiyo is back."""


class ScheduledGraft(Section):
    """One entry of the `schedule` policy."""

    epoch: Annotated[int, Field(ge=0)]
    site: str
    blueprint: str
    strategy: Strategy = "ramp"
    lr_factor: PositiveFloat = 1.0


TamiyoConfig.model_rebuild()


class HttpConfig(Section):
    """Urza's HTTP gateway, on Ray Serve. Its routes and their form: /docs below its address."""

    enabled: bool | None = None
    """null: on for a platform that runs share (`esper platform up`, or a run that joins a cluster), off on a Ray that
    ends with its run: it is two more processes."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Bound to anything but loopback, every request must carry the bearer token. One for all platforms of a cluster."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Where Ray Serve's proxy listens; one for all platforms of a cluster."""
    always_token: bool = False
    """Ask for the bearer token on loopback too, where a machine has other users."""
    token_file: str = "~/.config/esper/http_token"  # noqa: S105 - a path
    """The bearer token, mode 0600; made where there is none."""
    max_body_kb: PositiveInt = 1024
    """Larger requests are refused."""


class UrzaConfig(Section):
    """The asset hub."""

    maintain_every_s: PositiveFloat | None = 3600.0
    """From one round of maintenance to the next: compaction, checkpoint, vacuum, blobs that nothing names, the tables
    for other readers. null leaves it to `esper urza maintain`."""
    kept_hours: Annotated[float, Field(ge=0)] = 24.0
    """Replaced files of a table stay so long, for whoever reads it meanwhile."""
    grace_hours: Annotated[float, Field(ge=1)] = 24.0
    """A blob that no record names stays so long: longer than any upload, lease or clock is late."""
    hot_mb: PositiveFloat = 256.0
    """Kernels that Urza keeps at hand in the object store."""
    http: HttpConfig = HttpConfig()


class TezzeretConfig(Section):
    """The compile pool."""

    min_workers: Annotated[int, Field(ge=0)] = 1
    """Workers that stay without work."""
    max_workers: PositiveInt = 2
    """The pool grows to so many, for each device, while each would have seconds of work before it."""
    idle_s: PositiveFloat = 60.0
    """A worker beyond the least goes after so long without work."""
    cpus_per_worker: PositiveFloat = 0.2
    gpus_per_worker: PositiveFloat = 0.25
    """Share of a GPU that a worker asks for, where native code for CUDA is to be compiled."""
    lease_s: PositiveFloat = 60.0
    """A worker that is silent for so long loses its job to another; it renews the lease while it works."""
    job_timeout_s: PositiveFloat = 600.0
    """One job may run so long, pauses not counted; then its compiler is killed."""
    job_memory_mb: Annotated[int, Field(ge=512)] = 4096
    """Resident memory that a compiler and all it starts may take together; beyond it they are killed."""
    num_threads: PositiveInt = 1
    """Threads of a compiler."""
    yields: Literal["auto", "between_epochs", "never"] = "auto"
    """What a compiler does while a trainer takes steps on its cores. `auto`: it works where a core is left over, by
    measurement, else for `yield_share` of the time; `between_epochs`: it waits; `never`: it works on."""
    yield_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of the time, where a trainer leaves no core: so that a compilation ends."""
    key_file: str = "~/.config/esper/signing_key.pem"
    """The signer's private key; made with mode 0600 where there is none. Compile nodes of a cluster share one."""
    optimize: Literal["auto", "grafted", "never"] = "auto"
    """Whether native code is compiled for kernels that a run has grafted; it takes the kernel's place once it is there
    and measured faster. `auto`: where the compilers have cores that the trainers do not use. Deterministic runs never
    do, since when it comes depends on the clock."""
    blueprints: Literal["library"] | tuple[str, ...] = "library"
    """Names from the library that are compiled for the run's sites, or all that fit."""
    limits: IRLimits = IRLimits()
    """What one kernel may cost; more is refused before it is built."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> TezzeretConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than max_workers {self.max_workers}")
        return self


class OonaConfig(Section):
    """The bus."""

    num_shards: PositiveInt = 1
    linger_ms: Annotated[float, Field(ge=0)] = 5.0
    batch: PositiveInt = 256
    backlog: PositiveInt = 100_000
    """Messages of a topic that a group may have before it; then `publish` waits, or old ones give way."""
    drop_oldest: tuple[Topic, ...] = (Topic.SEED_HEALTH, Topic.STEPS)
    """Topics whose oldest messages give way when a group holds `backlog` of them; what was dropped is told."""
    max_deliveries: PositiveInt | None = 16
    """Deliveries to a group after which a message goes to the dead letters; null: it comes again for ever."""
    lease_s: PositiveFloat = 30.0
    archive: tuple[Topic, ...] = (
        Topic.KASMINA_COMMANDS,
        Topic.RUN_STARTED,
        Topic.EPOCH,
        Topic.LIFECYCLE,
        Topic.RUNGS,
        Topic.POLICIES,
        Topic.FIELD_REPORTS,
        Topic.DEAD_LETTERS,
    )
    """Topics that are copied to the Delta table `archive` of the storage: the audit trail; none leaves it unwritten."""
    retain_mb: PositiveFloat = 256.0
    """Of each shard: messages that every group has acknowledged go beyond it, the oldest first; they are in memory."""
    retain_hours: PositiveFloat | None = 168.0
    """Messages that every group has acknowledged go after so long; null: only by size."""
    fsync: Literal["interval", "always", "never"] = "interval"
    """`always`: what is acknowledged is on the disk. `interval`: within `fsync_ms`. `never`: when the system likes; the
    death of the broker loses nothing with any of them, the death of its machine what was not on the disk."""
    fsync_ms: Annotated[float, Field(ge=0)] = 200.0


class PageConfig(Section):
    """The live page of the runs, served by Nissa; `esper ui` serves it without a platform."""

    enabled: bool = True
    """The server itself starts when somebody first looks."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Bound to anything but loopback, the page asks for the token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8420
    """The first of 16 that are tried; 0: any that is free."""
    always_token: bool = False
    """Ask for the token on loopback too, where a machine has other users."""
    token_file: str = "~/.config/esper/http_token"  # noqa: S105 - a path
    """The token, mode 0600; made where there is none. The one of `urza.http`."""


class RewardConfig(Section):
    """What an episode of growth is worth, as a share of the loss; see `esper.simic.reward`."""

    params_rent: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    """For as many parameters as the host began with, once, when they become permanent."""
    flops_rent: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    """For as many FLOPs more as the run would have cost without growth, as they are spent."""
    start_cost: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.005
    """Of each adaptation that begins."""
    z: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Standard errors that are taken off a gain before it counts."""
    window: PositiveInt = 3
    """A gain is the mean of the last so many paired measurements: one that was waited for is no gain."""


class SimicConfig(Section):
    """What a run keeps for the training of policies."""

    experience: bool = True
    """Whether its decisions are logged, to `<storage>/experience`."""
    rows_per_write: PositiveInt = 8
    """Decisions that are written together: a run that is killed loses the newest."""
    reward: RewardConfig = RewardConfig()


class NissaConfig(Section):
    """What people see."""

    view: Literal["auto", "live", "plain", "quiet"] = "auto"
    """`auto`: live in a terminal, plain lines elsewhere."""
    dashboard: bool = True
    """Start Ray's dashboard (on loopback) when the run starts Ray itself."""
    metrics_every_s: PositiveFloat | None = 5.0
    """Seconds between two exports of metrics for Prometheus, through Ray's agents; null exports none."""
    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://[^/\s?#@]+(/[^\s?#]*)?$")] | None = None
    """An OpenTelemetry collector (OTLP over HTTP) that gets each adaptation as a trace; null sends none. Who sends is
    told by `OTEL_EXPORTER_OTLP_HEADERS`, never in the address."""
    page: PageConfig = PageConfig()


class Budget(Section):
    """Limits of growth, as factors of the host at the start; null is no limit."""

    params: PositiveFloat | None = 2.0
    flops: PositiveFloat | None = 2.0
    """Forward FLOPs of one sample."""


class RunConfig(Section):
    """Everything a run is determined by; the resolved form is saved with the run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_\-]{0,40}$")] = "run"
    """First part of the run id."""
    task: Literal["classification", "regression", "language_model", "custom"] = "classification"
    """`custom`: an `esper.Task` handed over in Python."""
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    deterministic: bool = False
    """Fixed threads and algorithms; the trainer waits for Tamiyo, kernels and storage; a resumed run is bit-equal."""
    storage: str = "~/.esper"
    """Directory, `file://` or `s3://` address of everything that must last."""
    storage_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the storage driver, such as `endpoint_url` for S3."""
    data: Data = DigitsData()
    host: Host = CnnHost()
    budget: Budget = Budget()
    tolaria: TolariaConfig = TolariaConfig()
    kasmina: KasminaConfig = KasminaConfig()
    tamiyo: TamiyoConfig = TamiyoConfig()
    urza: UrzaConfig = UrzaConfig()
    tezzeret: TezzeretConfig = TezzeretConfig()
    oona: OonaConfig = OonaConfig()
    nissa: NissaConfig = NissaConfig()
    simic: SimicConfig = SimicConfig()

    @model_validator(mode="after")
    def _replays_what_it_hears(self) -> RunConfig:
        if self.deterministic and self.tamiyo.control == "listen":
            raise ValueError("tamiyo.control: what a run hears depends on the clock, so a deterministic one must ask")
        return self

    @model_validator(mode="after")
    def _trials_fit(self) -> RunConfig:
        tamiyo = self.tamiyo
        if not tamiyo.trials.enabled:
            return self
        if self.deterministic:
            raise ValueError("tamiyo.trials: a deterministic run has none: when they end depends on the clock")
        if tamiyo.control == "listen":
            raise ValueError("tamiyo.trials: who watches the runs that listen is not told what their forks have shown")
        if self.tolaria.use_gpu:
            raise ValueError("tamiyo.trials: forks run on idle CPUs, and would not compute what a GPU does")
        if tamiyo.policy in {"none", "schedule"}:
            raise ValueError(f"tamiyo.trials: policy {tamiyo.policy} chooses nothing that could be tried")
        if tamiyo.strategy == "performance_linked" and not tamiyo.trials.strategies:
            raise ValueError(
                "tamiyo.trials: performance_linked goes by validations between epochs; name other strategies"
            )
        return self

    @model_validator(mode="after")
    def _task_fits_data(self) -> RunConfig:
        if isinstance(self.data, GivenData):
            return self
        is_text = isinstance(self.data, TextData)
        if is_text != (self.task == "language_model"):
            raise ValueError(f"task {self.task} does not go with data of type {self.data.type}")
        return self


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a YAML file and applies dotted overrides.

    Args:
        path: the file.
        overrides: such as `tolaria.epochs=2`; the value is parsed as YAML.

    Raises:
        ConfigError: if the file is missing or not YAML, or a key or value is wrong; names the key and the remedy.
    """
    try:
        text = Path(path).expanduser().read_text()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", remedy="give a YAML file, see configs/") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, not a mapping of keys")
    return parse_config(tree, overrides)


def parse_config(tree: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """Validates a tree of plain values; see `load_config`."""
    merged = _copy(tree)
    for override in overrides:
        _apply(merged, override)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise _explain(error) from error


def dump_config(config: RunConfig) -> str:
    """Returns the YAML that `load_config` reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _copy(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _copy(value) for key, value in tree.items()}
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} has no value", remedy="write KEY=VALUE, such as tolaria.epochs=2")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value {text!r} is not YAML", field=key) from error
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{parent} is a value, not a section", field=key)
        node = child
    node[leaf] = value


def _explain(error: ValidationError) -> ConfigError:
    """Turns pydantic's first complaint into one line that names the key and the remedy."""
    first = error.errors(include_url=False)[0]
    # a discriminated union puts the chosen type into the location; it is no key of the file
    location = [str(part) for part in first["loc"] if part not in _UNION_TAGS]
    field = ".".join(location)
    rest = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        tag = next((str(part) for part in first["loc"] if part in _UNION_TAGS), None)
        known = _known_keys(RunConfig, location[:-1], tag)
        close = difflib.get_close_matches(location[-1], known, n=1)
        here = f"with type {tag}" if tag else "here"
        remedy = f"did you mean {close[0]}?" if close else f"known keys {here}: {', '.join(known)}"
        return ConfigError(f"no such key{rest}", field=field, remedy=remedy)
    if first["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        tags = str(first.get("ctx", {}).get("expected_tags", "see the README"))
        return ConfigError(f"unknown or missing type{rest}", field=f"{field}.type", remedy=f"one of {tags}")
    message = first["msg"].removeprefix("Value error, ")
    got = f", got {first['input']!r}" if not isinstance(first["input"], dict) else ""
    return ConfigError(f"{message}{got}{rest}", field=field or None, remedy="see the comments in configs/digits.yaml")


_UNION_TAGS = frozenset({"digits", "synthetic", "parquet_images", "text", "mlp", "cnn", "gpt", "import", "given"})


def _known_keys(model: type[BaseModel], location: list[str], tag: str | None) -> list[str]:
    sections = [model]
    for part in location:
        found: list[type[BaseModel]] = []
        for section in sections:
            field = section.model_fields.get(part)
            found.extend(_sections_of(field.annotation) if field else ())
        sections = found
    if tag is not None:
        sections = [section for section in sections if section.model_fields["type"].default == tag]
    return sorted({key for section in sections for key in section.model_fields})


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in getattr(annotation, "__args__", ()) for section in _sections_of(part)]
