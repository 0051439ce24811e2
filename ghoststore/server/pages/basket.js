// Rows to train on: a whole ranking, cut somewhere, or rows that were picked by hand. The server writes them as
// `ghoststore select` does.

import { shell } from "./again.js";
import { link, request, storeName } from "./api.js";
import { busy, copyButton, make, problem, visible, whole } from "./dom.js";
import { Taking } from "./taking.js";

const KEY = `ghoststore-picked ${storeName || ""}`; // of each store its own

// What is picked, in this tab: {part, rows: {row of the corpus: id}}. Picks are of one part.
function picked(part) {
  try {
    const kept = JSON.parse(sessionStorage.getItem(KEY) || "null");
    if (kept && kept.part === part) return kept.rows;
  } catch { /* another page's */ }
  return {};
}

const places = (part) => Object.keys(picked(part)).map(Number).sort((one, other) => one - other);
export const isPicked = (part, row) => row in picked(part);

export function pick(part, row, id, wanted) {
  const rows = { ...picked(part) };
  if (wanted) rows[row] = id;
  else delete rows[row];
  sessionStorage.setItem(KEY, JSON.stringify({ part, rows }));
  dispatchEvent(new CustomEvent("picked"));
}

// A box to pick a row with.
export function pickBox(part, row, id) {
  const box = make("input", { type: "checkbox", class: "pick", "aria-label": `Pick ${visible(id)}` });
  box.of = [part, row];
  box.checked = isPicked(part, row);
  box.addEventListener("change", () => pick(part, row, id, box.checked));
  return make("label", { class: "picks" }, box, make("span", { "aria-hidden": "true" }, "pick"));
}

let refresh = () => {}; // of the basket that is shown
addEventListener("picked", () => {
  for (const box of document.querySelectorAll("input.pick")) box.checked = isPicked(...box.of);
  refresh();
});

// The rows in the link: picks=1,5,9. They are taken in a tab that has no picks of its own.
export const picksOf = (part) => places(part).join(",");
export function takePicks(part, words) {
  const rows = (words || "").split(",").filter((word) => /^\d{1,15}$/.test(word));
  if (rows.length && !places(part).length) sessionStorage.setItem(KEY, JSON.stringify({ part, rows: Object.fromEntries(rows.map((row) => [row, `row ${row}`])) }));
}

function save({ name, base64 }) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const anchor = make("a", { download: name });
  anchor.href = URL.createObjectURL(new Blob([bytes]));
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 10_000);
}

// `asked` is the question of the ranking. What of it choosing has no word for was not asked to be chosen by.
// `domains` are those of the part, `values` what the link says of the choice.
export function basket(asked, settings, domains, values) {
  const { top_k: top, bottom_k: bottom, tokens, histogram, ...question } = asked;
  const { part } = settings;
  const answer = make("div", { "aria-live": "polite" });
  const go = make("button", { type: "submit" }, "Choose and download");
  const drop = make("button", { type: "button", class: "plain" }, "Empty");
  const taking = new Taking(domains, settings.unit && settings.lexical === undefined, values, drop);
  drop.addEventListener("click", () => {
    sessionStorage.removeItem(KEY);
    dispatchEvent(new CustomEvent("picked"));
    taking.all.focus();
  });
  const form = make("form", { class: "taking", autocomplete: "off" }, ...taking.elements, make("p", { class: "actions" }, go));
  const showPicks = () => taking.show(places(part).length);
  form.addEventListener("change", () => {
    showPicks();
    dispatchEvent(new CustomEvent("taken", { detail: taking.words() }));
  });
  refresh = showPicks;
  showPicks();
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    go.disabled = true;
    answer.replaceChildren(busy("Choosing. The model is loaded for it …"));
    try {
      const how = taking.byHand ? { source_rows: places(part), where: null } : taking.options();
      const chosen = await request("/api/select", { ...question, part, ...how, ...taking.files() });
      answer.replaceChildren(...report(chosen));
      save(chosen.files[0]);
    } catch (error) {
      answer.replaceChildren(problem(error));
    }
    go.disabled = false;
  });
  return make("section", { class: "card again", "aria-label": "Rows to train on" }, make("h2", {}, "Rows to train on"), form, answer);
}

function report({ report: made, files, explorer }) {
  const domains = made.domains.map((of) => `${visible(of.domain)} ${whole(of.chosen)}`).join(", ");
  const links = files.map((file) => {
    const button = make("button", { type: "button", class: "plain" }, file.name);
    button.addEventListener("click", () => save(file));
    return button;
  });
  return [
    make("p", { class: "done" }, `${whole(made.samples)} of ${whole(made.available)} rows, ${whole(made.tokens)} tokens: ${domains}.`),
    ...explorer.notes.map((note) => make("p", { class: "about" }, `Note: ${note}`)),
    shell(explorer.command),
    make("p", { class: "actions" }, ...links, copyButton("Copy command", () => explorer.command), copyButton("Copy link to this choice", link)),
  ];
}
