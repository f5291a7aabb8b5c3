"""What the server counts, as Prometheus reads it. Knows numbers; of questions only how many there were."""

import threading
from collections import Counter

BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Seconds."""
_HELP = {
    "a3tune_requests_total": ("counter", "Chat completions by HTTP status; 499: the client went away."),
    "a3tune_tokens_total": ("counter", "Tokens read and written."),
    "a3tune_batches_total": ("counter", "Batches asked."),
    "a3tune_batched_total": ("counter", "Questions in them."),
    "a3tune_busy_seconds_total": ("counter", "Time in which a model worked."),
    "a3tune_open_requests": ("gauge", "Chat completions that are read, wait or are answered."),
    "a3tune_open_requests_limit": ("gauge", "Most of them; further ones get 429."),
    "a3tune_wait_seconds": ("histogram", "Time between a question and its batch."),
    "a3tune_request_seconds": ("histogram", "Time between a request and its last byte."),
}


class Metrics:
    """Counters; any thread may count."""

    def __init__(self, limit: int) -> None:
        self._lock = threading.Lock()
        self._values: Counter[tuple[str, str]] = Counter()
        self._values["a3tune_open_requests_limit", ""] = limit
        self._values["a3tune_open_requests", ""] = 0

    def opened(self, by: int) -> None:
        self._add(("a3tune_open_requests", "", by))

    def request(self, status: int, seconds: float) -> None:
        self._add(("a3tune_requests_total", f'status="{status}"', 1), *_observed("a3tune_request_seconds", seconds))

    def waited(self, seconds: float) -> None:
        self._add(*_observed("a3tune_wait_seconds", seconds))

    def tokens(self, prompt: int, answer: int) -> None:
        self._add(
            ("a3tune_tokens_total", 'kind="prompt"', prompt),
            ("a3tune_tokens_total", 'kind="answer"', answer),
        )

    def batch(self, size: int, seconds: float) -> None:
        self._add(
            ("a3tune_batches_total", "", 1),
            ("a3tune_batched_total", "", size),
            ("a3tune_busy_seconds_total", "", seconds),
        )

    def text(self) -> str:
        """In Prometheus' text format."""
        with self._lock:
            values = dict(self._values)
        lines = []
        for name, (kind, about) in _HELP.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            for (series, labels), value in values.items():
                if series in (name, f"{name}_bucket", f"{name}_sum", f"{name}_count"):
                    lines.append(f"{series}{{{labels}}} {value:g}" if labels else f"{series} {value:g}")
        return "\n".join(lines) + "\n"

    def _add(self, *counts: tuple[str, str, float]) -> None:
        with self._lock:
            for name, labels, count in counts:
                self._values[name, labels] += count  # type: ignore[assignment]  (seconds are counted, too)


def _observed(name: str, seconds: float) -> list[tuple[str, str, float]]:
    buckets = [(f"{name}_bucket", f'le="{most:g}"', float(seconds <= most)) for most in BUCKETS]
    return [*buckets, (f"{name}_bucket", 'le="+Inf"', 1), (f"{name}_sum", "", seconds), (f"{name}_count", "", 1)]
