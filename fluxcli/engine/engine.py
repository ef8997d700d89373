"""The engine: one `Batch` of prompts in, pixels and timings out. It owns the device, its streams, the compiled code and
the captured graphs; it writes no files and knows no command line."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxcli.core.config import EngineConfig
from fluxcli.core.errors import DeviceError, OutOfMemory
from fluxcli.core.records import Batch, Pictures, PromptRecord, ShapeKey, Timing, WarmUp
from fluxcli.engine import denoise, memory
from fluxcli.engine.attention import backends
from fluxcli.engine.layers.ops import rope
from fluxcli.engine.nets.flux1 import ROPE_THETA, Flux, Rope
from fluxcli.engine.runtime import tuner
from fluxcli.engine.runtime.compile_cache import CompileCache, compile_counts
from fluxcli.engine.runtime.device import DTYPES
from fluxcli.engine.runtime.graphs import StepGraph
from fluxcli.engine.text import EmbeddingCache, TextEncoders
from fluxcli.engine.vae import Decoder
from fluxcli.engine.weights.fill import load_transformer
from fluxcli.models.checkpoints import Checkpoint

_CHOICES = "choices.json"  # in the compile cache


@dataclass
class _Prepared:
    """What a shape needs beside the weights."""

    backend: str
    pe: Rope
    graph: StepGraph | None = None


class Engine:
    """Loads a checkpoint onto the configured device. Not thread-safe: one batch is submitted after the other.

    Args:
        shapes: what it will run, as far as that is known: what cannot fit is then said before anything is loaded.

    Raises:
        OutOfMemory: one picture does not fit beside the model.
        ModelError: what is wrong with the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig, shapes: Sequence[ShapeKey] = ()) -> None:
        self.config = config
        self._device, self._dtype = config.device, DTYPES[config.dtype]
        self._cuda = self._device.startswith("cuda")
        self._cache = CompileCache(checkpoint, config)
        if self._cuda:
            tuner.remember(self._cache.read(_CHOICES))
            torch.cuda.set_device(self._device)
            self._copies = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
        self.memory = memory.plan(checkpoint, config, shapes)
        # Its weights are read while the libraries of the others are imported.
        with load_transformer(checkpoint, self._device, self._dtype) as self._flux:
            self._schedule = denoise.Schedule(checkpoint.directory / "scheduler")
            self._text = TextEncoders(checkpoint, self._device, self._dtype, self.memory.visiting_text)
            self._decoder = Decoder(checkpoint, self._device, self._dtype, config.compile)
        self._embeddings = EmbeddingCache()
        self._channels = self._flux.config.in_channels // denoise.PATCH**2
        self._prepared: dict[ShapeKey, _Prepared] = {}
        if config.compile and not self._cuda:  # on CUDA the blocks are made of fused kernels already
            _compile_blocks(self._flux.transformer_blocks, self._flux.single_transformer_blocks)

    @property
    def replays(self) -> int:
        """Graph replays so far, over all shapes."""
        return sum(prepared.graph.replays for prepared in self._prepared.values() if prepared.graph)

    @property
    def flux(self) -> Flux:
        """The denoiser itself, for those who measure it."""
        return self._flux

    @torch.inference_mode()
    def warm_up(self, keys: Iterable[ShapeKey], report: Callable[[WarmUp], None] = lambda one: None) -> list[WarmUp]:
        """Compiles, plans and captures every shape, in the order given: largest first keeps the graphs' memory least.

        Raises:
            DeviceError: an attention backend chosen by name cannot run a shape.
            OutOfMemory: a shape does not fit the device.
        """
        done = []
        for key in keys:
            before, start = compile_counts(), time.perf_counter()
            with _device_faults(key):
                prepared = self._prepare(key)
                if self._cuda:
                    torch.cuda.synchronize()
            new = compile_counts() - before
            done.append(WarmUp(key, time.perf_counter() - start, new["graphs"], new["misses"], prepared.backend))
            report(done[-1])
        return done

    @torch.inference_mode()
    def submit(self, batch: Batch) -> "InFlight":
        """Starts a batch. On CUDA it returns while the device works, so that the next batch can be queued behind it.

        Raises:
            OutOfMemory: the batch does not fit; what was submitted before is unharmed.
            DeviceError: the device itself failed.
        """
        with _device_faults(batch.key):
            return self._submit(batch)

    @torch.inference_mode()
    def denoise(self, key: ShapeKey, img: Tensor, txt: Tensor, steps: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """The loop that every batch of `key` goes through, for those who measure it. img [B, I, C] and txt [B, L, D] in
        the model's dtype, each step's (mod, dt) -> img after all steps, good until the next call.

        Raises:
            OutOfMemory, DeviceError: as `submit`.
        """
        with _device_faults(key):
            return self._loop(self._prepare(key), img, txt, steps)

    def _submit(self, batch: Batch) -> "InFlight":
        prepared = self._prepare(batch.key)
        records = [*batch.records, *[batch.records[-1]] * (batch.key.batch_size - len(batch.records))]
        clock = _Clock(self._cuda)
        txt, vec = self._encode(batch.key, [record.prompt for record in records])
        clock.mark()
        img = self._denoise(batch, records, txt, vec, prepared)
        clock.mark()
        pixels, finite = self._decoder(denoise.unpack(img, *self._latent_size(batch.key)))
        clock.mark()
        return InFlight(batch, *self._to_host(pixels, finite), clock)

    def _encode(self, key: ShapeKey, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(txt [B, L, D], vec [B, width]); prompts that were encoded lately are not encoded again."""
        found = {prompt: self._embeddings.get(prompt, key.text_length) for prompt in prompts}
        missing = [prompt for prompt, embedding in found.items() if embedding is None]
        for prompt, (txt, vec) in self._text(missing, key.text_length):
            embedding = (self._flux.embed_text(txt), vec.clone())  # their memory is the graph's
            self._embeddings.put(prompt, key.text_length, embedding)
            found[prompt] = embedding
        txts, vecs = zip(*(found[prompt] for prompt in prompts), strict=True)
        return torch.stack(txts), torch.stack(vecs)

    def _denoise(
        self, batch: Batch, records: Sequence[PromptRecord], txt: Tensor, vec: Tensor, prepared: _Prepared
    ) -> Tensor:
        height, width = self._latent_size(batch.key)
        seeds = [record.seed for record in records]
        img = self._upload(denoise.stack_noise(seeds, self._channels, height, width, self._dtype))
        guidance = None
        if self._flux.config.guidance_embeds:
            guidance = self._upload(torch.tensor([record.guidance_scale for record in records], dtype=torch.float32))
        return self._loop(prepared, img, txt, self._steps(batch.num_inference_steps, img.shape[1], guidance, vec))

    def _loop(self, prepared: _Prepared, img: Tensor, txt: Tensor, steps: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        if prepared.graph is not None:
            return prepared.graph.run(img, txt, steps)
        for mod, dt in steps:
            img = denoise.euler_step(img, self._flux(img, txt, prepared.pe, mod, prepared.backend), dt)
        return img

    def _steps(
        self, steps: int, image_tokens: int, guidance: Tensor | None, vec: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Each step's (mod [B, modulations, D], dt []): all that tells one step from the next."""
        timesteps, sigmas = self._schedule(steps, image_tokens)
        at_once = max(1, memory.MODULATION_ROWS // len(vec))
        parts = zip(self._upload(timesteps).split(at_once), self._upload(sigmas.diff()).split(at_once), strict=True)
        for part, dts in parts:
            yield from zip(self._flux.modulations(part, guidance, vec), dts, strict=True)

    def _prepare(self, key: ShapeKey) -> _Prepared:
        if key in self._prepared:
            return self._prepared[key]
        height, width = self._latent_size(key)
        ids = denoise.position_ids(key.text_length, height, width, self._device)
        pe = rope(ids, self._flux.config.axes_dims_rope, ROPE_THETA)
        with self._tuning():
            prepared = _Prepared(self._backend(key, len(ids)), pe)
            if self.config.compile:
                self._rehearse(key, prepared)
        self._prepared[key] = prepared
        return prepared

    def _rehearse(self, key: ShapeKey, prepared: _Prepared) -> None:
        """Runs every stage at this shape once, so that all compiling is over, and captures the step."""
        height, width = self._latent_size(key)
        if self._cuda:
            self._text.capture(key.text_length, self._pool)
        txt, vec = self._encode(key, ["a prompt"] * key.batch_size)
        img = self._upload(denoise.stack_noise(range(key.batch_size), self._channels, height, width, self._dtype))
        guidance = torch.ones(key.batch_size, device=self._device) if self._flux.config.guidance_embeds else None
        mod, _ = next(self._steps(1, img.shape[1], guidance, vec))

        def step(img: Tensor, txt: Tensor, mod: Tensor) -> Tensor:
            return self._flux(img, txt, prepared.pe, mod, prepared.backend)

        if self._cuda:
            prepared.graph = StepGraph(step, img, txt, mod, self._pool)
        else:
            step(img, txt, mod)
        self._decoder(denoise.unpack(img, height, width))

    @contextmanager
    def _tuning(self) -> Iterator[None]:
        """What is met in the block runs as an earlier process found it fastest, or is timed now."""
        if not (self._cuda and self.config.compile):
            yield
            return
        before = tuner.table()
        try:
            with tuner.tuning():
                yield
        finally:  # what was timed before memory ran out need not be timed again
            if new := tuner.table().items() - before.items():
                self._cache.add(_CHOICES, dict(new))

    def _backend(self, key: ShapeKey, tokens: int) -> str:
        chosen = self.config.attention
        if not self._cuda:
            return "sdpa"
        config = self._flux.config
        shape = (key.batch_size, tokens, config.num_attention_heads, config.attention_head_dim)
        if chosen != "auto":
            backends.require(chosen, *shape, self._device, self._dtype)
            return chosen
        name = backends.comparison(*shape)
        known = self._cache.attention(name)
        if known is not None and backends.missing(known, self._device, self._dtype) is None:
            return known
        timed = backends.milliseconds(*shape, self._device, self._dtype)
        fastest = min(timed, key=lambda backend: timed[backend])
        self._cache.remember_attention(name, fastest)
        return fastest

    def _latent_size(self, key: ShapeKey) -> tuple[int, int]:
        return key.height // self._decoder.scale, key.width // self._decoder.scale

    def _upload(self, tensor: Tensor) -> Tensor:
        if not self._cuda:
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _to_host(self, pixels: Tensor, finite: Tensor) -> tuple[Tensor, Tensor, "torch.cuda.Event | None"]:
        """Copies on a stream of its own, beside the next batch's work."""
        if not self._cuda:
            return pixels, finite, None
        host = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in (pixels, finite)]
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            for target, source in zip(host, (pixels, finite), strict=True):
                target.copy_(source, non_blocking=True)
                source.record_stream(self._copies)
        arrived = torch.cuda.Event()
        arrived.record(self._copies)
        return host[0], host[1], arrived


class InFlight:
    """A submitted batch; `result()` waits for it."""

    def __init__(
        self, batch: Batch, pixels: Tensor, finite: Tensor, arrived: "torch.cuda.Event | None", clock: "_Clock"
    ) -> None:
        self._batch, self._pixels, self._finite = batch, pixels, finite
        self._arrived, self._clock = arrived, clock

    def ready(self) -> bool:
        """Whether `result()` would return at once."""
        return self._arrived is None or self._arrived.query()

    def result(self) -> Pictures:
        images = len(self._batch.records)
        with _device_faults(self._batch.key):
            if self._arrived is not None:
                self._arrived.synchronize()
            share = [seconds / images for seconds in self._clock.seconds()]
        return Pictures(self._pixels[:images].numpy(), self._finite[:images].tolist(), Timing(*share))


class _Clock:
    """Seconds between marks: on the device's own clock where it has one."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._cuda:
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [end - start for start, end in pairs]


@contextmanager
def _device_faults(key: ShapeKey) -> Iterator[None]:
    """Sorts what a device can raise into what a smaller batch may cure and what nothing will."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise OutOfMemory(_no_memory("device", key)) from error
    except torch.AcceleratorError as error:
        reason = str(error).strip().splitlines()[0]
        raise DeviceError(
            f"the device failed at {key}: {reason}. Nothing committed is lost; run again to go on"
        ) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # how torch says it on a CPU
            raise OutOfMemory(_no_memory("machine", key)) from error
        raise


def _no_memory(where: str, key: ShapeKey) -> str:
    advice = "a smaller --batch-size needs less" if key.batch_size > 1 else "smaller pictures need less"
    return f"the {where} has no memory for {key}; {advice}"


def _compile_blocks(*stacks: torch.nn.ModuleList) -> None:
    """Compiles the two block functions. All blocks of a stack have one shape and so share one compiled function per
    ShapeKey; the limit on recompilations is lifted because a job may have many shapes."""
    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 100_000
    for block in (block for stack in stacks for block in stack):
        block.compile(fullgraph=True, dynamic=False)
