"""Where the platform keeps its data on one machine; apart from the settings, since the command line must find it fast."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def default_data_dir() -> Path:
    """Return where the platform keeps its data: the XDG data folder, or /var/lib/crucible for root.

    Root's own home is closed to the unprivileged users that PostgreSQL and sandboxes run as, so FHS' place for state is used.
    """
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib/crucible")
    return platformdirs.user_data_path("crucible", appauthor=False)
