// The Ask page: a form, whose state is the fragment of the address, and the ranking that answers it.

import { again } from "./again.js";
import { request } from "./api.js";
import { charts } from "./charts.js";
import { busy, byId, make, problem, whole } from "./dom.js";
import { basket, picksOf, takePicks } from "./basket.js";
import { byWords, chooseDomain, domains, fill, form, kind, question, state } from "./form.js";
import { inWords, ranking } from "./hits.js";
import { KEYS } from "./taking.js";
import { legend } from "./tokens.js";

const answer = byId("answer");
let shown = null; // the fragment whose answer is shown
let running = null;

async function ask() {
  if (running) running.abort();
  running = new AbortController();
  const { signal } = running;
  byId("go").disabled = true;
  answer.setAttribute("aria-busy", "true");
  answer.replaceChildren(busy("Ranking. The first question loads the model …"));
  try {
    const asked = await question();
    const result = await request("/api/query", asked, signal);
    if (signal.aborted) return;
    const words = byId("words").checked ? make("section", { "aria-label": "Ranked by words" }) : null;
    show(result, words, asked);
    if (words) await addWords(words, byWords(asked), result, signal);
  } catch (error) {
    if (signal.aborted) return;
    answer.replaceChildren(problem(error));
  }
  if (signal.aborted) return;
  byId("go").disabled = false;
  answer.setAttribute("aria-busy", "false");
}

async function addWords(place, asked, result, signal) {
  place.replaceChildren(busy("Ranking by words …"));
  try {
    const { results, settings } = await request("/api/query", asked, signal);
    if (signal.aborted) return;
    const ranks = new Map((result.results[0]?.hits || []).map((hit) => [hit.source_row, hit.rank]));
    place.replaceChildren(...results.flatMap(({ hits }) => ranking("By words alone (BM25)", hits, settings, ranks)));
    if (!results.some(({ hits }) => hits.some((hit) => hit.bm25))) place.prepend(make("p", { class: "about" }, "No row shares a word with the question."));
  } catch (error) {
    if (!signal.aborted) place.replaceChildren(problem(error));
  }
}

function show(result, words, asked) {
  const { settings, explorer } = result;
  const blocks = [];
  const named = settings.metric === "cosine" ? "cosine" : "score";
  const mixed = settings.lexical !== undefined;
  const amount = (score) => (mixed ? score.toPrecision(3) : inWords(score * (settings.unit ? settings.unit.factor : 1), settings));
  for (const each of result.results) {
    const { hits, bottom } = each;
    if (!hits.length && !(bottom || []).length) blocks.push(make("p", { class: "empty" }, "No row has a score here. Try without a condition."));
    const chart = charts(each, settings, amount, chooseDomain);
    if (chart) blocks.push(chart);
    blocks.push(...ranking(`Highest ${named}`, hits, settings), ...ranking(`Lowest ${named}`, bottom, settings));
  }
  const matching = settings.rows_matching === undefined ? "" : `, ${whole(settings.rows_matching)} of them match the condition`;
  const about = `Part ${settings.part}: ${whole(settings.rows)} rows${matching}. Metric: ${explorer.metric}.`;
  const fileNote = kind() === "file" ? make("p", { class: "hint" }, "The link does not hold the file: choose it again there.") : null;
  answer.replaceChildren(
    make("p", { class: "about" }, about),
    explorer.unit ? make("p", { class: "about" }, explorer.unit) : "",
    ...explorer.notes.map((note) => make("p", { class: "about" }, `Note: ${note}`)),
    settings.tokens ? legend() : "",
    make("div", { class: words ? "both two" : "both" }, make("section", { "aria-label": "Ranked by gradients" }, ...blocks), words),
    again([explorer.command], fileNote),
    basket(asked, settings, domains(), inLink()),
  );
}

export async function openAsk(store, values) {
  const asked = values.has("text") || values.has("prompt") || values.has("completion");
  if (values.toString() === shown) { // back from another view: what is there still answers it
    linkPicks();
    return;
  }
  shown = values.toString();
  fill(store, values);
  takePicks(byId("part").value, values.get("picks"));
  if (!store.parts.length) {
    answer.replaceChildren(make("p", { class: "empty" }, "This store has no part yet: ghoststore build makes one."));
  } else if (asked) {
    await ask();
    linkPicks();
  } else {
    answer.replaceChildren(make("p", { class: "empty" }, "The rows whose gradients point the same way appear here, best first."));
  }
}

const inLink = () => new URLSearchParams(location.hash.split("?")[1] || "");

// The link holds what is picked, too, and how rows to train on are chosen.
function linkPicks() {
  if (!answer.querySelector(".hit") || !location.hash.startsWith("#/ask")) return;
  const values = inLink();
  const rows = picksOf(byId("part").value);
  if (rows) values.set("picks", rows);
  else values.delete("picks");
  relink(values);
}

function relink(values) {
  shown = values.toString();
  history.replaceState(null, "", `#/ask?${values}`);
}

addEventListener("picked", linkPicks);
addEventListener("taken", ({ detail }) => {
  const values = inLink();
  for (const name of KEYS) values.delete(name);
  for (const [name, value] of detail) values.append(name, value);
  relink(values);
});
form.addEventListener("change", (event) => {
  if (["tokens", "words"].includes(event.target.id) && answer.querySelector(".hit")) form.requestSubmit();
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  const values = state();
  const rows = picksOf(byId("part").value);
  if (rows) values.set("picks", rows);
  for (const [name, value] of inLink()) if (KEYS.includes(name)) values.append(name, value);
  const fragment = `#/ask?${values}`;
  shown = values.toString();
  if (location.hash !== fragment) history.pushState(null, "", fragment);
  ask();
});
