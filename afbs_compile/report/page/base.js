const data = JSON.parse(document.getElementById("data").textContent);
const percent = (x) => (100 * x).toFixed(1) + " %";
const short = (x) => (Math.abs(x) >= 100 ? x.toFixed(0) : String(Number(x.toPrecision(4))));

/** An HTML element; text is set as text, never as markup: names come from a file. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** An SVG element. */
function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** Row labels: names without the parts that all calibrated ones share, "3" for "model.layers.3.self_attn". */
function shortNames(sites) {
  const names = sites.filter((site) => site.heads.length).map((site) => site.name);
  const parts = names.map((name) => name.split("."));
  const shared = (at) => parts.length > 0 && parts.every((p) => p.length > 1 && at(p) === at(parts[0]));
  let front = 0;
  while (shared((p) => p[front]) && parts.every((p) => p.length > front + 1)) front++;
  let back = 0;
  while (shared((p) => p[p.length - 1 - back]) && parts.every((p) => p.length > front + back + 1)) back++;
  const cut = (name) => name.split(".").slice(front, back ? -back : undefined).join(".");
  const clear = names.length > 1 && new Set(names.map(cut)).size === new Set(names).size;
  const several = sites.some((site) => site.graph > 0);
  return sites.map((site) => (several ? `graph ${site.graph}: ` : "") + (clear && site.heads.length ? cut(site.name) : site.name) +
    (site.outcome === "dense" ? " (dense)" : ""));
}

const labels = shortNames(data.sites);
const key = (graph, site, head) => [graph, site, head].join("\n");
const maskOf = new Map((data.masks ? data.masks.heads : []).map((mask) => [key(mask.graph, mask.site, mask.head), mask]));

function headText(site, index) {
  const head = site.heads[index];
  if (head.outcome === "dense") return `${site.name}, head ${index}: dense, keeps every block`;
  const runs = site.outcome === "sparse" ? "" : "; its call stays dense";
  return `${site.name}, head ${index}: sparsity ${percent(head.sparsity)}, error ${head.error.toFixed(4)}${runs}`;
}

/** Call draw(element) once it is near the screen: a page of a thousand pictures opens at once. */
const onSight = new Map();
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    observer.unobserve(entry.target);
    onSight.get(entry.target)(entry.target);
    onSight.delete(entry.target);
  }
}, { rootMargin: "200px" });

function whenSeen(element, draw) {
  onSight.set(element, draw);
  observer.observe(element);
}
