"""The command line within one process."""

from __future__ import annotations

import functools

import pytest
import typer.main

from jobs import cli


@functools.cache
def _commands():
    return typer.main.get_command(cli.app)


@pytest.fixture(autouse=True)
def commands_built_once(monkeypatch):
    """A call of a Typer app builds all its commands, 30 ms; here the first call's stay."""
    monkeypatch.setattr(cli, "app", _commands())
