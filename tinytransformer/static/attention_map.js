// The attention map: one ES module without dependencies. On a page it draws every `.attention-map` that is not drawn yet;
// as a widget, anywidget calls `render`. How it is made is told in nbs/appendix/attention_map.ipynb, which also makes the data.

// --- style

const STYLE = `
:host { display: block; margin: .5em 0; --ink: #1b1b1b; --soft: #5c5c5c; --paper: #ffffff; --line: #c9c9c9; --looks: 0 90 160; --seen: 190 75 0; --focus: #7a00cc }
:host([data-theme=dark]) { --ink: #ececec; --soft: #b4b4b4; --paper: #141414; --line: #4a4a4a; --looks: 92 184 255; --seen: 255 150 60; --focus: #ffd54a }
* { box-sizing: border-box }
.map { container-type: inline-size; background: var(--paper); color: var(--ink); border: 1px solid var(--line); border-radius: 6px; padding: 10px; font: 14px/1.45 system-ui, sans-serif }
.bar { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin-bottom: 8px }
.bar strong { margin-right: auto }
select, input, button { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line); border-radius: 4px; min-height: 26px; padding: 1px 6px }
input { width: 5.5em }
button { cursor: pointer }
:focus { outline: none }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 1px }
.heads { display: flex; flex-wrap: wrap; gap: 3px; max-height: 250px; overflow: auto; padding: 4px; margin-bottom: 8px }
.heads.grid { display: grid; justify-content: start }
.heads button { padding: 2px; border-color: transparent; line-height: 1.15; font-size: 11px; min-width: calc(var(--side) + 6px) }
.heads button[aria-checked=true] { border-color: var(--ink); background: rgb(var(--looks) / .16); font-weight: bold }
.heads canvas { display: block; width: var(--side); height: var(--side); margin: auto; border: 1px solid var(--line) }
.views { display: grid; grid-template-columns: minmax(0, 1fr); gap: 12px }
@container (min-width: 760px) { .views { grid-template-columns: minmax(0, 480px) minmax(0, 1fr) } }
.heat { display: block; width: 100%; touch-action: manipulation; cursor: crosshair }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; font: 14px/1.9 ui-monospace, monospace; max-height: 290px; overflow: auto; padding: 4px; border: 1px solid var(--line); border-radius: 4px }
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
table { border-collapse: collapse; font-variant-numeric: tabular-nums } th, td { padding: 1px 8px; text-align: right; border-bottom: 1px solid var(--line) }
td:nth-child(2), th:nth-child(2) { text-align: left; font-family: ui-monospace, monospace; white-space: pre }
[hidden] { display: none !important }
`;

// --- data: what Python has packed

async function unpack(text) {  // base64 of a zlib stream -> its bytes
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
}

async function read(data) {
  const { tokens, layers, heads, bits, floor } = data, T = tokens.length, size = (T * (T + 1)) / 2, top = 2 ** bits - 1;
  const buffer = await unpack(data.weights);
  const codes = bits === 8 ? new Uint8Array(buffer) : new Uint16Array(buffer);
  const value = Float64Array.from({ length: top + 1 }, (_, c) => (c ? floor ** ((top - c) / (top - 1)) : 0));  // equal steps of the logarithm
  const vectors = data.vectors && new Float32Array(await unpack(data.vectors));
  const D = data.head_dim, means = new Map();
  const start = (l, h) => (l * heads.length + h) * size;
  const head = (l, h) => {  // its triangle of weights, row by row; h = -1 is the mean of the layer
    if (h >= 0) return { at: (i) => value[codes[start(l, h) + i]] };
    if (!means.has(l)) {
      const mean = new Float64Array(size);
      heads.forEach((_, j) => { for (let i = 0, s = start(l, j); i < size; i++) mean[i] += value[codes[s + i]] / heads.length; });
      means.set(l, mean);
    }
    return { at: (i) => means.get(l)[i] };
  };
  const weight = (l, h, q, k) => (k > q ? 0 : head(l, h).at((q * (q + 1)) / 2 + k));
  const vector = (kind, l, h, t) => {  // q, k or v: (3, layers, heads, T, D)
    const i = (((kind * layers.length + l) * heads.length + h) * T + t) * D;
    return vectors.subarray(i, i + D);
  };
  const why = (l, h, q, k) => {  // every step from two vectors to one weight
    const query = vector(0, l, h, q), scores = [];
    for (let t = 0; t <= q; t++) scores.push(query.reduce((sum, x, d) => sum + x * vector(1, l, h, t)[d], 0) / Math.sqrt(D));
    const most = Math.max(...scores), total = scores.reduce((sum, s) => sum + Math.exp(s - most), 0);
    const products = Array.from(query, (x, d) => x * vector(1, l, h, k)[d]), weight = k > q ? 0 : Math.exp(scores[k] - most) / total;
    return { products, dot: products.reduce((a, b) => a + b, 0), scores, total, most, weight, adds: Array.from(vector(2, l, h, k), (x) => x * weight) };
  };
  return { ...data, T, size, head, weight, why, explains: Boolean(vectors) };
}

// --- small helpers

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) name.startsWith("on") ? node.addEventListener(name.slice(2), value) : node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const shown = (token) => token.replace(/\n/g, "⏎").replace(/\r/g, "␍").replace(/\t/g, "⇥") || "∅";  // what cannot be seen gets a sign
const quoted = (token) => `“${shown(token)}”`;
const digits = (x, n = 4) => (x === 0 ? "0" : Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5 ? x.toExponential(n - 1) : x.toPrecision(n));
const strength = Math.sqrt;  // a weight of 0.01 is drawn with a tenth of the ink, so that it can still be seen

function isDark(node) {  // of what surrounds us: Quarto, JupyterLab, or a bare page
  const body = document.body;
  if (body.classList.contains("quarto-dark") || body.dataset.jpThemeLight === "false") return true;
  if (body.classList.contains("quarto-light") || body.dataset.jpThemeLight === "true") return false;
  for (let at = node; at; at = at.parentElement) {
    const [r, g, b, a = 1] = (getComputedStyle(at).backgroundColor.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
    if (a > 0.5) return 0.3 * r + 0.6 * g + 0.1 * b < 110;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

function triangle(head, T, n, [r, g, b]) {  // an n x n picture of the weights; where cells share a pixel, the largest shows
  const picture = new ImageData(n, n);
  for (let q = 0, i = 0; q < T; q++)
    for (let k = 0, row = Math.floor((q * n) / T) * n; k <= q; k++, i++) {
      const p = 4 * (row + Math.floor((k * n) / T)), ink = 255 * strength(head.at(i));
      if (ink > picture.data[p + 3]) { picture.data[p] = r; picture.data[p + 1] = g; picture.data[p + 2] = b; picture.data[p + 3] = ink; }
    }
  return picture;
}

// --- the map

async function drawMap(host, packed) {
  const root = host.shadowRoot || host.attachShadow({ mode: "open" });
  host.setAttribute("data-lm-suppress-shortcuts", "true");  // JupyterLab's keys act on notebooks; ours are meant for the map
  const data = await read(packed), { T, tokens, layers, heads, statistics } = data, names = Object.keys(statistics);
  const all = layers.flatMap((_, layer) => heads.map((_, head) => ({ layer, head })));
  const state = { layer: 0, head: 0, token: T - 1, key: null, pinned: false, sort: "", least: -Infinity };
  host.style.setProperty("--side", all.length > 24 ? "46px" : "76px");
  let colours = {}, order = all, picture = null;

  // the parts
  const pick = (label, options, change) => make("label", {}, label + " ", make("select", { onchange: (e) => change(e.target.value) }, ...options.map(([value, text]) => make("option", { value }, text))));
  const layerPick = pick("layer", layers.map((name, i) => [i, name]), (value) => choose({ layer: +value }));
  const headPick = pick("head", [...heads.map((name, i) => [i, name]), [-1, "mean"]], (value) => choose({ head: +value }));
  const sortPick = pick("order", [["", "layer, head"], ...names.map((name) => [name, name])], (value) => arrange({ sort: value, least: -Infinity }));
  const least = make("input", { type: "number", step: "any", onchange: (e) => arrange({ least: e.target.value === "" ? -Infinity : +e.target.value }) });
  const filter = make("label", {}, "at least ", least);
  const valuesButton = make("button", { type: "button", "aria-expanded": "false", onclick: () => { values.hidden = !values.hidden; valuesButton.setAttribute("aria-expanded", String(!values.hidden)); paint(); } }, "values");
  const headList = make("div", { class: "heads", role: "radiogroup", "aria-label": "heads; arrow keys choose" });
  const heat = make("canvas", { class: "heat", tabindex: "0", role: "application", "aria-label": "heat map: a row for each query, a column for each key; arrow keys move, Enter pins, Escape lets go" });
  const text = make("div", { class: "text", role: "listbox", tabindex: "0", "aria-label": "tokens; arrow keys choose, Enter pins, Escape lets go" });
  const readout = make("div", { class: "readout", role: "status", "aria-live": "polite" });
  const values = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "weights of the chosen token", hidden: "" });
  const why = make("div", { class: "why", role: "region", "aria-label": "why this weight", hidden: "" });
  const scale = make("canvas", { class: "scale", width: 150, height: 12, role: "img", "aria-label": "colour scale from 0 to 1" });
  const spans = tokens.map((token, t) => make("span", { role: "option", id: `t${t}`, "aria-selected": "false", "aria-label": `${t} ${quoted(token)}`, class: /\n$/.test(token) ? "line" : "" }, make("bdi", {}, shown(token))));
  text.append(...spans);
  const map = make("div", { class: "map" },
    make("div", { class: "bar" }, make("strong", {}, data.title), layerPick, headPick, sortPick, filter, valuesButton,
      make("button", { type: "button", onclick: () => save("svg") }, "SVG"), make("button", { type: "button", onclick: () => save("png") }, "PNG")),
    headList,
    make("div", { class: "views" }, make("div", {}, heat, make("div", { class: "bar soft" }, "weight 0 ", scale, " 1 (√ scale)")),
      make("div", {}, make("div", { class: "soft" }, "shade: ", make("span", { class: "key-looks" }, "what the chosen token looks at"), " ", make("span", { class: "key-seen" }, "who looks at it")), text, readout, values, why)));
  root.replaceChildren(make("style", {}, STYLE), map);

  // choosing
  function choose(change) {
    const before = { ...state };
    Object.assign(state, change);
    if (state.layer !== before.layer || state.head !== before.head) picture = null;
    paint();
    if (host.attentionMap) host.dispatchEvent(new CustomEvent("attention-choose", { bubbles: true }));
  }
  function arrange(change) {
    Object.assign(state, change);
    const value = ({ layer, head }) => statistics[state.sort][layer][head] ?? -Infinity;
    order = state.sort ? all.filter((h) => value(h) >= state.least).sort((a, b) => value(b) - value(a)) : all;
    filter.hidden = !state.sort;
    if (state.least === -Infinity) least.value = "";
    headList.classList.toggle("grid", !state.sort);
    headList.style.gridTemplateColumns = state.sort ? "" : `repeat(${heads.length}, max-content)`;
    headList.replaceChildren(...order.map((h) => h.button));
    if (!order.length) headList.append(`no head has ${state.sort} of ${state.least} or more`);
    for (const h of order) h.caption.textContent = name(h.layer, h.head) + (state.sort ? ` ${digits(statistics[state.sort][h.layer][h.head] ?? NaN, 2)}` : "");
    paint();
  }
  const name = (l, h) => `${layers[l]}.${h < 0 ? "mean" : heads[h]}`;
  const same = (h) => h.layer === state.layer && h.head === state.head;
  const point = (token, key = null) => { if (!state.pinned) choose({ token, key }); };
  const pin = (token, key = null) => choose(state.pinned && state.token === token && state.key === key ? { pinned: false } : { token, key, pinned: true });
  const clamp = (t) => Math.max(0, Math.min(T - 1, t));

  for (const h of all) {
    h.canvas = make("canvas", { width: Math.min(T, 64), height: Math.min(T, 64), style: T < 64 ? "image-rendering: pixelated" : "" });
    h.caption = make("span", {}, name(h.layer, h.head));
    const said = () => `layer ${layers[h.layer]}, head ${heads[h.head]}` + names.map((n) => `, ${n} ${digits(statistics[n][h.layer][h.head] ?? NaN, 3)}`).join("");
    h.button = make("button", { type: "button", role: "radio", "aria-checked": "false", "aria-label": said(), title: said(), onclick: () => choose({ layer: h.layer, head: h.head }) }, h.canvas, h.caption);
  }
  const keys = (node, act) => node.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (act(event.key)) event.preventDefault();
  });
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  keys(headList, (key) => {
    if (!step[key] && key !== "Home" && key !== "End") return false;
    const columns = state.sort ? Math.max(1, order.filter((h) => h.button.offsetTop === order[0].button.offsetTop).length) : heads.length;
    const at = order.findIndex(same), to = key === "Home" ? 0 : key === "End" ? order.length - 1 : at + step[key][0] * columns + step[key][1];
    if (order[to]) { choose({ layer: order[to].layer, head: order[to].head }); order[to].button.focus(); }
    return true;
  });
  keys(text, (key) => {
    const t = state.token, rows = { ArrowLeft: t - 1, ArrowRight: t + 1, ArrowUp: t - 10, ArrowDown: t + 10, Home: 0, End: T - 1 };
    if (key in rows) choose({ token: clamp(rows[key]), key: null });
    else if (key === "Enter" || key === " ") pin(t, null);
    else if (key === "Escape") choose({ pinned: false, key: null });
    else return false;
    spans[state.token].scrollIntoView?.({ block: "nearest" });
    return true;
  });
  keys(heat, (key) => {
    const q = state.token, k = state.key ?? q;
    if (step[key]) choose({ token: clamp(q + step[key][0]), key: clamp(k + step[key][1]) });
    else if (key === "Home") choose({ key: 0 });
    else if (key === "End") choose({ key: q });
    else if (key === "Enter" || key === " ") pin(q, k);
    else if (key === "Escape") choose({ pinned: false, key: null });
    else return false;
    return true;
  });
  const place = () => { const width = heat.clientWidth || 400, margin = Math.min(90, width / 4); return { width, margin, cell: (width - margin) / T }; };
  const cellAt = (event) => {
    const { margin, cell } = place(), t = (x) => Math.floor((x - margin) / cell), q = t(event.offsetY), k = t(event.offsetX);
    return q >= 0 && q < T && k >= 0 && k < T ? [q, k] : null;
  };
  heat.addEventListener("pointermove", (event) => { const cell = cellAt(event); if (cell) point(...cell); });
  heat.addEventListener("click", (event) => { const cell = cellAt(event); if (cell) pin(...cell); });
  const tokenAt = (event) => spans.indexOf(event.target.closest?.("[role=option]"));
  text.addEventListener("pointerover", (event) => { const t = tokenAt(event); if (t >= 0) point(t); });
  text.addEventListener("click", (event) => { const t = tokenAt(event); if (t >= 0) pin(t); });

  // drawing
  function paint() {
    layerPick.querySelector("select").value = state.layer;
    headPick.querySelector("select").value = state.head;
    for (const h of all) {
      h.button.setAttribute("aria-checked", String(same(h)));
      h.button.tabIndex = same(h) || (!order.some(same) && h === order[0]) ? 0 : -1;
    }
    paintHeat();
    paintText();
    readout.replaceChildren(...sentence());
    if (!values.hidden) values.replaceChildren(table());
    paintWhy();
  }
  function paintHeat() {
    const { width, margin, cell } = place(), ratio = devicePixelRatio || 1, context = heat.getContext("2d");
    if (!picture) {
      picture = new OffscreenCanvas(T, T);
      picture.getContext("2d").putImageData(triangle(data.head(state.layer, state.head), T, T, colours.looks), 0, 0);
    }
    if (heat.width !== Math.round(width * ratio)) { heat.width = heat.height = Math.round(width * ratio); heat.style.height = `${width}px`; }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, width);
    context.imageSmoothingEnabled = false;
    context.drawImage(picture, margin, margin, width - margin, width - margin);
    context.strokeStyle = colours.line;
    context.strokeRect(margin, margin, width - margin, width - margin);
    context.fillStyle = context.strokeStyle = colours.ink;
    const { token: q, key: k } = state;
    if (cell >= 3) context.strokeRect(margin, margin + q * cell, width - margin, cell);
    else context.strokeRect(margin, margin + q * cell - 1, width - margin, cell + 2);
    if (k !== null) context.strokeRect(margin + k * cell, margin, cell, width - margin);
    const every = Math.ceil(11 / cell), label = (t, chosen, write) => {
      if (!chosen && t % every) return;
      context.font = `${chosen ? "bold " : ""}10px ui-monospace, monospace`;
      write([...(shown(tokens[t]).trim() || "␣")].slice(0, 12).join(""), margin + (t + 0.5) * cell);
    };
    const near = (t, chosen) => t !== chosen && Math.abs(t - chosen) * cell < 11;  // would be written over the chosen one
    for (let t = 0; t < T; t++) {
      if (!near(t, q)) label(t, t === q, (word, at) => { context.textAlign = "right"; context.textBaseline = "middle"; context.fillText(word, margin - 4, at); });
      if (k === null || !near(t, k)) label(t, t === k, (word, at) => { context.save(); context.translate(at, margin - 4); context.rotate(-Math.PI / 2); context.textAlign = "left"; context.textBaseline = "middle"; context.fillText(word, 0, 0); context.restore(); });
    }
  }
  function paintText() {
    const { layer, head, token } = state;
    spans.forEach((span, t) => {
      const ink = 0.5 * strength(t <= token ? data.weight(layer, head, token, t) : data.weight(layer, head, t, token));
      span.style.background = ink ? `rgb(var(--${t <= token ? "looks" : "seen"}) / ${ink.toFixed(3)})` : "";
      span.classList.toggle("key", t === state.key);
      if ((span.getAttribute("aria-selected") === "true") !== (t === token)) span.setAttribute("aria-selected", String(t === token));
    });
    text.setAttribute("aria-activedescendant", `t${token}`);
  }
  function amount(q, k, n = 4) {  // in as many digits as are known
    if (k > q) return "masked: it comes later";
    if (data.explains && state.head >= 0) return digits(data.why(state.layer, state.head, q, k).weight, n);
    const weight = data.weight(state.layer, state.head, q, k);
    return weight ? digits(weight, data.bits === 8 ? 3 : 4) : `less than ${data.floor}`;
  }
  function sentence() {
    const { layer, head, token, key, pinned } = state, rows = Array.from({ length: token + 1 }, (_, t) => t).sort((a, b) => data.weight(layer, head, token, b) - data.weight(layer, head, token, a));
    const place = `layer ${layers[layer]}, ${head < 0 ? "mean of its heads" : `head ${heads[head]}`}`;
    const said = key === null ? `looks most at ${rows.slice(0, 3).map((t) => `${quoted(tokens[t])} (${t}) ${amount(token, t)}`).join(", ")}` : `looks at ${quoted(tokens[key])} (${key}): ${amount(token, key)}`;
    return [make("span", { class: "soft" }, place + (pinned ? ", pinned: " : ": ")), `${quoted(tokens[token])} (${token}) ${said}`];
  }
  function table() {
    const { token } = state, cells = (tag, ...texts) => make("tr", {}, ...texts.map((x) => make(tag, tag === "th" ? { scope: "col" } : {}, x)));
    const rows = tokens.map((word, t) => cells("td", String(t), shown(word), t <= token ? amount(token, t, 7) : "–", t >= token ? amount(t, token, 7) : "–"));
    return make("table", {}, make("thead", {}, cells("th", "place", "token", `${quoted(tokens[token])} looks at it`, `it looks at ${quoted(tokens[token])}`)), make("tbody", {}, ...rows));
  }
  function bars(numbers, colour, label) {
    const canvas = make("canvas", { width: 600, height: 64, role: "img", "aria-label": label }), context = canvas.getContext("2d");
    const most = Math.max(...numbers.map(Math.abs)) || 1, wide = 600 / numbers.length;
    context.fillStyle = `rgb(${colour.join(" ")})`;
    numbers.forEach((x, d) => context.fillRect(d * wide + 1, x > 0 ? 32 - (30 * x) / most : 32, Math.max(1, wide - 2), (30 * Math.abs(x)) / most));
    context.fillStyle = colours.line;
    context.fillRect(0, 32, 600, 1);
    return canvas;
  }
  function paintWhy() {
    const { layer, head, token: q, key: k } = state;
    why.hidden = !data.explains || head < 0 || k === null;
    if (why.hidden) return;
    const w = data.why(layer, head, q, k), root = Math.sqrt(data.head_dim), line = (...words) => make("p", {}, ...words);
    const range = (numbers) => `from ${digits(Math.min(...numbers), 3)} to ${digits(Math.max(...numbers), 3)}`;
    why.replaceChildren(make("strong", {}, `Why ${quoted(tokens[q])} (${q}) gives ${quoted(tokens[k])} (${k}) this weight`),
      line(`q · k = ${digits(w.dot, 7)}, summed over ${data.head_dim} dimensions:`), bars(w.products, colours.looks, `products of q and k, ${range(w.products)}`),
      line(`divided by √${data.head_dim} = ${digits(root, 4)}: score ${digits(w.dot / root, 7)}`),
      line(k > q ? "mask: the key comes later than the query, so its score becomes −∞" : "mask: the key is not later than the query, so the score stays"),
      line(k > q ? "softmax: e to the −∞ is 0, so the weight is " : `softmax over ${q + 1} keys, of which the best has score ${digits(w.most, 4)}: e^(score − best) / ${digits(w.total, 7)} = `, make("strong", { class: "weight" }, digits(w.weight, 7))),
      line(`weight × v adds to the head's output, ${range(w.adds)}:`), bars(w.adds, colours.seen, `weight times value, ${range(w.adds)}`));
  }

  // keeping: the view as a vector picture, or that drawn in pixels
  function svg() {
    const size = 640, margin = 90, cell = (size - margin) / T, { layer, head, token, key } = state, rgb = (c) => `rgb(${c.join(",")})`, mono = 'font-family="monospace"';
    const safe = (s) => s.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g, "�").replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "�").replace(/[<>&"]/g, (c) => `&#${c.charCodeAt(0)};`);
    const parts = [], every = Math.ceil(10 / cell), say = (x, y, words, more = "") => parts.push(`<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" fill="${colours.ink}" font-size="11" ${more}>${safe(words)}</text>`);
    const box = (x, y, w, h, c, ink) => parts.push(`<rect x="${x.toFixed(2)}" y="${y.toFixed(2)}" width="${w.toFixed(2)}" height="${h.toFixed(2)}" fill="${rgb(c)}" fill-opacity="${ink.toFixed(3)}"/>`);
    say(margin, 14, `${data.title ? data.title + ": " : ""}layer ${layers[layer]}, ${head < 0 ? "mean of its heads" : `head ${heads[head]}`}`, 'font-family="sans-serif"');
    for (let q = 0; q < T; q++) for (let k = 0; k <= q; k++) { const w = data.weight(layer, head, q, k); if (w >= 1e-3) box(margin + k * cell, margin + 20 + q * cell, cell, cell, colours.looks, strength(w)); }
    parts.push(`<rect x="${margin}" y="${margin + 20}" width="${size - margin}" height="${size - margin}" fill="none" stroke="${colours.line}"/>`);
    for (let t = 0; t < T; t++) if (t % every === 0) {
      const word = [...(shown(tokens[t]).trim() || "␣")].slice(0, 12).join(""), at = margin + (t + 0.5) * cell;
      say(margin - 4, at + 24, word, `text-anchor="end" ${mono}`);
      say(at + 4, margin + 16, word, `transform="rotate(-90 ${(at + 4).toFixed(1)} ${margin + 16})" ${mono}`);
    }
    let x = margin, y = size + 50;
    tokens.forEach((word, t) => {
      const letters = [...shown(word)].length * 6.7, w = t <= token ? data.weight(layer, head, token, t) : data.weight(layer, head, t, token);
      if (x + letters > size) { x = margin; y += 20; }
      box(x, y - 12, letters, 16, t <= token ? colours.looks : colours.seen, 0.5 * strength(w));
      say(x, y, shown(word), `${mono} textLength="${letters.toFixed(1)}" xml:space="preserve"${t === token ? ' font-weight="bold" text-decoration="underline"' : t === key ? ' text-decoration="underline"' : ""}`);
      x += letters;
      if (/\n$/.test(word)) { x = margin; y += 20; }
    });
    return `<svg xmlns="http://www.w3.org/2000/svg" width="${size + 20}" height="${y + 20}" viewBox="0 0 ${size + 20} ${y + 20}"><rect width="100%" height="100%" fill="${colours.paper}"/>${parts.join("")}</svg>`;
  }
  async function png() {
    const image = new Image();
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg())}`;
    await image.decode();
    const canvas = new OffscreenCanvas(2 * image.width, 2 * image.height);
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    return canvas.convertToBlob();
  }
  async function save(kind) {
    const blob = kind === "svg" ? new Blob([svg()], { type: "image/svg+xml" }) : await png(), href = URL.createObjectURL(blob);
    make("a", { href, download: `attention-${name(state.layer, state.head)}.${kind}` }).click();
    setTimeout(() => URL.revokeObjectURL(href), 1000);
  }

  // light or dark, and whenever that or the width changes
  function dress() {
    host.dataset.theme = isDark(host.parentElement) ? "dark" : "light";
    const style = getComputedStyle(host), get = (name) => style.getPropertyValue(name).trim(), rgb = (name) => get(name).split(" ").map(Number);
    colours = { ink: get("--ink"), line: get("--line"), paper: get("--paper"), looks: rgb("--looks"), seen: rgb("--seen") };
    picture = null;
    for (const h of all) h.canvas.getContext("2d").putImageData(triangle(data.head(h.layer, h.head), T, h.canvas.width, colours.looks), 0, 0);
    const context = scale.getContext("2d");
    context.clearRect(0, 0, 150, 12);
    for (let x = 0; x < 150; x++) { context.fillStyle = `rgb(${colours.looks.join(" ")} / ${strength(x / 149)})`; context.fillRect(x, 0, 1, 12); }
    paint();
  }
  const redress = () => { if (host.isConnected && (host.dataset.theme === "dark") !== isDark(host.parentElement)) dress(); };
  const watcher = new MutationObserver(redress), preference = matchMedia("(prefers-color-scheme: dark)");
  for (const node of [document.documentElement, document.body]) watcher.observe(node, { attributes: true });
  preference.addEventListener("change", redress);
  const sizes = new ResizeObserver(() => paintHeat());
  dress();
  arrange({});
  sizes.observe(heat);
  host.attentionMap = { tokens, size: { layers: layers.length, heads: heads.length, tokens: T }, state, choose, weight: data.weight, why: data.why, svg, png };
  host.dataset.ready = "true";
  return () => { watcher.disconnect(); sizes.disconnect(); preference.removeEventListener("change", redress); };
}

// --- where it runs

export default {  // anywidget
  render({ model, el }) {
    let stop = Promise.resolve();  // of the map drawn last
    const draw = () => {
      const old = el.firstElementChild?.attentionMap?.state, host = make("div");
      el.replaceChildren(host);
      stop = stop.then((end) => { end?.(); return drawMap(host, model.get("data")); }).then((end) => {
        if (old) host.attentionMap.choose({ layer: old.layer, head: old.head });  // another prompt, the same head
        return end;
      });
    };
    model.on("change:data", draw);
    draw();
    return () => { model.off("change:data", draw); stop.then((end) => end?.()); };
  },
};

for (const host of document.querySelectorAll(".attention-map:not([data-begun])")) {  // a page, or the output of a cell
  host.dataset.begun = "true";
  drawMap(host, JSON.parse(host.querySelector("script").textContent)).catch((error) => (host.shadowRoot || host).append(` the map cannot be drawn: ${error.message}`));
}
for (const row of document.querySelectorAll(".attention-maps:not([data-begun])")) {  // side by side: one layer and head for all, and one token where the texts are the same
  row.dataset.begun = "true";
  row.addEventListener("attention-choose", ({ target }) => {
    const { tokens, state } = target.attentionMap;
    for (const { attentionMap: other } of row.querySelectorAll(".attention-map")) {
      const linked = ["layer", "head", ...(other?.tokens.join("\0") === tokens.join("\0") ? ["token", "key", "pinned"] : [])];
      if (other?.state !== state && linked.some((name) => other?.state[name] !== state[name])) other?.choose(Object.fromEntries(linked.map((name) => [name, state[name]])));
    }
  });
}
