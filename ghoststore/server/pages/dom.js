// Elements are made here, and texts enter them as text nodes alone.

export const byId = (id) => document.getElementById(id);

// make("p", { class: "hint" }, "text", element): attributes, then children; null and "" are left out.
export function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

export function facts(pairs) {
  const list = make("dl");
  for (const [name, value] of pairs) {
    if (value !== null && value !== undefined && value !== "") list.append(make("dt", {}, name), make("dd", {}, value));
  }
  return list;
}

export function copyButton(words, text) {
  const button = make("button", { type: "button", class: "plain" }, words);
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text());
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = words; }, 1500);
  });
  return button;
}

// Control characters, and those that turn the direction of a text, as what they are: for words of our own around a text.
export const visible = (text) => text.replace(/(?![\u200c\u200d])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (character) => (
  character === "\n" ? "↵" : character === "\t" ? "⇥" : `\\u{${character.codePointAt(0).toString(16)}}`));

// `word` as a shell takes it.
export const shellWord = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\"'\"'")}'`);

export const whole = (number) => number.toLocaleString("en");

export const percent = (share) => (share === null ? "none" : `${(100 * share).toFixed(1)} %`);

export function span(seconds) {
  const units = [["s", 60], ["min", 60], ["h", 24], ["d", Infinity]];
  for (const [unit, most] of units) {
    if (seconds < most) return `${seconds < 10 && unit !== "s" ? seconds.toFixed(1) : Math.round(seconds)} ${unit}`;
    seconds /= most;
  }
  return "";
}

// A table that can be scrolled by keys, where it is wider than its place. named: whether the first cell names its row.
// stacks: in a narrow window each row is a list of its cells, with the names of the columns beside them.
export function table(label, head, rows, { named = false, stacks = false } = {}) {
  const cells = (row) => row.map((cell, place) => (named && !place
    ? make("th", { scope: "row" }, cell)
    : make("td", stacks ? { role: "cell", "data-of": head[place] } : {}, cell)));
  const part = (name, role, ...children) => make(name, stacks ? { role } : {}, ...children); // which display: block takes away
  const titles = head.map((name) => (name ? make("th", { scope: "col", role: stacks ? "columnheader" : null }, name) : make("td", {})));
  return make("div", { class: stacks ? "card scroll stacks" : "card scroll", tabindex: "0", role: "region", "aria-label": label }, part("table", "table",
    part("thead", "rowgroup", part("tr", "row", ...titles)),
    part("tbody", "rowgroup", ...rows.map((row) => part("tr", "row", ...cells(row))))));
}

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  for (; number >= 1024 && place < units.length - 1; place += 1) number /= 1024;
  return `${number.toFixed(place && number < 10 ? 1 : 0)} ${units[place]}`;
}

export const problem = (error) => make("p", { class: "problem", role: "alert" }, error.message);
export const busy = (words) => make("p", { class: "hint busy", role: "status" }, words);
