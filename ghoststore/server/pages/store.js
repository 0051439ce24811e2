// The Store page: its parts and training runs.

import { byId, bytes, facts, make, whole } from "./dom.js";

const of = (done, all) => (done === all ? whole(done) : `${whole(done)} of ${whole(all)} committed`);
const list = (words) => (words && words.length ? words.join(", ") : "none");
const number = (value) => (value === null ? "none" : value.toPrecision(4));
const software = (versions) => Object.entries(versions).map(([name, version]) => `${name} ${version}`).join(", ");
const counts = (table) => Object.entries(table).map(([name, count]) => `${whole(count)} ${name.replaceAll("_", " ")}`).join(", ");

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
    ["checkpoint", manifest.source.checkpoint],
    ["corpus", `${manifest.source.data} (${whole(manifest.corpus.samples)} samples)`],
    ["indexes", list(part.indexes.map((index) => `${index.name} (${index.state})`))],
    ["fidelity", list(part.fidelity.map((measured) => `${measured.metric || "measured"} (${measured.state})`))],
    ["made with", software(manifest.software)],
  ]));
}

function runCard(run) {
  return make("article", { class: "card" }, make("h3", {}, run.name), facts([
    ["steps", of(run.committed, run.steps)],
    ["samples a step", `${whole(run.ranks)} × ${whole(run.batch)} (ranks × batch)`],
    ["rows", whole(run.rows)],
    ["train loss", number(run.train_loss)],
    ["val loss", number(run.val_loss)],
    ["negative scores", run.negative === null ? "none" : `${(100 * run.negative).toFixed(1)} %`],
    ["tokens", whole(run.tokens)],
    ["on disk", bytes(run.bytes)],
    ["domains", list(run.manifest.corpus.domains)],
    ["gradients", run.gradients ? `of ${whole(run.gradients.steps)} steps, ${run.gradients.dtype}` : "none kept"],
    ["made with", software(run.manifest.software)],
  ]));
}

export function showStore(store) {
  const group = (title, cards, none) => [
    make("h2", {}, title),
    cards.length ? make("div", { class: "parts" }, ...cards) : make("p", { class: "empty" }, none),
  ];
  byId("store").replaceChildren(
    ...group(`Parts (${store.parts.length})`, store.parts.map(partCard), "No part yet: ghoststore build makes one."),
    ...group(`Training runs (${store.runs.length})`, store.runs.map(runCard), "No training run: ghoststore train makes one."),
  );
}
