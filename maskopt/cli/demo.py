"""`maskopt demo`: the shipped model pruned by every solver."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from maskopt.cli.options import DeviceOption, JsonOption, QuietOption, check_device, require_transformers
from maskopt.cli.output import Bar, check_outputs, environment, json_output, tables

if TYPE_CHECKING:
    from maskopt.demo.run import DemoResult

__all__ = ["demo"]


def demo(json: JsonOption = None, device: DeviceOption = "cpu", quiet: QuietOption = False) -> None:
    """Prune the small shipped model with every solver and compare."""
    began = time.perf_counter()
    check_outputs(json)
    check_device(device)
    require_transformers()
    from maskopt.demo.run import run_demo

    with Bar(quiet, "loading the model") as bar:
        result = run_demo(bar.tell if bar.visible else None, device=device)
    seconds = time.perf_counter() - began
    with json_output(json, {**result.to_json(), "seconds": seconds, "versions": environment()}):
        console = tables(json)
        console.print(_table(result))
        console.print(_legend(result))
        console.print(f"Everything took {seconds:.0f} s. The same for your own model: maskopt prune --help")


def _table(result: DemoResult) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title="A small language model of Python code, pruned layer by layer",
        title_justify="left",
    )
    table.add_column("masks")
    table.add_column("solver")
    for name in ("layer error", "perplexity", "seconds"):
        table.add_column(name, justify="right")
    table.add_row("none", "dense", "0", f"{result.dense_perplexity:.2f}", "", end_section=True)
    for row, following in zip(result.rows, [*result.rows[1:], None], strict=True):
        best = min(other.perplexity for other in result.rows if other.masks == row.masks)
        table.add_row(
            row.masks,
            row.solver,
            f"{row.error_ratio:.3f}",
            f"{row.perplexity:.2f}",
            f"{row.seconds:.1f}",
            style="bold" if row.perplexity == best else "",
            end_section=following is not None and following.masks != row.masks,
        )
    return table


def _legend(result: DemoResult) -> str:
    settings = result.settings
    return (
        f"Layer error: median over the layers, relative to {settings['reference']}, on "
        f"{settings['calibration']['tokens']} tokens of training modules.\n"
        f"Perplexity: on {settings['evaluation']['tokens']} tokens of modules that the model has never seen.\n"
        "Seconds: spent choosing the masks.\n"
    )
