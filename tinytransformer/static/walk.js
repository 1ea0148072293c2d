// Follow one token: a walk through the model in steps, with the numbers of the reader's own text.
// nbs/appendix/model_page.ipynb describes it. The steps and what they say are in walk_steps.js.
import { make, visible } from "parts";
import { STEPS } from "walk_steps";

const PAUSE = 4500; // milliseconds for a step when it plays; half as long again without motion
const CHAPTERS = {
  "00_data": "00, Data",
  "01_embeddings": "01, Embeddings",
  "02_attention": "02, Attention",
  "03_block": "03, Block",
  "04_model": "04, Model",
  "06_generate": "06, Generation",
};
const css = `
#walk { display: grid; grid-template-columns: minmax(0, 1fr); gap: .75rem 1.25rem; padding-top: .5rem }
@media (min-width: 48rem) { #walk { grid-template-columns: 15rem minmax(0, 1fr) } #walk .tools { grid-column: 1 / -1 } }
#walk .tools { display: flex; flex-wrap: wrap; gap: .4rem .8rem; align-items: end }
#walk select { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line); border-radius: 4px; padding: .25rem; max-width: 12rem; display: block }
#walk svg { width: 100%; max-width: 15rem; justify-self: center }
#walk svg text { font: 11.5px system-ui, sans-serif; fill: var(--ink) }
#walk svg rect { fill: var(--card); stroke: var(--line) }
#walk svg .frame { fill: none; stroke-dasharray: 5 4 }
#walk svg path { fill: none; stroke: var(--line); stroke-width: 1.5 }
#walk svg .stream { stroke-width: 4; opacity: .6 }
#walk svg .done rect { fill: var(--faint) }
#walk svg .now rect { fill: var(--blue); stroke: var(--blue) }
#walk svg .now text { fill: var(--on-blue); font-weight: 600 }
#walk svg g.part { cursor: pointer }
#walk .step { background: var(--card); border-radius: 6px; padding: .75rem 1rem; min-height: 27rem; min-width: 0 }
#walk .step h3 { font-size: 1.1rem; margin: 0 0 .25rem }
#walk .step h3 a { color: inherit; text-decoration-color: var(--line) }
#walk .formula { font-family: ui-serif, Georgia, serif; font-size: 1.1rem; font-style: italic; margin: .5rem 0 }
#walk .strip { margin: .5rem 0 }
#walk .cells { display: grid; grid-template-columns: repeat(auto-fill, minmax(.62rem, 1fr)); gap: 1px; border-radius: 3px }
#walk .cells.few { grid-template-columns: repeat(auto-fill, minmax(1.2rem, 1fr)) }
#walk .cells i { height: 1rem; background: color-mix(in srgb, var(--tone) var(--much), var(--paper)); border-radius: 1px }
#walk .cells i.hidden { background: repeating-linear-gradient(45deg, var(--line) 0 1px, transparent 1px 4px) }
#walk .cells i.at { outline: 2px solid var(--focus) }
#walk .label { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; font-size: .85rem }
#walk .bars { display: grid; grid-template-columns: minmax(0, 9rem) 1fr auto; gap: .15rem .6rem; align-items: center; font-size: .85rem; margin: .25rem 0 }
#walk .bars span { font-family: ui-monospace, monospace; overflow: hidden; text-overflow: ellipsis; white-space: pre }
#walk .bars b { height: .6rem; background: var(--blue); border-radius: 2px }
@media (max-width: 47.99rem) { #walk svg { max-width: 12rem } #walk .step { order: -1 } #walk .tools { order: -2 } }
`;

// --- the drawing of the model: [part, words, x, y, width]

const PARTS = [
  ["id", "token id", 10, 4, 90],
  ["token", "token table", 10, 42, 90],
  ["position", "position table", 116, 60, 108],
  ["norm1", "norm", 80, 112, 140],
  ["qkv", "query, key, value", 80, 142, 140],
  ["scores", "scores q · k / √D", 80, 172, 140],
  ["mask", "mask and softmax", 80, 202, 140],
  ["values", "weights × values", 80, 232, 140],
  ["join", "heads joined", 80, 262, 140],
  ["plus1", "+", 43, 290, 24],
  ["ffn", "norm, feed-forward", 80, 322, 140],
  ["layers", "× layers", 150, 362, 70],
  ["norm", "last norm", 10, 404, 90],
  ["head", "head: logits", 10, 436, 90],
  ["probabilities", "softmax", 10, 468, 90],
  ["drawn", "next token", 10, 500, 90],
];
const WIRES = [
  "M55 28V42M55 66V106M55 124H80M150 136V142M150 166V172M150 196V202M150 226V232M150 256V262",
  "M150 286V302H67M55 334H80M150 346V354H55M55 428V436M55 460V468M55 492V500",
];
const ADDED = "M116 72H55"; // the position, to the embedding
const ROTATED = "M224 72H240V154H220"; // rotary positions: to the queries and keys

function svg(tag, attributes = {}, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
}

function drawModel(go, isRotary) {
  const drawing = svg("svg", { viewBox: "0 0 244 530", role: "img" });
  drawing.append(svg("path", { d: WIRES.join("") + (isRotary ? ROTATED : ADDED) }));
  drawing.append(svg("path", { class: "stream", d: "M55 76V404" }));
  drawing.append(svg("rect", { class: "frame", x: 30, y: 96, width: 198, height: 296, rx: 8 }));
  for (const [part, usual, x, y, width] of PARTS) {
    const words = isRotary && part === "position" ? "rotary position" : usual;
    const group = svg("g", { class: "part", "data-part": part });
    group.append(svg("rect", { x, y, width, height: 24, rx: 6 }));
    group.append(svg("text", { x: x + width / 2, y: y + 16, "text-anchor": "middle" }, words));
    group.addEventListener("click", () => go(STEPS.find((step) => step.part === part).id));
    drawing.append(group);
  }
  return drawing;
}

function highlight(drawing, step) {
  const names = PARTS.map(([part]) => part);
  const now = names.indexOf(step.part);
  for (const group of drawing.querySelectorAll("[data-part]")) {
    const at = names.indexOf(group.dataset.part);
    group.setAttribute("class", `part ${at === now ? "now" : at < now ? "done" : ""}`);
  }
  const words = drawing.querySelector(".now text").textContent;
  drawing.setAttribute("aria-label", `The model; the present part is: ${words}`);
}

// --- numbers as colours

const written = (value) =>
  value === Number.NEGATIVE_INFINITY ? "−∞" : value.toFixed(3).replace("-", "−");

const largest = (values) =>
  values.reduce((a, b) => (Number.isFinite(b) ? Math.max(a, Math.abs(b)) : a), 1e-12);

/** What a step draws; where vectors are added, all of them have the same scale of colours. */
function drawNumbers(drawn, isSum) {
  const all = largest(drawn.flatMap(({ values }) => values ?? []));
  return drawn.map((d) => (d.rows ? drawBars(d) : drawStrip(d, isSum ? all : largest(d.values))));
}

/** Values as cells, whose numbers are shown under the pointer and, by the arrow keys, in focus. */
function drawStrip({ title, values, names }, most) {
  const finite = values.filter(Number.isFinite);
  const range = `${written(Math.min(...finite))} to ${written(Math.max(...finite))}`;
  const out = make("span", { className: "soft", textContent: range });
  const cells = make("div", { className: "cells", tabIndex: 0 });
  cells.classList.toggle("few", values.length <= 32);
  cells.setAttribute("role", "img");
  cells.setAttribute("aria-label", `${title}: ${values.length} values from ${range}`);
  for (const value of values) {
    const cell = make("i", { className: Number.isFinite(value) ? "" : "hidden" });
    cell.style.setProperty("--tone", value < 0 ? "var(--rare)" : "var(--blue)");
    cell.style.setProperty("--much", `${(5 + (95 * Math.abs(value)) / most).toFixed(0)}%`);
    cells.append(cell);
  }
  let at = -1;
  const show = (i) => {
    cells.children[at]?.classList.remove("at");
    at = i;
    cells.children[at]?.classList.add("at");
    out.textContent =
      at < 0 ? range : `${names ? `${names[at]} ` : ""}[${at}] ${written(values[at])}`;
  };
  cells.addEventListener("pointermove", ({ target }) => {
    if (target !== cells) show([...cells.children].indexOf(target));
  });
  cells.addEventListener("pointerleave", () => show(-1));
  cells.addEventListener("blur", () => show(-1));
  cells.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    show(Math.min(values.length - 1, Math.max(0, at + by)));
  });
  const label = make("div", { className: "label" }, make("span", { textContent: title }), out);
  return make("div", { className: "strip" }, label, cells);
}

function drawBars({ title, rows }) {
  const most = rows.reduce((a, [, value]) => Math.max(a, Math.abs(value)), 1e-12);
  const box = make("div", { className: "bars" });
  for (const [name, value, number] of rows) {
    const bar = make("b");
    bar.style.width = `${Math.max(0, (100 * value) / most)}%`;
    const label = make("span", { textContent: name, title: name });
    box.append(label, bar, make("span", { textContent: number }));
  }
  const label = make("div", { className: "label", textContent: title });
  return make("div", { className: "strip" }, label, box);
}

// --- where the walk is

const stepInAddress = () => new URLSearchParams(location.hash.slice(1)).get("step");

/** Where the chapters are, if this page is part of the book's site; null elsewhere. */
function siteOf() {
  try {
    const { document: outer, location: at } = window.parent;
    if (!window.frameElement || !outer.querySelector("meta[name=generator][content^=quarto]"))
      return null;
    return at.pathname.includes("/appendix/") ? "../" : "";
  } catch {
    return null; // the frame is not ours to look out of
  }
}

function chapterLink([file, heading]) {
  const site = siteOf();
  const words = `Chapter ${CHAPTERS[file]}`;
  const name = heading.toLowerCase().replace(/[^a-z0-9 _-]/g, "");
  const where = site === null ? words : make("a", { textContent: words, target: "_top" });
  if (site !== null) where.href = `${site}${file}.html#${name.replaceAll(" ", "-")}`;
  return make("p", { className: "soft" }, "Built and proved in: ", where, `, “${heading}”.`);
}

/** What the reader follows: a token t of the window, a layer l and a head h. */
function viewOf(page, followed) {
  const { model, text, tokenizer } = page;
  const { traces, ids } = text;
  const { embed_dim: C, num_heads: H, norm, positions, activation } = model.config;
  const t = Math.min(followed.t ?? traces.length - 1, traces.length - 1);
  const { l, h } = followed;
  const first = ids.length - traces.length;
  const show = (id) => tokenizer.show(id);
  const tokens = ids.slice(first).map((id) => visible(show(id)));
  const trace = traces[t];
  return {
    ...{ model, ids, traces, first, show, tokens, trace, t, l, h, C, H, activation },
    ...{ prompt: page.prompt, settings: page.settings(), T: traces.length, D: model.headDim },
    layer: trace.layers[l],
    input: l ? trace.layers[l - 1].x : trace.x,
    isOff: page.off.has(`${l}.${h}`),
    isRms: norm === "rms",
    isRotary: positions === "rotary",
    name: (s) => `“${tokens[s]}”`,
  };
}

class Walk {
  at = 0; // index of the step
  followed = { t: null, l: 0, h: 0 }; // token (null: the last), layer and head
  playing = null; // the timer of the next step

  constructor(host, page) {
    this.page = page;
    this.build(host);
    host.walk = this; // for the tests
    host.addEventListener("keydown", (event) => this.key(event));
    window.addEventListener("hashchange", () => this.readAddress());
    this.readAddress();
    if (stepInAddress()) host.parentElement.scrollIntoView();
  }

  build(host) {
    const button = (words, act) => {
      const node = make("button", { type: "button", textContent: words });
      node.addEventListener("click", act);
      return node;
    };
    this.back = button("Back", () => this.move(-1));
    this.play = button("Play", () => (this.playing === null ? this.start() : this.pause()));
    this.forth = button("Next", () => this.move(1));
    this.selects = {};
    const tools = make("div", { className: "tools" }, this.back, this.play, this.forth);
    const names = { t: "token", l: "layer", h: "head" };
    for (const [key, words] of Object.entries(names)) {
      const select = make("select", { ariaLabel: words });
      select.addEventListener("change", () => {
        const last = key === "t" && select.selectedIndex === select.options.length - 1;
        this.followed[key] = last ? null : Number(select.value);
        this.show();
      });
      this.selects[key] = select;
      tools.append(make("label", {}, words, select));
    }
    const isRotary = this.page.model.config.positions === "rotary";
    this.drawing = drawModel((id) => this.go(id), isRotary);
    this.heading = make("h3");
    this.said = make("p");
    this.said.setAttribute("aria-live", "polite");
    this.rest = make("div");
    this.box = make("div", { className: "step" }, this.heading, this.said, this.rest);
    host.replaceChildren(tools, this.drawing, this.box);
  }

  /** The steps with their numbers, as the walk shows them. */
  get steps() {
    const view = viewOf(this.page, this.followed);
    return STEPS.map((step) => ({ id: step.id, title: step.title, numbers: step.numbers(view) }));
  }

  readAddress() {
    const at = STEPS.findIndex(({ id }) => id === stepInAddress());
    if (at >= 0) this.at = at;
    if (at >= 0 && this.page.text) this.show();
  }

  /** Go to a step. In a frame of a notebook the address is not the walk's own, and stays. */
  go(id) {
    this.at = STEPS.findIndex((step) => step.id === id);
    if (location.protocol !== "about:") history.replaceState(null, "", `#step=${id}`);
    this.show();
  }

  move(by) {
    const to = this.at + by;
    if (to >= 0 && to < STEPS.length) this.go(STEPS[to].id);
    if (to + 1 >= STEPS.length) this.pause();
  }

  start() {
    if (this.at === STEPS.length - 1) this.go(STEPS[0].id);
    const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.playing = setInterval(() => this.move(1), isCalm ? 1.5 * PAUSE : PAUSE);
    this.play.textContent = "Pause";
  }

  pause() {
    clearInterval(this.playing);
    this.playing = null;
    this.play.textContent = "Play";
  }

  key(event) {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by || event.target.tagName === "SELECT") return;
    event.preventDefault();
    this.pause();
    this.move(by);
  }

  fill(view) {
    const { num_layers: layers, num_heads: heads } = view.model.config;
    const count = (n) => [...Array(n).keys()].map(String);
    const options = {
      t: view.tokens.map((token, s) => `${s} ${token}`),
      l: count(layers),
      h: count(heads),
    };
    for (const [key, names] of Object.entries(options)) {
      const select = this.selects[key];
      if (select.names !== names.join("\n"))
        select.replaceChildren(...names.map((text, i) => make("option", { value: i, text })));
      select.names = names.join("\n");
      select.value = view[key];
    }
  }

  show() {
    const isEmpty = !this.page.text.ids.length;
    for (const part of [this.drawing, this.rest, this.heading])
      part.toggleAttribute("hidden", isEmpty);
    for (const button of [this.back, this.play, this.forth]) button.disabled = isEmpty;
    if (isEmpty) {
      this.said.textContent = "There is no token to follow yet: type a text above.";
      this.pause();
      return;
    }
    const step = STEPS[this.at];
    const view = viewOf(this.page, this.followed);
    const numbers = step.numbers(view);
    this.fill(view);
    this.back.disabled = this.at === 0;
    this.forth.disabled = this.at === STEPS.length - 1;
    const link = make("a", { href: `#step=${step.id}`, textContent: step.title });
    link.addEventListener("click", (event) => {
      event.preventDefault(); // in a frame the link would lead elsewhere
      this.go(step.id);
    });
    this.heading.replaceChildren(`${this.at + 1} of ${STEPS.length}: `, link);
    this.said.textContent = step.say(view, numbers);
    const formula = make("p", { className: "formula" });
    formula.innerHTML = typeof step.formula === "string" ? step.formula : step.formula(view);
    const drawn = drawNumbers(step.draw(view, numbers), step.isSum);
    this.rest.replaceChildren(formula, ...drawn, chapterLink(step.chapter));
    highlight(this.drawing, step);
  }
}

function start(host, page) {
  const walk = new Walk(host, page);
  return (changed) => {
    const first = page.text.ids.length - page.text.traces.length;
    if (changed === "text") walk.followed.t = null;
    if (changed === "choice")
      walk.followed.t = page.chosen === null || page.chosen < first ? null : page.chosen - first;
    walk.show();
  };
}

window.addEventListener("hashchange", () => {
  if (stepInAddress()) document.getElementById("walk-details").open = true;
});

export const panel = {
  id: "walk",
  title: "Follow one token",
  isOpen: stepInAddress() !== null,
  css,
  start,
};
