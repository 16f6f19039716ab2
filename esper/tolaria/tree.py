"""A nested state as JSON and named tensors, and back: dicts, lists, tuples, counters and numbers. No pickle.

Keys of dicts keep their type (an optimizer numbers its parameters), tuples stay tuples, and a tensor that occurs
twice is stored twice. What cannot be written is refused by its place in the tree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

_TENSOR, _PAIRS, _TUPLE, _COUNTER = "$tensor", "$pairs", "$tuple", "$counter"
_PLAIN = frozenset({bool, int, float, str, type(None)})


def flatten(state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Returns the JSON part and the tensors, by the names it refers to.

    Raises:
        TypeError: for a value of another kind; names its place.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _flatten(state, "state", tensors), tensors


def unflatten(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:  # noqa: PLR0911 - one return a kind
    """Inverse of `flatten`."""
    if isinstance(tree, list):
        return [unflatten(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        ((mark, value),) = tree.items()
        if mark == _TENSOR:
            return tensors[value]
        if mark == _PAIRS:
            return {key: unflatten(item, tensors) for key, item in value}
        if mark == _TUPLE:
            return tuple(unflatten(item, tensors) for item in value)
        if mark == _COUNTER:
            return Counter(dict(value))
    return {key: unflatten(value, tensors) for key, value in tree.items()}


def clone(state: Any) -> Any:
    """Returns a deep copy in which every tensor is detached and owns its memory, on the device where it was."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        copied = {key: clone(value) for key, value in state.items()}
        return Counter(copied) if isinstance(state, Counter) else copied
    if type(state) is tuple and _is_plain(state):
        return state
    if isinstance(state, (list, tuple)):
        return type(state)(clone(value) for value in state)
    return state


def _is_plain(values: tuple[Any, ...]) -> bool:
    """Whether nothing in there can change or needs a look: so is a generator's state, of 625 numbers."""
    return _PLAIN.issuperset(map(type, values))


def _flatten(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:  # noqa: PLR0911 - one return a kind
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        # safetensors refuses tensors that share memory
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Counter):
        return {_COUNTER: [[key, count] for key, count in value.items()]}
    if isinstance(value, Mapping):
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        if plain:
            return {key: _flatten(item, f"{place}.{key}", tensors) for key, item in value.items()}
        return {_PAIRS: [[_check_key(key, place), _flatten(v, f"{place}.{key}", tensors)] for key, v in value.items()]}
    if isinstance(value, tuple):
        if _is_plain(value):
            return {_TUPLE: list(value)}
        return {_TUPLE: [_flatten(item, f"{place}[{i}]", tensors) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_flatten(item, f"{place}[{i}]", tensors) for i, item in enumerate(value)]
    raise TypeError(f"{place} is a {type(value).__name__}, which a checkpoint cannot hold")


def _check_key(key: Any, place: str) -> Any:
    if isinstance(key, (str, int, float, bool)) or key is None:
        return key
    raise TypeError(f"{place} has a key of type {type(key).__name__}, which a checkpoint cannot hold")
