"""Messages arrive whole and in order however they are cut up, and what is no message is told."""

import json
import socket
from collections.abc import Iterator

import pytest

from fluxcli.job.fleet.wire import Garbage, Wire


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Wire]]:
    theirs, ours = socket.socketpair()
    ours.setblocking(False)
    with theirs, ours:
        yield theirs, Wire(ours, 1000)


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def test_messages_cut_anywhere_arrive_whole(ends) -> None:
    theirs, wire = ends
    sent = [{"kind": "one", "text": "\N{GRINNING FACE}\n"}, {"kind": "two"}, {"kind": "three", "seed": 2**64 - 1}]
    received = []
    for byte in b"".join(framed(json.dumps(message).encode()) for message in sent):
        theirs.send(bytes([byte]))
        received += wire.receive()
    assert received == sent
    assert wire.receive() == []


def test_an_end_that_does_not_read_blocks_nobody() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    wire, reader = Wire(ours), Wire(theirs)
    for number in range(50):
        wire.send({"kind": "lease", "number": number, "text": "x" * 50_000})
    assert wire.unsent
    received = []
    while len(received) < 50:
        wire.flush()
        received += reader.receive()
    assert [message["number"] for message in received] == [*range(50)]
    assert not wire.unsent


@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff\xff", framed(b"hello"), framed(b"[]"), framed(b"{}"), framed(b'{"kind": 1}'), framed(b"[" * 900)],
)
def test_what_is_no_message_is_told(data: bytes, ends) -> None:
    theirs, wire = ends
    theirs.send(data)
    with pytest.raises(Garbage):
        wire.receive()


def test_what_was_sent_before_the_end_is_received_before_it(ends) -> None:
    theirs, wire = ends
    theirs.send(framed(b'{"kind":"last"}') + b"\x00\x00")
    theirs.close()
    assert wire.receive() == [{"kind": "last"}]
    with pytest.raises(EOFError):
        wire.receive()
    wire.send({"kind": "lost"})  # and nothing happens
