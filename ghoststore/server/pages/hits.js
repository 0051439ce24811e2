// The rows of a ranking, as cards.

import { pickBox } from "./basket.js";
import { make, visible, whole } from "./dom.js";
import { shadedText } from "./tokens.js";

const LONG = 700;

const minus = (words) => words.replaceAll("-", "\u2212");
const product = (hit) => (hit.similarity === undefined ? hit.score : hit.similarity);

// What a hit is ranked by, in its unit where it has one; and the words for such a number.
export const numberOf = (hit) => (hit.nats === null ? product(hit) : hit.nats);
export function inWords(number, settings) {
  return minus(settings.unit ? `${number.toExponential(2)} ${settings.unit.name}` : `${number.toPrecision(4)} ${settings.metric}`);
}

// What tokens add is not rounded, as stored vectors are: the factor that makes up for the rounding is left out.
const ofTokens = (settings) => (number) => inWords(settings.unit ? (number * settings.unit.factor) / settings.unit.rounding : number, settings);

function shaded(hit, settings) {
  const amount = ofTokens(settings);
  const parts = shadedText(`Tokens of ${visible(hit.id)}`, hit.text, hit.tokens, hit.recomputed, amount);
  const asking = hit.val_sample;
  if (!asking) return parts;
  const words = `What the question asks for here (${settings.val_rows === 1 ? "its tokens" : `val sample ${visible(asking.id)}`}): ${amount(asking.score)}`;
  return [...parts, make("details", { class: "asked", open: hit.rank === 1 ? "" : null },
    make("summary", {}, words),
    ...shadedText(`Tokens of the question, for ${visible(hit.id)}`, asking.text, asking.tokens, asking.score, amount))];
}

function textOf(hit, settings) {
  if (hit.tokens) return shaded(hit, settings);
  if (hit.text === null) return [make("p", { class: "none" }, "text not shown: the corpus is gone, or has changed")];
  return [make("p", { class: hit.text.length > LONG ? "text long" : "text", dir: "auto" }, hit.text)];
}

const byWordsAlone = (settings) => settings.lexical === 1;
const shownOf = (hit, settings) => (byWordsAlone(settings) ? hit.bm25 : numberOf(hit));

// What stands beside the number that a hit is shown by.
function beside(hit, settings, ranks) {
  const rank = ranks?.get(hit.source_row);
  const other = rank ? `, ranked ${whole(rank)} by gradients` : "";
  if (byWordsAlone(settings)) return inWords(numberOf(hit), settings) + other;
  return hit.bm25 === undefined ? null : `hybrid ${minus(hit.score.toPrecision(4))}, BM25 ${hit.bm25.toPrecision(4)}`;
}

function hitCard(hit, settings, largest, ranks) {
  const number = shownOf(hit, settings);
  const words = byWordsAlone(settings) ? `${hit.bm25.toPrecision(4)} BM25` : inWords(number, settings);
  const also = beside(hit, settings, ranks);
  const bar = make("span");
  bar.style.width = `${largest ? (100 * Math.abs(number)) / largest : 0}%`;
  const place = `#/sample/${encodeURIComponent(settings.part)}/${hit.source_row}`;
  return make("li", { class: "card hit" },
    make("span", { class: "rank" }, whole(hit.rank)),
    make("div", {},
      make("div", { class: "line" },
        make("span", { class: "score" }, words),
        also === null ? null : make("span", { class: "hint" }, also),
        make("a", { class: "id", href: place }, hit.id),
        hit.domain === null ? null : make("span", { class: "domain" }, hit.domain),
        pickBox(settings.part, hit.source_row, hit.id)),
      make("div", { class: number < 0 ? "bar down" : "bar", "aria-hidden": "true" }, bar),
      ...textOf(hit, settings)));
}

// With `ranks`, by row of the corpus, those of the same rows by gradients.
export function ranking(title, hits, settings, ranks) {
  if (!hits || !hits.length) return [];
  const largest = Math.max(...hits.map((hit) => Math.abs(shownOf(hit, settings))));
  return [title === null ? "" : make("h2", {}, title), make("ol", { class: "hits" }, ...hits.map((hit) => hitCard(hit, settings, largest, ranks)))];
}
