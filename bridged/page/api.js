// Talks to the daemon: questions, orders, and the stream that keeps the page live. Holds the session's token against forgery.

const session = { csrf: "", login_needed: false, logged_in: true, version: "" };
let loggedOut = () => {};

/** Where a path of the API is: beside the page, whatever a proxy has put before both. */
export const at = (path) => path.slice(1);

/** Called when the daemon wants a login, with true if a person has just logged out here. */
export function whenLoggedOut(what) {
  loggedOut = what;
}

/** A refusal, or no answer at all (status 0). */
export class Refused extends Error {
  constructor(status, message, hint = "", keys = {}) {
    super(message);
    this.status = status;
    this.hint = hint;
    this.keys = keys; // by setting: what is wrong with it
  }
}

/** Who we are to the daemon: {login_needed, logged_in, csrf, version}. */
export async function begin() {
  return Object.assign(session, await exchange("GET", "/api/session"));
}

/** Whether there is something to log out of. */
export const isLoginNeeded = () => session.login_needed;

/** Logs in. Raises Refused. */
export async function login(token) {
  return Object.assign(session, await exchange("POST", "/api/login", { token }));
}

/** Logs out, here and at the daemon. */
export async function logout() {
  await order("POST", "/api/logout", {});
  session.csrf = "";
  loggedOut(true);
}

/** A question, with a query of what is not empty. */
export function ask(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return exchange("GET", given.length ? `${path}?${new URLSearchParams(given)}` : path);
}

/** An order. A daemon that was restarted has other tokens against forgery: then it is repeated once with a new one. */
export async function order(method, path, body = {}) {
  try {
    return await exchange(method, path, body);
  } catch (error) {
    if (error.status !== 403) throw error;
    const before = session.csrf;
    await begin();
    if (session.csrf === before || !session.csrf) throw error;
    return exchange(method, path, body);
  }
}

/** A question whose answer holds an event: JSON as text, because JavaScript's numbers are none of 12345678901234567890 and 1.0. */
export const askText = (path) => exchange("GET", path, undefined, (response) => response.text());

async function exchange(method, path, body, read = (response) => response.json()) {
  const headers = { Accept: "application/json" };
  if (body !== undefined) Object.assign(headers, { "Content-Type": "application/json", "X-CSRF-Token": session.csrf });
  let response;
  try {
    response = await fetch(at(path), { method, headers, body: body === undefined ? undefined : JSON.stringify(body), credentials: "same-origin", cache: "no-store" });
  } catch {
    const then = method === "GET" ? "The page tries again by itself." : "It may have been done all the same: look before you try again.";
    throw new Refused(0, "the daemon doesn't answer", then);
  }
  if (response.ok) return read(response).catch(() => ({}));
  const answer = await response.json().catch(() => ({}));
  const refused = new Refused(response.status, answer.error || `the daemon answers ${response.status}`, answer.hint, answer.keys);
  if (response.status === 401 && path !== "/api/login") loggedOut();
  throw refused;
}

/**
 * The stream: `use(live)` about once a second, `lost(since, why)` when it has been silent, with the time of the last word and
 * what the daemon says of it. Gives a function that ends it.
 *
 * A browser has six connections for all its windows: one that nobody looks at leaves its own to the others.
 */
export function listen(use, lost) {
  let source = null;
  let heardAt = Date.now();
  let openedAt = heardAt;
  let why = "";
  let asked = false;

  const close = () => {
    source?.close();
    source = null;
  };
  const open = () => {
    close();
    source = new EventSource(at("/api/live"));
    source.addEventListener("status", (event) => {
      heardAt = Date.now();
      why = "";
      use(JSON.parse(event.data));
    });
  };
  const look = () => {
    if (document.hidden) close();
    else if (!source) {
      openedAt = Date.now();
      open();
    }
  };
  const watch = setInterval(async () => {
    if (!source) return;
    const silent = Date.now() - Math.max(heardAt, openedAt);
    if (silent > 4000 || (silent > 1500 && source.readyState !== EventSource.OPEN)) lost(heardAt / 1000, why);
    // A stream that was refused (a login is over, too many listeners) isn't opened again by the browser.
    if (source.readyState !== EventSource.CLOSED || asked) return;
    asked = true;
    try {
      const now = await begin();
      if (now.login_needed && !now.logged_in) loggedOut();
      else {
        why = await refusal();
        if (source) open();
      }
    } catch {
      // No answer: the next second asks again.
    }
    asked = false;
  }, 1000);
  document.addEventListener("visibilitychange", look);
  look();
  return () => {
    clearInterval(watch);
    document.removeEventListener("visibilitychange", look);
    close();
  };
}

/** Why there is no stream, which an EventSource doesn't tell; empty: there would be one. */
async function refusal() {
  const gone = new AbortController();
  const response = await fetch(at("/api/live"), { signal: gone.signal, cache: "no-store" });
  if (!response.ok) return (await response.json().catch(() => ({}))).error ?? "";
  gone.abort();
  return "";
}
