"""Gathers experience: plays runs in this process, one after the other, and logs their decisions to a storage."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, get_args

from esper.config import RunConfig, TamiyoConfig
from esper.leyline.errors import ConfigError
from jobs.environment import data_root

if TYPE_CHECKING:
    from esper.storage import Storage


def gather(config: RunConfig, policies: Sequence[str], seeds: Sequence[int], *, say: Callable[[str], None]) -> int:
    """Plays a run for each policy and seed, and returns how many were played: those that are logged are not again.

    Args:
        config: of the runs; `storage` is where experience goes. The run is known by `name`, a digest of the settings
            that its outcome depends on, policy (with its version where it is a learned one) and seed.
        policies: one that is named twice is played twice, with other draws.
        seeds: of host weights and order of samples, the same for all policies.
        say: takes a line for each run.

    Raises:
        ConfigError: for a policy that there is not; nothing was played then.
        NotFoundError: if the learned policy is not in the storage; likewise.
        EsperError: if a run fails.
    """
    from esper.data import load_data
    from esper.simic.experience import Experience
    from esper.storage import Storage

    storage = Storage.at(config.storage, config.storage_options)
    storage.check_writable()
    deciders = {policy: _deciding(config, policy, storage) for policy in policies}
    data = load_data(config.data, task=config.task, seed=config.seed, data_root=data_root())
    known = {episode.about.run_id for episode in Experience(storage).episodes()}
    asked = [
        (policy, seed, policies[:i].count(policy), _ending(deciders[policy], seed, policies[:i].count(policy)))
        for seed in seeds
        for i, policy in enumerate(policies)
    ]
    if earlier := sum(f"{config.name}-{ending}" in known for *_, ending in asked):
        say(f"{earlier} runs of an earlier version, whose names do not tell their settings, are not counted")
    num = 0
    for policy, seed, draw, ending in asked:
        run_id = f"{config.name}-{_digest(config)}-{ending}"
        if run_id in known:
            continue
        own = config.model_copy(update={"seed": seed, "tamiyo": deciders[policy]})
        loss = _play(own, data, storage, run_id, draw)
        num += 1
        say(f"{run_id}: validation loss {loss:.4f}")
    return num


def _ending(decider: TamiyoConfig, seed: int, draw: int) -> str:
    """What tells runs of the same settings apart."""
    whose = f"-{decider.gnn.version[:8]}" if decider.policy == "gnn" else ""
    return f"{decider.policy}{whose}-{seed}" + (f"-{draw}" if draw else "")


def _digest(config: RunConfig) -> str:
    """Of the settings that all runs have in common; the configured seed is that of the data's parts."""
    from esper.simic.identity import digest_of, settings_of_run

    settings = settings_of_run(config)
    del settings["tamiyo"]["policy"], settings["tamiyo"]["gnn"]["version"]
    return digest_of(settings)


def _deciding(config: RunConfig, policy: str, storage: Storage) -> TamiyoConfig:
    """Returns the settings of the run's controller, with the version that a learned policy means."""
    from esper.tamiyo.gnn import pin
    from esper.urza.policies import StoredPolicies

    known = get_args(TamiyoConfig.model_fields["policy"].annotation)
    if policy not in known:
        raise ConfigError(f"there is no policy {policy!r}", field="--policies", remedy=f"some of {', '.join(known)}")
    return pin(config.tamiyo.model_copy(update={"policy": policy}), StoredPolicies(storage))


def _play(config: RunConfig, data: Any, storage: Any, run_id: str, draw: int) -> float:
    from esper.api import configured_workload, local_hub_of, train_local
    from esper.leyline import StorageError
    from esper.simic.experience import ExperienceWriter, about_run
    from esper.tamiyo import LocalController
    from esper.urza.policies import StoredPolicies

    # nothing that learns sees the test part
    workload = configured_workload(config, data, with_test=False)
    bare = config.tamiyo.policy == "none"
    hub, key = (None, None) if bare else local_hub_of(workload.model, workload.example, config)
    with tempfile.TemporaryDirectory(prefix="esper-gather-") as directory:
        summary = train_local(
            workload,
            config,
            directory=directory,
            run_id=run_id,
            hub=hub,
            bus=None,
            controller=LocalController(
                config.tamiyo, seed=config.seed + 7919 * draw, policies=StoredPolicies(storage).get
            ),
            public_key=key,
            experience=ExperienceWriter(storage, about_run(config, run_id), config.simic),
        )
    lost = [words for words in summary.went_without if "experience" in words]
    if lost:
        raise StorageError("; ".join(lost), field="storage")
    assert summary.metrics.val_loss is not None
    return summary.metrics.val_loss
