"""Configuration: one typed object read from the environment (`CRUCIBLE_...`, nested fields joined by `__`).

A value that cannot be used is an error that names its variable, and so is a setting that does not exist. The configuration reference in
the documentation is generated from the descriptions here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from crucible import names
from crucible.data_dir import default_data_dir
from crucible.limits import Limits

ENV_PREFIX = "CRUCIBLE_"
ENV_DELIMITER = "__"

# No shell stands between a service manager's file and us.
FilePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


class SettingsError(Exception):
    """Settings that cannot be used: one line per problem, each beginning with the name of the environment variable."""


def env_name(*location: str | int) -> str:
    """Return the environment variable that holds a setting (`"api", "port"` -> `CRUCIBLE_API__PORT`)."""
    return ENV_PREFIX + ENV_DELIMITER.join(str(part).upper() for part in location)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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

    host: str = Field("127.0.0.1", description="Address that `crucible serve storage` listens on")
    port: int = Field(8082, ge=0, le=65535, description="Port that `crucible serve storage` listens on")
    database_url: SecretStr | None = Field(
        None, description="postgresql://... ; unset in `local`, which starts a PostgreSQL of its own"
    )
    pool_size: int = Field(10, ge=1, le=200, description="Database connections kept open")
    objects_url: str | None = Field(
        None,
        description="Where large outputs go: file:///path, s3://bucket/prefix, or `database`, which keeps them there like small ones; "
        "unset: a folder under the data folder. Replicas of storage must share it, so for several it is never a folder of their own",
    )
    objects_fallback_urls: tuple[str, ...] = Field(
        (), description="Object stores that are still read, while a migration is under way"
    )
    s3_endpoint: str | None = Field(None, description="Endpoint of an S3-compatible store; unset: AWS")
    s3_region: str = Field("us-east-1", description="Region of the S3 store")
    lease_seconds: float = Field(30.0, gt=0, description="A worker silent for this long has lost what it held")
    max_attempts: int = Field(
        3,
        ge=1,
        le=10,
        description="Losses after which an evaluation becomes a dead letter; what gives way on purpose (a drain) is not a loss",
    )
    aging_seconds: float = Field(
        600.0, gt=0, description="Waiting this long raises an evaluation's effective priority by one, up to the highest"
    )
    retry_seconds: float = Field(
        1.0, ge=0, description="Pause before a lost attempt is tried again; doubled by each further loss, with jitter"
    )
    retention_days: float = Field(30.0, gt=0, description="Ended evaluations older than this are deleted")


class DispatcherSettings(_Section):
    """The only creator of sandboxes."""

    host: str = Field("127.0.0.1", description="Address that `crucible serve dispatcher` listens on")
    port: int = Field(8090, ge=0, le=65535, description="Port that `crucible serve dispatcher` listens on")
    runtime: Literal["auto", "bubblewrap", "process", "kubernetes"] = Field(
        "auto",
        description="auto: bubblewrap on Linux, a plain process (no isolation!) elsewhere; kubernetes: Jobs under gVisor",
    )
    use_monitoring_service: bool = Field(
        True,
        description="With kubernetes: `crucible serve monitor` watches the Jobs; false: each dispatcher takes part in watching "
        "them itself",
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
    python: FilePath | None = Field(
        None, description="Interpreter inside sandboxes; unset: the one that runs the platform"
    )
    packages: FilePath | None = Field(None, description="Folder of extra packages that sandboxes may import, read-only")
    deadline_grace_seconds: float = Field(
        5.0, gt=0, description="How long after an evaluation's time limit the sandbox is ended from outside"
    )


class WorkerSettings(_Section):
    """What takes evaluations from the queue."""

    host: str = Field("127.0.0.1", description="Address of the health and metrics of `crucible serve worker`")
    port: int = Field(8088, ge=0, le=65535, description="Port of the health and metrics of `crucible serve worker`")
    slots: int = Field(0, ge=0, le=1000, description="Evaluations of size class small at a time; 0: two per processor")
    drain_seconds: float = Field(
        10.0, ge=0, description="On shutdown, how long running evaluations may finish before they are given back"
    )


class KubernetesSettings(_Section):
    """The cluster in which evaluations run, where the dispatcher's runtime is `kubernetes`."""

    kubeconfig: FilePath | None = Field(
        None, description="How to reach the API server; unset: the service account of the Pod that this runs in"
    )
    namespace: str = Field(
        names.EVALUATION_NAMESPACE, description="Namespace of the evaluations; nothing else is in it"
    )
    images: dict[str, str] = Field(
        default_factory=dict,
        description='Which image each name that a request may give stands for, by digest: {"python": "registry/runner@sha256:..."}',
    )
    runtime_class: str = Field(names.RUNTIME_CLASS, description="RuntimeClass of the sandboxes")
    overhead_memory_bytes: int = Field(
        96 * 1024**2, ge=0, description="Memory that the sandbox itself takes, bytes; the same as the RuntimeClass says"
    )
    overhead_cpu_millis: int = Field(
        50, ge=0, description="CPU that the sandbox itself takes, millicores; the same as the RuntimeClass says"
    )
    cpu_request_percent: int = Field(
        100,
        ge=1,
        le=100,
        description="Share of an evaluation's CPU limit that the scheduler sets aside for it, percent; with less, evaluations may slow "
        "each other down, never end each other (memory is always set aside in full)",
    )
    starting_per_node: int = Field(
        8,
        ge=1,
        description="Sandboxes that may be starting at a time, for each node that takes them; a start takes far more of a node than "
        "most evaluations do, and too many at once cost it its readiness",
    )
    reserve_cpu_millis: int = Field(
        0, ge=0, description="CPU of each sandbox node that is not for evaluations, millicores"
    )
    reserve_memory_bytes: int = Field(
        0, ge=0, description="Memory of each sandbox node that is not for evaluations, bytes"
    )
    scheduling_seconds: float = Field(
        300.0,
        gt=0,
        description="A sandbox that no node has taken for this long ends as `timeout` with reason `scheduling`",
    )
    node_lost_seconds: int = Field(
        10, ge=0, description="A node that does not answer for this long, as Kubernetes sees it, has lost its sandboxes"
    )


class MonitorSettings(_Section):
    """What watches Jobs and Pods."""

    host: str = Field("127.0.0.1", description="Address of the health and metrics of `crucible serve monitor`")
    port: int = Field(8086, ge=0, le=65535, description="Port of the health and metrics of `crucible serve monitor`")
    lease_namespace: str = Field(
        names.PLATFORM_NAMESPACE, description="Namespace in which the replicas keep their leases"
    )
    lease_seconds: float = Field(6.0, ge=1, description="A replica silent for this long is replaced; the leader too")
    reconcile_seconds: float = Field(
        15.0, gt=0, description="How often what storage believes to run is compared with what the cluster has"
    )


class CleanupSettings(_Section):
    """What removes from the cluster what nobody needs any more."""

    host: str = Field("127.0.0.1", description="Address of the health and metrics of `crucible serve cleanup`")
    port: int = Field(8087, ge=0, le=65535, description="Port of the health and metrics of `crucible serve cleanup`")
    orphan_seconds: float = Field(
        900.0,
        gt=0,
        description="What belongs to no attempt that storage knows as under way is removed once it is this old",
    )
    high_water: int = Field(
        2000,
        ge=1,
        description="With more objects than this, what is recorded goes first and orphans need only be half as old",
    )
    dry_run: bool = Field(False, description="Say what would be removed, and remove nothing")


class BrokerSettings(_Section):
    """The message broker between storage and the workers, where `CRUCIBLE_BROKER_URL` names one."""

    management_url: SecretStr | None = Field(
        None,
        description="http(s)://user:password@host:15672 of RabbitMQ's management API, which `crucible broker` commands read",
    )
    ca_file: FilePath | None = Field(
        None, description="Certificates that sign the broker's and Redis' own (PEM); unset: those of the system"
    )
    cert_file: FilePath | None = Field(None, description="Certificate to present to the broker and Redis (PEM)")
    key_file: FilePath | None = Field(None, description="Key of that certificate (PEM)")
    heartbeat_seconds: float = Field(
        5.0, gt=0, description="A connection that is silent for about twice as long is taken for dead"
    )
    connect_timeout_seconds: float = Field(2.0, gt=0, description="How long one node of the broker may take to answer")
    delivery_limit: int = Field(
        20,
        ge=1,
        description="Deliveries after which the broker gives a message up; storage then looks after its evaluation",
    )
    queue_length_max: int = Field(
        100_000, ge=1, description="Messages per queue; beyond it publishing is refused, and storage keeps the rest"
    )
    consumer_timeout_seconds: float = Field(
        10_800.0, gt=0, description="How long a worker may hold a message; must exceed the longest evaluation"
    )
    reconcile_seconds: float = Field(
        5.0, gt=0, description="How often what waits in the table is compared with what waits in the broker"
    )


class EventSettings(_Section):
    """Events on Redis Streams, where `CRUCIBLE_REDIS_URL` names a Redis."""

    stream_length: int = Field(100_000, ge=1000, description="Events kept in the stream, about; older ones are trimmed")
    claim_idle_seconds: float = Field(
        30.0, gt=0, description="An event that its consumer has not acknowledged for this long goes to another one"
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
        None, pattern=r"^https?://", description="OTLP/HTTP endpoint, such as http://localhost:4318; unset: no tracing"
    )
    sample_ratio: float = Field(1.0, ge=0, le=1, description="Share of submissions that are traced")


class _Environment(EnvSettingsSource):
    """The environment, read so that every mistake in it is found where its place is known."""

    def decode_complex_value(self, field_name: str, field: Any, value: Any) -> Any:
        """Leave what is not JSON as it is, for validation to refuse by name."""
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value

    def __call__(self) -> dict[str, Any]:
        """Read all settings.

        Raises:
            SettingsError: a variable has one underscore where a nested setting needs two; it would be ignored in silence.
        """
        for section, field in self.settings_cls.model_fields.items():
            names = getattr(field.annotation, "model_fields", {})
            for name in names:
                if f"{ENV_PREFIX}{section}_{name}".lower() in self.env_vars:
                    given = f"{ENV_PREFIX}{section}_{name}".upper()
                    raise SettingsError(f"{given}: is not a setting; write {env_name(section, name)}")
        return super().__call__()


class Settings(BaseSettings):
    """Everything that an installation may set.

    Raises:
        SettingsError: a value that cannot be used, or a nested setting that does not exist.
    """

    # An empty variable is an unset one: compose files and unit files cannot leave a variable out.
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter=ENV_DELIMITER, env_ignore_empty=True, extra="ignore", frozen=True
    )

    data_dir: FilePath = Field(
        default_factory=default_data_dir, description="Where the `local` profile keeps everything"
    )
    internal_token: SecretStr | None = Field(
        None,
        description="Shared by the services for calls among themselves; unset in `local`, which makes one per start",
    )
    broker_url: SecretStr | None = Field(
        None,
        description="amqp(s)://user:password@host:5672/vhost, several nodes joined by commas, or redis(s)://...; "
        "unset: the database itself is the queue",
    )
    legacy_broker_url: SecretStr | None = Field(
        None, description="The broker that is being left (`crucible broker migrate`): both are consumed"
    )
    redis_url: SecretStr | None = Field(
        None, description="redis(s)://... that carries events between processes; unset: they stay in this process"
    )
    storage_url: str | None = Field(
        None, pattern=r"^https?://", description="Where `crucible serve` finds the storage service"
    )
    dispatcher_url: str | None = Field(
        None, pattern=r"^https?://", description="Where `crucible serve` finds the dispatcher service"
    )
    limits: Limits = Field(default_factory=Limits, description="What a request may ask for")
    api: ApiSettings = ApiSettings()
    storage: StorageSettings = StorageSettings()
    dispatcher: DispatcherSettings = DispatcherSettings()
    worker: WorkerSettings = WorkerSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()
    monitor: MonitorSettings = MonitorSettings()
    cleanup: CleanupSettings = CleanupSettings()
    broker: BrokerSettings = BrokerSettings()
    events: EventSettings = EventSettings()
    log: LogSettings = LogSettings()
    tracing: TracingSettings = TracingSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the library's signature
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read arguments, then the environment; there is no other source."""
        return init_settings, _Environment(settings_cls)

    @model_validator(mode="wrap")
    @classmethod
    def _name_variables(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            settings = handler(values)
        except ValidationError as error:
            # Never the value: it may be a secret.
            problems = error.errors(include_input=False, include_url=False, include_context=False)
            lines = [f"{env_name(*found['loc'])}: {found['msg'].removeprefix('Value error, ')}" for found in problems]
            raise SettingsError("\n".join(lines)) from None
        _check_hold(settings)
        return settings


def _check_hold(settings: Settings) -> None:
    """Raise if the broker would take messages away from workers that still run what they name."""
    hold, longest = settings.broker.consumer_timeout_seconds, settings.limits.timeout_max_s
    if (settings.broker_url or settings.broker.management_url) and hold <= longest:
        raise SettingsError(
            f"{env_name('broker', 'consumer_timeout_seconds')}: is {hold:g} s and must be more than the longest evaluation "
            f"({env_name('limits', 'timeout_max_s')}, {longest} s)"
        )
