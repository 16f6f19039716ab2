"""The designs that ship with Esper, and those of a user's folder: one YAML file each.

    name: mlp_adapter                 as the file is called
    description: one line
    tags: [mlp, light]
    fit: [vector, sequence]           kinds of site
    zero_at_birth: true               optional; so is `replaces`
    nodes:                            each node reads the one above it (the first reads h) unless it names `inputs`
      - {id: down, op: linear, out: "max(1, C//4)"}
      - {id: act, op: gelu}
      - {id: up, op: linear, init: zeros}
    output: up                        optional; the last node

All keys of a node but `id`, `op` and `inputs` are parameters of its op. Adding a file adds a design.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from esper.leyline import INPUT, BlueprintError, BlueprintIR, Node, SiteKind, SiteSignature
from esper.leyline.contract import Contract, Name
from esper.leyline.ops import fits, validate

MAX_FILE_BYTES = 1 << 16
_NODE_KEYS = ("id", "op", "inputs")


class Design(Contract):
    """A named IR.

    Attributes:
        name: as the file is called.
        description: one line for people.
        tags: such as `conv`, `light`; policies may choose by them.
    """

    name: Name
    description: Annotated[str, Field(min_length=1, max_length=200)]
    tags: tuple[Name, ...] = ()
    ir: BlueprintIR


class _File(Contract):
    """The form of a design file."""

    name: Name
    description: str
    tags: tuple[Name, ...] = ()
    fit: tuple[SiteKind, ...]
    replaces: bool = False
    zero_at_birth: bool = False
    nodes: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    output: str | None = None


def load_library() -> Mapping[str, Design]:
    """The shipped designs by name, sorted. Read once a process."""
    return _shipped()


def load_designs(folder: str | Path) -> Mapping[str, Design]:
    """The designs of a user's folder (`*.yaml`) by name, sorted.

    Raises:
        BlueprintError: if the folder does not exist, or a file is wrong; `field` names the file, and the node in it.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise BlueprintError("is no folder", field=str(path), remedy="name a folder with one YAML file a design")
    return _load(path.iterdir())


def designs_for(signature: SiteSignature, designs: Mapping[str, Design] | None = None) -> list[Design]:
    """Those of `designs` (the library, if None) that fit the site, by name."""
    chosen = load_library() if designs is None else designs
    return [design for design in chosen.values() if fits(design.ir, signature) is None]


def parse_design(text: str, *, source: str) -> Design:
    """Reads one design.

    Args:
        text: YAML.
        source: what errors call it; the design must have its name.

    Raises:
        BlueprintError: with `source`, and the node at fault, in `field`.
    """
    if len(text.encode()) > MAX_FILE_BYTES:
        raise BlueprintError(f"is larger than {MAX_FILE_BYTES} bytes", field=source)
    try:
        form = _File.model_validate(yaml.safe_load(text))
        ir = BlueprintIR(
            fit=form.fit,
            nodes=tuple(_nodes(form.nodes)),
            output=form.output or str(form.nodes[-1].get("id")),
            replaces=form.replaces,
            zero_at_birth=form.zero_at_birth,
        )
        validate(ir)
        design = Design(name=form.name, description=form.description, tags=form.tags, ir=ir)
    except (yaml.YAMLError, RecursionError) as error:
        raise BlueprintError(f"is no YAML: {' '.join(str(error).split())}", field=source) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BlueprintError(first["msg"], field=f"{source}: {where}" if where else source) from error
    except BlueprintError as error:
        field = f"{source}: {error.field}" if error.field else source
        raise BlueprintError(error.message, field=field, remedy=error.remedy) from error
    return design


def _nodes(raw: Iterable[dict[str, Any]]) -> Iterable[Node]:
    above = INPUT
    for index, entry in enumerate(raw):
        params = {key: value for key, value in entry.items() if key not in _NODE_KEYS}
        fields = {key: entry[key] for key in _NODE_KEYS if key in entry}
        try:
            node = Node.model_validate({"inputs": (above,), **fields, "params": params})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"] if part != "params")
            raise BlueprintError(f"{where}: {first['msg']}", field=str(entry.get("id", f"node {index + 1}"))) from error
        yield node
        above = node.id


def _load(files: Iterable[Traversable]) -> Mapping[str, Design]:
    designs = {}
    for file in sorted(files, key=lambda file: file.name):
        if not file.name.endswith(".yaml"):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BlueprintError(f"cannot be read: {error}", field=file.name) from error
        design = parse_design(text, source=file.name)
        if f"{design.name}.yaml" != file.name:
            raise BlueprintError(f"its name is {design.name!r}", field=file.name, remedy="name the file as the design")
        designs[design.name] = design
    return MappingProxyType(designs)


@cache
def _shipped() -> Mapping[str, Design]:
    return _load(resources.files("esper.urza").joinpath("designs").iterdir())
