"""The log of an actor: one JSON object a line on its standard error, which Ray keeps in a file and shows in the
dashboard; `ESPER_LOG=text` makes the lines for people.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Literal, cast

from esper.leyline.errors import ConfigError

FORM = "ESPER_LOG"
_FORMS = ("json", "text")


def log_as(actor: str, **fields: Any) -> None:
    """Sets logging up in an actor's process. Elsewhere, as in a driver or a test, it changes nothing: the process is
    another's.

    Args:
        actor: its name, which every line says.
        **fields: likewise, such as `run`.

    Raises:
        ConfigError: if `ESPER_LOG` is neither `json` nor `text`.
    """
    from esper.nissa.logs import configure

    ray: Any = sys.modules.get("ray")  # an actor's process has imported it
    if ray is None or not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return
    configure(form=form(), actor=actor, **fields)


def form() -> Literal["json", "text"]:
    """What `ESPER_LOG` says; JSON where it is not set."""
    value = os.environ.get(FORM) or _FORMS[0]
    if value not in _FORMS:
        raise ConfigError(f"{value!r} is no form of a log", field=FORM, remedy=f"one of: {', '.join(_FORMS)}")
    return cast("Literal['json', 'text']", value)
