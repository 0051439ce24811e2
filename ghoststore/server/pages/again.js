// What each view ends with: the commands for a shell that say the same, and a link that shows it again.

import { link } from "./api.js";
import { copyButton, make } from "./dom.js";

// Options stay whole where a line folds: a hyphen would be taken for the end of a word.
const FLAG = /( --?[a-z][a-z-]*)/;
export const shell = (words) => make("pre", { tabindex: "0" }, ...words.split(FLAG).map((piece, place) => (place % 2 ? make("span", { class: "flag" }, piece) : piece)));

export const command = (words) => [shell(words), make("p", { class: "actions" }, copyButton("Copy command", () => words))];

export function again(commands, note = null) {
  const words = commands.join("\n");
  return make("section", { class: "card again", "aria-label": "The same again" }, make("h2", {}, "The same from a shell"),
    shell(words),
    make("p", { class: "actions" }, copyButton(commands.length > 1 ? "Copy commands" : "Copy command", () => words), copyButton("Copy link to this view", link)),
    note);
}
