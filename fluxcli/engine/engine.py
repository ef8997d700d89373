"""The engine: one `Batch` of prompts in, pixels and timings out. It owns the device, its streams, the compiled code and
the captured graphs; it writes no files and knows no command line."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fluxcli.core.config import EngineConfig
from fluxcli.core.records import Adapters, Batch, PromptRecord, ShapeKey, WarmUp
from fluxcli.engine import denoise, memory, step_cache, true_cfg
from fluxcli.engine.attention.backends import Attend, Attention, check, sdpa
from fluxcli.engine.denoise import Moment, Steps
from fluxcli.engine.flight import Clock, InFlight
from fluxcli.engine.layers.rope import rope
from fluxcli.engine.matmul.gemm import Multiply
from fluxcli.engine.matmul.matmul import Matmul
from fluxcli.engine.matmul.torch_ import Reference
from fluxcli.engine.nets.flux1 import ROPE_THETA, Flux, Step
from fluxcli.engine.runtime.compile_cache import CompileCache, compile_counts
from fluxcli.engine.runtime.device import DTYPES, one_thread
from fluxcli.engine.runtime.faults import device_faults
from fluxcli.engine.runtime.graphs import Captured
from fluxcli.engine.runtime.tuner import Tuner
from fluxcli.engine.text import EmbeddingCache, TextEncoders
from fluxcli.engine.true_cfg import Branches, OneBranch, TwoBranches
from fluxcli.engine.vae import Decoder
from fluxcli.engine.weights.fill import load_transformer
from fluxcli.engine.weights.merging import Merged
from fluxcli.models.checkpoints import Checkpoint

_CHOICES = "choices.json"  # in the compile cache

_Watched = Callable[[Iterator[Moment]], Iterator[Moment]]


@dataclass
class _Prepared:
    """A shape made ready: its steps, captured on CUDA, what a step cache keeps between them, their branches, and the
    attention in them."""

    steps: Steps
    added: step_cache.Added | None
    branches: Branches
    attention: str


class Engine:
    """Loads a checkpoint onto the configured device. Not thread-safe: one batch is submitted after the other.

    Args:
        shapes: what it will run, as far as that is known: what cannot fit is then said before anything is loaded.

    Raises:
        OutOfMemory: one image does not fit beside the model.
        DeviceError: the attention that was asked for cannot run here.
        ModelError: what is wrong with the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig, shapes: Sequence[ShapeKey] = ()) -> None:
        self.config = config
        self._device, self._dtype = config.device, DTYPES[config.dtype]
        self._cuda = self._device.startswith("cuda")
        # Whether images are made one by one and by one thread. Numbers in 8 bits turn the last bit of a sum into a step
        # of a sixteenth, and what is summed up beside an image, and by how many threads, would change it.
        self._singly = config.fp8 and not self._cuda
        self._cache = CompileCache(checkpoint, config)
        self._tuner = Tuner(self._device)
        if self._cuda:
            self._tuner = Tuner(self._device, self._cache.read(_CHOICES), partial(self._cache.settled, _CHOICES))
            torch.cuda.set_device(self._device)
            self._copies = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
        check(config.attention, self._device, self._dtype)
        self.memory = memory.plan(checkpoint, config, shapes)
        multiply: Multiply = Matmul(self._tuner, self._device) if self._cuda else Reference()
        # Its weights are read while the libraries of the others are imported.
        with load_transformer(checkpoint, self._device, self._dtype, multiply, config.fp8) as self._flux:
            self._attend: Attend = sdpa
            if self._cuda:
                self._attend = Attention(config.attention, self._tuner, self._device, self._dtype)
            self._schedule = denoise.Schedule(checkpoint.scheduler)
            self._text = TextEncoders(checkpoint, self._device, self._dtype, self.memory.visiting_text)
            self._decoder = Decoder(checkpoint, self._device, self._dtype, config.compile)
        slots = {"transformer": self._flux.slots(), **self._text.slots()}
        self._merged = Merged(checkpoint, slots, self._device, self._dtype, self.memory.spare)
        self._embeddings = EmbeddingCache()
        self._channels = self._flux.config.in_channels // denoise.PATCH**2
        self._prepared: dict[ShapeKey, _Prepared] = {}
        self._kept = step_cache.Kept(self._device, self._dtype)
        if config.compile and not self._cuda:  # on CUDA the blocks are made of fused kernels already
            self._flux.compile_blocks()

    @property
    def replays(self) -> int:
        """Replays of captured steps so far, over all shapes."""
        steps = [step for prepared in self._prepared.values() for step in prepared.steps]
        return sum(step.replays for step in steps if isinstance(step, Captured))

    @property
    def flux(self) -> Flux:
        """The denoiser itself, for those who measure it."""
        return self._flux

    @property
    def attend(self) -> Attend:
        """The attention of its steps, likewise."""
        return self._attend

    @property
    def merged(self) -> Merged:
        """The adapters in its weights, likewise."""
        return self._merged

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
            with device_faults(key):
                prepared = self._prepare(self._at_once(key))
                if self._cuda:
                    torch.cuda.synchronize()
            new = compile_counts() - before
            done.append(WarmUp(key, time.perf_counter() - start, new["graphs"], new["misses"], prepared.attention))
            report(done[-1])
        return done

    @torch.inference_mode()
    def submit(self, batch: Batch) -> InFlight:
        """Starts a batch. On CUDA it returns while the device works, so that the next batch can be queued behind it.

        Raises:
            OutOfMemory: the batch does not fit; what was submitted before is unharmed.
            DeviceError: the device itself failed.
        """
        with device_faults(batch.key):
            return self._submit(batch)

    @torch.inference_mode()
    def denoise(self, key: ShapeKey, img: Tensor, txt: Tensor, moments: Iterable[Moment]) -> Tensor:
        """The loop that every batch of `key` goes through, for those who measure it. img [B, I, C] and txt [rows, L, D]
        in the model's dtype -> img after a step at every moment, good until the next call.

        Raises:
            OutOfMemory, DeviceError: as `submit`.
        """
        with device_faults(key):
            return denoise.denoise(self._prepare(key).steps, img, txt, moments)

    @torch.inference_mode()
    def ratios(self, batch: Batch) -> list[float]:
        """How much larger what the blocks add is at each step than at the step before, as the mean over image tokens; 1
        first. Of a batch without a mask, where the settings have a step cache: what `fluxcli calibrate` measures.

        Raises:
            OutOfMemory, DeviceError: as `submit`.
        """
        with device_faults(batch.key):
            added = self._prepare(self._at_once(batch.key)).added
            assert added is not None
            norms = step_cache.Norms(added)
            self._use(batch.adapters)
            txt, vec = self._encode(batch.key, true_cfg.prompts(batch.key, batch.records))
            self._denoise(batch, batch.records, txt, vec, norms.watched)
            return norms.ratios()

    def _submit(self, batch: Batch) -> InFlight:
        self._prepare(self._at_once(batch.key))
        self._use(batch.adapters)
        records = [*batch.records, *[batch.records[-1]] * (batch.key.batch_size - len(batch.records))]
        clock = Clock(self._cuda)
        with one_thread() if self._singly else nullcontext():
            txt, vec = self._encode(batch.key, true_cfg.prompts(batch.key, records))
            clock.mark()
            if self._singly:
                apart = (true_cfg.of_each(each, batch.key.branches) for each in (txt, vec))
                parts = zip([[record] for record in records], *apart, strict=True)
                img = torch.cat([self._denoise(batch, *part) for part in parts])
            else:
                img = self._denoise(batch, records, txt, vec)
        clock.mark()
        pixels, finite = self._decoder(denoise.unpack(img, *self._latent_size(batch.key)))
        clock.mark()
        return InFlight(batch, *self._to_host(pixels, finite), clock)

    def _use(self, adapters: Adapters) -> None:
        if self._merged.use(adapters):
            self._embeddings = EmbeddingCache()

    def _encode(self, key: ShapeKey, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(txt [B, L, D], vec [B, width]) of B prompts; those that were encoded lately are not encoded again."""
        known = {prompt: self._embeddings.get(prompt, key.text_length) for prompt in prompts}
        found = {prompt: embedding for prompt, embedding in known.items() if embedding is not None}
        missing = [prompt for prompt in known if prompt not in found]
        for prompt, (txt, vec) in self._text(missing, key.text_length):
            embedding = (self._flux.embed_text(txt), vec.clone())  # their memory is the graph's
            self._embeddings.put(prompt, key.text_length, embedding)
            found[prompt] = embedding
        txts, vecs = zip(*(found[prompt] for prompt in prompts), strict=True)
        return torch.stack(txts), torch.stack(vecs)

    def _denoise(
        self, batch: Batch, records: Sequence[PromptRecord], txt: Tensor, vec: Tensor, watched: _Watched = iter
    ) -> Tensor:
        """Latents [B, I, C] of B records; txt and vec are of the denoiser's rows."""
        prepared = self._prepare(self._at_once(batch.key))
        height, width = self._latent_size(batch.key)
        seeds = [record.seed for record in records]
        img = self._upload(denoise.stack_noise(seeds, self._channels, height, width, self._dtype))
        guidance = None
        if self._flux.config.guidance_embeds:
            scales = [record.guidance_scale for record in records] * batch.key.branches
            guidance = self._upload(torch.tensor(scales, dtype=torch.float32))
        if isinstance(prepared.branches, TwoBranches):
            prepared.branches.take(self._upload(torch.tensor([record.true_cfg_scale for record in records])))
        if prepared.added is not None:
            prepared.added.clear()
        moments = self._moments(batch.mask or "1" * batch.num_inference_steps, img.shape[1], guidance, vec)
        return denoise.denoise(prepared.steps, img, txt, watched(moments))

    def _moments(self, mask: str, image_tokens: int, guidance: Tensor | None, vec: Tensor) -> Iterator[Moment]:
        """A moment for each step of a mask."""
        timesteps, sigmas = self._schedule(len(mask), image_tokens)
        ahead = self._upload(step_cache.ahead(mask, sigmas)).unbind()
        at_once = max(1, memory.MODULATION_ROWS // len(vec))
        parts = zip(self._upload(timesteps).split(at_once), self._upload(sigmas.diff()).split(at_once), strict=True)
        each = iter(zip(mask, ahead, strict=True))
        for part, dts in parts:
            for mod, dt in zip(self._flux.modulations(part, guidance, vec), dts, strict=True):
                evaluated, by = next(each)
                yield Moment(mod, dt, None if evaluated == "1" else by)

    def _at_once(self, key: ShapeKey) -> ShapeKey:
        """The shape at which batches of `key` are denoised."""
        return key._replace(batch_size=1) if self._singly else key

    def _prepare(self, key: ShapeKey) -> _Prepared:
        if key not in self._prepared:
            height, width = self._latent_size(key)
            config = self._flux.config
            ids = denoise.position_ids(key.text_length, height, width, self._device)
            fixed = Step(rope(ids, config.axes_dims_rope, ROPE_THETA), self._attend)
            if isinstance(self._attend, Attention):
                shape = (key.rows, len(ids), config.num_attention_heads, config.attention_head_dim)
                self._attend.require(*shape, self._device, self._dtype)
            added = None
            if self.config.step_cache:
                added = self._kept.at(key.rows, len(ids) - key.text_length, config.inner_dim)
            branches = TwoBranches(key.batch_size, self._device) if key.branches > 1 else OneBranch()
            steps = step_cache.steps(self._flux, fixed, added, branches)
            self._prepared[key] = self._ready(key, steps, added, branches)
        return self._prepared[key]

    def _ready(self, key: ShapeKey, steps: Steps, added: step_cache.Added | None, branches: Branches) -> _Prepared:
        """Runs every stage at this shape once, so that all compiling is over, and captures the steps."""
        if self.config.compile:
            with self._tuning():
                steps = self._rehearsed(key, steps)
        backend = self._attend.latest if isinstance(self._attend, Attention) else "sdpa"
        return _Prepared(steps, added, branches, backend)

    def _rehearsed(self, key: ShapeKey, steps: Steps) -> Steps:
        height, width = self._latent_size(key)
        if self._cuda:
            self._text.capture(key.text_length, self._pool)
        txt, vec = self._encode(key, ["a prompt"] * key.rows)
        img = self._upload(denoise.stack_noise(range(key.batch_size), self._channels, height, width, self._dtype))
        guidance = torch.ones(key.rows, device=self._device) if self._flux.config.guidance_embeds else None
        mod, dt, _ = next(self._moments("1", img.shape[1], guidance, vec))
        if self._cuda:
            evaluate = Captured(steps.evaluate, img, txt, mod, dt, pool=self._pool)
            reuse = steps.reuse and Captured(steps.reuse, img, mod, dt, torch.zeros_like(dt), pool=self._pool)
            steps = Steps(evaluate, reuse)
        else:
            steps.evaluate(img, txt, mod, dt)
        self._decoder(denoise.unpack(img, height, width))
        return steps

    @contextmanager
    def _tuning(self) -> Iterator[None]:
        """What is met in the block runs as an earlier process found it fastest, or is timed now."""
        if not self._cuda:
            yield
            return
        before = dict(self._tuner.table)
        try:
            with self._tuner.tuning():
                yield
        finally:  # what was timed before memory ran out need not be timed again
            if new := dict(self._tuner.table.items() - before.items()):
                self._cache.add(_CHOICES, new)

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
