// Who is there now: learner, replicas, ledger, the last warnings; and the last minutes as curves.

import { Charts, number, percent, percentTick } from "./charts.js";
import { ago, at, make } from "./page.js";

const KEPT_S = 600;
const dash = (value, format) => (value == null ? "–" : format(value));

function table(heads, rows, className = "") {
  const head = make("tr", "", ...heads.map(([name, kind]) => { const th = make("th", kind ?? "", name); th.scope = "col"; return th; }));
  const made = make("table", className, make("thead", "", head), make("tbody", "", ...rows));
  return make("div", "scroll", made);
}

function line(name, ...cells) {
  const th = make("th", "", name);
  th.scope = "row";
  return make("tr", "", th, ...cells.map((cell) => (cell instanceof Node ? cell : make("td", "", cell))));
}

function section(title, ...content) { return make("section", "", make("h2", "", title), ...content); }

export class Fleet {
  constructor() {
    this.history = []; // {step: seconds, negative = ago; tokens, grading, tasks, waiting}
    this.charts = new Charts(() => {});
    this.curves = make("div", "charts");
    const past = { xUnit: " s", tick: (value) => String(Number(value.toPrecision(3))) };
    this.charts.add({ ...past, title: "Sampled tokens", unit: "per second, all replicas", format: number(0), zero: true, series: [{ label: "sampled", value: (row) => row.tokens }] }, this.curves);
    this.charts.add({ ...past, title: "Idle shares", unit: "% of the last seconds", format: percent, tick: percentTick, zero: true, one: true, series: [
      { label: "replicas: no task", value: (row) => row.tasks }, { label: "replicas: verdicts", value: (row) => row.grading }, { label: "learner: waiting", value: (row) => row.waiting }] }, this.curves);
    this.charts.add({ ...past, title: "Queues", unit: "tasks and trajectories", format: number(0), zero: true, series: [
      { label: "waiting", value: (row) => row.queued }, { label: "running", value: (row) => row.running }, { label: "ready", value: (row) => row.ready }] }, this.curves);
  }

  show(live, run) {
    at("replicas-empty").hidden = live.is_up;
    at("fleet").hidden = !live.is_up;
    if (!live.is_up) {
      at("replicas-empty").replaceChildren(`This run is not going on: ${live.reason} To continue it: `, make("code", "", `multiattempt train CONFIG --resume`));
      return;
    }
    const vitals = new Map(live.vitals.map((one) => [one.name, one.figures]));
    this.remember(live, vitals);
    at("fleet").replaceChildren(this.learner(live, vitals), this.replicas(live, vitals), this.ledger(live), section("The last ten minutes", this.curves), this.notices(live));
    this.charts.show(this.history.map((row) => ({ ...row, step: row.at - live.at })));
  }

  remember(live, vitals) {
    if (this.history.at(-1)?.at === live.at) return;
    const signs = live.replicas.map((replica) => vitals.get(replica.replica_id)).filter(Boolean);
    const sum = (name) => signs.reduce((total, figures) => total + (figures[name] ?? 0), 0);
    const mean = (name) => (signs.length ? sum(name) / signs.length : null);
    this.history.push({ at: live.at, tokens: signs.length ? sum("tokens_per_s") : null, tasks: mean("share_idle_tasks"), grading: mean("share_idle_grading"),
      waiting: vitals.has("learner") ? vitals.get("learner").share_waiting ?? 0 : null, queued: live.depth.waiting, running: live.depth.running, ready: live.depth.trajectories_ready });
    while (this.history[0].at < live.at - KEPT_S) this.history.shift();
  }

  learner(live, vitals) {
    const figures = vitals.get("learner");
    if (!figures) return section("Learner", make("p", "hint", "Nothing has been heard of the learner in the last seconds: it is starting, evaluating, or not running."));
    const heads = [["phase", "text"], ["version"], ["batch"], ["waiting"], ["training"], ["publishing"], ["saving"]];
    const shares = ["waiting", "training", "publishing", "saving"].map((phase) => dash(figures[`share_${phase}`] ?? 0, percent));
    const phase = make("td", "text", figures.trouble ?? figures.phase);
    if (figures.trouble) phase.classList.add("behind");
    const batch = `${figures.collected} / ${figures.wanted}`;
    return section("Learner", table([["", "text"], ...heads], [line("learner", phase, `${figures.version}`, batch, ...shares)]));
  }

  replicas(live, vitals) {
    if (!live.replicas.length) return section("Replicas", make("p", "hint", "No replica is there. A replica appears when its model is loaded; on its own machine start one with: multiattempt serve rollout --config RUN/config.json"));
    const heads = [["", "text"], ["state", "text"], ["version"], ["tokens/s"], ["dialogues/s"], ["sampling"], ["queued"], ["KV cache"], ["idle: no task"], ["idle: verdicts"], ["verdict"], ["device", "text"], ["address", "text"]];
    const rows = live.replicas.map((replica) => {
      const figures = vitals.get(replica.replica_id) ?? {}, behind = live.version - replica.version;
      const version = make("td", behind > 0 ? "behind" : "", behind > 0 ? `${replica.version} (−${behind})` : `${replica.version}`);
      const state = make("td", figures.trouble ? "text behind" : "text", figures.trouble ?? replica.state);
      return line(replica.replica_id, state, version, dash(figures.tokens_per_s, number(0)), dash(figures.dialogues_per_s, number(1)), dash(figures.sequences, number(0)),
        dash(figures.sequences_waiting, number(0)), dash(figures.kv_cache, percent), dash(figures.share_idle_tasks, percent), dash(figures.share_idle_grading, percent),
        dash(figures.grading_ms, (value) => `${value.toFixed(0)} ms`), make("td", "text", replica.device), make("td", "text", replica.url));
    });
    return section(`Replicas (${live.replicas.length}; the learner's version is ${live.version})`, table(heads, rows));
  }

  ledger(live) {
    const { depth } = live;
    const heads = [["", "text"], ["waiting"], ["running"], ["trajectories ready"], ["taken, not saved yet"], ["dead letters"]];
    return section("Ledger", table(heads, [line("now", `${depth.waiting}`, `${depth.running}`, `${depth.trajectories_ready}`, `${depth.trajectories_taken}`, `${depth.dead}`)]));
  }

  notices(live) {
    if (!live.notices.length) return section("Last warnings and errors", make("p", "hint", "None."));
    const rows = live.notices.slice(0, 30).map((notice) => {
      const message = notice.task_id == null ? notice.message : `${notice.message} (task ${notice.task_id})`;
      return line(ago(live.at - notice.at), make("td", "text", notice.name), make("td", `text level-${notice.level}`, notice.level), make("td", "text", message));
    });
    return section("Last warnings and errors", table([["when", "text"], ["who", "text"], ["level", "text"], ["what", "text"]], rows, "notices"));
  }
}
