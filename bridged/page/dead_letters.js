// Dead letters: what couldn't be delivered, why, and what to do with it. The daemon filters and pages; 100,000 are as quick as ten.

import { ask, askText, at, order } from "./api.js";
import { attempt, button, bytes, confirmed, count, dialog, el, field, fill, moment, number, pretty, problemText, say, section, table, toast } from "./dom.js";

export const title = "Dead letters";

const STAGES = { door: "our door", bridged: "bridged itself", mixpanel: "Mixpanel" };
/** Of one: who speaks, and what is kept. */
const TOLD = {
  door: ["Why our door refused it", "The original, as it came"],
  bridged: ["Why bridged didn’t send it", "The event, as it would have been sent to Mixpanel"],
  mixpanel: ["What Mixpanel says", "The event, as it was sent to Mixpanel"],
};
const MOST_SHOWN = 2 ** 18; // characters of an event: more of them take a browser seconds
const PAGE = 50;
const MOST_GROUPS = 12;
const REFRESH_MS = 3000;

/** Opens the view. */
export function open(main, context) {
  let filter = {};
  let pages = [null]; // the `before` of each page up to this one
  let next = null;
  let listed = [];
  let seen = null; // what the stream said when the list was asked for
  let askedAt = 0;
  let asking = 0;
  let refreshMs = REFRESH_MS;
  const selected = new Set();

  const groups = el("div", {});
  const list = el("div", {});
  const newer = button("Newer", () => attempt(newer, () => turn(-1)));
  const older = button("Older", () => attempt(older, () => turn(1)));
  newer.hidden = true;
  older.hidden = true;
  const where = el("p", { class: "hint", role: "status" });
  const form = filterForm((given) => {
    filter = given;
    return reload();
  });
  const fresh = button("There are newer ones: show them", () => reload(), "link");
  fresh.hidden = true;
  const told = el("p", {});
  const acts = { replay: button("Replay", () => act("replay")), purge: button("Purge", () => act("purge"), "danger"), export: el("a", { class: "button", download: "dead-letters.ndjson" }, "Export") };
  const bar = el("div", { class: "selected-bar" }, told, acts.replay, acts.export, acts.purge);
  const nothing = el("div", { class: "empty-state" });

  fill(
    main,
    el("div", { class: "view-head" }, el("div", {}, el("h1", {}, title), el("p", {}, "Events that couldn’t be delivered, and why. They are kept until you replay or purge them."))),
    nothing,
    section("Reasons", groups),
    section("List", form.element, fresh, list, bar, el("div", { class: "actions" }, newer, older, where)),
  );

  const query = () => ({ ...filter, order: "newest", limit: PAGE, before: pages.at(-1) });

  /** The first page anew, with the groups. */
  async function reload() {
    pages = [null];
    selected.clear();
    seen = letters(context.live());
    const startedAt = Date.now();
    await Promise.all([load(), loadGroups()]);
    // Counting a large table costs the daemon something: the more, the more seldom.
    refreshMs = Math.max(REFRESH_MS, 20 * (Date.now() - startedAt));
  }

  async function load() {
    const mine = ++asking;
    askedAt = Date.now();
    fresh.hidden = true;
    try {
      const page = await ask("/api/dead-letters", query());
      if (mine !== asking) return;
      listed = page.dead_letters;
      next = page.next;
      draw();
    } catch (error) {
      fill(list, el("div", { class: "callout bad" }, el("p", {}, problemText(error)), button("Try again", reload)));
    }
  }

  async function turn(by) {
    if (by > 0 && next !== null) pages.push(next);
    else if (by < 0 && pages.length > 1) pages.pop();
    selected.clear();
    await load();
    list.querySelector("input")?.focus();
  }

  async function loadGroups() {
    let found;
    try {
      found = await ask("/api/dead-letters/groups", { ...filter });
    } catch {
      return; // the list says what is wrong
    }
    const total = found.reduce((sum, group) => sum + group.count, 0);
    const any = Object.keys(filter).length > 0;
    fill(nothing, !total && !any && "There are none: everything that was accepted is on its way, or has arrived.");
    groups.parentElement.hidden = !total && !any;
    form.element.parentElement.hidden = !total && !any;
    form.types(found.map((group) => group.event_type));
    const rows = found.slice(0, MOST_GROUPS).map((group) =>
      el(
        "tr",
        {},
        el("td", { class: "right tight", "data-label": "events" }, number(group.count)),
        el("td", { class: "full reason" }, el("button", { type: "button", class: "link", onclick: () => form.choose({ exact_reason: group.reason, event_type: group.event_type, stage: group.stage }) }, group.reason || "no reason given")),
        el("td", { "data-label": "refused by" }, STAGES[group.stage] ?? group.stage),
        el("td", { class: "full" }, el("code", {}, group.event_type || "unknown type")),
      ),
    );
    fill(
      groups,
      rows.length
        ? table("Table of reasons", [["Events", "right"], "Reason", "Refused by", "Event type"], rows)
        : el("p", { class: "empty-state" }, "None that match."),
      found.length > MOST_GROUPS && el("p", { class: "hint" }, `And ${count(found.length - MOST_GROUPS, "more reason")}: filter to see them.`),
    );
    matching = total;
    tell();
  }

  let matching = 0;

  function tell() {
    const filtered = Object.keys(filter).length > 0;
    say(told, selected.size ? `${count(selected.size, "selected", "selected")}` : filtered ? `${number(matching)} that match` : `All ${number(matching)}`);
    bar.classList.toggle("some", selected.size > 0);
    bar.hidden = !matching && !selected.size;
    const given = selected.size ? [["ids", [...selected].join()]] : Object.entries(filter).filter(([, value]) => value !== "");
    acts.export.href = `${at("/api/dead-letters/export")}${given.length ? `?${new URLSearchParams(given)}` : ""}`;
  }

  function draw() {
    const all = el("input", { type: "checkbox", "aria-label": "Select all on this page", onchange: () => pick(listed.map((one) => one.id), all.checked) });
    const rows = listed.map((one) => {
      const box = el("input", { type: "checkbox", "aria-label": `Select dead letter ${one.id}`, checked: selected.has(one.id), onchange: () => pick([one.id], box.checked) });
      box.dataset.id = one.id;
      return el(
        "tr",
        {},
        el("td", { class: "tight" }, box),
        el("td", { class: "lead reason" }, el("button", { type: "button", class: "link", "aria-haspopup": "dialog", onclick: () => openLetter(one.id) }, one.reason || "no reason given"), el("small", {}, el("code", {}, one.event_type || "unknown type"))),
        el("td", { class: "tight", "data-label": "refused" }, moment(one.last_at)),
        el("td", { "data-label": "by" }, STAGES[one.stage] ?? one.stage),
        el("td", { class: "right", "data-label": "attempts" }, number(one.attempts)),
        el("td", { class: "right", "data-label": "size" }, bytes(one.bytes)),
      );
    });
    fill(
      list,
      rows.length
        ? table("Table of dead letters", [el("th", { scope: "col", class: "tight" }, all), "Reason", "Refused", "By", ["Attempts", "right"], ["Size", "right"]], rows, "cards picks")
        : el("p", { class: "empty-state" }, "None that match."),
    );
    newer.hidden = pages.length === 1;
    older.hidden = next === null;
    say(where, rows.length ? `Page ${pages.length}, newest first` : "");
    tell();
  }

  function pick(ids, on) {
    for (const id of ids) {
      if (on) selected.add(id);
      else selected.delete(id);
    }
    for (const box of list.querySelectorAll("input[data-id]")) box.checked = selected.has(Number(box.dataset.id));
    tell();
  }

  /** What an order is about: those chosen, those that match, or all. */
  function wanted() {
    if (selected.size) return { ids: [...selected] };
    return Object.keys(filter).length ? { filter } : { all: true };
  }

  async function act(verb) {
    const which = wanted();
    await attempt(acts[verb], async () => {
      const { count: many, upto } = await order("POST", "/api/dead-letters/count", which);
      // What comes while the question is open was seen by nobody.
      if (await carryOut(verb, which.ids ? which : { filter: { ...which.filter, upto } }, many)) await reload();
    });
  }

  function openLetter(id) {
    letterDialog(id, listed.map((one) => one.id), reload);
  }

  const sinceFirst = context.query.get("reason");
  if (sinceFirst) form.choose({ reason: sinceFirst });
  else reload();

  return {
    use(live) {
      const now = letters(live);
      if (seen === null || now === seen || Date.now() - askedAt < refreshMs) {
        seen ??= now;
        return;
      }
      // Nobody's list moves under the hands.
      const busy = selected.size > 0 || pages.length > 1 || list.contains(document.activeElement) || document.querySelector("dialog[open]") || groups.contains(document.activeElement);
      if (busy) fresh.hidden = false;
      else reload();
    },
  };
}

/** What changes when dead letters come or go. */
const letters = (live) => (live ? `${live.status.dead_letters.kept}/${live.status.events.dead_lettered}` : null);

/** Asks, and does it. True when it is done. */
async function carryOut(verb, which, many) {
  const what = count(many, "dead letter");
  if (!many) {
    toast("There is none any more.");
    return false;
  }
  const yes =
    verb === "purge"
      ? await confirmed(`Purge ${what}?`, "They are deleted for good. Export them first if they may be of use.", `Purge ${what}`, { danger: true })
      : await confirmed(`Replay ${what}?`, "They are mapped anew with today’s settings and sent to Mixpanel. What is refused again comes back here.", `Replay ${what}`);
  if (!yes) return false;
  if (verb === "purge") {
    const { purged } = await order("POST", "/api/dead-letters/purge", which);
    toast(`Purged ${count(purged, "dead letter")}.`);
  } else {
    const answer = await order("POST", "/api/dead-letters/replay", which);
    const refused = Object.entries(answer.reasons ?? {}).map(([reason, times]) => `${reason} (${number(times)})`);
    const skipped = answer.skipped ? `; ${number(answer.skipped)} skipped, as today’s settings don’t forward them` : "";
    if (answer.refused) toast(`Replayed ${number(answer.replayed)}${skipped}; ${number(answer.refused)} were refused again: ${refused.slice(0, 3).join("; ")}`, true);
    else if (answer.skipped) toast(`Replayed ${count(answer.replayed, "dead letter")}${skipped}.`);
    else toast(`Replayed ${count(answer.replayed, "dead letter")}: on the way to Mixpanel.`);
  }
  return true;
}

// -- the filter -------------------------------------------------------------------------------------------------------

function filterForm(use) {
  const type = el("input", { type: "text", autocomplete: "off", spellcheck: "false", list: "dead-letter-types" });
  const types = el("datalist", { id: "dead-letter-types" });
  const reason = el("input", { type: "search", autocomplete: "off", spellcheck: "false", placeholder: "Part of it" });
  const stage = el("select", {}, [["", "Anyone"], ["door", "Our door"], ["bridged", "bridged itself"], ["mixpanel", "Mixpanel"]].map(([value, text]) => el("option", { value }, text)));
  const since = el("input", { type: "datetime-local" });
  const until = el("input", { type: "datetime-local" });
  let exact = ""; // the whole reason, when a group was chosen
  const chosen = el("p", { class: "hint" });
  const moment = (input) => (input.value ? new Date(input.value).getTime() / 1000 : "");

  const given = () => Object.fromEntries(Object.entries({ event_type: type.value.trim(), reason: exact ? "" : reason.value.trim(), exact_reason: exact, stage: stage.value, since: moment(since), until: moment(until) }).filter(([, value]) => value !== ""));

  function apply() {
    fill(chosen, exact && ["Exactly: ", el("q", {}, exact)]);
    return use(given());
  }

  reason.addEventListener("input", () => {
    exact = "";
  });
  const send = el("button", { type: "submit" }, "Filter");
  const clear = button("Clear", () => choose({}), "quiet");

  function choose(values) {
    type.value = values.event_type ?? "";
    exact = values.exact_reason ?? "";
    reason.value = values.reason ?? "";
    stage.value = values.stage ?? "";
    since.value = "";
    until.value = "";
    return apply();
  }

  const element = el(
    "form",
    {
      role: "search",
      "aria-label": "Dead letters",
      onsubmit: (event) => {
        event.preventDefault();
        attempt(send, apply);
      },
    },
    el("div", { class: "tools" }, field("Reason", reason), field("Event type", type), field("Refused by", stage), field("Since", since), field("Before", until), types, el("div", { class: "inline" }, send, clear)),
    chosen,
  );
  return {
    element,
    choose,
    types: (names) => fill(types, [...new Set(names)].map((value) => el("option", { value }))),
  };
}

// -- one of them ------------------------------------------------------------------------------------------------------

function letterDialog(first, ids, changed) {
  let id = first;
  const body = el("div", {});
  const acts = { replay: button("Replay", () => act("replay"), "primary"), purge: button("Purge", () => act("purge"), "danger") };
  const save = el("a", { class: "button", download: "" }, "Export");
  const earlier = button("Newer", () => step(-1), "apart");
  const later = button("Older", () => step(1));

  async function show() {
    save.download = `dead-letter-${id}.ndjson`;
    save.href = `${at("/api/dead-letters/export")}?ids=${id}`;
    earlier.disabled = ids.indexOf(id) <= 0;
    later.disabled = ids.indexOf(id) >= ids.length - 1;
    const wanted = id;
    let letter;
    try {
      letter = exact(await askText(`/api/dead-letters/${id}`));
    } catch (error) {
      fill(body, el("div", { class: "callout bad" }, el("p", {}, problemText(error))));
      return;
    }
    if (wanted === id) fill(body, described(letter));
  }

  function step(by) {
    id = ids[ids.indexOf(id) + by] ?? id;
    return show();
  }

  async function act(verb) {
    await attempt(acts[verb], async () => {
      if (await carryOut(verb, { ids: [id] }, 1)) {
        close();
        await changed();
      }
    });
  }

  const { close } = dialog("Dead letter", () => [body, el("div", { class: "actions" }, acts.replay, save, acts.purge, earlier, later)], { wide: true });
  show();
}

// Stands before a number that is kept as text; nobody's event begins a text with it and a number.
const SPELLED = "\ue000";

/** A letter whose event and its mapped form have their numbers as they were spelled. */
function exact(text) {
  const { event, mapped } = JSON.parse(spelled(text));
  return { ...JSON.parse(text), ...(event === undefined ? {} : { event }), mapped };
}

/** JSON in which each number is a text that says how it was spelled. By hand: a pattern has no room for a text of megabytes. */
function spelled(text) {
  const parts = [];
  for (let at = 0; at < text.length; ) {
    const begin = text.indexOf('"', at);
    const outside = text.slice(at, begin < 0 ? text.length : begin);
    parts.push(outside.replace(/-?\d[-+.\deE]*/g, (token) => `"${SPELLED}${token}"`));
    if (begin < 0) break;
    const end = endOf(text, begin);
    parts.push(text.slice(begin, end));
    at = end;
  }
  return parts.join("");
}

/** Where a text that begins there ends: behind the next quote without an odd number of backslashes before it. */
function endOf(text, begin) {
  for (let at = begin + 1; ; ) {
    const quote = text.indexOf('"', at);
    if (quote < 0) return text.length;
    let before = quote;
    while (text[before - 1] === "\\") before -= 1;
    if ((quote - before) % 2 === 0) return quote + 1;
    at = quote + 1;
  }
}

/** What is kept of one that is no object: as it is, if it is text at all. */
function unparsed(base64) {
  if (!base64) return "(nothing is left of it)";
  try {
    const raw = Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(raw);
    return isJson(text) ? text : `${text}\n(not JSON)`;
  } catch {
    return `${base64}\n(not text: base64)`;
  }
}

function isJson(text) {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

function described(letter) {
  const asSpelled = (value) => pretty(value).replace(/"\ue000([-+.\deE]+)"/g, "$1");
  const code = (name, value) => {
    const text = asSpelled(value);
    const rest = text.length > MOST_SHOWN && el("p", { class: "hint" }, `That is the beginning: ${number(MOST_SHOWN)} of ${count(text.length, "character")}. Export has all of it.`);
    return [el("pre", { tabindex: "0", role: "region", "aria-label": name }, text.slice(0, MOST_SHOWN)), rest];
  };
  const original = letter.event ?? unparsed(letter.event_base64);
  const [why, what] = TOLD[letter.stage] ?? [`Refused by ${letter.stage}`, "The event"];
  const facts = el(
    "dl",
    { class: "facts" },
    [
      ["Event type", letter.event_type || "unknown"],
      ["Refused by", STAGES[letter.stage] ?? letter.stage],
      ["Attempts", number(letter.attempts)],
      ["First refused", moment(letter.first_at)],
      ["Last refused", moment(letter.last_at)],
    ].map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
  );
  return [
    el(
      "div",
      { class: "pair" },
      section(why, el("div", { class: "callout bad" }, el("p", {}, letter.reason || "No reason given.")), facts),
      section(what, code("Event", original)),
    ),
    letter.stage === "door" &&
      section(
        "What today’s settings make of it",
        letter.mapped ? code("Mapped", letter.mapped) : el("div", { class: "callout warn" }, el("p", {}, letter.mapped_problem || "It would be refused again.")),
      ),
  ];
}
