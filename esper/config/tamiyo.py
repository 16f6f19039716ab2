"""The controller's settings, and those of its policies and trials."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from esper.config.section import PositiveFloat, PositiveInt, Section

Strategy = Literal["ramp", "direct", "grad_norm_gated", "drift_controlled", "performance_linked"]
"""How a kernel enters the live path."""


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
    actions: Annotated[int, Field(ge=0)] = 10
    """In so many of them at least one of the two acts; until then it goes on. Who waits together shows nothing."""
    min_action_agreement: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5
    """Share of those in which both want the same."""
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


class ScheduledGraft(Section):
    """One entry of the `schedule` policy."""

    epoch: Annotated[int, Field(ge=0)]
    site: str
    blueprint: str
    strategy: Strategy = "ramp"
    lr_factor: PositiveFloat = 1.0


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
