"""What Tamiyo is offered: kernels that may be used, and that the host can build."""

from __future__ import annotations

from esper.api import local_hub
from esper.config import parse_config
from esper.leyline import SiteKind, SiteSignature
from esper.tolaria.packet import kernel_options

SITES = {name: SiteSignature(kind=SiteKind.VECTOR, channels=8) for name in ("a", "b")}


def test_a_design_that_copies_a_layer_is_offered_only_where_the_host_has_one():
    config = parse_config({"tezzeret": {"blueprints": ["linear_stack", "mlp_adapter"]}})
    hub, _ = local_hub(list(SITES.values())[:1], config)
    asked = []

    def fits(site, blueprint_id):
        asked.append((site, hub.blueprint(blueprint_id).name))
        return site == "a"

    options = kernel_options(hub, SITES, blueprints=None, fits=fits)
    assert [(option.site, option.blueprint) for option in options] == [
        ("a", "linear_stack"),
        ("a", "mlp_adapter"),
        ("b", "mlp_adapter"),
    ]
    assert asked == [("a", "linear_stack"), ("b", "linear_stack")], "the others need none"
    assert kernel_options(hub, SITES, blueprints=["nothing"], fits=fits) == ()
