"""What a dry run and a finished run tell: as data for --json, as a table for people."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fluxcli.core.records import Adapters, Failure, Group
from fluxcli.core.step_cache import OFF, StepCache
from fluxcli.core.terminal import counted, printable_line
from fluxcli.job.input.intake import Intake
from fluxcli.job.input.keys import Tally, meant
from fluxcli.job.plan import Plan, work
from fluxcli.job.run.totals import Totals

_SETS_SHOWN = 8


def plan_data(intake: Intake, plan: Plan) -> dict[str, Any]:
    """The plan: buckets, groups of batches, padding, shapes to compile, and what is done or refused already.

    `text_padding` is the share of text tokens that are padding, `batch_padding` the share of images that are. With a
    step cache `denoising` is the share of the denoiser's work that it leaves. With adapters `swaps` is how often one
    engine merges a set of them, or takes the last one out again. With true CFG, of which each image takes two rows of
    the denoiser, `true_cfg` is how many have it and the share by which it makes the denoiser's work more.
    """
    images, tokens = Counter[int](), Counter[int]()
    for count, text_length in intake.text_tokens():
        images[text_length] += 1
        tokens[text_length] += min(count, text_length)
    groups = Counter(
        Group(key.height, key.width, key.text_length, batch.num_inference_steps, key.branches, batch.adapters)
        for batch in plan
        for key in (batch.key,)
    )
    in_group = Counter(intake.groups)
    adapted = any(group.adapters for group in in_group)
    step_cache = intake.defaults.step_cache
    slots = sum(batch.key.batch_size for batch in plan)
    text = sum(length * count for length, count in images.items())
    return {
        "rows": intake.rows,
        "images": len(intake.groups),
        "done": intake.done,
        "failed": len(intake.failures),
        "skipped": intake.skipped,
        "truncated": intake.truncated,
        "unknown_keys": dict(intake.tally.unknown()),
        "not_done": dict(intake.tally.asked()),
        "buckets": [
            {
                "text_length": length,
                "images": images[length],
                "padding": _share(length * images[length], tokens[length]),
            }
            for length in sorted(images)
        ],
        "groups": [
            {
                "width": group.width,
                "height": group.height,
                "text_length": group.text_length,
                "num_inference_steps": group.num_inference_steps,
                **({"lora": _adapters(group.adapters)} if adapted else {}),
                **step_cache.told(group.num_inference_steps),
                **({"true_cfg": True} if group.branches > 1 else {}),
                "images": in_group[group],
                "batches": batches,
            }
            for group, batches in groups.items()
        ],
        "batches": len(plan),
        **({"adapters": _adapter_sets(in_group, plan)} if adapted else {}),
        "text_padding": _share(text, sum(tokens.values())),
        "batch_padding": _share(slots, len(intake.groups)),
        **({"denoising": _denoising(intake)} if step_cache.on else {}),
        **({"true_cfg": told} if (told := _true_cfg(in_group, step_cache)) else {}),
        "shapes": [key.told() for key in plan.shapes()],
        "failures": [failure.as_row() for failure in intake.failures],
    }


def plan_table(data: dict[str, Any]) -> str:
    rows = [("size", "text", "steps", "images", "batches")]
    rows += [
        (
            f"{group['width']}x{group['height']}",
            str(group["text_length"]),
            _steps(group),
            str(group["images"]),
            str(group["batches"]),
        )
        for group in data["groups"]
    ]
    lines = [*table(rows), ""]
    lines.append(
        f"{counted(data['rows'], 'row')}: {counted(data['images'], 'image')} to make in "
        f"{counted(data['batches'], 'batch', 'batches')}, "
        f"{data['done']} done, {data['failed']} failed, {data['truncated']} truncated"
    )
    lines.append(f"padding: {data['text_padding']:.1%} of text tokens, {data['batch_padding']:.1%} of images")
    if "denoising" in data and data["images"]:
        lines.append(f"the step cache leaves {data['denoising']:.1%} of the denoiser's work")
    if told := data.get("true_cfg"):
        lines.append(
            f"true CFG: {told['images']} images take two rows of the denoiser each, which makes its work "
            f"{told['more']:.1%} more"
        )
    shapes = ", ".join(
        f"{shape['batch_size']} x {shape['width']}x{shape['height']}/{shape['text_length']}"
        + (" true CFG" if "branches" in shape else "")
        for shape in data["shapes"]
    )
    lines.append(f"shapes to compile: {len(data['shapes'])}" + (f" ({shapes})" if shapes else ""))
    if "adapters" in data:
        lines += _adapter_lines(data["adapters"])
    if data["forecast"]:
        lines.append(_forecast_line(data["forecast"], data["images"], data["workers"]))
    if data["unknown_keys"]:
        lines.append(f"keys that are no settings, kept under meta: {_with_counts(data['unknown_keys'])}")
    return "\n".join(lines)


def _adapters(adapters: Adapters) -> list[dict[str, Any]]:
    return [{"path": each.path, "scale": each.scale} for each in adapters]


def _adapter_sets(images: Mapping[Group, int], plan: Plan) -> dict[str, Any]:
    """Which sets the rows have, in the plan's order."""
    sets = Counter[Adapters]()
    for batch in plan:
        sets[batch.adapters] += 0
    for group, count in images.items():
        sets[group.adapters] += count
    each = [{"lora": _adapters(adapters), "images": count} for adapters, count in sets.items()]
    return {"sets": each, "swaps": plan.swaps}


def _adapter_lines(adapters: Mapping[str, Any]) -> list[str]:
    sets, swaps = adapters["sets"], adapters["swaps"]
    lines = [f"adapter sets: {len(sets)}, swaps: {swaps}"]
    for each in sets[:_SETS_SHOWN]:
        named = ", ".join(f"{printable_line(one['path'])} x {one['scale']:g}" for one in each["lora"])
        lines.append(f"  {each['images']} images: {named or 'none'}")
    if len(sets) > _SETS_SHOWN:
        lines.append(f"  and {len(sets) - _SETS_SHOWN} more sets")
    return lines


def _steps(group: dict[str, Any]) -> str:
    evaluated = f" ({group['evaluated_steps']} evaluated)" if "evaluated_steps" in group else ""
    return f"{group['num_inference_steps']}{evaluated}{', true CFG' if 'true_cfg' in group else ''}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def clock(seconds: float) -> str:
    """A time as hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _forecast_line(forecast: Mapping[str, Any], images: int, workers: int) -> str:
    on = f" on {workers} workers" if workers > 1 else ""
    rest = images - forecast["images"]
    return (
        f"by the images made here: about {clock(forecast['seconds'])}{on}, "
        f"{forecast['device_hours']:.2f} device-hours, {forecast['bytes'] / 2**20:.0f} MiB"
        + (f"; {rest} images of shapes not made yet come on top" if rest else "")
    )


def failure_lines(failures: Sequence[Failure], shown: int = 5) -> list[str]:
    lines = [f"line {failure.line}: {failure.message}" for failure in failures[:shown]]
    if len(failures) > shown:
        lines.append(f"and {len(failures) - shown} more bad rows")
    return lines


def remark_lines(tally: Tally) -> list[str]:
    """At most one line: what rows ask for that is not done."""
    asked = tally.asked()
    return [f"rows ask for what fluxcli does not do: {_with_counts(asked, shown=20)}"] if asked else []


def remarks(intake: Intake) -> list[str]:
    """What a user should know of an input before it is drawn, beside bad rows. Keys that may be settings, misspelt, are
    told and no more: a key is also anybody's to keep."""
    asked = intake.tally.asked()
    near = {key: rows for key, rows in intake.tally.unknown().items() if key not in asked and meant(key)}
    told = [f"keys that are no settings, kept under meta: {_with_counts(near, shown=20)}"] if near else []
    return [*remark_lines(intake.tally), *told, *intake.remarks]


def totals_data(totals: Totals) -> dict[str, Any]:
    return {
        "images": totals.images,
        "failures": totals.failures,
        "truncated": totals.truncated,
        "rows": totals.rows,
        "done_before": totals.done_before,
        "skipped": totals.skipped,
        "seconds": round(totals.seconds, 3),
        "warm_up_s": round(totals.warm_up_s, 3),
        "images_per_s": round(totals.images_per_s, 4),
        "stages_s": {name: round(seconds, 3) for name, seconds in totals.stages.items()},
    }


def totals_lines(data: dict[str, Any], stopped: bool = False, limit: int | None = None) -> str:
    """The end of a run in a line or two; nothing where it was stopped before it did anything, which is told already."""
    if not data["images"] and not data["failures"]:
        if stopped:
            return ""
        if not data["rows"]:
            return "nothing to do: " + ("--limit 0 takes no rows" if limit == 0 else "the input has no rows")
        return f"nothing to do: {', '.join(_before(data))}"
    if not data["images"]:
        return ", ".join([f"{counted(data['failures'], 'row')} failed, and no image was made", *_before(data)])
    told = [
        f"{counted(data['images'], 'image')} in {data['seconds']:.1f} s ({data['images_per_s']:.2f} images/s)",
        f"{data['failures']} failed",
        *([f"{data['truncated']} with a truncated prompt"] if data["truncated"] else []),
        *_before(data),
    ]
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in data["stages_s"].items())
    return f"{', '.join(told)}\ntime by stage: {stages}; getting ready {data['warm_up_s']:.1f} s"


def _before(data: Mapping[str, Any]) -> list[str]:
    """What earlier runs did."""
    done, skipped = data["done_before"], data["skipped"]
    told = [f"{counted(done, 'image')} {'was' if done == 1 else 'were'} done before"] if done else []
    return told + ([f"{counted(skipped, 'row')} skipped that failed before"] if skipped else [])


def _with_counts(counts: Mapping[str, int], shown: int | None = None) -> str:
    """Names with their rows: each once, the commonest first."""
    named = sorted(counts.items(), key=lambda item: -item[1])
    told = [f"{printable_line(name)} ({counted(count, 'row')}{_hint(name)})" for name, count in named[:shown]]
    return ", ".join(told) + (f" and {len(named) - len(told)} more" if len(told) < len(named) else "")


def _hint(key: str) -> str:
    setting = meant(key)
    return f"; did you mean {setting}?" if setting else ""


def _denoising(intake: Intake) -> float:
    images = Counter(intake.groups)
    left, whole = (
        sum(work(group, step_cache) * count for group, count in images.items())
        for step_cache in (intake.defaults.step_cache, OFF)
    )
    return round(left / whole, 4) if whole else 1.0


def _true_cfg(images: Mapping[Group, int], step_cache: StepCache) -> dict[str, Any] | None:
    """What true CFG adds, where images have it."""
    guided = sum(count for group, count in images.items() if group.branches > 1)
    if not guided:
        return None
    whole, without = (
        sum(
            work(group._replace(branches=branches or group.branches), step_cache) * count
            for group, count in images.items()
        )
        for branches in (None, 1)
    )
    return {"images": guided, "more": round(whole / without - 1, 4)}


def _share(all: int, used: int) -> float:
    return round(1 - used / all, 4) if all else 0.0
