const GALLERY = 12;

/** Draw a mask: live, skipped, and never visible blocks. */
function drawMask(canvas, mask) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => { // #rrggbb as one opaque pixel of a little-endian machine
    const [r, g, b] = style.getPropertyValue(name).trim().match(/\w\w/g).map((two) => parseInt(two, 16));
    return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  };
  const [on, off, hidden] = ["--mask-on", "--mask-off", "--mask-hidden"].map(colour);
  const [bytes, sight] = [mask.live, data.masks.sights[mask.sight]].map((text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
  const bit = (from, r, c) => (from[r * perRow + (c >> 3)] >> (7 - (c & 7))) & 1;
  const perRow = Math.ceil(mask.columns / 8);
  canvas.width = mask.columns;
  canvas.height = mask.rows;
  const image = new ImageData(mask.columns, mask.rows);
  const pixels = new Uint32Array(image.data.buffer);
  for (let r = 0; r < mask.rows; r++)
    for (let c = 0; c < mask.columns; c++)
      pixels[r * mask.columns + c] = bit(bytes, r, c) ? on : bit(sight, r, c) ? off : hidden;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function maskCanvas(mask, atOnce) {
  const canvas = el("canvas", { role: "img", "aria-label":
    `Block mask of ${mask.site}, head ${mask.head}: ${mask.rows} by ${mask.columns} blocks, ${percent(mask.sparsity)} of the visible ones skipped.` });
  if (atOnce) drawMask(canvas, mask);
  else whenSeen(canvas, () => drawMask(canvas, mask));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => canvas.isConnected && drawMask(canvas, mask));
  return canvas;
}

function gallery() {
  if (!data.masks || !data.masks.heads.length) return;
  const box = document.getElementById("gallery");
  const all = data.masks.heads;
  const figure = (mask, atOnce) => {
    const row = data.sites.findIndex((site) => site.graph === mask.graph && site.name === mask.site);
    const button = el("button", { type: "button", "aria-label": `Show ${mask.site}, head ${mask.head}` }, maskCanvas(mask, atOnce));
    button.addEventListener("click", () => { choose(row, mask.head); document.getElementById("head").scrollIntoView(); });
    return el("figure", {}, button, el("figcaption", {}, `${mask.site}, head ${mask.head}: ${percent(mask.sparsity)} skipped`));
  };
  const few = all.length <= GALLERY ? all
    : Array.from({ length: GALLERY }, (_, i) => all[Math.round((i * (all.length - 1)) / (GALLERY - 1))]);
  box.replaceChildren(...few.map((mask) => figure(mask, true)));
  if (few.length === all.length) return;
  const more = el("button", { type: "button", class: "more" }, `Show all ${all.length}`);
  more.addEventListener("click", () => { box.replaceChildren(...all.map((mask) => figure(mask, false))); more.remove(); });
  box.after(more);
}

function facts(pairs) {
  return el("dl", { class: "facts" }, ...pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

function showHead(site, index) {
  const head = site.heads[index];
  const steps = stepsOf(head);
  const dense = head.outcome === "dense";
  const parts = [el("div", {}, el("h3", {}, `${site.name}, head ${index}`), facts([
    ["outcome", dense ? "dense: keeps every block" : "sparse"],
    ["call", site.outcome + (site.reason ? `: ${site.reason}` : "")],
    ...(dense ? [] : [
      ["policy", `${head.policy}, blocks ${site.blocks}`],
      ["tau", short(head.tau)], ["theta", head.theta < 0 ? "off" : short(head.theta)],
      ["lambda", head.lam <= -1000 ? "off" : short(head.lam)],
      ["sparsity", percent(head.sparsity)], ["error", `${head.error.toFixed(4)} (${data.limit_name} ${short(data.limit)})`],
    ]),
  ]))];
  if (!dense && head.validation_errors.length)
    parts.push(el("div", {}, el("h3", {}, "Error on each validation input"), inputsChart(head)));
  if (steps.length) {
    parts.push(el("div", {}, el("h3", {}, "Error against sparsity"), curve(head, steps), stageLegend(steps),
      el("p", { class: "note" }, "The ring is the point that was chosen; errors beyond the axis lie on its upper edge.")));
    parts.push(el("div", {}, el("h3", {}, "The search, step by step"), path(steps), stageLegend(steps)));
  } else parts.push(el("div", {}, el("h3", {}, "Error against sparsity"), el("p", { class: "note" }, "The recipe does not hold this head's search.")));
  const mask = maskOf.get(key(site.graph, site.name, index));
  if (mask) parts.push(el("div", {}, el("h3", {}, `Block mask: ${percent(mask.sparsity)} skipped on the sample`), maskCanvas(mask, true)));
  document.getElementById("detail").replaceChildren(el("div", { class: "detail" }, ...parts));
}

function headTable() {
  const columns = ["site", "head", "outcome", "policy", "tau", "theta", "lambda", "sparsity", "error"];
  const number = (i) => (i === 1 || i > 3 ? { class: "number" } : {});
  const body = el("tbody");
  for (const site of data.sites)
    site.heads.forEach((head, i) => {
      const dense = head.outcome === "dense";
      const cells = [site.name, String(i), head.outcome, ...(dense ? ["", "", "", ""] : [head.policy, short(head.tau),
        head.theta < 0 ? "off" : short(head.theta), head.lam <= -1000 ? "off" : short(head.lam)]), percent(head.sparsity), head.error.toFixed(4)];
      body.append(el("tr", {}, ...cells.map((text, c) => el("td", number(c), text))));
    });
  const header = el("tr", {}, ...columns.map((name, i) => el("th", { scope: "col", ...number(i) }, name)));
  document.getElementById("head-table").replaceChildren(el("table", {}, el("thead", {}, header), body));
}

const first = data.sites.findIndex((site) => site.heads.length);
if (first >= 0) {
  heatMap("sparsity", (head) => head.sparsity);
  heatMap("error", (head) => head.error / data.limit);
  legend("sparsity", "0 %", "100 %");
  legend("error", "0", `${short(data.limit)}, the ${data.limit_name}`);
  const heads = data.sites.flatMap((site, row) => site.heads.map((head, column) => ({ row, column, head })));
  const best = heads.reduce((a, b) => (b.head.sparsity > a.head.sparsity ? b : a));
  choose(best.row, best.column);
} else document.querySelector("#heads .maps").replaceChildren(el("p", {}, "No head was calibrated."));
document.getElementById("all-heads").addEventListener("toggle", headTable, { once: true });
gallery();
