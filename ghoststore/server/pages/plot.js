// Plots over steps, and histograms: small SVG, with the same numbers as a table beside it.

import { make, whole } from "./dom.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const MARGIN = { left: 58, right: 12, top: 10, bottom: 34 };
const HEIGHT = 230;
const TABLE_ROWS = 300;

function draw(name, attributes, ...children) {
  const element = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export function short(number) {
  if (number === null || number === undefined) return "none";
  number += 0; // no -0
  const size = Math.abs(number);
  const digits = size !== 0 && (size < 1e-3 || size >= 1e5) ? number.toExponential(2) : Number(number.toPrecision(4)).toString();
  return digits.replace("-", "\u2212");
}

function niceTicks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= rough) || 10);
  const ticks = [];
  for (let place = Math.ceil(low / step - 1e-9); place * step <= high + step * 1e-9; place += 1) ticks.push(place * step + 0);
  return ticks;
}

function linear(numbers) {
  let [low, high] = [Math.min(...numbers), Math.max(...numbers)];
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const room = (high - low) * 0.05;
  return { of: (value) => (value - low + room) / (high - low + 2 * room), ticks: niceTicks(low, high, 5) };
}

// Linear near 0 and logarithmic beyond: scores have long tails on both sides.
function bent(numbers) {
  const sizes = numbers.map(Math.abs).filter((size) => size > 0).sort((a, b) => a - b);
  const unit = sizes.length ? sizes[Math.floor(sizes.length / 4)] : 1;
  const bend = (value) => Math.asinh(value / unit);
  const inner = linear(numbers.map(bend));
  const [low, high] = [Math.min(...numbers, 0), Math.max(...numbers, 0)];
  const first = Math.floor(Math.log10(unit));
  const last = Math.ceil(Math.log10(Math.max(-low, high, unit)));
  const ticks = [0];
  for (let power = first; power <= last; power += Math.max(1, Math.ceil((last - first) / 3))) ticks.push(10 ** power, -(10 ** power));
  return { of: (value) => inner.of(bend(value)), ticks: ticks.filter((tick) => tick >= low && tick <= high) };
}

const known = (values) => values.filter((value) => value !== null);

// Runs of neighbouring points; single ones are drawn as dots.
function pieces(points) {
  const found = [[]];
  for (const point of points) {
    if (point === null) found.push([]);
    else found[found.length - 1].push(point);
  }
  return found.filter((piece) => piece.length);
}

export class Plot {
  // options: note (words below the title), bent (the scale), sparse (points that are missing between others are joined),
  // bars (a histogram), across (what the horizontal axis counts)
  constructor(title, options = {}) {
    this.title = title;
    this.options = options;
    this.picture = make("div", { class: "picture" });
    this.legend = make("p", { class: "legend" });
    this.at = make("p", { class: "hint at", "aria-hidden": "true" }, "\u00a0");
    this.table = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Numbers: ${title}` });
    this.numbers = make("details", { class: "numbers" }, make("summary", {}, "Numbers", make("span", { class: "hidden" }, ` of ${title}`)), this.table);
    this.element = make("figure", { class: "card plot", hidden: "" },
      make("figcaption", {}, make("h2", {}, title), options.note ? make("p", { class: "hint" }, options.note) : null),
      this.legend, this.picture, this.at, this.numbers);
    this.numbers.addEventListener("toggle", () => this.tabulate());
    new ResizeObserver(() => this.paint()).observe(this.picture);
  }

  // series: { name, x, y, mark } and bands: { name, x, low, high }; mark and the place tell lines apart
  show(series, bands = []) {
    this.series = series.filter((line) => known(line.y).length);
    this.bands = bands.filter((band) => known(band.low).length);
    this.element.hidden = !this.series.length;
    const keys = [...this.series.map((line) => [`key ${line.mark}`, line.name]), ...this.bands.map((band) => [`key ${band.mark}`, band.name])];
    const words = keys.map(([, name]) => name).join("\n");
    if (words !== this.words) this.legend.replaceChildren(...keys.map(([mark, name]) => make("span", { class: mark }, name)));
    this.words = words;
    this.paint();
    this.tabulate();
  }

  paint() {
    const width = Math.floor(this.picture.clientWidth);
    if (!this.series || !this.series.length || width < 80) return;
    const across = this.series.flatMap((line) => line.x);
    const up = known([...this.series.flatMap((line) => line.y), ...this.bands.flatMap((band) => [...band.low, ...band.high])]);
    const [first, last] = this.options.bars ? [Math.min(...across), Math.max(...across)] : [0, Math.max(...across, 1)];
    const scale = this.options.bent ? bent(up) : linear(this.options.bars ? [0, ...up] : up);
    const inner = { width: width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
    const x = (step) => MARGIN.left + (inner.width * (step - first)) / (last - first || 1);
    const y = (value) => MARGIN.top + inner.height * (1 - scale.of(value));
    const svg = draw("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": this.said() });
    const taken = [];
    for (const tick of scale.ticks) {
      if (taken.some((other) => Math.abs(other - y(tick)) < 14)) continue;
      taken.push(y(tick));
      svg.append(draw("line", { class: tick === 0 ? "zero" : "grid-line", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) }),
        draw("text", { x: MARGIN.left - 8, y: y(tick) + 4, "text-anchor": "end" }, short(tick)));
    }
    for (const tick of niceTicks(first, last, Math.max(2, Math.floor(inner.width / 80)))) {
      svg.append(draw("text", { x: x(tick), y: HEIGHT - MARGIN.bottom + 17, "text-anchor": "middle" }, this.options.bars ? short(tick) : whole(tick)));
    }
    svg.append(draw("text", { x: MARGIN.left + inner.width, y: HEIGHT - 3, "text-anchor": "end" }, this.options.across || "step"));
    for (const band of this.bands) {
      const points = band.x.map((step, place) => (band.low[place] === null ? null : [x(step), y(band.low[place]), y(band.high[place])]));
      for (const piece of pieces(points)) {
        const upper = piece.map(([at, , high]) => `${at},${high}`);
        const lower = piece.map(([at, low]) => `${at},${low}`).reverse();
        svg.append(draw("polygon", { class: `band ${band.mark}`, points: [...upper, ...lower].join(" ") }));
      }
    }
    for (const line of this.series) {
      const points = line.x.map((step, place) => (line.y[place] === null ? null : [x(step), y(line.y[place])]));
      for (const piece of this.options.sparse ? [known(points)] : pieces(points)) {
        if (this.options.bars) svg.append(draw("polygon", { class: `area ${line.mark}`, points: [[piece[0][0], y(0)], ...piece, [piece[piece.length - 1][0], y(0)]].map((point) => point.join(",")).join(" ") }));
        if (piece.length === 1) svg.append(draw("circle", { class: `dot ${line.mark}`, cx: piece[0][0], cy: piece[0][1], r: 2.5 }));
        else svg.append(draw("polyline", { class: `line ${line.mark}`, points: piece.map((point) => point.join(",")).join(" ") }));
      }
    }
    const pointer = draw("line", { class: "pointer", x1: -9, x2: -9, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom });
    svg.append(pointer);
    svg.addEventListener("pointermove", (event) => {
      const step = first + ((event.clientX - svg.getBoundingClientRect().left - MARGIN.left) / inner.width) * (last - first);
      this.point(step, pointer, x);
    });
    svg.addEventListener("pointerleave", () => {
      pointer.setAttribute("x1", -9);
      pointer.setAttribute("x2", -9);
      this.at.textContent = "\u00a0";
    });
    this.picture.replaceChildren(svg);
  }

  point(step, pointer, x) {
    const steps = this.series.flatMap((line) => line.x.filter((_, place) => line.y[place] !== null));
    const nearest = steps.reduce((best, one) => (Math.abs(one - step) < Math.abs(best - step) ? one : best), steps[0]);
    pointer.setAttribute("x1", x(nearest));
    pointer.setAttribute("x2", x(nearest));
    const said = this.series.flatMap((line) => {
      const value = line.y[line.x.indexOf(nearest)];
      return value === undefined || value === null ? [] : [`${line.name} ${short(value)}`];
    });
    this.at.textContent = `${this.options.across || "step"} ${short(nearest)}: ${said.join(", ")}`;
  }

  said() {
    const ends = this.series.map((line) => {
      const values = known(line.y);
      return `${line.name} from ${short(values[0])} to ${short(values[values.length - 1])}`;
    });
    return `${this.title}: ${ends.join("; ")}. The numbers are in the table below.`;
  }

  tabulate() {
    if (!this.numbers.open || !this.series) return;
    const columns = [...this.series, ...this.bands.flatMap((band) => [{ ...band, name: `${band.name}, low`, y: band.low }, { ...band, name: `${band.name}, high`, y: band.high }])];
    const steps = [...new Set(columns.flatMap((column) => column.x.filter((_, place) => column.y[place] !== null)))].sort((a, b) => a - b);
    const apart = Math.ceil(steps.length / TABLE_ROWS);
    const rows = steps.filter((_, place) => place % apart === 0).map((step) => make("tr", {},
      make("th", { scope: "row" }, short(step)), ...columns.map((column) => {
        const value = column.y[column.x.indexOf(step)];
        return make("td", {}, value === undefined || value === null ? "" : short(value));
      })));
    const head = [this.options.across || "step", ...columns.map((column) => column.name)].map((name) => make("th", { scope: "col" }, name));
    this.table.replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
  }
}

// Counts between edges, drawn as a line of steps over the scores.
export function histogramSeries(counts, edges, name, mark) {
  const x = [];
  const y = [];
  counts.forEach((count, place) => {
    x.push(edges[place], edges[place + 1]);
    y.push(count, count);
  });
  return { name, x, y, mark };
}
