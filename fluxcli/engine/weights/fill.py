"""The only reader of weight files: strict, by name. A missing, surplus or misshapen tensor is an error that says
which, told before anything is copied."""

import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fluxcli.core.errors import ModelError
from fluxcli.engine.matmul.gemm import Multiply
from fluxcli.engine.matmul.torch_ import Reference
from fluxcli.engine.nets.flux1 import Flux, FluxConfig
from fluxcli.engine.runtime.offload import Visitors
from fluxcli.models.checkpoints import Checkpoint, read_json

_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them; anything else is quantised
_SHOWN = 3  # tensor names in an error before "and N more"
_READERS = 8  # threads that copy into a GPU's staging memory; one alone is held up by its page faults
_PIECE = 2**24  # bytes copied at once: what one reader stages
RANDOM_SEED = 0

Slots = Iterable[tuple[str, Tensor]]  # (name in the checkpoint, where its values go)


@contextmanager
def load_transformer(checkpoint: Checkpoint, device: str, dtype: torch.dtype, multiply: Multiply) -> Iterator[Flux]:
    """The denoiser on `device`. Its weights are read straight into the packed layers while the block runs, and are
    there when the block ends: the other parts can be loaded meanwhile.

    Raises:
        ModelError: naming what is wrong with the config, the files or the tensors.
    """
    directory = checkpoint.directory / "transformer"
    config = FluxConfig.from_json(checkpoint.transformer, str(directory / "config.json"))
    with torch.device(device), _default_dtype(dtype):
        model = Flux(config, multiply).eval()
    if checkpoint.random:
        fill_random(model.slots(), device)
        yield model
    else:
        with _filling(model.slots(), directory, _STEMS["diffusers"]):
            yield model


def load_part(checkpoint: Checkpoint, part: str, device: str, dtype: torch.dtype, visitors: str | None = None) -> Any:
    """A text encoder or the VAE: the class that model_index.json names, built on `device` and filled with the same
    strictness.

    Args:
        visitors: the name of a list of blocks that stay in host memory and visit the device while they run.

    Raises:
        ModelError: naming what is wrong with the config, the files or the tensors.
    """
    directory = checkpoint.directory / part
    library, model = _build(checkpoint, part, "cpu" if visitors else device, dtype)
    if visitors:
        blocks = model.get_submodule(visitors)
        Visitors(blocks, device)
        at_home = {id(parameter) for parameter in blocks.parameters()}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in at_home:
                tensor.data = tensor.data.to(device)
    if checkpoint.random:
        # Tied tensors appear once in parameters().
        fill_random(((name, parameter.data) for name, parameter in model.named_parameters()), device)
        return model
    slots = model.state_dict()
    # What the class computes itself, and what it says a checkpoint may hold beside its own.
    computed = [re.escape(name) for name, _ in model.named_buffers() if name not in slots]
    others = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    fill_from_files(slots.items(), directory, _STEMS[library], "|".join([*computed, *others]))
    return model


def size(checkpoint: Checkpoint, part: str, dtype: torch.dtype) -> int:
    """Bytes of a part's parameters, without memory for them.

    Counted in its files, which needs no import of its library; on the class that its config builds where there are
    none, and in float16, of which a class makes exceptions.
    """
    if not checkpoint.random and dtype != torch.float16:
        directory = checkpoint.directory / part
        library = read_json(checkpoint.directory / "model_index.json").get(part, (None,))[0]
        stem = _STEMS.get(library, _STEMS["diffusers"])
        return dtype.itemsize * sum(_values(path) for path, _ in _files(directory, stem))
    if part == "transformer":
        config = FluxConfig.from_json(checkpoint.transformer)
        with torch.device("meta"), _default_dtype(dtype):
            model: nn.Module = Flux(config, Reference())
    else:
        _, model = _build(checkpoint, part, "meta", dtype)
    return sum(parameter.nbytes for parameter in model.parameters())


def _values(path: Path) -> int:
    """How many numbers a file holds."""
    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {_first_line(error)}") from error


def _build(checkpoint: Checkpoint, part: str, device: str, dtype: torch.dtype) -> tuple[str, Any]:
    """(library, model), with no values in its parameters."""
    directory = checkpoint.directory / part
    library, cls = _class_of(checkpoint, part)
    config = read_json(directory / "config.json")
    try:
        with torch.device(device), _default_dtype(dtype), _no_init():
            model = cls.from_config(config) if library == "diffusers" else cls(cls.config_class.from_dict(config))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{directory / 'config.json'}: cannot be built as {cls.__name__}: {_first_line(error)}"
        ) from error
    model.eval().requires_grad_(False)
    if dtype == torch.float16:
        # T5's MLP leaves float16's range; transformers says so of its class, and FluxPipeline follows it.
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in (model._keep_in_fp32_modules or ()):
                module.float()
    return library, model


def fill_from_files(slots: Slots, directory: Path, stem: str, ignored: str = "") -> None:
    """Copies every tensor of `{stem}.safetensors`, or of the shards in its index, into the slot of its name.

    Each is mapped from disk and copied into place, so the model exists once in memory; dtypes are converted on the way.

    Args:
        ignored: a pattern of names that the files may hold and nobody reads.

    Raises:
        ModelError: naming the directory and the tensors, if names or shapes differ in any way.
    """
    with _filling(slots, directory, stem, ignored):
        pass


@contextmanager
def _filling(slots: Slots, directory: Path, stem: str, ignored: str = "") -> Iterator[None]:
    """`fill_from_files` beside the block."""
    wanted = {_canonical(name): slot for name, slot in slots}
    pairs: list[tuple[Tensor, Tensor]] = []
    found: set[str] = set()
    surplus: list[str] = []
    misshapen: list[str] = []
    with ExitStack() as files:
        for path, expected in _files(directory, stem):
            try:
                file = files.enter_context(safe_open(path, framework="pt"))
                names = set(file.keys())
                _refuse(path, "missing (the index places it there)", expected - names)
                for name in sorted(names):
                    slot, given = wanted.get(_canonical(name)), file.get_slice(name)
                    shape, dtype = given.get_shape(), given.get_dtype()
                    if slot is None:
                        if not (ignored and re.search(ignored, _canonical(name))):
                            surplus.append(name)
                        continue
                    found.add(_canonical(name))
                    if shape != list(slot.shape):
                        misshapen.append(f"{name} {shape}, expected {list(slot.shape)}")
                    elif dtype not in _FLOATS:
                        raise ModelError(f"{path}: {name} is {dtype}; fluxcli reads {', '.join(_FLOATS)}")
                    else:
                        pairs.append((slot, file.get_tensor(name)))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path}: cannot be read: {_first_line(error)}") from error
        filled = {wanted[name].data_ptr() for name in found}  # tied tensors are there under one name or several
        _refuse(directory, "missing", (name for name, slot in wanted.items() if slot.data_ptr() not in filled))
        _refuse(directory, "surplus", surplus)
        _refuse(directory, "misshapen", misshapen)
        with _copying(pairs):
            yield


@contextmanager
def _copying(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Copies each (target, source on the host), in pieces, beside the block; done when the block ends. An error or an
    interrupt in the block ends the copying too."""
    pieces = [
        piece
        for target, source in pairs
        for piece in zip(
            *(each.view(-1).split(_PIECE // source.element_size()) for each in (target, source)), strict=True
        )
    ]
    device = next((target.device for target, _ in pairs if target.is_cuda), None)
    staging = _Staging(device) if device else None
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1), "read") as readers:
        copies = [
            readers.submit(staging.copy if staging and target.is_cuda else _copy, target, source)
            for target, source in pieces
        ]
        try:
            yield
            for each in copies:
                each.result()
        finally:
            readers.shutdown(cancel_futures=True)
        if staging:
            staging.synchronize()


def _copy(target: Tensor, source: Tensor) -> None:
    if target.dtype == source.dtype:
        # numpy's copy is one thread's, without the interpreter lock; torch's would start threads of its own.
        np.copyto(target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())
    else:
        target.copy_(source)


class _Staging:
    """Copies to a GPU through pinned memory: each thread fills one of its two buffers while the other travels, on a
    stream of its own. From pageable memory the driver would do the same with one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = threading.local()
        self._streams: list[torch.cuda.Stream] = []
        self._built = torch.cuda.Event()  # the targets' memory is theirs from here on
        self._built.record(torch.cuda.current_stream(device))

    def copy(self, target: Tensor, source: Tensor) -> None:
        own = self._own
        if not hasattr(own, "stream"):
            own.stream = torch.cuda.Stream(self._device)
            own.stream.wait_event(self._built)
            own.buffers = [(torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in "ab"]
            self._streams.append(own.stream)
        own.buffers.reverse()
        buffer, travelled = own.buffers[0]
        travelled.synchronize()
        arrived = buffer[: source.nbytes].view(source.dtype)
        _copy(arrived, source)
        with torch.cuda.stream(own.stream):
            if source.dtype != target.dtype:
                arrived = arrived.to(self._device, non_blocking=True)
            target.copy_(arrived, non_blocking=True)
            travelled.record(own.stream)

    def synchronize(self) -> None:
        for stream in self._streams:
            stream.synchronize()


def fill_random(slots: Slots, device: str) -> None:
    """Seeded values, made on `device` wherever the slots are, of a size that keeps activations finite through every
    block: matrices with the variance of their fan-in, norm weights of one, small biases."""
    generator = torch.Generator(device).manual_seed(RANDOM_SEED)
    for name, slot in slots:
        if slot.ndim > 1:
            deviation = slot[0].numel() ** -0.5
        elif name.endswith("bias"):
            deviation = 0.02
        else:
            slot.fill_(1)
            continue
        # In pieces: FLUX.1's modulations are one matrix of 6.5 GB, and a second one of that size need not fit.
        for piece in slot.view(-1).split(_PIECE // slot.element_size()):
            piece.copy_(torch.empty_like(piece, device=device).normal_(0, deviation, generator=generator))


def _class_of(checkpoint: Checkpoint, part: str) -> tuple[str, Any]:
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    for each in libraries.values():
        each.utils.logging.set_verbosity_error()
    index = checkpoint.directory / "model_index.json"
    library, name = read_json(index).get(part, (None, None))
    cls = getattr(libraries.get(library), str(name), None)
    if cls is None:
        raise ModelError(f"{index}: {part} is {library}.{name}, which is not installed")
    return library, cls


class _no_init:
    """Skips all initialisation inside the block: billions of numbers that are filled in afterwards."""

    _NAMES = (
        "normal_",
        "uniform_",
        "trunc_normal_",
        "kaiming_uniform_",
        "kaiming_normal_",
        "xavier_uniform_",
        "xavier_normal_",
    )

    def __enter__(self) -> None:
        from transformers import PreTrainedModel

        skip: Callable[..., Tensor] = lambda tensor, *args, **kwargs: tensor  # noqa: E731
        self._saved = [(nn.init, name, getattr(nn.init, name)) for name in self._NAMES]
        self._saved.append((PreTrainedModel, "init_weights", PreTrainedModel.init_weights))
        for owner, name, _ in self._saved:
            setattr(owner, name, skip)
        PreTrainedModel.init_weights = PreTrainedModel.tie_weights  # all that is left of it

    def __exit__(self, *exc: object) -> None:
        for owner, name, function in self._saved:
            setattr(owner, name, function)


class _default_dtype:
    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        self._saved = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *exc: object) -> None:
        torch.set_default_dtype(self._saved)


def _files(directory: Path, stem: str) -> list[tuple[Path, set[str]]]:
    """The weight files with the tensors each must hold; an empty set where there is no index to say."""
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [(single, set())]
    if not index.is_file():
        raise ModelError(f"{directory}: has neither {single.name} nor {index.name}")
    placed: dict[str, set[str]] = {}
    for name, file in read_json(index).get("weight_map", {}).items():
        placed.setdefault(file, set()).add(name)
    absent = [file for file in placed if not (directory / file).is_file()]
    if absent:
        raise ModelError(f"{directory}: {', '.join(sorted(absent))} named in {index.name} but not there")
    return [(directory / file, names) for file, names in sorted(placed.items())]


def _canonical(name: str) -> str:
    """CLIP's files have a level `text_model` that transformers' class had once and lacks now."""
    return name.removeprefix("text_model.")


def _refuse(where: Path, what: str, names: Iterable[str]) -> None:
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        raise ModelError(f"{where}: {what}: {', '.join(listed[:_SHOWN])}{more}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
