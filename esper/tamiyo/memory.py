"""What Tamiyo remembers from one decision to the next, as plain JSON that the trainer checkpoints.

`observe` folds a packet into the memory: validation losses, adaptations under way and how they ended. It takes no
decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from esper.config import TamiyoConfig
from esper.leyline import BlendStrategy, ConflictError, Contract, HealthSignal, SeedStage, SystemStatePacket
from esper.leyline.contract import Finite
from esper.leyline.track import TrackRecord
from esper.tamiyo.windows import SiteWindows, look

if TYPE_CHECKING:
    from esper.tamiyo.table import Layers


class Attempt(Contract):
    """One adaptation under way.

    Attributes:
        since_epoch: epoch of the decision that began it.
        stage: where the seed stood when it was last seen.
        num_parameters, flops_per_sample: what its kernel costs, reserved until the seed is on the live path.
        asked, vetoed: whether a person was asked for a word, and whether a veto was carried out.
        retiring: whether it was ordered off the live path, which takes its time.
    """

    site: str
    seed_id: str
    blueprint: str | None
    kernel_id: str | None
    since_epoch: Annotated[int, Field(ge=0)]
    stage: SeedStage
    num_parameters: Annotated[int, Field(ge=0)] = 0
    flops_per_sample: Annotated[int, Field(ge=0)] = 0
    strategy: BlendStrategy = BlendStrategy.RAMP
    asked: bool = False
    vetoed: bool = False
    retiring: bool = False


class BanditMemory(Contract):
    """What the bandit remembers (see `bandit`).

    Attributes:
        arms: what each came to, by `kind:blueprint`.
        counted: trace ids of the run's reports that are in it, or were in the records that it began with.
    """

    arms: dict[str, TrackRecord] = Field(default_factory=dict)
    counted: tuple[str, ...] = ()


class TrialMemory(Contract):
    """A trial that was asked for, until its result has come."""

    trial_id: str
    epoch: Annotated[int, Field(ge=0)]
    words: str


class TamiyoState(Contract):
    """The memory of one run.

    Attributes:
        seed: of the run; randomness is derived from it, the epoch and `rng_counter`, never from a clock.
        num_adaptations: how many were begun, failed ones counted.
        val_losses: (epoch, loss) of the plateau window, oldest first.
        highest_val_loss: of the run so far; None before one was measured.
        cooldown_until: first epoch at which growth may be thought of again, and `cooldown_reason` why.
        under_way: adaptations that have begun and not ended.
        failed: `site:blueprint` of adaptations that ended without a fossil; they are not tried again.
        schedule_done: entries of the schedule that were carried out or given up, by position.
        bandit: None under policies that do not learn.
        windows: how the sites' health moved; None before the first decision.
        trial: under way.
        untried: whether it was said that there are no resources for trials.
    """

    version: Literal[1] = 1
    seed: int
    epoch: Annotated[int, Field(ge=-1)] = -1
    num_decisions: Annotated[int, Field(ge=0)] = 0
    num_adaptations: Annotated[int, Field(ge=0)] = 0
    rng_counter: Annotated[int, Field(ge=0)] = 0
    val_losses: tuple[tuple[int, Finite], ...] = ()
    highest_val_loss: Finite | None = None
    cooldown_until: Annotated[int, Field(ge=0)] = 0
    cooldown_reason: str = ""
    under_way: tuple[Attempt, ...] = ()
    failed: tuple[str, ...] = ()
    schedule_done: tuple[int, ...] = ()
    bandit: BanditMemory | None = None
    windows: SiteWindows | None = None
    trial: TrialMemory | None = None
    untried: bool = False

    def to_json(self) -> dict[str, Any]:
        """Returns the memory as plain JSON values."""
        return self.model_dump(mode="json")


def initial_state(config: TamiyoConfig, seed: int) -> dict[str, Any]:
    """Returns the memory of a run that has not begun.

    Args:
        config: the run's; a memory begun under one configuration may be continued under another.
        seed: of the run.
    """
    del config  # nothing of it is remembered: limits are those of the call, so that a resumed run may change them
    return TamiyoState(seed=seed).to_json()


def read_state(state: Mapping[str, Any]) -> TamiyoState:
    """Returns the memory behind its JSON.

    Raises:
        ConflictError: if it is not the state of this version of Tamiyo.
    """
    try:
        return TamiyoState.model_validate(state)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(["state", *(str(part) for part in first["loc"])])
        raise ConflictError(
            f"cannot read Tamiyo's state: {first['msg']}",
            field=field,
            remedy="begin with initial_state(config, seed), over HTTP with an empty state",
        ) from error


def failure_key(site: str, blueprint: str) -> str:
    """Returns the key of a blueprint at a site, in the form of `SystemStatePacket.embargoed`."""
    return f"{site}:{blueprint}"


def observe(state: TamiyoState, packet: SystemStatePacket, config: TamiyoConfig) -> TamiyoState:
    """Returns the memory after reading `packet`.

    An attempt ends when its seed is seen fossilized (well) or back at rest (failed: culled, cancelled, rolled back,
    or a germination that was refused). A site that sent no report leaves its attempt under way: unmeasured is not
    ended. When the live path lost a kernel, the losses before no longer describe it, and growth waits for a full
    window.
    """
    from esper.tamiyo.table import layers_of

    layers, epoch = layers_of(packet), packet.epoch.epoch
    losses = tuple(entry for entry in state.val_losses if entry[0] < epoch)
    if packet.epoch.val_loss is not None:
        losses = (*losses, (epoch, packet.epoch.val_loss))
    measured = [loss for loss in (state.highest_val_loss, packet.epoch.val_loss) if loss is not None]
    cooldown_until, cooldown_reason = state.cooldown_until, state.cooldown_reason
    under_way: list[Attempt] = []
    failed = list(state.failed)
    for attempt in state.under_way:
        seen, ended = _look_again(attempt, layers)
        if not ended:
            under_way.append(seen)
            continue
        where = f"{attempt.blueprint or 'a kernel'} at {attempt.site}"
        if seen.stage is SeedStage.FOSSILIZED:
            until, reason = epoch + 1, f"{where} became permanent just now"
        elif attempt.stage.is_blended:
            until = epoch + config.plateau_window
            reason = f"{where} was taken off the live path, and the host needs a window of its own"
            losses = losses[-1:]
        else:
            until, reason = epoch + 1, f"{where} has just failed"
        if until >= cooldown_until:
            cooldown_until, cooldown_reason = until, reason
        if seen.stage is not SeedStage.FOSSILIZED and attempt.blueprint is not None:
            failed.append(failure_key(attempt.site, attempt.blueprint))
    known = {(attempt.site, attempt.seed_id) for attempt in under_way}
    strangers = [
        _stranger(seed, packet) for layer, seed in layers.active() if (layer.layer_id, seed.seed_id) not in known
    ]
    return state.model_copy(
        update={
            "epoch": epoch,
            "num_decisions": state.num_decisions + 1,
            "num_adaptations": state.num_adaptations + len(strangers),
            "val_losses": losses[-(config.plateau_window + 1) :],
            "highest_val_loss": max(measured, default=None),
            "cooldown_until": cooldown_until,
            "cooldown_reason": cooldown_reason,
            "under_way": (*under_way, *strangers),
            "failed": tuple(dict.fromkeys(failed)),
            "windows": look(state.windows, packet),
        }
    )


def _look_again(attempt: Attempt, layers: Layers) -> tuple[Attempt, bool]:
    """Returns the attempt as this packet shows it, and whether it has ended."""
    layer = layers.named(attempt.site)
    if layer is None:
        return attempt, False
    seed = next((seed for seed in layer.seeds if seed.seed_id == attempt.seed_id), None)
    if seed is None:
        return attempt.model_copy(update={"stage": SeedStage.DORMANT}), True
    return attempt.model_copy(update={"stage": seed.stage}), not seed.stage.is_active


def _stranger(seed: HealthSignal, packet: SystemStatePacket) -> Attempt:
    """An adaptation that somebody else began (`load_kernel` by hand, or a memory that was lost)."""
    option = next((option for option in packet.options if option.kernel_id == seed.kernel_id), None)
    return Attempt(
        site=seed.layer_id,
        seed_id=seed.seed_id,
        blueprint=seed.blueprint,
        kernel_id=seed.kernel_id,
        since_epoch=packet.epoch.epoch,
        stage=seed.stage,
        num_parameters=option.num_parameters if option else 0,
        flops_per_sample=option.flops_per_sample if option else 0,
    )
