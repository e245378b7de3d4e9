"""Names that the rules share with the rest of the repository, repeated since the pack's environment has none of it. A test compares them."""

from __future__ import annotations

# crucible/names.py
EVALUATION_NAMESPACE = "crucible-evaluations"
RUNTIME_CLASS = "gvisor"
RUNTIME_HANDLER = "runsc"
PRIORITY_EVALUATION = "crucible-evaluation"
SERVICE_ACCOUNT_EVALUATION = "evaluation"
CONTAINER = "evaluation"
LABEL_EVALUATION = "crucible.dev/evaluation-id"
LABEL_ATTEMPT = "crucible.dev/attempt"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY = "crucible-dispatcher"
LABEL_SANDBOX_NODE = "crucible.dev/sandbox"
TAINT_SANDBOX = "crucible.dev/sandbox"

# crucible_platform/place.py: what the provider gives to everything.
REQUIRED_TAGS = ("Project", "Environment", "ManagedBy")
