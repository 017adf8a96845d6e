"""A run's Prometheus metrics, scraped where Ray serves its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from waiting import wait_until

REPORT_MS = 500

DRIVER = f"""
import sys
import ray
from services.views.prometheus import PrometheusSink
from trainer.cluster import start_local_ray

start_local_ray(num_cpus=1, object_store_memory=80 * 1024**2,
                _system_config={{"metrics_report_interval_ms": {REPORT_MS}}})
step = {{
    "kind": "step", "time_s": 1.0, "total_steps": 20, "learning_rate": 0.5, "tokens_per_s": 1200.0, "wait_s": 0.0,
    "step_s": 0.25, "wait_fraction": 0.125,
}}
figures = {{
    "kind": "figures", "time_s": 1.0, "capture_tokens_per_s": 900.0, "resident_bytes": 4096, "peak_bytes": 8192,
    "capacity_bytes": 16384,
}}
runs = [PrometheusSink("demo-1"), PrometheusSink("demo-2")]
for number, sink in enumerate(runs, start=1):
    metrics = {{"loss": 2.5 * number, "tau_probabilistic": 1.75, "accept_rate@0": 0.5, "accept_rate@1": 0.25}}
    sink.take(step | {{"step": 7 * number, "metrics": metrics}})
    for tokens, state in ((1000, "loading"), (3000 * number, "serving")):
        targets = [{{"index": 0, "state": state}}, {{"index": 1, "state": state}}]
        sink.take(figures | {{"tokens_captured": tokens, "tokens_trained": tokens // 2, "targets": targets}})
    for at_step, accepted in ((5, 2.25), (0, 1.25)):
        domains = {{"math": {{"accepted_length": accepted + 1}}, "code": {{"accepted_length": None}}}}
        sink.take({{"kind": "evaluation", "step": at_step, "accepted_length": accepted, "accept_rate": [0.75, accepted],
                   "domains": domains}})
    for _ in range(number):
        sink.take({{"kind": "event", "event": "target", "message": "target 1 died"}})
runs[1].take({{"kind": "end", "outcome": "finished", "message": ""}})
runs[1].close()
(node,) = ray.nodes()
print(node["NodeManagerAddress"], node["MetricsExportPort"], flush=True)
sys.stdin.read()
"""

EXPECTED = {
    "step": (7, 14),
    "total_steps": (20, 20),
    "loss": (2.5, 5.0),
    "expected_accepted_length": (1.75, 1.75),
    "accepted_length": (2.25, 2.25),
    "learning_rate": (0.5, 0.5),
    "step_seconds": (0.25, 0.25),
    "trainer_wait_fraction": (0.125, 0.125),
    "train_tokens_per_second": (1200, 1200),
    "capture_tokens_per_second": (900, 900),
    "buffer_bytes": (4096, 4096),
    "buffer_peak_bytes": (8192, 8192),
    "buffer_capacity_bytes": (16384, 16384),
    "running": (1, 0),
    "tokens_captured_total": (3000, 6000),
    "tokens_trained_total": (1500, 3000),
    "accept_rate/0": (0.5, 0.5),
    "accept_rate/1": (0.25, 0.25),
    "decoded_accept_rate/0": (0.75, 0.75),
    "decoded_accept_rate/1": (2.25, 2.25),
    "domain_accepted_length/math": (3.25, 3.25),
    "targets/loading": (0, 0),
    "targets/serving": (2, 2),
    "events_total/target": (1, 2),
}


def scrape(url: str) -> dict[tuple[str, str], float]:
    """Value of each of our metrics by name (with the further tag, if there is one) and run."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_slipstream_"):
                more = [sample.labels[tag] for tag in ("position", "state", "event", "domain") if tag in sample.labels]
                name = "/".join([sample.name.removeprefix("ray_slipstream_"), *more])
                values[name, sample.labels["run"]] = sample.value
    return values


def test_ray_serves_the_figures_of_each_run(tmp_path: Path) -> None:
    """In a process of its own: how often Ray exports metrics is set once a process, when Ray starts."""
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "HOME": str(tmp_path)},
    ) as driver:
        try:
            assert driver.stdout is not None
            host, port = driver.stdout.readline().split()
            wanted = {
                (name, run): value
                for name, of in EXPECTED.items()
                for run, value in zip(("demo-1", "demo-2"), of, strict=True)
            }
            seen: dict[tuple[str, str], float] = {}

            def is_complete() -> bool:
                with contextlib.suppress(OSError):  # what serves them may still start
                    seen.update(scrape(f"http://{host}:{port}/metrics"))
                return seen == wanted

            wait_until(is_complete, lambda: f"{seen} is not {wanted}")
        finally:
            driver.communicate("")
