"""Design files of a user's own: as submissions, and looked at as Tezzeret and Urabrask would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.leyline import BlueprintError, SiteKind, SiteSignature, ops
from esper.leyline.canonical import canonical_hash
from esper.urza.library import parse_design

if TYPE_CHECKING:
    from esper.urza.submission import BlueprintSubmission

MAX_FILE_BYTES = 1 << 20
EXAMPLES = (
    SiteSignature(kind=SiteKind.VECTOR, channels=16),
    SiteSignature(kind=SiteKind.FEATURE_MAP, channels=16, extent=(8, 8)),
    SiteSignature(kind=SiteKind.SEQUENCE, channels=16, extent=(12,)),
    SiteSignature(kind=SiteKind.SEQUENCE, channels=16, extent=(12,), causal=True),
)


def read_form(file: Path) -> dict[str, Any]:
    """A file as the body of a submission: a request as it is, a design of the library's form as one.

    Raises:
        BlueprintError: if it cannot be read or is malformed.
    """
    import yaml

    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise BlueprintError(f"is larger than {MAX_FILE_BYTES} bytes", field=str(file))
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) else "it is no text"
        raise BlueprintError(f"cannot read {file}: {words}", field="file") from error
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise BlueprintError(f"is neither YAML nor JSON: {' '.join(str(error).split())}", field=str(file)) from error
    if isinstance(tree, dict) and "ir" in tree:
        return tree
    design = parse_design(text, source=str(file))
    return {"name": design.name, "tags": list(design.tags), "ir": design.ir.model_dump(mode="json")}


def parse_form(form: Mapping[str, Any], changes: Mapping[str, Any], *, source: str) -> BlueprintSubmission:
    """The body of a submission; `changes` win, but tags are added.

    Raises:
        BlueprintError: names the field.
    """
    from pydantic import ValidationError

    from esper.urza.submission import BlueprintSubmission

    merged = {**form, **changes}
    if "tags" in changes and isinstance(form.get("tags"), list | tuple):
        merged["tags"] = list(dict.fromkeys([*form["tags"], *changes["tags"]]))
    try:
        return BlueprintSubmission.model_validate(merged)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise BlueprintError(f"{first['msg']}{more}", field=f"{source}: {where}") from error


def check_file(file: Path) -> dict[str, Any]:
    """Parses a design and runs the gauntlet at an example of each kind of site that it declares to fit.

    Raises:
        BlueprintError: if the file cannot be read, is malformed, fails a check, or fits at none of the examples.
    """
    from esper.leyline.lower import initialise, lower
    from esper.urabrask.gauntlet import examine

    try:
        text = file.read_text()
    except OSError as error:
        raise BlueprintError(f"cannot read {file}: {error.strerror}", field="file") from error
    design = parse_design(text, source=str(file))
    examples, misfits = [], []
    for signature in EXAMPLES:
        if signature.kind not in design.ir.fit:
            continue
        if (misfit := ops.fits(design.ir, signature)) is not None:
            misfits.append(misfit)
            examples.append({"signature": signature.key, "verdict": f"does not fit: {misfit}"})
            continue
        module = lower(design.ir, signature)
        initialise(module, design.ir, 0)
        report = examine(module, design.ir, signature)
        if not report.passed:
            raise BlueprintError(report.reason, field=f"{file} at {signature.key}")
        cost = f"{ops.count_parameters(design.ir, signature):,} parameters"
        examples.append({"signature": signature.key, "verdict": f"passed {len(report.checks)} checks, {cost}"})
    if len(misfits) == len(examples):
        raise BlueprintError(misfits[0], field=str(file), remedy="it must fit a site of a kind that it declares")
    return {"name": design.name, "ir_hash": canonical_hash(design.ir), "examples": examples}
