"""What a comparison of two jobs tells: as data for --json and for a page, as tables for people."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from fluxcli.core.terminal import printable_line
from fluxcli.job.report.compare import Comparison, Spread
from fluxcli.job.report.pairs import Side
from fluxcli.job.report.text import table

_PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
_MEASURES = {"psnr": 2, "ssim": 4, "lpips": 4}  # with the digits that a table shows
_REASONS = {
    "only_in_a": "only in A",
    "only_in_b": "only in B",
    "repeated": "of an id that has a row already",
    "other_prompt": "with another prompt",
    "other_seed": "with another seed",
    "other_size": "with another size",
    "too_small": "of images too small for SSIM",
    "bad_row": "that cannot be read in {}",
    "missing_image": "without an image in {}",
    "altered_image": "whose image in {} is not the one that the row describes",
    "undecodable_image": "whose image in {} cannot be decoded",
    "wrong_size": "whose image in {} has not the size of its row",
}


def data_of(comparison: Comparison) -> dict[str, Any]:
    """A comparison; null stands for the infinite PSNR of equal images, and for a measure that was not taken.

    `mean` of `psnr` is over the pairs that differ, all else over all that were compared; percentiles are values of
    pairs.
    """
    joined = comparison.joined
    return {
        "a": _side_data(joined.a),
        "b": _side_data(joined.b),
        "settings": {name: {"a": a, "b": b} for name, (a, b) in joined.differences().items()},
        "rows_with_other": dict(comparison.rows_with_other),
        "not_compared": {reason: told._asdict() for reason, told in comparison.not_compared.items()},
        "compared": comparison.compared,
        "identical": comparison.identical,
        **{measure: _spread_data(getattr(comparison, measure)) for measure in _MEASURES},
        "worst": [
            {**asdict(pair), **{measure: _number(getattr(pair, measure)) for measure in _MEASURES}}
            for pair in comparison.worst
        ],
    }


def _side_data(side: Side) -> dict[str, Any]:
    return {"directory": str(side.directory), "images": side.rows, "missing": side.missing, "owner": side.owner}


def _spread_data(spread: Spread) -> dict[str, Any] | None:
    if not len(spread):
        return None
    percentiles = {str(each): _number(value) for each, value in spread.percentiles(_PERCENTILES).items()}
    return {"mean": _number(spread.mean()), "percentiles": percentiles}


def _number(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else round(value, 6)


def lines_of(data: dict[str, Any]) -> str:
    """A comparison for people, of its data."""
    lines = [_side_line(name, data[name.lower()]) for name in "AB"]
    lines += [
        f"  {printable_line(name)}: A {each['a'] or 'has none'}; B {each['b'] or 'has none'}"
        for name, each in data["settings"].items()
    ]
    lines += [f"  {printable_line(name)} differs in {_rows(count)}" for name, count in data["rows_with_other"].items()]
    lines += [_skipped_line(reason, **told) for reason, told in data["not_compared"].items()]
    lines += [f"compared: {data['compared']} pairs of images, {data['identical']} of them identical", ""]
    measures = [name for name in _MEASURES if data[name]]
    header = ("", "mean", "lowest", *(f"{each} %" for each in _PERCENTILES[1:-1]), "highest")
    values = {name: (data[name]["mean"], *data[name]["percentiles"].values()) for name in measures}
    lines += table([header, *((name.upper(), *(_cell(name, value) for value in values[name])) for name in measures)])
    if data["identical"] and data["psnr"]["mean"] is not None:
        rest = data["compared"] - data["identical"]
        lines.append(f"the mean PSNR is over the {rest} pairs that differ: that of identical images is infinite")
    if data["worst"]:
        numbers = table([[name.upper() for name in measures], *_cells(data["worst"], measures)])
        names = ["the lowest PSNR", *(pair["file_a"] for pair in data["worst"])]
        lines += ["", *(f"{line}  {name}" for line, name in zip(numbers, names, strict=True))]
    return "\n".join(lines)


def _side_line(name: str, side: dict[str, Any]) -> str:
    missing = f", {side['missing']} still to make" if side["missing"] else ""
    owner = f", in use by {side['owner']} and seen as it stands now" if side["owner"] else ""
    return f"{name}: {printable_line(side['directory'])}: {side['images']} images{missing}{owner}"


def _skipped_line(reason: str, rows: int, ids: list[str]) -> str:
    told = _REASONS[reason] if reason in _REASONS else _REASONS[reason[:-2]].format(reason[-1].upper())
    which = f" ({', '.join(ids)}{', ...' if rows > len(ids) else ''})" if ids else ""
    return f"not compared: {_rows(rows)} {told}{which}"


def _cells(pairs: list[dict[str, Any]], measures: Iterable[str]) -> list[list[str]]:
    return [[_cell(name, pair[name]) for name in measures] for pair in pairs]


def _cell(measure: str, value: float | None) -> str:
    return "inf" if value is None else f"{value:.{_MEASURES[measure]}f}"


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"
