// A phrase of the question: words that are selected in its text, by which alone it is ranked. Its place is that of
// characters (code points) in the text, or in prompt and completion together.

import { byId, visible } from "./dom.js";

const BOXES = { text: ["text"], prompt: ["prompt", "completion"], file: [] };
let asked = ""; // "A:B"
let kindOf = () => "text";

export const phrase = () => asked;

const count = (text) => Array.from(text).length;
const whole = () => BOXES[kindOf()].map((name) => byId(name).value).join("");

// The selected words of the box that was used last, without spaces at their ends: [first, one past the last].
let box = null;
function selection() {
  if (!box || !BOXES[kindOf()].includes(box.id)) return null;
  const words = box.value.slice(box.selectionStart, box.selectionEnd);
  if (!words.trim()) return null;
  const before = BOXES[kindOf()].slice(0, BOXES[kindOf()].indexOf(box.id)).reduce((sum, name) => sum + count(byId(name).value), 0);
  const start = before + count(box.value.slice(0, box.selectionStart)) + count(words) - count(words.trimStart());
  return [start, start + count(words.trim())];
}

function show() {
  const [start, stop] = asked.split(":").map(Number);
  byId("phrase-shown").hidden = !asked;
  byId("phrase-words").textContent = asked ? visible(Array.from(whole()).slice(start, stop).join("")) : "";
  byId("phrase-take").hidden = kindOf() === "file";
  byId("phrase-take").disabled = selection() === null;
}

export function fillPhrase(given) {
  asked = /^\d+:\d+$/.test(given || "") && kindOf() !== "file" ? given : "";
  box = null;
  show();
}

export const dropPhrase = () => fillPhrase("");

export function watchPhrase(kind, ask) {
  kindOf = kind;
  for (const name of BOXES.text.concat(BOXES.prompt)) {
    byId(name).addEventListener("input", dropPhrase); // the places are of another text
    for (const event of ["select", "keyup", "pointerup", "focus"]) {
      byId(name).addEventListener(event, () => { box = byId(name); show(); });
    }
  }
  addEventListener("pointerup", () => { if (box) show(); }); // a selection may end outside its box
  byId("phrase-take").addEventListener("click", () => {
    asked = selection().join(":");
    show();
    ask();
  });
  byId("phrase-drop").addEventListener("click", () => {
    dropPhrase();
    byId(BOXES[kindOf()][0]).focus();
    ask();
  });
}
