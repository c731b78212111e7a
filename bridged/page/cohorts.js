// Cohorts: Mixpanel's, on their way into Braze.

import { ask, order } from "./api.js";
import { attempt, button, clock, confirmed, count, el, fill, moment, number, problemText, prose, say, section, table, toast } from "./dom.js";

export const title = "Cohorts";

const REFRESH_MS = 5000;
const BUSY_REFRESH_MS = 1000;
const REFUSALS = 50;
const MOST_REFUSALS = 1000; // that the API gives at once
const BUSY = ["receiving", "sweeping", "sending", "renaming", "resyncing", "forgetting"];
const SENDER = { halted: "bad", capped: "warn", "backing off": "warn" };

/** Opens the view. */
export function open(main) {
  const body = el("div", {});
  let askedAt = 0;
  let refreshMs = REFRESH_MS;
  let shown = "";
  let view = null; // what is there: {use(answer)}
  let ended = false;
  fill(main, el("div", { class: "view-head" }, el("div", {}, el("h1", {}, title), el("p", {}, "Mixpanel’s cohorts, imported into Braze."))), body);

  async function reload() {
    askedAt = Date.now();
    let answer;
    try {
      answer = await ask("/api/cohorts");
    } catch (error) {
      if (error.status === 0 && view) return; // the page says by itself that the daemon doesn't answer
      answer = { problem: error.status === 404 ? "none" : problemText(error) };
    }
    const key = answer.problem ?? "cohorts";
    if (ended) return;
    if (key !== shown) {
      shown = key;
      view = null;
      if (answer.problem === "none") fill(body, none());
      else if (answer.problem) fill(body, el("div", { class: "callout bad" }, el("p", {}, answer.problem), button("Try again", reload)));
      else {
        view = overview(reload);
        fill(body, view.element);
      }
    }
    refreshMs = answer.figures && answer.figures.joining + answer.figures.leaving > 0 ? BUSY_REFRESH_MS : REFRESH_MS;
    view?.use(answer);
  }

  reload();
  return {
    use() {
      if (Date.now() - askedAt >= refreshMs) reload();
    },
    changed(what) {
      if (what === "cohorts_revision") reload();
    },
    end() {
      ended = true;
    },
  };
}

function none() {
  return section(
    "No cohorts configured",
    el("p", {}, "bridged can take the cohorts that Mixpanel syncs and keep their membership up to date in Braze."),
    el("p", {}, "Set enabled in ", el("code", {}, "[cohorts]"), " and the key of ", el("code", {}, "[braze]"), " in the configuration, and restart."),
  );
}

function overview(reload) {
  const sentence = el("p", {});
  const notice = el("div", {});
  const facts = {};
  const fact = (name, label) => {
    facts[name] = { value: el("span", {}), more: el("p", {}) };
    return el("div", {}, el("dt", {}, label), el("dd", {}, facts[name].value, facts[name].more));
  };
  const put = (name, value, more = "") => {
    say(facts[name].value, value);
    say(facts[name].more, more);
  };
  const rows = new Map(); // by key: {element, cells}
  const tbody = el("tbody", {});
  const empty = el("p", { class: "empty-state" }, "None yet: Mixpanel sends them as soon as a cohort’s sync is switched on there.");
  const head = ["Cohort", "Last sync", ["Members", "right"], ["In Braze", "right"], ["Waiting", "right"], ["Rejected", "right"], ""];
  const list = table("Table of cohorts", head, tbody);
  const refused = refusals(reload);
  const all = button("Resync all", () => resync(all, { all: true }, "all cohorts", reload));
  const allow = button("Spend what is due", () => spend(allow, reload), "primary");
  const element = el(
    "div",
    {},
    notice,
    section("Now", sentence, el("dl", { class: "facts" }, fact("sender", "Writer to Braze"), fact("points", "Data points spent today"), fact("members", "Members"), fact("due", "Waiting")), el("div", { class: "actions" }, allow)),
    section("Cohorts", empty, list, el("div", { class: "actions" }, all)),
    refused.element,
  );

  return {
    element,
    use({ cohorts, figures, writer, ...answer }) {
      fill(sentence, prose(answer.sentence ?? ""));
      const halted = writer.halted && `Nothing is written to Braze. ${writer.halted.reason}`;
      fill(notice, halted && el("div", { class: "callout bad" }, el("p", {}, halted)), answer.page_refused && pageRefused(answer.page_refused, cohorts));
      put("sender", writer.state.charAt(0).toUpperCase() + writer.state.slice(1), SENDER[writer.state] ? writer.problem : `${count(writer.users_sent, "update")} of users written since the start`);
      const left = figures.points_left_today;
      put("points", number(figures.points_today), left === null || left === undefined ? "no daily cap" : `${number(left)} left of today’s cap`);
      put("members", number(figures.members), `${number(figures.in_braze)} of them are in Braze`);
      put("due", number(figures.joining + figures.leaving), `${number(figures.joining)} to join, ${number(figures.leaving)} to leave`);
      allow.hidden = writer.state !== "capped";
      const keys = new Set(cohorts.map((one) => one.key));
      for (const [key, row] of rows) {
        if (!keys.has(key)) {
          row.element.remove();
          rows.delete(key);
        }
      }
      for (const one of cohorts) {
        if (!rows.has(one.key)) {
          rows.set(one.key, cohortRow(one, reload));
          tbody.append(rows.get(one.key).element);
        }
        rows.get(one.key).use(one);
      }
      empty.hidden = cohorts.length > 0;
      list.hidden = !cohorts.length;
      all.hidden = !cohorts.length;
      refused.use(figures.rejected + figures.rejected_leaving, cohorts);
    },
  };
}

/** Mixpanel pauses a sync for good when it is told that a page is wrong: somebody has to switch it on again there. */
function pageRefused({ at, status, reason }, cohorts) {
  const since = cohorts.some((one) => one.last_page_at > at);
  return el(
    "div",
    { class: `callout ${since ? "warn" : "bad"}` },
    el("p", {}, el("strong", {}, `A page of Mixpanel’s was refused at ${clock(at)}, with ${status}: `), prose(reason)),
    el("p", { class: "hint" }, `Mixpanel pauses a sync at that: mend the cause, and switch the sync on again there.${since ? " Others have been taken since." : ""}`),
  );
}

/** Whom Braze refused, and why. */
function refusals(reload) {
  const list = el("div", {});
  let limit = REFUSALS;
  let drawn = "";
  let asking = false;
  const more = button("Show more", () => {
    limit = Math.min(2 * limit, MOST_REFUSALS);
    return attempt(more, reload);
  });
  const again = button("Try them again", () => resync(again, { all: true, rejected_only: true }, "", reload));
  const where = el("p", { class: "hint", role: "status" });
  const box = section("Refused by Braze", list, el("div", { class: "actions" }, again, more, where));
  box.hidden = true;

  async function load(names) {
    if (asking) return;
    asking = true;
    try {
      const found = await ask("/api/cohorts/refusals", { limit });
      const key = JSON.stringify([found, [...names]]);
      if (key === drawn) return;
      drawn = key;
      const rows = found.refusals.map((one) =>
        el(
          "tr",
          {},
          el("th", { scope: "row", class: "full" }, el("bdi", {}, one.external_id)),
          el("td", { class: "full reason" }, one.reason || "no reason given"),
          el("td", { "data-label": "cohorts" }, one.cohorts.map((cohort, index) => [index > 0 && ", ", el("bdi", {}, names.get(cohort) ?? cohort)])),
          el("td", { class: "right", "data-label": "attempts" }, number(one.attempts)),
          el("td", { class: "tight", "data-label": "last" }, moment(one.last_at)),
        ),
      );
      fill(list, table("Table of users that Braze refused", ["User", "What Braze says", "Cohorts", ["Attempts", "right"], "Last"], rows));
      more.hidden = found.next === null || limit >= MOST_REFUSALS;
      say(where, found.next === null ? "" : `The first ${number(rows.length)} users`);
    } catch (error) {
      drawn = "";
      fill(list, el("p", { class: "hint" }, problemText(error)));
    } finally {
      asking = false;
    }
  }

  return {
    element: box,
    use(many, cohorts) {
      box.hidden = !many;
      if (many) void load(new Map(cohorts.map((one) => [one.key, one.name || one.key])));
    },
  };
}

function cohortRow(first, reload) {
  // A name from outside, in whatever direction it runs, leaves what stands beside it as it is.
  const name = el("bdi", {});
  const state = el("span", { class: "tag" });
  const cells = Object.fromEntries([["synced", "last sync"], ["members", "members"], ["in_braze", "in Braze"], ["waiting", "waiting"], ["rejected", "rejected"]].map(([key, label]) => [key, el("td", { class: key === "synced" ? "tight" : "right", "data-label": label })]));
  let called = first.name || first.key;
  const again = button("Resync", () => resync(again, { cohort: first.key }, `“${called}”`, reload));
  return {
    element: el("tr", {}, el("th", { scope: "row", class: "full" }, name, " ", state, el("small", {}, first.key)), Object.values(cells), el("td", { class: "tight full" }, again)),
    use(one) {
      called = one.name || one.key;
      say(name, called);
      again.setAttribute("aria-label", `Resync ${called}`);
      say(state, BUSY.includes(one.state) && one.progress > 0 && one.progress < 1 ? `${one.state}, ${Math.round(100 * one.progress)} %` : one.state);
      state.className = BUSY.includes(one.state) ? "tag changed" : "tag";
      if (cells.synced.dataset.at !== String(one.last_page_at)) fill(cells.synced, one.last_page_at ? moment(one.last_page_at) : "never");
      cells.synced.dataset.at = String(one.last_page_at);
      for (const [key, value] of Object.entries({ members: one.members, in_braze: one.in_braze, waiting: one.joining + one.leaving, rejected: one.rejected + one.rejected_leaving })) {
        say(cells[key], number(value));
        cells[key].classList.toggle("zero", !value);
      }
    },
  };
}

async function resync(control, which, what, reload) {
  await attempt(control, async () => {
    const asked = which.rejected_only
      ? ["Try what Braze refused again?", "Only what it refused is written again. Braze bills data points for what it takes.", "Try them again"]
      : [`Resync ${what}?`, "Every membership is written to Braze again. Braze bills data points for it.", "Resync"];
    if (!(await confirmed(...asked))) return;
    const { due } = await order("POST", "/api/cohorts/resync", which);
    toast(`${count(due, "membership")} will be written again.`);
    await reload();
  });
}

async function spend(control, reload) {
  await attempt(control, async () => {
    const plan = await ask("/api/cohorts/plan");
    // What the cap leaves is spent anyway; what becomes due while the question is open wasn't confirmed.
    const beyond = plan.points - (plan.left_today ?? plan.points);
    if (beyond <= 0) {
      toast("What is due fits into today’s cap: nothing has to be allowed.");
      return reload();
    }
    const text = `${plan.users === 1 ? "1 user is" : `${number(plan.users)} users are`} due, for ${count(plan.points, "data point")}: more than today’s cap allows. At most so many are spent; what becomes due later waits.`;
    if (!(await confirmed("Go beyond today’s cap?", text, `Spend ${count(plan.points, "data point")}`))) return undefined;
    await order("POST", "/api/cohorts/allow", { points: beyond });
    toast("Allowed, for today.");
    return reload();
  });
}
