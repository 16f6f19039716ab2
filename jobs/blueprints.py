"""`esper blueprints check`: one design file, looked at as Tezzeret and Urabrask would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esper.leyline import BlueprintError, SiteKind, SiteSignature, ops
from esper.leyline.canonical import canonical_hash
from esper.urza.library import parse_design

EXAMPLES = (
    SiteSignature(kind=SiteKind.VECTOR, channels=16),
    SiteSignature(kind=SiteKind.FEATURE_MAP, channels=16, extent=(8, 8)),
    SiteSignature(kind=SiteKind.SEQUENCE, channels=16, extent=(12,)),
    SiteSignature(kind=SiteKind.SEQUENCE, channels=16, extent=(12,), causal=True),
)


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
