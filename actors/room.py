"""Whether Ray has room for a run's workers: waited for in sight, and not for ever where nobody will make room.

Ray Train waits for its workers in silence, and hears of no wish to stop until they are there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from esper.config import TolariaConfig
from esper.leyline import ConfigError, UnavailableError

_LOOK_S = 0.2
_SAY_AFTER_S = 3.0
"""An ordinary start is over by then."""
_OWNED_PATIENCE_S = 60.0
"""On a Ray of the run's own nobody else will leave, and no machine will join."""
_ROUNDING = 1e-4
"""Ray counts resources in ten-thousandths."""


def needs(config: TolariaConfig) -> dict[str, float]:
    """Returns what one worker asks Ray for, by Ray's names."""
    return {"CPU": config.cpus_per_worker, **({"GPU": 1.0} if config.use_gpu else {})}


def wait_for_room(
    config: TolariaConfig,
    *,
    owned: bool,
    stop: Callable[[], str | None],
    say: Callable[[str], None],
    patience_s: float = _OWNED_PATIENCE_S,
) -> None:
    """Returns once Ray could start all workers at the same time; at once where there are none.

    Args:
        config: of the trainer.
        owned: whether this Ray is the run's own.
        stop: asked all the while; a reason ends the wait.
        say: told what is waited for, again whenever that has changed.
        patience_s: seconds to wait on a Ray of the run's own.

    Raises:
        ConfigError: if a Ray of the run's own has no such room.
        UnavailableError: if the run was to stop meanwhile.
    """
    if not config.num_workers:
        return
    import ray
    from ray.util import placement_group, remove_placement_group

    one = needs(config)
    if owned:
        _check(config, ray.cluster_resources(), "has")
    room = placement_group([one] * config.num_workers, strategy="PACK")
    try:
        ready = room.ready()
        began, said = time.monotonic(), ""
        while not ray.wait([ready], timeout=_LOOK_S)[0]:
            if (reason := stop()) is not None:
                raise UnavailableError(
                    f"the run was {reason} while it waited for {_wanted(config)}; nothing was trained",
                    remedy="start it again when there is room",
                )
            waited_s = time.monotonic() - began
            if waited_s < _SAY_AFTER_S:
                continue
            free = ray.available_resources()
            if owned and waited_s > patience_s:
                _check(config, free, "has left, beside the platform,")
            words = f"waiting for {_wanted(config)}: of {_of(ray.cluster_resources(), one)}, {_of(free, one)} free"
            if words != said:
                say(words)
                said = words
    finally:
        remove_placement_group(room)


def _check(config: TolariaConfig, there: Mapping[str, float], has: str) -> None:
    """Raises `ConfigError` if `there` is too little."""
    for name, each in needs(config).items():
        found = there.get(name, 0.0)
        if each * config.num_workers > found + _ROUNDING:
            fewer = int((found + _ROUNDING) / each)
            raise ConfigError(
                f"{_wanted(config)} need {each * config.num_workers:g} {name}; this Ray {has} {found:g}",
                field="tolaria.num_workers",
                remedy=f"tolaria.num_workers={fewer}"
                + (" trains in the driver itself" if not fewer else "")
                + (
                    f", or tolaria.cpus_per_worker={math.floor(100 * found / config.num_workers) / 100:g}"
                    if name == "CPU" and found
                    else ""
                ),
            )


def _wanted(config: TolariaConfig) -> str:
    each = " and ".join(f"{amount:g} {name}" for name, amount in needs(config).items())
    return f"{config.num_workers} worker{'s' * (config.num_workers > 1)} of {each} each"


def _of(resources: Mapping[str, float], one: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0.0):g} {name}" for name in one)
