from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from contextlib import suppress

import pytest
import ray

from actors import tamiyo
from actors.cluster import connected
from esper.config import TamiyoConfig
from esper.leyline import (
    BudgetState,
    ConflictError,
    EpochRecord,
    HealthSignal,
    KernelOption,
    LayerHealthReport,
    SiteKind,
    SiteSignature,
    SystemStatePacket,
    UnavailableError,
)
from esper.tamiyo import initial_state, step

pytestmark = pytest.mark.ray

CONFIG = TamiyoConfig(warmup_epochs=0, plateau_window=2, deadline_s=240.0, startup_s=240.0)


def packet(epoch: int, val_loss: float = 1.0) -> SystemStatePacket:
    signature = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=8, extent=(8, 8))
    layers = [
        LayerHealthReport(
            run_id="run",
            layer_id=site,
            signature=signature,
            epoch=epoch,
            step=epoch,
            seeds=(HealthSignal(layer_id=site, seed_id="s0", epoch=epoch, grow_potential=potential),),
        )
        for site, potential in (("a", 0.1), ("b", 0.3))
    ]
    option = KernelOption(
        site="b",
        kernel_id="k",
        blueprint_id="i",
        blueprint="conv",
        num_parameters=9,
        flops_per_sample=9,
        zero_at_birth=True,
    )
    return SystemStatePacket(
        run_id="run",
        epoch=EpochRecord(run_id="run", epoch=epoch, num_epochs=20, step=epoch, train_loss=1.0, val_loss=val_loss),
        layers=tuple(layers),
        options=(option,),
        budget=BudgetState(params_used=10, params_limit=100, flops_used=10),
    )


@pytest.mark.parametrize(
    "error", [ray.exceptions.ActorDiedError(), RuntimeError("Deploying application tamiyo failed")]
)
def test_a_serve_that_ends_meanwhile_is_unavailable(error):
    with pytest.raises(UnavailableError, match="Tamiyo: Ray Serve ended"), tamiyo.serve_errors("Tamiyo"):
        raise error
    with pytest.raises(TimeoutError), tamiyo.serve_errors("Tamiyo"):
        raise TimeoutError  # the caller's own deadline


def test_a_wait_for_what_is_not_there_is_told_once(caplog, monkeypatch):
    # a Serve of another test's may be there, which says one thing and another, or nothing for 2 s
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with caplog.at_level("WARNING", "actors.tamiyo"), pytest.raises(UnavailableError, match=r"tried [1-9]\d* times"):
        tamiyo.Asking("nobody").ask(lambda handle: handle, 2.0)
    told = [record for record in caplog.records if record.message == "tamiyo.call.failed"]
    assert len(told) == 1


@pytest.fixture(scope="module")
def deployed():
    with connected(dashboard=False):
        tamiyo.deploy(timeout_s=240.0)
        yield
        tamiyo.undeploy(timeout_s=240.0, stop_serve=True)
        tamiyo.undeploy()  # harmless where nothing is left


@pytest.fixture(scope="module")
def controller(deployed):
    return tamiyo.ServeController(CONFIG, seed=3)


def test_decisions_through_the_handle_equal_the_local_step(controller):
    remote_state = local_state = initial_state(CONFIG, 3)
    commanded = []
    for epoch in range(5):
        seen = packet(epoch)
        local_state, expected = step(local_state, seen, CONFIG)
        remote_state, decided = controller.decide(remote_state, seen)
        assert decided == expected
        assert remote_state == local_state
        commanded += [command.site for command in decided.commands]
    assert commanded == ["b"]  # the comparison was not of waits alone
    assert controller.decide({}, packet(0)) == step(initial_state(CONFIG, 3), packet(0), CONFIG)


def test_the_replica_imports_no_torch_and_the_app_is_named(controller):
    from ray import serve

    about = controller.about()
    assert about["pid"] != os.getpid()
    assert about["imports_torch"] is False
    status = serve.status()
    assert status.proxies == {}  # no HTTP
    assert list(status.applications["tamiyo"].deployments) == ["Tamiyo"]


def test_an_error_of_the_step_comes_back_as_itself(controller):
    with pytest.raises(ConflictError, match=r"state\.version: cannot read Tamiyo's state"):
        controller.decide({"version": 9, "seed": 0}, packet(0))


def test_it_works_from_threads_and_workers(controller):
    expected = step(initial_state(CONFIG, 3), packet(0), CONFIG)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(controller.decide({}, packet(0)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=400)
    assert answers == [expected] * 4
    revived = pickle.loads(pickle.dumps(controller))
    remote_decide = ray.remote(num_cpus=0.1)(lambda asked, seen: asked.decide({}, seen))
    assert ray.get(remote_decide.remote(revived, packet(0)), timeout=400) == expected


def test_a_killed_replica_is_replaced_and_no_call_hangs(controller):
    """Every call ends by its deadline: with the right answer, or with UnavailableError."""
    impatient = tamiyo.ServeController(CONFIG.model_copy(update={"deadline_s": 2.0, "startup_s": 2.0}), seed=3)
    expected = step(initial_state(CONFIG, 3), packet(0), CONFIG)
    pid = controller.about()["pid"]
    os.kill(pid, signal.SIGKILL)
    answer, deadline = None, time.monotonic() + 240
    while time.monotonic() < deadline:  # each ends after 2 s; one that did not would be ended by the test's own limit
        with suppress(UnavailableError):
            answer = impatient.decide({}, packet(0))
            break
    assert answer == expected, "no replica came back"
    successor = controller.about()["pid"]
    assert successor != pid
    os.kill(successor, signal.SIGKILL)
    assert controller.decide({}, packet(0)) == expected  # repeated within the deadline, unseen by the trainer
    assert controller.about()["pid"] != successor


def test_what_is_not_deployed_is_unavailable_by_the_deadline(deployed):
    for deadline_s in (0.5, 5.0, 50.0):  # on a busy machine Serve may not have said why before a short deadline
        config = CONFIG.model_copy(update={"deadline_s": deadline_s, "startup_s": deadline_s})
        nobody = tamiyo.ServeController(config, name="nobody")
        with pytest.raises(UnavailableError, match=rf"tried \d+ times in {deadline_s:g} s") as caught:
            nobody.decide({}, packet(0))
        if "no answer" not in str(caught.value):
            break
    assert "'nobody' does not exist" in str(caught.value)


def test_deploying_again_keeps_the_replica(controller):
    from ray import serve

    for _ in range(2400):  # a replica that took another's place answers before Serve calls the application healthy
        if serve.status().applications["tamiyo"].status == "RUNNING":
            break
        time.sleep(0.1)
    pid = controller.about()["pid"]
    tamiyo.deploy(timeout_s=240.0)  # a quarter of it for the answer of the one that is there
    assert controller.about()["pid"] == pid
