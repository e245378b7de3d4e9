"""The wire format in which a sandbox's output travels: runner -> dispatcher or monitor -> storage.

A frame is a 13-byte header (kind: 1 byte, milliseconds since the run began: 8 bytes, payload length: 4 bytes; big endian) and
its payload. Frames of one run arrive in the order in which the runner read them, so that two streams stay apart and in order.
`crucible.runner` writes the same format with the standard library alone; a test holds the two together.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

HEADER = struct.Struct(">BQI")
# The runner reads at most this much at once; anything larger in a header is not ours.
MAX_PAYLOAD = 1024 * 1024


class Kind(IntEnum):
    """What a frame carries."""

    STDOUT = 1
    STDERR = 2
    STARTED = 3
    REPORT = 4


@dataclass(frozen=True, slots=True)
class Frame:
    """One piece of output, or a message of the runner. `at_ms` counts from the start of the run."""

    kind: Kind
    at_ms: int
    payload: bytes

    def encode(self) -> bytes:
        """Return header and payload as they travel."""
        return HEADER.pack(self.kind, self.at_ms, len(self.payload)) + self.payload


class FrameError(ValueError):
    """Bytes that are not frames: the peer is not a runner, or it broke off and went on."""


class Decoder:
    """Cuts a byte stream into frames; keeps what is incomplete until more arrives."""

    def __init__(self) -> None:
        self._pending = bytearray()

    @property
    def pending(self) -> int:
        """Bytes of an incomplete frame still waiting for their rest."""
        return len(self._pending)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield every frame that `data` completes.

        Raises:
            FrameError: an unknown kind or an impossible length.
        """
        self._pending += data
        start = 0
        while len(self._pending) - start >= HEADER.size:
            kind, at_ms, length = HEADER.unpack_from(self._pending, start)
            if kind not in Kind.__members__.values() or length > MAX_PAYLOAD:
                raise FrameError(f"not a frame: kind {kind}, length {length}")
            end = start + HEADER.size + length
            if len(self._pending) < end:
                break
            yield Frame(Kind(kind), at_ms, bytes(self._pending[start + HEADER.size : end]))
            start = end
        del self._pending[:start]


def encode_all(frames: Iterable[Frame]) -> bytes:
    """Return many frames as one body."""
    return b"".join(frame.encode() for frame in frames)


def decode_all(body: bytes) -> list[Frame]:
    """Return the frames of a whole body.

    Raises:
        FrameError: the body is not frames, or ends inside one.
    """
    decoder = Decoder()
    frames = list(decoder.feed(body))
    if decoder.pending:
        raise FrameError(f"the body ends inside a frame, {decoder.pending} bytes over")
    return frames
