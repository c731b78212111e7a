// Connection: Mixpanel's credentials, what to paste into Braze, and what was saved here.

import { ask, order } from "./api.js";
import { attempt, button, confirmed, copyButton, duration, el, field, fill, newId, problemText, prose, say, section, toast } from "./dom.js";
import { changes, complain, control, demandSeen, overrides, Settings, showOnce, tellOvertaken, tellSaved } from "./settings.js";

export const title = "Connection";

// Which credential: what it is called, what it needs. What it doesn't need is emptied when it is saved.
const CREDENTIALS = {
  "service account": {
    label: "Service account",
    hint: "Preferred. In Mixpanel: Settings > Project settings > Service accounts, with the role Admin or Owner.",
    keys: ["mixpanel.service_account", "mixpanel.service_secret", "mixpanel.project_id"],
  },
  "API secret": { label: "API secret", hint: "Settings > Project settings > Access keys. Mixpanel retires it on 2027-03-03.", keys: ["mixpanel.api_secret"] },
  "project token": { label: "The project token alone", hint: "Works where the project allows it, without a secret.", keys: [] },
};
const ALWAYS = ["mixpanel.token", "mixpanel.region", "mixpanel.naming"];
const MORE = {
  Address: ["mixpanel.url", "mixpanel.partner_id"],
  Retention: ["retention.max_age", "retention.on_expiry"],
  Delivery: ["delivery.max_events_per_second", "delivery.max_bytes_per_minute", "delivery.max_concurrency", "delivery.flush_interval", "delivery.timeout", "delivery.probe_interval"],
  Alarms: ["alerts.webhook_url", "alerts.webhook_token", "alerts.spool_share", "alerts.undelivered"],
};
/** What a test finds, in a few words. */
const PROBLEMS = {
  credential: "Mixpanel refuses the credential",
  project: "It belongs to another project",
  region: "The project lives in another region",
  network: "Mixpanel can’t be reached",
  clock: "This machine’s clock is wrong",
  busy: "Mixpanel is busy, and says nothing of the credential",
  upstream: "Mixpanel has a problem of its own",
  settings: "What was entered can’t be used",
};
const PUBLIC_NAME = "bridged.public-name"; // in this browser: only the address that is shown depends on it

/** Opens the view. */
export function open(main) {
  const settings = new Settings();
  const controls = new Map();
  const at = (key) => {
    if (!controls.has(key)) controls.set(key, control(key, (one) => back([one])));
    return controls.get(key);
  };
  const mixpanel = mixpanelForm(at, settings, reload);
  const braze = brazeBox(settings, reload);
  const saved = el("div", {});
  const warnings = el("div", {});
  const problem = el("div", {});
  const more = moreForm(at, settings, reload);

  const body = el("div", { hidden: true }, el("div", { class: "pair" }, mixpanel.element, el("div", {}, braze.element, section("Keep it connected", warnings))), section("Other settings", more), section("Settings saved on this page", saved));

  fill(
    main,
    el("div", { class: "view-head" }, el("div", {}, el("h1", {}, title), el("p", {}, "Braze on one side, Mixpanel on the other."))),
    problem,
    body,
  );

  async function reload() {
    try {
      const [connection] = await Promise.all([ask("/api/connection"), settings.load()]);
      for (const one of controls.values()) one.use(settings.byKey.get(one.key));
      body.hidden = false;
      mixpanel.use(connection);
      braze.use(connection);
      // What is to be known of the export is of no use where there is none.
      warnings.parentElement.hidden = !connection.export;
      fill(warnings, keep(connection));
      fill(saved, overrides(settings, back));
      fill(problem, settings.answer.problem && el("div", { class: "callout bad" }, el("p", {}, settings.answer.problem)), settings.answer.restart_needed.length > 0 && el("div", { class: "callout warn" }, el("p", {}, `A restart is needed for ${settings.answer.restart_needed.join(", ")}.`)));
    } catch (error) {
      fill(problem, el("div", { class: "callout bad" }, el("p", {}, problemText(error)), button("Try again", reload)));
    }
  }

  async function back(keys) {
    try {
      const answer = await settings.save({}, keys);
      for (const key of keys) controls.get(key)?.forget();
      tellSaved(answer);
    } catch (error) {
      toast(problemText(error), true);
    }
    await reload();
  }

  reload();
  return {
    changed(what) {
      if (what === "settings_revision") reload();
    },
  };
}

/** The warnings of the connector's documentation, and what bridged does otherwise. */
function keep(connection) {
  const expires = connection.expires_after_s;
  const ends = { archive: "are moved into an archive, from which they can be sent later", drop: "are deleted for good", keep: "are kept" };
  const after = expires === null || connection.on_expiry === "keep" ? "Events never expire here: they wait until the credential works again." : `Events that have waited ${duration(expires)} then ${ends[connection.on_expiry] ?? connection.on_expiry}.`;
  return [
    el("ul", {},
      el("li", {}, el("strong", {}, "Keep the secret current."), " When Mixpanel refuses the credential, nothing is sent until you renew it here. Events are still taken from Braze and kept on disk."),
      el("li", {}, el("strong", {}, "What happens after 48 hours."), ` Braze’s hosted connector deletes what it couldn’t deliver for 48 hours. ${after}`),
      // Who uses one reads it below, as a warning.
      connection.credential !== "API secret" && el("li", {}, el("strong", {}, "The API secret’s end."), ` Mixpanel retires API secrets on ${connection.api_secret_retired}. Use a service account before then.`)),
    connection.warnings.map((text) => el("div", { class: "callout warn" }, el("p", {}, prose(text)))),
  ];
}

// -- Mixpanel ---------------------------------------------------------------------------------------------------------

function mixpanelForm(at, settings, reload) {
  const group = newId("credential");
  const radios = new Map();
  let kind = null; // chosen
  let inForce = null;
  const parts = Object.entries(CREDENTIALS).map(([name, { label, hint, keys }]) => {
    const id = newId("kind");
    const radio = el("input", { type: "radio", name: group, id, value: name, "aria-describedby": `${id}-hint`, onchange: () => choose(name) });
    radios.set(name, radio);
    const box = el("div", { class: "nested" }, keys.map((key) => at(key).element));
    return { name, box, choice: el("div", { class: "choice" }, radio, el("div", {}, el("label", { for: id }, label), el("p", { class: "hint", id: `${id}-hint` }, hint))) };
  });
  const result = el("div", { role: "status", "aria-live": "polite" });
  const summary = el("p", {});

  function choose(name) {
    kind = name;
    radios.get(name).checked = true;
    for (const part of parts) part.box.hidden = part.name !== name;
  }

  const wanted = () => [...ALWAYS, ...CREDENTIALS[kind].keys].map(at);

  /** What differs from what is in force, and what the chosen credential has no use for. */
  function different() {
    const found = changes(wanted());
    if (kind !== inForce) {
      for (const [name, { keys }] of Object.entries(CREDENTIALS)) {
        if (name !== kind) for (const key of keys) if (at(key).isSet()) found[key] = "";
      }
    }
    return found;
  }

  /** Whether the chosen credential has all its parts; complains of those that are missing. What isn't begun may be saved as it is. */
  function isWhole(mayBeNone) {
    const parts = (kind === "project token" ? ["mixpanel.token"] : CREDENTIALS[kind].keys).map(at);
    for (const one of wanted()) one.complain("");
    const missing = parts.filter((one) => !one.isGiven());
    if (!missing.length || (mayBeNone && kind === (inForce ?? kind) && missing.length === parts.length)) return true;
    for (const one of missing) one.complain("Needed for this credential.");
    missing[0].focus();
    return false;
  }

  const test = button("Test connection", () =>
    attempt(test, async () => {
      fill(result);
      if (!isWhole(false)) return;
      fill(result, el("p", { class: "hint" }, "Asking Mixpanel …"));
      try {
        const members = Object.entries(different()).map(([key, value]) => [key.replace("mixpanel.", ""), value]);
        const answer = await order("POST", "/api/test-connection", { mixpanel: Object.fromEntries(members.filter(([key]) => key !== "naming")) });
        fill(result, verdict(answer));
      } catch (error) {
        fill(result);
        complain(wanted(), error);
      }
    }),
  );

  function verdict(answer) {
    const use = answer.region && answer.problem === "region" && button(`Use ${answer.region.toUpperCase()}`, () => {
      at("mixpanel.region").set(answer.region);
      at("mixpanel.region").focus();
      fill(result);
    });
    const skew = answer.clock_skew_s !== null && Math.abs(answer.clock_skew_s) > 60 && el("p", {}, `This machine’s clock differs from Mixpanel’s by ${duration(Math.abs(answer.clock_skew_s))}.`);
    return el(
      "div",
      { class: `callout ${answer.ok ? "good" : "bad"}` },
      el("p", {}, el("strong", {}, answer.ok ? "It works. " : `${PROBLEMS[answer.problem] ?? "It doesn’t work"}. `), answer.hint ? prose(answer.hint.charAt(0).toUpperCase() + answer.hint.slice(1)) : ""),
      el("p", { class: "hint" }, prose(answer.text)),
      skew,
      use && el("div", { class: "actions" }, use),
    );
  }

  const save = el("button", { type: "submit", class: "primary" }, "Save");
  const form = el(
    "form",
    {
      novalidate: true,
      onsubmit: (event) => {
        event.preventDefault();
        attempt(save, async () => {
          if (!isWhole(true)) return;
          let problem = null;
          try {
            demandSeen(wanted());
            const answer = await settings.save(different());
            for (const one of wanted()) one.forget();
            inForce = null;
            fill(result);
            tellSaved(answer);
          } catch (error) {
            problem = error;
          }
          await reload();
          if (problem) {
            tellOvertaken(problem, wanted());
            complain(wanted(), problem);
          }
        });
      },
    },
    at("mixpanel.token").element,
    el("fieldset", {}, el("legend", {}, "Credential"), parts.map((part) => [part.choice, part.box])),
    at("mixpanel.region").element,
    at("mixpanel.naming").element,
    result,
    el("div", { class: "actions" }, save, test, el("p", { class: "hint" }, "Saved without a restart; nothing is lost.")),
  );
  return {
    element: section("Mixpanel", summary, form),
    use(connection) {
      const given = connection.credential === "none" ? "service account" : connection.credential;
      if (!connection.export) say(summary, "No events are exported: mixpanel.export is false. What is saved here has no effect until it is true in the configuration, and the daemon is restarted.");
      else say(summary, connection.credential === "none" ? "Not connected yet." : `Events go to ${connection.import_host}, with the ${connection.credential}. What you enter is never sent back to this page.`);
      // A choice that isn't saved yet stays.
      if (kind === null || inForce === null || kind === inForce) choose(given);
      inForce = given;
    },
  };
}

// -- Braze ------------------------------------------------------------------------------------------------------------

function brazeBox(settings, reload) {
  const address = el("output", { class: "value" });
  const name = el("input", { type: "text", placeholder: "currents.example.com", spellcheck: "false", autocapitalize: "none", autocomplete: "off", value: remembered() });
  const reach = el("div", {});
  const token = el("p", {});
  let known = null;
  const fresh = button("Make a token", () => attempt(fresh, make));
  const show = () => {
    if (!known) return;
    const told = addressOf(known, name.value.trim());
    say(address, told.text);
    fill(reach, told.warning && el("div", { class: "callout warn" }, el("p", {}, told.warning)));
  };
  name.addEventListener("input", () => {
    remember(name.value.trim());
    show();
  });

  async function make() {
    if (known.bearer_token_set && !(await confirmed("Make a new token?", "Braze’s events are refused (401) from now on until it is given the new one, and what is refused so it may not send again. Have Braze’s page open first.", "Make a new token", { danger: true }))) return;
    const random = crypto.getRandomValues(new Uint8Array(24));
    const value = [...random].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    await settings.save({ "sources.http.bearer_token": value });
    await reload();
    await showOnce("The new bearer token", "Paste it into Braze now: it is saved, and never shown again.", value, copyButton("bearer token", () => value));
  }

  const off = el("p", { hidden: true }, "Braze’s events aren’t taken here, only Mixpanel’s cohorts: ", el("code", {}, "mixpanel.export"), " is false in the configuration, and Braze would be answered 503.");
  const paste = el(
    "div",
    {},
    el("p", {}, "In Braze: Partner Integrations > Data Export > Create New Currents Export > Custom Currents Export. Paste these two, tick the events, Send Test Events, Launch."),
    field("Public name of this machine, or of the proxy before it", name, "Only to spell the address below; remembered in this browser."),
    el("div", { class: "field" }, el("h3", {}, "Endpoint URL"), el("div", { class: "inline" }, address, copyButton("endpoint URL", () => address.textContent))),
    reach,
    el("div", { class: "field" }, el("h3", {}, "Bearer token"), token, fresh),
  );
  return {
    element: section("Braze", off, paste),
    use(connection) {
      known = connection;
      off.hidden = connection.export;
      paste.hidden = !connection.export;
      show();
      say(token, connection.bearer_token_set ? "Set. It is never shown: if it is lost, make a new one." : "None yet.");
      say(fresh, connection.bearer_token_set ? "Make a new token" : "Make a token");
    },
  };
}

function addressOf(connection, publicName) {
  if (publicName) {
    const host = publicName.replace(/^https?:\/\//, "").replace(/\/.*$/, "");
    return { text: `https://${host}${connection.path}`, warning: "" };
  }
  if (!connection.http_listen) return { text: "The HTTP door is closed", warning: "Set listen in [sources.http] of the configuration, and restart." };
  const port = connection.http_listen.slice(connection.http_listen.lastIndexOf(":") + 1);
  const host = connection.http_listen.slice(0, -port.length - 1);
  const any = ["0.0.0.0", "[::]", "::", "*", ""].includes(host);
  const text = `${connection.https ? "https" : "http"}://${any ? location.hostname : host}:${port}${connection.path}`;
  const local = /^(127\.|localhost$|\[?::1)/.test(any ? location.hostname : host);
  if (local) return { text, warning: "Only this machine reaches this address. Let a proxy with HTTPS (Caddy, nginx) lead there, and enter its name above." };
  return { text, warning: connection.https ? "" : "Braze demands HTTPS: let a proxy lead there, or set tls_cert and tls_key in [sources.http]." };
}

function remembered() {
  try {
    return localStorage.getItem(PUBLIC_NAME) ?? "";
  } catch {
    return "";
  }
}

function remember(name) {
  try {
    localStorage.setItem(PUBLIC_NAME, name);
  } catch {
    // A browser that keeps nothing still shows it.
  }
}

// -- the rest ---------------------------------------------------------------------------------------------------------

function moreForm(at, settings, reload) {
  const controls = Object.values(MORE).flat().map(at);
  const save = el("button", { type: "submit", class: "primary" }, "Save these");
  const form = el(
    "form",
    {
      novalidate: true,
      onsubmit: (event) => {
        event.preventDefault();
        attempt(save, async () => {
          let problem = null;
          try {
            demandSeen(controls);
            const answer = await settings.save(changes(controls));
            for (const one of controls) one.forget();
            tellSaved(answer);
          } catch (error) {
            problem = error;
          }
          await reload();
          if (!problem) return;
          tellOvertaken(problem, controls);
          if (!problem.keys) throw problem;
          complain(controls, problem);
        });
      },
    },
    el("div", { class: "columns" }, Object.entries(MORE).map(([name, keys]) => el("fieldset", {}, el("legend", {}, name), keys.map((key) => at(key).element)))),
    el("div", { class: "actions" }, save),
  );
  return el("details", {}, el("summary", {}, "Address, retention, pace and alarms"), form);
}
