"""Problem details (RFC 9457): every error that the platform's HTTP services answer with, and what each one means.

`type` is a path of the API itself (`/problems/<slug>`), which explains the problem and what to do; the documentation's error
page is generated from the same catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from crucible.evaluation import Violation
from crucible.logs import speakable

CONTENT_TYPE = "application/problem+json"


@dataclass(frozen=True, slots=True)
class ProblemKind:
    """A class of problems: its slug, status, title, and what the caller should do."""

    slug: str
    status: int
    title: str
    advice: str
    retryable: bool = False


KINDS = {
    kind.slug: kind
    for kind in (
        ProblemKind(
            "invalid-request",
            422,
            "The request breaks a rule",
            "Mend each entry of `violations`; `accepted` says what would pass.",
        ),
        ProblemKind(
            "malformed-json",
            400,
            "The body is not JSON of the right shape",
            "Send a UTF-8 JSON body that matches the OpenAPI schema.",
        ),
        ProblemKind(
            "unsupported-media-type",
            415,
            "The body is of a kind that is not read",
            "Send plain JSON with `Content-Type: application/json` and no `Content-Encoding`.",
        ),
        ProblemKind("body-too-large", 413, "The body is too large", "Send less; `limit` names the most that is read."),
        ProblemKind(
            "unauthenticated", 401, "No valid API key", "Send `Authorization: Bearer <key>`; `crucible up` prints one."
        ),
        ProblemKind(
            "forbidden", 403, "This key's role may not do that", "Use a key with the role that `detail` names."
        ),
        ProblemKind(
            "not-found", 404, "There is nothing here", "Check the id; what belongs to another owner is not shown."
        ),
        ProblemKind("method-not-allowed", 405, "This resource does not know that method", "See `Allow`."),
        ProblemKind(
            "conflict", 409, "The resource is in another state", "Read it again; `detail` says which state it is in."
        ),
        ProblemKind(
            "batch-rejected",
            422,
            "No item of the batch was accepted",
            "Mend the request by the `problem` of each entry of `items`; nothing was stored.",
        ),
        ProblemKind(
            "idempotency-key-reused",
            422,
            "This Idempotency-Key was used for another request",
            "Use a new key for a new request.",
        ),
        ProblemKind(
            "range-not-satisfiable", 416, "The range lies outside the output", "See `Content-Range` for its size."
        ),
        ProblemKind(
            "never-fits", 422, "No node could ever take this", "Ask for at most what `accepted` says.", retryable=False
        ),
        ProblemKind("no-capacity", 409, "There is no room now", "Wait and ask again.", retryable=True),
        # Not 503: it is the cluster that is away, and the dispatcher is there, so its callers' circuit breakers must not open.
        ProblemKind(
            "cluster-unavailable",
            424,
            "The Kubernetes cluster does not do its part now",
            "Wait and ask again; the attempt is kept.",
            retryable=True,
        ),
        ProblemKind(
            "sandbox-refused",
            422,
            "The cluster refuses this sandbox for good",
            "`detail` has the cluster's words, `reason` what the attempt ends with.",
        ),
        ProblemKind(
            "quota-exceeded",
            429,
            "The owner has too much under way",
            "Wait for some to end, or cancel some; see `Retry-After`.",
            retryable=True,
        ),
        ProblemKind(
            "rate-limited", 429, "Too many submissions in a short time", "Slow down; see `Retry-After`.", retryable=True
        ),
        ProblemKind(
            "stale-attempt",
            409,
            "This attempt is no longer the evaluation's own",
            "Stop: another attempt, or a cancel, has taken over.",
        ),
        ProblemKind(
            "unavailable",
            503,
            "A part of the platform does not answer",
            "Try again after `Retry-After` seconds; nothing was lost.",
            retryable=True,
        ),
        ProblemKind("internal", 500, "The platform made a mistake", "Report it with the `instance` value."),
    )
}


class ProblemDetails(BaseModel):
    """The body of an error answer."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="Path of the page that explains the problem", examples=["/problems/invalid-request"])
    title: str = Field(description="The kind of problem in words")
    status: int = Field(description="HTTP status of the answer")
    detail: str = Field(description="This occurrence in words")
    instance: str | None = Field(None, description="Identifies this occurrence in the logs")
    violations: list[Violation] | None = Field(
        None, description="Each broken rule: field, value, limit, what would be accepted"
    )


class ProblemError(Exception):
    """Raised anywhere in a service to answer with a problem. `extra` becomes members of the body."""

    def __init__(
        self,
        slug: str,
        detail: str,
        *,
        violations: list[Violation] | None = None,
        retry_after: float | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(detail)
        self.kind = KINDS[slug]
        self.detail = detail
        self.violations = violations
        self.retry_after = retry_after
        self.extra = extra

    def body(self, instance: str | None = None) -> dict[str, Any]:
        """Return the JSON body of the answer; what has no UTF-8 form in it is escaped, since it may quote the caller."""
        details = ProblemDetails(
            type=f"/problems/{self.kind.slug}",
            title=self.kind.title,
            status=self.kind.status,
            detail=self.detail,
            instance=instance,
            violations=self.violations,
            **self.extra,
        )
        # Not pydantic's JSON mode, which fails on text that has no UTF-8 form before it can be escaped.
        body: dict[str, Any] = speakable(details.model_dump(exclude_none=True))
        return body


def invalid_request(violations: list[Violation]) -> ProblemError:
    """Return the problem of a request that breaks rules; its detail names the fields, `violations` tells the rest."""
    fields = list(dict.fromkeys(violation.field for violation in violations))
    shown = ", ".join(fields[:5]) + (f" and {len(fields) - 5} more" if len(fields) > 5 else "")
    return ProblemError("invalid-request", f"refused because of {shown}", violations=violations)
