// The Sample page: one row of the corpus, whole; rows near it, where it was trained on, its near-duplicates.

import { again, command } from "./again.js";
import { request } from "./api.js";
import { pickBox } from "./basket.js";
import { lineChart } from "./charts.js";
import { byId, busy, facts, make, problem, whole } from "./dom.js";
import { ranking } from "./hits.js";

const short = (number) => number.toPrecision(3).replaceAll("-", "\u2212");

// A card whose content comes later. `fill` gives it; a problem is said in the card.
function later(title, words, fill) {
  const body = make("div", { "aria-live": "polite" }, busy(words));
  fill().then((children) => body.replaceChildren(...children), (error) => body.replaceChildren(problem(error)));
  return make("section", { class: "card", "aria-label": title }, make("h2", {}, title), body);
}

// The same, when it is asked for.
function onDemand(title, button, words, fill) {
  const go = make("button", { type: "button", class: "plain" }, button);
  const body = make("div", { "aria-live": "polite" }, make("p", {}, go));
  go.addEventListener("click", () => {
    body.replaceChildren(busy(words));
    fill().then((children) => body.replaceChildren(...children), (error) => body.replaceChildren(problem(error)));
  });
  return make("section", { class: "card", "aria-label": title }, make("h2", {}, title), body);
}

async function near(part, row, signal) {
  const { results, settings, explorer } = await request("/api/query", { part, near: row, metric: "cosine", top_k: 8 }, signal);
  const [{ hits }] = results;
  if (!hits.length) return [make("p", { class: "none" }, "No other row has a vector.")];
  return [make("p", { class: "about" }, "By the cosine of the stored vectors: rows that change the model as this one does."),
    ...ranking(null, hits, settings), ...command(explorer.command)];
}

async function runs(address, signal) {
  const found = await request(`${address}/runs`, undefined, signal);
  if (!found.runs.length) return [make("p", { class: "none" }, "This store has no training run.")];
  return found.runs.flatMap((run) => [make("h3", {}, run.run), ...(run.problem ? [make("p", { class: "none" }, run.problem)] : worth(run)), ...command(run.command)]);
}

function worth({ history, settings, summary }) {
  if (!history.length) return [make("p", { class: "none" }, "It was not trained on in the steps that are committed.")];
  const last = history.at(-1).cumulative;
  const words = `Trained on ${whole(history.length)} times in ${whole(summary.steps)} steps; worth ${last === null ? "no number" : short(last)} in all (weight ${settings.weight}).`;
  const points = history.filter((visit) => visit.cumulative !== null).map((visit) => [visit.step, visit.cumulative]);
  const head = ["step", "loss", "score", "adds", "so far"].map((word) => make("th", { scope: "col" }, word));
  const cell = (value) => make("td", {}, value === null ? "none" : short(value));
  const rows = history.map((visit) => make("tr", {}, make("td", {}, whole(visit.step)), ...[visit.loss, visit.score, visit.weighted, visit.cumulative].map(cell)));
  return [
    make("p", { class: "about" }, words),
    points.length > 1 ? lineChart(points, [summary.first, summary.last], "What it was worth so far, over the steps", short) : null,
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Its visits" }, make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows))),
  ].filter(Boolean);
}

async function duplicates(address, part, signal) {
  const found = await request(`${address}/duplicates`, undefined, signal);
  const about = make("p", { class: "about" }, `${whole(found.found)} rows of the corpus hold at least half of its runs of ${found.words} words.`);
  const items = found.rows.slice(0, 50).map((row) => make("li", {},
    make("a", { class: "id", href: `#/sample/${encodeURIComponent(part)}/${row.source_row}` }, row.id),
    ` ${(100 * row.overlap).toFixed(0)} %`));
  const more = found.rows.length > 50 ? make("p", { class: "hint" }, `and ${whole(found.found - 50)} more`) : "";
  return [about, items.length ? make("ul", {}, ...items) : "", more, make("p", { class: "hint" }, "The report of this command lists them, with the sample itself:"), ...command(found.command)];
}

// `signal` ends what was asked for this sample.
export async function showSample([part, row], signal) {
  const place = byId("sample");
  place.replaceChildren(busy("Reading the sample …"));
  const address = `/api/sample/${encodeURIComponent(part)}/${encodeURIComponent(row)}`;
  const sample = await request(address, undefined, signal);
  const cells = (row_) => [row_.row, row_.window_start, row_.n_tokens, row_.status.replaceAll("_", " "), row_.loss === null ? "none" : row_.loss.toPrecision(4)];
  const head = ["row of the part", "first token", "tokens", "status", "loss"].map((word) => make("th", { scope: "col" }, word));
  const rows = sample.rows.map((row_) => make("tr", {}, ...cells(row_).map((cell) => make("td", {}, typeof cell === "number" ? whole(cell) : cell))));
  const asked = new URLSearchParams({ part, text: sample.text || "" });
  const hasVector = sample.rows.some((row_) => ["ok", "truncated"].includes(row_.status));
  place.replaceChildren(
    make("article", { class: "card" },
      make("div", { class: "line" }, make("h2", { class: "id" }, sample.id), hasVector ? pickBox(sample.part, sample.source_row, sample.id) : null),
      facts([
        ["part", sample.part],
        ["row of the corpus", whole(sample.source_row)],
        ["domain", sample.domain || "none"],
        ...Object.entries(sample.fields).map(([name, value]) => [name, value === null ? "null" : String(value)]),
      ]),
      make("h2", {}, "Text"),
      sample.text === null ? make("p", { class: "none" }, "not shown: the corpus is gone, or has changed") : make("p", { class: "text", dir: "auto" }, sample.text),
      sample.text ? make("p", {}, make("a", { href: `#/ask?${asked}` }, "Rank by this text")) : null,
      make("h2", {}, "Rows"),
      make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Its rows" }, make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows))),
    ),
    make("div", { class: "near" },
      hasVector ? later("Nearest rows", "Reading the vectors …", () => near(sample.part, sample.source_row, signal)) : null,
      later("Trained on", "Reading the runs …", () => runs(address, signal)),
      onDemand("Near-duplicates", "Look for them", "Reading the corpus …", () => duplicates(address, sample.part, signal)),
    ),
    again([sample.command]),
  );
}
