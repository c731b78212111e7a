// Talks to the daemon: questions, orders, and the stream that keeps the page live. Holds the session's token against forgery.

const session = { csrf: "", login_needed: false, logged_in: true, version: "" };
let loggedOut = () => {};

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

async function exchange(method, path, body) {
  const headers = { Accept: "application/json" };
  if (body !== undefined) Object.assign(headers, { "Content-Type": "application/json", "X-CSRF-Token": session.csrf });
  let response;
  try {
    response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), credentials: "same-origin", cache: "no-store" });
  } catch {
    throw new Refused(0, "the daemon doesn't answer", "The page tries again by itself; nothing was changed.");
  }
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  const refused = new Refused(response.status, answer.error || `the daemon answers ${response.status}`, answer.hint, answer.keys);
  if (response.status === 401 && path !== "/api/login") loggedOut();
  throw refused;
}

/** The stream: `use(live)` about once a second, `lost(since)` when it has been silent, with the time of the last word. Gives a function that ends it. */
export function listen(use, lost) {
  const source = new EventSource("/api/live");
  let heardAt = Date.now();
  const hear = (event) => {
    heardAt = Date.now();
    use(JSON.parse(event.data));
  };
  source.addEventListener("status", hear);
  let asked = false;
  const watch = setInterval(async () => {
    const silent = Date.now() - heardAt;
    if (silent > 4000 || (silent > 1500 && source.readyState !== EventSource.OPEN)) lost(heardAt / 1000);
    // A stream that was refused (a login is over, too many listeners) isn't opened again by the browser.
    if (source.readyState === EventSource.CLOSED && !asked) {
      asked = true;
      await begin().then((now) => (now.login_needed && !now.logged_in ? loggedOut() : restart()), () => {});
      asked = false;
    }
  }, 1000);
  let end = () => {
    clearInterval(watch);
    source.close();
  };
  const restart = () => {
    end();
    end = listen(use, lost);
  };
  return () => end();
}
