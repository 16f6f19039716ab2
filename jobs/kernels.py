"""`esper kernels`: what was compiled: lists, searches, one kernel, and its container, verified."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from esper.leyline.errors import ConfigError, StorageError
from jobs.assets import find_blueprint, find_kernel, reading, writing
from jobs.options import (
    DEFAULT_STORAGE,
    Descending,
    Json,
    Limit,
    Offset,
    Reason,
    Storage,
    TakeOver,
    complete_blueprint,
    complete_kernel,
    complete_signature,
    complete_tag,
    parsed,
    print_json,
)
from jobs.tables import fields, table

if TYPE_CHECKING:
    from esper.leyline import ValidationReport
    from esper.leyline.catalogue import KernelEntry, KernelPage

KEY_FILE = "~/.config/esper/signing_key.pem"
"""Where the signer's key lies by default (`tezzeret.key_file`)."""

kernels_app = typer.Typer(help="Kernels: what was compiled.", no_args_is_help=True)

KernelArg = Annotated[
    str, typer.Argument(metavar="KERNEL", help="Its id, or a beginning of it.", autocompletion=complete_kernel)
]
BlueprintOption = Annotated[
    str | None,
    typer.Option(help="Only kernels of this blueprint, by name or id.", autocompletion=complete_blueprint),
]
SignatureOption = Annotated[
    str | None,
    typer.Option(help="Only kernels for this site, such as vector-8-float32-cpu.", autocompletion=complete_signature),
]
StatusOption = Annotated[str, typer.Option(help="validated, rejected, retired or any.")]
PipelineOption = Annotated[
    str | None, typer.Option(help="Only kernels made so: fast, or optimized, whatever they run from.")
]
OrderOption = Annotated[
    str, typer.Option(help="created, performance, gain, fetches, parameters, flops, memory, size or risk.")
]


# ---------------------------------------------------------------- commands


@kernels_app.command("ls")
def ls(
    blueprint: BlueprintOption = None,
    signature: SignatureOption = None,
    status: StatusOption = "validated",
    pipeline: PipelineOption = None,
    order: OrderOption = "created",
    descending: Descending = False,
    limit: Limit = 100,
    offset: Offset = 0,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """List kernels."""
    page = _search(
        storage,
        blueprint=blueprint,
        signature=signature,
        status=status,
        pipeline=pipeline,
        order=order,
        descending=descending,
        limit=limit,
        offset=offset,
    )
    _print(page, as_json=as_json)


@kernels_app.command("search")
def search(
    tag: Annotated[
        list[str] | None, typer.Option(help="With this tag; of several, with each.", autocompletion=complete_tag)
    ] = None,
    any_tag: Annotated[bool, typer.Option("--any", help="Of several tags one is enough.")] = False,
    min_performance: Annotated[
        float | None, typer.Option(help="At least so many times as fast as the eager module.")
    ] = None,
    max_risk: Annotated[float | None, typer.Option(help="With a risk score of at most this, from 0 to 1.")] = None,
    blueprint: BlueprintOption = None,
    signature: SignatureOption = None,
    status: StatusOption = "validated",
    pipeline: PipelineOption = None,
    order: OrderOption = "performance",
    descending: Annotated[bool, typer.Option("--desc/--asc", help="Largest first, or smallest.")] = True,
    limit: Limit = 100,
    offset: Offset = 0,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Find kernels by tags, measured speed and risk, the fastest first."""
    page = _search(
        storage,
        blueprint=blueprint,
        signature=signature,
        status=status,
        pipeline=pipeline,
        order=order,
        descending=descending,
        limit=limit,
        offset=offset,
        min_performance=min_performance,
        max_risk=max_risk,
        **{"tags_any" if any_tag else "tags_all": tuple(tag or ())},
    )
    _print(page, as_json=as_json)


@kernels_app.command("show")
def show(kernel: KernelArg, storage: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """Show one kernel: how it was made, what its checks found, how it was used, how fast it was."""
    with reading(storage) as hub:
        entry = hub.kernel_entry(find_kernel(hub, kernel))
    if as_json:
        print_json(entry.model_dump(mode="json"))
    else:
        typer.echo(shown(entry))


@kernels_app.command("retire")
def retire(
    kernel: KernelArg,
    reason: Reason,
    take_over: TakeOver = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Take a kernel out of use, for good: no run is offered it any more. What has grafted it goes on with it.

    The same design is compiled again only by another build of the workers.
    """
    from esper.leyline import KernelStatus

    with reading(storage) as there:  # where nothing lies nothing is made
        id_ = find_kernel(there, kernel)
    with writing(storage, take_over=take_over) as hub:
        hub.mark_kernel(id_, KernelStatus.RETIRED, reason)
        entry = hub.kernel_entry(id_)
    if as_json:
        print_json(entry.model_dump(mode="json"))
    else:
        typer.echo(f"kernel {id_[:12]} of {entry.kernel.blueprint_name} is RETIRED: {entry.reason}")


@kernels_app.command("fetch")
def fetch(
    kernel: KernelArg,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write it; ID.kernel without.")] = None,
    public_key: Annotated[
        str | None,
        typer.Option(help="The signer's public key, 64 hexadecimal digits. Without: that of tezzeret.key_file here."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Write a kernel's container to a file, after its hash and its signature were verified."""
    from esper.leyline.container import unpack
    from esper.leyline.errors import TamperedError

    key = pinned_key(public_key)
    with reading(storage) as hub:
        id_ = find_kernel(hub, kernel)
        path = out or Path(f"{id_[:16]}.kernel")
        if path.exists() and not force:
            raise ConfigError(f"{path} is there already", field="--out", remedy="give --force or another --out")
        data = hub.fetch(id_)
        verified = unpack(data, key)
        if verified.kernel_id != id_:
            raise TamperedError(f"the bytes are of kernel {verified.kernel_id}, not of {id_}", field="kernel_id")
        _write(path, data)
    manifest = verified.manifest
    result = {
        "path": str(path),
        "kernel_id": id_,
        "bytes": data.nbytes,
        "signed_by": key,
        "blueprint": manifest.blueprint_name,
        "signature": manifest.signature.key,
        "pipeline": manifest.pipeline.value,
    }
    if as_json:
        print_json(result)
        return
    typer.echo(f"wrote {path} ({data.nbytes / 1024:.0f} KiB): {manifest.blueprint_name} for {manifest.signature.key}")
    typer.echo(f"hash {id_[:16]} and signature of {key[:16]} hold")


# ---------------------------------------------------------------- how


def pinned_key(given: str | None) -> str:
    """Whose signature is asked for: what is given, or the public half of the signing key here. Never from the storage.

    Raises:
        ConfigError: if there is neither, or it is no key.
    """
    from esper.leyline.keys import load, public_hex, public_key

    if given is not None:
        public_key(given)
        return given
    if not Path(KEY_FILE).expanduser().exists():
        raise ConfigError(
            f"there is no signing key at {KEY_FILE} to verify with",
            field="--public-key",
            remedy="give --public-key: a run's config.yaml names it as kasmina.public_key",
        )
    return public_hex(load(KEY_FILE))


def _write(path: Path, data: memoryview) -> None:
    """Writes a file that is whole or absent."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        try:
            with draft.open("xb") as file:
                file.write(data)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {os.strerror(error.errno or 0)}", field="--out") from error


def _search(storage: str, *, blueprint: str | None, signature: str | None, status: str, **rest: Any) -> KernelPage:
    from esper.leyline.catalogue import KernelQuery, parse_signature

    query = parsed(
        KernelQuery,
        status=None if status.lower() == "any" else status.upper(),
        signature=None if signature is None else parse_signature(signature),
        **rest,
    )
    with reading(storage) as hub:
        if blueprint is not None:
            query = query.model_copy(update={"blueprint_id": find_blueprint(hub, blueprint)})
        return hub.search_kernels(query)


# ---------------------------------------------------------------- what is shown


def _print(page: KernelPage, *, as_json: bool) -> None:
    if as_json:
        print_json(page.model_dump(mode="json"))
        return
    typer.echo(table([_row(entry) for entry in page.kernels], "no kernel fits; see --help"))
    if page.total > len(page.kernels):
        typer.echo(f"{len(page.kernels)} of {page.total}; more with --offset and --limit")


def _row(entry: KernelEntry) -> dict[str, Any]:
    kernel = entry.kernel
    return {
        "id": kernel.kernel_id[:12],
        "blueprint": kernel.blueprint_name,
        "signature": kernel.signature.key,
        "pipeline": kernel.pipeline.value,
        "runs": kernel.runs_from,
        "status": kernel.status.value,
        "speed": entry.performance,
        "parameters": kernel.num_parameters,
        "fetches": entry.statistics.num_fetches,
        "gain": entry.statistics.mean_gain,
        "tags": kernel.tags,
    }


def shown(entry: KernelEntry) -> str:
    """A kernel as text."""
    kernel, statistics = entry.kernel, entry.statistics
    facts = {
        "id": kernel.kernel_id,
        "status": kernel.status.value + (f": {entry.reason}" if entry.reason else ""),
        "blueprint": f"{kernel.blueprint_name} ({kernel.blueprint_id})",
        "also known as": entry.aliases,
        "signature": kernel.signature.key,
        "pipeline": f"{kernel.pipeline.value}, optimization level {kernel.optimization_level}",
        "runs from": _runs_from(entry),
        "tags": kernel.tags,
        "parameters": f"{kernel.num_parameters:,}",
        "FLOPs a sample": f"{kernel.flops_per_sample:,}",
        "memory": f"{kernel.memory_bytes:,} bytes for one sample",
        "container": f"{kernel.size_bytes:,} bytes",
        "zero at birth": kernel.zero_at_birth,
        "replaces": kernel.replaces,
        "compiled_at": kernel.created_at,
        "compiled in": f"{kernel.compile_s:.2f} s",
        "built by": kernel.fingerprint,
        "speed": None if entry.performance is None else f"{entry.performance:.2f} times eager",
        "risk": _risk(kernel.report),
        "fetches": statistics.num_fetches,
        "outcomes": ", ".join(f"{number} {outcome.value}" for outcome, number in statistics.outcomes.items()),
        "mean gain": statistics.mean_gain,
    }
    checks = [
        {
            "check": check.name,
            "passed": check.passed,
            "value": check.value,
            "limit": check.limit,
            "detail": check.detail,
        }
        for check in kernel.report.checks
    ]
    benchmarks = [
        {
            "benchmark": result.name,
            "speed": result.speed,
            "spread": result.spread,
            "batch": result.batch,
            "machine": result.machine,
            "measured_at": result.measured_at,
        }
        for result in entry.benchmarks
    ]
    parts = [fields(facts), table(checks, "no checks")]
    return "\n\n".join(parts + ([table(benchmarks, "")] if benchmarks else []))


def _runs_from(entry: KernelEntry) -> str:
    """Native code or the IR, and what share of eager's time native code takes, or would have taken."""
    ratios = [result.figures["native_ratio"] for result in entry.benchmarks if "native_ratio" in result.figures]
    took = f": {ratios[-1]:.2f} of eager's time" if ratios else ""
    if entry.kernel.runs_from == "native":
        return f"native code{took}"
    return f"its IR; native code was not kept{took}" if ratios else "its IR"


def _risk(report: ValidationReport) -> str | None:
    """The score and what it is made of, the largest first."""
    if report.risk_score is None:
        return None
    terms = sorted(report.risk_terms.items(), key=lambda term: -term[1])
    parts = ", ".join(f"{name} {value:.2f}" for name, value in terms if value)
    return f"{report.risk_score:.2f}" + (f" ({parts})" if parts else "")
