// The Ask page: a form, whose state is the fragment of the address, and the ranking that answers it.

import { link, request } from "./api.js";
import { busy, byId, copyButton, make, problem, whole } from "./dom.js";
import { ranking } from "./hits.js";
import { dropPhrase, fillPhrase, phrase, watchPhrase } from "./phrase.js";
import { legend } from "./tokens.js";

const FIELDS = ["text", "prompt", "completion", "part", "metric", "top-k", "bottom-k", "where", "minus", "layers", "lexical"];
const SWITCHES = ["tokens"];
const DEFAULTS = { "top-k": "10", "bottom-k": "0" };
const form = byId("ask");
const answer = byId("answer");
let shown = null; // the fragment whose answer is shown
let running = null;

const kind = () => form.elements.kind.value;

function showKind() {
  for (const box of form.querySelectorAll("[data-kind]")) box.hidden = box.dataset.kind !== kind();
}

function fill(store, state) {
  const parts = store.parts.map((part) => part.name);
  byId("part").replaceChildren(...parts.map((name) => make("option", { value: name }, name)));
  for (const name of FIELDS) {
    if (name !== "part") byId(name).value = state.get(name) ?? DEFAULTS[name] ?? "";
  }
  for (const name of SWITCHES) byId(name).checked = state.has(name);
  if (parts.includes(state.get("part"))) byId("part").value = state.get("part");
  form.elements.kind.value = state.has("prompt") || state.has("completion") ? "prompt" : state.get("kind") === "file" ? "file" : "text";
  byId("more").open = ["minus", "layers", "lexical"].some((name) => state.has(name));
  showKind();
  fillPhrase(state.get("phrase"));
  suggest(store);
}

function suggest(store) {
  const part = store.parts.find((one) => one.name === byId("part").value);
  const domains = (part && part.manifest.corpus.domains) || [];
  const conditions = domains.map((name) => `domain = '${name.replaceAll("'", "''")}'`);
  byId("conditions").replaceChildren(...conditions.map((value) => make("option", { value })));
}

function state() {
  const values = new URLSearchParams();
  const left = { text: ["prompt", "completion"], prompt: ["text"], file: ["text", "prompt", "completion"] }[kind()];
  for (const name of FIELDS) {
    const { value } = byId(name);
    if (value !== "" && value !== DEFAULTS[name] && !left.includes(name)) values.set(name, value);
  }
  for (const name of SWITCHES) if (byId(name).checked) values.set(name, "1");
  if (phrase()) values.set("phrase", phrase());
  if (kind() === "file") values.set("kind", "file");
  return values;
}

const EMPTY = "Say what to rank by: there is no text yet.";

async function valSet() {
  if (kind() === "prompt") {
    const row = { prompt: byId("prompt").value, completion: byId("completion").value };
    if (!row.completion) throw new Error("A completion is missing: the model is asked to say it after the prompt.");
    return [row];
  }
  if (kind() === "text") {
    if (!byId("text").value) throw new Error(EMPTY);
    return [byId("text").value];
  }
  const [file] = byId("file").files;
  if (!file) throw new Error("Choose a file first: jsonl, one row a line.");
  const lines = (await file.text()).split(/\r?\n/);
  if (file.name.endsWith(".txt")) return lines.filter((line) => line.trim());
  return lines.flatMap((line, place) => {
    if (!line.trim()) return [];
    try {
      return [JSON.parse(line)];
    } catch (error) {
      throw new Error(`${file.name}, line ${place + 1}: no JSON (${error.message})`);
    }
  });
}

async function question() {
  const value = (name) => byId(name).value.trim();
  const asked = { val_set: await valSet(), part: value("part"), top_k: Number(value("top-k")), bottom_k: Number(value("bottom-k")) };
  if (value("metric")) asked.metric = value("metric");
  if (value("where")) asked.where = value("where");
  if (value("minus")) asked.minus = [value("minus")];
  if (value("layers")) asked.layers = value("layers").split(",").map((word) => word.trim());
  if (value("lexical")) asked.lexical = Number(value("lexical"));
  if (byId("tokens").checked) asked.tokens = true;
  if (phrase()) asked.phrase = phrase();
  return asked;
}

async function ask() {
  if (running) running.abort();
  running = new AbortController();
  const { signal } = running;
  byId("go").disabled = true;
  answer.setAttribute("aria-busy", "true");
  answer.replaceChildren(busy("Ranking. The first question loads the model …"));
  try {
    const result = await request("/api/query", await question(), signal);
    if (!signal.aborted) show(result);
  } catch (error) {
    if (signal.aborted) return;
    answer.replaceChildren(problem(error));
  }
  byId("go").disabled = false;
  answer.setAttribute("aria-busy", "false");
}

function show(result) {
  const { settings, explorer } = result;
  const blocks = [];
  const named = settings.metric === "cosine" ? "cosine" : "score";
  for (const { hits, bottom } of result.results) {
    if (!hits.length && !(bottom || []).length) blocks.push(make("p", { class: "empty" }, "No row has a score here. Try without a condition."));
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
    ...blocks,
    make("section", { class: "card again", "aria-label": "The same again" },
      make("h2", {}, "The same from a shell"),
      make("pre", { tabindex: "0" }, explorer.command),
      make("p", { class: "actions" }, copyButton("Copy command", () => explorer.command), copyButton("Copy link to this view", link)),
      fileNote),
  );
}

export async function openAsk(store, values) {
  const asked = values.has("text") || values.has("prompt") || values.has("completion");
  if (values.toString() === shown) return; // back from another view: what is there still answers it
  shown = values.toString();
  fill(store, values);
  byId("part").onchange = () => suggest(store);
  if (!store.parts.length) {
    answer.replaceChildren(make("p", { class: "empty" }, "This store has no part yet: ghoststore build makes one."));
  } else if (asked) {
    await ask();
  } else {
    answer.replaceChildren(make("p", { class: "empty" }, "The rows whose gradients point the same way appear here, best first."));
  }
}

form.addEventListener("change", (event) => {
  if (event.target.name === "kind") {
    showKind();
    dropPhrase();
  }
  if (event.target.id === "tokens" && answer.querySelector(".hit")) form.requestSubmit();
});
watchPhrase(kind, () => form.requestSubmit());
form.addEventListener("submit", (event) => {
  event.preventDefault();
  const fragment = `#/ask?${state()}`;
  shown = state().toString();
  if (location.hash !== fragment) history.pushState(null, "", fragment);
  ask();
});
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
