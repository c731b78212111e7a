// Overview: how it is in one sentence, where every event went, and how it has been going.

import { ask } from "./api.js";
import { charts } from "./charts.js";
import { bytes, clock, count, duration, el, fill, number, prose, say, section, share } from "./dom.js";

export const title = "Overview";

const PARTS = [
  ["delivered", "delivered"],
  ["dead_lettered", "dead-lettered"],
  ["expired", "expired"],
  ["skipped", "skipped"],
  ["waiting", "waiting"],
];

const LIMITS = {
  nothing: ["Nothing limits it", "It goes as fast as events come."],
  rate: ["The rate", "Mixpanel’s ceiling for a project, or what its last 429 left of it."],
  concurrency: ["Requests under way", "As many as Mixpanel answers well; more would only wait there."],
  probe: ["A probe", "One batch is tried, to see whether Mixpanel takes events again."],
};

/** Where a person goes from an alarm. */
const HELP = {
  dead_letters: ["Look at them", "#/dead-letters"],
  cohorts_halted: ["Look at the cohorts", "#/cohorts"],
  cohorts_capped: ["Look at the cohorts", "#/cohorts"],
  dead_letters_dropped: ["Look at them", "#/dead-letters"],
  halted: ["Renew the credential", "#/connection"],
  expiring_50: ["Renew the credential", "#/connection"],
  expiring_90: ["Renew the credential", "#/connection"],
  expired: ["Renew the credential", "#/connection"],
};

/** Opens the view. */
export function open(main, context) {
  const sentence = el("h1", { class: "sentence" }, "…");
  const reason = el("p", { class: "why" });
  const beside = el("p", {});
  const alarms = el("div", {});
  const bar = el("div", { class: "conservation", role: "img" });
  const sum = conservation(bar);
  const facts = figures();
  const drawn = history(context);
  const warnings = el("div", {});

  fill(
    main,
    el("div", { class: "overview-head" }, sentence, reason, beside),
    alarms,
    section("Where every event went", bar, sum.element),
    section("Now", facts.element),
    drawn.element,
    warnings,
  );

  return {
    use({ status }) {
      say(sentence, headline(status));
      sentence.className = `sentence ${context.kindOf(status.state)}`;
      const aside = besides(status);
      say(beside, aside.text);
      if (aside.link) beside.append(" ", el("a", { href: aside.link[1] }, aside.link[0]));
      say(reason, why(status));
      // A halt is the headline already.
      show(alarms, status.alarms.filter((alarm) => alarm.alarm !== (status.export ? "halted" : "cohorts_halted")), (alarm) => el("div", { class: `callout ${alarm.severity === "critical" ? "bad" : "warn"}` }, el("p", {}, prose(alarm.text)), el("p", { class: "hint" }, `Since ${clock(alarm.since)}${alarm.ending ? ", ending: its cause is gone" : ""}. `, HELP[alarm.alarm] && el("a", { href: HELP[alarm.alarm][1] }, HELP[alarm.alarm][0]))));
      sum.use(status.events);
      facts.use(status);
      show(warnings, status.warnings.length ? [status.warnings] : [], (found) => section("Worth knowing", el("ul", {}, found.map((text) => el("li", {}, prose(text))))));
      drawn.tick(status);
    },
    end: drawn.end,
  };
}

const HOUR_MINUTE = (at) => clock(at).slice(0, -3);

/** The reason that stands below the headline. */
function why(status) {
  if (!status.export) return status.cohorts?.writer.halted?.reason ?? "";
  return status.halted?.reason ?? (status.state === "backing off" ? status.pace.reason : "");
}

/** How it is, in one sentence; the reasons stand below it. */
export function headline(status) {
  if (!status.export) return ofCohorts(status);
  const safe = `${count(status.events.waiting, "event")} safe`;
  if (status.halted) {
    const rest = status.expires_in_s === null || status.expires_in_s === undefined ? "" : `, ${status.events.waiting === 1 ? "expires" : "expire"} in ${duration(status.expires_in_s)}`;
    const refused = status.spool.near_cap ? "; new events are refused" : "";
    const what = [402, 404].includes(status.halted.status) ? "takes no events" : "refuses the credential";
    return `Halted: Mixpanel ${what} since ${HOUR_MINUTE(status.halted.since)}; ${safe}${rest}${refused}`;
  }
  if (status.state === "backing off") return `Backing off for ${duration(status.pace.backing_off_s)}; ${safe}`;
  return status.sentence;
}

/** The same where cohorts are all that there is. */
function ofCohorts({ state, sentence, cohorts }) {
  if (!cohorts || state === "stalled") return sentence;
  const { figures, writer } = cohorts;
  if (!writer.halted) return cohorts.sentence.replaceAll("`", "");
  return `Halted: nothing is written to Braze since ${HOUR_MINUTE(writer.halted.since)}; ${count(figures.joining + figures.leaving, "membership")} to write, safe on disk`;
}

/** Builds something anew only where it has changed. */
function show(box, things, build) {
  const key = JSON.stringify(things);
  if (box.dataset.shown === key) return;
  box.dataset.shown = key;
  fill(box, things.map(build));
}

/** What a person wants to know next. */
function besides(status) {
  if (!status.export) return { text: "Cohorts only: mixpanel.export is false, so no events are taken, and none are sent.", link: ["Look at the cohorts", "#/cohorts"] };
  if (status.state === "not set up") return { text: "Enter the Mixpanel credentials and paste this daemon’s address into Braze.", link: ["Connect", "#/connection"] };
  if (status.halted) {
    return { text: status.spool.near_cap ? "" : "New events are still taken and kept.", link: ["Renew the credential", "#/connection"] };
  }
  if (!status.events.accepted) return { text: "No event has arrived yet.", link: ["What to paste into Braze", "#/connection"] };
  const parts = [`Running for ${duration(status.uptime_s)}, version ${status.version}.`];
  if (status.delivered_at) parts.unshift(`Last delivery at ${clock(status.delivered_at)}.`);
  return { text: parts.join(" ") };
}

function conservation(bar) {
  const spans = {};
  const values = {};
  const shares = {};
  const row = (name, label) => {
    values[name] = el("dd", {});
    shares[name] = el("small", {});
    return el("div", { class: name === "accepted" ? "of-accepted" : name }, el("dt", {}, label), values[name]);
  };
  const rows = [row("accepted", "accepted")];
  for (const [name, label] of PARTS) {
    spans[name] = el("span", { class: `part-${name}` });
    rows.push(row(name, label));
  }
  bar.append(...Object.values(spans));
  return {
    element: el("dl", { class: "sum" }, rows),
    use(events) {
      for (const [name] of [["accepted"], ...PARTS]) {
        const value = events[name];
        if (name !== "accepted") {
          spans[name].style.flexGrow = value;
          spans[name].hidden = !value;
        }
        say(shares[name], name === "accepted" ? "" : share(value, events.accepted));
        if (values[name].firstChild?.textContent !== number(value)) fill(values[name], number(value), shares[name]);
      }
      const told = PARTS.map(([name, label]) => `${number(events[name])} ${label}`).join(" + ");
      bar.setAttribute("aria-label", `${number(events.accepted)} accepted = ${told}`);
    },
  };
}

function figures() {
  const spots = {};
  const fact = (name, label) => {
    spots[name] = { value: el("span", {}), more: el("p", {}) };
    return el("div", {}, el("dt", {}, label), el("dd", {}, spots[name].value, spots[name].more));
  };
  const disk = el("meter", { min: "0", max: "1", low: "0.8", high: "0.9", optimum: "0", "aria-label": "Share of the spool’s room that is used" });
  const rows = [
    fact("oldest", "Oldest event that waits"),
    fact("pace", "Pace"),
    fact("limit", "Why it isn’t faster"),
    fact("disk", "Disk"),
    fact("latency", "Mixpanel’s answers"),
    fact("doors", "Doors"),
  ];
  spots.disk.more.after(disk);
  const put = (name, value, more = "") => {
    say(spots[name].value, value);
    say(spots[name].more, more);
  };
  return {
    element: el("dl", { class: "facts" }, rows),
    use(status) {
      const { pace, spool } = status;
      put("oldest", status.oldest_age_s === null ? "Nothing waits" : duration(status.oldest_age_s), oldest(status));
      put("pace", `${count(Math.round(pace.delivered_per_second), "event")}/s`, `${count(pace.in_flight, "request")} under way, at most ${pace.concurrency_limit}; ${limits(pace)}`);
      put("limit", ...limited(status));
      put("disk", `${bytes(spool.bytes)} of ${bytes(spool.max_bytes)}`, `${count(spool.segments, "segment")}, ${bytes(spool.disk_free_bytes)} free on the disk`);
      disk.value = spool.max_bytes ? spool.bytes / spool.max_bytes : 0;
      const answers = Object.entries(status.verdicts).map(([name, times]) => `${number(times)} ${name}`).join(", ");
      put("latency", pace.latency_s === null ? "None yet" : `after ${duration(pace.latency_s)}`, answers);
      put("doors", doors(status), status.http ? `${count(Object.values(status.http.answers).reduce((a, b) => a + b, 0), "request")} over HTTP since the start` : "");
    },
  };
}

function oldest(status) {
  const told = [];
  if (status.expires_in_s !== null && status.expires_in_s !== undefined) told.push(`expires in ${duration(status.expires_in_s)}`);
  if (status.retrying) told.push(`${count(status.retrying.parcels, "batch", "batches")} tried again, ${count(status.retrying.attempts, "attempt")} so far`);
  return told.join("; ");
}

function limits(pace) {
  const told = [];
  if (pace.events_per_second_limit !== null) told.push(`${number(pace.events_per_second_limit)} events/s`);
  if (pace.bytes_per_second_limit !== null) told.push(`${bytes(pace.bytes_per_second_limit)}/s`);
  return told.length ? `allowed now: ${told.join(", ")}` : "no ceiling";
}

function limited(status) {
  const { pace } = status;
  if (!status.export) return ["Off", "No events are exported: mixpanel.export is false."];
  if (status.state === "not set up") return ["Not set up", "Nothing is sent until Mixpanel’s credential is entered."];
  if (status.halted) return ["Halted", "Nothing is sent until Mixpanel takes the credential."];
  if (pace.limited_by === "backoff") return [`Backing off for ${duration(pace.backing_off_s)}`, pace.reason];
  return LIMITS[pace.limited_by] ?? [pace.limited_by, ""];
}

function doors(status) {
  const open = [];
  if (status.http) open.push(`HTTP ${status.http.listen}`);
  if (status.stream) open.push(`stream, ${count(status.stream.connections, "connection")}`);
  return open.join("; ") || "None is open";
}

// -- the last hour and day --------------------------------------------------------------------------------------------

function history() {
  const drawn = charts();
  let span = "hour";
  let columns = null;
  let asking = false;
  let nextAt = 0;
  const choose = (name, text) => {
    const input = el("input", { type: "radio", name: "span", value: name, checked: name === span });
    input.addEventListener("change", () => {
      span = name;
      columns = null;
      nextAt = 0;
      void more();
    });
    return el("label", {}, input, el("span", {}, text));
  };
  const toggle = el("fieldset", { class: "toggle" }, el("legend", { class: "unseen" }, "Time shown"), choose("hour", "Last hour"), choose("day", "Last day"));
  const head = el("div", { class: "view-head" });
  const box = section("How it has been going", drawn.element);
  head.append(box.querySelector("h2"), toggle);
  box.prepend(head);

  async function more() {
    if (asking || Date.now() < nextAt) return;
    asking = true;
    const asked = span;
    try {
      const since = columns?.at.at(-1);
      const got = await ask("/api/history", { span, since });
      if (asked === span) {
        columns = since === undefined ? got : joined(columns, got);
        drawn.use(columns);
        nextAt = Date.now() + Math.min(got.step_s, 30) * 1000;
      }
    } catch {
      // The page says by itself that the daemon doesn't answer.
      nextAt = Date.now() + 5000;
    } finally {
      asking = false;
    }
    if (asked !== span) void more();
  }

  return { element: box, tick: () => void more(), end: drawn.end };
}

const SPANS_S = { hour: 3600, day: 86_400 };

/** What is drawn, and what came since, no longer than the span. After a restart of the daemon its history begins anew; ours goes on. */
function joined(before, later) {
  const at = [...before.at, ...later.at];
  const first = at.findIndex((one) => one > at.at(-1) - SPANS_S[later.span]);
  const both = { ...later };
  for (const [name, values] of Object.entries(later)) {
    if (Array.isArray(values)) both[name] = [...before[name], ...values].slice(Math.max(first, 0));
  }
  return both;
}
