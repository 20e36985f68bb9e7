// Charts as plain SVG: they take the page's colours, scale with it, and can be read by keyboard.

const NS = "http://www.w3.org/2000/svg";
export const COLOURS = ["--c1", "--c6", "--c2", "--c4", "--c3", "--c0", "--c7", "--c5"].map((name) => `var(${name})`);
const CIVIDIS = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];

/** Make an element of HTML; texts are never read as markup. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(NS, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "colour") element.style.setProperty("background", value);
    else if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Return round numbers from `low` to `high`, about `count` of them. */
export function ticks(low, high, count = 4) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

export function legend(items) {
  return h("ul", { class: "legend" }, ...items.map(([name, colour]) => h("li", {}, h("i", { class: "swatch", colour }), name)));
}

const size = { left: 46, right: 16, top: 14, bottom: 26 };

/** The frame of a chart: draws again when its width changes, and shows values at the cursor. */
class Chart {
  constructor(height, label) {
    this.element = h("div", { class: "plot" });
    this.height = height;
    this.label = label;
    this.tip = h("div", { class: "tip", hidden: true });
    this.spoken = h("p", { class: "hidden", "aria-live": "polite" });
    this.index = -1;
    new ResizeObserver(() => this.element.clientWidth !== this.width && this.draw()).observe(this.element);
  }

  set(data) {
    this.data = data;
    this.draw();
  }

  /** Draw axes; return the SVG and the functions that place values in it. */
  frame(xs, low, high, format) {
    this.width = this.element.clientWidth || 480;
    const inner = this.width - size.left - size.right, bottom = this.height - size.bottom;
    const [first, last] = [xs[0], xs[xs.length - 1]];
    this.x = (value) => size.left + (last > first ? ((value - first) / (last - first)) * inner : inner / 2);
    this.y = (value) => bottom - ((value - low) / (high - low || 1)) * (bottom - size.top);
    const summary = `${this.label}. ${this.summary()}`;
    this.svg = s("svg", { viewBox: `0 0 ${this.width} ${this.height}`, height: this.height, role: "img", tabindex: 0, "aria-label": summary });
    for (const value of ticks(low, high)) {
      const y = this.y(value);
      this.svg.append(s("line", { class: "axis", x1: size.left, x2: this.width - size.right, y1: y, y2: y }));
      this.svg.append(s("text", { x: size.left - 8, y: y + 4, "text-anchor": "end" }, format(value)));
    }
    return this.svg;
  }

  /** Write the rounds below the chart; `place` gives the middle of each. */
  rounds(xs, place) {
    const most = Math.max(1, Math.floor((this.width - size.left) / 46));
    const step = [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000].find((n) => xs.length / n <= most) || 2000;
    xs.forEach((value, i) => {
      if (value % step && xs.length > 1 && step > 1) return;
      this.svg.append(s("text", { x: place(value, i), y: this.height - 6, "text-anchor": "middle" }, String(value)));
    });
  }

  finish(xs, place, values) {
    const cursor = s("line", { class: "cursor", y1: size.top, y2: this.height - size.bottom, visibility: "hidden" });
    this.svg.append(cursor);
    const show = (index, aloud) => {
      this.index = index;
      const off = index < 0 || index >= xs.length;
      this.tip.hidden = off;
      cursor.setAttribute("visibility", off ? "hidden" : "visible");
      if (off) return;
      const x = place(xs[index], index);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      const lines = values(index);
      this.tip.replaceChildren(h("strong", {}, `round ${xs[index]}`), ...lines.map(([name, value, colour]) => h("div", {}, colour && h("i", { class: "swatch", colour }), `${name} ${value}`)));
      this.tip.style.left = `${Math.min(Math.max(x, 80), this.width - 80)}px`;
      this.tip.style.top = `${size.top + 2}px`;
      if (aloud) this.spoken.textContent = `round ${xs[index]}: ${lines.map(([name, value]) => `${name} ${value}`).join(", ")}`;
    };
    this.svg.addEventListener("pointermove", (event) => {
      const at = event.clientX - this.svg.getBoundingClientRect().left;
      let nearest = 0;
      xs.forEach((value, i) => Math.abs(place(value, i) - at) < Math.abs(place(xs[nearest], nearest) - at) && (nearest = i));
      show(nearest);
    });
    this.svg.addEventListener("pointerleave", () => show(-1));
    this.svg.addEventListener("blur", () => show(-1));
    this.svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !xs.length) return;
      event.preventDefault();
      show(Math.min(Math.max(this.index + step, 0), xs.length - 1), true);
    });
    const focused = this.element.contains(document.activeElement);
    this.element.replaceChildren(this.svg, this.tip, this.spoken);
    if (focused) this.svg.focus({ preventScroll: true });
    if (this.index >= 0) show(this.index);
  }

  empty(words) {
    this.width = this.element.clientWidth;
    this.element.replaceChildren(h("p", { class: "empty" }, words));
  }
}

/** Lines over rounds. data: {series: [{name, points: [[x, y]], colour}], low, high, format} */
export class LineChart extends Chart {
  summary() {
    return this.data.series.map(({ name, points }) => {
      const known = points.filter(([, y]) => y !== null);
      return known.length ? `${name}: ${this.data.format(known[0][1])} at round ${known[0][0]}, ${this.data.format(known.at(-1)[1])} at round ${known.at(-1)[0]}` : "";
    }).join("; ");
  }

  draw() {
    if (!this.data) return;
    const { series, format } = this.data;
    const all = series.flatMap(({ points }) => points.filter(([, y]) => y !== null));
    if (!all.length) return this.empty(this.data.empty || "nothing yet: the first round is under way");
    const ys = all.map(([, y]) => y);
    const low = this.data.low ?? Math.min(...ys), high = this.data.high ?? (Math.max(...ys) * 1.08 || 1);
    const xs = [...new Set(all.map(([x]) => x))].sort((a, b) => a - b);
    this.frame(xs, low, high > low ? high : low + 1, format);
    this.rounds(xs, (value) => this.x(value));
    series.forEach(({ points, colour, name }, i) => {
      const known = points.filter(([, y]) => y !== null);
      if (!known.length) return;
      colour ??= COLOURS[i % COLOURS.length];
      const path = known.map(([x, y], j) => `${j ? "L" : "M"}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`).join("");
      if (series.length === 1 && known.length > 1) {
        const floor = this.height - size.bottom;
        const area = `${path}L${this.x(known.at(-1)[0])} ${floor}L${this.x(known[0][0])} ${floor}Z`;
        const shade = s("path", { d: area, opacity: 0.1 });
        shade.style.fill = colour;
        this.svg.append(shade);
      }
      const line = s("path", { class: "line", d: path });
      line.style.stroke = colour;
      this.svg.append(line);
      const dots = known.length <= 40 ? known : [known.at(-1)];
      for (const [x, y] of dots) {
        const dot = s("circle", { cx: this.x(x), cy: this.y(y), r: 3 });
        dot.style.fill = colour;
        this.svg.append(dot);
      }
      if (series.length === 1) {
        const [x, y] = known.at(-1), high = this.y(y) < 34;
        this.svg.append(s("text", { class: "value", x: Math.min(this.x(x), this.width - 8), y: this.y(y) + (high ? 22 : -11), "text-anchor": known.length > 1 ? "end" : "middle" }, format(y)));
      }
    });
    const at = series.map(({ points }) => new Map(points));
    this.finish(xs, (value) => this.x(value), (index) =>
      series.flatMap(({ name, colour }, i) => {
        const y = at[i].get(xs[index]);
        return y === undefined || y === null ? [] : [[name, format(y), series.length > 1 && (colour || COLOURS[i % COLOURS.length])]];
      }));
  }
}

/** Stacked bars. data: {rounds: [n], parts: [[...] for each round], names, colours, format} */
export class BarChart extends Chart {
  summary() {
    const { rounds, parts, names, format } = this.data, last = parts.at(-1) || [];
    return rounds.length ? `Round ${rounds.at(-1)}: ${names.map((name, i) => `${name} ${format(last[i])}`).join(", ")}` : "";
  }

  draw() {
    if (!this.data) return;
    const { rounds, parts, names, colours, format } = this.data;
    if (!rounds.length) return this.empty("nothing yet: the first round is under way");
    const high = Math.max(...parts.map((part) => part.reduce((a, b) => a + b, 0))) * 1.05 || 1;
    this.frame(rounds, 0, high, format);
    const inner = this.width - size.left - size.right, step = inner / rounds.length;
    const wide = Math.max(1, Math.min(step * 0.7, 46));
    const place = (_, i) => size.left + step * (i + 0.5);
    this.rounds(rounds, place);
    const paths = names.map(() => "");
    parts.forEach((part, i) => {
      let total = 0;
      part.forEach((value, j) => {
        if (value <= 0) return;
        const y = this.y(total + value), tall = this.y(total) - y;
        paths[j] += `M${(place(0, i) - wide / 2).toFixed(1)} ${y.toFixed(2)}h${wide.toFixed(1)}v${tall.toFixed(2)}h${(-wide).toFixed(1)}Z`;
        total += value;
      });
    });
    paths.forEach((d, j) => {
      const path = s("path", { d });
      path.style.fill = colours[j];
      this.svg.append(path);
    });
    this.finish(rounds, place, (index) => names.map((name, j) => [name, format(parts[index][j]), colours[j]]).filter((_, j) => parts[index][j] > 0).reverse());
  }
}

/** A heat map of values from 0 to 1. data: {rounds: [n], rows: [[name, [value, …]]]} */
export class HeatMap extends Chart {
  summary() {
    return this.data.rows.map(([name, values]) => `${name} ${percent(values.at(-1))}`).join(", ");
  }

  draw() {
    if (!this.data) return;
    const { rounds, rows } = this.data;
    if (!rounds.length || !rows.length) return this.empty("nothing yet: the first round is under way");
    this.width = this.element.clientWidth || 480;
    const left = Math.min(118, this.width * 0.3), right = 58, tall = rows.length > 30 ? 13 : 22;
    this.height = rows.length * tall + 26;
    this.svg = s("svg", { viewBox: `0 0 ${this.width} ${this.height}`, height: this.height, role: "img", tabindex: 0, "aria-label": `${this.label}. Last round: ${this.summary()}` });
    const step = (this.width - left - right) / rounds.length;
    rows.forEach(([name, values], row) => {
      const y = row * tall;
      const shown = name.length > 15 ? `${name.slice(0, 14)}…` : name;
      this.svg.append(s("text", { x: left - 10, y: y + tall / 2 + 4, "text-anchor": "end" }, shown));
      values.forEach((value, i) => {
        const cell = s("rect", { x: left + i * step, y: y + 1, width: Math.max(step - (step > 6 ? 1.5 : 0), 0.6), height: tall - 2, rx: step > 6 ? 3 : 0 });
        cell.style.fill = value === null || value === undefined ? "var(--line)" : shade(value);
        this.svg.append(cell);
      });
      this.svg.append(s("text", { class: "value", x: this.width - right + 8, y: y + tall / 2 + 4 }, percent(values.at(-1))));
    });
    const place = (_, i) => left + (i + 0.5) * step;
    this.rounds(rounds, place);
    this.finish(rounds, place, (index) => rows.slice(0, 12).map(([name, values]) => [name, percent(values[index])]));
  }
}

function shade(value) {
  const at = Math.min(Math.max(value, 0), 1) * (CIVIDIS.length - 1), i = Math.min(Math.floor(at), CIVIDIS.length - 2);
  return `rgb(${CIVIDIS[i].map((low, c) => Math.round(low + (CIVIDIS[i + 1][c] - low) * (at - i))).join(" ")})`;
}

export function percent(value) {
  return typeof value === "number" ? `${(100 * value).toFixed(1)} %` : "–";
}
