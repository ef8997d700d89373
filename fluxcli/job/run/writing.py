"""Images from pixels to synced temporary files, by several threads: the half of saving that needs the pixels."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from fluxcli.core.config import ImageFormat
from fluxcli.core.errors import FluxcliError, first_line
from fluxcli.core.records import Batch, Failure, Images, PromptRecord
from fluxcli.job.output import images
from fluxcli.job.output.sink import Written

Place = TypeVar("Place")  # what `write` knows an image's place by


@dataclass(frozen=True, slots=True)
class Saved:
    """An image in its temporary file, the seconds that took, and whether its comment holds the whole prompt."""

    image: Written
    seconds: float
    comment_truncated: bool


Saving = Callable[[], "list[Saved | Failure]"]  # waits for a batch's images, in its order


class Writer(Generic[Place]):
    """Encodes and writes batches.

    Args:
        model: its name in the images.
        write: puts an image's bytes on disk for sure, beside its place. A FluxcliError of it ends the run; anything
            else that goes wrong with one image costs that image alone.
    """

    def __init__(self, format: ImageFormat, model: str, write: Callable[[Place, bytes], Written], threads: int) -> None:
        self._format, self._model, self._write = format, model, write
        self._threads = ThreadPoolExecutor(threads, "encode")

    def start(self, batch: Batch, result: Images, places: Sequence[Place]) -> Saving:
        """Queues a batch's images."""
        saving: list[Future[Saved | Failure]] = [
            self._threads.submit(self._save, record, result, slot, places[slot])
            for slot, record in enumerate(batch.records)
        ]
        return lambda: [future.result() for future in saving]

    def close(self) -> None:
        """Waits for what was queued."""
        self._threads.shutdown()

    def _save(self, record: PromptRecord, result: Images, slot: int, place: Place) -> Saved | Failure:
        if not result.finite[slot]:
            return Failure.of(record, "non_finite", "the model's output is not finite for this row")
        start = time.perf_counter()
        try:
            data = images.encode(result.pixels[slot], self._format, record, self._model)
            written = self._write(place, data)
        except FluxcliError:
            raise
        except Exception as error:
            return Failure.of(record, "encode_error", first_line(error))
        seconds = time.perf_counter() - start
        return Saved(written, seconds, images.comment_truncated(self._format, record, self._model))
