"""Takes the pictures of the dashboard for docs/images: `make screenshots ARGS="slipstream-demo"`.

The page is shown as it stood in the middle of the run: the history is copied up to a step, and the copy's own end
brought to the present, so that the run counts as running.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from browser import open_browser
from PIL import Image
from selenium.webdriver import Chrome

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"

PICTURES = (("light", 1440, 1190), ("dark", 1440, 1190), ("phone", 390, 1600))
MOST_BYTES = 250_000
DRAWN_TIMEOUT_S = 20.0


def main() -> None:
    """Serve a part of a run's history and photograph its page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path, nargs="?", default=Path("slipstream-demo"))
    parser.add_argument("--part", type=float, default=0.7, help="how much of the run is over on the pictures")
    arguments = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        output_dir = Path(folder) / arguments.output_dir.resolve().name
        output_dir.mkdir()
        copy_part(arguments.output_dir / "telemetry.jsonl", output_dir / "telemetry.jsonl", arguments.part)
        (output_dir / "run.json").write_text((arguments.output_dir / "run.json").read_text())
        command = [sys.executable, "-m", "trainer", "dashboard", str(output_dir), "--json"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as served:
            assert served.stdout is not None
            url = json.loads(served.stdout.readline())["url"]
            try:
                for name, width, height in PICTURES:
                    scheme = "dark" if name == "dark" else "light"
                    photograph(url, IMAGES / f"dashboard-{name}.png", width, height, scheme)
            finally:
                served.terminate()


def copy_part(source: Path, target: Path, part: float) -> None:
    """Copy a history up to a part of its steps, as if the run were there just now."""
    records = [json.loads(line) for line in source.read_text().splitlines()]
    last_step = round(part * max(record["step"] for record in records if record["kind"] == "step"))
    end = next(place for place, record in enumerate(records) if record.get("step", 0) > last_step)
    kept = [record for record in records[:end] if record["kind"] != "end"]
    late_s = time.time() - kept[-1]["time_s"]
    for record in kept:
        record["time_s"] += late_s
        if record["kind"] == "run":
            record |= {"host": socket.gethostname(), "pid": os.getpid()}
    target.write_text("".join(json.dumps(record) + "\n" for record in kept))


def photograph(url: str, path: Path, width: int, height: int, scheme: str) -> None:
    """Save what a window of this size shows."""
    with open_browser(width, height) as browser:
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        browser.get(url)
        wait_drawn(browser)
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png()))
    picture.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    size = path.stat().st_size
    print(f"{path.relative_to(ROOT)}: {size / 1000:.0f} kB")
    if size > MOST_BYTES:
        sys.exit(f"{path} has {size} bytes; at most {MOST_BYTES} go into the repository")


def wait_drawn(browser: Chrome) -> None:
    """Wait until every chart in the window is drawn, and a moment more for what follows."""
    script = """return [...document.querySelectorAll(".chart")].every((chart) =>
        chart.dataset.drawn || chart.getBoundingClientRect().top > innerHeight)"""
    deadline_s = time.monotonic() + DRAWN_TIMEOUT_S
    while not browser.execute_script(script):
        if time.monotonic() > deadline_s:
            sys.exit(f"the charts are not drawn after {DRAWN_TIMEOUT_S:g} s: {browser.get_log('browser')}")
        time.sleep(0.05)
    time.sleep(1.0)


if __name__ == "__main__":
    main()
