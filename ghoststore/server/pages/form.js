// The form of a question: its fields, what they are in the fragment of an address, and as a question to the server.

import { byId, make } from "./dom.js";
import { dropPhrase, fillPhrase, phrase, watchPhrase } from "./phrase.js";

const FIELDS = ["text", "prompt", "completion", "part", "metric", "top-k", "bottom-k", "where", "minus", "layers", "exclude-layers", "lexical"];
const SWITCHES = ["tokens", "words"];
const MORE = ["minus", "layers", "exclude-layers", "lexical"];
const DEFAULTS = { "top-k": "10", "bottom-k": "0" };
const MOST_CHIPS = 24;
const EMPTY = "Say what to rank by: there is no text yet.";

export const form = byId("ask");
export const kind = () => form.elements.kind.value;
const value = (name) => byId(name).value.trim();

function showKind() {
  for (const box of form.querySelectorAll("[data-kind]")) box.hidden = box.dataset.kind !== kind();
}

let listed = { parts: [] }; // the store whose parts the form names

export function fill(store, state) {
  listed = store;
  const parts = store.parts.map((part) => part.name);
  byId("part").replaceChildren(...parts.map((name) => make("option", { value: name }, name)));
  for (const name of FIELDS) {
    if (name !== "part") byId(name).value = state.get(name) ?? DEFAULTS[name] ?? "";
  }
  for (const name of SWITCHES) byId(name).checked = state.has(name);
  if (parts.includes(state.get("part"))) byId("part").value = state.get("part");
  form.elements.kind.value = state.has("prompt") || state.has("completion") ? "prompt" : state.get("kind") === "file" ? "file" : "text";
  byId("more").open = MORE.some((name) => state.has(name));
  showKind();
  fillPhrase(state.get("phrase"));
  const suggest = () => showDomains(domains());
  byId("part").onchange = suggest;
  suggest();
}

export function state() {
  const values = new URLSearchParams();
  const left = { text: ["prompt", "completion"], prompt: ["text"], file: ["text", "prompt", "completion"] }[kind()];
  for (const name of FIELDS) {
    const { value: given } = byId(name);
    if (given !== "" && given !== DEFAULTS[name] && !left.includes(name)) values.set(name, given);
  }
  for (const name of SWITCHES) if (byId(name).checked) values.set(name, "1");
  if (phrase()) values.set("phrase", phrase());
  if (kind() === "file") values.set("kind", "file");
  return values;
}

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

export async function question() {
  const list = (name) => value(name).split(",").map((word) => word.trim());
  const asked = {
    val_set: await valSet(), part: value("part"), top_k: Number(value("top-k")), bottom_k: Number(value("bottom-k")), histogram: true,
  };
  if (value("metric")) asked.metric = value("metric");
  if (value("where")) asked.where = value("where");
  if (value("minus")) asked.minus = [value("minus")];
  if (value("layers")) asked.layers = list("layers");
  if (value("exclude-layers")) asked.exclude_layers = list("exclude-layers");
  if (value("lexical")) asked.lexical = Number(value("lexical"));
  if (byId("tokens").checked) asked.tokens = true;
  if (phrase()) asked.phrase = phrase();
  return asked;
}

// The same question to the words of the rows alone.
export function byWords(asked) {
  const { tokens, phrase: some, histogram, ...rest } = asked;
  return { ...rest, lexical: 1 };
}

// Domains as chips: what is pressed stands in the condition, `(…) AND domain IN ('a', 'b')`, and is read from there.

const NAMED = /^(?:\(([^]*)\) AND )?domain (?:IN \(('(?:[^']|'')*'(?:, '(?:[^']|'')*')*)\)|IS NULL)$/;
const quoted = (name) => `'${name.replaceAll("'", "''")}'`;

function condition() {
  const found = NAMED.exec(value("where"));
  if (!found || !closed(found[1] || "")) return { rest: value("where"), names: [] };
  return { rest: found[1] || "", names: (found[2] || "").match(/'(?:[^']|'')*'/g)?.map((word) => word.slice(1, -1).replaceAll("''", "'")) || [] };
}

// Whether each bracket outside quotes is closed within `words`: those of `(a) OR (b) AND domain …` belong to two.
function closed(words) {
  let open = 0;
  for (const sign of words.replace(/'[^']*'|"[^"]*"/g, "")) {
    if (sign === "(") open += 1;
    if (sign === ")") open -= 1;
    if (open < 0) return false;
  }
  return open === 0;
}

function restrict(rest, words) {
  byId("where").value = rest && words ? `(${rest}) AND ${words}` : rest || words;
  pressChips();
}

const chooseDomains = (names, rest) => restrict(rest, names.length ? `domain IN (${names.map(quoted).join(", ")})` : "");

// Rank one domain alone; null: rows without one.
export function chooseDomain(name) {
  restrict(condition().rest, name === null ? "domain IS NULL" : `domain IN (${quoted(name)})`);
  form.requestSubmit();
}

const domainsOf = (store) => store.parts.find((part) => part.name === byId("part").value)?.manifest.corpus.domains || [];

// Those of the part that is asked.
export const domains = () => domainsOf(listed);

function showDomains(domains) {
  byId("conditions").replaceChildren(...domains.map((name) => make("option", { value: `domain = ${quoted(name)}` })));
  byId("chips").replaceChildren(...domains.slice(0, MOST_CHIPS).map((name) => {
    const chip = make("button", { type: "button", class: "chip", "aria-pressed": "false" }, name);
    chip.domain = name;
    chip.addEventListener("click", () => {
      const { rest, names } = condition();
      chooseDomains(names.includes(name) ? names.filter((other) => other !== name) : [...names, name], rest);
    });
    return chip;
  }));
  byId("chips").hidden = !domains.length;
  pressChips();
}

function pressChips() {
  const { names } = condition();
  for (const chip of byId("chips").children) chip.setAttribute("aria-pressed", String(names.includes(chip.domain)));
}

form.addEventListener("change", (event) => {
  if (event.target.name === "kind") {
    showKind();
    dropPhrase();
  }
});
// A file that is dropped anywhere on the form is the val file.
const holdsFile = (event) => event.dataTransfer?.types.includes("Files");
form.addEventListener("dragover", (event) => {
  if (holdsFile(event)) event.preventDefault();
});
form.addEventListener("drop", (event) => {
  if (!holdsFile(event)) return;
  event.preventDefault();
  byId("file").files = event.dataTransfer.files;
  form.elements.kind.value = "file";
  showKind();
  dropPhrase();
});
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
byId("where").addEventListener("input", pressChips);
watchPhrase(kind, () => form.requestSubmit());
