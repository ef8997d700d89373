"""One run of `fluxcli bench`: what is measured at every shape, as one dictionary that says all of it."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from fluxcli.bench import cold, floor, peers
from fluxcli.bench.inputs import Inputs
from fluxcli.bench.machine import clocks, machine
from fluxcli.bench.parity import STEPS as PARITY_STEPS
from fluxcli.bench.parity import parity
from fluxcli.core.config import EngineConfig
from fluxcli.core.errors import FluxcliError, first_line
from fluxcli.core.records import Batch, Images, PromptRecord, ShapeKey
from fluxcli.core.step_cache import OFF, StepCache
from fluxcli.engine.engine import Engine
from fluxcli.engine.flight import InFlight
from fluxcli.engine.nets.flux1 import Flux
from fluxcli.engine.runtime import stopwatch
from fluxcli.models.checkpoints import Checkpoint

OURS = "fluxcli"
_PRODUCTS, _ATTENTION, _REUSED = "products", "attention", "reused"

_SIGMA, _DT = 0.9, -0.03  # of the step that is timed; any would do
_TURN_S = 0.3
_GPU_TURN_S = 1.0  # a GPU's clock takes long to settle: turns of 0.3 s differed by 4 % on an H200
_JOB_S = 10.0  # how long the batches of one shape may take together, where more than one fit into it
_MOST_BATCHES = 4
_SAVED = 4  # images of a batch that are encoded to time it
_PROMPT = "picture {} of a lighthouse on a cliff above the sea, seen from a boat"

Save = Callable[[Any, PromptRecord], object]  # pixels [H, W, 3] of a record -> an image file's bytes
Say = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """The settings of a run: shapes, the steps and guidance of an image, and what else to measure: a name of `PEERS`,
    and starts with a cold cache."""

    checkpoint: Checkpoint
    engine: EngineConfig
    keys: Sequence[ShapeKey]
    steps: int
    guidance: float | None
    step_cache: StepCache = OFF
    vs: str | None = None
    cold_start: bool = False

    def run(
        self, make_engine: Callable[[Sequence[ShapeKey]], Engine], save: Save, say: Say
    ) -> tuple[int, dict[str, Any]]:
        """Measures everything. Returns the exit code and the result: 1 where a shape or a peer could not be measured,
        which then carries an `error`.

        Raises:
            FluxcliError: nothing can be measured.
        """
        peers.check(self.vs, self.engine)
        keys = sorted(set(self.keys), key=ShapeKey.tokens)
        start = time.perf_counter()
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        starts = self._starts(keys, say)
        begin = time.perf_counter()
        engine = make_engine(keys)
        result: dict[str, Any] = {
            "date": date,
            "model": self.checkpoint.name,
            **machine(self.engine),
            "steps": self.steps,
            **({"step_cache": str(self.step_cache), "mask": self._mask} if self.step_cache.on else {}),
            "rounds": stopwatch.ROUNDS,
            "load_s": time.perf_counter() - begin,
            "cold_start": starts,
            "clocks": {"before": clocks(self.engine)},
        }
        with torch.inference_mode():
            plain = peers.plain(engine, self.checkpoint) if self.vs else engine.flux
            contestants = {
                name: peer(plain, self.checkpoint.transformer)
                for name, peer in peers.PEERS.get(self.vs or "", {}).items()
            }
            result["shapes"] = [self._shape(engine, key, contestants, starts, save, say) for key in keys]
            result["clocks"]["after"] = clocks(self.engine)
            result["parity"] = self._parity(engine, plain, contestants, keys[0], say) if self.vs else None
        result["seconds"] = time.perf_counter() - start
        return int(any(errors(result))), result

    def _starts(self, keys: Sequence[ShapeKey], say: Say) -> dict[str, Any] | None:
        if not self.cold_start:
            return None
        say("starting two new processes, with an empty cache and with what the first left in it")
        try:
            return cold.starts(self.checkpoint, self.engine, keys)
        except (FluxcliError, BrokenProcessPool) as error:
            return {"error": first_line(error)}

    def _parity(
        self, engine: Engine, plain: Flux, contestants: Mapping[str, peers.Diffusers], smallest: ShapeKey, say: Say
    ) -> dict[str, Any]:
        key = smallest._replace(batch_size=1)
        say(f"{key}: parity")
        eight = {name: peer for name, peer in contestants.items() if isinstance(peer, peers.Torchao)}
        # Rounding to 8 bits adds up over all steps of an image; elsewhere a few show that the same is computed.
        steps = self.steps if eight or engine.config.fp8 else PARITY_STEPS
        try:
            return parity(engine, plain, self.checkpoint.transformer, key, steps, eight)
        except (FluxcliError, torch.OutOfMemoryError) as error:
            return {**key.told(), "error": first_line(error)}

    def _shape(
        self,
        engine: Engine,
        key: ShapeKey,
        contestants: Mapping[str, peers.Diffusers],
        starts: Mapping[str, Any] | None,
        save: Save,
        say: Say,
    ) -> dict[str, Any]:
        row: dict[str, Any] = key.told()
        say(f"{key}: measuring")
        try:
            row |= self._images(engine, key, save)
            row["warm_up"] |= _start_seconds(key, starts)
            row |= self._step(engine, key, contestants)
        except (FluxcliError, torch.OutOfMemoryError) as error:
            row["error"] = first_line(error)
        if engine.config.device.startswith("cuda"):
            torch.cuda.empty_cache()  # the peers' memory, before the next shape needs it
        return row

    def _images(self, engine: Engine, key: ShapeKey, save: Save) -> dict[str, Any]:
        """Warming up and whole images, one batch queued behind the other as a job does it, and their peak of memory."""
        cuda = engine.config.device.startswith("cuda")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        (warm,) = engine.warm_up([key])
        one_step = engine.submit(self._batch(key, _MOST_BATCHES, "1")).result()
        more = self.step_cache.cost(self.steps) - 1
        whole = key.batch_size * (one_step.timing.as_row()["total_s"] + more * one_step.timing.denoise_s)
        count = max(1, min(_MOST_BATCHES, int(_JOB_S / whole)))
        done: list[Images] = []
        waiting: InFlight | None = None
        start = time.perf_counter()
        for number in range(count):
            submitted = engine.submit(self._batch(key, number, self._mask))
            if waiting:
                done.append(waiting.result())
            waiting = submitted
        assert waiting
        done.append(waiting.result())
        seconds = time.perf_counter() - start
        images = count * key.batch_size
        timings = [result.timing for result in done]
        records = self._batch(key, count - 1, self._mask).records
        return {
            "attention": warm.attention,
            "warm_up": {"seconds": warm.seconds, "state": warm.state},
            "images_per_s": images / seconds,
            "job": {"batches": count, "images": images, "seconds": seconds},
            "components": {
                "encode_s": median(timing.encode_s for timing in timings),
                "denoise_s": median(timing.denoise_s for timing in timings),
                "decode_s": median(timing.decode_s for timing in timings),
                "save_s": _save_s(done[-1], records, save),
            },
            "peak_memory": torch.cuda.max_memory_allocated() if cuda else None,
        }

    def _step(self, engine: Engine, key: ShapeKey, contestants: Mapping[str, peers.Diffusers]) -> dict[str, Any]:
        """One denoising step: ours, one that a step cache reuses, the floor's two parts and every peer's, by turns.

        Ours is what the loop repeats; what is done once for all steps of a batch counts in `components`.
        """
        config, device, dtype = engine.flux.config, engine.config.device, engine.config.dtype
        inputs = Inputs(engine.flux, key, device, dtype)
        txt, steps = inputs.ours(engine.flux, [_SIGMA, _SIGMA + _DT])
        attention_ms = floor.attention_ms(config, key, device, dtype)
        fastest = min(attention_ms, key=lambda name: attention_ms[name]) if attention_ms else "sdpa"
        runs: dict[str, stopwatch.Run] = {
            OURS: lambda: engine.denoise(key, inputs.img, txt, steps),
            _PRODUCTS: floor.products_run(config, key, device, dtype, engine.config.fp8),
            _ATTENTION: floor.attention_run(config, key, device, dtype, fastest),
        }
        if self.step_cache.on:
            (moment,) = steps
            reused = [moment._replace(ahead=torch.tensor(0.5, device=device))]
            runs[_REUSED] = lambda: engine.denoise(key, inputs.img, txt, reused)
        measured: dict[str, dict[str, Any]] = {}
        for name, peer in contestants.items():
            try:
                measured[name] = {"attention": peer.attend(attention_ms)}
                run = peer.step(inputs, _SIGMA, torch.tensor(_DT, device=device))
                run()
                runs[name] = run
            except (torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException) as error:
                measured[name] = {"error": first_line(error)}
        times = stopwatch.interleaved(runs, device, _GPU_TURN_S if device.startswith("cuda") else _TURN_S)
        ms = {name: stopwatch.milliseconds(each) for name, each in times.items()}
        floor_ms = ms[_PRODUCTS] + ms[_ATTENTION]
        for name in contestants:
            if name in ms:
                measured[name] |= {"ms_per_step": ms[name], "ms_per_image_step": ms[name] / key.batch_size}
        return {
            "ms_per_step": ms[OURS],
            "ms_per_image_step": ms[OURS] / key.batch_size,
            "tflops": floor.flops(config, key) / ms[OURS] / 1e9,
            **({"reused": {"ms": ms[_REUSED], "share": ms[_REUSED] / ms[OURS]}} if _REUSED in ms else {}),
            "floor": {
                "ms": floor_ms,
                "products_ms": ms[_PRODUCTS],
                "attention_ms": ms[_ATTENTION],
                "attention": fastest,
            },
            "percent_of_floor": 100 * floor_ms / ms[OURS],
            "peers": measured,
            "ratio": {name: ms[OURS] / ms[name] for name in contestants if name in ms},
            "rounds_s": times,
        }

    @property
    def _mask(self) -> str:
        return self.step_cache.mask(self.steps) or "1" * self.steps

    def _batch(self, key: ShapeKey, number: int, mask: str) -> Batch:
        """Images of one job; the engine remembers prompts, so that each is one that it has not seen."""
        records, steps = [], len(mask)
        for slot in range(key.batch_size):
            id = f"{'x'.join(map(str, key))}-{number}-{slot}"
            records.append(
                PromptRecord(
                    id, _PROMPT.format(id), number * key.batch_size + slot, key.width, key.height, steps, self.guidance,
                    line=slot + 1, text_length=key.text_length,
                )
            )  # fmt: skip
        return Batch(number, key, steps, records, mask)


def errors(result: Mapping[str, Any]) -> list[str]:
    """What could not be measured, a line each."""
    found = []
    for row in result["shapes"]:
        name = str(ShapeKey.of(row))
        if "error" in row:
            found.append(f"{name}: {row['error']}")
        found += [f"{name}, {peer}: {each['error']}" for peer, each in row.get("peers", {}).items() if "error" in each]
    found += [
        f"{part}: {result[part]['error']}" for part in ("cold_start", "parity") if "error" in (result[part] or {})
    ]
    return found


def _start_seconds(key: ShapeKey, starts: Mapping[str, Any] | None) -> dict[str, float | None]:
    found: dict[str, float | None] = {"cold_s": None, "cached_s": None}
    if starts and "error" not in starts:
        for kind, start in starts.items():
            own = [shape for shape in start["shapes"] if key.told().items() <= shape.items()]
            found[f"{kind}_s"] = own[0]["seconds"]
    return found


def _save_s(result: Images, records: Sequence[PromptRecord], save: Save) -> float:
    """Seconds an image takes to become a file's bytes on one thread of the host."""
    times = []
    for pixels, record in list(zip(result.pixels, records, strict=True))[:_SAVED]:
        start = time.perf_counter()
        save(pixels, record)
        times.append(time.perf_counter() - start)
    return median(times)
