"""What is told of a blueprint while its compilers go on: of several questions, none may belie another."""

from __future__ import annotations

from urza_samples import BUILD, VECTOR, artifact_of, design

from esper.urza.catalog import TargetState
from esper.urza.memory import MemoryHub
from esper.urza.submission import view_of


class Moving:
    """A hub in which something happens right after the first question."""

    def __init__(self, hub, happens):
        self._hub, self._happens = hub, happens

    def __getattr__(self, name):
        def asked(*args):
            answer = getattr(self._hub, name)(*args)
            happens, self._happens = self._happens, lambda: None
            happens()
            return answer

        return asked


def test_where_nothing_is_open_every_target_has_ended():
    hub = MemoryHub()
    blueprint = hub.submit_blueprint(design(), name="one", targets=[VECTOR])
    job = hub.claim("w", fingerprint=BUILD)
    view = view_of(Moving(hub, lambda: hub.complete(job, *artifact_of(job))), blueprint.blueprint_id)
    ended = [target.state is TargetState.COMPILED for target in view.targets]
    assert (view.outlook.num_open, ended) in [(1, [False]), (1, [True]), (0, [True])]
    later = view_of(hub, blueprint.blueprint_id)
    assert (later.outlook.num_open, later.blueprint.status) == (0, "VALIDATED")
