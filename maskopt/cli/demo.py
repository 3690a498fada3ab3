"""`maskopt demo`: the shipped model pruned by every method."""

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
    """Prune the small shipped model with every method and compare the results; takes about two minutes."""
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
        console.print(
            f"Total time: {seconds:.0f} s. To prune your own model:\n"
            "maskopt prune MODEL OUT --calibration text.txt --sparsity 0.6"
        )


def _table(result: DemoResult) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title="A small language model of Python code, pruned layer by layer",
        title_justify="left",
    )
    for name in ("masks", "weights", "method"):
        table.add_column(name)
    for name in ("layer error", "perplexity", "seconds"):
        table.add_column(name, justify="right")
    table.add_row("none", "", "dense", "0", f"{result.dense_perplexity:.2f}", "", end_section=True)
    for row, following in zip(result.rows, [*result.rows[1:], None], strict=True):
        best = min(other.perplexity for other in result.rows if other.masks == row.masks)
        table.add_row(
            row.masks,
            row.weights,
            row.solver + (" (prune's default)" if row.solver == result.settings["default"] else ""),
            f"{row.error_ratio:.3f}",
            f"{row.perplexity:.2f}",
            f"{row.seconds:.1f}",
            style="bold" if row.perplexity == best else "",
            end_section=following is not None and (following.masks, following.weights) != (row.masks, row.weights),
        )
    return table


def _legend(result: DemoResult) -> str:
    settings = result.settings
    return (
        "Weights: updated where the method changes the surviving weights, too; kept where it chooses the mask alone.\n"
        f"Layer error: median over the layers, relative to {settings['reference']}, on "
        f"{settings['calibration']['tokens']} tokens of training modules;\n"
        f"for {settings['default']}, which corrects errors of earlier layers, against the dense model's outputs.\n"
        f"Perplexity: on {settings['evaluation']['tokens']} tokens of modules that the model was not trained on.\n"
        "Seconds: spent choosing masks and weights.\n"
    )
