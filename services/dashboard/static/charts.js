// The charts: BokehJS draws the lines; legends, cursor and tables are HTML, so that they can be read aloud.
/* global Bokeh */

import { byteUnit, fixed, percent, rate, superscript, timeUnit, whole } from "./format.js";

const HEIGHT = 190;
const TALL_HEIGHT = 260;
const LEFT = 46;
const RIGHT = 20;
const TABLE_ROWS = 12;
const LEAST_DRAG = 0.01; // of the axis: less is a click

const DEFINITIONS = [
  {
    id: "accepted", title: "Accepted length", note: "tokens a forward pass of the target yields", tall: true,
    format: fixed(2), fromLowest: true, marks: true,
    lines: [
      { name: "expected", color: "--series-main", faint: true },
      { name: "expected_smooth", label: "expected, in training", color: "--series-main" },
    ],
  },
  { id: "positions", title: "Acceptance by position", note: "in training", format: percent, lines: [], ramp: "accept_rate@" },
  { id: "decoded-positions", title: "Decoded acceptance by position", note: "held-out prompts", format: percent, lines: [],
    ramp: "decoded_rate@", dots: true },
  { id: "domains", title: "Decoded τ by domain", format: fixed(2), fromLowest: true, lines: [], kinds: "decoded_tau@", dots: true },
  {
    id: "loss", title: "Loss", format: fixed(3),
    lines: [
      { name: "loss", color: "--series-main", faint: true },
      { name: "loss_smooth", label: "mean of 20 steps", color: "--series-main" },
    ],
  },
  {
    id: "throughput", title: "Tokens a second", format: rate,
    lines: [
      { name: "capture_tokens_per_s", label: "captured", color: "--series-mark", dashed: true },
      { name: "train_tokens_per_s", label: "trained", color: "--series-main" },
    ],
  },
  {
    id: "buffer", title: "Replay buffer", format: fixed(1), isBytes: true,
    lines: [
      { name: "resident_bytes", label: "resident", color: "--series-main", area: true },
      { name: "capacity_bytes", label: "capacity", color: "--series-event", dashed: true },
    ],
  },
  { id: "wait", title: "Trainer waits", note: "part of its time", format: percent, least: 0.05,
    lines: [{ name: "wait", label: "waits", color: "--series-main", area: true }] },
  { id: "learning-rate", title: "Learning rate", format: fixed(2), isPower: true,
    lines: [{ name: "learning_rate", label: "now", color: "--series-other" }] },
];

const KIND_COLORS = ["--series-main", "--series-mark", "--series-other", "--series-event"];

let colors = {};

/** Resolves a colour of the style sheet for the canvas; kept until the theme changes, because asking is slow. */
function colorOf(name) {
  return (colors[name] ??= resolve(name));
}

function resolve(name) {
  const probe = document.createElement("i");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}

function ramp(from, to, count) {
  const parts = (color) => color.match(/[\d.]+/g).slice(0, 3).map(Number);
  const [a, b] = [parts(from), parts(to)];
  return Array.from({ length: count }, (_, i) => {
    const t = count > 1 ? i / (count - 1) : 0;
    return `rgb(${a.map((value, k) => Math.round(value + (b[k] - value) * t)).join(", ")})`;
  });
}

/** First index whose value is not below x, in ascending values. */
function lowerBound(values, x) {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low;
}

function extremes(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** What was decoded with checkpoints, as series over their steps. */
function decodedSeries(evaluations) {
  const made = {};
  const add = (name, found, value) => {
    const series = (made[name] ??= { step: [], elapsed_s: [], value: [] });
    series.step.push(found.step);
    series.elapsed_s.push(found.elapsed_s);
    series.value.push(value);
  };
  for (const found of evaluations) {
    (found.accept_rate ?? []).forEach((rate, k) => add(`decoded_rate@${k}`, found, rate));
    for (const [domain, { accepted_length: tau }] of Object.entries(found.domains ?? {})) {
      if (typeof tau === "number") add(`decoded_tau@${domain}`, found, tau);
    }
  }
  return made;
}

class Chart {
  constructor(definition, shared) {
    this.definition = definition;
    this.shared = shared;
    this.range = new Bokeh.Range1d({ start: 0, end: 1 }); // a model lives in one document: every chart needs its own
    this.lines = [];
    this.isDirty = false;
    this.isVisible = false;
    this.legend = element("div", { className: "legend" });
    this.plotBox = element("div", { className: "plot" });
    this.plotBox.setAttribute("role", "img");
    this.plotBox.dataset.empty = "nothing yet";
    this.plotBox.style.minHeight = `${definition.tall ? TALL_HEIGHT : HEIGHT}px`;
    this.cursor = element("i", { className: "cursor", hidden: true });
    this.selection = element("i", { className: "selection", hidden: true });
    this.table = element("div");
    this.details = element("details", { className: "as-table" }, element("summary", { textContent: "As a table" }), this.table);
    this.details.addEventListener("toggle", () => this.fillTable());
    this.unit = element("span", { className: "unit note" });
    const title = element("h2", { textContent: definition.title });
    this.note = element("span", { className: "note", textContent: definition.note ?? "" });
    title.append(this.note);
    this.root = element(
      "figure", { className: `card chart empty${definition.tall ? " tall" : ""}`, id: `chart-${definition.id}` },
      element("figcaption", {}, title, this.legend), this.plotBox, this.details, this.unit,
    );
  }

  async build() {
    const { definition } = this;
    const P = Bokeh.Plotting;
    this.yRange = new Bokeh.Range1d({ start: 0, end: 1 });
    this.plot = P.figure({
      height: definition.tall ? TALL_HEIGHT : HEIGHT, sizing_mode: "stretch_width", toolbar_location: null, tools: "",
      x_range: this.range, y_range: this.yRange, background_fill_alpha: 0, border_fill_color: null, outline_line_color: null,
      min_border_left: LEFT, min_border_right: RIGHT, min_border_top: 6, min_border_bottom: 24,
    });
    this.events = new Bokeh.ColumnDataSource({ data: { x: [] } });
    this.eventLines = this.plot.vspan({ field: "x" }, { source: this.events, line_dash: "dotted", line_width: 1, line_alpha: 0.6 });
    this.marks = new Bokeh.ColumnDataSource({ data: { x: [], y: [], low: [], high: [] } });
    this.newMarks = { x: [], y: [], low: [], high: [] };
    for (const line of definition.lines) this.addLine(line);
    if (definition.marks) {
      this.band = this.plot.varea({ field: "x" }, { field: "low" }, { field: "high" }, { source: this.marks, fill_alpha: 0.14 });
      this.path = this.plot.line({ field: "x" }, { field: "y" }, { source: this.marks, line_width: 2, line_join: "round" });
      this.whiskers = this.plot.segment(
        { field: "x" }, { field: "low" }, { field: "x" }, { field: "high" }, { source: this.marks, line_width: 1 },
      );
      this.dots = this.plot.scatter({ field: "x" }, { field: "y" }, { source: this.marks, size: 9, line_width: 2 });
      this.markSwatch = element("i", { className: "dot" });
      this.markValue = element("b", { textContent: "–" });
      this.legend.append(element("span", {}, this.markSwatch, "decoded τ ", this.markValue));
    }
    this.paint();
    this.plotBox.append(this.cursor, this.selection);
    this.update(this.latest); // before it is shown: then the first picture is whole
    this.view = await P.show(this.plot, this.plotBox);
    requestAnimationFrame(() => { this.root.dataset.drawn = "true"; });
  }

  addLine(line) {
    const source = new Bokeh.ColumnDataSource({ data: { x: [], y: [] } });
    const made = { ...line, source, x: [], y: [] };
    if (line.area) {
      made.area = this.plot.varea({ field: "x" }, 0, { field: "y" }, { source, fill_alpha: 0.16 });
    }
    made.glyph = this.plot.line({ field: "x" }, { field: "y" }, {
      source, line_width: line.faint ? 1 : 2, line_alpha: line.faint ? 0.2 : 1, line_join: "round",
      ...(line.dashed ? { line_dash: [5, 4] } : {}),
    });
    if (this.definition.dots) made.dots = this.plot.scatter({ field: "x" }, { field: "y" }, { source, size: 6 });
    this.lines.push(made);
    if (line.label) {
      const swatch = element("i", { className: line.dashed ? "dashed" : "" });
      made.value = element("b", { textContent: "–" });
      made.swatch = swatch;
      this.legend.append(element("span", {}, swatch, `${line.label} `, made.value));
    }
    return made;
  }

  /** Colours from the style sheet: again after the theme has changed. */
  paint() {
    const [ink, grid, event] = ["--soft", "--grid", "--series-event"].map(colorOf);
    const font = getComputedStyle(document.body).fontFamily;
    const accepted = this.definition.ramp ? this.lines : [];
    const shades = ramp(colorOf("--ramp-from"), colorOf("--ramp-to"), accepted.length);
    for (const line of this.lines) {
      const color = accepted.includes(line) ? shades[accepted.indexOf(line)] : colorOf(line.color);
      line.glyph.glyph.line_color = color;
      if (line.area) line.area.glyph.fill_color = color;
      if (line.dots) line.dots.glyph.setv({ fill_color: color, line_color: color });
      if (line.swatch) line.swatch.style.borderTopColor = color;
    }
    this.eventLines.glyph.line_color = event;
    if (this.dots) {
      const mark = colorOf("--series-mark");
      this.band.glyph.fill_color = mark;
      this.path.glyph.line_color = mark;
      this.whiskers.glyph.line_color = mark;
      this.dots.glyph.line_color = mark;
      this.dots.glyph.fill_color = colorOf("--card");
      this.markSwatch.style.borderColor = mark;
    }
    for (const axis of [...this.plot.xaxes, ...this.plot.yaxes]) {
      axis.setv({
        axis_line_color: null, major_tick_line_color: null, minor_tick_line_color: null, major_label_text_color: ink,
        major_label_text_font: font, major_label_text_font_size: "11px", major_label_standoff: 3,
      });
    }
    for (const axis of this.plot.yaxes) {
      axis.ticker.desired_num_ticks = this.definition.tall ? 5 : 4;
      axis.formatter = this.tickFormatter();
    }
    for (const axis of this.plot.xaxes) {
      axis.ticker.desired_num_ticks = this.definition.tall ? 9 : 5;
      axis.formatter = new Bokeh.NumeralTickFormatter({ format: "0,0.[00]" });
    }
    for (const grids of this.plot.xgrids) grids.grid_line_color = null;
    for (const grids of this.plot.ygrids) grids.grid_line_color = grid;
  }

  tickFormatter() {
    if (this.definition.format === percent) return new Bokeh.NumeralTickFormatter({ format: "0 %" });
    if (this.definition.format === rate) return new Bokeh.NumeralTickFormatter({ format: "0.[0] a" });
    return new Bokeh.NumeralTickFormatter({ format: "0.[00]" });
  }

  /** Takes the part of every series that is on display; draws when the chart is in view. */
  update(latest) {
    this.latest = latest;
    if (!this.plot) {
      if (this.isVisible) this.build();
      return;
    }
    const { series, axis, low, high, toX, marks, events } = latest;
    if (this.definition.ramp) {
      const before = this.lines.length;
      for (let k = before; series[`${this.definition.ramp}${k}`]; k += 1) {
        this.addLine({ name: `${this.definition.ramp}${k}`, label: String(k + 1), color: "--series-main" });
      }
      if (this.lines.length > before) this.paint();
    }
    if (this.definition.kinds) {
      const before = this.lines.length;
      for (const name of Object.keys(series).filter((name) => name.startsWith(this.definition.kinds)).sort()) {
        if (this.lines.some((line) => line.name === name)) continue;
        const color = KIND_COLORS[this.lines.length % KIND_COLORS.length];
        this.addLine({ name, label: name.slice(this.definition.kinds.length), color });
      }
      if (this.lines.length > before) this.paint();
    }
    let scale = 1;
    if (this.definition.isBytes) {
      const { unit, size } = byteUnit(Math.max(0, ...(series.capacity_bytes?.value.slice(-1) ?? [])));
      scale = size;
      this.note.textContent = unit;
    } else if (this.definition.isPower) {
      const power = Math.floor(Math.log10(Math.max(1e-30, ...(series.learning_rate?.value ?? []))));
      scale = power > -30 ? 10 ** power : 1;
      this.note.textContent = power > -30 ? `× 10${superscript(power)}` : "";
    }
    for (const line of this.lines) {
      const found = series[line.name] ?? { step: [], elapsed_s: [], value: [] };
      const where = found[axis];
      const first = Math.max(0, lowerBound(where, low) - 1);
      const end = Math.min(where.length, lowerBound(where, high) + 1);
      line.x = where.slice(first, end).map(toX);
      line.y = scale === 1 ? found.value.slice(first, end) : found.value.slice(first, end).map((value) => value / scale);
    }
    this.unit.textContent = this.shared.unit.unit;
    this.newMarks = marks;
    this.newEvents = events;
    this.isDirty = true;
    this.root.classList.toggle("empty", !this.lines.some((line) => line.y.length));
    this.setLegend(null);
    this.draw();
  }

  draw() {
    if (!this.isVisible) return;
    if (!this.plot && this.latest) this.build();
    if (!this.plot || !this.isDirty) return;
    this.isDirty = false;
    for (const line of this.lines) line.source.data = { x: line.x, y: line.y };
    this.events.data = { x: this.newEvents };
    if (this.definition.marks) this.marks.data = this.newMarks;
    this.yRange.setv(this.heights());
    this.describe();
    if (this.details.open) this.fillTable();
  }

  /** From the lowest to the highest value on display, with a little air; from zero, unless that says nothing. */
  heights() {
    const marks = this.definition.marks ? [this.newMarks.low, this.newMarks.high] : [];
    const columns = [...this.lines.map((line) => line.y), ...marks].filter((column) => column.length);
    const low = this.definition.fromLowest ? Math.min(...columns.map((column) => extremes(column)[0])) : 0;
    const high = Math.max(this.definition.least ?? 0, ...columns.map((column) => extremes(column)[1]));
    const air = (high - low || 1) * 0.07;
    return { start: this.definition.fromLowest && Number.isFinite(low) ? low - air : 0, end: high > 0 ? high + air : 1 };
  }

  /** The values at a place on the axis, or the newest ones. */
  setLegend(x) {
    if (this.markValue) {
      const { x: places, y, low, high } = this.newMarks;
      const before = x === null ? places.length - 1 : places.findLastIndex((place) => place <= x);
      const known = before >= 0;
      this.markValue.textContent = known ? `${fixed(2)(y[before])} (${fixed(2)(low[before])} – ${fixed(2)(high[before])})` : "–";
    }
    for (const line of this.lines) {
      if (!line.value) continue;
      const value = x === null ? line.y.at(-1) : line.y[this.nearest(line, x)];
      line.value.textContent = value === undefined ? "–" : this.definition.format(value);
    }
  }

  nearest(line, x) {
    const right = Math.min(line.x.length - 1, lowerBound(line.x, x));
    return right > 0 && x - line.x[right - 1] < line.x[right] - x ? right - 1 : right;
  }

  describe() {
    const parts = this.lines.filter((line) => line.label && line.y.length).map((line) => {
      const { format } = this.definition;
      const between = extremes(line.y).map(format).join(" and ");
      return `${line.label}: ${format(line.y[0])} at first, ${format(line.y.at(-1))} at last, between ${between}`;
    });
    const decoded = this.definition.marks ? this.newMarks.y : [];
    if (decoded.length) parts.push(`decoded τ: ${fixed(2)(decoded[0])} at first, ${fixed(2)(decoded.at(-1))} at last`);
    const label = `Chart of ${this.definition.title.toLowerCase()}. ${parts.join(". ") || "Nothing yet"}.`;
    this.plotBox.setAttribute("aria-label", `${label} A table follows.`);
  }

  fillTable() {
    if (!this.details.open) return;
    const lines = this.lines.filter((line) => line.label && line.y.length);
    const head = element("tr", {}, element("th", { textContent: this.shared.axisName(), scope: "col" }));
    for (const line of lines) head.append(element("th", { textContent: line.label, scope: "col" }));
    const body = element("tbody");
    const longest = lines.reduce((a, b) => (b.x.length > (a?.x.length ?? 0) ? b : a), undefined);
    const count = longest ? Math.min(TABLE_ROWS, longest.x.length) : 0;
    for (let i = 0; i < count; i += 1) {
      const x = longest.x[count > 1 ? Math.round((i * (longest.x.length - 1)) / (count - 1)) : 0];
      const row = element("tr", {}, element("th", { textContent: whole(x) === String(x) ? x : x.toFixed(1), scope: "row" }));
      for (const line of lines) row.append(element("td", { textContent: this.definition.format(line.y[this.nearest(line, x)]) }));
      body.append(row);
    }
    this.table.replaceChildren(element("table", {}, element("thead", {}, head), body));
  }

  /** Horizontal pixels of the drawing area, within the plot's box. */
  frame() {
    const box = this.view?.frame?.bbox;
    return box ? { left: box.left, width: box.width } : null;
  }

  /** Where on the axis a pointer is: 0 at its start, 1 at its end. */
  partAt(event) {
    const frame = this.frame();
    return frame ? (event.clientX - this.plotBox.getBoundingClientRect().left - frame.left) / frame.width : NaN;
  }

  placeAt(part) {
    return this.range.start + part * (this.range.end - this.range.start);
  }

  select(first, width) {
    const frame = this.frame();
    this.selection.hidden = !frame || width === 0;
    if (this.selection.hidden) return;
    Object.assign(this.selection.style, { left: `${frame.left + first * frame.width}px`, width: `${width * frame.width}px` });
  }

  setCursor(x) {
    if (!this.view) return;
    const frame = this.frame();
    const part = (x - this.range.start) / (this.range.end - this.range.start);
    this.cursor.hidden = x === null || !frame || part < 0 || part > 1;
    if (!this.cursor.hidden) this.cursor.style.transform = `translateX(${frame.left + part * frame.width}px)`;
    this.setLegend(x);
  }
}

export class Charts {
  /**
   * @param {HTMLElement} container
   * @param {(low: number, high: number) => void} onZoom a part of the axis was chosen, in steps or seconds
   */
  constructor(container, onZoom) {
    this.axis = "step";
    this.unit = { unit: "", size: 1 };
    this.charts = DEFINITIONS.map((definition) => new Chart(definition, this));
    container.replaceChildren(...this.charts.map((chart) => chart.root));
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const chart = this.charts.find((other) => other.root === entry.target);
        chart.isVisible = entry.isIntersecting;
        chart.draw();
      }
    }, { rootMargin: "200px" });
    for (const chart of this.charts) {
      seen.observe(chart.root);
      chart.plotBox.addEventListener("pointermove", (event) => this.point(chart, event));
      chart.plotBox.addEventListener("pointerleave", () => this.setCursor(null));
      chart.plotBox.addEventListener("dblclick", () => onZoom(-Infinity, Infinity));
      chart.plotBox.addEventListener("pointerdown", (event) => this.drag(chart, event, onZoom));
    }
  }

  axisName() {
    return this.axis === "step" ? "step" : this.unit.unit;
  }

  /** Shows part of the axis, from `low` to `high`, in steps or seconds. */
  update({ series: trained, axis, low, high, evaluations, events }) {
    this.axis = axis;
    const series = { ...trained, ...decodedSeries(evaluations) };
    const domains = new Set(evaluations.flatMap((found) => Object.keys(found.domains ?? {})));
    for (const chart of this.charts) if (chart.definition.kinds) chart.root.hidden = domains.size < 2;
    this.unit = axis === "step" ? { unit: "steps", size: 1 } : timeUnit(high);
    const { size } = this.unit;
    const toX = size === 1 ? (value) => value : (value) => value / size;
    const found = evaluations.filter((one) => one[axis] >= low && one[axis] <= high);
    const marks = {
      x: found.map((one) => toX(one[axis])), y: found.map((one) => one.accepted_length),
      low: found.map((one) => one.interval[0]), high: found.map((one) => one.interval[1]),
    };
    const places = [...new Set(events.map((event) => toX(event[axis])))];
    for (const chart of this.charts) chart.range.setv({ start: toX(low), end: toX(high) });
    for (const chart of this.charts) chart.update({ series, axis, low, high, toX, marks, events: places });
  }

  /** Takes the colours over from a style sheet that has changed. */
  repaint() {
    colors = {};
    for (const chart of this.charts) if (chart.plot) chart.paint();
  }

  point(chart, event) {
    const part = chart.partAt(event);
    this.setCursor(part >= 0 && part <= 1 ? chart.placeAt(part) : null);
  }

  /** The mouse chooses a part of the axis; a finger scrolls the page. */
  drag(chart, down, onZoom) {
    if (down.pointerType !== "mouse" || down.button !== 0 || !chart.frame()) return;
    down.preventDefault(); // selects no text
    const clamp = (part) => Math.min(1, Math.max(0, part));
    const first = clamp(chart.partAt(down));
    let last = first;
    const abort = new AbortController();
    const options = { signal: abort.signal };
    addEventListener("pointermove", (event) => {
      last = clamp(chart.partAt(event));
      chart.select(Math.min(first, last), Math.abs(last - first));
    }, options);
    addEventListener("pointerup", () => {
      abort.abort();
      chart.select(0, 0);
      if (Math.abs(last - first) < LEAST_DRAG) return;
      const [low, high] = [first, last].sort((a, b) => a - b).map((part) => chart.placeAt(part) * this.unit.size);
      onZoom(low, high);
    }, options);
  }

  /** Puts the cursor of every chart at a place on the axis; null takes it away. */
  setCursor(x) {
    cancelAnimationFrame(this.pending);
    this.pending = requestAnimationFrame(() => { for (const chart of this.charts) chart.setCursor(x); });
  }

  /** The same for steps or seconds. */
  setCursorAt(place) {
    this.setCursor(place / this.unit.size);
  }
}
