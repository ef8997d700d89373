"""LPIPS, as Zhang, Isola, Efros, Shechtman and Wang defined it ("The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric", 2018), version 0.1 on AlexNet: torchmetrics' network, torchvision's weights."""

import threading
from typing import TYPE_CHECKING

import torch

from fluxcli.core.errors import FluxcliError, first_line

if TYPE_CHECKING:
    import numpy as np

    Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class Unavailable(FluxcliError):
    """LPIPS cannot be measured here. The message says why."""


class Lpips:
    """The distance of two images as people see it: 0 where they are equal. Safe to call from several threads.

    The weights come by torchvision's ways: out of torch's hub cache, else by a download of 233 MB.

    Raises:
        Unavailable: a library does not work here, or the weights cannot be had.
    """

    def __init__(self, device: str) -> None:
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity as Metric

            self._metric = Metric(net_type="alex", normalize=True).to(device)
        except Exception as error:  # a library beside another torch than its own may raise anything
            raise Unavailable(first_line(error)) from error
        self._device = torch.device(device)
        self._alone = threading.Lock()  # the metric keeps a sum of its own

    def __call__(self, a: "Pixels", b: "Pixels") -> float:
        """LPIPS of uint8 [H, W, 3] images of one size."""
        with self._alone, torch.inference_mode():
            return float(self._metric(self._planes(a), self._planes(b)))

    def _planes(self, pixels: "Pixels") -> torch.Tensor:
        """[1, 3, H, W] from 0 to 1."""
        return torch.tensor(pixels, device=self._device).permute(2, 0, 1)[None].float() / 255
