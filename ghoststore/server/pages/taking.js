// How rows to train on are chosen of a ranking: the fields, what they are in the fragment of an address, and as options of
// `ghoststore select`.

import { make, whole } from "./dom.js";

const MUCH = { fraction: ["Best share, 0 to 1", "0.05"], count: ["Best rows", "100"], token_budget: ["Best, as many tokens", "100000"], threshold_nats: ["At least this in nats", "0.001"] };
const CHOICES = {
  quotas: [["", "as they come"], ["proportional", "as in the corpus"], ["equal", "the same of each"], ["own", "quotas of your own"]],
  diversity: [["none", "by score alone"], ["mmr", "MMR"], ["facility-location", "facility location"], ["greats", "GREATS"]],
  leaks: [["exclude", "left out"], ["keep", "kept"]], // rows that nearly repeat the question
  form: [["jsonl", "jsonl"], ["parquet", "parquet"]],
};
const DIVERSITY = {
  mmr: "MMR: rows with a high score that are unlike those chosen before.",
  "facility-location": "Facility location: every row with a high score has one like it among the chosen.",
  greats: "GREATS: rows by what a step on those chosen before leaves of their score.",
};
const WEIGHTS = { mmr: ["0.5", "1"], greats: ["1", ""] }; // the usual one, and the highest
const MOST_DOMAINS = 100; // with a field of their own
export const KEYS = ["take", "take-by", "take-much", "take-quotas", "take-diversity", "take-weight", "take-leaks", "take-form", "take-card", "quota"];

const named = (name, words, field) => make("div", {}, make("label", { for: `take-${name}` }, words), field);

function select(name, given) {
  const box = make("select", { id: `take-${name}` }, ...CHOICES[name].map(([value, shown]) => make("option", { value }, shown)));
  if (CHOICES[name].some(([value]) => value === given)) box.value = given;
  return box;
}

const number = (name, value, most) => make("input", { id: `take-${name}`, type: "number", min: "0", max: most || null, step: "any", value, required: "" });

export class Taking {
  // `values` are those of the fragment; `drop` is the button that empties what is picked by hand.
  constructor(domains, hasUnit, values, drop) {
    this.drop = drop;
    this.all = make("input", { type: "radio", name: "take", value: "ranking", checked: "" });
    this.hand = make("input", { type: "radio", name: "take", value: "picked" });
    this.hand.checked = values.get("take") === "picked";
    const ways = Object.keys(MUCH).filter((name) => name !== "threshold_nats" || hasUnit);
    this.much = make("select", { id: "take-by" }, ...ways.map((name) => make("option", { value: name }, MUCH[name][0])));
    if (ways.includes(values.get("take-by"))) this.much.value = values.get("take-by");
    this.amount = number("much", values.get("take-much") ?? MUCH[this.much.value][1]);
    for (const name of Object.keys(CHOICES)) this[name] = select(name, values.get(`take-${name}`));
    this.weight = number("weight", values.get("take-weight") ?? "");
    this.card = make("input", { id: "take-card", type: "checkbox" });
    this.card.checked = values.has("take-card");
    this.quota = this.quotaFields(domains, values.getAll("quota"));
    this.much.addEventListener("change", () => { this.amount.value = MUCH[this.much.value][1]; });
    this.diversity.addEventListener("change", () => this.showWeight());
    this.showWeight(values.has("take-weight"));
    this.byHandWords = make("label", { class: "check" });
    this.cut = make("div", { class: "grid take" }, named("by", "How much", this.much), named("much", "Number", this.amount),
      named("leaks", "Near-duplicates", this.leaks), named("quotas", "By domain", this.quotas),
      named("diversity", "Diversity", this.diversity), this.weightField);
    this.elements = [make("label", { class: "check" }, this.all, "Of this ranking"), this.cut, this.said, this.own,
      make("div", { class: "line" }, this.byHandWords, drop),
      make("div", { class: "line as" }, named("form", "File", this.form), make("label", { class: "check" }, this.card, "With a dataset card (README.md)"))];
  }

  // A field for each domain; what stands in it is a share or a number of rows, as after `--quota DOMAIN=`.
  quotaFields(domains, words) {
    const given = new Map(words.map((word) => [word.slice(0, word.lastIndexOf("=")), word.slice(word.lastIndexOf("=") + 1)]));
    const fields = domains.slice(0, MOST_DOMAINS).map((domain, place) => {
      const box = make("input", { id: `quota-${place}`, type: "text", inputmode: "decimal", autocomplete: "off", value: given.get(domain) ?? "" });
      box.domain = domain;
      return box;
    });
    const more = domains.length > fields.length ? ` The first ${whole(fields.length)} of ${whole(domains.length)} domains: ghoststore select takes all.` : "";
    this.own = make("fieldset", { class: "quotas" }, make("legend", {}, "Quotas"),
      make("p", { class: "hint" }, `A share of what is chosen (0.3) or a number of rows (100). Domains without one share the rest.${more}`),
      make("div", { class: "grid take" }, ...fields.map((box) => make("div", {}, make("label", { for: box.id, class: "of" }, box.domain), box))));
    return fields;
  }

  showWeight(keep = false) {
    const [usual, most] = WEIGHTS[this.diversity.value] || ["", ""];
    this.weightField ??= named("weight", "Weight of diversity", this.weight);
    this.said ??= make("p", { class: "hint", id: "take-said" });
    this.diversity.setAttribute("aria-describedby", "take-said");
    this.said.textContent = DIVERSITY[this.diversity.value] || "";
    this.weightField.hidden = !usual;
    this.weight.disabled = !usual;
    this.weight.max = most;
    if (!keep) this.weight.value = usual;
  }

  // Shows what the choice needs, where `picked` rows are picked by hand.
  show(picked) {
    this.byHandWords.replaceChildren(this.hand, `The rows picked by hand: ${whole(picked)}`);
    this.hand.disabled = this.drop.disabled = !picked;
    if (!picked && this.hand.checked) this.all.checked = true;
    this.cut.hidden = this.byHand;
    this.said.hidden = this.byHand || this.diversity.value === "none";
    this.own.hidden = this.byHand || this.quotas.value !== "own";
    this.amount.disabled = this.byHand;
    if (this.byHand) this.weight.disabled = true;
    else this.weight.disabled = !WEIGHTS[this.diversity.value];
  }

  get byHand() {
    return this.hand.checked;
  }

  get quotaWords() {
    return this.quota.filter((box) => box.value.trim()).map((box) => `${box.domain}=${box.value.trim()}`);
  }

  options() {
    const diverse = this.diversity.value === "none" ? {} : { diversity: this.diversity.value, diversity_weight: this.weight.disabled ? null : Number(this.weight.value) };
    const own = this.quotas.value === "own";
    if (own && !this.quotaWords.length) throw new Error("There is no quota yet: give one or more domains a share or a number of rows.");
    return { [this.much.value]: Number(this.amount.value), ...(own ? { quota: this.quotaWords } : { quotas: this.quotas.value || null }), leaks: this.leaks.value, ...diverse };
  }

  files() {
    return { form: this.form.value, ...(this.card.checked ? { card: true } : {}) };
  }

  // Pairs for the fragment: what is not as usual.
  words() {
    const pairs = [["take", this.byHand ? "picked" : ""], ["take-by", this.much.value, "fraction"], ["take-much", this.amount.value, MUCH[this.much.value][1]],
      ["take-quotas", this.quotas.value], ["take-diversity", this.diversity.value, "none"], ["take-weight", this.weight.value, (WEIGHTS[this.diversity.value] || [""])[0]],
      ["take-leaks", this.leaks.value, "exclude"], ["take-form", this.form.value, "jsonl"], ["take-card", this.card.checked ? "1" : ""]];
    const quotas = this.quotas.value === "own" ? this.quotaWords.map((word) => ["quota", word]) : [];
    return [...pairs.filter(([, value, usual]) => value !== (usual ?? "")).map(([name, value]) => [name, value]), ...quotas];
  }
}
