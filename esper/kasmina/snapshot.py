"""The growth of a host as plain data: JSON values and tensors, everything but the weights.

`save` copies, so that a snapshot in memory does not move with the host. `restore` builds the topology anew, whatever
stood there before; the weights come by `load_state_dict` afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from esper.kasmina.layer import Layer, all_layers, layer_at
from esper.kasmina.lifecycle import Lifecycle, Moment
from esper.kasmina.seed import KernelFacts, Offer, Retirement, Seed
from esper.kasmina.table import SeedTable
from esper.leyline.errors import ConflictError
from esper.leyline.kernels import SiteSignature
from esper.leyline.lower import lower
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import BlendStrategy, Evidence, LifecycleEvent, StageSpan

VERSION = 1


def save(life: Lifecycle) -> dict[str, Any]:
    """The state of all seeds of a host."""
    return {
        "version": VERSION,
        "topology_version": life.version,
        "clock": life.clock,
        "num_planted": life.num_planted,
        "num_grafts": life.num_grafts,
        "moment": [life.moment.run_id, life.moment.epoch, life.moment.step],
        "val_loss": life.val_loss,
        "pending": [event.model_dump(mode="json") for event in life.pending],
        "layers": [_save_layer(layer) for layer in all_layers(life.layers)],
    }


def restore(life: Lifecycle, state: Mapping[str, Any]) -> None:
    """Rebuilds the seeds of a state.

    Raises:
        ConflictError: if the state is of another version, or of a host with other sites; nothing has changed then.
    """
    if state["version"] != VERSION:
        raise ConflictError(f"growth state of version {state['version']}, this is {VERSION}")
    saved = {entry["site"]: SiteSignature.model_validate(entry["signature"]) for entry in state["layers"]}
    here = {layer.site: layer.signature for layer in all_layers(life.layers)}
    if saved != here:
        raise ConflictError(
            f"growth state of a host with sites {', '.join(saved)}; this one has {', '.join(here)}",
            remedy="restore into the same model with the same example shapes",
        )
    life.arrivals.forget_all()
    life.version = max(life.version, state["topology_version"]) + 1
    life.clock, life.num_planted, life.num_grafts = state["clock"], state["num_planted"], state["num_grafts"]
    life.moment = Moment(*state["moment"])
    life.val_loss = state["val_loss"]
    life.pending = [LifecycleEvent.model_validate(event) for event in state["pending"]]
    for entry in state["layers"]:
        _restore_layer(life, layer_at(life.layers, entry["site"]), entry)
    life.restore_requests()


def _save_layer(layer: Layer) -> dict[str, Any]:
    return {
        "site": layer.site,
        "signature": layer.signature.model_dump(mode="json"),
        "table": layer.table.state(),
        "health": layer.observer.state(),
        "seeds": [_save_seed(seed, has_kernel=layer.has_kernel(seed)) for seed in layer.seeds],
    }


def _save_seed(seed: Seed, *, has_kernel: bool) -> dict[str, Any]:
    retirement = seed.retirement
    return {
        "seed_id": seed.seed_id,
        "strategy": seed.strategy.value,
        "lr_factor": seed.lr_factor,
        "native": seed.native or seed.native_wanted,
        "requested": [seed.requested, seed.requested_blueprint],
        "facts": seed.facts.model_dump(mode="json") if seed.facts else None,
        "has_kernel": has_kernel,
        "spans": [span.model_dump(mode="json") for span in seed.spans],
        "evidence": seed.evidence.model_dump(mode="json") if seed.evidence else None,
        "harm": seed.harm.model_dump(mode="json") if seed.harm else None,
        "baseline": seed.baseline,
        "val_finite": seed.val_finite,
        "retirement": [retirement.from_alpha, retirement.reason] if retirement else None,
        "losses": list(seed.losses),
        "fault": seed.fault,
        "trace_id": seed.trace_id,
        "reason": seed.reason,
        "trial": seed.trial.model_dump(mode="json") if seed.trial else None,
        "offer": _save_offer(seed.offer),
        "optimizer": copy.deepcopy(seed.optimizer.state_dict()) if seed.optimizer else None,
    }


def _save_offer(offer: Offer | None) -> list[Any] | None:
    if offer is None:
        return None
    weights = None if offer.weights is None else {name: tensor.clone() for name, tensor in offer.weights.items()}
    return [offer.kernel_id, offer.trial.model_dump(mode="json"), weights]


def _restore_layer(life: Lifecycle, layer: Layer, entry: Mapping[str, Any]) -> None:
    layer.clear()
    layer.table = SeedTable(entry["table"], life.arrivals.device())
    layer.observer.load(entry["health"])
    for row, saved in enumerate(entry["seeds"]):
        seed = Seed(saved["seed_id"], layer.site, layer.table, row)
        _restore_seed(seed, saved)
        layer.seeds.append(seed)
        if saved["has_kernel"]:
            _restore_kernel(life, layer, seed, saved)
    layer.sync(life.module.get_submodule(layer.path))


def _restore_seed(seed: Seed, saved: Mapping[str, Any]) -> None:
    seed.strategy = BlendStrategy(saved["strategy"])
    seed.lr_factor = saved.get("lr_factor", 1.0)
    seed.requested, seed.requested_blueprint = saved["requested"]
    seed.native_wanted = saved.get("native")  # asked for again: until it is back the IR computes the same
    seed.facts = KernelFacts.model_validate(saved["facts"]) if saved["facts"] else None
    seed.spans = [StageSpan.model_validate(span) for span in saved["spans"]]
    seed.evidence = Evidence.model_validate(saved["evidence"]) if saved["evidence"] else None
    seed.harm = Evidence.model_validate(saved["harm"]) if saved["harm"] else None
    seed.baseline = saved["baseline"]
    seed.val_finite = saved["val_finite"]
    seed.retirement = Retirement(*saved["retirement"]) if saved["retirement"] else None
    seed.losses = (saved["losses"][0], saved["losses"][1])
    seed.fault = saved.get("fault", "")
    seed.trace_id = saved.get("trace_id", "")
    seed.reason = saved["reason"]
    seed.trial = Evidence.model_validate(saved["trial"]) if saved.get("trial") else None
    if offer := saved.get("offer"):
        seed.offer = Offer(offer[0], Evidence.model_validate(offer[1]), offer[2])


def _restore_kernel(life: Lifecycle, layer: Layer, seed: Seed, saved: Mapping[str, Any]) -> None:
    assert seed.facts is not None
    module = lower(seed.facts.ir, seed.facts.signature).to(life.arrivals.device())
    layer.put_kernel(seed, seed.facts, module)
    if seed.stage is SeedStage.TRAINING:
        seed.begin_training(module, life.config.shadow_lr)
        if seed.optimizer is not None:
            # a copy: torch takes the tensors over as they are, and the next step would write into the state
            seed.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    module.requires_grad_(seed.stage.is_blended)
