// Runs the script of a page in a document that remembers what was made of it; prints that as JSON.
// node page_in_node.js page.html
const { readFileSync } = require("node:fs");

class Element {
  constructor(tag) { Object.assign(this, { tag, attributes: {}, children: [], listeners: {}, clientWidth: 800, isConnected: true }); this.style = { setProperty() {} }; }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  getAttribute(name) { return this.attributes[name] ?? null; }
  append(...nodes) { this.children.push(...nodes); }
  replaceChildren(...nodes) { this.children = nodes; }
  after(node) { this.next = node; }
  remove() {}
  scrollIntoView() {}
  addEventListener(name, listener) { this.listeners[name] = listener; }
  getContext() { return { putImageData: (image) => { this.pixels = [...new Uint32Array(image.data.buffer)]; } }; }
  set textContent(text) { this.children = [text]; }
  get textContent() { return this.children.map((child) => (typeof child === "string" ? child : child.textContent)).join(" "); }
  all(tag) { return this.children.flatMap((child) => (typeof child === "string" ? [] : [...(child.tag === tag ? [child] : []), ...child.all(tag)])); }
}

const html = readFileSync(process.argv[2], "utf-8");
const [data, script] = [...html.matchAll(/<script[^>]*>([\s\S]*?)<\/script>/g)].map((found) => found[1]);
const known = new Map([...html.matchAll(/ id="([\w-]+)"/g)].map((found) => [found[1], new Element("div")]));
known.get("data").textContent = data;
const colours = Object.fromEntries([...html.split("@media")[0].matchAll(/(--mask-\w+): #(\w+)/g)].map((found) => found.slice(1)));

globalThis.document = {
  getElementById: (id) => known.get(id) ?? null,
  createElement: (tag) => new Element(tag),
  createElementNS: (_, tag) => new Element(tag),
  querySelector: (path) => known.get(path.match(/#([\w-]+)/)[1]),
  documentElement: new Element("html"),
};
globalThis.getComputedStyle = () => ({ getPropertyValue: (name) => "#" + colours[name] });
globalThis.matchMedia = () => ({ addEventListener() {} });
globalThis.IntersectionObserver = class { observe() {} unobserve() {} };
globalThis.ImageData = class { constructor(width, height) { this.data = new Uint8ClampedArray(4 * width * height); } };

new Function(script)();
known.get("all-heads").listeners.toggle();
const opaque = (name) => { // as the canvas has it, little-endian
  const [r, g, b] = colours[name].match(/\w\w/g).map((two) => parseInt(two, 16));
  return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
};
const names = new Map(["on", "off", "hidden"].map((name) => [opaque("--mask-" + name), name]));
console.log(JSON.stringify({
  status: known.get("status").textContent,
  detail: known.get("detail").textContent,
  maps: ["map-sparsity", "map-error"].map((id) => known.get(id).all("rect").filter((cell) => cell.attributes["data-at"]).length),
  table: known.get("head-table").all("tr").map((row) => row.children.map((cell) => cell.textContent)),
  gallery: known.get("gallery").all("figure").map((figure) => figure.all("figcaption")[0].textContent),
  masks: known.get("gallery").all("canvas").map((canvas) => canvas.pixels.map((pixel) => names.get(pixel))),
}));
