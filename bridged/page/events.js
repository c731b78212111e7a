// Events: which are forwarded, under which names, what becomes of their fields, and how many there were.

import { ask, order } from "./api.js";
import { attempt, button, count, dialog, el, field, fill, newId, number, pretty, problemText, say, section, table, toast } from "./dom.js";
import { changes, complain, control, demandSeen, Settings, tellOvertaken, tellSaved } from "./settings.js";

export const title = "Events";

const COUNTS = [
  ["accepted", "Accepted"],
  ["delivered", "Delivered"],
  ["dead_lettered", "Dead letters"],
  ["skipped", "Skipped"],
];
const RULES = { "": "As it is", remove: "Remove: [REDACTED]", hash: "Hash: SHA-256" };
const KEPT = ["events.anonymous", "events.unknown"];
const MATCHES = {
  all: () => true,
  seen: (row) => row.counts.accepted > 0,
  off: (row) => !row.type.selected,
  changed: (row) => row.type.renamed || Object.keys(row.type.transform).length > 0,
  unknown: (row) => row.type.unknown_fields.length > 0,
};

/** Opens the view. */
export function open(main, context) {
  let answer = null;
  let rows = new Map(); // by event type: {type, counts, element, cells}
  let detail = null; // the open dialog's: {event_type, reload}
  const settings = new Settings();
  const search = el("input", { type: "search", placeholder: "Name or type", autocomplete: "off", oninput: () => sift() });
  const only = el(
    "select",
    { onchange: () => sift() },
    [["all", "All"], ["seen", "Seen"], ["off", "Not forwarded"], ["changed", "Renamed or transformed"], ["unknown", "With fields that aren’t forwarded"]].map(([value, text]) => el("option", { value }, text)),
  );
  const groups = el("div", {});
  const kept = KEPT.map((key) => control(key, async (one) => {
    await attempt(save, async () => tellSaved(await settings.save({}, [one])));
    reload();
  }));
  const save = el("button", { type: "submit", class: "primary" }, "Save");
  const others = el(
    "form",
    {
      novalidate: true,
      onsubmit: (event) => {
        event.preventDefault();
        attempt(save, async () => {
          let problem = null;
          try {
            demandSeen(kept);
            const saved = await settings.save(changes(kept));
            for (const one of kept) one.forget();
            tellSaved(saved);
          } catch (error) {
            problem = error;
          }
          await reload();
          if (problem) {
            tellOvertaken(problem, kept);
            complain(kept, problem);
          }
        });
      },
    },
    kept.map((one) => one.element),
    save,
  );
  const rest = section("Everything else", others);
  rest.hidden = true;
  const unlisted = el("div", {}); // what isn't in the table: counts of it
  const testAll = button("Send test events", () => attempt(testAll, () => sendTests()), "primary");
  const found = el("p", { class: "hint", role: "status" });

  fill(
    main,
    el("div", { class: "view-head" }, el("div", {}, el("h1", {}, title), el("p", {}, "Which events go to Mixpanel, and as what.")), testAll),
    el("div", { class: "tools" }, field("Find", search), field("Show", only), found),
    groups,
    unlisted,
    rest,
  );

  async function sendTests(types) {
    const sent = await order("POST", "/api/events/test", types ? { types } : {});
    toast(`Sent ${count(sent.sent, "test event")} through the bridge, as the user ${sent.user}.`);
  }

  let asked = 0;

  async function reload() {
    const mine = ++asked;
    try {
      const [got] = await Promise.all([ask("/api/events"), settings.load()]);
      // What was asked for before a change doesn't undo what has been seen since.
      if (mine !== asked) return;
      answer = got;
    } catch (error) {
      if (mine !== asked) return;
      fill(groups, el("div", { class: "callout bad" }, el("p", {}, problemText(error)), button("Try again", reload)));
      return;
    }
    for (const one of kept) one.use(settings.byKey.get(one.key));
    rest.hidden = false;
    draw();
    detail?.heed();
    await detail?.reload();
  }

  function draw() {
    // The rows are built once, and then brought up to date: the focus and the place stay where they are.
    const known = new Set(answer.groups.map((one) => one.group));
    const strays = answer.types.filter((type) => !known.has(type.group));
    const fresh = rows.size !== answer.types.length || answer.types.some((type) => !rows.has(type.event_type));
    if (fresh) {
      rows = new Map(answer.types.map((type) => [type.event_type, row(type)]));
      const boxes = answer.groups.map((group) => groupBox(group, answer.types.filter((type) => type.group === group.group)));
      fill(groups, boxes, strays.length > 0 && section("Not in the table", typesTable("Event types that aren’t in the table", strays)));
    }
    for (const type of answer.types) update(rows.get(type.event_type), type);
    for (const group of answer.groups) {
      // Whoever has gone to another view meanwhile took the groups out of the document.
      const box = groups.querySelector(`#group-${CSS.escape(group.group)}`);
      const of = answer.types.filter((type) => type.group === group.group);
      const on = of.filter((type) => type.selected).length;
      if (!isBusy(box)) box.checked = group.selected;
      box.indeterminate = on > 0 && on < of.length;
      say(groups.querySelector(`#group-${CSS.escape(group.group)}-told`), `${on} of ${of.length} types are forwarded`);
    }
    const live = context.live();
    useCounts(live ? live.status.by_type : answer.others);
    sift();
  }

  function groupBox(group, types) {
    const id = `group-${group.group}`;
    const box = el("input", {
      type: "checkbox",
      id,
      "aria-describedby": `${id}-told`,
      onchange: () => change(box, (on) => order("PUT", "/api/settings", { set: { [`events.${group.group}`]: on }, remove: [] })),
    });
    return section(group.title, el("div", { class: "choice" }, box, el("div", {}, el("label", { for: id }, "Forward this group"), el("p", { class: "hint", id: `${id}-told` }))), typesTable(group.title, types));
  }

  function typesTable(caption, types) {
    const forwarded = el("th", { scope: "col", class: "tight" }, el("span", { class: "unseen" }, "Forwarded"));
    const columns = [forwarded, "Event", ...COUNTS.map(([, text]) => [text, "right"])];
    return table(`${caption}: event types`, columns, types.map((type) => rows.get(type.event_type).element), "cards picks");
  }

  function row(type) {
    const box = el("input", {
      type: "checkbox",
      onchange: () => change(box, (on) => order("PUT", typePath(type.event_type), { selected: on })),
    });
    const name = el("button", { type: "button", class: "link", "aria-haspopup": "dialog", onclick: () => openType(type.event_type) });
    const tags = el("span", {});
    const cells = Object.fromEntries(COUNTS.map(([key, text]) => [key, el("td", { class: "right", "data-label": text })]));
    const element = el("tr", {}, el("td", { class: "tight" }, box), el("th", { scope: "row", class: "lead" }, name, " ", tags, el("small", {}, type.event_type)), Object.values(cells));
    return { type, counts: type.counts, element, box, name, tags, cells };
  }

  function update(one, type) {
    one.type = type;
    if (!isBusy(one.box)) one.box.checked = type.selected;
    const called = type.custom === "event" ? `${type.name} …` : type.name;
    say(one.name, called);
    one.box.setAttribute("aria-label", `Forward ${type.name}`);
    const transformed = Object.keys(type.transform).length;
    fill(
      one.tags,
      type.renamed && el("span", { class: "tag changed" }, "renamed"),
      type.renamed && " ",
      transformed > 0 && el("span", { class: "tag changed" }, count(transformed, "field transformed", "fields transformed")),
      transformed > 0 && " ",
      type.unknown_fields.length > 0 && el("span", { class: "tag warn" }, count(type.unknown_fields.length, "unknown field")),
    );
    show(one, type.counts);
  }

  function show(one, counts) {
    one.counts = counts;
    for (const [key] of COUNTS) {
      const cell = one.cells[key];
      say(cell, number(counts[key] ?? 0));
      cell.classList.toggle("zero", !counts[key]);
    }
  }

  function useCounts(byType) {
    for (const [name, counts] of Object.entries(byType ?? {})) {
      if (rows.has(name)) show(rows.get(name), counts);
    }
    drawOthers(Object.entries(byType ?? {}).filter(([name]) => !rows.has(name)));
  }

  /** What came of types that aren't in the table: nothing can be said of them but how many there were. */
  function drawOthers(found) {
    const key = JSON.stringify(found);
    if (unlisted.dataset.shown === key) return;
    unlisted.dataset.shown = key;
    const lines = found.map(([name, counts]) =>
      el("tr", {}, el("th", { scope: "row", class: "full" }, name || "no known type"), COUNTS.map(([one, text]) => el("td", { class: counts[one] ? "right" : "right zero", "data-label": text }, number(counts[one] ?? 0)))),
    );
    fill(unlisted, found.length > 0 && section("Not in the table", table("Event types that aren’t in the table", ["Event", ...COUNTS.map(([, text]) => [text, "right"])], lines)));
  }

  function sift() {
    const words = search.value.trim().toLowerCase().split(/\s+/);
    let left = 0;
    for (const one of rows.values()) {
      const text = `${one.type.name} ${one.type.event_type}`.toLowerCase();
      const hit = words.every((word) => text.includes(word)) && MATCHES[only.value](one);
      one.element.hidden = !hit;
      left += hit;
    }
    say(found, search.value.trim() || only.value !== "all" ? count(left, "type") : "");
  }

  let turn = Promise.resolve(); // the daemon saves one change at a time

  async function change(box, work) {
    const wanted = box.checked;
    const done = await attempt(box, async () => {
      const own = turn.then(() => work(wanted));
      turn = own.catch(() => {});
      const saved = await own;
      if (saved.restart_needed?.length) tellSaved(saved);
      return true;
    });
    if (!done) box.checked = !wanted;
    await reload();
  }

  function openType(eventType) {
    const type = () => answer.types.find((one) => one.event_type === eventType);
    detail = typeDialog(eventType, type, () => answer.revision, reload, () => sendTests([eventType]));
    detail.closed.then(() => {
      detail = null;
    });
  }

  reload().then(() => {
    const wanted = context.query.get("type");
    if (wanted && rows.has(wanted)) openType(wanted);
  });
  return {
    use({ status }) {
      if (answer) useCounts(status.by_type);
    },
    changed(what) {
      if (what === "settings_revision") reload();
    },
  };
}

/** Whether what was ticked is still on its way. */
const isBusy = (box) => box.getAttribute("aria-disabled") === "true";

const typePath = (eventType) => `/api/events/${encodeURIComponent(eventType)}`;

// -- one type ---------------------------------------------------------------------------------------------------------

/** What a dialog changes of a type. */
const givenOf = (type) => ({ name: type.renamed ? type.name : "", transform: type.transform });

/** Equal when the same is given. */
const keyOf = ({ name, transform }) => JSON.stringify([name, Object.entries(transform).sort()]);

/** The same in words. */
function inWords({ name, transform }) {
  const rules = Object.entries(transform).map(([one, rule]) => `${one} is ${rule === "remove" ? "removed" : "hashed"}`);
  return `There it is ${name ? `called “${name}”` : "called as before"}, and ${rules.length ? rules.join(", ") : "no field is transformed"}.`;
}

/** The dialog of a type. `revision()` is that of the settings which `type()` is from. */
function typeDialog(eventType, type, revision, changed, sendTest) {
  const first = type();
  const name = el("input", { type: "text", value: first.renamed ? first.name : "", placeholder: first.default_name, autocomplete: "off", spellcheck: "false", maxlength: "255" });
  const nameHint = first.custom === "event" ? "" : `Leave it empty for “${first.default_name}”. Reports in Mixpanel count the new name as another event.`;
  const rules = el("div", {});
  const sample = el("div", { class: "pair" });
  const conflict = el("div", { class: "conflict", role: "alert", tabindex: "-1" });
  const chosen = { ...first.transform };
  let base = givenOf(first); // what this dialog started from, or has heeded since
  let sent = ""; // what it has saved itself
  const selects = new Map();

  function ruleRow(fieldName, about, hashable = true) {
    const id = newId("rule");
    const select = el(
      "select",
      {
        id,
        onchange: () => {
          if (select.value) chosen[fieldName] = select.value;
          else delete chosen[fieldName];
        },
      },
      // Without its users, every event would be one person's; and what is no text has no hash.
      Object.entries(RULES).filter(([value]) => (fieldName !== "external_user_id" || value !== "remove") && (hashable || value !== "hash")).map(([value, text]) => el("option", { value }, text)),
    );
    select.value = chosen[fieldName] ?? "";
    selects.set(fieldName, select);
    return el("tr", {}, el("th", { scope: "row" }, el("label", { for: id }, el("code", {}, fieldName)), about && " ", about && el("span", { class: "hint" }, about)), el("td", { class: "tight" }, select));
  }

  function drawRules() {
    const now = type();
    const known = now.fields.map((one) => [one.field, one.type, one.hashable]);
    const own = Object.keys(chosen).filter((key) => !known.some(([one]) => one === key)).map((key) => [key, key.startsWith("properties.") ? "its own property" : ""]);
    const add = el("input", { type: "text", placeholder: "name of a property", autocomplete: "off", spellcheck: "false", "aria-label": "Name of a property of its own" });
    const adding = button("Add", () => {
      const key = `properties.${add.value.trim()}`;
      if (key === "properties.") return add.focus();
      chosen[key] ||= "remove";
      drawRules();
      return selects.get(key).focus();
    });
    selects.clear();
    // Those that have a rule are seen first.
    known.sort(([one], [other]) => (other in chosen) - (one in chosen));
    fill(
      rules,
      el("details", { open: Object.keys(chosen).length > 0 },
        el("summary", {}, `Transformations of its ${count(known.length, "field")}`),
        el("p", { class: "hint" }, "Applied when an event arrives, before anything is written to disk."),
        table("Fields", ["Field", "What becomes of it"], [...known, ...own].map(([key, about, hashable]) => ruleRow(key, about, hashable)), "short"),
        now.custom && el("div", { class: "inline" }, add, adding)),
    );
  }

  const mine = () => ({ name: name.value.trim(), transform: chosen });

  function adopt(theirs) {
    base = { name: theirs.name, transform: { ...theirs.transform } };
    const drawn = keyOf({ name: "", transform: chosen }) !== keyOf({ name: "", transform: base.transform });
    if (name.value.trim() !== base.name) name.value = base.name;
    for (const key of Object.keys(chosen)) delete chosen[key];
    Object.assign(chosen, base.transform);
    sent = "";
    if (drawn) drawRules();
    fill(conflict);
  }

  /** What was changed elsewhere is taken over, unless something else was typed here: then a person decides. */
  function heed() {
    const theirs = givenOf(type());
    if (keyOf(theirs) === keyOf(base)) return fill(conflict);
    if ([keyOf(base), keyOf(theirs), sent].includes(keyOf(mine()))) return adopt(theirs);
    const text = `${inWords(theirs)} What you have entered here isn’t saved yet.`;
    if (conflict.dataset.text === text && conflict.childElementCount) return conflict;
    conflict.dataset.text = text;
    const use = button("Use theirs", () => {
      adopt(theirs);
      save.focus();
    });
    const keep = button("Keep mine, to be saved over it", () => {
      base = theirs;
      fill(conflict);
      save.focus();
    });
    return fill(conflict, el("div", { class: "callout warn" }, el("p", {}, el("strong", {}, "Somebody has changed this event type in another window meanwhile. "), text), el("div", { class: "actions" }, use, keep)));
  }

  /** Saves it, unless somebody else has changed this type meanwhile; that they have changed another one doesn't matter. */
  async function put(tries = 5) {
    if (conflict.childElementCount) {
      conflict.focus();
      throw new Error("Say first which of the two is to be kept");
    }
    const wanted = keyOf(mine());
    const body = { transform: { ...chosen }, revision: revision() };
    if (first.custom !== "event") body.name = name.value.trim() || null;
    try {
      const answer = await order("PUT", typePath(eventType), body);
      sent = wanted;
      return answer;
    } catch (error) {
      if (error.status !== 409 || tries < 1) throw error;
      await changed();
      return put(tries - 1);
    }
  }

  async function drawSample() {
    try {
      const got = await ask(`${typePath(eventType)}/sample`);
      const right = got.outcome === "mapped" ? el("pre", { tabindex: "0", role: "region", "aria-label": "As Mixpanel gets it" }, pretty(got.mixpanel)) : el("div", { class: "callout warn" }, el("p", {}, got.outcome === "skipped" ? "Skipped and counted" : "A dead letter"), got.reason && el("p", { class: "hint" }, got.reason));
      fill(
        sample,
        el("section", { "aria-label": "Sample" }, el("h3", {}, "As Braze sends it"), el("pre", { tabindex: "0", role: "region", "aria-label": "As Braze sends it" }, pretty(got.currents))),
        el("section", { "aria-label": "Sample, mapped" }, el("h3", {}, "As Mixpanel gets it"), right),
      );
    } catch (error) {
      fill(sample, el("p", { class: "hint" }, problemText(error)));
    }
  }

  const unknown = first.unknown_fields.length > 0 && el("div", { class: "callout warn" }, el("p", {}, "Braze sends fields that this version doesn’t know and doesn’t forward: ", first.unknown_fields.map((one) => one.field).join(", "), "."));
  const save = el("button", { type: "submit", class: "primary" }, "Save");
  const test = button("Send a test event", () => attempt(test, sendTest));
  const form = el(
    "form",
    {
      onsubmit: (event) => {
        event.preventDefault();
        attempt(save, async () => {
          tellSaved(await put());
          await changed();
        });
      },
    },
    first.custom !== "event" && field("Name in Mixpanel", name, nameHint),
    rules,
    conflict,
    el("div", { class: "actions" }, save, test),
  );
  drawRules();
  drawSample();
  const { closed } = dialog(first.name, () => [el("p", { class: "hint" }, el("code", {}, eventType)), unknown, sample, form], { wide: true });
  return { closed, heed, reload: drawSample };
}
