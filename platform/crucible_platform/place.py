"""Where a stack is: its account and region, and what its resources are called. Passed to components, since asking AWS needs AWS."""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "crucible"


@dataclass(frozen=True)
class Place:
    """An account, a region, and the stack that is made there.

    Attributes:
        account: twelve digits.
        region: such as eu-central-1.
        stack: dev, staging or production.
    """

    account: str
    region: str
    stack: str

    @property
    def name(self) -> str:
        """What everything of this stack is called, or begins with."""
        return f"{PREFIX}-{self.stack}"

    @property
    def tags(self) -> dict[str, str]:
        """What every resource on AWS carries: whose cost it is, and who made it."""
        return {"Project": PREFIX, "Environment": self.stack, "ManagedBy": "pulumi"}

    def arn(self, service: str, resource: str) -> str:
        """Return the ARN of something of this account and region."""
        return f"arn:aws:{service}:{self.region}:{self.account}:{resource}"
