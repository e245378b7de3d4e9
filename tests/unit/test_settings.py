"""Settings: every field has its variable, and whatever is wrong is told by the variable's name and never by its value."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from crucible.settings import Settings, SettingsError, env_name

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("CRUCIBLE_"):
            monkeypatch.delenv(name)


def leaves(model: type[BaseModel], *path: str) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Give every field that is set by a variable of its own."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, *path, name)
        else:
            yield (*path, name), field


LEAVES = dict(leaves(Settings))
# Fields whose limits must agree with others', or whose form is JSON: a value that is not the default and fits.
FITTING: dict[tuple[str, ...], tuple[str, Any]] = {
    ("storage_url",): ("http://storage:8082", "http://storage:8082"),
    ("dispatcher_url",): ("http://dispatcher:8090", "http://dispatcher:8090"),
    ("limits", "images"): ('["python", "pypy"]', ("python", "pypy")),
    ("limits", "profile_default"): ("medium", "medium"),
    ("kubernetes", "images"): ('{"python": "runner@sha256:1"}', {"python": "runner@sha256:1"}),
    ("storage", "objects_fallback_urls"): ('["file:///a", "s3://b/c"]', ("file:///a", "s3://b/c")),
    ("tracing", "otlp_endpoint"): ("http://localhost:4318", "http://localhost:4318"),
    ("tracing", "sample_ratio"): ("0.25", 0.25),
    ("worker", "slots"): ("7", 7),
    # Unset by default, so that there is nothing to go by.
    ("dispatcher", "cpu_millis"): ("1500", 1500),
    ("dispatcher", "memory_bytes"): (str(2**30), 2**30),
}


def _plain(annotation: Any) -> Any:
    """Return what an annotation is besides None."""
    if get_origin(annotation) in (Union, UnionType):
        [annotation] = [part for part in get_args(annotation) if part is not type(None)]
    return annotation


def another_value(path: tuple[str, ...], field: FieldInfo) -> tuple[str, Any]:
    """Return a value other than the default, as text and as the setting should then be."""
    if path in FITTING:
        return FITTING[path]
    kind = _plain(field.annotation)
    value: Any
    if get_origin(kind) is Literal:
        value = next(choice for choice in get_args(kind) if choice != field.default)
    elif kind is Path or Path in get_args(kind):
        value = Path("/somewhere/else")
    elif kind is SecretStr:
        return "another secret", SecretStr("another secret")
    elif kind is bool:
        value = not field.default
    elif kind in (int, float):
        value = field.default - 1 if field.default > 1 else field.default + 1
    else:
        assert kind is str, f"{path}: a kind of setting that this test does not know"
        value = "another"
    return str(value), value


def read(path: tuple[str, ...], settings: Settings) -> Any:
    value: Any = settings
    for part in path:
        value = getattr(value, part)
    return value


def test_every_setting_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, field in LEAVES.items():
        if path == ("limits", "profiles"):
            continue  # below
        text, value = another_value(path, field)
        assert read(path, Settings()) != value, path
        with monkeypatch.context() as environment:
            environment.setenv(env_name(*path), text)
            assert read(path, Settings()) == value, path


def test_every_setting_is_described_in_a_sentence_without_a_stop() -> None:
    undescribed = [path for path, field in LEAVES.items() if not field.description or field.description.endswith(".")]
    assert undescribed == []


def test_profiles_are_read_from_json_or_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUCIBLE_LIMITS__PROFILES", '{"small": {"cpu_millis": 100, "memory_bytes": 67108864}}')
    assert list(Settings().limits.profiles) == ["small"]
    monkeypatch.setenv("CRUCIBLE_LIMITS__PROFILES__SMALL__CPU_MILLIS", "200")
    assert Settings().limits.profiles["small"].cpu_millis == 200


UNUSABLE = [
    ("CRUCIBLE_API__PORT", "99999", "less than or equal to 65535"),
    ("CRUCIBLE_API__PORT", "http", "valid integer"),
    ("CRUCIBLE_API__RATE_PER_SECOND", "nan", "finite number"),
    ("CRUCIBLE_STORAGE__LEASE_SECONDS", "inf", "finite number"),
    ("CRUCIBLE_STORAGE__LEASE_SECONDS", "0", "greater than 0"),
    ("CRUCIBLE_DISPATCHER__RUNTIME", "docker", "'bubblewrap'"),
    ("CRUCIBLE_LOG__LEVEL", "loud", "'debug'"),
    ("CRUCIBLE_TRACING__OTLP_ENDPOINT", "localhost:4317", "pattern"),
    ("CRUCIBLE_LIMITS__IMAGES", "python", "valid tuple"),
    ("CRUCIBLE_LIMITS__IMAGES", "[]", "at least 1 item"),
    ("CRUCIBLE_LIMITS__CODE_BYTES", "0", "greater than 0"),
    ("CRUCIBLE_API", "not json", "valid dictionary"),
    ("CRUCIBLE_API__HOSTNAME", "x", "Extra inputs"),
    ("CRUCIBLE_LIMITS__TIMEOUT_MAX", "5", "Extra inputs"),
    ("CRUCIBLE_LIMITS__PROFILES__TINY__CPU", "5", "Extra inputs"),
]


def test_a_value_that_cannot_be_used_is_an_error_that_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value, says in UNUSABLE:
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            with pytest.raises(SettingsError) as refused:
                Settings()
        [line] = [line for line in str(refused.value).splitlines() if line.startswith(f"{name}: ")]
        assert says in line, name


def test_limits_that_contradict_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUCIBLE_LIMITS__TIMEOUT_MAX_S", "30")
    with pytest.raises(
        SettingsError, match=r"^CRUCIBLE_LIMITS: timeout_default_s \(60\) must not exceed timeout_max_s"
    ):
        Settings()


def test_every_problem_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUCIBLE_API__PORT", "-1")
    monkeypatch.setenv("CRUCIBLE_LOG__FORMAT", "xml")
    with pytest.raises(SettingsError) as refused:
        Settings()
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == [
        "CRUCIBLE_API__PORT",
        "CRUCIBLE_LOG__FORMAT",
    ]


def test_a_secret_in_the_wrong_place_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUCIBLE_STORAGE", "postgresql://me:hunter2@db/x")
    with pytest.raises(SettingsError) as refused:
        Settings()
    assert "hunter2" not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__


def test_one_underscore_where_two_are_needed_is_an_error_and_not_a_setting_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CRUCIBLE_STORAGE_DATABASE_URL", "postgresql://elsewhere")
    with pytest.raises(SettingsError, match=r"write CRUCIBLE_STORAGE__DATABASE_URL$"):
        Settings()


def test_variables_of_other_programs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUCIBLE_API_KEY", "crk_x")
    monkeypatch.setenv("CRUCIBLE_ANYTHING", "1")
    assert Settings().api.port == 8080


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUCIBLE_STORAGE__DATABASE_URL", "")
    monkeypatch.setenv("CRUCIBLE_API__PORT", "")
    assert Settings().storage.database_url is None
    assert Settings().api.port == 8080


def test_a_tilde_is_the_home_folder_and_paths_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("CRUCIBLE_DATA_DIR", "~/data")
    assert Settings().data_dir == Path("/home/someone/data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRUCIBLE_DATA_DIR", "data")
    assert Settings().data_dir == tmp_path / "data"


def test_arguments_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUCIBLE_DATA_DIR", "/from/environment")
    assert Settings(data_dir=Path("/from/argument")).data_dir == Path("/from/argument")


def test_secrets_do_not_print_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUCIBLE_STORAGE__DATABASE_URL", "postgresql://me:hunter2@db/x")
    monkeypatch.setenv("CRUCIBLE_INTERNAL_TOKEN", "hunter2")
    settings = Settings()
    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump()}"
    assert "hunter2" not in settings.model_dump_json()


def test_with_a_broker_a_message_may_be_held_for_longer_than_the_longest_evaluation_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CRUCIBLE_BROKER__CONSUMER_TIMEOUT_SECONDS", "3600")
    Settings()
    monkeypatch.setenv("CRUCIBLE_BROKER_URL", "amqp://user:secret@rabbit/crucible")
    with pytest.raises(
        SettingsError, match=r"^CRUCIBLE_BROKER__CONSUMER_TIMEOUT_SECONDS: .*CRUCIBLE_LIMITS__TIMEOUT_MAX_S"
    ):
        Settings()
