"""What a device can raise, sorted into what a smaller batch may cure and what nothing will."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fluxcli.core.errors import DeviceError, OutOfMemory, first_line
from fluxcli.core.records import ShapeKey


@contextmanager
def device_faults(key: ShapeKey) -> Iterator[None]:
    """Turns what the device raises while `key` runs into an error for the user.

    Raises:
        OutOfMemory: a smaller batch may fit.
        DeviceError: the device itself failed.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise OutOfMemory(_no_memory("device", key)) from error
    except torch.AcceleratorError as error:
        reason = first_line(error)
        raise DeviceError(
            f"the device failed at {key}: {reason}. Nothing committed is lost; run again to go on"
        ) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # how torch says it on a CPU
            raise OutOfMemory(_no_memory("machine", key)) from error
        raise


def _no_memory(where: str, key: ShapeKey) -> str:
    advice = "a smaller --batch-size needs less" if key.batch_size > 1 else "smaller images need less"
    return f"the {where} has no memory for {key}; {advice}"
