"""The packet that Tamiyo decides on: what kernels there are, what growth may still spend. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from esper.config import Budget
from esper.leyline.growth import Growable, SeedView
from esper.leyline.kernels import Pipeline, SiteSignature
from esper.leyline.ports import AssetHub
from esper.leyline.signals import BudgetState, KernelOption


@dataclass(frozen=True, slots=True)
class HostSize:
    """The host before it grew: trainable parameters, and forward FLOPs of one sample."""

    params: int
    flops: int


def live_params(growable: Growable) -> int:
    """Trainable parameters on the live path."""
    return sum(parameter.numel() for _, parameter in growable.live_parameters() if parameter.requires_grad)


def live_flops(host: HostSize, seeds: Iterable[SeedView]) -> int:
    """Forward FLOPs of the live path for one sample."""
    return host.flops + sum(seed.flops_per_sample for seed in seeds if seed.stage.is_blended)


def budget_state(budget: Budget, host: HostSize, *, params_used: int, flops_used: int) -> BudgetState:
    """The budget as absolute figures."""
    return BudgetState(
        params_used=params_used,
        params_limit=None if budget.params is None else int(budget.params * host.params),
        flops_used=flops_used,
        flops_limit=None if budget.flops is None else int(budget.flops * host.flops),
    )


def kernel_options(
    hub: AssetHub,
    sites: Mapping[str, SiteSignature],
    *,
    blueprints: Sequence[str] | None,
    fits: Callable[[str, str], bool],
) -> tuple[KernelOption, ...]:
    """The validated kernels that fit the sites, each once for all sites of a signature that it fits, in an order that
    depends on nothing but what they are.

    Args:
        hub: where they are.
        sites: name to signature.
        blueprints: names that may be used, of any blueprint that has the kernel; None for any.
        fits: site and id of a blueprint that starts from a neighbouring layer, to whether the host has one there.

    Raises:
        UnavailableError: if the hub does not answer.
    """
    # a kernel starts on the module of its IR; native code is another kernel of the same work, for later
    kernels = {
        signature: hub.kernel_briefs(signature, pipeline=Pipeline.FAST) for signature in dict.fromkeys(sites.values())
    }
    alike: dict[SiteSignature, list[str]] = {}
    for site, signature in sites.items():
        alike.setdefault(signature, []).append(site)
    options = [
        KernelOption(
            site=fitting[0],
            others=tuple(fitting[1:]),
            kernel_id=kernel.kernel_id,
            blueprint_id=kernel.blueprint_id,
            blueprint=kernel.blueprint,
            num_parameters=kernel.num_parameters,
            flops_per_sample=kernel.flops_per_sample,
            zero_at_birth=kernel.zero_at_birth,
            tags=kernel.tags,
            risk=kernel.risk,
            aliases=kernel.aliases,
            record=kernel.record,
        )
        for signature, here in alike.items()
        for kernel in kernels[signature]
        if blueprints is None or not {kernel.blueprint, *kernel.aliases}.isdisjoint(blueprints)
        if (fitting := [site for site in here if not kernel.needs_neighbour or fits(site, kernel.blueprint_id)])
    ]
    places = {site: place for place, site in enumerate(sites)}
    return tuple(sorted(options, key=lambda option: (places[option.site], option.blueprint, option.kernel_id)))
