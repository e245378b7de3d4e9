"""Configuration: one typed object read from the environment (`CRUCIBLE_...`, nested fields joined by `__`).

The configuration reference in the documentation is generated from the descriptions here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from crucible.data_dir import default_data_dir
from crucible.limits import Limits


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ApiSettings(_Section):
    """The public HTTP service."""

    host: str = Field("127.0.0.1", description="Address that the API listens on")
    port: int = Field(8080, ge=0, le=65535, description="Port that the API listens on; 0 takes a free one")
    rate_per_second: float = Field(
        500.0, gt=0, description="Submissions per second that one owner may make, averaged over a minute"
    )
    max_active_per_owner: int = Field(
        20_000, ge=1, description="Evaluations that one owner may have under way (waiting or running)"
    )
    key_cache_seconds: float = Field(
        15.0, ge=0, description="How long a verified API key is trusted without asking storage again"
    )
    capacity_cache_seconds: float = Field(
        30.0, ge=0, description="How long the largest node's size is trusted when checking a request"
    )


class StorageSettings(_Section):
    """The owner of PostgreSQL and the object store."""

    database_url: SecretStr | None = Field(
        None, description="postgresql://... ; unset in `local`, which starts a PostgreSQL of its own"
    )
    pool_size: int = Field(10, ge=1, le=200, description="Database connections kept open")
    objects_url: str | None = Field(
        None,
        description="Where large outputs go: file:///path or s3://bucket/prefix; unset: a folder under the data folder",
    )
    objects_fallback_urls: tuple[str, ...] = Field(
        (), description="Object stores that are still read, while a migration is under way"
    )
    s3_endpoint: str | None = Field(None, description="Endpoint of an S3-compatible store; unset: AWS")
    s3_region: str = Field("us-east-1", description="Region of the S3 store")
    lease_seconds: float = Field(30.0, gt=0, description="A worker silent for this long has lost what it held")
    max_attempts: int = Field(
        3, ge=1, le=10, description="Attempts before an evaluation that the platform keeps losing becomes a dead letter"
    )
    aging_seconds: float = Field(
        600.0, gt=0, description="Waiting this long raises an evaluation's effective priority by one, up to the highest"
    )
    retention_days: float = Field(30.0, gt=0, description="Ended evaluations older than this are deleted")


class DispatcherSettings(_Section):
    """The only creator of sandboxes."""

    runtime: Literal["auto", "bubblewrap", "process"] = Field(
        "auto", description="auto: bubblewrap on Linux, a plain process (no isolation!) elsewhere"
    )
    cgroups: Literal["auto", "require", "off"] = Field(
        "auto",
        description="Enforce memory, CPU and process limits with control groups: where writable, always, or never",
    )
    cpu_millis: int | None = Field(
        None, ge=100, description="CPU for sandboxes on this node, millicores; unset: all processors"
    )
    memory_bytes: int | None = Field(
        None,
        ge=64 * 1024**2,
        description="Memory for sandboxes on this node, bytes; unset: three quarters of the machine's",
    )
    python: Path | None = Field(None, description="Interpreter inside sandboxes; unset: the one that runs the platform")
    packages: Path | None = Field(None, description="Folder of extra packages that sandboxes may import, read-only")
    deadline_grace_seconds: float = Field(
        5.0, gt=0, description="How long after an evaluation's time limit the sandbox is ended from outside"
    )


class WorkerSettings(_Section):
    """What takes evaluations from the queue."""

    slots: int = Field(0, ge=0, le=1000, description="Evaluations of size class small at a time; 0: two per processor")
    drain_seconds: float = Field(
        10.0, ge=0, description="On shutdown, how long running evaluations may finish before they are given back"
    )


class LogSettings(_Section):
    """Structured logs on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is written")
    format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: coloured lines on a terminal, JSON elsewhere"
    )


class TracingSettings(_Section):
    """OpenTelemetry traces; off unless an endpoint is named."""

    otlp_endpoint: str | None = Field(
        None, description="OTLP/HTTP endpoint, such as http://localhost:4318; unset: no tracing"
    )
    sample_ratio: float = Field(1.0, ge=0, le=1, description="Share of submissions that are traced")


class Settings(BaseSettings):
    """Everything that an installation may set."""

    model_config = SettingsConfigDict(env_prefix="CRUCIBLE_", env_nested_delimiter="__", extra="ignore", frozen=True)

    data_dir: Path = Field(default_factory=default_data_dir, description="Where the `local` profile keeps everything")
    internal_token: SecretStr | None = Field(
        None,
        description="Shared by the services for calls among themselves; unset in `local`, which makes one per start",
    )
    limits: Limits = Field(default_factory=Limits, description="What a request may ask for")
    api: ApiSettings = ApiSettings()
    storage: StorageSettings = StorageSettings()
    dispatcher: DispatcherSettings = DispatcherSettings()
    worker: WorkerSettings = WorkerSettings()
    log: LogSettings = LogSettings()
    tracing: TracingSettings = TracingSettings()
