// The Store page: its parts and training runs, where they come from, and whether every byte is as it was written.

import { again } from "./again.js";
import { stream } from "./api.js";
import { byId, bytes, facts, make, percent, problem, shellWord, table, whole } from "./dom.js";

const of = (done, all) => (done === all ? whole(done) : `${whole(done)} of ${whole(all)} committed`);
const list = (words) => (words && words.length ? words.join(", ") : "none");
const number = (value) => (value === null || value === undefined ? "none" : value.toPrecision(4));
const software = (versions) => Object.entries(versions).map(([name, version]) => `${name} ${version}`).join(", ");
const counts = (table_) => Object.entries(table_).map(([name, count]) => `${whole(count)} ${name.replaceAll("_", " ")}`).join(", ");

// What an index was found to recall when it was built, or why it cannot be asked any more.
function indexWords(index) {
  if (!["current", "of a union"].includes(index.state)) {
    const remedy = index.state === "damaged" ? "; ghoststore index builds it again" : ""; // the others say so
    return [make("strong", {}, index.name), " ", badge(index.state), ` ${index.problem}${remedy}`];
  }
  const recall = Object.entries(index.recall).map(([kind, at]) => `${Object.entries(at).map(([name, value]) => `recall@${name.replace("at_", "")} ${number(value)}`).join(", ")} for ${kind}s`);
  return [`${index.name} (${index.state}); ${[index.factory, ...recall].join("; ")}`];
}

// What fidelity was measured, and whether it is that of the rows that are committed now.
function fidelityWords(measured) {
  if (measured.state === "damaged") return [`by ${measured.metric} `, badge("damaged"), ` ${measured.problem}; ghoststore fidelity measures it again`];
  const { layers } = measured;
  const words = `Spearman ${number(layers.spearman.value)} to exact gradients, recall@${layers.at} ${number(layers.recall.value)}, relative error ${number(layers.relative_error.value)}; ${whole(measured.rows)} rows × ${whole(measured.val_samples)} val samples by ${measured.metric}`;
  return measured.state === "current" ? [words] : [words, " ", badge("stale"), ` ${measured.problem}; ghoststore fidelity measures it again`];
}

const badge = (state) => make("span", { class: `badge ${state}` }, state);
const several = (items, words) => make("ul", { class: "plain" }, ...items.map((item) => make("li", {}, ...words(item))));

const print = (fingerprint) => (fingerprint && fingerprint.length > 20 ? `${fingerprint.slice(0, 19)}…` : fingerprint);

function provenance(source) {
  const { manifest } = source;
  return [
    ["checkpoint", manifest.source.checkpoint],
    ["corpus", `${manifest.source.data || manifest.source.corpus || "in memory"} (${whole(manifest.corpus.samples || 0)} samples)`],
    ["its fingerprint", print(manifest.corpus.fingerprint)],
    ["tokenizer", manifest.tokenizer && print(manifest.tokenizer.fingerprint)],
    ["made with", software(manifest.software)],
  ];
}

function partCard(part) {
  const { manifest } = part;
  const { projection } = manifest;
  const title = make("h3", {}, make("a", { href: `#/ask?part=${encodeURIComponent(part.name)}` }, part.name));
  return make("article", { class: "card" }, title, facts([
    ["rows", of(part.committed, part.rows)],
    ["status", counts(part.statuses)],
    ["tokens", whole(part.tokens)],
    ["vectors", `${whole(part.dimension)} × ${part.dtype}`],
    ["a row", `${whole(part.row_bytes)} bytes, ids and texts aside`],
    ["on disk", bytes(part.bytes)],
    ["domains", list(manifest.corpus.domains)],
    ["kept fields", list(Object.keys(part.fields))],
    ["metric", projection.precondition === "none" ? "plain gradients" : `preconditioned (${projection.precondition})`],
    ["projection", `${projection.kind}, seed ${projection.seed}`],
    ["layers", `${whole(manifest.layers.length)}, ${(100 * manifest.coverage.share).toFixed(1)} % of the parameters`],
    ["indexes", part.indexes.length ? several(part.indexes, indexWords) : "none: ghoststore index builds one"],
    ["fidelity", part.fidelity.length ? several(part.fidelity, fidelityWords) : "none: ghoststore fidelity measures it"],
  ]), make("h4", {}, "Provenance"), facts(provenance(part)));
}

function runCard(run) {
  return make("article", { class: "card" }, make("h3", {}, make("a", { href: `#/runs/${encodeURIComponent(run.name)}` }, run.name)), facts([
    ["steps", of(run.committed, run.steps)],
    ["samples a step", `${whole(run.ranks)} × ${whole(run.batch)} (ranks × batch)`],
    ["rows", whole(run.rows)],
    ["train loss", number(run.train_loss)],
    ["val loss", number(run.val_loss)],
    ["negative scores", percent(run.negative)],
    ["tokens", whole(run.tokens)],
    ["on disk", bytes(run.bytes)],
    ["domains", list(run.manifest.corpus.domains)],
    ["gradients", run.gradients ? `of ${whole(run.gradients.steps)} steps, ${run.gradients.dtype}` : "none kept"],
  ]), make("h4", {}, "Provenance"), facts(provenance(run)));
}

// Reads every byte of the store; Stop ends it, and so does leaving the page.
let checking = null;

function verifyCard(store) {
  const said = make("div", { class: "verify", "aria-live": "polite" }, make("p", { class: "hint" }, "Compares every file with what was written. It reads the whole store."));
  const button = make("button", { type: "button", class: "plain" }, "Verify");
  if (checking) checking.abort();
  checking = null;
  button.addEventListener("click", async () => {
    if (checking) {
      checking.abort();
      return;
    }
    checking = new AbortController();
    const { signal } = checking;
    button.textContent = "Stop";
    const bar = make("progress", { "aria-label": "verified", max: 1, value: 0 });
    const words = make("p", { class: "hint" }, "Reading …");
    said.replaceChildren(make("p", {}, bar), words);
    let ended = false;
    try {
      await stream("/api/verify/events", (kind, data) => {
        if (kind === "progress") {
          bar.max = data.total || 1;
          bar.value = data.done;
          words.textContent = `${data.what}: ${whole(data.done)} of ${whole(data.total)} ${data.unit}`;
        } else {
          ended = true;
          said.replaceChildren(...(kind === "report" ? verdict(data) : [problem(data.error)]));
        }
      }, signal);
      if (!ended) throw new Error("The server ended before all was read.");
    } catch (error) {
      said.replaceChildren(error.name === "AbortError" ? make("p", { class: "hint" }, "Stopped: not all was read.") : problem(error));
    }
    checking = null;
    button.textContent = "Verify again";
  });
  const line = make("p", { class: "actions" }, button, make("code", { class: "hint" }, `ghoststore verify --store ${shellWord(store.store)}`));
  return make("section", { class: "card", "aria-label": "Verify" }, said, line);
}

function verdict(report) {
  const found = `${whole(report.files)} files, ${bytes(report.bytes)}`;
  const others = [["leftovers", report.leftovers], ["files of others", report.unknown]].filter(([, files]) => files.length);
  const blocks = [make("p", { class: report.sound ? "sound" : "problem" }, report.sound ? `Sound: ${found} are as they were written.` : `${whole(report.damage.length)} of ${found} are damaged.`)];
  if (report.damage.length) {
    blocks.push(table("Damage", ["part or run", "file", "problem"], report.damage.map((one) => [one.part || one.run || "the store", one.file, one.problem])));
  }
  for (const [name, files] of others) blocks.push(make("p", { class: "hint" }, `${whole(files.length)} ${name}: ${files.slice(0, 5).map((one) => one.file).join(", ")}${files.length > 5 ? ", …" : ""}`));
  return blocks;
}

export function leaveStore() {
  if (checking) checking.abort();
}

// A store that cannot be described can be verified still: that names what is damaged.
export const storeProblem = (error, store) => byId("store").replaceChildren(problem(error), make("h2", {}, "Is it sound?"), verifyCard({ store }));

export function showStore(store) {
  const group = (title, cards, none) => [
    make("h2", {}, title),
    cards.length ? make("div", { class: "parts" }, ...cards) : make("p", { class: "empty" }, none),
  ];
  byId("store").replaceChildren(
    ...group(`Parts (${store.parts.length})`, store.parts.map(partCard), "No part yet: ghoststore build makes one."),
    ...group(`Training runs (${store.runs.length})`, store.runs.map(runCard), "No training run: ghoststore train makes one."),
    make("h2", {}, "Is it sound?"), verifyCard(store),
    again([`ghoststore info --store ${shellWord(store.store)}`]),
  );
}
