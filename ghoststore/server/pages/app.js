// Which view is shown: #/ask?…, #/store, #/sample/PART/ROW.

import { request } from "./api.js";
import { openAsk } from "./ask.js";
import { byId, problem } from "./dom.js";
import { showSample } from "./sample.js";
import { showStore } from "./store.js";

const VIEWS = ["ask", "store", "sample"];
const TITLES = { ask: "Ask", store: "Store", sample: "Sample" };

let turns = 0;

async function route() {
  turns += 1;
  const turn = turns;
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?", 2);
  const [asked, ...rest] = path.split("/");
  const view = VIEWS.includes(asked) ? asked : "ask";
  const reveal = () => {
    for (const name of VIEWS) byId(`view-${name}`).hidden = name !== view;
  };
  for (const name of ["ask", "store"]) {
    if (name === view) byId(`nav-${name}`).setAttribute("aria-current", "page");
    else byId(`nav-${name}`).removeAttribute("aria-current");
  }
  document.title = `${TITLES[view]} · ghoststore`;
  try {
    const store = await request("/api/store");
    if (turn !== turns) return; // another view was asked for meanwhile
    byId("store-name").textContent = store.store;
    reveal(); // not before: the form is filled from here on, and would lose what was typed into it
    if (view === "ask") await openAsk(store, new URLSearchParams(query || ""));
    if (view === "store") showStore(store);
    if (view === "sample") await showSample(rest.map(decodeURIComponent));
  } catch (error) {
    if (turn !== turns) return;
    reveal();
    const place = byId({ ask: "answer", store: "store", sample: "sample" }[view]);
    place.replaceChildren(problem(error));
  }
}

addEventListener("hashchange", route);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});
route();
