"""FLUX's sampler as FluxPipeline runs it: noise, pack and unpack, the sigma schedule, the Euler step, and the loop."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fluxcli.core.errors import ModelError, first_line
from fluxcli.models.configs import scheduler_config

StepFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (img, txt, mod, dt) -> img
ReusedStep = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (img, mod, dt, ahead) -> img

PATCH = 2  # latent pixels along a side of one image token


def latent_noise(seed: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """One image's starting noise [channels, height, width] in latent pixels, drawn on the host from its seed alone.

    Drawn in the model's dtype, as FluxPipeline does: bfloat16 noise is not rounded float32 noise.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, channels, height, width), generator=generator, dtype=dtype)[0]


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> img [B, H/2 * W/2, 4C]."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(img: Tensor, height: int, width: int) -> Tensor:
    """img [B, H/2 * W/2, 4C] -> latents [B, C, H, W], with height and width in latent pixels."""
    batch, _, channels = img.shape
    patches = img.view(batch, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)


def position_ids(text_length: int, height: int, width: int, device: str) -> Tensor:
    """[L + H/2 * W/2, 3]: zeros for text, (0, row, column) for image tokens; sizes in latent pixels."""
    rows, columns = torch.meshgrid(
        torch.arange(height // PATCH, device=device), torch.arange(width // PATCH, device=device), indexing="ij"
    )
    img_ids = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3)
    return torch.cat((torch.zeros(text_length, 3, dtype=img_ids.dtype, device=device), img_ids))


class Schedule:
    """Sigmas from the pipeline's own scheduler config, through diffusers' FlowMatchEulerDiscreteScheduler."""

    def __init__(self, directory: Path) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self._source = directory / "scheduler_config.json"
        settings = scheduler_config(directory)
        with self._faults():
            self._scheduler = FlowMatchEulerDiscreteScheduler(**settings)

    def __call__(self, steps: int, image_tokens: int) -> tuple[Tensor, Tensor]:
        """(timesteps [steps], sigmas [steps + 1]) in float32 on the host; sigmas fall from 1 to 0.

        `image_tokens` sets the shift where the config says `use_dynamic_shifting`.

        Raises:
            ModelError: the config makes no schedule of so many steps.
        """
        config, mu = self._scheduler.config, None
        if config.use_dynamic_shifting:
            # As FluxPipeline: linear in the number of image tokens between the config's two ends.
            slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
            mu = image_tokens * slope + config.base_shift - slope * config.base_image_seq_len
        with self._faults():
            self._scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu, device="cpu")
        return self._scheduler.timesteps, self._scheduler.sigmas

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (ArithmeticError, ImportError, LookupError, TypeError, ValueError) as error:
            reason = first_line(error)
            raise ModelError(f"{self._source}: makes no schedule: {reason}") from error


def euler_step(img: Tensor, velocity: Tensor, dt: Tensor) -> Tensor:
    """img + dt * velocity, in float32, rounded to img's dtype. dt is a float32 scalar: the next sigma less this one."""
    return (img.float() + dt * velocity.float()).to(img.dtype)


class Moment(NamedTuple):
    """All that tells one step from the next.

    Attributes:
        mod: [B, modulations, D].
        dt: [] in float32, the next sigma less this one.
        ahead: [] in float32, for a step that reuses what the blocks added last (`step_cache.ahead`); None for one that
            evaluates them.
    """

    mod: Tensor
    dt: Tensor
    ahead: Tensor | None = None


class Steps(NamedTuple):
    """The two kinds of step at one shape. `reuse` is None where none is ever reused."""

    evaluate: StepFunction
    reuse: ReusedStep | None = None


def denoise(steps: Steps, img: Tensor, txt: Tensor, moments: Iterable[Moment]) -> Tensor:
    """img [B, I, C] after a step at every moment: the one loop, whether the steps are captured or not. The result is
    the last step's own memory, good until it runs again."""
    for mod, dt, ahead in moments:
        if ahead is None:
            img = steps.evaluate(img, txt, mod, dt)
        else:
            assert steps.reuse is not None, "this engine's settings have no step cache"
            img = steps.reuse(img, mod, dt, ahead)
    return img


def stack_noise(seeds: Sequence[int], channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Packed noise of a batch [B, I, 4 * channels]; height and width in latent pixels."""
    return pack(torch.stack([latent_noise(seed, channels, height, width, dtype) for seed in seeds]))
