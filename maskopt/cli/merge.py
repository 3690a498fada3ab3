"""`maskopt merge`: put the parts of a verified or certified layer together."""

from __future__ import annotations

import itertools
import json as json_module
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from maskopt.cli.certify_report import CERTIFICATE, certify_report, show_certificates
from maskopt.cli.options import JsonOption, QuietOption, require_file
from maskopt.cli.output import check_outputs, json_output, tables
from maskopt.cli.part import parse_rows, range_words, whole_row_blocks
from maskopt.cli.verify_report import VERDICT, show_verdicts, verify_report
from maskopt.errors import MaskoptError
from maskopt.files import reason

__all__ = ["merge"]

Figures = dict[str, Any]

_ROWS: Mapping[str, Mapping[str, tuple[type, ...]]] = {"verify": VERDICT, "certify": CERTIFICATE}
_SETTINGS: Mapping[str, tuple[type, ...]] = {
    "instance": (str,),
    "instance_sha256": (str,),
    "rows": (str,),
    "layer_rows": (int,),
    "row_block": (int,),
}
_DECISIVE = ("maskopt", "torch")  # versions on which results depend
_FREE = ("instance", "mask", "rows", "jobs", "backend")  # settings that may differ from part to part
_NAMED = 4  # ranges that one sentence names


@dataclass(frozen=True)
class _Part:
    path: Path
    report: Figures
    rows: slice

    @property
    def fixed(self) -> Figures:
        """What all parts must have in common."""
        settings = {name: value for name, value in self.report["settings"].items() if name not in _FREE}
        versions = {f"version of {name}": self.report["versions"].get(name) for name in _DECISIVE}
        return {"command": self.report["command"], **settings, **versions}


def merge(
    parts: Annotated[
        list[Path],
        typer.Argument(metavar="PART...", help="JSON files of maskopt verify or certify with --rows, in any order."),
    ],
    rows: Annotated[
        str,
        typer.Option("--rows", metavar="A:B", help="Rows that the parts cover: all of the layer's unless you say so."),
    ] = ":",
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Put the parts of a layer that several commands verified or certified together, as if it had been one command.

    The parts must be of one layer, set of masks, settings and version, and hold every row once.
    """
    check_outputs(json)  # --quiet is taken as everywhere, though this is too fast for a bar
    found = sorted(map(_read, parts), key=lambda part: (part.rows.start, part.rows.stop))
    _check_alike(found)
    wanted = parse_rows(rows, found[0].report["settings"]["layer_rows"])
    _check_complete(found, wanted)
    report = _merged(found, wanted)
    with json_output(json, report):
        show = show_verdicts if report["command"] == "verify" else show_certificates
        show(tables(json), report)


def _read(path: Path) -> _Part:
    """Read a part, and check that it is complete."""
    require_file("part", path)
    try:
        report = json_module.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise MaskoptError(f"The part {path} is no readable JSON: {reason(error)}.") from error
    command = report.get("command") if isinstance(report, dict) else None
    if not isinstance(command, str) or command not in _ROWS:
        raise MaskoptError(f"The part {path} is no JSON of this version's maskopt verify or certify.")
    fields: dict[str, tuple[type, ...]] = {"rows": (list,), "settings": (dict,), "versions": (dict,)}
    fields |= {"title": (str,)} if command == "verify" else {"seconds": (float,)}
    if not (
        _fits(report, fields)
        and _fits(report["settings"], _SETTINGS)
        and all(_fits(row, _ROWS[command]) for row in report["rows"])
        and report["settings"]["layer_rows"] > 0
        and report["settings"]["row_block"] > 0
    ):
        raise MaskoptError(f"The part {path} is damaged: some of what maskopt {command} writes is missing.")
    settings = report["settings"]
    try:
        rows = parse_rows(settings["rows"], settings["layer_rows"])
    except MaskoptError as error:
        raise MaskoptError(f"The part {path} is damaged. {error}") from error
    if not whole_row_blocks(settings):
        raise MaskoptError(
            f"The part {path} cannot be merged: the set couples {settings['row_block']} rows, and its rows "
            f"{settings['rows']} were verified as a layer of their own."
        )
    ends = list(itertools.accumulate((row["rows"] for row in report["rows"]), initial=rows.start))
    if ends[-1] != rows.stop or [row["row"] for row in report["rows"]] != ends[:-1]:
        raise MaskoptError(f"The part {path} is damaged: it does not hold the results of its rows {settings['rows']}.")
    return _Part(path, report, rows)


def _fits(value: Any, fields: Mapping[str, tuple[type, ...]]) -> bool:
    return isinstance(value, dict) and all(
        name in value and isinstance(value[name], (*types, int) if float in types else types)
        for name, types in fields.items()
    )


def _check_alike(parts: Sequence[_Part]) -> None:
    first = parts[0]
    for other in parts[1:]:
        one, two = first.fixed, other.fixed
        for name in {**one, **two}:
            if one.get(name) != two.get(name):
                raise MaskoptError(
                    f"{first.path} and {other.path} do not belong together: {name} is {one.get(name)!r} in the one and "
                    f"{two.get(name)!r} in the other."
                )


def _check_complete(parts: Sequence[_Part], wanted: slice) -> None:
    """Check that sorted parts hold every wanted row once, and no others."""
    for one, two in itertools.pairwise(parts):
        if two.rows.start < one.rows.stop:
            both = slice(two.rows.start, min(one.rows.stop, two.rows.stop))
            raise MaskoptError(f"The rows {range_words(both)} are in {one.path} and in {two.path}; give them once.")
    for part in parts:
        if part.rows.start < wanted.start or part.rows.stop > wanted.stop:
            raise MaskoptError(
                f"The part {part.path} holds the rows {range_words(part.rows)}, which are not within "
                f"{range_words(wanted)}; leave it out, or say other --rows."
            )
    ends = [wanted.start, *(part.rows.stop for part in parts)]
    begins = [*(part.rows.start for part in parts), wanted.stop]
    missing = [f"{end}:{begin}" for end, begin in zip(ends, begins, strict=True) if end < begin]
    if missing:
        more = f" and {len(missing) - _NAMED} more ranges" if len(missing) > _NAMED else ""
        raise MaskoptError(
            f"Of the rows {range_words(wanted)}, {', '.join(missing[:_NAMED])}{more} are in no part; add those parts, "
            "or say with --rows which rows there are."
        )


def _merged(parts: Sequence[_Part], rows: slice) -> Figures:
    """Return the report that one command would have given of all rows."""
    reports = [part.report for part in parts]
    settings = {name: _common([report["settings"].get(name) for report in reports]) for name in reports[0]["settings"]}
    settings["rows"] = range_words(rows)
    versions = {name: _common([report["versions"].get(name) for report in reports]) for name in reports[0]["versions"]}
    results = [row for report in reports for row in report["rows"]]
    if reports[0]["command"] == "certify":
        return certify_report(results, math.fsum(report["seconds"] for report in reports), settings, versions)
    # JSON has no infinity.
    verdicts = [{**row, "excess": math.inf if row["excess"] is None else row["excess"]} for row in results]
    return verify_report(verdicts, reports[0]["title"], settings, versions)


def _common(values: Sequence[Any]) -> Any:
    """Return what values have in common: the value, or a list of the different ones in the order of the rows."""
    different = [value for number, value in enumerate(values) if value not in values[:number]]
    return different[0] if len(different) == 1 else different
