// Puts the page together: one picture of the run at first, then updates, each drawn at most twice a second.

import { Charts } from "./charts.js";
import { Controls, token } from "./controls.js";
import { bytes, duration, percent, rate, scientific, whole } from "./format.js";
import { follow } from "./stream.js";

const DRAW_EVERY_MS = 500;
const MOST_LIVE_ROWS = 1500; // more than these on top of the decimated history, and it is fetched anew

const STATES = {
  empty: "nothing yet", starting: "starting", running: "running", paused: "paused", stopping: "stopping", finished: "finished",
  stopped: "stopped", failed: "failed", silent: "no longer running",
};

const by = (id) => document.getElementById(id);
const page = {
  series: {}, events: [], evaluations: [], status: null, axis: "step", part: 0, zoom: null, finer: null,
  liveRows: 0, isUp: true, drawnMs: -Infinity, stop: null,
};
let charts;
let controls;

const picture = (query) => fetch(`api/history?axis=${query}`, { headers: token.headers(), cache: "no-store" });

async function load() {
  const answer = await (window.firstPicture ?? picture("step"));
  window.firstPicture = null;
  if (answer.status === 401) {
    page.isRefused = true;
    by("steer").hidden = by("token-form").hidden = false;
    notice((await answer.json()).detail, "bad");
    return;
  }
  const { id, status, series, events, evaluations } = await answer.json();
  Object.assign(page, { series, events, evaluations, liveRows: 0 });
  show(status);
  draw();
  page.stop?.();
  page.stop = follow({ lastId: id, headers: token.headers, onUpdate: take, onReset: load, onConnection: connection });
}

function take({ series = {}, events = [], evaluations = [], status }) {
  for (const [name, added] of Object.entries(series)) {
    const known = (page.series[name] ??= { step: [], elapsed_s: [], value: [] });
    for (const column of Object.keys(known)) known[column].push(...added[column]);
    if (name === "learning_rate") page.liveRows += added.value.length;
  }
  page.events.push(...events);
  for (const found of evaluations) {
    page.evaluations = [...page.evaluations.filter((other) => other.step !== found.step), found].sort((a, b) => a.step - b.step);
  }
  show(status);
  if (page.liveRows > MOST_LIVE_ROWS) load();
  else if (Object.keys(series).length || events.length || evaluations.length) scheduleDraw();
}

function connection(isUp) {
  page.isUp = isUp;
  show(page.status);
}

function scheduleDraw() {
  if (page.drawing) return;
  const waitMs = Math.max(0, page.drawnMs + DRAW_EVERY_MS - performance.now());
  page.drawing = setTimeout(() => requestAnimationFrame(draw), waitMs);
}

/** The part of the axis on display, in steps or seconds. */
function limits() {
  const most = Math.max(page.status?.[page.axis === "step" ? "step" : "elapsed_s"] ?? 0, 1);
  if (page.zoom) return [Math.max(0, page.zoom[0]), Math.min(most, page.zoom[1])];
  return [page.part ? most * (1 - page.part) : 0, most];
}

function draw() {
  page.drawing = null;
  page.drawnMs = performance.now();
  const [low, high] = limits();
  const series = page.finer && page.zoom ? page.finer : page.series;
  charts.update({ series, axis: page.axis, low, high, evaluations: page.evaluations, events: page.events });
}

/** Shows a part of the axis with all the detail that the history has there. */
async function zoom(low, high) {
  page.finer = null;
  page.zoom = Number.isFinite(low) ? [low, high] : null;
  if (!page.zoom) page.part = 0;
  press("span", page.zoom ? null : String(page.part));
  draw();
  if (!page.zoom) return;
  const wanted = page.zoom;
  const answer = await picture(`${page.axis}&low=${low}&high=${high}`);
  if (!answer.ok || page.zoom !== wanted) return;
  page.finer = (await answer.json()).series;
  draw();
}

function press(kind, value) {
  for (const button of document.querySelectorAll(`[data-${kind}]`)) {
    button.setAttribute("aria-pressed", String(button.dataset[kind] === value));
  }
}

const text = (id, value) => {
  const found = by(id);
  if (found.textContent !== value) found.textContent = value;
};
const orDash = (value, format) => (value === null || value === undefined ? "–" : format(value));

function show(status) {
  if (!status) return;
  const before = page.status;
  page.status = status;
  const state = page.isUp || !status.is_live ? status.state : "lost";
  const word = state === "lost" ? "connection lost" : STATES[state];
  by("state").dataset.state = state;
  text("state", word);
  text("run-name", status.run_id);
  if (!before || before.state !== status.state || page.shown !== word) {
    text("live", `Run ${status.run_id} is ${word}. ${status.is_live ? "" : status.explanation}`);
  }
  page.shown = word;
  showNotice(status, state);
  showNumbers(status);
  showFlow(status);
  showTargets(status);
  showEvents(status);
  showAbout(status);
  controls.update(status);
  const done = status.total_steps ? status.step / status.total_steps : 0;
  document.title = `${status.is_live ? percent(done) : word} · ${status.run_id} · Slipstream`;
}

function notice(message, tone = "warn") {
  by("notice").hidden = !message;
  by("notice").dataset.tone = tone;
  text("notice", message);
}

function showNotice(status, state) {
  if (state === "lost") {
    notice(`The dashboard does not answer; trying again. If it has ended: slipstream dashboard ${status.output_dir}`);
  } else if (["failed", "silent"].includes(state)) notice(status.explanation, "bad");
  else if (state === "stopped") notice(status.explanation);
  else if (state === "finished") notice(finished(status), "good");
  else notice("");
}

function finished(status) {
  const tau = status.tau_last
    ? ` Decoded τ went from ${status.tau_first.accepted_length.toFixed(2)} to ${status.tau_last.accepted_length.toFixed(2)}.` : "";
  const closed = page.isUp ? "" : ` This page's dashboard has ended; open it again with slipstream dashboard ${status.output_dir}`;
  return `Finished: ${whole(status.step)} steps in ${duration(status.elapsed_s)}.${tau}${closed}`;
}

function showNumbers(status) {
  const done = status.total_steps ? Math.min(1, status.step / status.total_steps) : 0;
  text("n-step", whole(status.step));
  text("n-total", status.total_steps ? `of ${whole(status.total_steps)}` : "");
  by("progress").setAttribute("aria-valuenow", Math.floor(100 * done));
  by("progress").setAttribute("aria-valuetext", `step ${status.step} of ${status.total_steps ?? "?"}`);
  by("progress").firstElementChild.style.width = `${100 * done}%`;
  text("n-phase", status.is_live && !["paused", "stopping"].includes(status.state) ? status.phase : "");
  text("n-expected", orDash(status.expected, (value) => value.toFixed(2)));
  const { tau_first: first, tau_last: last } = status;
  const interval = (found) => `${found.interval.map((value) => value.toFixed(2)).join(" – ")}`;
  by("n-tau").replaceChildren();
  if (first && last) {
    by("n-tau").append(Object.assign(document.createElement("small"), { textContent: `${first.accepted_length.toFixed(2)} → ` }),
      last.accepted_length.toFixed(2));
    text("n-tau-note", `×${(last.accepted_length / first.accepted_length).toFixed(2)} · 95 %: ${interval(last)}`);
  } else if (first) {
    by("n-tau").append(first.accepted_length.toFixed(2));
    text("n-tau-note", `before · 95 %: ${interval(first)}`);
  } else by("n-tau").append("–");
  text("n-loss", orDash(status.loss, (value) => value.toFixed(3)));
  text("n-loss-note", status.learning_rate === null ? "" : `learning rate ${scientific(status.learning_rate)}`);
  text("n-left-title", status.is_live ? "Time left" : "Time taken");
  text("n-left", status.is_live ? orDash(status.left_s, duration) : duration(status.elapsed_s));
  text("n-left-note", status.is_live ? `${duration(status.elapsed_s)} so far` : status.tokens_trained === null ? "" : `${whole(status.tokens_trained)} tokens trained`);
}

function showFlow(status) {
  const { bottleneck } = status;
  document.querySelector(".flow").hidden = !status.is_live;
  text("f-capture", orDash(status.capture_tokens_per_s, rate));
  const serving = status.targets.filter((target) => target.state === "serving").length;
  const others = status.targets.length - serving;
  const own = status.autoscaling;
  const autoscaled = own ? (own.is_on ? `, autoscaled ${own.min} to ${own.max}` : ", autoscaling suspended") : "";
  text("f-targets", status.targets.length ? `${serving} ${serving === 1 ? "target serves" : "targets serve"}${others ? `, ${others} not` : ""}${autoscaled}` : "");
  const fill = status.capacity_bytes ? status.resident_bytes / status.capacity_bytes : null;
  text("f-fill", orDash(fill, percent));
  text("f-bytes", fill === null ? "" : `of ${bytes(status.capacity_bytes)}`);
  by("f-bar").style.width = `${100 * (fill ?? 0)}%`;
  text("f-train", orDash(status.train_tokens_per_s, rate));
  text("f-wait", status.wait === null ? "" : `waits ${percent(status.wait)} of its time`);
  for (const part of document.querySelectorAll("[data-part]")) {
    if (bottleneck?.who === part.dataset.part) part.setAttribute("aria-current", "true");
    else part.removeAttribute("aria-current");
  }
  document.querySelector(".flow").dataset.tone = ["capture", "stream"].includes(bottleneck?.who) ? "warn" : "";
  text("v-text", bottleneck?.text ?? status.explanation);
  const advice = by("v-advice");
  advice.hidden = !bottleneck?.advice;
  if (bottleneck?.advice) {
    const [words, command, copy] = advice.children;
    words.textContent = bottleneck.advice;
    command.textContent = bottleneck.command;
    command.hidden = copy.hidden = !bottleneck.command;
  }
}

function cells(...values) {
  const row = document.createElement("tr");
  for (const value of values) {
    const cell = document.createElement("td");
    cell.append(value);
    row.append(cell);
  }
  return row;
}

function showTargets(status) {
  by("targets").hidden = !status.targets.length || !status.is_live;
  const key = JSON.stringify(status.targets);
  if (key === page.targetsKey) return;
  page.targetsKey = key;
  by("target-rows").replaceChildren(...status.targets.map((target) => {
    const state = Object.assign(document.createElement("span"), { className: "state", textContent: target.state });
    state.dataset.state = target.state;
    return cells(String(target.index), state, target.message || target.address || "");
  }));
}

function showEvents(status) {
  if (page.eventsShown === page.events.length && page.eventsShown) return;
  page.eventsShown = page.events.length;
  const rows = page.events.toReversed().map((event) => {
    const row = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button", title: new Date(1000 * event.time_s).toLocaleString() });
    const time = Object.assign(document.createElement("time"), { textContent: `step ${whole(event.step)}` });
    const words = document.createElement("span");
    // Most messages begin with, or have in them, what the event's kind says.
    if (!event.message.toLowerCase().includes(event.event.replace(/e$/, ""))) {
      words.append(Object.assign(document.createElement("b"), { textContent: event.event }));
    }
    words.append(event.message);
    button.append(time, words);
    const mark = () => charts.setCursorAt(event[page.axis]);
    for (const kind of ["pointerenter", "focus"]) button.addEventListener(kind, mark);
    for (const kind of ["pointerleave", "blur"]) button.addEventListener(kind, () => charts.setCursor(null));
    row.append(button);
    return row;
  });
  if (!rows.length) {
    const none = status.is_live ? "Nothing out of the ordinary so far." : "Nothing out of the ordinary.";
    rows.push(Object.assign(document.createElement("li"), { className: "none", textContent: none }));
  }
  by("events").replaceChildren(...rows);
}

function showAbout(status) {
  const peak = status.peak_bytes ? `${bytes(status.peak_bytes)} of ${bytes(status.capacity_bytes)}` : null;
  const facts = {
    Target: status.target.split("/").slice(-2).join("/"),
    Drafter: [status.algorithm, status.block_size && `${status.block_size} tokens a block`].filter(Boolean).join(", "),
    Captured: status.tokens_captured === null ? null : `${whole(status.tokens_captured)} tokens`,
    Trained: status.tokens_trained === null ? null : `${whole(status.tokens_trained)} tokens`,
    Reuse: status.reuse > 1 ? `each capture trains ${status.reuse} times` : null, "Buffer’s peak": peak, Attempt: status.attempt > 1 ? String(status.attempt) : null, Folder: status.output_dir.split("/").slice(-1)[0],
  };
  const key = JSON.stringify(facts);
  if (key === page.aboutKey) return;
  page.aboutKey = key;
  by("about").replaceChildren(...Object.entries(facts).filter(([, value]) => value).flatMap(([name, value]) => [
    Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: value }),
  ]));
  by("about").lastElementChild.title = status.output_dir;
}

function wire() {
  for (const button of document.querySelectorAll("[data-axis]")) {
    button.addEventListener("click", () => {
      Object.assign(page, { axis: button.dataset.axis, zoom: null, finer: null });
      press("axis", page.axis);
      press("span", String(page.part));
      draw();
    });
  }
  for (const button of document.querySelectorAll("[data-span]")) {
    button.addEventListener("click", () => {
      Object.assign(page, { part: Number(button.dataset.span), zoom: null, finer: null });
      press("span", button.dataset.span);
      draw();
    });
  }
  by("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const isDark = (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    root.dataset.theme = isDark ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
    charts.repaint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.repaint());
  by("v-copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText(by("v-advice").querySelector("code").textContent);
    text("v-copy", "Copied");
    setTimeout(() => text("v-copy", "Copy"), 1500);
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) scheduleDraw(); });
}


charts = new Charts(by("charts"), zoom);
controls = new Controls(() => {
  if (page.isRefused) load();
  page.isRefused = false;
});
wire();
await Promise.all([load(), controls.check()]);
