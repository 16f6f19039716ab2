"""The configuration of a policy's training: frozen models as those of a run (`esper.config`)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from esper.config import PositiveFloat, PositiveInt, RewardConfig, Section

Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class PpoConfig(Section):
    """See `esper.simic.ppo`."""

    lr: PositiveFloat = 1e-3
    epochs: PositiveInt = 4
    """Passes over the samples of an update; fewer where the policy has moved four times as far as `target_kl`."""
    minibatch: PositiveInt = 64
    gamma: Unit = 1.0
    """Discount. 1: an episode has an end, and a gain is worth the same whenever it comes."""
    lam: Unit = 1.0
    clip: PositiveFloat = 0.2
    target_kl: PositiveFloat = 0.05
    kl_weight: PositiveFloat = 0.2
    """At first; it adapts."""
    value_weight: Annotated[float, Field(ge=0)] = 0.5
    entropy_weight: Annotated[float, Field(ge=0)] = 0.003
    """At the first update; it falls to 0 towards the last one, so that what is most probable is what was trained."""
    clip_norm: PositiveFloat = 1.0
    max_harm: Annotated[float, Field(ge=0)] = 0.2
    """Rollbacks of a mean episode that are borne."""
    harm_lr: Annotated[float, Field(ge=0)] = 0.05
    """How fast harm beyond that comes to count."""
    min_effective: Unit = 0.3
    """Episodes of an older policy teach by V-trace where their samples are worth at least this share of fresh ones."""


class ImitationConfig(Section):
    """See `esper.simic.imitation`."""

    lr: PositiveFloat = 1e-3
    epochs: Annotated[int, Field(ge=0)] = 30
    minibatch: PositiveInt = 64
    balance: Unit = 0.5
    """How far rare operations count more: 0 not at all, 1 as much in all as the frequent ones."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the episodes that only judges."""
    value_weight: Annotated[float, Field(ge=0)] = 0.5
    policies: tuple[str, ...] = ("heuristic",)
    """Whose logged runs are imitated."""
    temperature: PositiveFloat | None = 0.5
    """Fresh runs count by what they came to: `exp(advantage / temperature)`, the advantage over the other runs of the
    same task and seed in deviations of the task (advantage-weighted regression, Peng et al. 2019). null: all alike."""
    max_weight: PositiveFloat = 10.0
    """A run counts no more than so many times another of mean worth."""


class RolloutConfig(Section):
    """Real trainings, one an episode."""

    workers: PositiveInt = 2
    """Ray actors."""
    cpus_per_worker: PositiveFloat = 0.5
    episodes: PositiveInt = 24
    """Of one update."""
    draws: PositiveInt = 4
    """Episodes of the same task and seed in one update: what a run came to beyond the others of its own kind is free of
    what the seed was worth."""
    flops: PositiveFloat | None = 4.0
    """A run ends when it has spent so many times what the plain host costs for all its epochs, as in the exam."""
    seeds: PositiveInt = 32
    """Of the runs; they come again, each with its twin without growth, which is played once."""
    replayed: Annotated[int, Field(ge=0)] = 0
    """Episodes of older policies that each update looks at again, by V-trace."""
    kept: PositiveInt = 64
    """Episodes to choose those from."""
    deadline_s: PositiveFloat = 300.0
    """One that takes longer is given up."""


class TaskOf(Section):
    """A task of a training, with settings of its own."""

    config: str
    """File of a run's configuration, beside this one."""
    set: tuple[str, ...] = ()
    """Settings that go before those of the file, such as `host.hidden=[16]`."""


class TrainTamiyoConfig(Section):
    """`python -m jobs.train_tamiyo`. A training that goes on may have another `storage`, `judged`, `iterations`,
    `rollout.workers`, `cpus_per_worker` and `deadline_s`; all else must be as it began (`esper.simic.identity`).
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_\-]{0,40}$")] = "gnn"
    storage: str = "~/.esper"
    storage_options: dict[str, Any] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    tasks: Annotated[tuple[str | TaskOf, ...], Field(min_length=1)] = ("digits_mlp.yaml",)
    """Configuration files of runs, beside this one; each names task, host and limits of its episodes."""
    overrides: tuple[str, ...] = ()
    """Settings of all of them, such as `tolaria.epochs=12`."""
    warm_up: Annotated[int, Field(ge=0)] = 8
    """Fresh runs, to imitate beside those that are logged: of each task and seed the first is the heuristic's, and
    `explore` others grow by plans of their own (`esper.simic.explorer`)."""
    explore: Annotated[int, Field(ge=0)] = 0
    """See `warm_up`. With imitation by worth (`imitation.temperature`) the net begins with what was better than the
    heuristic."""
    iterations: Annotated[int, Field(ge=0)] = 10
    """Updates of PPO. It may be changed for a training that goes on: updates to come weigh the entropy as in one of so
    many, those that are done stay as they are, and the policy's card tells of it."""
    judged: Annotated[int, Field(ge=0)] = 6
    """Seeds of each task, never trained on, on which the policy is laid beside the heuristic at the end."""
    net: dict[str, Any] = Field(default_factory=dict)
    """Hyper-parameters of the net (`esper.tamiyo.shape.NetShape`); what is not named is as there."""
    reward: RewardConfig = RewardConfig()
    imitation: ImitationConfig = ImitationConfig()
    ppo: PpoConfig = PpoConfig()
    rollout: RolloutConfig = RolloutConfig()
