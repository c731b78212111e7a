// Settings: a control for each, where its value comes from, and saving them. Shared by the views that change some.

import { ask, at, order, Refused } from "./api.js";
import { button, confirmed, dialog, el, field, fill, newId, problemText, prose, table, toast } from "./dom.js";

/** What a person calls a setting; the others are called what they are called in config.toml. */
const LABELS = {
  "mixpanel.url": "Another address than the region’s",
  "mixpanel.region": "Data residency",
  "mixpanel.token": "Project token",
  "mixpanel.api_secret": "API secret",
  "mixpanel.service_account": "Service account user name",
  "mixpanel.service_secret": "Service account secret",
  "mixpanel.project_id": "Project ID",
  "mixpanel.naming": "Names of events and properties",
  "mixpanel.partner_id": "Partner ID",
  "events.message_engagement": "Message engagement events",
  "events.customer_behavior": "Customer behavior events",
  "events.include": "Event types that are forwarded although their group is off",
  "events.exclude": "Event types that aren’t forwarded although their group is on",
  "events.names": "Renamed event types",
  "events.transform": "Transformations",
  "events.unknown": "Event types that aren’t in the table",
  "events.anonymous": "Events of users without an external ID",
  "retention.max_age": "While halted, events expire after",
  "retention.on_expiry": "What happens to events that expire",
  "delivery.max_events_per_second": "Events per second at most",
  "delivery.max_bytes_per_minute": "Uncompressed bytes per minute at most",
  "delivery.max_concurrency": "Requests under way at most",
  "delivery.flush_interval": "A batch waits for more for",
  "delivery.timeout": "A request is given up after",
  "delivery.probe_interval": "While halted, Mixpanel is asked again every",
  "alerts.webhook_url": "Alarms are posted to",
  "alerts.webhook_token": "Token of that address",
  "alerts.spool_share": "Alarm when this share of the spool is used",
  "alerts.undelivered": "Alarm when nothing has been delivered for",
  "sources.http.bearer_token": "Bearer token for Braze",
};

const CHOICES = {
  "mixpanel.region": { us: "United States", eu: "European Union", in: "India" },
  "mixpanel.naming": { seed: "As the hosted connector’s documentation spells them", current: "As Braze spells them now" },
  "events.unknown": { dead_letter: "Keep them as dead letters", forward: "Forward them", skip: "Skip and count them" },
  "events.anonymous": { skip: "Skip and count them", device: "Send them under the device’s ID", dead_letter: "Keep them as dead letters" },
  "retention.on_expiry": { archive: "Archive them, to be sent later", drop: "Delete them for good", keep: "Keep them: never expire" },
};

/** What a setting is called. */
export const labelOf = (key) => LABELS[key] ?? key;

/** A value for people. */
export function shown(key, value) {
  if (value === undefined || value === null) return "";
  if (typeof value === "boolean") return value ? "on" : "off";
  if (value === "") return "nothing";
  if (Array.isArray(value)) return value.length ? value.join(", ") : "none";
  if (typeof value === "object") return Object.keys(value).length ? JSON.stringify(value) : "none";
  return CHOICES[key]?.[value] ?? String(value);
}

/** All settings that a page may change. */
export class Settings {
  constructor() {
    this.revision = 0;
    this.foreign = 0; // how often somebody else has changed something
    this.byKey = new Map();
    this.answer = null;
  }

  /** Asks for them. Raises Refused. */
  async load() {
    this.answer = await ask("/api/settings");
    if (this.answer.revision !== this.revision) this.foreign += 1;
    this.revision = this.answer.revision;
    for (const one of this.answer.keys) one.foreign = this.foreign;
    this.byKey = new Map(this.answer.keys.map((one) => [one.key, one]));
    return this;
  }

  /** Saves `set` and takes back `remove`. Raises Refused. */
  async save(set, remove = []) {
    if (!Object.keys(set).length && !remove.length) return { revision: this.revision, changed: [], restart_needed: [] };
    const answer = await order("PUT", "/api/settings", { set, remove, revision: this.revision });
    this.revision = answer.revision;
    return answer;
  }
}

/** Says what was saved. */
export function tellSaved(answer) {
  if (!answer.changed.length) toast("Nothing had changed.");
  else if (answer.restart_needed.length) toast(`Saved. A restart is needed for ${answer.restart_needed.map(labelOf).join(", ")}.`);
  // Nothing is exported: there is no use for it yet.
  else if (answer.unused?.length === answer.changed.length) toast("Saved. It has no effect while mixpanel.export is false.");
  else toast("Saved, and in force at once.");
}

/** A control for a setting, with its label and where its value comes from. `back(key)` is called to take an override away. */
export function control(key, back) {
  const id = newId("setting");
  let known = null;
  let touched = false;
  let base = null; // what was in force when a person began to type
  let input = null;
  const source = el("p", { class: "hint" });
  const problem = el("p", { class: "hint tag bad", id: `${id}-problem`, hidden: true });
  const holder = el("div", {});
  const touch = () => {
    if (!touched) base = stateOf(known);
    touched = true;
    complain("");
  };

  function build(one) {
    const hints = `${id}-hint ${id}-problem`;
    if (one.kind === "choice") {
      input = el("select", { id, onchange: touch, "aria-describedby": hints }, one.choices.map((value) => el("option", { value }, CHOICES[key]?.[value] ?? value)));
    } else if (one.kind === "boolean") {
      input = el("input", { id, type: "checkbox", onchange: touch, "aria-describedby": hints });
    } else {
      const secret = one.kind === "secret";
      input = el("input", { id, type: secret ? "password" : "text", autocomplete: secret ? "new-password" : "off", spellcheck: "false", autocapitalize: "none", oninput: touch, "aria-describedby": hints });
      if (one.kind === "number") input.setAttribute("inputmode", "decimal");
    }
    // The choices are spelled out by the control.
    const about = one.kind === "choice" ? one.description.replace(/^\w+( \| \w+)+: ?/, "") : one.description;
    const hint = el("p", { class: "hint", id: `${id}-hint` }, prose(about.charAt(0).toUpperCase() + about.slice(1)));
    if (one.kind === "boolean") holder.append(el("div", { class: "choice" }, input, el("div", {}, el("label", { for: id }, labelOf(key)), hint, problem, source)));
    else holder.append(el("div", { class: "field" }, el("label", { for: id }, labelOf(key)), input, hint, problem, source));
  }

  function put(one) {
    if (one.kind === "boolean") input.checked = one.value;
    else if (one.kind === "secret") input.value = "";
    else input.value = one.value ?? "";
    touched = false;
  }

  function complain(text) {
    fill(problem, prose(text));
    problem.hidden = !text;
    if (text) input.setAttribute("aria-invalid", "true");
    else input?.removeAttribute("aria-invalid");
  }

  return {
    key,
    element: holder,
    /** Takes over what is in force; what a person has typed stays. */
    use(one) {
      if (!one) return;
      if (!input) build(one);
      const first = known === null;
      known = one;
      if (first || !touched) put(one);
      if (one.kind === "secret") input.placeholder = one.set ? "Set. Leave it empty to keep it." : "Not set";
      if (!one.overridden) fill(source);
      else {
        const empty = one.kind === "secret" ? !one.configured_set : one.configured === "";
        const says = empty ? " " : one.kind === "secret" ? " The configuration has another one. " : ` The configuration says ${shown(key, one.configured)}. `;
        fill(source, el("span", { class: "tag changed" }, "Saved on this page"), says, el("button", { type: "button", class: "link", "aria-label": `${empty ? "Remove" : "Use that"}: ${labelOf(key)}`, onclick: () => back(key) }, empty ? "Remove" : "Use that"));
      }
    },
    /** What a person has changed it to; undefined: nothing. Raises an Error when it can't be understood. */
    changed() {
      if (!known || !touched) return undefined;
      if (known.kind === "boolean") return input.checked === known.value ? undefined : input.checked;
      const text = input.value.trim();
      if (known.kind === "secret") return text === "" ? undefined : text;
      if (text === String(known.value ?? "")) return undefined;
      if (known.kind !== "number") return text;
      // 1e400 is none that could be sent: it would leave as null.
      if (text === "" || !Number.isFinite(Number(text))) {
        complain("A number, please");
        input.focus();
        throw new Error(`${labelOf(key)}: a number, please`);
      }
      return Number(text);
    },
    set(value) {
      if (typeof value === "boolean") input.checked = value;
      else input.value = value;
      touch();
    },
    isSet: () => Boolean(known?.set),
    /** Whether there is something, typed or (of a secret) known to the daemon. */
    isGiven: () => Boolean(input?.value.trim()) || (known?.kind === "secret" && known.set),
    isTouched: () => touched,
    /** Whether somebody else has changed it since a person began to type here: what is in force now, in words. Once. */
    overtaken() {
      if (!touched || base === null || stateOf(known) === base) return "";
      base = stateOf(known);
      if (known.kind === "boolean" ? input.checked === known.value : input.value.trim() === String(known.value ?? "")) return "";
      return known.kind === "secret" ? "settings, maybe this one too," : shown(key, known.value);
    },
    forget() {
      touched = false;
      complain("");
    },
    complain,
    focus: () => input.focus(),
  };
}

/** Of a setting in force: what tells whether somebody else has changed it. Of a secret only that they have changed something. */
const stateOf = (one) => JSON.stringify(one?.kind === "secret" ? one.foreign : one?.value);

/** Raises Refused if somebody else has changed what was typed over here: what a save would overwrite unseen. Said once. */
export function demandSeen(controls) {
  const found = controls.map((one) => [one, one.overtaken()]).filter(([, now]) => now);
  if (!found.length) return;
  for (const [one, now] of found) one.complain(`Somebody else has saved ${now} meanwhile.`);
  found[0][0].focus();
  throw new Refused(409, "the settings were changed meanwhile, in another window or file");
}

/** What a person is told who would overwrite another's change; then it is for them to say whether they do. */
export function tellOvertaken(error, controls) {
  if (error.status !== 409) return;
  error.hint = "The newest values are shown; what you typed is still there. Save again to put it in their place.";
  for (const one of controls) one.overtaken();
}

/** A form's controls: what has changed in them, and what is wrong with which. */
export function changes(controls) {
  const found = {};
  for (const one of controls) {
    const value = one.changed();
    if (value !== undefined) found[one.key] = value;
  }
  return found;
}

/** Puts each problem under its control, and the focus into the first. What fits nowhere is said. */
export function complain(controls, error) {
  let first = true;
  for (const one of controls) {
    if (error.keys?.[one.key] && one.element.isConnected && !one.element.hidden) {
      one.complain(error.keys[one.key]);
      if (first) one.focus();
      first = false;
    }
  }
  if (first) toast(problemText(error), true);
}

/** What was saved on the page and goes before the configuration, as a section. `back(keys)` takes some away. */
export function overrides(settings, back) {
  const { answer } = settings;
  const saved = answer.keys.filter((one) => one.overridden);
  const configured = answer.file ? el("code", {}, answer.file) : "the configuration";
  if (!saved.length) return el("p", {}, "Nothing yet: everything is as ", configured, " says. What is saved here is kept in ", el("code", {}, answer.saved_in), " and goes before it.");
  const value = (one, which) => (one.kind === "secret" ? (which === "saved" || one.configured_set ? "••••••••" : "nothing") : shown(one.key, one[which]));
  const rows = saved.map((one) =>
    el(
      "tr",
      {},
      el("th", { scope: "row", class: "full" }, labelOf(one.key), el("small", {}, el("code", {}, one.key))),
      el("td", { "data-label": "saved here" }, value(one, "saved")),
      el("td", { "data-label": "configuration" }, value(one, "configured")),
      el("td", { class: "tight full" }, el("button", { type: "button", "aria-label": `Remove what is saved for ${labelOf(one.key)}`, onclick: () => back([one.key]) }, "Remove")),
    ),
  );
  return [
    el("p", {}, "They are kept in ", el("code", {}, answer.saved_in), " and go before what ", configured, " says."),
    table("Table of settings saved on this page", ["Setting", "Saved here", "In the configuration", ""], rows),
    el(
      "div",
      { class: "actions" },
      el("a", { class: "button", href: at("/api/settings/export"), download: "bridged.toml" }, "Export as TOML"),
      button("Remove all", async () => {
        const yes = await confirmed("Remove all that is saved here?", `${saved.length} settings go back to what the configuration says, at once.`, "Remove all", { danger: true });
        if (yes) back(saved.map((one) => one.key));
      }, "danger"),
    ),
  ];
}

/** A new token, to be copied now or never. */
export function showOnce(title, text, token, copying) {
  const { closed } = dialog(title, (close) => [
    el("p", {}, text),
    el("div", { class: "inline" }, el("output", { class: "value", "aria-label": "Bearer token" }, token), copying),
    el("div", { class: "actions" }, button("I have it", () => close(), "primary")),
  ]);
  return closed;
}
