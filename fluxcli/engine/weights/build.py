"""The packages' classes, built with no values in their parameters."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fluxcli.core.errors import ModelError, first_line
from fluxcli.models.checkpoints import Checkpoint
from fluxcli.models.configs import read_config

# What is read of a text encoder's config. Everything else a config of transformers takes, and some of it is no
# architecture: whose code attention is, what a call returns.
_ENCODER_FIELDS = frozenset(
    (
        *("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"),
        # CLIP
        *("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"),
        *("max_position_embeddings", "hidden_act", "layer_norm_eps"),
        # T5
        *("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "layer_norm_epsilon", "tie_word_embeddings"),
        *("feed_forward_proj", "dense_act_fn", "is_gated_act"),
        *("relative_attention_num_buckets", "relative_attention_max_distance"),
    )
)


def build(checkpoint: Checkpoint, part: str, device: str, dtype: torch.dtype) -> Any:
    """A text encoder or the VAE.

    Of its config no more is taken than the fields of its class: what says how, and with whose code, a library is to run
    it stays unread.

    Raises:
        ModelError: the config is no architecture of that class.
    """
    directory = checkpoint.directory / part
    package, cls = _class_of(checkpoint, part)
    config = read_config(directory)
    try:
        with torch.device(device), default_dtype(dtype), _no_init():
            model = _from_config(package, cls, config)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"{directory / 'config.json'}: cannot be built as {cls.__name__}: {first_line(error)}"
        ) from error
    model.eval().requires_grad_(False)
    if dtype == torch.float16:
        # T5's MLP leaves float16's range; transformers says so of its class, and FluxPipeline follows it.
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in (model._keep_in_fp32_modules or ()):
                module.float()
    return model


def _from_config(package: str, cls: Any, config: dict[str, Any]) -> Any:
    if package == "diffusers":
        fields = inspect.signature(cls.__init__).parameters.keys()
        return cls.from_config({key: value for key, value in config.items() if key in fields})
    return cls(cls.config_class(**{key: value for key, value in config.items() if key in _ENCODER_FIELDS}))


def _class_of(checkpoint: Checkpoint, part: str) -> tuple[str, Any]:
    import diffusers
    import transformers

    packages = {"diffusers": diffusers, "transformers": transformers}
    for each in packages.values():
        each.utils.logging.set_verbosity_error()
    package, name = checkpoint.class_of(part)
    return package, getattr(packages[package], name)


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


class default_dtype:
    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        self._saved = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *exc: object) -> None:
        torch.set_default_dtype(self._saved)
