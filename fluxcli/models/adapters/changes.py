"""An adapter's header -> what it changes of one model, checked to the last key: names, shapes, dtypes, sizes. No value
of a tensor is read here but an alpha."""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Literal

from fluxcli.core.errors import ModelError
from fluxcli.models.adapters.alpha import Alphas
from fluxcli.models.adapters.keys import Key, parse
from fluxcli.models.files import open_regular, parse_json, shown
from fluxcli.models.flux1.targets import Target, Targets, spelled
from fluxcli.models.headers import Entry, Header, read_header

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}  # bytes of a value
_ALPHAS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}
_LOKR = ({"w1", "w2"}, {"w1_a", "w1_b", "w2"}, {"w1", "w2_a", "w2_b"}, {"w1_a", "w1_b", "w2_a", "w2_b"})
_MOST_RANK = 2**14  # a matrix of FLUX.1's has full rank with 3072; memory is made of it
_CONTROL = "a control adapter (Canny, Depth, …), which needs a control image; fluxcli takes none"


@dataclass(frozen=True)
class Change:
    """What is added to the weight, or the bias, of a target.

    Attributes:
        kind: "lora": up times down; "lokr": the Kronecker product of w1 and w2, each of which may be a product of _a
            and _b; "diff": the difference itself; "bias": the same, of the bias.
        tensors: by role, where they lie in the file. `magnitude` makes it a DoRA: the changed weight is brought to
            these norms, one for each row or for each column.
        strength: what the product is multiplied by, alpha over rank.
    """

    target: Target
    kind: Literal["lora", "lokr", "diff", "bias"]
    tensors: Mapping[str, Entry]
    strength: float = 1.0


def changes(path: Path, targets: Mapping[str, Targets]) -> list[Change]:
    """What the adapter `path` changes of a model with these targets, by part. Every key is used.

    Raises:
        ModelError: naming the file and the first key that is not understood, lacks its other half, has another shape.
    """
    header = read_header(path)
    modules = _modules(path, header, targets)
    alphas = Alphas(path, parse_json(header.raw, path).get("__metadata__") or {})
    found: list[Change] = []
    for target, key, tensors in modules:
        given = {**tensors}
        if (bias := given.pop("bias", None)) is not None:
            if not target.bias:
                raise ModelError(f"{path}: {shown(bias.name)}: {shown(key.module)} has no bias in this model")
            _expect(path, bias, (target.shape[0],))
            found.append(Change(target, "bias", {"bias": bias}))
        if given:
            found.append(_weight(path, target, key, given, alphas))
    if not found:
        raise ModelError(f"{path}: holds no tensors")
    return found


def _modules(
    path: Path, header: Header, targets: Mapping[str, Targets]
) -> Iterable[tuple[Target, Key, dict[str, Entry]]]:
    """The tensors of each layer by role."""
    found: dict[str, tuple[Target, Key, dict[str, Entry]]] = {}
    unknown: list[str] = []
    for entry in header.entries:
        key = parse(entry.name)
        target = key and targets[key.part].get(spelled(key.layer))
        if key is None or target is None:
            unknown.append(entry.name)
            continue
        _, _, tensors = found.setdefault(key.module, (target, key, {}))
        if key.role in tensors:
            raise ModelError(f"{path}: {shown(entry.name)} is given twice (as {shown(tensors[key.role].name)} too)")
        if key.role != "alpha" and entry.dtype not in WIDTHS:
            raise ModelError(f"{path}: {shown(entry.name)} is {entry.dtype}; fluxcli reads {', '.join(WIDTHS)}")
        if key.role != "alpha" and entry.end - entry.start != entry.values * WIDTHS[entry.dtype]:
            raise ModelError(f"{path}: cannot be read: {shown(entry.name)} has not the bytes of its shape")
        tensors[key.role] = entry
    if _controls(found.values()) or any(name.endswith("_norm.scale") for name in unknown):
        raise ModelError(f"{path}: {_CONTROL}")
    if unknown:
        more = f" (and {len(unknown) - 1} more of {len(header.entries)} keys)" if len(unknown) > 1 else ""
        raise ModelError(
            f"{path}: {shown(unknown[0])}{more} names nothing that this model has and fluxcli knows; "
            "an adapter for another model, or of a kind that fluxcli does not read"
        )
    return found.values()


def _controls(modules: Iterable[tuple[Target, Key, dict[str, Entry]]]) -> bool:
    """Whether an adapter takes latents of a control image beside those of the image."""
    return any(
        target.layers == ("x_embedder",) and len(down.shape) == 2 and down.shape[1] == 2 * target.columns
        for target, _, tensors in modules
        if (down := tensors.get("down")) is not None
    )


def _weight(path: Path, target: Target, key: Key, tensors: dict[str, Entry], alphas: Alphas) -> Change:
    roles = tensors.keys() - {"alpha", "magnitude"}
    alpha = tensors.pop("alpha", None)
    own = None if alpha is None else _value(path, alpha)
    if "magnitude" in tensors:
        rows, columns = (*target.shape, 0)[:2]
        _expect(path, tensors["magnitude"], (rows,), (rows, 1), (1, columns))
    if roles == {"diff"} and tensors.keys() == {"diff"} and own is None:
        _expect(path, tensors["diff"], target.shape)
        return Change(target, "diff", tensors)
    if roles == {"down", "up"}:
        rank = tensors["down"].shape[0] if tensors["down"].shape else 0
        rows, columns = (*target.shape, 0)[:2]
        _check_rank(path, tensors["down"], rank)
        _expect(path, tensors["down"], (max(1, rank), columns))
        _expect(path, tensors["up"], (rows, rank))
        strength = alphas.strength(key.part, key.layer, rank) if own is None else own / rank
        return Change(target, "lora", tensors, strength)
    if roles in _LOKR:
        return Change(target, "lokr", tensors, _check_lokr(path, target, tensors, own))
    raise ModelError(
        f"{path}: {shown(key.module)} has {', '.join(sorted({*tensors, *(['alpha'] if alpha else [])}))} and no more; "
        "the file is incomplete, or of a kind that fluxcli does not read"
    )


def _check_lokr(path: Path, target: Target, tensors: Mapping[str, Entry], alpha: float | None) -> float:
    """Its strength: alpha counts only where a factor is itself a product."""
    shapes, strength = [], 1.0
    for factor in ("w1", "w2"):
        if factor in tensors:
            _expect_matrix(path, tensors[factor])
            shapes.append(tensors[factor].shape)
            continue
        a, b = tensors[f"{factor}_a"], tensors[f"{factor}_b"]
        _expect_matrix(path, a)
        _expect_matrix(path, b)
        _check_rank(path, a, a.shape[1])
        _expect(path, b, (a.shape[1], b.shape[1]))
        shapes.append((a.shape[0], b.shape[1]))
        strength = 1.0 if alpha is None else alpha / a.shape[1]
    made = tuple(one * other for one, other in zip(*shapes, strict=True))
    if made != target.shape:
        first = next(iter(tensors.values()))
        raise ModelError(f"{path}: {shown(first.name)} makes {list(made)}, expected {list(target.shape)}")
    return strength


def _expect(path: Path, entry: Entry, *shapes: tuple[int, ...]) -> None:
    if entry.shape not in shapes or not prod(entry.shape):
        wanted = " or ".join(str([*shape]) for shape in shapes)
        raise ModelError(
            f"{path}: {shown(entry.name)} is {[*entry.shape]}, expected {wanted}; the adapter is for another model"
        )


def _expect_matrix(path: Path, entry: Entry) -> None:
    if len(entry.shape) != 2 or not prod(entry.shape):
        raise ModelError(f"{path}: {shown(entry.name)} is {[*entry.shape]}, expected a matrix")


def _check_rank(path: Path, entry: Entry, rank: int) -> None:
    if rank > _MOST_RANK:
        raise ModelError(f"{path}: {shown(entry.name)} has rank {rank:,}; fluxcli reads at most {_MOST_RANK:,}")


def _value(path: Path, entry: Entry) -> float:
    """An alpha, which is one number."""
    width = struct.calcsize(_ALPHAS.get(entry.dtype, "<e"))
    if entry.values != 1 or entry.end - entry.start != width or entry.dtype not in {*_ALPHAS, "BF16"}:
        raise ModelError(f"{path}: {shown(entry.name)} is {entry.dtype} {[*entry.shape]}, and an alpha is one number")
    with open_regular(path) as file:
        file.seek(entry.start)
        data = file.read(width)
    if len(data) < width:
        raise ModelError(f"{path}: cannot be read: it ends within {shown(entry.name)}")
    if entry.dtype == "BF16":  # the upper half of a float32
        data = b"\0\0" + data
    (value,) = struct.unpack(_ALPHAS.get(entry.dtype, "<f"), data)
    if not isfinite(value):
        raise ModelError(f"{path}: {shown(entry.name)} is {value}, and an alpha is a number")
    return float(value)
