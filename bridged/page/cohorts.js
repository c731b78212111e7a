// Cohorts: Mixpanel's, on their way into Braze.

import { ask, order } from "./api.js";
import { attempt, button, confirmed, count, el, fill, moment, number, problemText, section, toast } from "./dom.js";

export const title = "Cohorts";

const REFRESH_MS = 5000;
const STATES = { synced: "good", receiving: "changed", sweeping: "changed", sending: "changed", renaming: "changed", forgetting: "warn" };

/** Opens the view. */
export function open(main) {
  const body = el("div", {});
  let askedAt = 0;
  let shown = "";
  let ended = false;
  fill(main, el("div", { class: "view-head" }, el("div", {}, el("h1", {}, title), el("p", {}, "Mixpanel’s cohorts, imported into Braze."))), body);

  async function reload() {
    askedAt = Date.now();
    let answer;
    try {
      answer = await ask("/api/cohorts");
    } catch (error) {
      answer = error.status === 404 ? null : { problem: problemText(error) };
    }
    const key = JSON.stringify(answer);
    // Nothing is built anew under the hands, or in vain.
    if (ended || key === shown || (shown && body.contains(document.activeElement) && document.querySelector("dialog[open]"))) return;
    const focused = body.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    shown = key;
    if (answer === null) fill(body, none());
    else if (answer.problem) fill(body, el("div", { class: "callout bad" }, el("p", {}, answer.problem), button("Try again", reload)));
    else fill(body, all(answer, reload));
    if (focused) [...body.querySelectorAll("button")].find((one) => one.getAttribute("aria-label") === focused)?.focus();
  }

  reload();
  return {
    use() {
      if (Date.now() - askedAt > REFRESH_MS) reload();
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
    el("p", {}, "Set enabled in ", el("code", {}, "[cohorts]"), " and the keys of ", el("code", {}, "[braze]"), " in the configuration, and restart."),
  );
}

function all(answer, reload) {
  const { cohorts, writer, plan } = answer;
  const resync = (key, name) =>
    button("Resync", async (event) => {
      const what = key ? `“${name}”` : "all cohorts";
      if (!(await confirmed(`Resync ${what}?`, "Every membership is written to Braze again. This costs data points.", "Resync"))) return;
      await attempt(event.target, async () => {
        const { due } = await order("POST", "/api/cohorts/resync", { cohort: key });
        toast(due === undefined ? "Under way." : `${count(due, "membership")} will be written again.`);
      });
      await reload();
    });
  const rows = cohorts.map((one) => {
    const again = resync(one.key, one.name);
    again.setAttribute("aria-label", `Resync ${one.name || one.key}`);
    return el(
      "tr",
      {},
      el("th", { scope: "row", class: "full" }, one.name || one.key, " ", el("span", { class: `tag ${STATES[one.state] ?? ""}` }, one.state), el("small", {}, one.key)),
      el("td", { "data-label": "last sync" }, one.synced_at ? moment(one.synced_at) : "never"),
      el("td", { class: "right", "data-label": "members" }, number(one.members)),
      el("td", { class: "right", "data-label": "in Braze" }, number(one.in_braze)),
      el("td", { class: "right", "data-label": "waiting" }, number(one.joining + one.leaving)),
      el("td", { class: "right", "data-label": "rejected" }, number(one.rejected)),
      el("td", { class: "tight full" }, again),
    );
  });
  const points = plan ?? answer.figures ?? {};
  const spent = points.spent_today ?? points.points_today;
  const left = points.left_today ?? points.points_left_today;
  const figures = [
    ["Sender", writer?.state ?? "–", writer?.problem],
    ["Data points spent today", spent === undefined ? "–" : number(spent), left === undefined || left === null ? "no daily cap" : `${number(left)} left`],
    ["Would be written now", plan ? count(plan.users, "user") : "–", plan && `for ${count(plan.points, "data point")}`],
  ].map(([label, value, more]) => el("div", {}, el("dt", {}, label), el("dd", {}, value, more && el("p", {}, more))));
  const head = [["Cohort", ""], ["Last sync", ""], ["Members", "right"], ["In Braze", "right"], ["Waiting", "right"], ["Rejected", "right"]];
  return [
    writer?.state === "halted" && el("div", { class: "callout bad" }, el("p", {}, "Braze refuses the key: nothing is written. ", writer.problem)),
    section("Now", el("dl", { class: "facts" }, figures)),
    section(
      "Cohorts",
      rows.length
        ? [
            el("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": "Cohorts" }, el("table", { class: "cards" }, el("thead", {}, el("tr", {}, head.map(([text, side]) => el("th", { scope: "col", class: side || null }, text)), el("td", {}))), el("tbody", {}, rows))),
            el("div", { class: "actions" }, resync("", "")),
          ]
        : el("p", { class: "empty-state" }, "None yet: Mixpanel sends them when a cohort’s sync is switched on there."),
    ),
  ];
}
