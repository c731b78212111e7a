// Elements, figures and questions: what every view builds with. All text goes in as text.

/** An element. `attributes`: `class`, `on<event>` functions, properties of inputs, else attributes; false and null are left out. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "indeterminate") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Replaces what is in an element. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Sets a text where it has changed, so that nothing is selected or read anew in vain. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

let ids = 0;
/** An id that no other element has. */
export const newId = (stem) => `${stem}-${++ids}`;

// -- figures ----------------------------------------------------------------------------------------------------------

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

/** 1240113 -> "1,240,113". */
export const number = (value) => WHOLE.format(value);

/** 1240113 -> "1.2M", for axes and small places. */
export const short = (value) => SHORT.format(value);

/** "1 event", "2,000 events". */
export const count = (value, one, many = `${one}s`) => `${number(value)} ${value === 1 ? one : many}`;

/** Of the whole, e.g. "12 %"; never "0 %" or "100 %" of what is neither. */
export function share(part, whole) {
  if (!whole) return "0 %";
  const percent = (100 * part) / whole;
  if (part > 0 && percent < 0.1) return "< 0.1 %";
  if (part < whole && percent > 99.9) return "> 99.9 %";
  // Nearly all is not all.
  if (part < whole && percent > 99) return `${(Math.floor(percent * 10) / 10).toFixed(1)} %`;
  return `${percent < 10 ? percent.toFixed(1).replace(/\.0$/, "") : Math.round(percent)} %`;
}

/** 1536 -> "1.5 KiB". */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (value >= 1024 && power < units.length - 1) {
    value /= 1024;
    power += 1;
  }
  return `${value < 10 && power ? value.toFixed(1) : Math.round(value)} ${units[power]}`;
}

/** Seconds for people: "0.4 s", "12 s", "3 min", "2 h 5 min", "3 d 4 h". */
export function duration(seconds) {
  if (seconds < 1) return seconds < 0.001 ? "0 s" : `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1).replace(/\.0$/, "")} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 72) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return hours % 24 ? `${Math.floor(hours / 24)} d ${hours % 24} h` : `${Math.floor(hours / 24)} d`;
}

const pad = (value) => String(value).padStart(2, "0");

/** Wall clock seconds as "14:02:11" today, else "2026-01-31 14:02:11", in this browser's time zone. */
export function clock(at) {
  const date = new Date(at * 1000);
  const time = `${pad(date.getHours())}:${pad(date.getMinutes())}:${pad(date.getSeconds())}`;
  return date.toDateString() === new Date().toDateString() ? time : `${day(date)} ${time}`;
}

const day = (date) => `${date.getFullYear()}-${pad(date.getMonth() + 1)}-${pad(date.getDate())}`;

/** A moment as an element that says both: when, and exactly when. */
export const moment = (at) => el("time", { datetime: new Date(at * 1000).toISOString(), title: new Date(at * 1000).toString() }, clock(at));

/** A text in which what stands between backticks is code, as the daemon's texts have it. */
export const prose = (text) => text.split("`").map((part, index) => (index % 2 ? el("code", {}, part) : part));

/** JSON to be read: two spaces, and what isn't JSON as it is. */
export const pretty = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));

// -- parts ------------------------------------------------------------------------------------------------------------

/** A section with its heading. */
export function section(title, ...children) {
  const id = newId("section");
  return el("section", { "aria-labelledby": id }, el("h2", { id }, title), children);
}

/** A button. `kind`: primary, danger, quiet, or none. */
export const button = (text, onclick, kind = "") => el("button", { type: "button", class: kind, onclick }, text);

/** A label over a control, with a hint and, later, a problem under it. */
export function field(label, control, hint = "") {
  control.id ||= newId("field");
  const hintId = `${control.id}-hint`;
  if (hint) control.setAttribute("aria-describedby", hintId);
  return el("div", { class: "field" }, el("label", { for: control.id }, label), control, hint && el("p", { class: "hint", id: hintId }, hint));
}

/** A table that scrolls by itself where the screen is too narrow for it. `columns`: a text, [text, class] or an element each. */
export function table(label, columns, rows, kind = "cards") {
  const head = columns.map((column) => {
    if (column instanceof Element) return column;
    const [text, side] = Array.isArray(column) ? column : [column, null];
    // A column of buttons has nothing to be called.
    return text ? el("th", { scope: "col", class: side }, text) : el("td", {});
  });
  const body = rows instanceof Element ? rows : el("tbody", {}, rows);
  return el("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": label }, el("table", { class: kind }, el("thead", {}, el("tr", {}, head)), body));
}

/** Says something in passing, aloud too. Problems stay until they are dismissed. */
export function toast(text, problem = false) {
  // What is outside of an open dialog is neither heard nor clicked.
  const box = document.querySelector("dialog[open] .toasts") ?? document.getElementById("toasts");
  const dismiss = () => one.remove();
  const one = el("div", { class: problem ? "toast problem" : "toast" }, el("p", {}, text), button("Dismiss", dismiss, "quiet"));
  box.append(one);
  if (!problem) setTimeout(dismiss, 8000);
  while (box.children.length > 3) box.firstChild.remove();
}

/** What went wrong, for a person: what happened, and what to do. */
export const problemText = (error) => (error.hint ? `${sentence(error.message)} ${sentence(error.hint)}` : sentence(error.message));

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

/** Does what a button asks for: the button rests meanwhile, and what goes wrong is said. Gives what `work` gave, or undefined. */
export async function attempt(control, work) {
  if (control.getAttribute("aria-disabled") === "true") return undefined;
  // Not `disabled`: that would throw the focus away.
  control.setAttribute("aria-disabled", "true");
  try {
    return await work();
  } catch (error) {
    toast(problemText(error), true);
    return undefined;
  } finally {
    control.removeAttribute("aria-disabled");
  }
}

/** A dialog with a title. It traps the focus, closes at Escape, and gives the focus back. `build(close)` gives its content. */
export function dialog(title, build, { wide = false } = {}) {
  const before = document.activeElement;
  const id = newId("dialog");
  const box = el("dialog", { "aria-labelledby": id, class: wide ? "wide" : null });
  const closed = new Promise((resolve) => {
    box.addEventListener("close", () => {
      // What was just said stays to be read.
      const said = box.querySelectorAll(".toast");
      box.remove();
      (document.querySelector("dialog[open] .toasts") ?? document.getElementById("toasts")).append(...said);
      if (before?.isConnected) before.focus();
      resolve(box.returnValue);
    });
  });
  const close = (answer = "") => box.close(answer);
  const heading = el("h2", { id, tabindex: "-1" }, title);
  box.append(
    el("div", { class: "head" }, heading, button("Close", () => close(), "quiet")),
    ...[build(close)].flat(Infinity).filter(Boolean),
    el("div", { class: "toasts", role: "status", "aria-live": "polite" }),
  );
  document.body.append(box);
  box.returnValue = "";
  box.showModal();
  heading.focus();
  return { box, closed, close };
}

/** Asks before something that can't be taken back. True when the answer is yes. */
export async function confirmed(title, text, yes, { danger = false } = {}) {
  const { closed } = dialog(title, (close) => [
    el("p", {}, text),
    el("div", { class: "actions" }, button(yes, () => close("yes"), danger ? "danger" : "primary"), button("Cancel", () => close())),
  ]);
  return (await closed) === "yes";
}

/** A button that puts a text into the clipboard. */
export function copyButton(what, text) {
  return el("button", { type: "button", "aria-label": `Copy ${what}`, onclick: () => copy(what, text()) }, "Copy");
}

async function copy(what, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Over plain HTTP from another machine there is no clipboard for pages, but the old way.
    const area = el("textarea", { class: "unseen", value: text, "aria-hidden": "true" });
    const holder = document.querySelector("dialog[open]") ?? document.body;
    holder.append(area);
    const before = document.activeElement;
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    before?.focus();
    if (!done) return toast(`The browser doesn't let the page copy: select ${what} and copy it by hand.`, true);
  }
  return toast(`Copied ${what}.`);
}
