"""TensorBoard event files of a run, one series for each figure. Needs neither torch nor TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.contracts import ALL_DOMAINS

FLUSH_S = 5
"""How long a figure may wait in memory."""

QUEUE_EVENTS = 10_000
"""Events that may wait for a slow disk before the driver does."""

METRIC_NAMES = {"tau_probabilistic": "expected_accepted_length"}
"""Metrics of the drafters under the names they have everywhere else."""


class TensorBoardSink:
    """Writes a run's records as TensorBoard scalars, and its events as texts.

    A resumed run appends a file; what the attempt before wrote beyond its last checkpoint is hidden by TensorBoard.

    Args:
        folder: Where the event files go; created if need be.
    """

    def __init__(self, folder: Path) -> None:
        # Quick to import; still only a driver pays for it.
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder), max_queue_size=QUEUE_EVENTS, flush_secs=FLUSH_S)
        self._step = 0

    def take(self, record: dict[str, Any]) -> None:
        """Write what of a record is a figure over steps, or an event."""
        match record["kind"]:
            case "run":
                self._begin(record)
            case "event":
                self._write_text("events", f"{record['event']}: {record['message']}", record["time_s"])
            case "step" | "figures" | "evaluation":
                self._step = max(self._step, record["step"])
                # Figures before the first step of a resumed run count on from its checkpoint.
                step = record["step"] if record["kind"] == "evaluation" else self._step
                self._write_scalars(dict(scalars(record)), step, record["time_s"])

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()

    def _begin(self, record: dict[str, Any]) -> None:
        """Tell readers that steps after the checkpoint are done anew."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        resumed_from_step = record["resumed_from_step"]
        if resumed_from_step is None:
            return
        self._step = resumed_from_step
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=record["time_s"], step=resumed_from_step + 1, session_log=start))

    def _write_scalars(self, values: dict[str, float], step: int, time_s: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._writer.add_event(Event(wall_time=time_s, step=step, summary=summary))

    def _write_text(self, tag: str, text: str, time_s: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        value = Summary.Value(
            tag=tag,
            metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text")),
            tensor=TensorProto(dtype=DT_STRING, string_val=[text.encode()]),
        )
        self._writer.add_event(Event(wall_time=time_s, step=self._step, summary=Summary(value=[value])))


def scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Tag and value of each figure in a `step`, `figures` or `evaluation` record.

    Positions in a draft count from 0: `train/accept_rate/0` is the first drafted token after the anchor.
    """
    if record["kind"] == "step":
        for name, value in record["metrics"].items():
            yield f"train/{METRIC_NAMES.get(name, name).replace('@', '/')}", value
        yield "train/learning_rate", record["learning_rate"]
        yield "throughput/train_tokens_per_s", record["tokens_per_s"]
        yield "throughput/step_s", record["step_s"]
        yield "throughput/wait_s", record["wait_s"]
        if record["wait_fraction"] is not None:
            yield "throughput/wait_fraction", record["wait_fraction"]
    elif record["kind"] == "figures":
        yield "throughput/capture_tokens_per_s", record["capture_tokens_per_s"]
        yield "throughput/tokens_captured", record["tokens_captured"]
        yield "throughput/tokens_trained", record["tokens_trained"]
        yield "buffer/resident_bytes", record["resident_bytes"]
        yield "buffer/peak_bytes", record["peak_bytes"]
        yield "buffer/capacity_bytes", record["capacity_bytes"]
        yield "targets/serving", sum(target["state"] == "serving" for target in record["targets"])
    elif record["kind"] == "evaluation":
        yield "eval/accepted_length", record["accepted_length"]
        low, high = record["interval"]
        yield "eval/accepted_length_low", low
        yield "eval/accepted_length_high", high
        for position, rate in enumerate(record["accept_rate"]):
            yield f"eval/accept_rate/{position}", rate
        for position, rate in enumerate(record["cond_accept_rate"]):
            if rate is not None:
                yield f"eval/cond_accept_rate/{position}", rate
        for domain, figures in record["domains"].items():
            if domain != ALL_DOMAINS and figures["accepted_length"] is not None:
                yield f"eval/domains/{domain}/accepted_length", figures["accepted_length"]
                for position, rate in enumerate(figures["accept_rate"]):
                    yield f"eval/domains/{domain}/accept_rate/{position}", rate
