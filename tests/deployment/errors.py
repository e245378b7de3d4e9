"""What can go wrong."""


class DeployError(Exception):
    """It cannot be deployed, or did not come up; the message says what hangs, and why as far as the cluster knows."""
