// Requests, with the token of the address that was opened. It is kept for this tab alone, and taken out of the address.

const KEY = "ghoststore-token";
const given = new URLSearchParams(location.search).get("token");
if (given) {
  sessionStorage.setItem(KEY, given);
  history.replaceState(null, "", location.pathname + location.hash);
}

export const token = () => sessionStorage.getItem(KEY) || "";

// The address of this view, for another tab or window.
export const link = () => `${location.origin}/?token=${encodeURIComponent(token())}${location.hash}`;

export async function request(path, body, signal) {
  const headers = { Authorization: `Bearer ${token()}` };
  const options = { headers, signal };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: it has ended. Start `ghoststore serve` again, and open its new address.");
  }
  if (answer.ok) return answer.json();
  const said = await answer.text();
  let words = said; // the HTTP server itself says what it refuses in plain text
  try {
    words = JSON.parse(said).error.message;
  } catch { /* no JSON */ }
  throw new Error(words);
}
