// Requests, with the token of the address that was opened. It is kept for this tab alone, and taken out of the address.
// Of a server with several stores, the store of this tab stands in the address: ?store=NAME.

const KEY = "ghoststore-token";
const opened = new URLSearchParams(location.search);
export const storeName = opened.get("store");
if (opened.get("token")) {
  sessionStorage.setItem(KEY, opened.get("token"));
  history.replaceState(null, "", location.pathname + search(storeName) + location.hash);
}

function search(store, token) {
  const values = new URLSearchParams();
  if (token) values.set("token", token);
  if (store) values.set("store", store);
  return values.size ? `?${values}` : "";
}

export const token = () => sessionStorage.getItem(KEY) || "";

// The address of this view, for another tab or window.
export const link = () => `${location.origin}/${search(storeName, token())}${location.hash}`;

// This tab turns to another store of the server.
export const turnTo = (store, hash) => location.assign(`/${search(store)}${hash}`);

// The address that `ghoststore serve` printed, when it was started again: this tab goes on with it.
export function goOn(address) {
  let url;
  try {
    url = new URL(address.trim());
  } catch {
    throw new Error("This is no address. `ghoststore serve` prints one, with a token at its end.");
  }
  const given = url.searchParams.get("token");
  if (url.protocol !== "http:" || !["127.0.0.1", "localhost"].includes(url.hostname) || !given) {
    throw new Error("Give the whole address that `ghoststore serve` printed, with its token.");
  }
  if (url.origin === location.origin) sessionStorage.setItem(KEY, given);
  else location.assign(`${url.origin}/${search(storeName, given)}${location.hash}`);
  return url.origin === location.origin;
}

const of = (path) => (storeName && path !== "/api/stores" ? path.replace("/api/", `/api/stores/${encodeURIComponent(storeName)}/`) : path);
const tell = (name, detail) => dispatchEvent(new CustomEvent(name, { detail }));

// The answer of the server, which may be a refusal. "lost" is told where it does not answer, or not to this token.
async function answered(path, options) {
  let answer;
  try {
    answer = await fetch(of(path), { ...options, headers: { ...options.headers, Authorization: `Bearer ${token()}` } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    tell("lost", "ended");
    throw new Error("The server does not answer: it has ended. Start `ghoststore serve` again, and open its new address.");
  }
  tell(answer.status === 401 ? "lost" : "answered", "token");
  if (answer.ok) return answer;
  const said = await answer.text();
  let words = said; // the HTTP server itself says what it refuses in plain text
  try {
    words = JSON.parse(said).error.message;
  } catch { /* no JSON */ }
  throw Object.assign(new Error(words), { status: answer.status });
}

export async function request(path, body, signal) {
  const sent = { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  return (await answered(path, { signal, ...(body === undefined ? {} : sent) })).json();
}

// Server-sent events, each given to on(name, data). Read with fetch, because an EventSource sends no header.
export async function stream(path, on, signal) {
  const answer = await answered(path, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (held + value).split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s, 2)));
      on(fields.event, JSON.parse(fields.data));
    }
  }
}
