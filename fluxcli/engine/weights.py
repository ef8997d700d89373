"""The only reader of weight files: strict, by name. A missing, surplus or misshapen tensor is an error that says
which."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fluxcli.checkpoints import Checkpoint, read_json
from fluxcli.engine.transformer import Flux, FluxConfig
from fluxcli.errors import ModelError

_STEM = "diffusion_pytorch_model"
_SHOWN = 3  # tensor names in an error before "and N more"
RANDOM_SEED = 0


def load_transformer(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> Flux:
    """The denoiser with its weights on `device`, read tensor by tensor straight into the packed layers."""
    directory = checkpoint.directory / "transformer"
    config = FluxConfig.from_json(checkpoint.transformer, str(directory / "config.json"))
    with torch.device(device), _default_dtype(dtype):
        model = Flux(config).eval()
    with torch.no_grad():
        if checkpoint.random:
            fill_random(model.slots(), device)
        else:
            fill_from_files(model.slots(), directory, _STEM)
    return model


def load_part(checkpoint: Checkpoint, part: str, device: str, dtype: torch.dtype) -> Any:
    """A text encoder or the VAE, built and read by the library that model_index.json names, held to the same
    strictness."""
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    for library in libraries.values():
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    directory = checkpoint.directory / part
    library, name = read_json(checkpoint.directory / "model_index.json").get(part, (None, None))
    cls = getattr(libraries.get(library), str(name), None)
    if cls is None:
        raise ModelError(
            f"{checkpoint.directory / 'model_index.json'}: {part} is {library}.{name}, which is not installed"
        )
    if checkpoint.random:
        return _random_part(cls, library, directory, device, dtype)
    try:
        model, info = cls.from_pretrained(
            directory,
            local_files_only=True,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # to be told of them below, by name
            dtype=dtype,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{directory}: cannot be loaded as {name}: {_first_line(error)}") from error
    _refuse(directory, "missing", info.get("missing_keys", ()))
    _refuse(directory, "surplus", info.get("unexpected_keys", ()))
    _refuse(directory, "misshapen", [each[0] for each in info.get("mismatched_keys", ())])
    return model.to(device).eval().requires_grad_(False)


def fill_from_files(slots: Iterable[tuple[str, Tensor]], directory: Path, stem: str) -> None:
    """Copies every tensor of `{stem}.safetensors`, or of the shards in its index, into the slot of its name.

    Each is mapped from disk and copied into place, so the model exists once in memory; dtypes are converted on the way.

    Raises:
        ModelError: naming the directory and the tensors, if names or shapes differ in any way.
    """
    wanted = dict(slots)
    found: set[str] = set()
    surplus: list[str] = []
    misshapen: list[str] = []
    for path, expected in _files(directory, stem):
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                _refuse(path, "missing (the index places it there)", expected - names)
                for name in sorted(names):
                    if name not in wanted:
                        surplus.append(name)
                        continue
                    shape = tuple(file.get_slice(name).get_shape())
                    if shape != tuple(wanted[name].shape):
                        misshapen.append(f"{name} {list(shape)}, expected {list(wanted[name].shape)}")
                    else:
                        wanted[name].copy_(file.get_tensor(name))
                    found.add(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: cannot be read: {_first_line(error)}") from error
    _refuse(directory, "missing", wanted.keys() - found)
    _refuse(directory, "surplus", surplus)
    _refuse(directory, "misshapen", misshapen)


def fill_random(slots: Iterable[tuple[str, Tensor]], device: str) -> None:
    """Seeded values, made on the device, of a size that keeps activations finite through every block: matrices with the
    variance of their fan-in, norm weights of one, small biases."""
    generator = torch.Generator(device).manual_seed(RANDOM_SEED)
    for name, slot in slots:
        if slot.ndim > 1:
            slot.normal_(0, slot[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            slot.normal_(0, 0.02, generator=generator)
        else:
            slot.fill_(1)


def _random_part(cls: Any, library: str, directory: Path, device: str, dtype: torch.dtype) -> nn.Module:
    config = read_json(directory / "config.json")
    with torch.device(device), _default_dtype(dtype), torch.no_grad():
        with _no_init():
            model: nn.Module = cls.from_config(config) if library == "diffusers" else cls(cls.config_class(**config))
        # Tied tensors appear once in parameters().
        fill_random(((name, parameter.data) for name, parameter in model.named_parameters()), device)
    return model.eval().requires_grad_(False)


class _no_init:
    """Skips torch.nn.init inside the block: billions of numbers that `fill_random` would draw again."""

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
        self._saved = {name: getattr(nn.init, name) for name in self._NAMES}
        for name in self._NAMES:
            setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)

    def __exit__(self, *exc: object) -> None:
        for name, function in self._saved.items():
            setattr(nn.init, name, function)


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


def _refuse(where: Path, what: str, names: Iterable[str]) -> None:
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        raise ModelError(f"{where}: {what}: {', '.join(listed[:_SHOWN])}{more}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
