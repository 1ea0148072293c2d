// The attention map: one ES module without dependencies. On a page it draws every
// `.attention-map` that has not been drawn yet; as a widget, anywidget calls `render`.
// nbs/appendix/attention_map.ipynb explains how it works, and makes the data that it draws.

// --- style

const STYLE = `
:host {
  display: block;
  margin: .5em 0;
  --ink: #1b1b1b;
  --soft: #5c5c5c;
  --paper: #ffffff;
  --line: #c9c9c9;
  --looks: 0 90 160;
  --seen: 190 75 0;
  --focus: #7a00cc;
}
:host([data-theme=dark]) {
  --ink: #ececec;
  --soft: #b4b4b4;
  --paper: #141414;
  --line: #4a4a4a;
  --looks: 92 184 255;
  --seen: 255 150 60;
  --focus: #ffd54a;
}
* { box-sizing: border-box }
.map {
  container-type: inline-size;
  background: var(--paper);
  color: var(--ink);
  border: 1px solid var(--line);
  border-radius: 6px;
  padding: 10px;
  font: 14px/1.45 system-ui, sans-serif;
}
.bar { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin-bottom: 8px }
.bar strong { margin-right: auto }
select, input, button {
  font: inherit;
  color: inherit;
  background: var(--paper);
  border: 1px solid var(--line);
  border-radius: 4px;
  min-height: 26px;
  padding: 1px 6px;
}
input { width: 5.5em }
button { cursor: pointer }
:focus { outline: none }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 1px }
.heads {
  display: flex;
  flex-wrap: wrap;
  gap: 3px;
  max-height: 250px;
  overflow: auto;
  padding: 4px;
  margin-bottom: 8px;
}
.heads.grid { display: grid; justify-content: start }
.heads button {
  padding: 2px;
  border-color: transparent;
  line-height: 1.15;
  font-size: 11px;
  min-width: calc(var(--side) + 6px);
}
.heads button[aria-checked=true] {
  border-color: var(--ink);
  background: rgb(var(--looks) / .16);
  font-weight: bold;
}
.heads canvas {
  display: block;
  width: var(--side);
  height: var(--side);
  margin: auto;
  border: 1px solid var(--line);
}
.views { display: grid; grid-template-columns: minmax(0, 1fr); gap: 12px }
@container (min-width: 760px) {
  .views { grid-template-columns: minmax(0, 480px) minmax(0, 1fr) };
}
.heat { display: block; width: 100%; touch-action: manipulation; cursor: crosshair }
.text {
  white-space: pre-wrap;
  overflow-wrap: anywhere;
  line-height: 1.9;
  font: 14px/1.9 ui-monospace, monospace;
  max-height: 290px;
  overflow: auto;
  padding: 4px;
  border: 1px solid var(--line);
  border-radius: 4px;
}
.text span { border-radius: 2px; cursor: pointer; padding: 2px 0 }
.text .line::after { content: "\\A"; white-space: pre }
.text [aria-selected=true] { outline: 2px solid var(--ink) }
.text .key { outline: 2px dashed var(--ink) }
.key-looks, .key-seen { color: var(--ink); padding: 0 4px; background: rgb(var(--looks) / .35) }
.key-seen { background: rgb(var(--seen) / .35) }
.soft { color: var(--soft) }
.readout { min-height: 3em; margin: 6px 0 }
.why { margin-top: 10px; border-top: 1px solid var(--line); padding-top: 6px }
.why canvas { width: 100%; height: 64px; display: block }
.why p { margin: 4px 0 }
.scale { width: 150px; height: 12px; border: 1px solid var(--line) }
.scroll { max-height: 260px; overflow: auto; margin-top: 6px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 1px 8px; text-align: right; border-bottom: 1px solid var(--line) }
td:nth-child(2), th:nth-child(2) {
  text-align: left;
  font-family: ui-monospace, monospace;
  white-space: pre;
}
[hidden] { display: none !important }
`;

// --- data: what Python has packed

// base64 of a zlib stream -> its bytes
async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

async function read(data) {
  const buffer = await unpack(data.weights);
  const codes = data.bits === 8 ? new Uint8Array(buffer) : new Uint16Array(buffer);
  const vectors = data.vectors && new Float32Array(await unpack(data.vectors));
  return describe(data, codes, vectors);
}

// what `drawMap` needs: codes (layers, heads, triangle), vectors (3, layers, heads, T, D) or null
export function describe(data, codes, vectors) {
  return {
    ...data,
    T: data.tokens.length,
    ...readWeights(data, codes),
    why: explainer(data, vectors),
    explains: Boolean(vectors),
  };
}

function readWeights({ tokens, heads, bits, floor }, codes) {
  const T = tokens.length;
  const size = (T * (T + 1)) / 2; // weights of a head: its lower triangle, row by row
  const top = 2 ** bits - 1;
  const value = Float64Array.from(
    { length: top + 1 },
    (_, code) => (code ? floor ** ((top - code) / (top - 1)) : 0), // equal steps of the logarithm
  );
  const start = (l, h) => (l * heads.length + h) * size;
  const means = new Map(); // layer -> the mean of its heads
  const meanOf = (l) => {
    if (!means.has(l)) {
      const mean = new Float64Array(size);
      for (let h = 0; h < heads.length; h++)
        for (let i = 0, s = start(l, h); i < size; i++)
          mean[i] += value[codes[s + i]] / heads.length;
      means.set(l, mean);
    }
    return means.get(l);
  };
  // the triangle of a head; h = -1 is the mean of the layer
  const head = (l, h) =>
    h >= 0 ? { at: (i) => value[codes[start(l, h) + i]] } : { at: (i) => meanOf(l)[i] };
  const weight = (l, h, q, k) => (k > q ? 0 : head(l, h).at((q * (q + 1)) / 2 + k));
  return { size, head, weight };
}

// gives a function that explains a weight: every step from two vectors to one number
function explainer({ tokens, layers, heads, head_dim: D }, vectors) {
  const T = tokens.length;
  const vector = (kind, l, h, t) => {
    // q, k or v: (3, layers, heads, T, D)
    const i = (((kind * layers.length + l) * heads.length + h) * T + t) * D;
    return vectors.subarray(i, i + D);
  };
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  return (l, h, q, k) => {
    const query = vector(0, l, h, q);
    const productsWith = (t) => Array.from(query, (x, d) => x * vector(1, l, h, t)[d]);
    const scores = Array.from({ length: q + 1 }, (_, t) => sum(productsWith(t)) / Math.sqrt(D));
    const most = Math.max(...scores);
    const total = sum(scores.map((score) => Math.exp(score - most)));
    const products = productsWith(k);
    const weight = k > q ? 0 : Math.exp(scores[k] - most) / total;
    const adds = Array.from(vector(2, l, h, k), (x) => x * weight);
    return { products, dot: sum(products), scores, total, most, weight, adds };
  };
}

// --- small helpers

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function makeChoice(label, options, change) {
  const choices = options.map(([value, text]) => make("option", { value }, text));
  const select = make("select", { onchange: ({ target }) => change(target.value) }, ...choices);
  return make("label", {}, `${label} `, select);
}

// what cannot be seen gets a sign
const shown = (token) => token.replace(/\n/g, "⏎").replace(/\r/g, "␍").replace(/\t/g, "⇥") || "∅";
const quoted = (token) => `“${shown(token)}”`;
// beside the heat map, where there is little room
const shortened = (token) => [...(shown(token).trim() || "␣")].slice(0, 12).join("");
const endsLine = (token) => /\n$/.test(token);

function digits(x, n = 4) {
  if (x === 0) return "0";
  return Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5 ? x.toExponential(n - 1) : x.toPrecision(n);
}

const range = (numbers) =>
  `from ${digits(Math.min(...numbers), 3)} to ${digits(Math.max(...numbers), 3)}`;

// a weight of 0.01 is drawn with a tenth of the ink, so that it can still be seen
const strength = Math.sqrt;

// what surrounds the map: Quarto, JupyterLab, or a bare page
function isDark(node) {
  const body = document.body;
  if (body.classList.contains("quarto-dark") || body.dataset.jpThemeLight === "false") return true;
  if (body.classList.contains("quarto-light") || body.dataset.jpThemeLight === "true") return false;
  for (let at = node; at; at = at.parentElement) {
    const numbers = getComputedStyle(at).backgroundColor.match(/[\d.]+/g) || [0, 0, 0, 0];
    const [r, g, b, a = 1] = numbers.map(Number);
    if (a > 0.5) return 0.3 * r + 0.6 * g + 0.1 * b < 110;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

// an n x n picture of the weights; where cells share a pixel, the largest shows
function triangle(head, T, n, colour) {
  const picture = new ImageData(n, n);
  for (let q = 0, i = 0; q < T; q++)
    for (let k = 0, row = Math.floor((q * n) / T) * n; k <= q; k++, i++) {
      const pixel = 4 * (row + Math.floor((k * n) / T));
      const ink = 255 * strength(head.at(i));
      if (ink > picture.data[pixel + 3]) picture.data.set([...colour, ink], pixel);
    }
  return picture;
}

// `act` says whether a key means something to it
function onKeys(node, act) {
  node.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (act(event.key)) event.preventDefault();
  });
}

const STEPS = {
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
};

// --- the map: its data, what is chosen, and the nodes that show it

class MapView {
  constructor(host, data) {
    this.host = host;
    this.data = data;
    this.statistics = Object.keys(data.statistics); // their names
    this.state = {
      layer: 0,
      head: 0,
      token: data.T - 1,
      key: null,
      pinned: false,
      sort: "",
      least: -Infinity,
    };
    this.colours = {};
    this.picture = null; // of the chosen head, a pixel for a weight
    this.all = data.layers.flatMap((_, layer) =>
      data.heads.map((_, head) => this.makeHead(layer, head)),
    );
    this.order = this.all; // the heads that are listed, one after the other
    host.style.setProperty("--side", this.all.length > 24 ? "46px" : "76px");
    this.makeControls();
    this.makeViews();
    this.listenToKeys();
    this.listenToPointer();
  }

  // --- its parts

  makeHead(layer, head) {
    const { T, layers, heads, statistics } = this.data;
    const numbers = this.statistics.map(
      (name) => `, ${name} ${digits(statistics[name][layer][head] ?? NaN, 3)}`,
    );
    const label = `layer ${layers[layer]}, head ${heads[head]}${numbers.join("")}`;
    const canvas = make("canvas", {
      width: Math.min(T, 64),
      height: Math.min(T, 64),
      style: T < 64 ? "image-rendering: pixelated" : "",
    });
    const caption = make("span", {}, this.nameOf(layer, head));
    const attributes = {
      type: "button",
      role: "radio",
      "aria-checked": "false",
      "aria-label": label,
      title: label,
      onclick: () => this.choose({ layer, head }),
    };
    return { layer, head, canvas, caption, button: make("button", attributes, canvas, caption) };
  }

  makeControls() {
    const { layers, heads } = this.data;
    const numbered = (names) => names.map((name, i) => [i, name]);
    const orders = [["", "layer, head"], ...this.statistics.map((name) => [name, name])];
    this.layerChoice = makeChoice("layer", numbered(layers), (value) =>
      this.choose({ layer: +value }),
    );
    this.headChoice = makeChoice("head", [...numbered(heads), [-1, "mean"]], (value) =>
      this.choose({ head: +value }),
    );
    this.orderChoice = makeChoice("order", orders, (sort) =>
      this.arrange({ sort, least: -Infinity }),
    );
    this.least = make("input", {
      type: "number",
      step: "any",
      onchange: ({ target: { value } }) =>
        this.arrange({ least: value === "" ? -Infinity : +value }),
    });
    this.filter = make("label", {}, "at least ", this.least);
    this.valuesButton = make(
      "button",
      { type: "button", "aria-expanded": "false", onclick: () => this.toggleValues() },
      "values",
    );
  }

  makeViews() {
    this.headList = make("div", {
      class: "heads",
      role: "radiogroup",
      "aria-label": "heads; arrow keys choose",
    });
    this.heat = make("canvas", {
      class: "heat",
      tabindex: "0",
      role: "application",
      "aria-label":
        "heat map: a row for each query, a column for each key; arrow keys move, Enter pins, " +
        "Escape lets go",
    });
    this.text = make("div", {
      class: "text",
      role: "listbox",
      tabindex: "0",
      "aria-label": "tokens; arrow keys choose, Enter pins, Escape lets go",
    });
    this.spans = this.data.tokens.map(makeToken);
    this.text.append(...this.spans);
    this.readout = make("div", { class: "readout", role: "status", "aria-live": "polite" });
    this.values = make("div", {
      class: "scroll",
      tabindex: "0",
      role: "region",
      "aria-label": "weights of the chosen token",
      hidden: "",
    });
    this.why = make("div", {
      class: "why",
      role: "region",
      "aria-label": "why this weight",
      hidden: "",
    });
    this.scale = make("canvas", {
      class: "scale",
      width: 150,
      height: 12,
      role: "img",
      "aria-label": "colour scale from 0 to 1",
    });
  }

  // all of it in its place
  layout() {
    const saveButton = (kind) =>
      make("button", { type: "button", onclick: () => this.save(kind) }, kind.toUpperCase());
    const bar = make(
      "div",
      { class: "bar" },
      make("strong", {}, this.data.title),
      this.layerChoice,
      this.headChoice,
      this.orderChoice,
      this.filter,
      this.valuesButton,
      saveButton("svg"),
      saveButton("png"),
    );
    const legend = make(
      "div",
      { class: "soft" },
      "shade: ",
      make("span", { class: "key-looks" }, "what the chosen token looks at"),
      " ",
      make("span", { class: "key-seen" }, "who looks at it"),
    );
    const scale = make("div", { class: "bar soft" }, "weight 0 ", this.scale, " 1 (√ scale)");
    const left = make("div", {}, this.heat, scale);
    const right = make("div", {}, legend, this.text, this.readout, this.values, this.why);
    const views = make("div", { class: "views" }, left, right);
    return make("div", { class: "map" }, bar, this.headList, views);
  }

  nameOf(layer, head) {
    return `${this.data.layers[layer]}.${head < 0 ? "mean" : this.data.heads[head]}`;
  }

  longNameOf(layer, head) {
    const ofHead = head < 0 ? "mean of its heads" : `head ${this.data.heads[head]}`;
    return `layer ${this.data.layers[layer]}, ${ofHead}`;
  }

  // --- choosing

  choose(change) {
    const before = { ...this.state };
    Object.assign(this.state, change);
    if (this.state.layer !== before.layer || this.state.head !== before.head) this.picture = null;
    this.paint();
    if (this.host.attentionMap)
      this.host.dispatchEvent(new CustomEvent("attention-choose", { bubbles: true }));
  }

  point(token, key = null) {
    if (!this.state.pinned) this.choose({ token, key });
  }

  pin(token, key = null) {
    const { state } = this;
    const again = state.pinned && state.token === token && state.key === key;
    this.choose(again ? { pinned: false } : { token, key, pinned: true });
  }

  // the order of the heads, and which of them are listed
  arrange(change) {
    const { state, headList } = this;
    const { heads, statistics } = this.data;
    Object.assign(state, change);
    const number = ({ layer, head }) => statistics[state.sort][layer][head];
    const value = (head) => number(head) ?? -Infinity;
    this.order = this.all;
    if (state.sort) {
      const listed = this.all.filter((head) => value(head) >= state.least);
      this.order = listed.sort((a, b) => value(b) - value(a));
    }
    this.filter.hidden = !state.sort;
    if (state.least === -Infinity) this.least.value = "";
    headList.classList.toggle("grid", !state.sort);
    headList.style.gridTemplateColumns = state.sort ? "" : `repeat(${heads.length}, max-content)`;
    headList.replaceChildren(...this.order.map((head) => head.button));
    if (!this.order.length) headList.append(`no head has ${state.sort} of ${state.least} or more`);
    for (const head of this.order) {
      const measured = state.sort ? ` ${digits(number(head) ?? NaN, 2)}` : "";
      head.caption.textContent = this.nameOf(head.layer, head.head) + measured;
    }
    this.paint();
  }

  isChosen({ layer, head }) {
    return layer === this.state.layer && head === this.state.head;
  }

  toggleValues() {
    this.values.hidden = !this.values.hidden;
    this.valuesButton.setAttribute("aria-expanded", String(!this.values.hidden));
    this.paint();
  }

  // --- keys and pointer

  clamp(t) {
    return Math.max(0, Math.min(this.data.T - 1, t));
  }

  listenToKeys() {
    onKeys(this.headList, (key) => this.headKey(key));
    onKeys(this.text, (key) => this.tokenKey(key));
    onKeys(this.heat, (key) => this.heatKey(key));
  }

  headKey(key) {
    const { order } = this;
    if (!STEPS[key] && key !== "Home" && key !== "End") return false;
    const at = order.findIndex((head) => this.isChosen(head));
    let to = key === "Home" ? 0 : order.length - 1;
    if (STEPS[key]) to = at + STEPS[key][0] * this.columns() + STEPS[key][1];
    if (order[to]) {
      this.choose({ layer: order[to].layer, head: order[to].head });
      order[to].button.focus();
    }
    return true;
  }

  // how many heads stand in a row of the list
  columns() {
    if (!this.state.sort) return this.data.heads.length;
    const top = this.order[0]?.button.offsetTop;
    return Math.max(1, this.order.filter(({ button }) => button.offsetTop === top).length);
  }

  tokenKey(key) {
    const t = this.state.token;
    const moves = {
      ArrowLeft: t - 1,
      ArrowRight: t + 1,
      ArrowUp: t - 10,
      ArrowDown: t + 10,
      Home: 0,
      End: this.data.T - 1,
    };
    if (key in moves) this.choose({ token: this.clamp(moves[key]), key: null });
    else if (key === "Enter" || key === " ") this.pin(t);
    else if (key === "Escape") this.choose({ pinned: false, key: null });
    else return false;
    this.spans[this.state.token].scrollIntoView?.({ block: "nearest" });
    return true;
  }

  heatKey(key) {
    const q = this.state.token;
    const k = this.state.key ?? q;
    if (STEPS[key]) {
      const [down, right] = STEPS[key];
      this.choose({ token: this.clamp(q + down), key: this.clamp(k + right) });
    } else if (key === "Home") this.choose({ key: 0 });
    else if (key === "End") this.choose({ key: q });
    else if (key === "Enter" || key === " ") this.pin(q, k);
    else if (key === "Escape") this.choose({ pinned: false, key: null });
    else return false;
    return true;
  }

  listenToPointer() {
    const on = (node, type, placeOf, act) =>
      node.addEventListener(type, (event) => {
        const place = placeOf(event);
        if (place) act(...place);
      });
    const cellOf = (event) => this.cellAt(event);
    const tokenOf = ({ target }) => {
      const t = this.spans.indexOf(target.closest?.("[role=option]"));
      return t >= 0 ? [t] : null;
    };
    on(this.heat, "pointermove", cellOf, (q, k) => this.point(q, k));
    on(this.heat, "click", cellOf, (q, k) => this.pin(q, k));
    on(this.text, "pointerover", tokenOf, (t) => this.point(t));
    on(this.text, "click", tokenOf, (t) => this.pin(t));
  }

  // in pixels of the page: the canvas, the margin for words, a square
  heatSizes() {
    const width = this.heat.clientWidth || 400;
    const margin = Math.min(90, width / 4);
    return { width, margin, cell: (width - margin) / this.data.T };
  }

  cellAt({ offsetX, offsetY }) {
    const { T } = this.data;
    const { margin, cell } = this.heatSizes();
    const q = Math.floor((offsetY - margin) / cell);
    const k = Math.floor((offsetX - margin) / cell);
    return q >= 0 && q < T && k >= 0 && k < T ? [q, k] : null;
  }

  // --- drawing

  paint() {
    const { order, state } = this;
    this.layerChoice.querySelector("select").value = state.layer;
    this.headChoice.querySelector("select").value = state.head;
    const noneIsChosen = !order.some((head) => this.isChosen(head));
    for (const head of this.all) {
      const chosen = this.isChosen(head);
      head.button.setAttribute("aria-checked", String(chosen));
      head.button.tabIndex = chosen || (noneIsChosen && head === order[0]) ? 0 : -1;
    }
    this.paintHeat();
    this.paintText();
    this.readout.replaceChildren(...this.sentence());
    if (!this.values.hidden) this.values.replaceChildren(this.table());
    this.paintWhy();
  }

  paintHeat() {
    const { T } = this.data;
    const { token: q, key: k, layer, head } = this.state;
    const { width, margin, cell } = this.heatSizes();
    const { heat, colours } = this;
    if (!this.picture) {
      const weights = triangle(this.data.head(layer, head), T, T, colours.looks);
      this.picture = new OffscreenCanvas(T, T);
      this.picture.getContext("2d").putImageData(weights, 0, 0);
    }
    const ratio = devicePixelRatio || 1;
    const pixels = Math.round(width * ratio);
    if (heat.width !== pixels) {
      heat.width = pixels;
      heat.height = pixels;
      heat.style.height = `${width}px`;
    }
    const context = heat.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, width);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.picture, margin, margin, width - margin, width - margin);
    context.strokeStyle = colours.line;
    context.strokeRect(margin, margin, width - margin, width - margin);
    context.strokeStyle = colours.ink;
    context.fillStyle = colours.ink;
    if (cell >= 3) context.strokeRect(margin, margin + q * cell, width - margin, cell);
    else context.strokeRect(margin, margin + q * cell - 1, width - margin, cell + 2);
    if (k !== null) context.strokeRect(margin + k * cell, margin, cell, width - margin);
    this.paintLabels(context);
  }

  // the tokens beside the rows and above the columns
  paintLabels(context) {
    const { T, tokens } = this.data;
    const { token: q, key: k } = this.state;
    const { margin, cell } = this.heatSizes();
    const every = Math.ceil(11 / cell); // where there is no room for all
    // a word that would be written over the chosen one is left out
    const hasRoom = (t, chosen) =>
      t === chosen || (t % every === 0 && (chosen === null || Math.abs(t - chosen) * cell >= 11));
    const write = (t, chosen, align, x, y) => {
      context.font = `${t === chosen ? "bold " : ""}10px ui-monospace, monospace`;
      context.textAlign = align;
      context.textBaseline = "middle";
      context.fillText(shortened(tokens[t]), x, y);
    };
    for (let t = 0; t < T; t++) {
      const at = margin + (t + 0.5) * cell;
      if (hasRoom(t, q)) write(t, q, "right", margin - 4, at);
      if (!hasRoom(t, k)) continue;
      context.save();
      context.translate(at, margin - 4);
      context.rotate(-Math.PI / 2);
      write(t, k, "left", 0, 0);
      context.restore();
    }
  }

  // what the chosen token looks at, or what looks at it from behind
  shadeOf(t) {
    const { layer, head, token } = this.state;
    const [q, k] = t <= token ? [token, t] : [t, token];
    const ink = 0.5 * strength(this.data.weight(layer, head, q, k));
    return { ink, kind: t <= token ? "looks" : "seen" };
  }

  paintText() {
    const { token, key } = this.state;
    for (const [t, span] of this.spans.entries()) {
      const { ink, kind } = this.shadeOf(t);
      span.style.background = ink ? `rgb(var(--${kind}) / ${ink.toFixed(3)})` : "";
      span.classList.toggle("key", t === key);
      const selected = String(t === token);
      if (span.getAttribute("aria-selected") !== selected)
        span.setAttribute("aria-selected", selected);
    }
    this.text.setAttribute("aria-activedescendant", `t${token}`);
  }

  // a weight in as many digits as are known
  amount(q, k, n = 4) {
    const { data } = this;
    const { layer, head } = this.state;
    if (k > q) return "masked: it comes later";
    if (data.explains && head >= 0) return digits(data.why(layer, head, q, k).weight, n);
    const weight = data.weight(layer, head, q, k);
    return weight ? digits(weight, data.bits === 8 ? 3 : 4) : `less than ${data.floor}`;
  }

  sentence() {
    const { layer, head, token, key, pinned } = this.state;
    const { tokens, weight } = this.data;
    const name = (t) => `${quoted(tokens[t])} (${t})`;
    let seen = key === null ? "" : `looks at ${name(key)}: ${this.amount(token, key)}`;
    if (key === null) {
      const weightOf = (t) => weight(layer, head, token, t);
      const keys = Array.from({ length: token + 1 }, (_, t) => t);
      const most = keys.sort((a, b) => weightOf(b) - weightOf(a)).slice(0, 3);
      seen = `looks most at ${most.map((t) => `${name(t)} ${this.amount(token, t)}`).join(", ")}`;
    }
    const place = `${this.longNameOf(layer, head)}${pinned ? ", pinned: " : ": "}`;
    return [make("span", { class: "soft" }, place), `${name(token)} ${seen}`];
  }

  table() {
    const { tokens } = this.data;
    const { token } = this.state;
    const row = (tag, attributes, ...texts) =>
      make("tr", {}, ...texts.map((text) => make(tag, attributes, text)));
    const chosen = quoted(tokens[token]);
    const titles = ["place", "token", `${chosen} looks at it`, `it looks at ${chosen}`];
    const rows = tokens.map((word, t) => {
      const looks = t <= token ? this.amount(token, t, 7) : "–";
      const isSeen = t >= token ? this.amount(t, token, 7) : "–";
      return row("td", {}, String(t), shown(word), looks, isSeen);
    });
    const head = make("thead", {}, row("th", { scope: "col" }, ...titles));
    return make("table", {}, head, make("tbody", {}, ...rows));
  }

  // a bar for each number, upwards or downwards
  bars(numbers, colour, label) {
    const canvas = make("canvas", { width: 600, height: 64, role: "img", "aria-label": label });
    const context = canvas.getContext("2d");
    const most = Math.max(...numbers.map(Math.abs)) || 1;
    const wide = 600 / numbers.length;
    context.fillStyle = `rgb(${colour.join(" ")})`;
    for (const [d, x] of numbers.entries()) {
      const high = (30 * Math.abs(x)) / most;
      context.fillRect(d * wide + 1, x > 0 ? 32 - high : 32, Math.max(1, wide - 2), high);
    }
    context.fillStyle = this.colours.line;
    context.fillRect(0, 32, 600, 1);
    return canvas;
  }

  paintWhy() {
    const { layer, head, token: q, key: k } = this.state;
    const { tokens, head_dim: D } = this.data;
    this.why.hidden = !this.data.explains || head < 0 || k === null;
    if (this.why.hidden) return;
    const { products, dot, most, total, weight, adds } = this.data.why(layer, head, q, k);
    const root = Math.sqrt(D);
    const masked = k > q;
    const line = (...words) => make("p", {}, ...words);
    const question = `Why ${quoted(tokens[q])} (${q}) gives ${quoted(tokens[k])} (${k}) this weight`;
    const softmax = masked
      ? "softmax: e to the −∞ is 0, so the weight is "
      : `softmax over ${q + 1} keys, of which the best has score ${digits(most, 4)}: ` +
        `e^(score − best) / ${digits(total, 7)} = `;
    this.why.replaceChildren(
      make("strong", {}, question),
      line(`q · k = ${digits(dot, 7)}, summed over ${D} dimensions:`),
      this.bars(products, this.colours.looks, `products of q and k, ${range(products)}`),
      line(`divided by √${D} = ${digits(root, 4)}: score ${digits(dot / root, 7)}`),
      line(
        masked
          ? "mask: the key comes later than the query, so its score becomes −∞"
          : "mask: the key is not later than the query, so the score stays",
      ),
      line(softmax, make("strong", { class: "weight" }, digits(weight, 7))),
      line(`weight × v adds to the head's output, ${range(adds)}:`),
      this.bars(adds, this.colours.seen, `weight times value, ${range(adds)}`),
    );
  }

  // --- keeping: the view as a vector picture, or that drawn in pixels

  svg() {
    const { title } = this.data;
    const { layer, head } = this.state;
    const name = `${title ? `${title}: ` : ""}${this.longNameOf(layer, head)}`;
    const drawing = new Drawing(640, 90, this.colours);
    drawing.write(drawing.margin, 14, name, 'font-family="sans-serif"');
    this.drawHeat(drawing);
    return drawing.page(this.drawText(drawing) + 20);
  }

  drawHeat(drawing) {
    const { T, tokens, weight } = this.data;
    const { layer, head } = this.state;
    const { margin, size, colours } = drawing;
    const cell = (size - margin) / T;
    for (let q = 0; q < T; q++)
      for (let k = 0; k <= q; k++) {
        const w = weight(layer, head, q, k);
        const [x, y] = [margin + k * cell, margin + 20 + q * cell];
        if (w >= 1e-3) drawing.fill(x, y, cell, cell, colours.looks, strength(w));
      }
    drawing.frame();
    for (let t = 0; t < T; t += Math.ceil(10 / cell)) {
      const at = margin + (t + 0.5) * cell;
      const turned = `rotate(-90 ${(at + 4).toFixed(1)} ${margin + 16})`;
      drawing.write(margin - 4, at + 24, shortened(tokens[t]), `text-anchor="end" ${MONO}`);
      drawing.write(at + 4, margin + 16, shortened(tokens[t]), `transform="${turned}" ${MONO}`);
    }
  }

  // the tokens below the map, in lines; gives back where they end
  drawText(drawing) {
    const { token, key } = this.state;
    const { margin, size, colours } = drawing;
    let [x, y] = [margin, size + 50];
    for (const [t, word] of this.data.tokens.entries()) {
      const wide = [...shown(word)].length * 6.7;
      const { ink, kind } = this.shadeOf(t);
      let marks = "";
      if (t === token) marks = ' font-weight="bold" text-decoration="underline"';
      else if (t === key) marks = ' text-decoration="underline"';
      if (x + wide > size) {
        x = margin;
        y += 20;
      }
      drawing.fill(x, y - 12, wide, 16, colours[kind], ink);
      const width = `textLength="${wide.toFixed(1)}" xml:space="preserve"`;
      drawing.write(x, y, shown(word), `${MONO} ${width}${marks}`);
      x += wide;
      if (endsLine(word)) {
        x = margin;
        y += 20;
      }
    }
    return y;
  }

  async png() {
    const image = new Image();
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(this.svg())}`;
    await image.decode();
    const canvas = new OffscreenCanvas(2 * image.width, 2 * image.height);
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    return canvas.convertToBlob();
  }

  async save(kind) {
    const { layer, head } = this.state;
    const vector = () => new Blob([this.svg()], { type: "image/svg+xml" });
    const href = URL.createObjectURL(kind === "svg" ? vector() : await this.png());
    make("a", { href, download: `attention-${this.nameOf(layer, head)}.${kind}` }).click();
    setTimeout(() => URL.revokeObjectURL(href), 1000);
  }

  // --- light or dark, and whenever that or the width changes

  dress() {
    const { host, data } = this;
    host.dataset.theme = isDark(host.parentElement) ? "dark" : "light";
    const style = getComputedStyle(host);
    const get = (name) => style.getPropertyValue(name).trim();
    const rgb = (name) => get(name).split(" ").map(Number);
    this.colours = {
      ink: get("--ink"),
      line: get("--line"),
      paper: get("--paper"),
      looks: rgb("--looks"),
      seen: rgb("--seen"),
    };
    this.picture = null;
    for (const { layer, head, canvas } of this.all) {
      const weights = triangle(data.head(layer, head), data.T, canvas.width, this.colours.looks);
      canvas.getContext("2d").putImageData(weights, 0, 0);
    }
    const context = this.scale.getContext("2d");
    context.clearRect(0, 0, 150, 12);
    for (let x = 0; x < 150; x++) {
      context.fillStyle = `rgb(${this.colours.looks.join(" ")} / ${strength(x / 149)})`;
      context.fillRect(x, 0, 1, 12);
    }
    this.paint();
  }

  // gives back a function that ends it
  watch() {
    const { host } = this;
    const redress = () => {
      const changed = (host.dataset.theme === "dark") !== isDark(host.parentElement);
      if (host.isConnected && changed) this.dress();
    };
    const theme = new MutationObserver(redress);
    const preference = matchMedia("(prefers-color-scheme: dark)");
    const width = new ResizeObserver(() => this.paintHeat());
    for (const node of [document.documentElement, document.body])
      theme.observe(node, { attributes: true });
    preference.addEventListener("change", redress);
    width.observe(this.heat);
    return () => {
      theme.disconnect();
      width.disconnect();
      preference.removeEventListener("change", redress);
    };
  }
}

function makeToken(token, t) {
  const attributes = {
    role: "option",
    id: `t${t}`,
    "aria-selected": "false",
    "aria-label": `${t} ${quoted(token)}`,
    class: endsLine(token) ? "line" : "",
  };
  return make("span", attributes, make("bdi", {}, shown(token)));
}

// --- a vector picture, part by part

const MONO = 'font-family="monospace"';

// XML has no place for control characters and halves of a surrogate pair
function escapeXml(text) {
  return (
    text
      // biome-ignore lint/suspicious/noControlCharactersInRegex: these are what it looks for
      .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g, "�")
      .replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "�")
      .replace(/[<>&"]/g, (c) => `&#${c.charCodeAt(0)};`)
  );
}

class Drawing {
  constructor(size, margin, colours) {
    Object.assign(this, { size, margin, colours, parts: [] });
  }

  write(x, y, text, attributes) {
    const place = `x="${x.toFixed(1)}" y="${y.toFixed(1)}"`;
    const style = `fill="${this.colours.ink}" font-size="11" ${attributes}`;
    this.parts.push(`<text ${place} ${style}>${escapeXml(text)}</text>`);
  }

  fill(x, y, width, height, colour, ink) {
    const place = `x="${x.toFixed(2)}" y="${y.toFixed(2)}"`;
    const size = `width="${width.toFixed(2)}" height="${height.toFixed(2)}"`;
    const style = `fill="rgb(${colour.join(",")})" fill-opacity="${ink.toFixed(3)}"`;
    this.parts.push(`<rect ${place} ${size} ${style}/>`);
  }

  frame() {
    const side = this.size - this.margin;
    const place = `x="${this.margin}" y="${this.margin + 20}" width="${side}" height="${side}"`;
    this.parts.push(`<rect ${place} fill="none" stroke="${this.colours.line}"/>`);
  }

  page(height) {
    const width = this.size + 20;
    const size = `width="${width}" height="${height}" viewBox="0 0 ${width} ${height}"`;
    const paper = `<rect width="100%" height="100%" fill="${this.colours.paper}"/>`;
    const picture = `${paper}${this.parts.join("")}`;
    return `<svg xmlns="http://www.w3.org/2000/svg" ${size}>${picture}</svg>`;
  }
}

// --- where it runs

// gives back a function that ends it
export async function drawMap(host, data) {
  const root = host.shadowRoot || host.attachShadow({ mode: "open" });
  // JupyterLab's keys act on notebooks; ours are meant for the map
  host.setAttribute("data-lm-suppress-shortcuts", "true");
  const view = new MapView(host, data);
  root.replaceChildren(make("style", {}, STYLE), view.layout());
  view.dress();
  view.arrange({});
  const end = view.watch();
  host.attentionMap = {
    tokens: data.tokens,
    size: { layers: data.layers.length, heads: data.heads.length, tokens: data.T },
    state: view.state,
    choose: (change) => view.choose(change),
    weight: data.weight,
    why: data.why,
    svg: () => view.svg(),
    png: () => view.png(),
  };
  host.dataset.ready = "true";
  return end;
}

// for anywidget
function render({ model, el }) {
  let stop = Promise.resolve(); // of the map drawn last
  const draw = () => {
    const old = el.firstElementChild?.attentionMap?.state;
    const host = make("div");
    el.replaceChildren(host);
    stop = stop
      .then((end) => {
        end?.();
        return read(model.get("data"));
      })
      .then((data) => drawMap(host, data))
      .then((end) => {
        // another prompt, the same head
        if (old) host.attentionMap.choose({ layer: old.layer, head: old.head });
        return end;
      });
  };
  model.on("change:data", draw);
  draw();
  return () => {
    model.off("change:data", draw);
    stop.then((end) => end?.());
  };
}

// maps side by side: one layer and head for all, and one token where the texts are the same
function link(row) {
  row.addEventListener("attention-choose", ({ target }) => {
    const { tokens, state } = target.attentionMap;
    for (const { attentionMap: other } of row.querySelectorAll(".attention-map")) {
      if (!other || other.state === state) continue;
      const sameText = other.tokens.join("\0") === tokens.join("\0");
      const linked = ["layer", "head", ...(sameText ? ["token", "key", "pinned"] : [])];
      if (linked.some((name) => other.state[name] !== state[name]))
        other.choose(Object.fromEntries(linked.map((name) => [name, state[name]])));
    }
  });
}

export default { render };

// on a page, or in the output of a cell
for (const host of document.querySelectorAll(".attention-map:not([data-begun])")) {
  host.dataset.begun = "true";
  read(JSON.parse(host.querySelector("script").textContent))
    .then((data) => drawMap(host, data))
    .catch((error) =>
      (host.shadowRoot || host).append(` the map cannot be drawn: ${error.message}`),
    );
}
for (const row of document.querySelectorAll(".attention-maps:not([data-begun])")) {
  row.dataset.begun = "true";
  link(row);
}
