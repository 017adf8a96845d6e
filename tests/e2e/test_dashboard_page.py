"""The dashboard's page in a real browser, on a real run and on histories that a run has left."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import browser_paths, open_browser
from commands import SMALL, Command, steps_done
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from waiting import wait_until

Start = Callable[..., Command]

pytestmark = [
    pytest.mark.skipif(browser_paths() is None, reason="no chromium and chromedriver on PATH to drive the page with"),
]

WAIT_S = 300.0
T0 = 1_700_000_000.0


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chrome]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def browser(chromium: Chrome) -> Iterator[Chrome]:
    """The module's browser without anything that an earlier test left in it."""
    chromium.switch_to.new_window("tab")
    yield chromium
    errors = [entry["message"] for entry in chromium.get_log("browser") if entry["source"] == "javascript"]
    chromium.close()
    chromium.switch_to.window(chromium.window_handles[0])
    assert errors == []


def text(browser: Chrome, name: str) -> str:
    return browser.find_element(By.ID, name).text


def shows(browser: Chrome, name: str, what: str, timeout_s: float = WAIT_S) -> None:
    """Wait until an element's text has `what` in it."""
    wait_until(lambda: what in text(browser, name), lambda: f"{what!r} in {name}: {text(browser, name)!r}", timeout_s)


def points(browser: Chrome, chart: str = "loss") -> int:
    """How many points the chart's last line has, as Bokeh drew them."""
    script = """
        const [, plot] = Object.entries(Bokeh.index.roots ?? Bokeh.index).find(([, view]) =>
          document.querySelector(arguments[0])?.contains(view.el)) ?? [];
        return plot ? Math.max(...plot.model.renderers.map((one) => one.data_source.data.y?.length ?? 0)) : 0;
    """
    found: int = browser.execute_script(script, f"#chart-{chart}")
    return found


def record(kind: str, time_s: float, **fields: Any) -> str:
    return json.dumps({"kind": kind, "time_s": time_s, **fields}) + "\n"


def lines_of_run(first: int, last: int) -> str:
    """History of a run from one step to another, a step a second."""
    text = "" if first > 1 else record(
        "run", T0, run_id="written-1", name="written", attempt=1, resumed_from_step=None, target="org/target",
        algorithm="dspark", block_size=2, reuse=1, total_steps=200, command="slipstream run written.yaml",
    )  # fmt: skip
    for step in range(first, last + 1):
        text += record(
            "step", T0 + step, step=step, total_steps=200, learning_rate=1e-3, samples=4, tokens=400,
            tokens_per_s=400.0, wait_s=0.5, step_s=1.0, wait_fraction=0.5,
            metrics={"loss": 3 / step, "tau_probabilistic": 2 - 1 / step, "accept_rate@0": 0.5, "accept_rate@1": 0.25},
        )  # fmt: skip
        text += record(
            "figures", T0 + step, phase="training", step=step, tokens_captured=400 * step, tokens_trained=400 * step,
            capture_tokens_per_s=400.0, resident_bytes=2**20, peak_bytes=2**21, capacity_bytes=2**25,
            targets=[{"index": 0, "state": "serving", "address": "10.0.0.7:5000", "message": ""}],
        )  # fmt: skip
    return text


class Served:
    """`slipstream dashboard` over a folder."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "trainer", "dashboard", str(folder), "--port", str(port), "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.place = json.loads(self.process.stdout.readline())
        self.url: str = self.place["url"]
        self.port = int(self.url.split(":")[2].partition("/")[0])

    def write(self, text: str) -> None:
        with (self.folder / "telemetry.jsonl").open("a") as file:
            file.write(text)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(WAIT_S)


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Served]:
    """A dashboard over a history of twenty steps that has just stopped growing."""
    folder = tmp_path / "written"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"run_id": "written-1", "attempt": 1, "identity": {}}))
    (folder / "telemetry.jsonl").write_text(lines_of_run(1, 20))
    served = Served(folder)
    yield served
    served.close()


def test_page_follows_a_run_and_steers_it(browser: Chrome, slipstream: Start, tmp_path: Path) -> None:
    output_dir = tmp_path / "slipstream-demo"
    command = slipstream("demo", "--steps", "4000", *SMALL, "trainer.checkpoint_every=1000", "target.max_replicas=3")
    published = output_dir / "dashboard.json"
    command.wait_until(published.exists)
    place = json.loads(published.read_text())
    assert published.stat().st_mode & 0o077 == 0, "the token is for this user alone"
    command.wait_until(lambda: steps_done(output_dir) >= 3)

    bare = place["url"].partition("#")[0]
    browser.get(bare)
    shows(browser, "state", "running")
    wait_until(lambda: points(browser) >= 3, "a curve")
    before = points(browser)
    wait_until(lambda: points(browser) >= before + 5, "the curve grows", WAIT_S)
    wait_until(lambda: int(text(browser, "n-step").replace(",", "")) >= before + 5, "the step counts", WAIT_S)
    assert "of 4,000" in text(browser, "n-total")

    assert not browser.find_element(By.ID, "more").is_displayed(), "no control without the token"
    browser.find_element(By.ID, "token").send_keys("wrong" + Keys.ENTER)
    shows(browser, "answer", "this token is wrong")
    assert not browser.find_element(By.ID, "more").is_displayed()

    browser.get("about:blank")
    browser.get(place["url"])
    wait_until(lambda: browser.find_element(By.ID, "more").is_displayed(), "the controls")
    assert place["token"] not in browser.current_url, "the token stays in no address"
    browser.find_element(By.ID, "more").click()
    shows(browser, "answer", "targets scaled from 1 to 2")
    wait_until(lambda: text(browser, "target-rows").count("serving") == 2, lambda: text(browser, "target-rows"), WAIT_S)
    shows(browser, "events", "targets scaled from 1 to 2")

    browser.find_element(By.ID, "pause").click()
    shows(browser, "state", "paused")
    browser.find_element(By.ID, "pause").click()
    shows(browser, "state", "running")

    browser.find_element(By.ID, "stop").click()
    dialog = browser.find_element(By.ID, "stop-dialog")
    wait_until(dialog.is_displayed, "asks first")
    dialog.find_element(By.CSS_SELECTOR, "[value=keep]").click()
    assert not dialog.is_displayed()
    browser.find_element(By.ID, "stop").click()
    dialog.find_element(By.CSS_SELECTOR, "[value=stop]").click()
    shows(browser, "state", "stopped")
    shows(browser, "notice", "slipstream demo --steps 4000")
    code, _ = command.result()
    assert code == 1
    command.assert_nothing_left()
    assert not published.exists()


def test_run_that_was_killed_opens_and_says_how_to_go_on(browser: Chrome, written: Served) -> None:
    browser.get(written.url)
    shows(browser, "state", "no longer running")
    shows(browser, "notice", "slipstream run written.yaml")
    wait_until(lambda: points(browser) == 20, "the whole curve")
    assert not browser.find_element(By.ID, "steer").is_displayed()


def test_finished_run_opens_without_controls(browser: Chrome, written: Served) -> None:
    for at_step, tau in ((0, 1.25), (10, 1.75), (15, 2.5)):
        written.write(record(
            "evaluation", T0 + 20, label=f"step_{at_step}", step=at_step, began_s=T0 + 19, num_samples=4,
            accepted_length=tau, interval=[tau - 0.1, tau + 0.1], accept_rate=[0.5, 0.25], lossless=True,
            domains={"math": {"accepted_length": tau + 1}, "code": {"accepted_length": tau}},
        ))  # fmt: skip
    written.write(record("end", T0 + 21, outcome="finished", message="the run is done"))
    browser.get(written.url)
    wait_until(
        lambda: points(browser, "decoded-positions") == points(browser, "domains") == 3, "decoded curves", WAIT_S
    )
    shows(browser, "n-tau", "2.50")
    legend = browser.find_element(By.CSS_SELECTOR, "#chart-domains .legend").text
    assert ("code 2.50" in legend, "math 3.50" in legend) == (True, True)
    shows(browser, "state", "finished")
    shows(browser, "notice", "Finished: 20 steps")
    assert not browser.find_element(By.ID, "steer").is_displayed()
    shows(browser, "events", "the run is done")


def test_page_reconnects_to_a_restarted_dashboard_and_shows_the_whole_curve(browser: Chrome, written: Served) -> None:
    browser.get(written.url)
    wait_until(lambda: points(browser) == 20, "the first curve")
    written.close()
    written.write(lines_of_run(21, 30))
    again = Served(written.folder, written.port)
    wait_until(lambda: points(browser) == 30, "what came in between", WAIT_S)
    again.write(lines_of_run(31, 35))
    wait_until(lambda: points(browser) == 35, "what comes now", WAIT_S)
    again.close()


def test_page_works_with_the_keyboard_and_reads_aloud(browser: Chrome, written: Served) -> None:
    browser.get(written.url)
    wait_until(lambda: points(browser) == 20, "a curve")
    plot = browser.find_element(By.CSS_SELECTOR, "#chart-loss [role=img]")
    assert "Chart of loss. mean of 20 steps: 3.000 at first" in (plot.get_attribute("aria-label") or "")
    assert "no longer running" in (browser.find_element(By.ID, "live").get_attribute("textContent") or "")
    for _ in range(60):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        focused = browser.switch_to.active_element
        if focused.tag_name == "summary":
            break
    assert focused.value_of_css_property("outline-style") == "solid", "what has the focus is seen"
    focused.send_keys(Keys.ENTER)
    rows = "#chart-accepted table tbody tr"
    wait_until(lambda: len(browser.find_elements(By.CSS_SELECTOR, rows)) == 12, "a table in place of the chart")
    assert "expected, in training" in browser.find_element(By.CSS_SELECTOR, "#chart-accepted table").text


@pytest.mark.parametrize("width", [390, 1440])
def test_page_fits_its_window(browser: Chrome, written: Served, width: int) -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(written.url)
    wait_until(lambda: points(browser, "accepted") == 20, "a curve")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_mouse_chooses_a_part_of_the_axis_and_a_double_click_shows_all(browser: Chrome, written: Served) -> None:
    browser.get(written.url)
    wait_until(lambda: points(browser, "accepted") == 20, "a curve")
    plot = browser.find_element(By.CSS_SELECTOR, "#chart-accepted .plot")
    drag = ActionChains(browser).move_to_element(plot).click_and_hold().move_by_offset(plot.size["width"] // 4, 0)
    drag.release().perform()
    wait_until(lambda: 4 <= points(browser, "loss") <= 8, lambda: f"{points(browser, 'loss')} steps in a quarter")
    ActionChains(browser).double_click(plot).perform()
    wait_until(lambda: points(browser, "loss") == 20, "the whole run")


def test_theme_can_be_switched_and_is_kept(browser: Chrome, written: Served) -> None:
    browser.get(written.url)
    ground = "return getComputedStyle(document.body).backgroundColor"
    before = browser.execute_script(ground)
    browser.find_element(By.ID, "theme").click()
    after = browser.execute_script(ground)
    assert after != before
    browser.refresh()
    assert browser.execute_script(ground) == after
