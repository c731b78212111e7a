// Activity: what happened, newest first.

import { ask } from "./api.js";
import { attempt, button, clock, count, duration, el, fill, moment, number, problemText, prose } from "./dom.js";

export const title = "Activity";

const PAGE = 50;
const MOST = 1000; // that the API gives at once

const KINDS = {
  started: "Started",
  stopped: "Stopped",
  halted: "Halted",
  resumed: "Resumed",
  split: "Split",
  expired: "Expired",
  reloaded: "Configuration",
  reload_failed: "Configuration",
  settings: "Settings",
  credentials: "Credential",
  alarm_raised: "Alarm",
  alarm_cleared: "Alarm over",
  replay: "Replay",
  purge: "Purge",
  test_events: "Test events",
  door: "Door",
};
const LEVELS = { critical: "bad", warning: "warn", info: "" };

/** Opens the view. */
export function open(main) {
  const list = el("ol", { class: "log", "aria-label": "What happened, newest first" });
  const empty = el("p", { class: "empty-state" }, "Nothing has happened yet.");
  let next = null;
  let oldest = null; // the last that is shown, once older ones were asked for
  const older = button("Show older", () => attempt(older, () => load(next)));
  older.hidden = true;
  fill(
    main,
    el("div", { class: "view-head" }, el("div", {}, el("h1", {}, title), el("p", {}, "What happened to the bridge, newest first."))),
    el("section", { "aria-label": title }, empty, list, el("div", { class: "actions" }, older)),
  );

  async function load(before) {
    const again = before === undefined && oldest !== null;
    const page = await ask("/api/activity", { limit: again ? MOST : PAGE, before });
    const entries = again ? page.activity.filter((one) => one.id >= oldest) : page.activity;
    // Alike ones in a row grow: what is shown is taken anew as a whole.
    if (before === undefined) list.replaceChildren();
    else oldest = entries.at(-1)?.id ?? oldest;
    list.append(...entries.map(entry));
    next = entries.length < page.activity.length ? oldest : page.next;
    older.hidden = next === null;
    empty.hidden = list.childElementCount > 0;
  }

  const reload = () => load().catch((error) => fill(list, el("li", {}, problemText(error))));
  reload();
  return {
    changed(what) {
      if (what === "activity_id") reload();
    },
  };
}

function entry(one) {
  const level = LEVELS[one.severity] ?? "";
  const details = Object.entries(one.detail ?? {}).filter(([name, value]) => name !== "alarm" && value && !one.text.includes(String(value)) && !(Array.isArray(value) && value.every((part) => one.text.includes(String(part)))));
  return el(
    "li",
    {},
    moment(one.at),
    el("span", { class: "kind" }, el("span", { class: `tag ${level}` }, KINDS[one.kind] ?? one.kind)),
    el(
      "div",
      {},
      el("p", {}, prose(one.text)),
      one.count > 1 && el("p", { class: "hint" }, `${count(one.count, "time")}, the last at ${clock(one.last_at)}`),
      details.length > 0 && el("p", { class: "hint" }, details.map(told).join(" · ")),
    ),
  );
}

/** A detail in words. */
function told([name, value]) {
  if (name.endsWith("_s") && typeof value === "number") return `${name.slice(0, -2).replaceAll("_", " ")}: ${duration(value)}`;
  if (typeof value === "number") return `${name.replaceAll("_", " ")}: ${number(value)}`;
  const text = Array.isArray(value) ? value.join(", ") : typeof value === "object" ? JSON.stringify(value) : value;
  return `${name.replaceAll("_", " ")}: ${text}`;
}
