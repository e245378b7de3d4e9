"""The installer's own metrics and health, in Prometheus' text format: a handful of numbers, so no library."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_HELP = {
    "gvisor_node_ready": ("gauge", "1 while sandboxes may start on this node"),
    "gvisor_installer_info": ("gauge", "What is installed; always 1"),
    "gvisor_install_failures_total": ("counter", "Rounds that found the node not ready, by reason"),
    "gvisor_containerd_restarts_total": ("counter", "Times that the installer restarted containerd"),
    "gvisor_probes_total": ("counter", "Sandboxes started to see whether they run, by result"),
    "gvisor_verified_timestamp_seconds": ("gauge", "When the node was last found ready, Unix time"),
}


class Metrics:
    """Values by name and labels, safe to read from the server's threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[tuple[tuple[str, str], ...], float]] = {name: {} for name in _HELP}

    def set(self, name: str, value: float, **labels: str) -> None:
        """Give a gauge its value."""
        with self._lock:
            self._values[name][tuple(labels.items())] = value

    def only(self, name: str, **labels: str) -> None:
        """Make this the one series of an info metric."""
        with self._lock:
            self._values[name] = {tuple(labels.items()): 1}

    def count(self, name: str, **labels: str) -> None:
        """Add one to a counter."""
        with self._lock:
            series = self._values[name]
            series[tuple(labels.items())] = series.get(tuple(labels.items()), 0) + 1

    def get(self, name: str, **labels: str) -> float:
        """Return a value, 0 where nothing was said."""
        with self._lock:
            return self._values[name].get(tuple(labels.items()), 0)

    def text(self) -> str:
        """Return everything as a scrape reads it."""
        lines = []
        with self._lock:
            for name, (kind, description) in _HELP.items():
                lines += [f"# HELP {name} {description}", f"# TYPE {name} {kind}"]
                lines += [f"{name}{_braces(dict(labels))} {value}" for labels, value in self._values[name].items()]
        return "\n".join(lines) + "\n"


def _braces(labels: Mapping[str, str]) -> str:
    pairs = [f'{name}="{_escaped(value)}"' for name, value in labels.items()]
    return f"{{{','.join(pairs)}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def serve(metrics: Metrics, port: int) -> ThreadingHTTPServer:
    """Answer /metrics, /healthz and /readyz from threads of their own until the process ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ready = metrics.get("gvisor_node_ready") == 1
            answers = {
                "/metrics": (HTTPStatus.OK, metrics.text()),
                "/healthz": (HTTPStatus.OK, "ok\n"),
                "/readyz": (HTTPStatus.OK, "ok\n") if ready else (HTTPStatus.SERVICE_UNAVAILABLE, "not ready\n"),
            }
            status, text = answers.get(self.path, (HTTPStatus.NOT_FOUND, "not found\n"))
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class' name; scrapes are no news
            """Say nothing."""

    server = ThreadingHTTPServer(("", port), Handler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
