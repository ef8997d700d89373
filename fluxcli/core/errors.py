"""Every error a user can cause, as one tree; the command line turns each into one or two lines and an exit code.

FluxcliError            exit 1: nothing more could be done
├── UsageError          exit 2: an option that cannot be meant
├── ModelError          the model cannot be found or its files are not what they should be
├── DeviceError         the device, dtype or attention asked for is not there
├── CacheError          a compile cache that cannot be carried from here or to here
├── InputError          the input file cannot be read, or a bad row under --strict
├── JobError            the output directory: another job's, somebody else's, or not writable
└── OutOfMemory         a batch that does not fit the device; the runner tries smaller ones
RowError                one bad input row: becomes a line in failures.jsonl, never an exit

Remark                  a warning: nothing fails of it, but the user should know
"""


class FluxcliError(Exception):
    """Base of all. The message is what the user reads: it names the file, row or option, and what to do."""

    exit_code = 1


class UsageError(FluxcliError):
    exit_code = 2


class ModelError(FluxcliError):
    pass


class DeviceError(FluxcliError):
    pass


class CacheError(FluxcliError):
    pass


class InputError(FluxcliError):
    pass


class JobError(FluxcliError):
    pass


class OutOfMemory(FluxcliError):
    pass


class RowError(Exception):
    """A row that cannot become an image.

    Args:
        message: what is wrong with it, for `error.message`.
        kind: `error.type` of the failure row.
        id: the row's id, where it has a valid one.
    """

    def __init__(self, message: str, *, kind: str = "invalid_row", id: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.id = id


class Remark(UserWarning):
    """The message is what the user reads, once."""


def first_line(error: BaseException) -> str:
    """What another library's error says, for a message of ours: its first line, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
