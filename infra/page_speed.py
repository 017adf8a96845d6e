"""How fast the dashboard's page is on an hour of history: 10,000 points in each of its series.

    .venv/bin/python infra/page_speed.py [--json]

Loads the page several times in headless Chromium, from the click to the last chart in the window drawn, then lets the
run go on at ten steps a second and counts the time in which the page could not have answered.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

from browser import open_browser
from selenium.webdriver import Chrome

ROOT = Path(__file__).parents[1]
NUM_STEPS = 10_000
NUM_LOADS = 7
LIVE_S = 10.0
STEPS_PER_S = 10

# Runs before the page's own scripts.
WATCH = """
const drawn = () => [...document.querySelectorAll(".chart")];
new MutationObserver(() => {
  const seen = drawn().filter((chart) => chart.getBoundingClientRect().top < innerHeight);
  if (seen.length && seen.every((chart) => chart.dataset.drawn)) window.drawnMs ??= performance.now();
}).observe(document, { subtree: true, childList: true, attributes: true, attributeFilter: ["data-drawn"] });
window.blockedMs = [];
new PerformanceObserver((list) => window.blockedMs.push(...list.getEntries().map((entry) => entry.duration)))
  .observe({ type: "longtask" });
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output_dir = Path(folder)
        (output_dir / "run.json").write_text(json.dumps({"run_id": "hour-1", "attempt": 1, "identity": {}}))
        with (output_dir / "telemetry.jsonl").open("w") as history:
            start_s = time.time() - 3600
            write(history, "run", start_s, run_id="hour-1", name="hour", attempt=1, total_steps=2 * NUM_STEPS)
            for step in range(1, NUM_STEPS + 1):
                write_step(history, step, start_s + step * 3600 / NUM_STEPS)
            history.flush()
            figures = measure(output_dir, history)
    if arguments.json:
        print(json.dumps(figures))
        return
    print(f"{figures['points_per_series']:,} points in each of {figures['series']} series, {figures['cores']} cores")
    print(f"from click to drawn: median {figures['load_s']:.2f} s, slowest {figures['slowest_load_s']:.2f} s")
    print(f"at {STEPS_PER_S} steps a second: blocked {figures['blocked_part']:.1%} of the time in tasks over 50 ms")


def measure(output_dir: Path, history: TextIO) -> dict[str, Any]:
    """Serve the history and drive its page."""
    command = [sys.executable, "-m", "trainer", "dashboard", str(output_dir), "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        url = json.loads(served.stdout.readline())["url"]
        with open_browser() as browser:
            browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
            loads_s = [load(browser, url) for _ in range(NUM_LOADS + 1)][1:]  # the first one starts the browser's parts
            browser.execute_script("window.blockedMs.length = 0")
            began_s = time.monotonic()
            for step in range(NUM_STEPS + 1, NUM_STEPS + 1 + int(LIVE_S * STEPS_PER_S)):
                write_step(history, step, time.time())
                history.flush()
                time.sleep(1 / STEPS_PER_S)
            took_s = time.monotonic() - began_s
            blocked_ms = browser.execute_script("return window.blockedMs")
            names = browser.execute_script("return fetch('api/history').then((a) => a.json()).then((p) => p.series)")
        served.terminate()
    return {
        "points_per_series": NUM_STEPS,
        "series": len(names),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "load_s": statistics.median(loads_s),
        "slowest_load_s": max(loads_s),
        "blocked_part": sum(blocked_ms) / 1000 / took_s,
        "longest_block_s": max(blocked_ms, default=0) / 1000,
    }


def load(browser: Chrome, url: str) -> float:
    """Seconds from the click until every chart in the window is drawn."""
    browser.get("about:blank")
    browser.get(url)
    deadline_s = time.monotonic() + 30
    while (drawn_ms := browser.execute_script("return window.drawnMs")) is None:
        if time.monotonic() > deadline_s:
            sys.exit(f"the charts are not drawn after 30 s: {browser.get_log('browser')}")
        time.sleep(0.02)
    return float(drawn_ms) / 1000


def write(history: TextIO, kind: str, time_s: float, **fields: Any) -> None:
    """Append one record."""
    history.write(json.dumps({"kind": kind, "time_s": time_s, **fields}) + "\n")


def write_step(history: TextIO, step: int, time_s: float) -> None:
    """Append one step and the figures that belong to it: noisy, as real ones are."""
    part = step / NUM_STEPS
    noise = random.Random(step).gauss
    metrics = {f"accept_rate@{k}": (0.9 - 0.06 * k) * (1 - math.exp(-6 * part)) + noise(0, 0.03) for k in range(7)}
    metrics |= {"loss": 0.8 + 2 * math.exp(-8 * part) + noise(0, 0.1)}
    metrics |= {"tau_probabilistic": 1 + 2.6 * (1 - math.exp(-5 * part)) + noise(0, 0.3)}
    rates = {"tokens_per_s": 11_000 + noise(0, 500), "wait_s": abs(noise(0.02, 0.01)), "step_s": 0.36}
    fields = {"metrics": metrics, "learning_rate": 6e-4 * (1 - part / 2), "samples": 4, "tokens": 4000, **rates}
    write(history, "step", time_s, step=step, total_steps=2 * NUM_STEPS, wait_fraction=0.05, **fields)
    capacity = 4 * 1024**3
    bytes_ = {"resident_bytes": int(capacity * (0.5 + 0.4 * math.sin(9 * part))), "peak_bytes": capacity}
    tokens = {"tokens_captured": 4100 * step, "tokens_trained": 4000 * step}
    target = {"index": 0, "state": "serving", "address": "10.0.0.1:5000", "message": ""}
    rates = {"capture_tokens_per_s": 11_000 + noise(0, 2000), "capacity_bytes": capacity}
    write(history, "figures", time_s, phase="training", step=step, targets=[target], **bytes_, **tokens, **rates)


if __name__ == "__main__":
    main()
