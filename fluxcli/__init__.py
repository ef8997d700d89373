"""fluxcli: prompts in, FLUX.1 images and timing manifests out.

    import fluxcli

    model = fluxcli.load("tiny")
    images = model.generate("a red circle", seed=7, n=2)  # two PIL images

    job = fluxcli.Job("prompts.jsonl", "out", model="tiny", steps=8)
    totals = job.run()  # resumes what is there; {"images": …, "failures": …, "exit_status": 0}

What fails for a reason that a user can mend raises a `FluxcliError`, whose message says what to do. Importing this
package imports nothing else: the libraries come with the first `load` or `run`.
"""

import importlib

TYPE_CHECKING = False  # as typing has it, which is slow to import, and signals are not caught before this is
if TYPE_CHECKING:
    from typing import Any

    from fluxcli.api import FluxcliError, Job, Model, load

__version__ = "0.1.0"
__all__ = ["FluxcliError", "Job", "Model", "__version__", "load"]


def __getattr__(name: str) -> "Any":
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("fluxcli.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
