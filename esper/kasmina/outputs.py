"""Which tensor of a module's output a site is: its name, how it is taken out and how it is put back. Pure functions.

A module that puts out one tensor gives the site its path, `blocks.0`. Of one that puts out a tuple or a dict the tensor
is named after a `#`: `blocks.0#0` is the first of a tuple, `blocks.0#hidden` an entry of a dict. The rest of the
output passes by as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

MARK = "#"


def path_of(site: str) -> str:
    """The path of the module that puts out a site's tensor."""
    return site.partition(MARK)[0]


def part_of(site: str) -> int | str | None:
    """The tensor's place in the module's output: an index, a key, or None where the output is the tensor itself."""
    _, mark, part = site.partition(MARK)
    if not mark:
        return None
    return int(part) if part.isdecimal() else part


def parts(output: Any) -> Iterator[tuple[str, Any]]:
    """The entries of an output by their names behind the `#`; none of what is neither a tuple nor a dict, nor of a dict
    that `|` makes another class of: what reads it would miss that.
    """
    if type(output) is tuple:
        yield from ((str(place), entry) for place, entry in enumerate(output))
    elif isinstance(output, dict) and _keeps_its_class(output):
        yield from ((key, entry) for key, entry in output.items() if isinstance(key, str) and not key.isdecimal())


def _keeps_its_class(output: dict[Any, Any]) -> bool:
    try:
        return type(output | {}) is type(output)
    except TypeError:  # a class that cannot be made without arguments
        return False


def take(output: Any, part: int | str | None) -> torch.Tensor:
    """The site's tensor, out of what its module put out."""
    return output if part is None else output[part]


def put(output: Any, part: int | str | None, h: torch.Tensor) -> Any:
    """The output with another tensor in the site's place; a new object, of the same class."""
    if part is None:
        return h
    if isinstance(part, int):
        return (*output[:part], h, *output[part + 1 :])
    return output | {part: h}
