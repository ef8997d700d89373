"""Messages between a job and a process that it started: JSON objects, each with its length before it, over a socket
pair."""

import contextlib
import json
import socket
import struct
from typing import Any

Message = dict[str, Any]

LONGEST = 2**28  # bytes: a batch of the longest prompts, and some
_HEAD = struct.Struct(">I")
_PART = 2**16
_TEXT = 500  # characters of a text that are kept


class Garbage(Exception):
    """What came is no message, or not one that can be meant."""


class Wire:
    """One end. On a socket that blocks, `send` and `receive` wait; on one that does not, neither does."""

    def __init__(self, end: socket.socket, longest: int = LONGEST) -> None:
        self._end, self._longest = end, longest
        self._in, self._out = bytearray(), bytearray()

    def fileno(self) -> int:
        return self._end.fileno()

    @property
    def unsent(self) -> bool:
        return bool(self._out)

    def send(self, message: Message) -> None:
        text = json.dumps(message, separators=(",", ":")).encode()
        self._out += _HEAD.pack(len(text)) + text
        self.flush()

    def flush(self) -> None:
        """Sends what waits. The other end's death is no error here: `receive` tells."""
        try:
            while self._out:
                del self._out[: self._end.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self._out.clear()

    def receive(self) -> list[Message]:
        """The messages that are here in whole, after reading once.

        Raises:
            EOFError: the other end is closed, and everything it sent was received.
            Garbage: it sent something else.
        """
        try:
            part = self._end.recv(_PART)
        except BlockingIOError:
            return []
        except OSError as error:
            raise EOFError from error
        if not part:
            raise EOFError
        self._in += part
        messages = []
        start = 0
        while len(self._in) - start >= _HEAD.size:
            (length,) = _HEAD.unpack_from(self._in, start)
            if length > self._longest:
                raise Garbage(f"a message of {length} bytes")
            end = start + _HEAD.size + length
            if len(self._in) < end:
                break
            messages.append(message_of(bytes(self._in[start + _HEAD.size : end])))
            start = end
        del self._in[:start]
        return messages

    def hang_up(self) -> None:
        """Says that nothing more will be sent."""
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._end.close()


def message_of(data: bytes) -> Message:
    """A message from its JSON.

    Raises:
        Garbage: it is none.
    """
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Garbage("no JSON") from error
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise Garbage("no message")
    return message


# Values of a message, each what it must be; ValueError where it is not.


def whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"no whole number: {value!r}"[:100])
    return value


def seconds(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise ValueError(f"no time: {value!r}"[:100])
    return float(value)


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"no text: {value!r}"[:100])
    return value[:_TEXT]


def one_of(value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"none of {', '.join(known)}")
    return str(value)
