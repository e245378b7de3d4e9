"""Why a node may not run sandboxes: the reasons that its condition, the logs and the metrics name alike."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """The `reason` of the node's condition; docs/gvisor.md explains each."""

    INSTALLING = "Installing"
    SANDBOX_RAN = "SandboxRan"
    CONFIGURATION_INVALID = "ConfigurationInvalid"
    CONTAINERD_TOO_OLD = "ContainerdTooOld"
    CONTAINERD_CONFIG_UNREADABLE = "ContainerdConfigUnreadable"
    CONTAINERD_CONFIG_VERSION = "ContainerdConfigVersion"
    DROP_IN_NOT_IMPORTED = "DropInNotImported"
    CHECKSUM_MISMATCH = "ChecksumMismatch"
    VERSION_MISMATCH = "VersionMismatch"
    INSTALLED_FILE_CHANGED = "InstalledFileChanged"
    HOST_FILE_FAILED = "HostFileFailed"
    RESTART_FAILED = "RestartFailed"
    RUNTIME_MISSING = "RuntimeMissing"
    PROBE_FAILED = "ProbeFailed"
    NOT_GVISOR = "NotGvisor"


class NotReadyError(Exception):
    """The node must not run sandboxes. `str()` is a sentence for the person who reads the node's condition."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class InconclusiveError(Exception):
    """Nothing was learnt about gVisor (the API server does not answer, the node is full): what was true stays so."""
