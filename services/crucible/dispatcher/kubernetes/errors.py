"""What an answer of the API server means for the evaluation that was to be started: wait for room, wait for the cluster, or give up.

Only what says that this very sandbox is not acceptable is final. A right that is missing, a namespace that is not there, or a server that
does not answer says nothing about the evaluation, so it waits.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from crucible.evaluation import Reason
from crucible.problems import ProblemError

if TYPE_CHECKING:
    from crucible.kubernetes.api import ApiError

_RETRY_AFTER_SECONDS = 1.0
# Bad request, too large, and Kubernetes' word for a body that breaks a rule.
_UNACCEPTABLE = frozenset({400, 413, 422})
# How RBAC says that we may not, and how our own admission policy does (policies/admission/evaluation-makers.yaml).
_NO_RIGHT = re.compile(r"cannot \w+ resource|the right to create sandboxes")


def problem_of(error: ApiError) -> ProblemError:
    """Return the problem that an API server's refusal to create a sandbox is."""
    if error.quota_exceeded:
        return ProblemError("no-capacity", error.message)
    if refused_for_good(error):
        return refused(Reason.SANDBOX_ERROR, f"the cluster refused the sandbox: {error.message}")
    return unavailable(error)


def refused_for_good(error: ApiError) -> bool:
    """Whether the API server finds this very object unacceptable: validation or an admission policy."""
    if error.status in _UNACCEPTABLE:
        return True
    causes = {cause.get("reason") for cause in error.details.get("causes") or []}
    return error.status == 403 and not _NO_RIGHT.search(error.message) and "NamespaceTerminating" not in causes


def refused(reason: Reason, detail: str) -> ProblemError:
    """Return the problem of a sandbox that will never be made; `reason` is what the attempt ends with."""
    return ProblemError("sandbox-refused", detail[:1000], reason=reason)


def unavailable(error: ApiError) -> ProblemError:
    """Return the problem of a cluster that does not do its part now."""
    after = error.retry_after or _RETRY_AFTER_SECONDS
    return ProblemError("cluster-unavailable", f"the cluster does not do its part now: {error}", retry_after=after)
