// The console: which view is shown, what is asked of the server and when, the keyboard.

import { Dialogues } from "./dialogues.js";
import { Fleet } from "./fleet.js";
import { ago, ask, at, Unreachable } from "./page.js";
import { Training } from "./training.js";

const PERIOD_MS = 2000;
const VIEWS = ["training", "replicas", "dialogues"];
const THEMES = ["auto", "light", "dark"];

let run = null, live = null, view = null;
const training = new Training((step) => { show("dialogues"); dialogues.showStep(step); });
const fleet = new Fleet();
const dialogues = new Dialogues(() => { if (view === "dialogues") history.replaceState(null, "", address()); });

function address() {
  if (view !== "dialogues") return `#/${view}`;
  const query = new URLSearchParams(Object.entries({ ...dialogues.filters, at: dialogues.current ? `${dialogues.current.step}.${dialogues.current.task_id}` : "" }).filter(([, value]) => value));
  return `#/dialogues${query.size ? `?${query}` : ""}`;
}

function show(name) {
  view = name;
  for (const one of VIEWS) at(one).hidden = one !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${run?.name ?? "…"} · ${name}`;
  if (location.hash.split("?")[0] !== `#/${name}`) history.pushState(null, "", address());
}

async function route() {
  const [path, query] = location.hash.slice(2).split("?");
  show(VIEWS.includes(path) ? path : "training");
  if (view !== "dialogues") return;
  const wanted = Object.fromEntries(new URLSearchParams(query ?? ""));
  dialogues.filters = wanted;
  const [step, task] = (wanted.at ?? "").split(".").map(Number);
  await dialogues.search(Number.isInteger(task) ? { step, task_id: task } : dialogues.current);
}

function trouble(text) {
  at("trouble").hidden = !text;
  at("trouble").textContent = text ?? "";
}

function state() {
  const row = training.last, step = row ? `step ${row.step} of ${run.steps}` : "no step yet";
  if (!live) return;
  const isDone = row && row.step >= run.steps;
  at("state").className = live.is_up ? "live" : isDone ? "" : "lost";
  const learner = live.vitals?.find((one) => one.name === "learner")?.figures;
  if (learner?.trouble) at("state").className = "paused";
  at("state").textContent = live.is_up
    ? `${step} · version ${live.version} · ${live.replicas.length} replica${live.replicas.length === 1 ? "" : "s"}${learner ? ` · ${learner.trouble ?? learner.phase}` : ""}`
    : `${step} · ${isDone ? "finished" : "not running"}${run.changed_at ? `, last change ${ago(Date.now() / 1000 - run.changed_at)}` : ""}`;
}

async function poll() {
  try {
    [run, live] = await Promise.all([ask("api/run"), ask("api/live")]);
    const last = training.last?.step ?? 0;
    training.take(await ask(`api/steps?after=${last}&generation=${encodeURIComponent(training.generation ?? "")}`));
    trouble(run.problem);
    at("run-name").textContent = run.name;
    document.title = `${run.name} · ${view}`;
    training.headline(run, live);
    fleet.show(live, run);
    state();
  } catch (error) {
    trouble(error.message);
    if (error instanceof Unreachable) { at("state").className = "lost"; at("state").textContent = "no connection"; }
    else throw error;
  } finally {
    setTimeout(poll, document.hidden ? 5 * PERIOD_MS : PERIOD_MS);
  }
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  at("theme").textContent = `Theme: ${theme}`;
  localStorage.setItem("theme", theme);
}

const KEYS = {
  1: () => { show("training"); }, 2: () => { show("replicas"); }, 3: () => { location.hash = "#/dialogues"; },
  "?": () => at("help").showModal(),
};
const DIALOGUE_KEYS = {
  j: () => dialogues.move(1), ArrowDown: () => dialogues.move(1), k: () => dialogues.move(-1), ArrowUp: () => dialogues.move(-1),
  "]": () => dialogues.moveStep(1), "[": () => dialogues.moveStep(-1), "/": () => at("filter-text").focus(),
  t: () => dialogues.setMode(dialogues.mode === "text" ? "tokens" : "text"),
  p: () => dialogues.setShade("probability"), a: () => dialogues.setShade("advantage"), n: () => dialogues.setShade("none"),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || at("help").open) return;
  if (event.target.closest("input, select")) {
    if (event.key === "Escape") event.target.blur();
    if (event.key === "Enter") at("list").focus();
    return;
  }
  if (event.target.closest("button, summary") && (event.key === "Enter" || event.key === " ")) return;
  if (event.key === "/" && view !== "dialogues") { location.hash = "#/dialogues"; setTimeout(() => at("filter-text").focus()); event.preventDefault(); return; }
  const act = (view === "dialogues" ? DIALOGUE_KEYS[event.key] : null) ?? KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});
addEventListener("hashchange", route);
addEventListener("popstate", route);
at("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(localStorage.getItem("theme") ?? "auto") + 1) % 3]));
at("help-open").addEventListener("click", () => at("help").showModal());

setTheme(THEMES.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "auto");
route();
poll();
