// The Sample page: one row of the corpus, whole.

import { request } from "./api.js";
import { byId, busy, facts, make, whole } from "./dom.js";

export async function showSample([part, row]) {
  const place = byId("sample");
  place.replaceChildren(busy("Reading the sample …"));
  const sample = await request(`/api/sample/${encodeURIComponent(part)}/${encodeURIComponent(row)}`);
  const cells = (row_) => [row_.row, row_.window_start, row_.n_tokens, row_.status.replaceAll("_", " "), row_.loss === null ? "none" : row_.loss.toPrecision(4)];
  const head = ["row of the part", "first token", "tokens", "status", "loss"].map((word) => make("th", { scope: "col" }, word));
  const rows = sample.rows.map((row_) => make("tr", {}, ...cells(row_).map((cell) => make("td", {}, typeof cell === "number" ? whole(cell) : cell))));
  const again = new URLSearchParams({ part, text: sample.text || "" });
  place.replaceChildren(
    make("article", { class: "card" },
      make("h2", { class: "id" }, sample.id),
      facts([
        ["part", sample.part],
        ["row of the corpus", whole(sample.source_row)],
        ["domain", sample.domain || "none"],
        ...Object.entries(sample.fields).map(([name, value]) => [name, value === null ? "null" : String(value)]),
      ]),
      make("h2", {}, "Text"),
      sample.text === null ? make("p", { class: "none" }, "not shown: the corpus is gone, or has changed") : make("p", { class: "text" }, sample.text),
      sample.text ? make("p", {}, make("a", { href: `#/ask?${again}` }, "Rank by this text")) : null,
      make("h2", {}, "Rows"),
      make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows))),
    ),
  );
}
