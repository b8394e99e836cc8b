// The dialogue browser: a list with filters, and one dialogue read in full.

import { ask, at, ENDS, make, MARKS, signed, WORDS } from "./page.js";
import { formula, prose } from "./tex.js";

const TYPING_MS = 200;
const SCALE = 2; // advantages of this size are shaded fully

export class Dialogues {
  // onChange(): what is shown has changed, for the address.
  constructor(onChange) {
    this.onChange = onChange;
    this.found = [];
    this.steps = [];
    this.current = null; // {step, task_id}
    this.mode = "text";
    this.shade = "none";
    this.asked = 0;
    this.tip = make("div");
    this.tip.id = "tip";
    this.tip.hidden = true;
    document.body.append(this.tip);
    at("filters").addEventListener("submit", (event) => event.preventDefault());
    for (const id of ["filter-step", "filter-outcome", "filter-text"]) {
      at(id).addEventListener("input", () => { clearTimeout(this.typing); this.typing = setTimeout(() => this.search(), TYPING_MS); });
    }
    at("list").addEventListener("click", (event) => {
      const item = event.target.closest("li");
      if (item) this.open(this.found[Number(item.dataset.index)]);
    });
    at("dialogue").addEventListener("pointerover", (event) => this.point(event));
    at("dialogue").addEventListener("pointerleave", () => { this.tip.hidden = true; });
  }

  get filters() {
    return { step: at("filter-step").value.trim(), outcome: at("filter-outcome").value, text: at("filter-text").value.trim() };
  }

  set filters({ step = "", outcome = "", text = "" }) {
    at("filter-step").value = step;
    at("filter-outcome").value = outcome;
    at("filter-text").value = text;
  }

  // Fill the list; keep the dialogue that is open, or open `wanted`, or the first.
  async search(wanted = this.current) {
    const mine = (this.asked += 1);
    const query = new URLSearchParams(Object.entries(this.filters).filter(([, value]) => value));
    let reply;
    try {
      reply = await ask(`api/dialogues?${query}`);
    } catch (error) {
      if (mine === this.asked) this.nothing(error.message);
      return;
    }
    if (mine !== this.asked) return; // a newer search is under way
    this.found = reply.dialogues;
    this.steps = reply.steps;
    const isAny = this.steps.length > 0;
    at("found").textContent = isAny ? `${this.found.length}${reply.is_more ? " newest" : ""} of steps ${this.steps[0]} to ${this.steps.at(-1)}` : "";
    at("list").replaceChildren(...this.found.map((found, index) => this.item(found, index)));
    if (!this.found.length) {
      this.nothing(isAny ? "No dialogue is like that. Loosen the filters on the left." : reply.reason);
      return;
    }
    const again = wanted && this.found.find((found) => found.step === wanted.step && found.task_id === wanted.task_id);
    await this.open(again ?? this.found[0]);
  }

  nothing(text) {
    this.current = null;
    at("list").replaceChildren();
    at("dialogue").replaceChildren(make("p", "empty", text));
    this.onChange();
  }

  item(found, index) {
    const marks = make("span", "marks", ...found.verdicts.map((verdict) => make("span", `mark-${verdict}`, MARKS[verdict] ?? "?")));
    marks.title = found.verdicts.map((verdict) => WORDS[verdict] ?? verdict).join(", ");
    const top = make("span", "top", `step ${found.step}`, marks, make("span", "", `of ${found.max_attempts}`), make("span", "reward", signed(found.reward)));
    const item = make("li", "", top, make("span", "problem", found.problem));
    item.dataset.index = index;
    return item;
  }

  async open(found) {
    this.current = { step: found.step, task_id: found.task_id };
    const index = this.found.indexOf(found);
    [...at("list").children].forEach((item, i) => item.toggleAttribute("aria-current", i === index));
    at("list").children[index]?.scrollIntoView({ block: "nearest" });
    this.onChange();
    try {
      const dialogue = await ask(`api/dialogues/${found.step}/${found.task_id}`);
      if (this.current?.task_id !== dialogue.task_id || this.current.step !== dialogue.step) return;
      this.dialogue = dialogue;
      this.draw();
      at("dialogue").scrollTop = 0;
    } catch (error) {
      at("dialogue").replaceChildren(make("p", "empty", error.message));
    }
  }

  // The next (+1) or previous (-1) dialogue in the list.
  move(by) {
    const index = this.found.findIndex((found) => found.step === this.current?.step && found.task_id === this.current?.task_id);
    const next = this.found[index + by];
    if (next) this.open(next);
  }

  // The next (+1) or previous (-1) step that has dialogues.
  moveStep(by) {
    if (!this.steps.length) return;
    const now = Number(this.filters.step || this.current?.step || this.steps.at(-1));
    const next = by > 0 ? this.steps.find((step) => step > now) : this.steps.findLast((step) => step < now);
    if (next !== undefined) this.showStep(next);
  }

  showStep(step) {
    this.filters = { ...this.filters, step: String(step) };
    return this.search(null);
  }

  setMode(mode) { this.mode = mode; if (mode === "text") this.shade = "none"; this.draw(); }
  setShade(shade) { this.shade = shade; if (shade !== "none") this.mode = "tokens"; this.draw(); }

  draw() {
    const d = this.dialogue;
    if (!d) return;
    const versions = [...new Set(d.versions.map(([version]) => version))];
    const facts = [
      ["Step", d.step], ["Task", d.task_id], ["Reward", signed(d.reward)], ["Attempts", `${d.attempts.length} of ${d.max_attempts}`], ["Ended", ENDS[d.finish_reason] ?? d.finish_reason],
      ["Weights", versions.length ? `version ${versions.join(", ")}` : "–"], ["Trained into", `version ${d.step}`], ["Replica", d.replica_id],
      ["Time", `${d.total_s.toFixed(2)} s (sampling ${d.generate_s.toFixed(2)}, verdicts ${d.grade_s.toFixed(2)})`],
    ];
    const list = make("dl", "facts", ...facts.map(([name, value]) => make("div", "", make("dt", "", name), make("dd", "", String(value)))));
    const gold = make("div", "answer", d.gold.length > 1 ? "Gold answers" : "Gold answer", ...d.gold.map((answer) => this.answer(answer)));
    const problem = make("section", "turn problem", make("h3", "", make("b", "", "Problem")), make("div", "body", prose(d.problem)), gold);
    at("dialogue").replaceChildren(list, this.controls(), problem, ...this.turns(d));
  }

  controls() {
    const button = (label, isOn, key, act) => {
      const made = make("button", "", label, " ", make("kbd", "", key));
      made.type = "button";
      made.setAttribute("aria-pressed", String(isOn));
      made.addEventListener("click", act);
      return made;
    };
    const made = make("div", "controls", "Show",
      button("text", this.mode === "text", "t", () => this.setMode("text")), button("tokens", this.mode === "tokens", "t", () => this.setMode("tokens")),
      make("span", "gap"), "Shade by",
      button("nothing", this.shade === "none", "n", () => this.setShade("none")), button("probability", this.shade === "probability", "p", () => this.setShade("probability")),
      button("advantage", this.shade === "advantage", "a", () => this.setShade("advantage")));
    if (this.shade !== "none") {
      const bar = make("i"), [low, high] = this.shade === "probability" ? ["p = 1", "p → 0"] : [`−${SCALE}`, `+${SCALE}`];
      bar.style.background = this.shade === "probability" ? `linear-gradient(90deg, ${colour("probability", 0)}, ${colour("probability", -2)}, ${colour("probability", -6)})`
        : `linear-gradient(90deg, ${colour("advantage", -SCALE)}, ${colour("advantage", 0)}, ${colour("advantage", SCALE)})`;
      made.append(make("span", "scale", low, bar, high));
    }
    return made;
  }

  turns(d) {
    const first = d.attempts[0]?.start ?? d.tokens.length, made = [];
    const prompt = make("details", "turn", make("summary", "", "The prompt as the model saw it", make("span", "detail", `${first} tokens`)), make("div", "body", prose(d.tokens.slice(0, first).join(""))));
    made.push(prompt);
    d.attempts.forEach((attempt, k) => {
      const known = d.logprobs.slice(attempt.start, attempt.end).filter((value) => value != null);
      const mean = known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
      const versions = [...new Set(d.versions.filter(([, start, end]) => start < attempt.end && end > attempt.start).map(([version]) => version))];
      const head = make("h3", "", make("b", "", `Attempt ${k + 1} of ${d.max_attempts}`), make("span", `chip ${attempt.verdict}`, `${MARKS[attempt.verdict] ?? ""} ${WORDS[attempt.verdict] ?? attempt.verdict}`),
        make("span", "detail", `${attempt.end - attempt.start} tokens`), make("span", "detail", `weights ${versions.join(", ")}`),
        make("span", "detail", mean == null ? "" : `mean log-probability ${mean.toFixed(3).replace("-", "−")}`), make("span", "detail", `verdict in ${attempt.grading_ms.toFixed(1)} ms`));
      const body = this.mode === "tokens" ? this.tokens(d, attempt.start, attempt.end) : make("div", "body", prose(d.tokens.slice(attempt.start, attempt.end).join("")));
      const turn = make("section", `turn attempt ${attempt.verdict}`, head, body);
      if (attempt.extracted != null) turn.append(make("div", "answer", "Extracted answer", this.answer(attempt.extracted)));
      made.push(turn);
      const until = d.attempts[k + 1]?.start;
      if (until > attempt.end) {
        made.push(make("section", "turn feedback", make("h3", "", "Feedback", make("span", "detail", "not trained on")), make("div", "body", prose(trimmed(d.tokens.slice(attempt.end, until).join(""))))));
      }
    });
    return made;
  }

  answer(text) {
    const isFormula = /[\\^_{}]|^[-+\d\s.,()[\]/*=<>a-zA-Z]{1,60}$/.test(text) && !/[a-zA-Z]{3}/.test(text.replace(/\\[a-zA-Z]+/g, ""));
    return isFormula ? formula(text) : make("code", "", text);
  }

  tokens(d, start, end) {
    const body = make("div", "body tokens");
    for (let i = start; i < end; i += 1) {
      const text = d.tokens[i];
      if (!text) continue; // part of a character: it comes with its last token
      const span = make("span", "token", text === "\n" ? "⏎\n" : text);
      if (/^<\|.*\|>$/.test(text)) span.classList.add("control");
      span.dataset.at = i;
      const value = this.shade === "probability" ? d.logprobs[i] : this.shade === "advantage" ? d.advantages[i] : null;
      if (value != null) span.style.backgroundColor = colour(this.shade, value);
      body.append(span);
    }
    return body;
  }

  point(event) {
    const span = event.target.closest?.(".token");
    this.tip.hidden = !span;
    if (!span) return;
    const d = this.dialogue, i = Number(span.dataset.at), logprob = d.logprobs[i], advantage = d.advantages[i];
    const version = d.versions.find(([, start, end]) => start <= i && i < end)?.[0];
    const said = [JSON.stringify(d.tokens[i])];
    if (logprob != null) said.push(`probability    ${Math.exp(logprob).toPrecision(3)}`, `log-probability ${logprob.toFixed(3)}`);
    if (advantage != null) said.push(`advantage      ${signed(advantage)}`);
    if (version != null) said.push(`weights        version ${version}`);
    this.tip.textContent = said.join("\n");
    const box = span.getBoundingClientRect();
    this.tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - this.tip.offsetWidth - 8))}px`;
    this.tip.style.top = box.bottom + this.tip.offsetHeight + 8 < innerHeight ? `${box.bottom + 5}px` : `${box.top - this.tip.offsetHeight - 5}px`;
  }
}

// The colour of a token: by surprise (log-probability) amber, by advantage green or red.
function colour(shade, value) {
  if (shade === "probability") return `rgb(224 150 20 / ${Math.min(0.75, -value / 6).toFixed(3)})`;
  const strength = Math.min(0.65, (0.65 * Math.abs(value)) / SCALE).toFixed(3);
  return value >= 0 ? `rgb(40 160 90 / ${strength})` : `rgb(215 60 50 / ${strength})`;
}

// Templates put line breaks around turns: they say nothing here.
function trimmed(text) { return text.replace(/^\s+|\s+$/g, ""); }
