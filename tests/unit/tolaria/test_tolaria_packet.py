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
    assert [(option.sites, option.blueprint) for option in options] == [
        (("a",), "linear_stack"),
        (("a", "b"), "mlp_adapter"),
    ]
    assert asked == [("a", "linear_stack"), ("b", "linear_stack")], "the others need none"
    assert kernel_options(hub, SITES, blueprints=["nothing"], fits=fits) == ()


def test_a_shipped_design_under_a_name_of_ones_own_is_offered_once_and_by_either_name():
    config = parse_config({"tezzeret": {"blueprints": ["mlp_adapter"]}})
    hub, _ = local_hub(list(SITES.values())[:1], config)
    shipped = hub.blueprints(name="mlp_adapter")[0]
    hub.submit_blueprint(shipped.ir, name="mine", targets=[SITES["a"]], tags=["my-tag"])
    [kernel] = hub.kernels()
    assert hub.claim("w", fingerprint=kernel.fingerprint) is None
    for blueprints in (None, ["mine"], ["mlp_adapter"], ["mlp_adapter", "mine"]):
        options = kernel_options(hub, SITES, blueprints=blueprints, fits=lambda *_: True)
        assert [(one.sites, one.blueprint, one.aliases) for one in options] == [
            (tuple(SITES), "mlp_adapter", ("mine",))
        ]
        assert all("my-tag" in one.tags for one in options)
