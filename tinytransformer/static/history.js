// How the model learned: earlier checkpoints of its training, and what was measured of them.
// nbs/appendix/history.ipynb packs them. A page without a history has no such panel.
import { readTensors, Text, Transformer, unpack } from "engine";
import { make } from "parts";

const WRITTEN = 40; // tokens that the model of a step writes to the prompt
const PAUSE = 1500; // milliseconds for each step when they play

const css = `
#learned .stop { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: .25rem .75rem; align-items: center }
#learned .stop label { grid-column: 1 / -1 }
#learned svg { display: block; width: 100%; max-width: 44rem; margin: .5rem 0 }
#learned svg text { font: 11.5px system-ui, sans-serif; fill: var(--ink) }
#learned svg .soft { fill: var(--soft) }
#learned svg path { fill: none; stroke-width: 2 }
#learned .axis { stroke: var(--line); stroke-width: 1 }
#learned .moment { fill: var(--focus); opacity: .45 }
#learned .now { stroke: var(--ink); stroke-width: 2 }
#learned svg circle { stroke: var(--paper); stroke-width: 1.5 }
#learned table { width: auto }
#learned th, #learned td { padding: .1rem 1.25rem .1rem 0; white-space: nowrap }
#learned tbody th { font-weight: normal; text-align: left; white-space: normal; padding-left: 2rem; text-indent: -2rem }
#learned th i { display: inline-block; width: 1.4rem; border-top: 3px solid; margin: 0 .5rem .2rem 0 }
#learned .wrote { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border-radius: 6px; padding: .75rem; margin: .25rem 0; min-height: 7rem }
#learned h3 { font-size: 1rem; margin: 1rem 0 .25rem }
#learned-note { border-left: 4px solid var(--focus); padding-left: .6rem }
`;

// --- the models of earlier steps

/** The weights that `unpack_weights` of history.py reads: whole numbers of one tensor after
 * another, and then the scale of each row. {name: Float32Array} */
export function dequantize(bytes, shapes) {
  const size = (shape) => shape.reduce((product, n) => product * n, 1);
  const all = Object.values(shapes);
  const total = all.reduce((sum, shape) => sum + size(shape), 0);
  const rows = all.reduce((sum, shape) => sum + size(shape) / shape.at(-1), 0);
  const { scales } = readTensors(bytes.subarray(total), { scales: [rows] }, "float16");
  const codes = new Int8Array(bytes.buffer, bytes.byteOffset, total);
  const tensors = {};
  let at = 0;
  let row = 0;
  for (const [name, shape] of Object.entries(shapes)) {
    const width = shape.at(-1);
    const own = codes.subarray(at, at + size(shape));
    tensors[name] = Float32Array.from(own, (code, i) => code * scales[row + Math.floor(i / width)]);
    at += own.length;
    row += own.length / width;
  }
  return tensors;
}

/** What the model itself would write: always the likeliest token. */
function continuation({ model, text, prompt, off }) {
  const written = new Text(model, off);
  for (const id of text.ids.slice(0, prompt)) written.push(id);
  while (written.ids.length < prompt + WRITTEN)
    written.push(written.logits.indexOf(Math.max(...written.logits)));
  return written.ids.slice(prompt);
}

// --- the chart

const percent = (share) => `${(100 * share).toFixed(0)} %`;
const nats = (value) => value.toFixed(2);

/** The four lines: two in nats, two as shares. `head` is [layer, head]. */
function linesOf([layer, head]) {
  return [
    {
      name: "recalled facts, nats above the truth",
      value: (row) => row.excess["recalled fact"],
      ...{ chart: 0, color: "var(--rare)", written: nats },
    },
    {
      name: "certain tokens, nats above the truth",
      value: (row) => row.excess.certain,
      ...{ chart: 0, color: "var(--blue)", dashed: true, written: nats },
    },
    {
      name: "recalled tokens that the model gets right",
      value: (row) => row.recall,
      ...{ chart: 1, color: "var(--rare)", written: percent },
    },
    {
      name: `how often head ${layer}.${head} looks at the fact`,
      value: (row) => row.looks[layer][head],
      ...{ chart: 1, color: "var(--blue)", dashed: true, written: percent },
    },
  ];
}

function svg(tag, attributes = {}, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
}

const [LEFT, RIGHT, TOP, TALL, GAP] = [44, 10, 24, 120, 44]; // pixels
const bottomOf = (chart) => TOP + TALL + chart * (TALL + GAP);

/** Two charts over the steps, drawn for a width in pixels; `x` gives the place of a step. */
function drawAxes({ rows, head, moment }, width, most, x) {
  const end = rows.at(-1).step;
  const high = bottomOf(1) + 34;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${high}`, role: "img" });
  const [from, to] = moment;
  const tall = bottomOf(1) - TOP;
  const band = { x: x(from), y: TOP, width: Math.max(3, x(to) - x(from)), height: tall };
  drawing.append(svg("rect", { class: "moment", ...band }));
  for (const [i, words] of [
    `head ${head.join(".")} begins to look`,
    `at the fact: steps ${from}–${to}`,
  ].entries())
    drawing.append(svg("text", { x: x(to) + 8, y: TOP + 14 + 15 * i, class: "name" }, words));
  const ticks = [
    [
      0,
      "nats above the truth (at 0 nothing is left to learn)",
      [0, 2, 4, 6].filter((value) => value < most),
      most,
      String,
    ],
    [1, "shares", [0, 0.5, 1], 1, percent],
  ];
  for (const [chart, title, values, top, written] of ticks) {
    const y = bottomOf(chart);
    drawing.append(svg("text", { x: 0, y: y - TALL - 13, class: "soft" }, title));
    drawing.append(svg("path", { class: "axis", d: `M${LEFT} ${y}H${width - RIGHT}` }));
    for (const value of values) {
      const place = { x: LEFT - 6, y: y - (TALL * value) / top + 4, "text-anchor": "end" };
      drawing.append(svg("text", { class: "soft", ...place }, written(value)));
    }
  }
  for (const step of [0, 100, 400, 1000, end]) {
    const place = {
      x: x(step),
      y: bottomOf(1) + 16,
      "text-anchor": step === end ? "end" : "middle",
    };
    drawing.append(svg("text", { class: "soft", ...place }, step.toLocaleString("en")));
  }
  const name = "training step (the early ones are drawn wider)";
  drawing.append(svg("text", { x: LEFT, y: high - 3, class: "soft" }, name));
  return drawing;
}

function drawChart(history, width, now) {
  const { rows, head, moment } = history;
  const lines = linesOf(head);
  const end = rows.at(-1).step;
  const x = (step) => LEFT + (width - LEFT - RIGHT) * Math.sqrt(step / end);
  const most = Math.max(...rows.flatMap((row) => lines.slice(0, 2).map(({ value }) => value(row))));
  const drawing = drawAxes(history, width, most, x);
  const y = ({ chart, value }, row) =>
    bottomOf(chart) - (TALL * value(row)) / (chart === 0 ? most : 1);
  for (const line of lines) {
    const points = rows.map((row) => `${x(row.step).toFixed(1)} ${y(line, row).toFixed(1)}`);
    const path = svg("path", { d: `M${points.join("L")}` });
    path.style.stroke = line.color;
    if (line.dashed) path.style.strokeDasharray = "6 3";
    drawing.append(path);
  }
  const at = rows.find(({ step }) => step === now);
  drawing.append(svg("path", { class: "now", d: `M${x(now)} ${TOP}V${bottomOf(1)}` }));
  for (const line of lines) {
    const dot = svg("circle", { cx: x(now), cy: y(line, at), r: 4.5 });
    dot.style.fill = line.color;
    drawing.append(dot);
  }
  const said = `Four lines over ${end} training steps, marked at step ${now}; the numbers are in the table below. Steps ${moment.join(" to ")} are the moment when head ${head.join(".")} begins to look at the fact.`;
  drawing.setAttribute("aria-label", said);
  return drawing;
}

function drawTable({ rows, head }, now) {
  const [at, last] = [rows.find(({ step }) => step === now), rows.at(-1)];
  const cell = (tag, textContent, properties) => make(tag, { textContent, ...properties });
  const body = linesOf(head).map(({ name, value, written, color, dashed }) => {
    const swatch = make("i");
    swatch.style.borderTopColor = color;
    if (dashed) swatch.style.borderTopStyle = "dashed";
    const heading = make("th", { scope: "row" }, swatch, name);
    const numbers = [at, last].map((row) =>
      cell("td", written(value(row)), { className: "number" }),
    );
    return make("tr", {}, heading, ...numbers);
  });
  const names = ["", `step ${now.toLocaleString("en")}`, "at the end"];
  const titles = names.map((name) => cell(name ? "th" : "td", name, name ? { scope: "col" } : {}));
  return make(
    "table",
    {},
    make("thead", {}, make("tr", {}, ...titles)),
    make("tbody", {}, ...body),
  );
}

// --- the panel

class Learned {
  pending = null; // the stop that was asked for last
  playing = null; // the timer of the next stop

  constructor(host, page) {
    this.page = page;
    this.history = page.data.history;
    this.steps = [...Object.keys(this.history.packed).map(Number), this.history.rows.at(-1).step];
    this.models = new Map([[this.steps.length - 1, Promise.resolve(page.model)]]);
    this.last = this.steps.length - 1;
    this.at = this.last;
    this.summary = host.parentElement.querySelector("summary");
    this.title = this.summary.textContent;
    host.learned = this; // for the tests
    this.build(host);
    new ResizeObserver(() => this.draw()).observe(host);
  }

  build(host) {
    const end = this.steps.at(-1).toLocaleString("en");
    const [from, to] = this.history.moment;
    const [layer, head] = this.history.head;
    this.slider = make("input", { type: "range", min: 0, max: this.last, step: 1 });
    this.slider.value = this.last;
    this.slider.addEventListener("input", () => {
      this.pause();
      this.go(Number(this.slider.value));
    });
    this.step = make("output");
    this.play = make("button", { type: "button", textContent: "Play" });
    this.play.addEventListener("click", () =>
      this.playing === null ? this.start() : this.pause(),
    );
    const label = make("label", { htmlFor: "learned-step" }, "The model after training step ");
    label.append(this.step);
    this.slider.id = "learned-step";
    const stop = make("div", { className: "stop" }, label, this.play, this.slider);
    const text = `The training of this model took ${end} steps. Move the slider: the text above, what could come next, the walk and the map are then those of the model as it was at that step.`;
    const moment = make("p", { id: "learned-moment" });
    const jump = make("button", { type: "button", className: "small" });
    const index = this.steps.findIndex((step) => step >= to);
    jump.textContent = `Show step ${this.steps[index]}`;
    jump.addEventListener("click", () => {
      this.pause();
      this.go(index);
    });
    moment.append(
      `First the model learns what is certain, such as the rest of a word. Facts that the article has given before, such as a year or a name, come later, because the model has to look back for them: between step ${from} and step ${to}, head ${head} of layer ${layer} begins to look at them, and the guesses of the model get much better. `,
      jump,
    );
    this.chart = make("div");
    this.table = make("div");
    this.wrote = make("p", { className: "wrote" });
    this.said = make("p", { className: "soft" });
    this.said.setAttribute("role", "status");
    const heading = make("h3", { textContent: "What it writes to your prompt at this step" });
    const intro = make("p", { className: "soft", textContent: text });
    const parts = [intro, stop, this.said, this.chart, this.table, moment, heading, this.wrote];
    host.replaceChildren(...parts);
    this.note = make("p", { id: "learned-note", hidden: true });
    document.getElementById("said").after(this.note);
  }

  /** The model of a stop, made when it is first asked for. */
  model(i) {
    const { packed, shapes } = this.history;
    if (!this.models.has(i))
      this.models.set(
        i,
        unpack(packed[this.steps[i]]).then(
          (bytes) => new Transformer(this.page.data.config, dequantize(bytes, shapes)),
        ),
      );
    return this.models.get(i);
  }

  async go(i) {
    this.pending = i;
    this.at = i;
    this.slider.value = i;
    this.draw();
    try {
      const model = await this.model(i);
      if (this.pending !== i) return; // the slider has moved on
      this.page.useModel(model);
      this.said.textContent = "";
    } catch (error) {
      this.said.textContent = `The model of this step cannot be read: ${error.message}.`;
    }
  }

  start() {
    if (this.at === this.last) this.go(0);
    this.playing = setInterval(() => {
      this.go(this.at + 1);
      if (this.at === this.last) this.pause();
    }, PAUSE);
    this.play.textContent = "Pause";
  }

  pause() {
    clearInterval(this.playing);
    this.playing = null;
    this.play.textContent = "Play";
  }

  /** The place on the slider, in the chart, in the title and above the text. */
  draw() {
    const [now, end] = [this.steps[this.at], this.steps.at(-1)];
    const words = `${now.toLocaleString("en")} of ${end.toLocaleString("en")}`;
    this.step.textContent = words;
    this.slider.setAttribute("aria-valuetext", `step ${words}`);
    const width = Math.min(704, this.chart.clientWidth || 640);
    this.chart.replaceChildren(drawChart(this.history, width, now));
    this.table.replaceChildren(drawTable(this.history, now));
    const isEarlier = this.at !== this.last;
    this.summary.textContent = isEarlier ? `${this.title} (now: step ${words})` : this.title;
    this.note.hidden = !isEarlier;
    const back = make("button", { type: "button", className: "small" });
    back.textContent = "Back to the finished model";
    back.addEventListener("click", () => {
      this.pause();
      this.go(this.last);
    });
    this.note.replaceChildren(`The model as it was after step ${words}. `, back);
  }

  /** What the model writes to the prompt, if it is not what stands there already. */
  write() {
    const { model, text, prompt, off, tokenizer } = this.page;
    const given = text.ids.slice(0, prompt);
    const asked = [this.at, [...off], given].join(" ");
    if (this.asked === asked && this.asker === model) return;
    [this.asked, this.asker] = [asked, model];
    if (prompt === 0) {
      this.wrote.textContent = "The prompt is empty: give the model at least one character.";
      return;
    }
    const written = tokenizer.decode([...given, ...continuation(this.page)]);
    const said = tokenizer.decode(given);
    const before = make("span", { className: "soft", textContent: said });
    this.wrote.replaceChildren(before, written.slice(said.length));
  }
}

function start(host, page) {
  const learned = new Learned(host, page);
  return (changed) => {
    if (changed === "text") learned.write();
  };
}

export const panel = {
  id: "learned",
  title: "How it learned",
  css,
  isOpen: true,
  isFor: (data) => Boolean(data.history),
  start,
};
