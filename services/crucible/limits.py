"""The one source of every limit on a request: the API, the documentation, the quota and the errors all read this object.

An installation may tighten or widen the fields through settings (`CRUCIBLE_LIMITS__...`); code never repeats a number from here.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from crucible.quantity import GIB, MIB, format_cpu, format_memory

Bytes = Annotated[int, Field(gt=0)]
PRIORITY_MIN = 0
PRIORITY_MAX = 10


class SizeClass(StrEnum):
    """Which queue an evaluation waits in, by the memory it asks for, so that large ones never block small ones."""

    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"


class Profile(BaseModel):
    """A named pair of resource limits, for people who do not want to think in quantities."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu_millis: int = Field(gt=0, description="CPU limit, millicores")
    memory_bytes: Bytes = Field(description="Memory limit, bytes")


class Limits(BaseModel):
    """What a request may ask for. All sizes in bytes, all times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code_bytes: Bytes = Field(MIB, description="Largest source text, bytes of UTF-8")
    stdin_bytes: Bytes = Field(MIB, description="Largest standard input, bytes of UTF-8")
    batch_items: int = Field(100, ge=1, le=1000, description="Most evaluations in one batch")
    # JSON that escapes all but ASCII triples the size of code and standard input at most, so what they may hold always passes.
    body_bytes: Bytes = Field(8 * MIB, description="Largest body of a single request, bytes")
    batch_body_bytes: Bytes = Field(32 * MIB, description="Largest body of a batch request, bytes")
    timeout_min_s: int = Field(1, ge=1, description="Shortest time limit of an evaluation, seconds")
    timeout_max_s: int = Field(3600, ge=1, description="Longest time limit of an evaluation, seconds")
    timeout_default_s: int = Field(60, ge=1, description="Time limit where the request names none, seconds")
    queue_timeout_max_s: int = Field(
        604_800, ge=1, description="Longest time that a request may agree to wait in the queue, seconds"
    )
    priority_default: int = Field(
        5, ge=PRIORITY_MIN, le=PRIORITY_MAX, description="Priority where the request names none"
    )
    cpu_min_millis: int = Field(10, ge=1, description="Smallest CPU limit, millicores")
    cpu_max_millis: int = Field(4000, ge=1, description="Largest CPU limit, millicores")
    memory_min_bytes: Bytes = Field(
        32 * MIB, description="Smallest memory limit, bytes; below it Python does not start"
    )
    memory_max_bytes: Bytes = Field(8 * GIB, description="Largest memory limit, bytes")
    label_count: int = Field(16, ge=0, description="Most labels on an evaluation")
    output_bytes: Bytes = Field(
        100 * MIB,
        description="Most output (standard output and error together), bytes; beyond it the evaluation is stopped",
    )
    inline_output_bytes: Bytes = Field(
        256 * 1024, description="Output up to this size stays in the database, larger goes to the object store, bytes"
    )
    tmp_bytes: Bytes = Field(64 * MIB, description="Size of the sandbox's /tmp, bytes; it is memory and counts as such")
    processes: int = Field(64, ge=8, description="Most processes and threads in a sandbox")
    open_files: int = Field(256, ge=64, description="Most open files per process in a sandbox")
    medium_from_bytes: Bytes = Field(
        256 * MIB + 1, description="Memory from which an evaluation is of size class medium, bytes"
    )
    large_from_bytes: Bytes = Field(GIB, description="Memory from which an evaluation is of size class large, bytes")
    profiles: dict[str, Profile] = Field(
        default_factory=lambda: {
            "small": Profile(cpu_millis=250, memory_bytes=256 * MIB),
            "medium": Profile(cpu_millis=500, memory_bytes=512 * MIB),
            "large": Profile(cpu_millis=1000, memory_bytes=2 * GIB),
        },
        description="Named pairs of limits",
    )
    profile_default: str = Field("small", description="Profile where the request names neither a profile nor limits")
    images: tuple[str, ...] = Field(
        ("python",), min_length=1, description="Runtime images that a request may name; the first is the default"
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Refuse limits that contradict each other: no request could ever meet them, or a default would break them."""
        ordered = (
            ("timeout_min_s", "timeout_default_s"),
            ("timeout_default_s", "timeout_max_s"),
            ("cpu_min_millis", "cpu_max_millis"),
            ("memory_min_bytes", "memory_max_bytes"),
            ("medium_from_bytes", "large_from_bytes"),
            ("inline_output_bytes", "output_bytes"),
            ("code_bytes", "body_bytes"),
            ("body_bytes", "batch_body_bytes"),
        )
        for lower, upper in ordered:
            if getattr(self, lower) > getattr(self, upper):
                raise ValueError(f"{lower} ({getattr(self, lower)}) must not exceed {upper} ({getattr(self, upper)})")
        if self.profile_default not in self.profiles:
            raise ValueError(
                f"profile_default {self.profile_default!r} is not one of profiles: {', '.join(self.profiles)}"
            )
        for name, profile in self.profiles.items():
            if not self.cpu_min_millis <= profile.cpu_millis <= self.cpu_max_millis:
                raise ValueError(
                    f"profiles.{name} asks for {format_cpu(profile.cpu_millis)} CPU, beyond cpu_min_millis to cpu_max_millis"
                )
            if not self.memory_min_bytes <= profile.memory_bytes <= self.memory_max_bytes:
                raise ValueError(
                    f"profiles.{name} asks for {format_memory(profile.memory_bytes)} memory, "
                    "beyond memory_min_bytes to memory_max_bytes"
                )
        return self

    def size_class(self, memory_bytes: int) -> SizeClass:
        """Return the queue that an evaluation with this memory limit (bytes) waits in."""
        if memory_bytes >= self.large_from_bytes:
            return SizeClass.LARGE
        return SizeClass.MEDIUM if memory_bytes >= self.medium_from_bytes else SizeClass.SMALL
