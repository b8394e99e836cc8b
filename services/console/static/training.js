// The curves of a run and its newest figures.

import { Charts, number, percent, percentTick } from "./charts.js";
import { at, duration, make } from "./page.js";

const FAMILY = /^accuracy_attempt_(\d+)$/;
const KEPT = 6000; // rows on the page
const figure = (name) => (row) => row[name];
const share = (name) => (row) => (row.step_s > 0 && row[name] != null ? row[name] / row.step_s : null);
const lines = (...pairs) => pairs.map(([label, name]) => ({ label, value: figure(name) }));
const plain = (value) => String(Number(value.toPrecision(4)));

function byAttempt(rows) {
  const numbers = new Set();
  for (const row of rows) for (const name of Object.keys(row)) if (FAMILY.test(name)) numbers.add(Number(FAMILY.exec(name)[1]));
  const each = [...numbers].sort((a, b) => a - b).slice(0, 5);
  return [{ label: "dialogue", value: figure("accuracy_last") }, ...each.map((k) => ({ label: `attempt ${k}`, value: figure(`accuracy_attempt_${k}`) }))];
}

const SPECS = [
  { title: "Reward", unit: "per dialogue", format: number(3), tick: plain, series: lines(["mean", "reward"]) },
  { title: "Accuracy by attempt", unit: "% of those made", format: percent, tick: percentTick, zero: true, one: true, series: byAttempt },
  { title: "Response length", unit: "sampled tokens per dialogue", format: number(1), tick: plain, zero: true, series: lines(["mean", "response_tokens"], ["longest", "response_tokens_max"]) },
  { title: "KL divergence", unit: "nats per token", format: number(4), tick: plain, zero: true, series: lines(["to the reference", "kl_ref"], ["to the sampling policy", "kl_behaviour"], ["within the update", "kl_old"]) },
  { title: "Staleness", unit: "versions behind", format: number(2), tick: plain, zero: true, series: lines(["mean", "staleness_mean"], ["oldest", "staleness_max"]) },
  { title: "Throughput", unit: "dialogues / s", format: number(1), tick: plain, zero: true, series: lines(["trained", "dialogues_per_s"]) },
  { title: "The learner's time", unit: "% of each step", format: percent, tick: percentTick, zero: true, one: true,
    series: [{ label: "waiting for dialogues", value: share("wait_s") }, { label: "training", value: (row) => (row.step_s > 0 && row.update_s != null ? (row.update_s + (row.prepare_s ?? 0)) / row.step_s : null) },
      { label: "publishing", value: share("publish_s") }, { label: "saving", value: share("checkpoint_s") }] },
  { title: "Step time", unit: "seconds", format: number(2), tick: plain, zero: true, series: lines(["whole", "step_s"], ["publishing weights", "publish_s"]) },
  { title: "Where a dialogue's time goes", unit: "seconds, mean", format: number(2), tick: plain, zero: true, series: lines(["sampling", "generate_s"], ["waiting for verdicts", "grade_s"]) },
  { title: "Entropy", unit: "nats per token", format: number(3), tick: plain, zero: true, series: lines(["policy", "entropy"]) },
  { title: "Without an answer, cut off", unit: "%", format: percent, tick: percentTick, zero: true, series: lines(["no answer", "no_answer"], ["cut off", "truncated"]) },
  { title: "Gradient norm", unit: "before clipping", format: number(3), tick: plain, zero: true, series: lines(["actor", "grad_norm"], ["critic", "critic_grad_norm"]) },
  { title: "Loss", unit: "per token", format: number(4), tick: plain, series: lines(["policy", "policy_loss"], ["value", "value_loss"]) },
  { title: "Discarded", unit: "dialogues per step", format: number(0), tick: plain, zero: true, series: lines(["dropped", "dropped"], ["too old", "dropped_stale"], ["masked", "masked_dialogues"]) },
];

export class Training {
  constructor(openStep) {
    this.rows = [];
    this.generation = null;
    this.charts = new Charts(openStep);
    for (const spec of SPECS) this.charts.add(spec, at("charts"));
    at("smoothing").addEventListener("change", (event) => this.charts.smooth(Number(event.target.value)));
  }

  get last() { return this.rows.at(-1); }

  // Take new rows; a run that was set back begins anew.
  take({ rows, generation }) {
    const isFresh = generation !== this.generation;
    if (isFresh) this.rows = [];
    this.generation = generation;
    this.rows.push(...rows);
    if (this.rows.length > KEPT) this.rows.splice(0, this.rows.length - KEPT);
    if (isFresh || rows.length) this.charts.show(this.rows);
  }

  headline(run, live) {
    const row = this.last, recent = this.rows.slice(-10).map((one) => one.step_s).filter((value) => value != null);
    const isEmpty = !row;
    at("training-empty").hidden = !isEmpty;
    at("charts").hidden = at("headline").hidden = isEmpty;
    at("training-empty").textContent = live?.is_up
      ? "No policy update yet. The first curves appear here when the first batch is trained; the Replicas view shows how far it is."
      : "No policy update yet, and nothing is running. Start the run with: multiattempt train CONFIG";
    if (isEmpty) return;
    const left = recent.length ? (run.steps - row.step) * (recent.reduce((a, b) => a + b, 0) / recent.length) : NaN;
    const tokensPerS = row.step_s > 0 ? (row.action_tokens ?? row.response_tokens * row.dialogues) / row.step_s : null;
    const cells = [
      ["Step", `${row.step}`, `of ${run.steps}`],
      ["Reward", number(3)(row.reward), ""],
      ["Right at first", percent(row.accuracy_first), ""],
      ["Right at last", percent(row.accuracy_last), ""],
      ["Dialogues", number(1)(row.dialogues_per_s), "/s"],
      ["Trained tokens", number(0)(tokensPerS), "/s"],
      ["KL to reference", number(4)(row.kl_ref), "nats"],
      ["Staleness", number(2)(row.staleness_mean), "versions"],
      ["Learner waits", percent(row.step_s > 0 ? row.wait_s / row.step_s : null), ""],
      ["Time left", row.step >= run.steps ? "done" : duration(left), ""],
    ];
    at("headline").replaceChildren(...cells.map(([name, value, unit]) => {
      const cell = make("div", "", make("dt", "", name), make("dd", "", value));
      if (unit) cell.lastChild.append(" ", make("small", "", unit));
      return cell;
    }));
  }
}
