"""Every system of a run on Ray is killed, or the storage fails, at any step, amid a graft, a hot swap, a checkpoint and
a rollback: the run ends; in deterministic mode with the weights of an undisturbed one, else unharmed.

`make soak` runs the plans; it keeps their results below `ESPER_SOAK_DIR` (default: `.soak`) and goes on there if it was
stopped; delete the folder to begin again. `make test` runs fixed plans: `test_deterministic_faults.py`, and those of a
trainer alone in `tests/integration/test_chaos.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fault_support as support
import pytest
import ray
import safetensors.torch
from chaos_plans import NUM_PLANS, PLACES, VICTIMS, Chaos, Plan, Row

from actors import platform, urza
from esper.leyline import KernelStatus, Pipeline, RunStatus
from esper.storage import Storage

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1200),
    # Ray's own, as Serve and Train are imported
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

CONTROL_SEEDS = range(6)
WAIT_S = 600.0
SYSTEMS = {"Tamiyo", "Urza", "Oona", "Tezzeret"}
ORDINARY = {
    "tamiyo__deadline_s": 2.0,
    "tezzeret__optimize": "never",  # but for what is to swap: native code would keep all compilers busy for minutes
    # a host that learns within the run's eight epochs, so that harm would be seen in its loss
    "host__channels": [8, 16],
    "tolaria__optimizer__lr": 0.02,
}
SWAP = {
    # squeeze-and-excite: many small operations, which native code does in about half the time
    "tamiyo__schedule": [{"epoch": 0, "site": support.SITE, "blueprint": "se"}],
    "tezzeret__blueprints": ["se"],
    "tezzeret__optimize": "grafted",
}


class Arena:
    """Carries plans out, and knows what an undisturbed run comes to.

    Args:
        train: see `conftest.train`.
        folder: keeps what is known.
    """

    def __init__(self, train: Callable[..., Any], folder: Path) -> None:
        self._train = train
        self._folder = folder
        self._store = folder / "store"
        folder.mkdir(parents=True, exist_ok=True)

    def row(self, plan: Plan) -> Row:
        """Carries a plan out, or remembers what it came to.

        Raises:
            AssertionError: if the run was harmed.
        """
        path = self._folder / f"plan-{plan.number:02d}.json"
        if not path.exists():
            row = self._carry_out(plan)
            path.write_text(json.dumps(asdict(row)))
        return Row(**json.loads(path.read_text()))

    # ------------------------------------------------------------ undisturbed

    def weights(self, kind: str, num_workers: int) -> dict[str, Any]:
        """The final weights of the undisturbed run in deterministic mode."""
        world = max(1, num_workers)
        path = self._folder / f"undisturbed-{kind}-{world}.safetensors"
        if not path.exists():
            settings = self._settings(kind, deterministic=True, num_workers=0 if world == 1 else world)
            found = self._undisturbed(f"undisturbed-{kind}-{world}", kind, settings)
            safetensors.torch.save_file(support.final_weights(found.directory), path)
        return safetensors.torch.load_file(path)

    def controls(self, kind: str) -> dict[int, dict[str, Any]]:
        """Of each seed, what the undisturbed run in ordinary mode came to."""
        return {seed: self._control(kind, seed) for seed in CONTROL_SEEDS}

    def _control(self, kind: str, seed: int) -> dict[str, Any]:
        path = self._folder / f"control-{kind}-{seed}.json"
        if not path.exists():
            if kind == "swap":
                self._have_native_code()
            settings = self._settings(kind, deterministic=False, num_workers=0) | {"seed": seed}
            summary = self._undisturbed(f"control-{kind}-{seed}", kind, settings).summary
            assert summary.went_without == ()
            native = [rung.rung.value for rung in summary.rungs]
            assert native == (["native"] if kind == "swap" else [])
            assert "GRAFTING" in support.stages(summary)
            path.write_text(json.dumps({"val_loss": summary.metrics.val_loss}))
        return json.loads(path.read_text())

    def _undisturbed(self, run_id: str, kind: str, settings: dict[str, Any]) -> Any:
        shutil.rmtree(self._store / "runs" / run_id, ignore_errors=True)
        found = self._train(self._store, run_id, Chaos(kind, self._folder), **settings)
        assert found.summary.status is RunStatus.FINISHED
        assert bool(found.summary.rollbacks) == (kind == "sick")
        return found

    def _have_native_code(self) -> None:
        """Has the native code compiled that the runs swap to, and waits for it: a run is over long before that, and a
        plan with a storage of its own takes this platform down.
        """
        settings = self._settings("swap", deterministic=False, num_workers=0)
        self._train(self._store, f"asks-for-native-code-{time.time_ns()}", Chaos("swap", self._folder), **settings)
        hub = urza.connect(str(self._store))
        until = time.monotonic() + WAIT_S
        while not (found := hub.kernels(status=KernelStatus.VALIDATED, pipeline=Pipeline.OPTIMIZED)):
            assert time.monotonic() < until, "no native code was made"
            time.sleep(0.5)
        assert [kernel.optimization_level for kernel in found] == [1], "native code is no faster here"

    def _settings(self, kind: str, *, deterministic: bool, num_workers: int) -> dict[str, Any]:
        return {
            "deterministic": deterministic,
            "tolaria__num_workers": num_workers,
            "tezzeret__key_file": self._folder / "key.pem",  # the storage may fail
            "tezzeret__yields": "never",
            **({} if deterministic else ORDINARY),
            **(SWAP if kind == "swap" else {}),
        }

    # ------------------------------------------------------------ disturbed

    def _carry_out(self, plan: Plan) -> Row:
        settings = self._settings(plan.kind, deterministic=plan.deterministic, num_workers=plan.num_workers)
        if not plan.deterministic:
            settings["seed"] = self._middle_seed(plan)
        expected = self.weights(plan.kind, plan.num_workers) if plan.deterministic else {}
        marks = self._folder / f"plan-{plan.number:02d}"
        shutil.rmtree(marks, ignore_errors=True)
        marks.mkdir()
        storage = self._storage(plan, marks)
        faults = Chaos(plan.kind, marks, plan, storage, Storage.at(str(storage)).key)
        run_id = f"plan-{plan.number:02d}"
        shutil.rmtree(storage / "runs" / run_id, ignore_errors=True)
        began = time.monotonic()
        if plan.victim == "driver":
            self._driven(plan, run_id, faults, settings)
        found = self._train(storage, run_id, faults, resume=plan.victim == "driver", **settings)
        seconds = time.monotonic() - began
        self._wait_for_mending(plan, faults)
        if storage != self._store:
            platform.down(str(storage))
        killed = [] if plan.victim == "storage" else faults.fired.read_text().split()
        assert faults.fired.exists(), f"nothing happened: {plan}"
        summary = found.summary
        assert summary.status is RunStatus.FINISHED
        if plan.deterministic:
            assert support.differences(support.final_weights(found.directory), expected) == []
            assert summary.went_without == ()
            outcome = "bit-equal"
        else:
            outcome = self._unharmed(plan, summary)
        return Row(
            plan.number, plan.victim, plan.place if plan.step is None else f"{plan.place} {plan.step}",
            "deterministic" if plan.deterministic else "ordinary", plan.num_workers, round(seconds, 1), len(killed),
            outcome, summary.went_without,
        )  # fmt: skip

    def _storage(self, plan: Plan, marks: Path) -> Path:
        """The storage that all share, or one of its own: where kernels are to be on their way, or all of Ray dies."""
        alone = plan.victim == "driver" and plan.kind != "swap"
        alone |= plan.victim in {"compiler", "storage"} and plan.place == "step"
        return marks / "store" if alone else self._store

    def _driven(self, plan: Plan, run_id: str, faults: Chaos, settings: dict[str, Any]) -> None:
        """Starts the run in a driver of its own, and returns once that is dead.

        It has a Ray of its own, which dies with it, but for a swap: the native code is in the shared storage.
        """
        address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if plan.kind == "swap" else {}
        killed = support.drive(faults.folder, support.config(faults.storage, **settings), run_id, faults, **address)
        assert killed.returncode == -9, killed.stderr

    def _wait_for_mending(self, plan: Plan, faults: Chaos) -> None:
        until = time.monotonic() + WAIT_S
        while plan.victim == "storage" and faults.fired.exists() and not faults.mended.exists():
            assert time.monotonic() < until, "the storage was not put back"
            time.sleep(0.1)

    def _middle_seed(self, plan: Plan) -> int:
        """A control's seed whose own loss is not the greatest, drawn by the plan's number."""
        controls = self.controls(plan.kind)
        ranking = sorted(controls, key=lambda seed: controls[seed]["val_loss"])[:-1]
        return ranking[plan.number % len(ranking)]

    def _unharmed(self, plan: Plan, summary: Any) -> str:
        controls = self.controls(plan.kind)
        losses = [control["val_loss"] for control in controls.values()]
        val_loss = summary.metrics.val_loss
        words = f"{val_loss:.3f} of {min(losses):.3f} to {max(losses):.3f}"
        assert val_loss <= max(losses), words
        # growth went on (when, depends on the clock here, and so does how far it came), or the summary says why not
        assert "GRAFTING" in support.stages(summary) or summary.went_without
        assert {words.split(":")[0] for words in summary.went_without} <= SYSTEMS
        return words


@pytest.fixture(scope="module")
def arena(train):
    return Arena(train, Path(os.environ.get("ESPER_SOAK_DIR", ".soak")).resolve() / "chaos-on-ray")


@pytest.mark.soak
@pytest.mark.parametrize("number", range(NUM_PLANS), ids=[f"plan-{number:02d}" for number in range(NUM_PLANS)])
def test_a_disturbed_run_ends_unharmed(arena, capsys, number):
    plan = Plan.drawn(number)
    with capsys.disabled():
        sys.stdout.write(f"\n{plan}: ")
        sys.stdout.flush()
        row = arena.row(plan)
        without = "; ".join(row.went_without) or "nothing"
        sys.stdout.write(f"{row.seconds} s, {row.killed} killed, {row.outcome}, without {without}\n")


def test_the_plans_are_of_every_kind():
    plans = [Plan.drawn(number) for number in range(NUM_PLANS)]
    assert len({(plan.victim, plan.place) for plan in plans}) == len(VICTIMS) * len(PLACES)
    assert {plan.deterministic for plan in plans} == {True, False}
    assert {plan.num_workers for plan in plans} == {0, 1, 2}
    assert not any(plan.deterministic for plan in plans if plan.place == "swapping")
