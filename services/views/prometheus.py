"""Prometheus metrics of a run, on the path where Ray serves its own.

Every node of a Ray cluster has a metrics port (`ray.nodes()`: `MetricsExportPort`); Ray puts `ray_` before each name
and `_total` behind counters. The tag `run` tells runs of one cluster apart.
"""

from __future__ import annotations

from collections import Counter as Tally
from typing import Any

from ray.util.metrics import Counter, Gauge

RUN = "run"

GAUGES = {
    "step": "optimizer steps done",
    "total_steps": "optimizer steps of the whole run",
    "loss": "loss of the newest step",
    "expected_accepted_length": "teacher-forced estimate of the accepted length, newest step",
    "accepted_length": "decoded accepted length (bonus token included) of the newest checkpoint that was measured",
    "learning_rate": "learning rate of the newest step",
    "step_seconds": "duration of the newest step, waiting included",
    "trainer_wait_fraction": "part of the trainer's time that it waited for the buffer",
    "train_tokens_per_second": "tokens trained a second in the newest step",
    "capture_tokens_per_second": "tokens captured a second, lately",
    "buffer_bytes": "feature bytes in the replay buffer, captures in flight included",
    "buffer_peak_bytes": "most feature bytes that were in the replay buffer at once",
    "buffer_capacity_bytes": "bound of the replay buffer",
    "running": "1 while the run's driver is at work, 0 at its end",
}

COUNTERS = {
    "tokens_captured": "tokens that targets have run forward and streamed",
    "tokens_trained": "tokens trained on",
}


class PrometheusSink:
    """Sets Ray metrics from a run's records. Ray must be initialized in this process.

    Args:
        run_id: The value of the tag `run`.
    """

    def __init__(self, run_id: str) -> None:
        self._tags = {RUN: run_id}
        self._gauges = {name: Gauge(f"slipstream_{name}", text, (RUN,)) for name, text in GAUGES.items()}
        self._counters = {name: Counter(f"slipstream_{name}", text, (RUN,)) for name, text in COUNTERS.items()}
        self._accept_rate = Gauge(
            "slipstream_accept_rate", "acceptance by position in the draft, newest step", (RUN, "position")
        )
        self._decoded_accept_rate = Gauge(
            "slipstream_decoded_accept_rate",
            "decoded acceptance by position in the draft, newest checkpoint that was measured",
            (RUN, "position"),
        )
        self._domains = Gauge(
            "slipstream_domain_accepted_length", "decoded accepted length by domain of the prompts", (RUN, "domain")
        )
        self._measured_step = -1
        self._targets = Gauge("slipstream_targets", "targets by what they do", (RUN, "state"))
        self._events = Counter("slipstream_events", "restarts, scalings and other events", (RUN, "event"))
        self._counted: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        self._states: set[str] = set()
        self._set("running", 1)

    def take(self, record: dict[str, Any]) -> None:
        """Bring the metrics up to a record."""
        match record["kind"]:
            case "step":
                self._take_step(record)
            case "figures":
                self._take_figures(record)
            case "evaluation":
                self._take_evaluation(record)
            case "event":
                self._events.inc(1, {**self._tags, "event": record["event"]})

    def close(self) -> None:
        """Say that the run's driver is no longer at work."""
        self._set("running", 0)

    def _take_step(self, record: dict[str, Any]) -> None:
        metrics = record["metrics"]
        self._set("step", record["step"])
        self._set("total_steps", record["total_steps"])
        self._set("learning_rate", record["learning_rate"])
        self._set("step_seconds", record["step_s"])
        self._set("train_tokens_per_second", record["tokens_per_s"])
        if record["wait_fraction"] is not None:
            self._set("trainer_wait_fraction", record["wait_fraction"])
        if "loss" in metrics:  # a step of padding alone has none
            self._set("loss", metrics["loss"])
        if "tau_probabilistic" in metrics:
            self._set("expected_accepted_length", metrics["tau_probabilistic"])
        for name, value in metrics.items():
            measure, _, position = name.partition("@")
            if measure == "accept_rate" and position:
                self._accept_rate.set(value, {**self._tags, "position": position})

    def _take_figures(self, record: dict[str, Any]) -> None:
        self._set("capture_tokens_per_second", record["capture_tokens_per_s"])
        self._set("buffer_bytes", record["resident_bytes"])
        self._set("buffer_peak_bytes", record["peak_bytes"])
        self._set("buffer_capacity_bytes", record["capacity_bytes"])
        for name, counter in self._counters.items():
            if record[name] > self._counted[name]:
                counter.inc(record[name] - self._counted[name], self._tags)
                self._counted[name] = record[name]
        states = Tally(target["state"] for target in record["targets"])
        self._states |= states.keys()
        for state in self._states:  # a state that nobody is in any more goes back to 0
            self._targets.set(states[state], {**self._tags, "state": state})

    def _take_evaluation(self, record: dict[str, Any]) -> None:
        if record["step"] < self._measured_step:  # the untrained drafter is measured once more at the end
            return
        self._measured_step = record["step"]
        self._set("accepted_length", record["accepted_length"])
        for position, rate in enumerate(record["accept_rate"]):
            self._decoded_accept_rate.set(rate, {**self._tags, "position": str(position)})
        for domain, figures in record["domains"].items():
            if figures["accepted_length"] is not None:
                self._domains.set(figures["accepted_length"], {**self._tags, "domain": domain})

    def _set(self, name: str, value: float) -> None:
        self._gauges[name].set(value, self._tags)
