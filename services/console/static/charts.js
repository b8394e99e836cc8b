// Line charts as SVG: real axes with units, a cursor that all charts share, values on hover, keyboard.

const SVG = "http://www.w3.org/2000/svg";
const PADDING = 24; // of the figure, left and right
const HEIGHT = 168, LEFT = 46, RIGHT = 12, TOP = 10, BOTTOM = 26;

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// About `count` round numbers that cover low..high.
export function ticks(low, high, count) {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9) * step, found = [];
  for (let value = first; value <= high + step * 1e-6; value += step) found.push(Math.abs(value) < step * 1e-6 ? 0 : value);
  return found;
}

export const number = (digits) => (value) => (value == null ? "–" : short(value, digits));
export const percent = (value) => (value == null ? "–" : `${(100 * value).toFixed(1)} %`);

export const percentTick = (value) => `${Number((100 * value).toPrecision(3))} %`;

function short(value, digits) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toPrecision(3)} M`;
  if (size >= 1e4) return `${(value / 1e3).toPrecision(3)} k`;
  if (size !== 0 && size < 10 ** -digits) return value.toExponential(1);
  return value.toFixed(size >= 100 ? Math.min(1, digits) : digits);
}

// Exponential moving average that does not lean towards its first value.
export function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    if (value == null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

export class Charts {
  // onPick(x): a step was chosen.
  constructor(onPick) {
    this.onPick = onPick;
    this.all = [];
    this.cursor = null; // index into the rows
    this.weight = 0;
  }

  // spec: {title, unit, format, tick, zero, series: [{label, value(row)}] or series(rows)}
  add(spec, parent) {
    const chart = new Chart(spec, this);
    this.all.push(chart);
    parent.append(chart.root);
    return chart;
  }

  show(rows) { for (const chart of this.all) chart.show(rows); }

  point(index) {
    this.cursor = index;
    for (const chart of this.all) chart.drawCursor();
  }

  smooth(weight) {
    this.weight = weight;
    for (const chart of this.all) chart.draw();
  }
}

class Chart {
  constructor(spec, group) {
    this.spec = spec;
    this.group = group;
    this.rows = [];
    this.series = [];
    this.legend = element("dl", "legend");
    this.canvas = svg("svg", { class: "plot", role: "img", height: HEIGHT });
    this.root = element("figure", "chart", element("figcaption", "", element("span", "title", spec.title), element("span", "unit", spec.unit)), this.canvas, this.legend);
    this.root.tabIndex = 0;
    this.canvas.addEventListener("pointermove", (event) => this.group.point(this.indexAt(event.offsetX)));
    this.canvas.addEventListener("pointerleave", () => this.group.point(null));
    this.canvas.addEventListener("click", (event) => this.pick(this.indexAt(event.offsetX)));
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.root.addEventListener("blur", () => this.group.point(null));
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  key(event) {
    const last = this.rows.length - 1, now = this.group.cursor ?? last + 1;
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last }[event.key];
    if (event.key === "Enter") this.pick(this.group.cursor);
    else if (to === undefined || last < 0) return;
    else this.group.point(Math.max(0, Math.min(last, to)));
    event.preventDefault();
  }

  pick(index) { if (index != null && this.rows[index]) this.group.onPick(this.rows[index].step); }

  show(rows) {
    this.rows = rows;
    const specs = typeof this.spec.series === "function" ? this.spec.series(rows) : this.spec.series;
    this.series = specs.map((one) => ({ ...one, values: rows.map((row) => one.value(row) ?? null) }))
      .filter((one) => one.values.some((value) => value != null));
    this.root.hidden = rows.length > 0 && this.series.length === 0;
    this.draw();
  }

  indexAt(x) {
    if (!this.rows.length) return null;
    const at = this.low + ((x - LEFT) / (this.width - LEFT - RIGHT)) * (this.high - this.low);
    let best = 0;
    this.rows.forEach((row, i) => { if (Math.abs(row.step - at) < Math.abs(this.rows[best].step - at)) best = i; });
    return best;
  }

  draw() {
    this.width = Math.max(220, this.root.clientWidth - PADDING);
    this.canvas.setAttribute("width", this.width);
    this.canvas.replaceChildren();
    if (!this.rows.length || !this.series.length) return;
    const weight = this.group.weight;
    const lines = this.series.map((one) => (weight ? smoothed(one.values, weight) : one.values));
    const known = this.series.flatMap((one) => one.values).filter((value) => value != null);
    let bottom = Math.min(...known), top = Math.max(...known);
    if (this.spec.zero) bottom = Math.min(0, bottom);
    if (this.spec.one && top > 0.5) top = Math.max(1, top);
    if (bottom === top) { top += Math.abs(top) / 10 || 1; if (!this.spec.zero) bottom -= Math.abs(bottom) / 10; }
    const room = (top - bottom) * 0.05;
    [bottom, top] = [this.spec.zero && bottom === 0 ? 0 : bottom - room, this.spec.one && top === 1 ? 1 : top + room];
    this.low = this.rows[0].step;
    this.high = Math.max(this.low + 1, this.rows.at(-1).step);
    const x = (step) => LEFT + ((step - this.low) / (this.high - this.low)) * (this.width - LEFT - RIGHT);
    const y = (value) => HEIGHT - BOTTOM - ((value - bottom) / (top - bottom)) * (HEIGHT - TOP - BOTTOM);
    [this.x, this.y, this.lines] = [x, y, lines];
    for (const value of ticks(bottom, top, 4)) {
      this.canvas.append(svg("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y(value), y2: y(value) }));
      this.canvas.append(svg("text", { class: "tick", x: LEFT - 8, y: y(value) + 3.5, "text-anchor": "end" }, this.spec.tick(value)));
    }
    const xTicks = ticks(this.low, this.high, this.width / 90).filter((value) => Number.isInteger(value) || this.spec.xUnit);
    xTicks.forEach((value, i) => {
      const isLast = i === xTicks.length - 1;
      this.canvas.append(svg("text", { class: "tick", x: x(value), y: HEIGHT - 8, "text-anchor": isLast && x(value) > this.width - 40 ? "end" : "middle" },
        isLast && xTicks.length > 1 ? `${this.spec.xUnit ? "" : "step "}${value}${this.spec.xUnit ?? ""}` : `${value}`));
    });
    this.series.forEach((one, i) => {
      if (weight) this.canvas.append(this.path(one.values, `line raw c${i % 7}`));
      this.canvas.append(this.path(lines[i], `line c${i % 7}`));
      if (this.rows.length < 3) one.values.forEach((value, j) => {
        if (value != null) this.canvas.append(svg("circle", { class: `dot c${i % 7}`, cx: x(this.rows[j].step), cy: y(value), r: 3 }));
      });
    });
    this.hair = svg("g", { class: "hair" });
    this.canvas.append(this.hair);
    const last = this.series.map((one) => `${one.label} ${this.spec.format(one.values.at(-1))}`).join(", ");
    this.canvas.setAttribute("aria-label", `${this.spec.title} (${this.spec.unit}) at step ${this.rows.at(-1).step}: ${last}`);
    this.drawCursor();
  }

  path(values, className) {
    let d = "", pen = "M";
    values.forEach((value, i) => {
      if (value == null) { pen = "M"; return; }
      d += `${pen}${this.x(this.rows[i].step).toFixed(1)},${this.y(value).toFixed(1)}`;
      pen = "L";
    });
    return svg("path", { class: className, d });
  }

  drawCursor() {
    if (!this.hair || !this.rows.length) return;
    const pointed = this.group.cursor != null && this.group.cursor < this.rows.length;
    const at = pointed ? this.group.cursor : this.rows.length - 1, step = this.rows[at].step;
    this.hair.replaceChildren();
    if (pointed) {
      const x = this.x(step);
      this.hair.append(svg("line", { x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }));
      const label = svg("text", { class: "at", x: Math.min(Math.max(x, LEFT + 22), this.width - 26), y: TOP + 2, "text-anchor": "middle" },
        this.spec.xUnit ? `${step.toFixed(0)}${this.spec.xUnit}` : `step ${step}`);
      this.hair.append(label);
      this.series.forEach((one, i) => {
        const value = this.lines[i][at];
        if (value != null) this.hair.append(svg("circle", { class: `dot c${i % 7}`, cx: x, cy: this.y(value), r: 3 }));
      });
    }
    this.legend.replaceChildren(...this.series.map((one, i) => element("div", "",
      element("dt", `c${i % 7}`, one.label), element("dd", "", this.spec.format(one.values[at])))));
  }
}
