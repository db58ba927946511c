"""The `diptych` command: parse, call, print. Commands stand by what they are about."""

from diptych.cli import compare, data, evaluate, models, rewards, serve, training  # noqa: F401  each adds its commands
from diptych.cli.app import app, main

__all__ = ["app", "main"]
