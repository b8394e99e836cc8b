// What all views share: elements, requests, words for verdicts.

const TIMEOUT_MS = 15_000;

export const at = (id) => document.getElementById(id);

// An element with a class and children; text children are text, never HTML.
export function make(tag, className = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

export class Unreachable extends Error {}

// Ask the server. Throws Unreachable, or an Error with the server's own words.
export async function ask(path) {
  let reply, body;
  try {
    reply = await fetch(path, { signal: AbortSignal.timeout(TIMEOUT_MS), cache: "no-store" });
    body = await reply.json();
  } catch {
    throw new Unreachable("The console's server does not answer. Is it still running? Start it with: multiattempt serve console");
  }
  if (!reply.ok) throw new Error(body.detail ?? body.title ?? `HTTP ${reply.status}`);
  return body;
}

export const MARKS = { correct: "✓", incorrect: "✗", no_answer: "∅", timeout: "◷" };
export const WORDS = { correct: "correct", incorrect: "incorrect", no_answer: "no answer", timeout: "time-out" };
export const ENDS = { solved: "solved", attempts: "attempts used up", length: "cut off by a budget" };

export const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;

export function ago(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 172_800) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86_400)} days ago`;
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const minutes = Math.round(seconds / 60);
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return minutes < 90 ? `${minutes} min` : `${(minutes / 60).toFixed(1)} h`;
}
