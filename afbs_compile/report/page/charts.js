const W = 480, LEFT = 52, RIGHT = 24;
const STAGES = ["explore", "refine", "validate"];

/** A linear axis: [low, high] of values onto [from, to] of pixels. */
const scale = (low, high, from, to) => (x) => from + ((x - low) / (high - low || 1)) * (to - from);

function ticks(low, high, count = 4) {
  const raw = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 5, 10].map((f) => f * unit).find((step) => step >= raw);
  const found = [];
  for (let x = Math.ceil(low / size - 1e-9) * size; x <= high + size * 1e-6; x += size) found.push(x);
  return found;
}

/** Frame, grid, tick labels and axis titles of a plot whose inner area is [LEFT, W - RIGHT] x [top, bottom]. */
function frame(drawing, { x, y, xTicks, yTicks, top, bottom, xName, yName, xFormat = short, yFormat = short }) {
  for (const value of yTicks)
    drawing.append(svg("line", { class: "gridline", x1: LEFT, x2: W - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, yFormat(value)));
  for (const value of xTicks) drawing.append(svg("text", { x: x(value), y: bottom + 15, "text-anchor": "middle" }, xFormat(value)));
  drawing.append(svg("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: bottom, y2: bottom }),
    svg("text", { x: W - RIGHT, y: bottom + 30, "text-anchor": "end" }, xName), svg("text", { x: 4, y: top - 8 }, yName));
}

/** A mark per stage, told apart by shape as well as by colour. */
function mark(stage, x, y, text) {
  const title = svg("title", {}, text);
  if (stage === "explore") return svg("circle", { class: stage, cx: x, cy: y, r: 3.4 }, title);
  const points = stage === "refine" ? `${x},${y - 4.5} ${x + 4.5},${y} ${x},${y + 4.5} ${x - 4.5},${y}`
    : `${x},${y - 4.5} ${x + 4.5},${y + 3.5} ${x - 4.5},${y + 3.5}`;
  return svg("polygon", { class: stage, points }, title);
}

function stageLegend(steps) {
  const used = STAGES.filter((stage) => steps.some((step) => step.stage === stage));
  return el("div", { class: "legend" }, ...used.map((stage) =>
    el("span", {}, svg("svg", { width: 14, height: 12, "aria-hidden": "true" }, mark(stage, 6, 7, stage)), " ", stage)));
}

/** Everything the search tried on a head, one object each, in order. */
function stepsOf(head) {
  return head.search.flatMap((path) => path.tau.map((tau, i) => ({
    stage: path.stage, length: path.length, policy: path.policy, block: path.shape.slice(0, 2).join("x"),
    s: path.s.length ? path.s[i] : null, tau, theta: path.theta[i], lam: path.lam[i],
    sparsity: path.sparsity[i], error: path.error[i] < 0 ? null : path.error[i],
  })));
}

function stepText(step, number) {
  const error = step.error === null ? "not finite" : step.error.toFixed(4);
  const s = step.s === null ? "" : `s ${short(step.s)}, `;
  const theta = step.theta < 0 ? "off" : short(step.theta);
  return `${number + 1}. ${step.stage} at ${step.length} tokens, ${step.policy} ${step.block}: ${s}tau ${short(step.tau)}, theta ${theta}: sparsity ${percent(step.sparsity)}, error ${error}`;
}

function ceiling(steps) {
  const errors = steps.map((step) => step.error).filter((error) => error !== null);
  return Math.max(1.15 * data.limit, Math.min(Math.max(0, ...errors), 6 * data.limit)) * 1.05;
}

/** Error against sparsity, with the limit and the chosen point. */
function curve(head, steps) {
  const top = 24, bottom = 220, high = ceiling(steps);
  const x = scale(0, 1, LEFT, W - RIGHT), y = scale(0, high, bottom, top);
  const drawing = svg("svg", { class: "plot", viewBox: `0 0 ${W} 256`, role: "img",
    "aria-label": `Error against sparsity: ${steps.length} thresholds tried; chosen: sparsity ${percent(head.sparsity)}, error ${head.error.toFixed(4)}.` });
  frame(drawing, { x, y, top, bottom, xTicks: [0, 0.25, 0.5, 0.75, 1], yTicks: ticks(0, high), xName: "sparsity", yName: "error",
    xFormat: (v) => (100 * v).toFixed(0) + " %" });
  const groups = new Map();
  for (const step of steps) {
    const key = [step.stage, step.policy, step.block, step.length, step.s === null ? step.theta : "s"].join();
    groups.set(key, [...(groups.get(key) || []), step]);
  }
  const at = (step) => Math.min(high, step.error === null ? high : step.error);
  for (const group of groups.values()) {
    const sorted = [...group].sort((a, b) => a.sparsity - b.sparsity);
    drawing.append(svg("polyline", { class: "trace", points: sorted.map((s) => `${x(s.sparsity)},${y(at(s))}`).join(" ") }));
  }
  limitLine(drawing, y);
  steps.forEach((step, i) => drawing.append(mark(step.stage, x(step.sparsity), y(at(step)), stepText(step, i))));
  drawing.append(svg("circle", { class: "ring", cx: x(head.sparsity), cy: y(Math.min(high, head.error)), r: 8 },
    svg("title", {}, `chosen: ${percent(head.sparsity)}, ${head.error.toFixed(4)}`)));
  return drawing;
}

function limitLine(drawing, y) {
  drawing.append(svg("line", { class: "limit", x1: LEFT, x2: W - RIGHT, y1: y(data.limit), y2: y(data.limit) }),
    svg("text", { class: "limit-label", x: W - RIGHT, y: y(data.limit) - 5, "text-anchor": "end" }, `${data.limit_name} ${short(data.limit)}`));
}

/** The search step by step (the paper's Fig. 5): its error above, below it s, or tau where the method has no s. */
function path(steps) {
  const withS = steps.some((step) => step.s !== null);
  const value = (step) => (withS ? step.s : step.tau);
  const name = withS ? "s" : "tau";
  const shown = steps.map((step, i) => ({ ...step, i })).filter((step) => value(step) !== null);
  const high = ceiling(steps);
  const x = scale(0, Math.max(1, steps.length - 1), LEFT + 8, W - RIGHT - 8);
  const error = scale(0, high, 130, 24);
  const values = shown.map(value);
  const low = withS ? 0 : Math.min(...values), most = withS ? 1 : Math.max(...values);
  const y = scale(low, most, 270, 164);
  const drawing = svg("svg", { class: "plot", viewBox: `0 0 ${W} 306`, role: "img",
    "aria-label": `The search in ${steps.length} steps: error and ${name} of each; the last: ${stepText(steps[steps.length - 1], steps.length - 1)}.` });
  const xTicks = ticks(0, Math.max(1, steps.length - 1), 6).filter((i) => Number.isInteger(i));
  frame(drawing, { x, y: error, top: 24, bottom: 130, xTicks: [], yTicks: ticks(0, high, 3), xName: "", yName: "error" });
  frame(drawing, { x, y, top: 164, bottom: 270, xTicks, yTicks: ticks(low, most, 3), xName: "step", yName: name, xFormat: (i) => String(i + 1) });
  const at = (step) => error(Math.min(high, step.error === null ? high : step.error));
  drawing.append(svg("polyline", { class: "trace", points: steps.map((step, i) => `${x(i)},${at(step)}`).join(" ") }),
    svg("polyline", { class: "trace", points: shown.map((step) => `${x(step.i)},${y(value(step))}`).join(" ") }));
  limitLine(drawing, error);
  steps.forEach((step, i) => drawing.append(mark(step.stage, x(i), at(step), stepText(step, i))));
  for (const step of shown) drawing.append(mark(step.stage, x(step.i), y(value(step)), stepText(step, step.i)));
  return drawing;
}

/** The error on each validation input, as bars. */
function inputsChart(head) {
  const errors = head.validation_errors, top = 24, bottom = 120;
  const high = 1.15 * Math.max(data.limit, ...errors);
  const x = scale(0, errors.length, LEFT, W - RIGHT), y = scale(0, high, bottom, top);
  const drawing = svg("svg", { class: "plot", viewBox: `0 0 ${W} 156`, role: "img",
    "aria-label": `Error on each of ${errors.length} validation inputs, from ${Math.min(...errors).toFixed(4)} to ${Math.max(...errors).toFixed(4)}.` });
  frame(drawing, { x, y, top, bottom, xTicks: [], yTicks: ticks(0, high, 3), xName: "validation input", yName: "error" });
  errors.forEach((error, i) => drawing.append(svg("rect", { class: "refine", x: x(i + 0.2), width: x(0.6) - x(0), y: y(error),
    height: bottom - y(error) }, svg("title", {}, `input ${i + 1}: ${error.toFixed(4)}`))));
  limitLine(drawing, y);
  return drawing;
}
