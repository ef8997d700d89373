"""How long a new process takes to be ready for given shapes: with an empty cache, and with what that one left in it."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from fluxcli.core.config import EngineConfig
from fluxcli.core.records import ShapeKey
from fluxcli.models.checkpoints import Checkpoint


def starts(checkpoint: Checkpoint, config: EngineConfig, keys: Sequence[ShapeKey]) -> dict[str, dict[str, Any]]:
    """`cold` and `cached`: each a process of its own that loads the model and warms every shape up, largest first.

    `seconds` is all of it from the process's first line on, `load_s` importing and loading, `shapes` each shape's own
    seconds and what it found in the cache.
    """
    with tempfile.TemporaryDirectory(prefix="fluxcli-bench-") as cache:
        return {name: _in_new_process(cache, checkpoint, config, keys) for name in ("cold", "cached")}


def _in_new_process(
    cache: str, checkpoint: Checkpoint, config: EngineConfig, keys: Sequence[ShapeKey]
) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_start, cache, checkpoint, config, keys).result()


def _start(cache: str, checkpoint: Checkpoint, config: EngineConfig, keys: Sequence[ShapeKey]) -> dict[str, Any]:
    os.environ["FLUXCLI_CACHE"] = cache
    start = time.perf_counter()
    from fluxcli.engine.engine import Engine

    engine = Engine(checkpoint, config, keys)
    load_s = time.perf_counter() - start
    shapes = engine.warm_up(sorted(keys, key=ShapeKey.tokens, reverse=True))
    return {
        "seconds": time.perf_counter() - start,
        "load_s": load_s,
        "shapes": [{**one.key.told(), "seconds": one.seconds, "state": one.state} for one in shapes],
    }
