"""What /metrics tells, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Of one server, in a registry of its own."""

    def __init__(self, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        """What is asked when they are read: documents that wait, and that are written."""
        self.registry = CollectorRegistry()
        self.requests = Counter("diptych_requests", "Requests by path and status.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "diptych_request_seconds", "From a request's arrival to its last byte.", ["path"], buckets=_SECONDS, registry=self.registry
        )
        self.first_text = Histogram(
            "diptych_first_text_seconds", "From a request's arrival to its first word.", ["model"], buckets=_SECONDS, registry=self.registry
        )
        self.first_picture = Histogram(
            "diptych_first_picture_seconds", "From a request's arrival to its first picture.", ["model"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.documents = Counter("diptych_documents", "Documents by their end.", ["model", "end"], registry=self.registry)
        self.tokens = Counter("diptych_tokens", "Positions written, by what they hold.", ["model", "kind"], registry=self.registry)
        self.pictures = Counter("diptych_pictures", "Pictures drawn.", ["model"], registry=self.registry)
        self.rows = Histogram(
            "diptych_phase_documents", "Documents that a phase of text or pictures writes together.", ["model", "phase"],
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), registry=self.registry,
        )  # fmt: skip
        self.lost_lines = Counter("diptych_lost_log_lines", "Lines that the log could not take.", registry=self.registry)
        for name, about, ask in (
            ("diptych_waiting_documents", "Documents that wait for their turn.", waiting),
            ("diptych_running_documents", "Documents that are being written.", running),
        ):
            Gauge(name, about, registry=self.registry).set_function(ask)

    def text(self) -> bytes:
        return generate_latest(self.registry)
