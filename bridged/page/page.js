// The page: session, stream and views. A view is {title, open(main, context)}, which gives {use(live), changed(what), end()}, all optional.

import * as activity from "./activity.js";
import * as api from "./api.js";
import * as cohorts from "./cohorts.js";
import * as connection from "./connection.js";
import * as deadLetters from "./dead_letters.js";
import { attempt, button, clock, el, field, fill, newId, number, problemText, say, short } from "./dom.js";
import * as events from "./events.js";
import * as overview from "./overview.js";

const VIEWS = { "": overview, connection, events, "dead-letters": deadLetters, cohorts, activity };

const main = document.getElementById("main");
const nav = document.getElementById("views");
const chip = document.getElementById("state");
const lostNotice = document.getElementById("lost");
const leave = document.getElementById("leave");

let open = null; // the view that is shown
let openedName = null;
let last = null; // what the stream last said
let stopListening = null;

// -- what every view says of the whole --------------------------------------------------------------------------------

const KINDS = { idle: "good", delivering: "good", "backing off": "warn", "not set up": "warn", capped: "warn", halted: "bad", stalled: "bad", refusing: "bad" };

/** good | warn | bad: how a state is to be seen. */
const kindOf = (state) => KINDS[state] ?? "warn";

const links = Object.fromEntries(
  Object.entries(VIEWS).map(([name, view]) => [name, el("a", { href: `#/${name}` }, view.title)]),
);
const tally = el("span", { class: "tally", hidden: true });
links["dead-letters"].append(" ", tally);
nav.append(...Object.values(links));

function useLive(live) {
  const before = last;
  last = live;
  const { status } = live;
  if (lostNotice.childElementCount) {
    fill(lostNotice);
    speak("The daemon answers again.");
  }
  chip.hidden = false;
  chip.className = `state ${kindOf(status.state)}`;
  say(chip, status.state.charAt(0).toUpperCase() + status.state.slice(1));
  tally.hidden = !status.dead_letters.kept;
  say(tally, short(status.dead_letters.kept));
  tally.title = `${number(status.dead_letters.kept)} dead letters`;
  if (!before) nav.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
  // Aloud only when it is another state: the figures change every second.
  if (before?.status.state !== status.state) speak(overview.headline(status));
  open?.use?.(live);
  if (before) {
    for (const what of ["settings_revision", "activity_id", "cohorts_revision"]) {
      if (before[what] !== live[what]) open?.changed?.(what, live);
    }
  }
}

function lost(since, why) {
  if (lostNotice.childElementCount && lostNotice.dataset.why === why) return;
  lostNotice.dataset.why = why;
  chip.className = "state";
  say(chip, "No answer");
  const said = why ? `The daemon tells this window nothing: ${why}.` : "The daemon doesn't answer.";
  fill(lostNotice, el("p", {}, el("strong", {}, said), ` What you see is from ${clock(since)}. The page goes on by itself as soon as it is back.`));
}

function speak(text) {
  say(document.getElementById("spoken"), text);
}

// -- views ------------------------------------------------------------------------------------------------------------

const context = {
  live: () => last,
  kindOf,
};

function show() {
  const [name, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const known = name in VIEWS ? name : "";
  const moved = openedName !== null && openedName !== known;
  closeDialogs();
  open?.end?.();
  open = null;
  openedName = known;
  for (const [key, link] of Object.entries(links)) {
    if (key === known) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  links[known].scrollIntoView({ block: "nearest", inline: "center" });
  document.title = `${VIEWS[known].title} – bridged`;
  fill(main);
  open = VIEWS[known].open(main, { ...context, query: new URLSearchParams(query) });
  if (last) open.use?.(last);
  if (moved) {
    // Who can't see that the view is another one hears it, and goes on from its head.
    main.querySelector("h1")?.setAttribute("tabindex", "-1");
    main.querySelector("h1")?.focus();
    scrollTo(0, 0);
  }
}

function start() {
  nav.hidden = false;
  leave.hidden = !api.isLoginNeeded();
  stopListening?.();
  stopListening = api.listen(useLive, lost);
  openedName = null;
  show();
}

/** What was asked belongs to the view that is left. */
function closeDialogs() {
  for (const one of document.querySelectorAll("dialog[open]")) one.close();
}

/** The login, with a word why. */
function gate(why) {
  closeDialogs();
  stopListening?.();
  stopListening = null;
  open?.end?.();
  open = null;
  last = null;
  nav.hidden = true;
  leave.hidden = true;
  chip.hidden = true;
  fill(lostNotice);
  document.title = "Log in – bridged";
  const token = el("input", { type: "password", autocomplete: "current-password", required: true });
  const problem = el("p", { class: "callout bad", role: "alert", hidden: true });
  const id = newId("login");
  const send = el("button", { type: "submit", class: "primary" }, "Log in");
  const form = el(
    "form",
    {
      onsubmit: async (event) => {
        event.preventDefault();
        problem.hidden = true;
        await attempt(send, async () => {
          try {
            await api.login(token.value);
          } catch (error) {
            problem.hidden = false;
            say(problem, problemText(error));
            token.select();
            return;
          }
          start();
        });
      },
    },
    field("Admin token", token, "The value of token in [admin] of the configuration."),
    problem,
    send,
  );
  fill(main, el("div", { class: "gate" }, el("section", { "aria-labelledby": id }, el("h1", { id }, "Log in"), el("p", {}, why), form)));
  token.focus();
}

leave.addEventListener("click", () => attempt(leave, api.logout));
/** Who has logged in in another window is let in here, too, when they look at this one. */
async function lookAgain() {
  if (!nav.hidden || document.hidden || !api.isLoginNeeded()) return;
  const now = await api.begin().catch(() => null);
  if (nav.hidden && now && (now.logged_in || !now.login_needed)) start();
}

addEventListener("focus", lookAgain);
document.addEventListener("visibilitychange", lookAgain);
addEventListener("hashchange", () => nav.hidden || show());
document.querySelector(".skip").addEventListener("click", (event) => {
  // The hash is the view's.
  event.preventDefault();
  main.focus();
});

async function begin() {
  try {
    const session = await api.begin();
    api.whenLoggedOut((asked) => nav.hidden || gate(asked ? "You are logged out." : "Your session has ended: it lasts for 12 hours, or until the daemon restarts."));
    if (session.login_needed && !session.logged_in) gate("This daemon asks who you are.");
    else start();
  } catch (error) {
    fill(main, el("h1", {}, "The daemon doesn't answer"), el("p", {}, problemText(error)), button("Try again", begin, "primary"));
  }
}

begin();
