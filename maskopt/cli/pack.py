"""`maskopt pack` and `maskopt unpack`: folders of pruned models in which a zero takes one bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskopt.cli.options import JsonOption, QuietOption
from maskopt.cli.output import Bar, check_outputs, environment, facts, json_output, tables
from maskopt.cli.words import duration
from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from maskopt.packed.folder import PackReport, Progress

__all__ = ["CompressOption", "PackedOption", "check_packing", "pack", "pack_lines", "unpack"]

PackedOption = Annotated[
    bool, typer.Option("--packed", help="Store zeros in one bit each, as maskopt pack does; see its help.")
]
CompressOption = Annotated[
    bool,
    typer.Option(
        "--compress",
        help="Compress what becomes smaller by it with Zstandard (the package zstandard, or Python 3.14). Loading "
        "takes longer.",
    ),
]


def pack(
    dense: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a pruned model, ours or not.")],
    packed: Annotated[Path, typer.Argument(metavar="PACKED", help="New folder in which zeros take one bit each.")],
    compress: CompressOption = False,
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Store a pruned model in fewer bytes, without changing a bit of its weights.

    After `import maskopt`, or with trust_remote_code=True, transformers loads the folder as it loads the dense one.
    """
    from maskopt.packed import folder

    command = {"out": str(dense), "packed": str(packed), "compress": compress}

    def work(progress: Progress) -> PackReport:
        return folder.pack(dense, packed, compress=compress, progress=progress)

    _write("packing", work, packed, command, json, quiet)


def unpack(
    packed: Annotated[Path, typer.Argument(metavar="PACKED", help="Folder that maskopt pack or prune --packed made.")],
    dense: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the model as it was.")],
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write the ordinary folder that a packed one was made of, bit by bit the same weights."""
    from maskopt.packed import folder

    def work(progress: Progress) -> PackReport:
        return folder.unpack(packed, dense, progress=progress)

    _write("unpacking", work, dense, {"packed": str(packed), "out": str(dense)}, json, quiet)


def _write(
    what: str,
    work: Callable[[Progress], PackReport],
    target: Path,
    command: dict[str, Any],
    json: str | None,
    quiet: bool,
) -> None:
    """Make a folder with a progress bar, and print what became of its bytes."""
    check_outputs(json, target)
    with Bar(quiet, what) as bar:
        report = work(lambda name, fraction: bar.tell(f"{what} {name}", fraction))
    figures = {"command": command, **report.to_json(), "versions": environment()}
    with json_output(json, figures):
        lines = pack_lines(report) | {"time": duration(report.seconds), "saved in": str(target)}
        tables(json).print(facts(lines))


def check_packing(packed: bool, compress: bool, model: str) -> None:
    """Check, before any work, that what --packed and --compress ask for can be done.

    Parameters
    ----------
    packed : bool
    compress : bool
    model : str
        What is to be packed in the end: a folder, or an id on the hub.

    Raises
    ------
    MaskoptError
        If it cannot.
    """
    if packed:
        from maskopt.packed.layout import require_equal_widths

        require_equal_widths(Path(model))
    if not compress:
        return
    if not packed:
        raise MaskoptError("--compress applies to packed folders; give --packed as well, or leave it out.")
    from maskopt.packed.encoding import require_zstandard

    require_zstandard()


def pack_lines(report: PackReport) -> dict[str, str]:
    """Return what packing saved, for a table of facts.

    Parameters
    ----------
    report : PackReport
    """
    lines = {
        name: f"{kind.tensors} tensors, {_size(kind.dense)} dense, {_size(kind.packed)} packed"
        for name, kind in report.kinds.items()
    }
    lines["all weights"] = f"{_size(report.dense)} dense, {_size(report.packed)} packed: {report.ratio:.3f}"
    return lines | {"other files": _size(report.other_files)}


def _size(count: int) -> str:
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count} bytes"
