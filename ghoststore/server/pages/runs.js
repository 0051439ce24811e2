// The Runs page: all training runs, or one as it grows, beside another.

import { again } from "./again.js";
import { request, stream } from "./api.js";
import { busy, byId, facts, make, percent, problem, shellWord, span, table, whole } from "./dom.js";
import { Plot, histogramSeries, short } from "./plot.js";

const LINES = 8; // domains and groups with a line of their own
const FIRST = 8; // samples of a list that are shown at once
const SECONDS = 3;
const place = byId("runs");
let watching = null; // what ends what this page reads
let shown = null; // the view that is watched

const words = (name) => `#/runs/${encodeURIComponent(name)}`;
const pause = (signal, seconds) => new Promise((done) => {
  const timer = setTimeout(done, 1000 * seconds);
  signal.addEventListener("abort", () => { clearTimeout(timer); done(); });
});

export function leaveRuns() {
  if (watching) watching.abort();
  watching = null;
}

// A page that nobody looks at reads nothing: a browser opens few connections to one server.
document.addEventListener("visibilitychange", () => {
  if (document.hidden && watching) leaveRuns();
  else if (!document.hidden && shown && !byId("view-runs").hidden) shown();
});

export async function showRuns([name], values) {
  shown = () => showRuns([name], values);
  leaveRuns();
  watching = new AbortController();
  const { signal } = watching;
  byId("runs-title").textContent = name ? `Run ${name}` : "Runs";
  if (name) await showOne(name, values.get("with"), signal);
  else await showAll(signal);
}

async function showAll(signal) {
  place.replaceChildren(busy("Reading the runs …"));
  let last = "";
  while (!signal.aborted) {
    const { store, runs } = await request("/api/runs", undefined, signal);
    if (signal.aborted) return;
    const now = JSON.stringify(runs.map((run) => ({ ...run, commit_age: 0 })));
    if (now !== last) place.replaceChildren(...list(runs), again([`ghoststore info --store ${shellWord(store)}`]));
    last = now;
    await pause(signal, SECONDS);
  }
}

function list(runs) {
  if (!runs.length) return [make("p", { class: "empty" }, "No training run: ghoststore train makes one.")];
  const rows = runs.map((run) => [
    make("a", { href: words(run.name) }, run.name), badge(run.state), progress(run.committed, run.steps), short(run.train_loss),
    short(run.val_loss), percent(run.negative), whole(run.rows), run.manifest.corpus.domains.length ? run.manifest.corpus.domains.join(", ") : "none",
  ]);
  return [table("Training runs", ["run", "state", "steps", "train loss", "val loss", "negative scores", "rows", "domains"], rows, { stacks: true })];
}

const badge = (state) => make("span", { class: `badge ${state}` }, state || "unfinished");

function progress(done, all) {
  return make("span", { class: "progress" }, make("progress", { value: done, max: all || 1, "aria-label": "committed steps" }), ` ${whole(done)} of ${whole(all)}`);
}

async function showOne(name, other, signal) {
  place.replaceChildren(busy("Reading the run …"));
  const { runs } = await request("/api/runs", undefined, signal);
  const names = runs.map((run) => run.name);
  if (!names.includes(name)) throw new Error(`This store has no run ${name}. It has: ${names.join(", ") || "none"}.`);
  const page = new Page(name, names.includes(other) ? other : null, names);
  place.replaceChildren(page.element);
  await Promise.all([name, page.other].filter(Boolean).map((one) => watch(one, page, signal)));
}

// Reads a run until its last step is committed, and goes on when the server was away.
async function watch(name, page, signal) {
  for (let ended = false; !ended && !signal.aborted;) {
    try {
      await stream(`/api/runs/${encodeURIComponent(name)}/events`, (kind, data) => {
        if (kind === "frame") page.frame(name, data);
        if (kind === "problem") throw Object.assign(new Error(data.error.message), { status: 400 });
        ended = kind === "end";
      }, signal);
    } catch (error) {
      if (signal.aborted) return;
      if (error.status && error.status !== 503 && error.status !== 401) throw error;
      page.say(error.message);
    }
    if (!ended) await pause(signal, SECONDS);
  }
}

class Page {
  constructor(name, other, names) {
    Object.assign(this, { name, other, frames: {} });
    this.status = make("p", { class: "status" });
    this.live = make("p", { class: "hidden", role: "status" });
    this.trouble = make("p", { class: "hint" });
    this.facts = make("div");
    this.tables = make("div");
    this.samples = make("div", { class: "columns even" });
    this.shell = make("div");
    this.plots = {
      loss: new Plot("Loss", { note: "Nats a token, means over equal bins of steps.", sparse: true }),
      scores: new Plot("Scores over the steps", { note: "Quantiles of all scores in a bin of steps; the scale is linear near 0, logarithmic beyond.", bent: true }),
      domains: new Plot("By domain", { note: "Mean weighted score: each step counts alike." }),
      groups: new Plot("By val group", { note: "Mean score for each group of the val set.", bent: true }),
      kept: new Plot("What was kept", { note: "Share of the candidates that steps trained on." }),
      recent: new Plot("The newest scores", { note: "How many of them lie where.", across: "score", bars: true }),
    };
    this.element = make("div", { class: "run" },
      make("p", { class: "actions between" }, make("a", { href: "#/runs" }, "All runs"), this.chooser(names)),
      this.status, this.live, this.trouble, this.facts,
      make("div", { class: "plots" }, ...Object.values(this.plots).map((plot) => plot.element)),
      this.tables, this.samples, this.shell);
  }

  chooser(names) {
    const options = names.filter((one) => one !== this.name).map((one) => make("option", { value: one }, one));
    if (!options.length) return null;
    const choice = make("select", { id: "compare" }, make("option", { value: "" }, "no other run"), ...options);
    choice.value = this.other || "";
    choice.addEventListener("change", () => {
      location.hash = choice.value ? `${words(this.name)}?with=${encodeURIComponent(choice.value)}` : words(this.name);
    });
    return make("span", { class: "choice" }, make("label", { for: "compare" }, "Beside"), choice);
  }

  say(message) {
    this.trouble.textContent = message;
  }

  frame(name, data) {
    this.say(data.notes.join(" "));
    this.frames[name] = data;
    const [mine, other] = [this.frames[this.name], this.other ? this.frames[this.other] : null];
    if (!mine) return;
    this.head(mine);
    if (mine.waiting) return;
    this.draw([mine, other].filter((one) => one && !one.waiting));
    this.facts.replaceChildren(other && !other.waiting ? beside(mine, other) : make("div", { class: "card" }, facts(numbers(mine))));
    this.tables.replaceChildren(...domainTables(mine, other && !other.waiting ? other : null));
    const same = JSON.stringify([mine.best, mine.worst]);
    if (same !== this.same) this.samples.replaceChildren(...extremes("Best samples so far", mine, mine.best), ...extremes("Worst samples so far", mine, mine.worst));
    this.same = same;
    if (!this.shell.childElementCount) this.shell.replaceChildren(again(mine.explorer.commands));
  }

  head(frame) {
    const left = [frame.waiting, frame.unread ? `${whole(frame.unread)} steps are being read` : null];
    if (frame.state !== "stopped" && frame.seconds_left !== null) left.push(`about ${span(frame.seconds_left)} left`);
    if (frame.state !== "finished" && frame.commit_age !== null) left.push(`last commit ${span(frame.commit_age)} ago`);
    const missing = frame.gaps.reduce((sum, [first, stop]) => sum + stop - first, 0);
    if (missing) left.push(`${whole(missing)} steps missing`);
    this.status.replaceChildren(badge(frame.state), progress(frame.steps, frame.planned), make("span", { class: "hint" }, left.filter(Boolean).join(", ")));
    if (this.live.textContent !== (frame.state || "")) this.live.textContent = frame.state || "";
  }

  draw(frames) {
    const named = (frame, line) => (frames.length > 1 ? `${frame.run}: ${line}` : line);
    const each = (make_) => frames.flatMap((frame, place_) => make_(frame, place_ ? " dashed" : "").map((line) => ({ ...line, name: named(frame, line.name) })));
    const { loss, scores, domains, groups, kept, recent } = this.plots;
    loss.show(each(({ curve }, dash) => [
      { name: "train", x: curve.steps, y: curve.train_loss, mark: `s0${dash}` },
      { name: "val", x: curve.steps, y: curve.val_loss, mark: `s1${dash}` },
    ]));
    const [{ spread }] = frames;
    const [lowest, low, , high, highest] = spread.bands;
    scores.show(each((frame, dash) => [
      { name: "mean", x: frame.spread.steps, y: frame.spread.mean, mark: `s1${dash}` },
      { name: "median", x: frame.spread.steps, y: frame.spread.bands[2], mark: `s0${dash}` },
    ]), [
      { name: named(frames[0], "5 % to 95 %"), x: spread.steps, low: lowest, high: highest, mark: "wide" },
      { name: named(frames[0], "25 % to 75 %"), x: spread.steps, low, high, mark: "half" },
    ]);
    domains.show(each((frame, dash) => most(frame).map((domain) => ({
      name: domain.domain || "(none)", x: frame.spread.steps, y: domain.mean, mark: `${mark(frames[0], domain.domain)}${dash}`,
    }))));
    groups.show(each((frame, dash) => Object.entries(frame.spread.groups).slice(0, LINES).map(([name, y], index, all) => ({
      name, x: frame.spread.steps, y, mark: `${all.every(([group]) => isDomain(frames[0], group)) ? mark(frames[0], name) : `s${index}`}${dash}`,
    }))));
    kept.show(each((frame, dash) => (frame.spread.kept_share ? [{ name: "kept", x: frame.spread.steps, y: frame.spread.kept_share, mark: `s2${dash}` }] : [])));
    recent.show(each((frame, dash) => (frame.histogram.length ? [histogramSeries(frame.histogram, frame.histogram_edges, `of ${whole(frame.recent_scores)} scores`, `s0${dash}`)] : [])));
  }
}

// The domains that were trained on most.
function most(frame) {
  const times = new Map(frame.domains.map((domain) => [domain.domain, domain.times]));
  return [...frame.spread.domains].sort((one, other) => times.get(other.domain) - times.get(one.domain)).slice(0, LINES);
}

const isDomain = (frame, name) => frame.spread.domains.some(({ domain }) => domain === name);

// One domain has one colour, whatever its place in the table; and so has a val group that is called as it.
function mark(frame, name) {
  const names = frame.spread.domains.map((domain) => domain.domain || "");
  return `s${Math.max(0, names.indexOf(name || "")) % LINES}`;
}

function numbers(frame) {
  const kept = frame.kept_share === null ? null : `${percent(frame.kept_share)} of ${whole(frame.candidates)} candidates, ${percent(frame.recent_kept_share)} of the newest`;
  return [
    ["train loss", short(frame.train_loss)],
    ["val loss", short(frame.val_loss)],
    ["learning rate", short(frame.learning_rate)],
    ["samples a step", whole(frame.explorer.batch)],
    ["scores", whole(frame.scored) + (frame.left_out ? `, ${whole(frame.left_out)} left out` : "")],
    ["negative", `${percent(frame.negative_share)}, ${percent(frame.recent_negative_share)} of the newest`],
    ["kept", kept],
    ["speed", frame.tokens_per_second === null ? null : `${whole(Math.round(frame.tokens_per_second))} tokens a second, ${short(frame.seconds_per_step)} s a step`],
    ["scoring takes", frame.score_share === null ? null : `${percent(frame.score_share)} of the time`],
  ];
}

function beside(mine, other) {
  const theirs = new Map(numbers(other));
  const rows = numbers(mine).filter(([name, value]) => value !== null || theirs.get(name) !== null).map(([name, value]) => [name, value || "none", theirs.get(name) || "none"]);
  return table("Two runs", ["", mine.run, other.run], rows, { named: true });
}

function domainTables(mine, other) {
  if (!mine.domains.length) return [];
  const theirs = other ? new Map(other.domains.map((domain) => [domain.domain, domain])) : null;
  const chose = mine.kept !== null;
  const head = ["domain", "mean weighted score", ...(other ? [`of ${other.run}`] : []), ...(chose ? ["kept"] : []), "negative", "times"];
  const rows = mine.domains.map((domain) => [
    domain.domain || "(none)", short(domain.value_per_time),
    ...(other ? [theirs.has(domain.domain) ? short(theirs.get(domain.domain).value_per_time) : "none"] : []),
    ...(chose ? [percent(domain.kept_share)] : []), percent(domain.negative_share), whole(domain.times),
  ]);
  return [make("h2", {}, "Domains"), table("Domains", head, rows, { named: true })];
}

function extremes(title, frame, samples) {
  if (!samples.length) return [];
  const { part } = frame.explorer;
  const items = samples.map((sample) => {
    const name = sample.id_repeats ? `${sample.id} (row ${whole(sample.source_row)})` : sample.id;
    const to = part === null ? make("span", { class: "id" }, name) : make("a", { class: "id", href: `#/sample/${encodeURIComponent(part)}/${sample.source_row}` }, name);
    return make("li", { class: "sample" },
      make("div", { class: "line" }, make("span", { class: "score" }, short(sample.value)), to,
        sample.domain === null ? null : make("span", { class: "domain" }, sample.domain), make("span", { class: "hint" }, `${whole(sample.times)} times`)),
      sample.text === null ? null : make("p", { class: "text few" }, sample.text));
  });
  const rest = items.slice(FIRST);
  const more = rest.length ? make("details", {}, make("summary", {}, `${rest.length} more`), make("ol", { class: "samples", start: FIRST + 1 }, ...rest)) : null;
  return [make("section", { class: "card" }, make("h2", {}, title), make("p", { class: "hint" }, "By the sum of weighted scores."), make("ol", { class: "samples" }, ...items.slice(0, FIRST)), more)];
}

export const runsProblem = (error) => place.replaceChildren(problem(error), make("p", {}, make("a", { href: "#/runs" }, "All runs")));
