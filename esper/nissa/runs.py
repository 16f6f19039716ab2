"""Runs as they lie under `<storage>/runs/`: finding, listing, reporting."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from esper.leyline import NotFoundError, RunHistory, RunSummary, StorageError
from esper.leyline.errors import UserError
from esper.leyline.summary import CONFIG_FILE, HISTORY_FILE, REPORT_FILE, SUMMARY_FILE, VIEW_FILE
from esper.nissa.replay import Told, load, replay, with_alerts
from esper.nissa.viewmodel import LiveView
from esper.storage import Storage


class UnknownRunError(NotFoundError, UserError):
    """No run, or more than one, goes by this name."""


class RunStore:
    """The runs below one storage address.

    Raises:
        StorageError: if the address cannot be read.
    """

    def __init__(self, storage: str, options: dict[str, Any] | None = None) -> None:
        self.storage = Storage.at(storage, options)

    def ids(self) -> list[str]:
        """Run ids, newest first. A run that was stopped before it trained has a configuration and no summary."""
        fs, stamped = self.storage.fs, {}
        with self.storage.named_errors("list"):
            for name in (CONFIG_FILE, SUMMARY_FILE):  # the summary's time counts, where there is one
                for path in map(str, fs.glob(self.storage.path("runs", "*", name))):
                    stamped[path.split("/")[-2]] = fs.modified(path)
        return sorted(stamped, key=lambda run: (stamped[run], run), reverse=True)

    def resolve(self, name: str) -> str:
        """Returns the full id for an id, a unique beginning of one, or `latest`.

        Raises:
            UnknownRunError: if no run or more than one fits.
        """
        ids = self.ids()
        if name in ids:
            return name
        fitting = ids[:1] if name == "latest" else [run for run in ids if run.startswith(name)]
        if len(fitting) == 1:
            return fitting[0]
        if not fitting:
            where = self.storage.shown
            raise UnknownRunError(f"no run {name!r} under {where}", field="run", remedy="see esper runs ls")
        raise UnknownRunError(
            f"{name!r} could be any of {', '.join(fitting[:5])}", field="run", remedy="give more of it"
        )

    def directory(self, run: str) -> str:
        """The run's folder, as an address fsspec opens."""
        return self.storage.below("runs", self.resolve(run)).shown

    def summary(self, run: str) -> RunSummary:
        return RunSummary.model_validate_json(self._read(run, SUMMARY_FILE))

    def whole_summary(self, run: str) -> RunSummary:
        """The summary with the alerts of Nissa's last picture, see `with_alerts`."""
        return with_alerts(self.summary(run), self.seen(run))

    def history(self, run: str) -> RunHistory:
        return RunHistory.model_validate_json(self._read(run, HISTORY_FILE))

    def config_text(self, run: str) -> str:
        return self._read(run, CONFIG_FILE).decode()

    def seen(self, run: str) -> LiveView | None:
        """The last picture that Nissa had of the run; None where none was kept.

        Raises:
            StorageError: if the file is there and cannot be read.
        """
        try:
            return load(self._read(run, VIEW_FILE))
        except UnknownRunError:
            return None

    def told(self, run: str) -> Told:
        """The run as its files tell it."""
        run = self.resolve(run)
        return replay(self.summary(run), self.history(run), self.seen(run))

    def write_report(self, run: str, out: Path | None = None) -> str:
        """Writes the run's report and returns where it lies."""
        from esper.nissa.report import write_report

        if out is None and "://" in (directory := self.directory(run)):
            raise StorageError(f"{directory} is no local folder", field="out", remedy="give --out report.html")
        path = out or Path(self.directory(run)) / REPORT_FILE
        write_report(self.whole_summary(run), self.history(run), path, self.seen(run))
        return str(path)

    def rows(self) -> list[dict[str, Any]]:
        """One row a run: what a list shows. A run whose summary cannot be read says so in its status."""
        rows = []
        for run in self.ids():
            try:
                summary = self.summary(run)
            except UnknownRunError:
                rows.append({"run_id": run, "status": "has not trained"})
                continue
            except ValidationError as error:
                rows.append({"run_id": run, "status": f"unreadable summary ({error.error_count()} errors)"})
                continue
            grown = sum(1 for event in summary.events if event.to_stage == "FOSSILIZED" and not event.refused)
            rows.append(
                {
                    "run_id": run,
                    "task": summary.task,
                    "status": summary.status.value,
                    "started": dt.datetime.fromtimestamp(summary.started_at, tz=dt.UTC).isoformat(
                        sep=" ", timespec="seconds"
                    ),
                    "val_accuracy": summary.metrics.val_accuracy,
                    "val_loss": summary.metrics.val_loss,
                    "test_accuracy": summary.metrics.test_accuracy,
                    "params_start": summary.params.start,
                    "params_final": summary.params.final,
                    "fossils": grown,
                }
            )
        return rows

    def _read(self, run: str, file: str) -> bytes:
        try:
            return self.storage.read(f"runs/{self.resolve(run)}/{file}")
        except UnknownRunError:
            raise
        except NotFoundError as error:
            words = f"run {run} has no {file}: it has not trained"
            raise UnknownRunError(words, field="run", remedy="see esper runs ls") from error
