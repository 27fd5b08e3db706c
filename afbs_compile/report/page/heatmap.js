const MAX_LABEL = 200;
const maps = [];
let chosen = null; // {row, column}

/** One map: kind is "sparsity" or "error"; share(head) is the place of a head's value on the ramp, 0 to 1. */
function heatMap(kind, share) {
  const box = document.getElementById("map-" + kind);
  const columns = Math.max(1, ...data.sites.map((site) => site.heads.length));
  const label = Math.min(MAX_LABEL, 12 + 6.6 * Math.max(...labels.map((text) => text.length)));
  const room = Math.max(200, box.clientWidth - label - 4);
  const width = Math.max(7, Math.min(30, Math.floor(room / columns)));
  const height = data.sites.length > 40 ? 13 : Math.max(13, Math.min(22, width));
  const top = 18;
  const drawing = svg("svg", {
    width: label + columns * width + 2, height: top + data.sites.length * height + 2, tabindex: 0, role: "application",
    "aria-roledescription": "heat map", "aria-describedby": "status",
    "aria-label": `Heat map of ${kind}, ${data.sites.length} attention calls by up to ${columns} heads. Arrow keys choose a head.`,
  });
  for (let c = 0; c < columns; c += Math.max(1, Math.ceil(24 / width)))
    drawing.append(svg("text", { x: label + (c + 0.5) * width, y: top - 6, "text-anchor": "middle" }, String(c)));
  data.sites.forEach((site, r) => {
    const y = top + r * height;
    const text = labels[r].length * 6.6 > MAX_LABEL - 12 ? "…" + labels[r].slice(-26) : labels[r];
    drawing.append(svg("text", { x: label - 6, y: y + height / 2 + 4, "text-anchor": "end" }, svg("title", {}, site.name), text));
    if (!site.heads.length)
      drawing.append(svg("rect", { x: label, y: y + 1, width: columns * width - 1, height: height - 2, class: "refused-row" },
        svg("title", {}, `${site.name}: refused: ${site.reason}`)));
    site.heads.forEach((head, c) => {
      const x = label + c * width;
      const dense = head.outcome === "dense";
      const over = !dense && head.error > data.limit;
      const cell = svg("rect", { x, y, width: width - 1, height: height - 1, "data-at": `${r},${c}`,
        class: "cell " + (dense ? "keeps-all" : kind) + (over ? " over" : "") });
      cell.style.setProperty("--p", (100 * Math.min(1, share(head))).toFixed(1) + "%");
      drawing.append(cell);
      if (dense) drawing.append(svg("line", { class: "slash", x1: x, y1: y + height - 1, x2: x + width - 1, y2: y }));
    });
  });
  const frame = svg("rect", { class: "chosen", width: width + 1, height: height + 1, visibility: "hidden" });
  drawing.append(frame);
  drawing.addEventListener("click", (event) => pickAt(event.target));
  drawing.addEventListener("mousemove", (event) => tell(event.target));
  drawing.addEventListener("mouseleave", () => chosen && say(chosen.row, chosen.column));
  drawing.addEventListener("keydown", onKey);
  box.replaceChildren(drawing);
  maps.push((row, column) => {
    frame.setAttribute("x", label + column * width - 1);
    frame.setAttribute("y", top + row * height - 1);
    frame.setAttribute("visibility", "visible");
  });
}

function place(target) {
  const at = target.getAttribute && target.getAttribute("data-at");
  return at ? at.split(",").map(Number) : null;
}

function pickAt(target) {
  const at = place(target);
  if (at) choose(...at);
}

function tell(target) {
  const at = place(target);
  if (at) say(...at);
}

function say(row, column) {
  document.getElementById("status").textContent = headText(data.sites[row], column);
}

function onKey(event) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step || !chosen) return;
  event.preventDefault();
  let row = chosen.row + step[0];
  while (step[0] && data.sites[row] && !data.sites[row].heads.length) row += step[0];
  const site = data.sites[row];
  if (!site) return;
  choose(row, Math.max(0, Math.min(site.heads.length - 1, chosen.column + step[1])));
}

function choose(row, column) {
  chosen = { row, column };
  for (const mark of maps) mark(row, column);
  say(row, column);
  showHead(data.sites[row], column);
}

function legend(kind, low, high) {
  const entries = [el("span", {}, low, el("span", { class: "ramp " + kind }), high)];
  const heads = data.sites.flatMap((site) => site.heads);
  const swatch = (name, text) => entries.push(el("span", {}, el("span", { class: "swatch " + name }), text));
  if (heads.some((head) => head.outcome === "dense")) swatch("dense", "dense head");
  if (heads.some((head) => head.outcome === "sparse" && head.error > data.limit)) swatch("over", `over the ${data.limit_name}`);
  if (data.sites.some((site) => !site.heads.length)) swatch("refused", "refused call");
  document.getElementById("legend-" + kind).replaceChildren(...entries);
}
