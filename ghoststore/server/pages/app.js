// Which view is shown: #/ask?…, #/runs, #/runs/NAME?with=OTHER, #/store, #/sample/PART/ROW.

import { goOn, request, storeName, turnTo } from "./api.js";
import { openAsk } from "./ask.js";
import { byId, make, problem } from "./dom.js";
import { leaveRuns, runsProblem, showRuns } from "./runs.js";
import { showSample } from "./sample.js";
import { leaveStore, showStore, storeProblem } from "./store.js";

const TITLES = { ask: "Ask", runs: "Runs", store: "Store", sample: "Sample" };
const VIEWS = Object.keys(TITLES);

let turn = new AbortController(); // of the view that is shown: what it asked is given up when another one is
let isLost = false;

// Of several stores of the server this tab shows one, which its address names.
async function chooseStore() {
  const { stores } = await request("/api/stores");
  const shown = stores.length === 1 ? stores[0] : stores.find((store) => store.name === storeName);
  if (shown) byId("store-name").textContent = shown.store;
  if (stores.length === 1) return true;
  const names = stores.map((store) => store.name);
  if (!shown) {
    turnTo(names[0], location.hash);
    return false;
  }
  const choice = byId("stores");
  if (choice.childElementCount !== names.length) choice.replaceChildren(...names.map((value) => make("option", { value }, value)));
  choice.value = storeName;
  choice.onchange = () => turnTo(choice.value, "#/store");
  byId("store-choice").hidden = false;
  return true;
}

async function route() {
  turn.abort();
  turn = new AbortController();
  const { signal } = turn;
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?", 2);
  const [asked, ...rest] = path.split("/");
  const view = VIEWS.includes(asked) ? asked : "ask";
  const values = new URLSearchParams(query || "");
  const reveal = () => {
    for (const name of VIEWS) byId(`view-${name}`).hidden = name !== view;
  };
  for (const name of ["ask", "runs", "store"]) {
    if (name === view) byId(`nav-${name}`).setAttribute("aria-current", "page");
    else byId(`nav-${name}`).removeAttribute("aria-current");
  }
  document.title = `${TITLES[view]} · ghoststore`;
  leaveRuns();
  leaveStore();
  try {
    if (!await chooseStore() || signal.aborted) return;
    if (view === "runs") {
      reveal();
      await showRuns(rest.map(decodeURIComponent), values);
      return;
    }
    const store = await request("/api/store", undefined, signal);
    reveal(); // not before: the form is filled from here on, and would lose what was typed into it
    if (view === "ask") await openAsk(store, values);
    if (view === "store") showStore(store);
    if (view === "sample") await showSample(rest.map(decodeURIComponent), signal);
  } catch (error) {
    if (signal.aborted) return;
    reveal();
    if (view === "runs") runsProblem(error);
    else if (view === "store") storeProblem(error, byId("store-name").textContent);
    else byId({ ask: "answer", sample: "sample" }[view]).replaceChildren(problem(error));
  }
}

// The server has ended, or was started anew with another token: the page says so, and goes on with the new address.
function lost(why) {
  const words = {
    ended: "The server has ended, or cannot be reached.",
    token: "The server does not know this page: it was started again, or the address had no token.",
  };
  byId("lost-why").textContent = words[why];
  byId("lost").hidden = false;
  isLost = true;
}

function found() {
  byId("lost").hidden = true;
  byId("lost-problem").textContent = "";
  isLost = false;
}

addEventListener("lost", (event) => lost(event.detail));
addEventListener("answered", () => {
  if (isLost) found();
});
byId("lost").addEventListener("submit", async (event) => {
  event.preventDefault();
  byId("lost-problem").textContent = "";
  try {
    if (!goOn(byId("address").value)) return; // on its way to another port
    await request("/api/stores");
  } catch (error) {
    byId("lost-problem").textContent = error.message;
    return;
  }
  byId("address").value = "";
  byId("main").focus();
  if (byId("answer").querySelector(".problem") && !byId("view-ask").hidden) byId("ask").requestSubmit();
  else route();
});

addEventListener("hashchange", route);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});
route();
