// The scores of all rows, with the hits marked, and the domains of the hits: small pictures of our own.

import { make, visible, whole } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDE = 480;
const HIGH = 110;

function shape(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// `counts` of equal bins from `low` to `high`; heights grow with the logarithm. `amount` writes a score.
function histogram({ rows, low, high, counts }, hits, bottom, amount) {
  const spread = high - low;
  const place = (score) => (spread > 0 ? (WIDE * Math.min(Math.max(score - low, 0), spread)) / spread : WIDE / 2);
  const tallest = Math.log1p(Math.max(...counts));
  const step = WIDE / counts.length;
  const bars = counts.map((count, bin) => {
    const tall = count ? Math.max(1.5, (HIGH * Math.log1p(count)) / tallest) : 0;
    const from = low + (spread * bin) / counts.length;
    const words = `${whole(count)} rows from ${amount(from)} to ${amount(from + spread / counts.length)}`;
    return shape("rect", { class: "bin", x: bin * step + 0.5, y: HIGH - tall, width: step - 1, height: tall }, shape("title", {}, words));
  });
  const marks = [...hits, ...bottom].map((hit) => {
    const x = place(hit.score);
    return shape("path", { class: "mark", d: `M${x} ${HIGH + 2}l-4 9h8z` }, shape("title", {}, `${visible(hit.id)}: ${amount(hit.score)}`));
  });
  const zero = low < 0 && high > 0 ? [shape("line", { class: "zero", x1: place(0), x2: place(0), y1: 0, y2: HIGH })] : [];
  const words = `Scores of ${whole(rows)} rows, from ${amount(low)} to ${amount(high)}; the rows listed begin at ${amount(Math.min(...hits.map((hit) => hit.score)))}.`;
  return make("figure", { class: "chart" },
    shape("svg", { viewBox: `-5 0 ${WIDE + 10} ${HIGH + 12}`, role: "img", "aria-label": words }, ...zero, ...bars, shape("line", { class: "axis", x1: 0, x2: WIDE, y1: HIGH, y2: HIGH }), ...marks),
    make("div", { class: "ends" }, make("span", {}, amount(low)), make("span", {}, amount(high))),
    make("figcaption", { class: "hint" }, `Scores of ${whole(rows)} rows; triangles are the rows listed. Height: rows, on a logarithmic scale.`));
}

// Bars of the domains: their share of the hits above their share of all rows. `choose` is called with a domain.
function domainBars(domains, count, choose) {
  const all = domains.reduce((sum, domain) => sum + domain.rows, 0);
  const most = Math.max(...domains.map((domain) => Math.max(domain.hits / count, domain.rows / all)));
  const bar = (name, share) => {
    const inner = make("span");
    inner.style.width = `${most ? (100 * share) / most : 0}%`;
    return make("span", { class: `share ${name}` }, inner);
  };
  const lines = [...domains].sort((one, other) => other.hits - one.hits).flatMap((domain) => {
    const name = domain.domain ?? "no domain";
    const button = make("button", { type: "button", class: "chip", title: "Rank rows of this domain alone" }, name);
    button.addEventListener("click", () => choose(domain.domain));
    return [
      button,
      make("span", { class: "shares", "aria-hidden": "true" }, bar("of-hits", count ? domain.hits / count : 0), bar("of-all", domain.rows / all)),
      make("span", { class: "count" }, `${whole(domain.hits)} of ${whole(count)}`, make("span", { class: "hint" }, ` (${((100 * domain.rows) / all).toFixed(domain.rows / all < 0.0095 ? 1 : 0)} % of all)`)),
    ];
  });
  return make("figure", { class: "chart" },
    make("div", { class: "domains" }, ...lines),
    make("figcaption", { class: "hint" }, "Of the rows listed, above; of all rows that rank, below."));
}

// `points` (x, y) as a line with dots, from `first` to `last` along x, with 0 in sight.
export function lineChart(points, [first, last], words, amount) {
  const values = points.map(([, y]) => y);
  const low = Math.min(0, ...values);
  const high = Math.max(0, ...values);
  const spread = high - low || 1;
  const at = ([x, y]) => [(WIDE * (x - first)) / (last - first || 1), HIGH * (1 - (y - low) / spread)];
  const path = points.map(at).map(([x, y], place) => `${place ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  const zero = at([first, 0])[1];
  const dots = points.map((point) => {
    const [x, y] = at(point);
    return shape("circle", { class: "dot", cx: x, cy: y, r: 3 }, shape("title", {}, `step ${whole(point[0])}: ${amount(point[1])}`));
  });
  return make("figure", { class: "chart" },
    shape("svg", { viewBox: `-5 -5 ${WIDE + 10} ${HIGH + 10}`, role: "img", "aria-label": `${words}: ${amount(points[0][1])} at step ${whole(points[0][0])}, ${amount(values.at(-1))} at step ${whole(points.at(-1)[0])}.` },
      shape("line", { class: "axis", x1: 0, x2: WIDE, y1: zero, y2: zero }), shape("path", { class: "worth", d: path }), ...dots),
    make("div", { class: "ends" }, make("span", {}, `step ${whole(first)}`), make("span", {}, `${amount(low)} to ${amount(high)}`), make("span", {}, `step ${whole(last)}`)),
    make("figcaption", { class: "hint" }, words));
}

export function charts(result, settings, amount, choose) {
  const found = result.histogram;
  if (!found) return null;
  return make("div", { class: "charts" },
    histogram(found, result.hits, result.bottom || [], amount),
    found.domains.length && result.hits.length ? domainBars(found.domains, result.hits.length, choose) : null);
}
