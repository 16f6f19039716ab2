"""The settings of sites and seeds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from esper.config.section import PositiveFloat, PositiveInt, Section


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
