"""All commands of `peft-moe`."""

from __future__ import annotations

import logging

import typer

from . import convert, doctor, inspect, merge, quantize, verify
from .output import CODES

app = typer.Typer(
    name="peft-moe",
    help=f"Adapters on the experts of Mixture-of-Experts models: inspect, convert, merge and check them.\n\n{CODES}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def quiet() -> None:
    """Libraries tell their own progress and notices on standard error, where they do not mix with what is printed."""
    logging.getLogger("peft_moe").setLevel(logging.WARNING)


for one in (inspect, convert, merge, verify, quantize, doctor):
    one.register(app)
