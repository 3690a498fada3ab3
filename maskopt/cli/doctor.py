"""`maskopt doctor`: what is installed, what each part needs, and where torch can compute."""

from __future__ import annotations

import importlib.metadata
import os
import re
from typing import Any

import typer
from packaging.requirements import Requirement
from rich.markup import escape
from rich.table import Table

from maskopt.cli.options import JsonOption, check_device
from maskopt.cli.output import check_outputs, environment, facts, json_output, tables
from maskopt.errors import MaskoptError

__all__ = ["doctor"]

_PURPOSES = {
    "": "everything",
    "hf": "pruning and evaluating language models",
    "eval": "tasks of lm-eval",
    "mip": "exact answers by SCIP",
    "report": "plots",
    "peft": "fine-tuning by LoRA that keeps zeros",
    "torch-pruning": "channels that Torch-Pruning removes",
    "llmcompressor": "our modifier in llm-compressor",
    "modelopt": "our mode in ModelOpt",
    "zstd": "compressed packed folders",
    "dev": "the tests and the documentation",
}
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


def doctor(json: JsonOption = None) -> None:
    """Say which versions are installed, which parts of maskopt they serve, and which devices can be used.

    Ends with code 1 where something that all of maskopt needs is missing or does not fit.
    """
    check_outputs(json)
    packages = _packages()
    devices = _devices()
    broken = [each["package"] for each in packages if each["extra"] == "" and not each["fits"]]
    versions = environment()
    figures = {"packages": packages, "devices": devices, "versions": versions, "works": not broken}
    with json_output(json, figures):
        console = tables(json)
        table = Table("for", "package", "wanted", "installed", "", box=None)
        for each in packages:
            row = each["for"], each["package"], each["wanted"] or "any", each["installed"] or "-", _advice(each)
            table.add_row(*map(escape, row))
        console.print(table)
        lines = {"maskopt": versions["maskopt"], "python": f"{versions['python']} on {versions['platform']}"}
        console.print()
        console.print(facts({**lines, **{device["name"]: device["what"] for device in devices}}))
    if broken:
        raise typer.Exit(1)


def _packages() -> list[dict[str, Any]]:
    """Return what maskopt's own metadata ask for, and what of it is there."""
    try:
        lines = importlib.metadata.requires("maskopt") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MaskoptError("maskopt is not installed but run from its folder; install it with pip install .") from error
    found = []
    for line in lines:
        requirement = Requirement(line)
        named = _EXTRA.search(str(requirement.marker or ""))
        extra = named[1] if named else ""
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue  # not for this system or version of Python
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        found.append(
            {
                "extra": extra,
                "for": _PURPOSES.get(extra, extra),
                "package": requirement.name,
                "wanted": str(requirement.specifier),
                "installed": installed,
                "fits": installed is not None and requirement.specifier.contains(installed, prereleases=True),
            }
        )
    return found


def _advice(package: dict[str, Any]) -> str:
    if package["fits"]:
        return "fits"
    target = f"'maskopt[{package['extra']}]'" if package["extra"] else f"'{package['package']}{package['wanted']}'"
    return f"pip install {target}"


def _devices() -> list[dict[str, Any]]:
    """Return where torch can compute."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [{"name": "cpu", "what": f"{cores} cores, torch computes on {torch.get_num_threads()} threads"}]
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory
        what = f"{torch.cuda.get_device_name(index)}, {memory / 1e9:.0f} GB"
        try:
            check_device(f"cuda:{index}")
        except MaskoptError as error:
            what = str(error)
        found.append({"name": f"cuda:{index}", "what": what})
    return found
