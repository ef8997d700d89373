"""Blocks that live in host memory and visit the device one at a time, each for as long as it runs: what a model that
does not fit beside the others costs on the device is then one block."""

from typing import Any

import torch
from torch import Tensor, nn


class Visitors:
    """Keeps the parameters of `blocks` in host memory, pinned where there is a GPU, so that a visit is one asynchronous
    copy in the stream that the block runs on. They come with no values; fill `parameters()` as usual."""

    def __init__(self, blocks: nn.ModuleList, device: str) -> None:
        self._device = device
        for block in blocks:
            for parameter in block.parameters():
                parameter.data = torch.empty_like(parameter, device="cpu", pin_memory=device.startswith("cuda"))
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave, always_call=True)
        self._at_home: dict[nn.Parameter, Tensor] = {}

    def _enter(self, block: nn.Module, args: Any) -> None:
        for parameter in block.parameters():
            self._at_home[parameter] = parameter.data
            parameter.data = parameter.data.to(self._device, non_blocking=True, copy=True)

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        for parameter in block.parameters():
            parameter.data = self._at_home.pop(parameter, parameter.data)  # a visit that ran out of memory is half one
