"""The command line `esper`: parses, calls, prints. Every command answers `--help` without importing torch or ray.

Errors a person can mend are one line and exit code 2; others exit with 1; an interrupted run exits with 130.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from esper.leyline.errors import EsperError, UserError
from jobs.alerts import alerts
from jobs.blueprints import blueprints_app
from jobs.bus import bus_app
from jobs.gains import gains
from jobs.kernels import kernels_app
from jobs.options import DEFAULT_STORAGE, Json, RunArg, Storage, complete_run, print_json
from jobs.policy import policy_app
from jobs.steering import approve, veto
from jobs.trace import trace
from jobs.ui import ui
from jobs.urza import urza_app

app = typer.Typer(
    name="esper",
    help="Train PyTorch networks that grow while they train.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
runs_app = typer.Typer(help="Look at runs.", no_args_is_help=True)
platform_app = typer.Typer(help="The actors that runs share on a Ray cluster.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")
app.add_typer(platform_app, name="platform")
app.add_typer(blueprints_app, name="blueprints")
app.add_typer(kernels_app, name="kernels")
app.add_typer(urza_app, name="urza")
app.add_typer(bus_app, name="bus")
app.add_typer(policy_app, name="policy")
app.command("alerts")(alerts)
app.command("trace")(trace)


def _complete_bench(incomplete: str) -> list[str]:
    from jobs.bench import BENCHMARKS

    return [name for name in BENCHMARKS if name.startswith(incomplete)]


# ---------------------------------------------------------------- train


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="A YAML file, such as configs/digits.yaml.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Overrides, such as tolaria.epochs=2.")
    ] = None,
    config_option: Annotated[Path | None, typer.Option("--config", help="The same as the first argument.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Continue a run that was interrupted.", autocompletion=complete_run),
    ] = None,
    from_run: Annotated[
        str | None,
        typer.Option("--from", metavar="RUN", help="Start from what a run left, grown.", autocompletion=complete_run),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sites, fitting blueprints and cost; train nothing.")
    ] = False,
    storage: Annotated[
        str | None, typer.Option("--storage", envvar="ESPER_STORAGE", help="Overrides `storage`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a network that grows."""
    from esper.leyline.errors import ConfigError

    arguments = [*([str(config)] if config else []), *(overrides or [])]
    path = config_option
    if path is None and arguments and "=" not in arguments[0]:
        path = Path(arguments.pop(0))
    if resume is None and path is None:
        raise ConfigError("no configuration given", remedy="esper train configs/digits.yaml")
    if stray := [text for text in arguments if "=" not in text]:
        raise ConfigError(f"{stray[0]!r} is no KEY=VALUE", remedy="one configuration file, then overrides")
    from jobs import train as job

    settings = arguments if storage is None or resume else [*arguments, f"storage={json.dumps(storage)}"]
    if from_run is not None:
        if path is None or resume is not None:
            raise ConfigError("--from needs a configuration of its own", remedy="esper train CONFIG --from RUN")
        settings = [*settings, job.host_of(from_run, path, settings)]
    if dry_run:
        if path is None:
            raise ConfigError(
                "--dry-run needs a configuration file", remedy="esper train configs/digits.yaml --dry-run"
            )
        job.dry_run(path, settings, as_json=as_json)
        return
    if resume is not None:
        if path is not None or arguments:
            raise ConfigError("a resumed run keeps its configuration", remedy="give --resume alone")
        code = job.resume(resume, storage or DEFAULT_STORAGE, as_json=as_json)
    else:
        assert path is not None
        code = job.train(path, settings, as_json=as_json)
    raise typer.Exit(code)


@app.command()
def export(
    run: RunArg,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write it: a .pt2 program, or .safetensors weights.")
    ] = Path("model.pt2"),
    fold: Annotated[
        bool, typer.Option("--fold", help="Put kernels into the linear layers they grow, where both are linear.")
    ] = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Write the grown model of a run as a file that loads without Esper."""
    from jobs.export import export_run

    result = export_run(run, storage, out, fold=fold)
    if as_json:
        print_json(result)
    else:
        typer.echo(f"wrote {result['path']} ({result['bytes'] / 1024:.0f} KiB, {result['parameters']:,} parameters)")
        for folding in result.get("foldings", ()):
            what = f"stays: {folding['refused']}" if folding["refused"] else "is part of its layer now"
            typer.echo(f"{folding['blueprint']} at {folding['site']} {what}")
        if out.suffix == ".safetensors":
            typer.echo(f"use it: esper train CONFIG host.weights={out}, or safetensors.torch.load_file({str(out)!r})")
        else:
            typer.echo(f"use it: torch.export.load({str(out)!r}).module()(inputs)")


@app.command()
def doctor(storage: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """Say what is missing here, and how to get it."""
    from jobs.doctor import examine

    findings = examine(storage)
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            mark = {"ok": "ok  ", "optional": "-   ", "missing": "FAIL"}[finding.state]
            remedy = f"  -> {finding.remedy}" if finding.remedy else ""
            typer.echo(f"{mark} {finding.name:<18} {finding.detail}{remedy}")
    raise typer.Exit(1 if any(finding.state == "missing" for finding in findings) else 0)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which; none lists them.", autocompletion=_complete_bench)] = None,
    as_json: Json = False,
) -> None:
    """Run a benchmark. Options after the name are the benchmark's own (`esper bench growth --help`)."""
    from jobs.bench import BENCHMARKS, run_benchmark

    if name == "--help":
        typer.echo(context.get_help())
        return
    if name is None:
        print_json(sorted(BENCHMARKS)) if as_json else typer.echo("\n".join(sorted(BENCHMARKS)))
        return
    raise typer.Exit(run_benchmark(name, context.args, as_json=as_json))


app.command()(ui)


@app.command()
def version(as_json: Json = False) -> None:
    """Print the versions that matter."""
    from jobs.doctor import versions

    found = versions()
    print_json(found) if as_json else typer.echo("\n".join(f"{key} {value}" for key, value in found.items()))


# ---------------------------------------------------------------- runs


@runs_app.command("ls")
def runs_ls(storage: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """List runs, newest first."""
    from jobs.runs import RunStore, list_table

    rows = RunStore(storage).rows()
    print_json(rows) if as_json else typer.echo(list_table(rows))


@runs_app.command("show")
def runs_show(run: RunArg = "latest", storage: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """Show what a run came to."""
    from jobs.runs import RunStore

    summary = RunStore(storage).whole_summary(run)
    if as_json:
        typer.echo(summary.model_dump_json(indent=2))
        return
    from esper.nissa import table

    typer.echo(table(summary, color=sys.stdout.isatty()))


@runs_app.command("report")
def runs_report(
    run: RunArg = "latest",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write here instead of beside the run.")] = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Write report.html afresh and print its path."""
    from jobs.runs import RunStore

    path = RunStore(storage).write_report(run, out)
    print_json({"report": path}) if as_json else typer.echo(path)


@app.command("report")
def report(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN...", help="One run, `latest` without; several with --compare.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Lay several runs side by side.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the page.")] = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Write a run's report, or a comparison of several runs, and print where it lies."""
    from esper.leyline.errors import ConfigError

    names = runs or ["latest"]
    if not compare:
        if len(names) > 1:
            raise ConfigError("several runs are named", field="RUN", remedy="esper report --compare RUN RUN...")
        runs_report(names[0], out, storage, as_json)
        return
    from esper.nissa import compare as side_by_side
    from jobs.runs import RunStore

    compared = side_by_side.gather(RunStore(storage), names)
    path = str(side_by_side.write(compared, out or Path("comparison.html")))
    if as_json:
        print_json({"runs": side_by_side.figures(compared), "report": path})
    else:
        typer.echo(f"{side_by_side.table(compared)}\n\n{path}")


@runs_app.command("export")
def runs_export(
    run: RunArg = "latest",
    to: Annotated[str, typer.Option("--to", help="tensorboard or mlflow.")] = "tensorboard",
    out: Annotated[Path, typer.Option("--out", "-o", help="For tensorboard: the log directory.")] = Path("tensorboard"),
    uri: Annotated[str | None, typer.Option("--uri", help="For mlflow: of its server or store.")] = None,
    experiment: Annotated[str, typer.Option("--experiment", help="For mlflow: made where there is none.")] = "esper",
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Hand a run's metrics to TensorBoard or MLflow, where that is installed."""
    import yaml

    from esper.leyline.errors import ConfigError
    from esper.nissa import export as metrics
    from jobs.runs import RunStore

    store = RunStore(storage)
    summary, history = store.summary(run), store.history(run)
    config = metrics.flat(yaml.safe_load(store.config_text(run)))
    if to == "tensorboard":
        where, hint = str(metrics.to_tensorboard(summary, history, config, out)), f"tensorboard --logdir {out}"
    elif to == "mlflow":
        where = metrics.to_mlflow(summary, history, config, uri=uri, experiment=experiment)
        hint = "mlflow ui" + (f" --backend-store-uri {uri}" if uri else "")
    else:
        raise ConfigError(f"{to!r} is neither tensorboard nor mlflow", field="--to")
    print_json({"to": to, "where": where}) if as_json else typer.echo(f"{where}\nsee it: {hint}")


runs_app.command("gains")(gains)
runs_app.command("approve")(approve)
runs_app.command("veto")(veto)


# ---------------------------------------------------------------- platform


@platform_app.command("up")
def platform_up(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings, such as urza.http.port=8080.")
    ] = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Start the platform on the cluster at RAY_ADDRESS; runs then share it."""
    from jobs.platform import up

    _print_platform(up(storage, overrides or []), as_json=as_json)


@platform_app.command("status")
def platform_status(storage: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """Say which actors of the platform are alive."""
    from jobs.platform import status

    _print_platform(status(storage), as_json=as_json)


@platform_app.command("down")
def platform_down(storage: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """Stop the platform. What is stored stays."""
    from jobs.platform import down

    _print_platform(down(storage), as_json=as_json)


def _print_platform(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            typer.echo(f"{row['name']:<34} {row['state']:<10} {row.get('detail', '')}".rstrip())


# ---------------------------------------------------------------- the edge


def main(argv: list[str] | None = None) -> None:
    """Runs the command line and exits; the one place where errors become words and exit codes."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = app(args=arguments, prog_name="esper", standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2, error, arguments)
    except EsperError as error:
        _fail(str(error), 1, error, arguments)
    except typer.Abort:
        _fail("aborted", 130, None, arguments)
    except KeyboardInterrupt:
        _fail("interrupted", 130, None, arguments)
    except SystemExit as error:
        if error.code != signal.SIGTERM:  # so says Ray's handler, which is in force until training begins
            raise
        _fail("stopped by SIGTERM before training began", 128 + signal.SIGTERM, None, arguments)
    except Exception as error:
        if error.__class__.__module__.partition(".")[0] != "click" and not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), getattr(error, "exit_code", 2), None, arguments)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int, error: EsperError | None, arguments: list[str]) -> None:
    line = " ".join(message.split())
    if "--json" in arguments:
        body = {"type": type(error).__name__ if error else "UsageError", "message": line}
        if error is not None:
            body |= {"field": error.field, "remedy": error.remedy}
        typer.echo(json.dumps({"error": body}))
    typer.echo(f"esper: {line}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
