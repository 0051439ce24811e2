// Texts whose tokens are shaded by what they add to a score (blue) or take off it (orange).

import { make, visible } from "./dom.js";

const LEVELS = 5;
const MOST = 4000; // characters of a text

// The text in order as [characters, { token, score } or null]. Places are of characters, which are code points here as in
// Python. The tokens of one character are one piece, with the sum of what they add.
function pieces(text, tokens) {
  const placed = tokens.filter((token) => token.start !== null);
  if (text === null || !placed.length) return tokens.map((token) => [token.token, token]);
  const characters = Array.from(text);
  const first = placed[0].start;
  const found = first ? [["… ", null]] : [];
  let read = first;
  let last = null;
  for (const token of placed) {
    if (token.end <= read) {
      if (last) last.score += token.score;
      continue;
    }
    if (token.end - first > MOST) break;
    const start = Math.max(token.start, read);
    if (start > read) found.push([characters.slice(read, start).join(""), null]);
    const shown = characters.slice(start, token.end).join("");
    last = { token: shown, score: token.score };
    found.push([shown, last]);
    read = token.end;
  }
  const left = characters.length - read;
  return left > 0 ? [...found, [` … ${left.toLocaleString("en")} more characters`, null]] : found;
}

const percent = (share) => `${(100 * share).toFixed(1).replace("-", "\u2212")} %`;

// `tokens` sum to `total`; `amount` writes such a number. One stop of the Tab key: arrow keys go through the tokens.
export function shadedText(label, text, tokens, total, amount) {
  const found = pieces(text, tokens);
  const most = Math.max(...found.map(([, token]) => (token ? Math.abs(token.score) : 0)), 0) || 1;
  const said = make("p", { class: "readout", role: "status" }, "");
  const spans = [];
  const box = make("div", { class: "text shaded", tabindex: "0", role: "group", "aria-label": label, dir: "auto" });
  for (const [characters, token] of found) {
    if (token === null) {
      box.append(characters);
      continue;
    }
    const level = Math.round((LEVELS * Math.abs(token.score)) / most);
    const span = make("span", { class: level ? `${token.score < 0 ? "off" : "adds"}${level} tok` : "tok" }, characters);
    span.token = token;
    spans.push(span);
    box.append(span);
  }
  let at = -1;
  function show(place) {
    spans[at]?.classList.remove("at");
    at = place;
    spans[at]?.classList.add("at");
    said.textContent = at < 0 ? "" : words(spans[at].token);
  }
  function words({ token, score }) {
    const share = total ? `, ${percent(score / total)} of ${amount(total)}` : "";
    return `“${visible(token)}” ${score < 0 ? "takes off" : "adds"} ${amount(Math.abs(score))}${share}`;
  }
  box.addEventListener("pointerover", (event) => {
    const place = spans.indexOf(event.target);
    if (place >= 0) show(place);
  });
  box.addEventListener("pointerleave", () => { if (document.activeElement !== box) show(-1); });
  box.addEventListener("focus", () => { if (at < 0 && box.matches(":focus-visible")) show(strongest(spans)); });
  box.addEventListener("blur", () => show(-1));
  box.addEventListener("keydown", (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    show(Math.min(Math.max(to, 0), spans.length - 1));
    spans[at]?.scrollIntoView({ block: "nearest" });
  });
  return [box, said];
}

const strongest = (spans) => spans.reduce((best, span, place) => (Math.abs(span.token.score) > Math.abs(spans[best].token.score) ? place : best), 0);

export function legend() {
  const steps = [5, 3, 1].map((level) => make("span", { class: `off${level}` })).concat(make("span", {}), [1, 3, 5].map((level) => make("span", { class: `adds${level}` })));
  return make("p", { class: "legend" },
    make("span", {}, "takes off"), make("span", { class: "scale", "aria-hidden": "true" }, ...steps), make("span", {}, "adds"),
    make("span", { class: "hint" }, "The deepest shade of a text is its strongest token: point at one, or focus the text and use the arrow keys, for its number. The tokens sum to the score before the part rounded it; a token adds through all the losses behind it, not by the loss of predicting it alone."));
}
