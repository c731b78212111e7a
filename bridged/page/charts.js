// The charts of the overview: uPlot, in the page's colours, told in words beside it for those who don't see it.

import { clock, duration, el, fill, number, say, short } from "./dom.js";

const HEIGHT = 150;
const SHORTEST_S = 300; // of the time that is shown, so that the first minutes aren't a cliff

/** What is drawn. `columns`: names in the history; `figure`: how a value is written. */
const CHARTS = [
  { title: "Events per second", columns: [["accepted", "accepted_per_s"], ["delivered", "delivered_per_s"]], axis: short, figure: (v) => number(v) },
  { title: "Waiting", columns: [["waiting", "waiting"]], axis: short, figure: (v) => number(v), area: true },
  { title: "Latency of a request", columns: [["latency", "latency_s"]], axis: duration, figure: duration },
  { title: "Answers 429, “slow down”", columns: [["answers 429", "rate_limited"]], axis: short, figure: (v) => number(v), bars: true, total: true },
];

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The charts, over the columns of /api/history. `use(history)` draws; `end()` lets go. */
export function charts() {
  const parts = CHARTS.map((chart) => {
    const words = el("span", { class: "words" });
    const canvas = el("div", { class: "chart", role: "img", "aria-label": chart.title });
    const keys = chart.columns.length > 1 && chart.columns.map(([label], index) => el("span", {}, el("i", { class: index ? "key accent" : "key" }), label));
    return { chart, words, canvas, plot: null, figure: el("figure", {}, el("figcaption", {}, el("strong", {}, chart.title), keys, words), canvas) };
  });
  const element = el("div", { class: "charts" }, parts.map((part) => part.figure));
  let last = null;

  function use(history) {
    last = history;
    for (const part of parts) draw(part, history);
  }

  function redraw() {
    for (const part of parts) {
      part.plot?.destroy();
      part.plot = null;
    }
    if (last) use(last);
  }

  const sizes = new ResizeObserver(() => {
    for (const part of parts) part.plot?.setSize({ width: part.canvas.clientWidth, height: HEIGHT });
  });
  sizes.observe(element);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", redraw);
  return {
    element,
    use,
    redraw,
    end() {
      sizes.disconnect();
      dark.removeEventListener("change", redraw);
      for (const part of parts) part.plot?.destroy();
    },
  };
}

function draw(part, history) {
  const { chart, canvas, words } = part;
  const data = [history.at, ...chart.columns.map(([, name]) => history[name])];
  if (history.at.length < 2) {
    part.plot?.destroy();
    part.plot = null;
    fill(canvas, el("p", { class: "empty" }, "Drawn when there is a minute to show."));
    return;
  }
  describe(part, history);
  if (part.plot) {
    part.plot.setData(data);
    return;
  }
  fill(canvas);
  part.plot = new uPlot(options(chart, canvas.clientWidth || 400, words, () => describe(part, part.history)), data, canvas);
}

function describe(part, history) {
  part.history = history;
  const told = part.chart.columns.map(([label, name]) => inWords(part.chart, label, history[name])).join("; ");
  say(part.words, told);
  part.canvas.setAttribute("aria-label", `${part.chart.title}: ${told}`);
}

function inWords(chart, label, values) {
  const known = values.filter((value) => value !== null && value !== undefined);
  const lead = chart.columns.length > 1 ? `${label} ` : "";
  if (!known.length) return `${lead}none yet`;
  if (chart.total) return `${number(known.reduce((sum, value) => sum + value, 0))} in all`;
  return `${lead}${chart.figure(known.at(-1))}, at most ${chart.figure(Math.max(...known))}`;
}

function options(chart, width, words, rest) {
  const axis = { stroke: color("--muted"), grid: { stroke: color("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  const lines = chart.columns.map(([label], index) => {
    const stroke = index === chart.columns.length - 1 ? color("--accent") : color("--muted");
    return {
      label,
      stroke,
      width: 1.5,
      fill: chart.area || chart.bars ? color("--accent-soft") : undefined,
      paths: chart.bars ? uPlot.paths.bars({ size: [0.8, 12] }) : undefined,
      points: { show: false },
    };
  });
  // Answers are counted, and a rate below one is told as such.
  const whole = chart.bars ? [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000, 100_000] : undefined;
  return {
    width,
    height: HEIGHT,
    padding: [8, 20, 0, 0],
    cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 } },
    legend: { show: false },
    scales: { x: { range: (plot, first, last) => [Math.min(first, last - SHORTEST_S), last] }, y: { range: (_plot, _low, high) => [0, high > 0 ? high * 1.1 : 1] } },
    axes: [
      { ...axis, values: (_plot, ticks, _axis, _space, step) => ticks.map((at) => (step < 60 ? clock(at).slice(-8) : clock(at).slice(-8, -3))), space: 64, size: 28 },
      { ...axis, values: (_plot, ticks) => ticks.map(chart.axis), size: 56, space: 32, incrs: whole },
    ],
    series: [{}, ...lines],
    hooks: {
      setCursor: [
        (plot) => {
          const index = plot.cursor.idx;
          if (index === null || index === undefined || plot.cursor.left < 0) return rest();
          const values = chart.columns.map(([label, _], column) => {
            const value = plot.data[column + 1][index];
            return `${label} ${value === null || value === undefined ? "–" : chart.figure(value)}`;
          });
          return say(words, `${clock(plot.data[0][index])}: ${values.join(", ")}`);
        },
      ],
    },
  };
}
