"""The largest useful batch, for `--batch-size auto`.

A batch is useful up to the knee: the number of tokens from which on more of them make no token cheaper. It belongs to
the machine, the architecture, the dtype and the attention asked for; it is measured once and kept in the compile cache.
Three blocks in FLUX's proportions (one dual, two single) run on 1, 2, 4, … pictures of 512 tokens, on a GPU as a
replayed graph, as the engine runs them; the knee is the smallest number of tokens whose time per token is within 5 % of
the best. A picture of 1024x1024 has 4096 tokens beside its text's, one of 256x256 has 256: the same knee is few
pictures there and many here.
"""

from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch

from fluxcli.core.config import EngineConfig
from fluxcli.core.records import Group, ShapeKey
from fluxcli.engine import denoise, memory
from fluxcli.engine.attention import backends
from fluxcli.engine.layers.ops import rope
from fluxcli.engine.nets.flux1 import ROPE_THETA, Flux, FluxConfig
from fluxcli.engine.runtime import stopwatch
from fluxcli.engine.runtime.compile_cache import CompileCache
from fluxcli.engine.runtime.device import DTYPES
from fluxcli.engine.runtime.graphs import capture
from fluxcli.engine.weights import fill
from fluxcli.models.checkpoints import Checkpoint

_SIDE, _TEXT = 16, 256  # of the measured picture: 16 x 16 image tokens, 256 text tokens
_PICTURES = (1, 2, 4, 8, 16, 32, 64)
_NEAR = 1.05
_LONG = 0.2  # seconds; where three blocks take longer, as on CPUs, larger batches are not tried
_CHOICES, _KNEE = "batching.json", "knee_tokens"


class BatchSizes:
    """Group -> batch size, a power of two: the pictures that reach the knee, or as many as memory holds."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig) -> None:
        cache = CompileCache(checkpoint, config)
        name = f"{_KNEE} {config.attention}"
        known = cache.read(_CHOICES).get(name)
        if known is None:
            known = knee(measure(checkpoint, config))
            cache.add(_CHOICES, {name: known})
        self.knee: int = known
        self._needs = None
        if config.device.startswith("cuda"):
            self._needs = memory.Needs(checkpoint, DTYPES[config.dtype])
            self._free = memory.free(config.device)

    def __call__(self, group: Group) -> int:
        key = ShapeKey(1, group.height, group.width, group.text_length)
        useful = next((size for size in _PICTURES if size * key.tokens() >= self.knee), _PICTURES[-1])
        if self._needs is None:
            return useful
        # A T5 that only visits costs more than batches gain, so it stays wherever one picture fits beside it.
        for visiting in (False, True):
            for size in (size for size in reversed(_PICTURES) if size <= useful):
                shape = key._replace(batch_size=size)
                if self._needs.weights(visiting) + self._needs.shapes([shape]) <= self._free:
                    return size
        return 1


def knee(per_token: dict[int, float]) -> int:
    """The fewest of the measured tokens whose time per token is near the best."""
    return min(tokens for tokens, time in per_token.items() if time <= _NEAR * min(per_token.values()))


def measure(checkpoint: Checkpoint, config: EngineConfig) -> dict[int, float]:
    """Tokens -> seconds per token. Takes seconds, and the memory of three blocks and their activations."""
    flux = replace(FluxConfig.from_json(checkpoint.transformer), num_layers=1, num_single_layers=2)
    dtype, tokens = DTYPES[config.dtype], _SIDE**2 + _TEXT
    if config.device.startswith("cuda"):
        torch.cuda.set_device(config.device)  # streams, graphs and events are of the current one
    with torch.device(config.device), torch.inference_mode():
        model = Flux(flux).to(dtype).eval()
        fill.fill_random(model.slots(), config.device)
        pe = rope(
            denoise.position_ids(_TEXT, _SIDE * denoise.PATCH, _SIDE * denoise.PATCH, config.device),
            flux.axes_dims_rope,
            ROPE_THETA,
        )
        backend = _backend(flux, config, tokens)
        per_token: dict[int, float] = {}
        for pictures in _PICTURES:
            img = torch.randn(pictures, _SIDE**2, flux.in_channels, dtype=dtype)
            txt = torch.randn(pictures, _TEXT, flux.inner_dim, dtype=dtype)
            mod = torch.zeros(pictures, flux.modulations, flux.inner_dim, dtype=dtype)

            def step(img: torch.Tensor = img, txt: torch.Tensor = txt, mod: torch.Tensor = mod) -> torch.Tensor:
                return model(img, txt, pe, mod, backend)

            try:
                seconds = _seconds(step, config.device)
            except torch.OutOfMemoryError:
                break
            per_token[pictures * tokens] = seconds / (pictures * tokens)
            if seconds > _LONG:
                break
    if config.device.startswith("cuda"):
        del model, img, txt, mod, step
        torch.cuda.empty_cache()
    return per_token


def _backend(flux: FluxConfig, config: EngineConfig, tokens: int) -> str:
    if not config.device.startswith("cuda"):
        return "sdpa"
    if config.attention != "auto":
        return config.attention
    shape = (4, tokens, flux.num_attention_heads, flux.attention_head_dim)
    timed = backends.milliseconds(*shape, config.device, DTYPES[config.dtype])
    return min(timed, key=lambda backend: timed[backend])


def _seconds(step: Callable[[], object], device: str) -> float:
    """Seconds of one run, on CUDA of one replay: the median of five rounds, after one."""
    run, calls = step, 1
    if device.startswith("cuda"):
        graph, _ = capture(step)
        run, calls = graph.replay, 10
    rounds = [stopwatch.seconds(run, calls, device) for _ in range(1 + stopwatch.ROUNDS)]
    return median(rounds[1:])
