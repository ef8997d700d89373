"""Train the built-in pipeline: `python -m jobs.tiny.train --out DIRECTORY [--stages vae,text,flow]`.

Three stages: the VAE learns to reconstruct rendered scenes; both text encoders learn to tell what a caption says; then
the transformer learns, by rectified flow on the VAE's latents, to turn noise into what a caption says. An exponential
average of the weights is what is written, in bfloat16. On CUDA a whole training step, random numbers and optimizer
included, is one captured graph: these networks are so small that launching their kernels would take longer than running
them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count, islice
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, T5EncoderModel

from jobs.tiny.data import LONGEST, Pool, build_pool
from jobs.tiny.evaluate import KINDS, Case, cases, contact_sheet, draw, quiet, score
from jobs.tiny.pipeline import POOLED_WIDTH, SIZE, TEXT_WIDTH, build, save
from jobs.tiny.reading import readers, reading_loss, reading_score
from jobs.tiny.scenes import place, render
from jobs.tiny.vocabulary import CLIP_LENGTH

VAE_BATCH = 96
# Text length -> scenes a step, about as many tokens each, and the share of steps. Short captions appear at every
# length, so that padding tells nothing.
FLOW_BATCH = {64: 256, 128: 176, 256: 104, 512: 56}
FLOW_SHARE = {64: 0.74, 128: 0.12, 256: 0.08, 512: 0.06}
# Density of the flow's times, t = s u / (1 + (s - 1) u) of an even u: what a picture holds is decided near the noise.
TIME_SHIFT = 3.0
EMA_DECAY = 0.999
WARM_UP = 300  # steps
FINAL_SECONDS = 12  # left free by --fit for the last evaluation and writing
KL_WEIGHT = 1e-3  # of the mean KL per latent, beside the mean absolute error per colour value in -1..1
LATENT_NOISE = 0.12  # most noise added to latents while the decoder learns, in deviations of the latents
GUIDANCE = (0.0, 10.0)  # fed at random and never rewarded: the model learns to draw the same at any guidance


class Log:
    """JSON lines in a file that is appended to, and on stdout."""

    def __init__(self, path: Path):
        self.path = path
        self.start = time.monotonic()

    def __call__(self, **row: object) -> None:
        line = json.dumps({"seconds": round(time.monotonic() - self.start, 1), **row})
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class Flat:
    """Tensors like the given ones, zero at first, as views of one buffer: a single kernel updates them all."""

    def __init__(self, like: list[torch.Tensor], dtype: torch.dtype):
        starts = [0, *accumulate(-(-tensor.numel() // 8) * 8 for tensor in like)]  # 16 bytes, for fast matrix products
        self.all = torch.zeros(starts[-1], dtype=dtype, device=like[0].device)
        pairs = zip(starts, like, strict=False)
        self.views = [self.all[start : start + tensor.numel()].view_as(tensor) for start, tensor in pairs]

    def hold(self, parameters: list[torch.Tensor]) -> None:
        """Take over the values of parameters, which become these views."""
        for view, parameter in zip(self.views, parameters, strict=True):
            parameter.data = view.copy_(parameter.data)


class Trainer:
    """Networks, their running average and their optimizer; a step of any kind is one call, or one graph replay.

    Parameters that ask for no gradient stay as they are.
    """

    def __init__(
        self,
        networks: nn.ModuleDict,
        steps: int,
        peak: float,
        device: torch.device,
        capture: bool,
        dtype: torch.dtype = torch.float32,
    ):
        self.networks = networks.to(device).train()
        self.average = copy.deepcopy(self.networks).eval()
        self.parameters, averaged = (
            [parameter for parameter in network.parameters() if parameter.requires_grad]
            for network in (self.networks, self.average)
        )
        self.average.requires_grad_(False)
        # The optimizer works on float32 copies; the networks compute in `dtype`.
        self.master, self.mean, self.gradient = (Flat(self.parameters, torch.float32) for _ in range(3))
        torch._foreach_copy_(self.master.views, [parameter.detach() for parameter in self.parameters])
        self.mean.hold(averaged)
        self.networks.to(dtype)
        self.weights = Flat(self.parameters, dtype)
        self.weights.hold(self.parameters)
        self.master.all.grad = self.gradient.all
        self.steps, self.peak, self.device = steps, peak, device
        self.done = 0
        self.rate = torch.zeros((), device=device)
        self.forgetting = torch.zeros((), device=device)
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            [self.master.all], lr=self.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True, capturable=on_gpu
        )
        self.pool = torch.cuda.graph_pool_handle() if on_gpu and capture else None

    def schedule(self) -> None:
        """Linear warm-up, then a cosine down to nothing; the average forgets faster while it is young."""
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, self.done / self.steps)))
        self.rate.fill_(self.peak * min(1.0, (self.done + 1) / WARM_UP) * fall)
        self.forgetting.fill_(1 - min(EMA_DECAY, (1 + self.done) / (10 + self.done)))

    def update(self, loss: torch.Tensor) -> None:
        loss.backward()
        with torch.no_grad():
            torch._foreach_copy_(self.gradient.views, [parameter.grad for parameter in self.parameters])
            torch.nn.utils.clip_grad_norm_([self.master.all], 1.0)
            self.optimizer.step()
            self.weights.all.copy_(self.master.all)
            self.mean.all.lerp_(self.master.all, self.forgetting)

    def forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def stepper(self, loss_of: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """A function that makes one training step on `loss_of` and returns its loss; on CUDA a captured graph.

        All graphs share one pool of memory: nothing but the loss outlives a replay, since each copies its gradients
        out of it and the weights lie elsewhere.
        """

        def step() -> torch.Tensor:
            self.forget_gradients()
            loss = loss_of()
            self.update(loss)
            return loss.detach()

        if self.pool is None:
            return step
        # Three real steps on a side stream before the capture, as it asks for; they train at the rate of the moment.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.forget_gradients()  # so that the graph owns its gradients
        with torch.cuda.graph(graph, pool=self.pool):
            loss = step()

        def replay(inputs: object = loss_of) -> torch.Tensor:  # the graph reads their memory: they must live with it
            graph.replay()
            return loss

        return replay

    def state(self) -> dict:
        random_state = torch.cuda.get_rng_state() if self.device.type == "cuda" else torch.get_rng_state()
        return {
            "master": self.master.all.detach(),
            "mean": self.mean.all,
            "done": self.done,
            "steps": self.steps,
            "optimizer": self.optimizer.state_dict(),
            "random": random_state,
        }

    def load(self, state: dict) -> None:
        with torch.no_grad():
            self.master.all.copy_(state["master"])
            self.weights.all.copy_(self.master.all)
            self.mean.all.copy_(state["mean"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["lr"] = self.rate  # load_state_dict made a copy
        self.done, self.steps = state["done"], state["steps"]
        set_state = torch.cuda.set_rng_state if self.device.type == "cuda" else torch.set_rng_state
        set_state(state["random"].cpu())


# --- stage 1: the VAE ---------------------------------------------------------------------------------------------


def vae_loss(vae: AutoencoderKL, rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Absolute plus squared error per colour value of randomly drawn scenes, and a little KL.

    The KL keeps latents small; noise in proportion to them teaches the decoder to forgive the flow's small errors.
    """
    pick = torch.randint(len(rows), (batch,), device=rows.device)
    images = render(rows[pick]) * 2 - 1
    with torch.autocast(rows.device.type, torch.bfloat16):
        mean, log_variance = vae.encoder(images).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        noise = LATENT_NOISE * torch.rand(batch, 1, 1, 1, device=mean.device) * mean.detach().std()
        latents = mean + torch.sqrt(log_variance.exp() + noise**2) * torch.randn_like(mean)
        decoded = vae.decoder(latents)
    gap = decoded.float() - images
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return gap.abs().mean() + gap.square().mean() + KL_WEIGHT * kl


@torch.no_grad()
def encode(vae: AutoencoderKL, rows: torch.Tensor, batch: int = 512) -> torch.Tensor:
    """Rows -> packed latents float16 [N, 64, 64], not yet shifted and scaled; the mean of each latent."""
    packed = []
    for part in rows.split(batch):
        with torch.autocast(rows.device.type, torch.bfloat16):
            mean = vae.encoder(render(part) * 2 - 1).chunk(2, dim=1)[0]
        packed.append(FluxPipeline._pack_latents(mean, len(part), 16, SIZE // 8, SIZE // 8).half())
    return torch.cat(packed)


@torch.no_grad()
def normalize(vae: AutoencoderKL, rows: torch.Tensor) -> None:
    """Set the shift and scale that give latents mean 0 and deviation 1 over all channels."""
    latents = encode(vae, rows[:8192]).float()
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, wanted: list[Case], workers: Executor | None) -> dict:
    """Unseen scenes encoded and decoded in float32: mean absolute error in grey levels, and what the judge reads."""
    rows = torch.tensor([place(case.spec, random.Random(case.seed)) for case in wanted], device=vae.device)
    images = render(rows)
    decoded = torch.cat([vae.decoder(vae.encoder(part * 2 - 1).chunk(2, dim=1)[0]) for part in images.split(64)])
    decoded = (decoded / 2 + 0.5).clamp(0, 1)
    pixels = (decoded * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    pictures = [Image.fromarray(picture) for picture in pixels]
    error = (decoded - images).abs().mean().item() * 255
    return {"grey_levels": round(error, 3), "read": score(pictures, wanted, workers)}


# --- stage 2: the text encoders -----------------------------------------------------------------------------------


def text_networks(pipeline: FluxPipeline) -> dict[str, nn.Module]:
    encoders = {name: getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2")}
    for encoder in encoders.values():
        encoder.set_attn_implementation("eager")  # the one that takes the masks of `fixed_inputs` as they are
    return encoders


def eligible(pool: Pool) -> dict[int, torch.Tensor]:
    """Text length -> the scenes to draw from at that length: those that need it and at least as many shorter."""
    found, shorter = {}, torch.zeros(0, dtype=torch.long)
    lengths = pool.lengths.cpu()
    for length in FLOW_BATCH:
        fits = torch.nonzero((lengths <= length) & (lengths > length // 2 if length > 64 else lengths > 0))[:, 0]
        keep = torch.randperm(len(shorter), generator=torch.Generator().manual_seed(length))[: max(len(fits), 65536)]
        found[length] = torch.cat([fits, shorter[keep]])
        shorter = torch.cat([shorter, fits])
    return {length: indices.to(pool.rows.device) for length, indices in found.items()}


@dataclass(frozen=True)
class FixedInputs:
    """What depends on the text length alone; made once, since that copies from the host, which a capture forbids."""

    positions: dict[str, torch.Tensor]  # txt_ids [L, 3], zero, and img_ids [64, 3]: row and column of each image token
    t5_mask: torch.Tensor  # [1, 1, 1, L], zero: FLUX lets padding be part of the text
    clip_mask: torch.Tensor  # [1, 1, 77, 77], causal

    @property
    def length(self) -> int:
        return len(self.positions["txt_ids"])


def fixed_inputs(length: int, device: torch.device, dtype: torch.dtype) -> FixedInputs:
    image = FluxPipeline._prepare_latent_image_ids(1, SIZE // 16, SIZE // 16, device, torch.float32)
    future = torch.ones(CLIP_LENGTH, CLIP_LENGTH, dtype=torch.bool).triu(1)
    causal = torch.zeros(1, 1, CLIP_LENGTH, CLIP_LENGTH, dtype=dtype).masked_fill(future, torch.finfo(dtype).min)
    return FixedInputs(
        {"txt_ids": torch.zeros(length, 3, device=device), "img_ids": image},
        torch.zeros(1, 1, 1, length, device=device, dtype=dtype),
        causal.to(device),
    )


def read_captions(
    networks: nn.ModuleDict, pool: Pool, pick: torch.Tensor, fixed: FixedInputs
) -> tuple[torch.Tensor, torch.Tensor]:
    """T5's tokens [B, L, 128] and CLIP's vector [B, 96] of the picked scenes' captions, padded to the fixed length."""
    length = fixed.length
    t5_ids = nn.functional.pad(pool.t5_ids[pick, :length].long(), (0, max(0, length - LONGEST)))
    txt = networks["text_encoder_2"](t5_ids, attention_mask=fixed.t5_mask)[0]
    vec = networks["text_encoder"](pool.clip_ids[pick].long(), attention_mask=fixed.clip_mask).pooler_output
    return txt, vec


def text_loss(networks: nn.ModuleDict, pool: Pool, among: torch.Tensor, batch: int, fixed: FixedInputs) -> torch.Tensor:
    """How badly the read-outs tell what the captions of randomly drawn scenes say, see reading.py."""
    pick = among[torch.randint(len(among), (batch,), device=among.device)]
    return reading_loss(networks, *read_captions(networks, pool, pick, fixed), pool.rows[pick])


@torch.no_grad()
def text_score(networks: nn.ModuleDict, unseen: Pool, length: int) -> dict[str, float]:
    """The share of unseen captions read right, of those that fit; CLIP's of those that fit in its own length, too."""
    fixed = fixed_inputs(length, unseen.rows.device, torch.float32)
    fits = torch.nonzero(unseen.lengths <= length)[:, 0]
    parts = [read_captions(networks, unseen, pick, fixed) for pick in fits.split(64)]
    txt, vec = (torch.cat(column) for column in zip(*parts, strict=True))
    # CLIP's start token comes on top of T5's tokens.
    return reading_score(networks, txt, vec, unseen.rows[fits], unseen.lengths[fits] < CLIP_LENGTH)


def lengths_of_steps(seed: int, start: int) -> Iterator[int]:
    """The text length of each step from `start` on, the same however often training is interrupted."""
    rng = random.Random(seed)
    draws = (rng.choices(list(FLOW_SHARE), list(FLOW_SHARE.values()))[0] for _ in count())
    return islice(draws, start, None)


# --- stage 3: the flow --------------------------------------------------------------------------------------------


def flow_networks(pipeline: FluxPipeline, fresh: bool, learn_text: bool) -> nn.ModuleDict:
    """The text encoders and the transformer; where `fresh`, its blocks start as the identity, their gates closed.

    The text encoders learn only if told to: through gates that have hardly opened their gradient is mostly noise, AdamW
    makes full steps of it, and what they could read is lost before the transformer begins to ask.
    """
    text = text_networks(pipeline)
    for encoder in text.values():
        encoder.requires_grad_(learn_text)
    closed = (".norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear")
    for name, module in pipeline.transformer.named_modules():
        if fresh and (name.endswith(closed) or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return nn.ModuleDict({**text, "transformer": pipeline.transformer})


def rotate(x: torch.Tensor, freqs: tuple[torch.Tensor, torch.Tensor], sequence_dim: int = 1) -> torch.Tensor:
    """diffusers' rotary embedding as one complex product: a third of the kernels, equal to rounding.

    x [B, S, heads, D]; freqs are cosines and sines [S, D], each value twice. Inductor fuses diffusers' own form.
    """
    if torch.compiler.is_compiling():
        return apply_rotary_emb(x, freqs, sequence_dim=sequence_dim)
    turn = torch.complex(freqs[0][:, ::2], freqs[1][:, ::2])[None, :, None]
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def once_a_length(embed: Callable[[torch.Tensor], tuple]) -> Callable[[torch.Tensor], tuple]:
    """`embed`, called only once for each number of tokens: training knows no other positions of that many."""
    known: dict[int, tuple] = {}

    def remembered(ids: torch.Tensor) -> tuple:
        if len(ids) not in known:
            known[len(ids)] = embed(ids)
        return known[len(ids)]

    return remembered


def flow_loss(
    networks: nn.ModuleDict,
    pool: Pool,
    latents: torch.Tensor,
    among: torch.Tensor,
    batch: int,
    fixed: FixedInputs,
    attention: SDPBackend,
) -> torch.Tensor:
    """Mean squared error of the velocity `noise - latents` at random times, captions padded to the fixed length.

    Where the networks are compiled, that counts for the shortest length, which most steps have: each more takes as
    long to compile as it saves.
    """
    device, length = latents.device, fixed.length
    pick = among[torch.randint(len(among), (batch,), device=device)]
    clean = latents[pick].float()
    noise = torch.randn_like(clean)
    # Times spread evenly within the batch before they are shifted: less variance than chance.
    even = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
    time = TIME_SHIFT * even / (1 + (TIME_SHIFT - 1) * even)
    guidance = torch.empty(batch, device=device).uniform_(*GUIDANCE)
    dtype = networks["transformer"].dtype
    stance = "default" if length == min(FLOW_BATCH) else "force_eager"
    with torch.compiler.set_stance(stance), sdpa_kernel(attention):
        txt, vec = read_captions(networks, pool, pick, fixed)
        velocity = networks["transformer"](
            hidden_states=torch.lerp(clean, noise, time[:, None, None]).to(dtype),
            timestep=time,
            guidance=guidance,
            pooled_projections=vec,
            encoder_hidden_states=txt,
            return_dict=False,
            **fixed.positions,
        )[0]
    return (velocity.float() - (noise - clean)).square().mean()


# --- the run ------------------------------------------------------------------------------------------------------


class Run:
    """One training run in a directory: the pipeline as it is so far, its checkpoint and its log."""

    def __init__(self, arguments: argparse.Namespace, workers: ProcessPoolExecutor | None):
        self.arguments, self.workers = arguments, workers
        self.device = torch.device(arguments.device)
        self.out: Path = arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.out / "train.jsonl")
        self.checkpoint = self.out / "checkpoint.pt"
        self.pipeline = build(self.out / "pipeline", arguments.seed)
        self.saved = None
        if arguments.resume and self.checkpoint.exists():
            self.saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if arguments.init:
            trained = FluxPipeline.from_pretrained(arguments.init, torch_dtype=torch.float32)
            self.pipeline.register_modules(
                vae=trained.vae,
                text_encoder=trained.text_encoder,
                text_encoder_2=trained.text_encoder_2,
                transformer=trained.transformer,
            )
        if arguments.vae:
            self.use_vae(arguments.vae)
        if arguments.text:
            self.use_text(arguments.text)
        pool = build_pool(self.out / "pipeline", arguments.scenes, arguments.seed, workers)
        self.log(pool=arguments.scenes, mean_tokens=pool.lengths.float().mean().item())
        self.pool = pool.to(self.device)
        self.deadline = self.log.start + arguments.seconds

    def use_vae(self, directory: Path) -> None:
        self.pipeline.register_modules(vae=AutoencoderKL.from_pretrained(directory))

    def use_text(self, directory: Path) -> None:
        self.pipeline.register_modules(
            text_encoder=CLIPTextModel.from_pretrained(directory / "text_encoder", dtype=torch.float32),
            text_encoder_2=T5EncoderModel.from_pretrained(directory / "text_encoder_2", dtype=torch.float32),
        )

    def stages(self) -> list[str]:
        """The stages still to do, in order."""
        stages = self.arguments.stages.split(",")
        while self.saved and self.saved["stage"] in stages[1:]:
            done = stages.pop(0)
            if done == "vae":
                self.use_vae(self.out / "pipeline" / "vae")
            elif done == "text":
                self.use_text(self.out / "pipeline")
        return stages

    def resume(self, trainer: Trainer, stage: str) -> None:
        if self.saved and self.saved["stage"] == stage:
            trainer.load(self.saved)
            self.saved = None
            self.log(stage=stage, resumed=trainer.done)

    def keep(self, trainer: Trainer, stage: str) -> None:
        """Write the checkpoint and the average; the checkpoint replaces its predecessor at once."""
        unfinished = self.checkpoint.with_suffix(".part")
        torch.save({"stage": stage, **trainer.state()}, unfinished)
        unfinished.replace(self.checkpoint)
        for name in trainer.average.keys() & self.pipeline.components:  # read-outs are no part of it
            self.pipeline.register_modules(**{name: trainer.average[name]})
        save(copy.deepcopy(self.pipeline).to("cpu"), self.out / "pipeline")

    def train(
        self, trainer: Trainer, stage: str, next_step: Callable[[], torch.Tensor], evaluate: Callable[[], dict]
    ) -> None:
        """Steps until the stage is done or the time is up; log, evaluate and keep now and then.

        With --fit, the pace so far decides again and again how many steps there will be, and the log says so.
        """
        arguments = self.arguments
        total, since = torch.zeros((), device=self.device), 0
        begun = logged = kept = time.monotonic()
        before = trainer.done
        while trainer.done < trainer.steps and time.monotonic() < self.deadline:
            trainer.schedule()
            total += next_step()
            trainer.done += 1
            since += 1
            if trainer.done % arguments.log_every == 0 or trainer.done == trainer.steps:
                loss = total.item() / since
                if not math.isfinite(loss):  # what was kept last is still good
                    raise SystemExit(f"the loss of {stage} is {loss} at step {trainer.done}; try a lower rate")
                now = time.monotonic()
                if arguments.fit:
                    pace = (trainer.done - before) / (now - begun)  # evaluations included
                    left = max(0.0, self.deadline - FINAL_SECONDS - now)
                    trainer.steps = trainer.done + int(pace * left)
                pace = round(since / (now - logged), 1)
                self.log(stage=stage, step=trainer.done, of=trainer.steps, loss=round(loss, 5), steps_per_second=pace)
                total.zero_()
                since, logged = 0, now
                if now - kept > arguments.keep_seconds and trainer.done < trainer.steps:
                    self.log(stage=stage, step=trainer.done, **evaluate())
                    self.keep(trainer, stage)
                    logged = kept = time.monotonic()
        self.log(stage=stage, step=trainer.done, finished=trainer.done == trainer.steps, **evaluate())
        self.keep(trainer, stage)

    def vae_stage(self) -> None:
        arguments = self.arguments
        torch.manual_seed(arguments.seed + 1)
        networks = nn.ModuleDict({"vae": self.pipeline.vae})
        trainer = Trainer(networks, arguments.vae_steps, arguments.vae_rate, self.device, arguments.capture)
        self.resume(trainer, "vae")
        average: AutoencoderKL = trainer.average["vae"]
        step = trainer.stepper(lambda: vae_loss(trainer.networks["vae"], self.pool.rows, arguments.vae_batch))

        def evaluate() -> dict:
            normalize(average, self.pool.rows)
            measured = {"shift": average.config.shift_factor, "scale": average.config.scaling_factor}
            if arguments.cases:
                measured |= reconstruction(average, cases("mixed", arguments.cases), self.workers)
            return measured

        self.train(trainer, "vae", step, evaluate)
        self.use_vae(self.out / "pipeline" / "vae")  # rounded as it ships, so that the flow learns its very latents

    def text_stage(self) -> None:
        arguments = self.arguments
        torch.manual_seed(arguments.seed + 3)
        networks = nn.ModuleDict({**text_networks(self.pipeline), **readers(TEXT_WIDTH, POOLED_WIDTH)})
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        trainer = Trainer(networks, arguments.text_steps, arguments.text_rate, self.device, arguments.capture, dtype)
        self.resume(trainer, "text")
        trainer.schedule()
        steppers = {}
        for length, among in eligible(self.pool).items():
            batch = max(1, arguments.text_batch * FLOW_BATCH[length] // FLOW_BATCH[64])
            fixed = fixed_inputs(length, self.device, dtype)
            steppers[length] = trainer.stepper(partial(text_loss, trainer.networks, self.pool, among, batch, fixed))
        lengths = lengths_of_steps(arguments.seed, trainer.done)

        def evaluate() -> dict:
            if not arguments.cases:
                return {}
            unseen = build_pool(self.out / "pipeline", 4 * arguments.cases, 0, self.workers, held_out=True)
            unseen = unseen.to(self.device)
            return {f"read_{length}": text_score(trainer.average, unseen, length) for length in (64, LONGEST)}

        self.train(trainer, "text", lambda: steppers[next(lengths)](), evaluate)
        self.use_text(self.out / "pipeline")  # rounded, as a resumed run finds them

    def flow_stage(self) -> None:
        arguments = self.arguments
        vae = self.pipeline.vae.to(self.device).requires_grad_(False).eval()
        latents = (encode(vae, self.pool.rows) - vae.config.shift_factor) * vae.config.scaling_factor
        self.log(stage="flow", latents=list(latents.shape), deviation=round(latents[:4096].float().std().item(), 3))
        torch.manual_seed(arguments.seed + 2)
        networks = flow_networks(self.pipeline, fresh=not arguments.init, learn_text=arguments.learn_text)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32  # CPUs are slow in bfloat16
        trainer = Trainer(networks, arguments.flow_steps, arguments.flow_rate, self.device, arguments.capture, dtype)
        self.resume(trainer, "flow")
        trained = trainer.networks["transformer"]
        trained.pos_embed.forward = once_a_length(trained.pos_embed.forward)
        transformer_flux.apply_rotary_emb = rotate
        if arguments.compile:
            trained.compile_repeated_blocks()  # each kind once
            for encoder in ("text_encoder", "text_encoder_2"):
                trainer.networks[encoder].compile()
        attention = SDPBackend.__members__[arguments.attention.upper()]
        trainer.schedule()
        steppers = {}
        for length, among in eligible(self.pool).items():
            batch = max(1, int(FLOW_BATCH[length] * arguments.flow_scale))
            fixed = fixed_inputs(length, self.device, dtype)
            loss_of = partial(flow_loss, trainer.networks, self.pool, latents, among, batch, fixed, attention)
            steppers[length] = trainer.stepper(loss_of)
            captured = trainer.pool is not None
            self.log(stage="flow", text_length=length, captured=captured, batch=batch, scenes=len(among))
        lengths = lengths_of_steps(arguments.seed, trainer.done)
        self.pipeline.register_modules(**dict(trainer.average.items()))
        for network in (vae, *trainer.average.values()):
            network.to(self.device)

        def evaluate(kinds: tuple[str, ...] = KINDS, text_length: int | None = None) -> dict:
            scores = {}
            for kind in kinds if arguments.cases else ():
                wanted = cases(kind, arguments.cases)
                pictures = draw(self.pipeline, wanted, text_length, batch=256)
                scores[kind] = score(pictures, wanted, self.workers)
                contact_sheet(pictures[:64]).save(self.out / f"{kind}.png")
            return scores

        self.train(trainer, "flow", lambda: steppers[next(lengths)](), evaluate)
        for length in FLOW_BATCH if arguments.final_lengths else ():
            self.log(stage="flow", text_length=length, **evaluate(("single", "pair"), length))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    cuda = torch.cuda.device_count() > 0
    parser.add_argument("--out", type=Path, required=True, help="directory of the run and, below it, of the pipeline")
    parser.add_argument("--stages", default="vae,text,flow")
    parser.add_argument("--init", type=Path, help="start from this trained pipeline, with a fresh optimizer")
    parser.add_argument("--vae", type=Path, help="start from this trained VAE (a diffusers directory)")
    parser.add_argument("--text", type=Path, help="start from the trained text encoders of this pipeline")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=500_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--vae-batch", type=int, default=VAE_BATCH)
    parser.add_argument("--vae-rate", type=float, default=2e-3)
    parser.add_argument("--text-steps", type=int, default=4000)
    parser.add_argument("--text-batch", type=int, default=256, help="captions a step at the shortest text length")
    parser.add_argument("--text-rate", type=float, default=1e-3)
    parser.add_argument("--flow-steps", type=int, default=30_000)
    parser.add_argument("--flow-scale", type=float, default=1.0, help="multiplies the scenes of a step")
    parser.add_argument("--flow-rate", type=float, default=1.5e-3)
    parser.add_argument("--learn-text", action="store_true", help="the flow trains the text encoders, too")
    parser.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True, help="use CUDA graphs")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="use torch.compile")
    parser.add_argument(
        "--attention",
        default="flash_attention" if cuda else "math",
        help="which scaled_dot_product_attention of torch.nn.attention.SDPBackend trains",
    )
    parser.add_argument("--fit", action="store_true", help="choose each stage's steps so as to end by --seconds")
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--keep-seconds", type=float, default=120, help="evaluate and write after this long")
    parser.add_argument("--cases", type=int, default=256, help="unseen prompts of each kind in an evaluation, or 0")
    parser.add_argument("--final-lengths", action="store_true", help="evaluate at every text length at the end")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop and keep what there is after this long")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    quiet()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    workers = None
    if arguments.workers > 1:  # forked before CUDA starts
        workers = ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("fork"))
        list(workers.map(abs, range(64)))
    run = Run(arguments, workers)
    for stage in run.stages():
        {"vae": run.vae_stage, "text": run.text_stage, "flow": run.flow_stage}[stage]()


if __name__ == "__main__":
    main()
