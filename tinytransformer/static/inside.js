// Look inside, as a panel of the page: the logit lens, direct logit attribution and activation
// patching. nbs/appendix/explorer.ipynb explains and proves them; the tests hold both together.
import { softmax } from "engine";
import { make, percent, visible } from "parts";

const SHOWN = 3; // tokens in each row of the lens

// --- the instruments: of one position, from what engine.js keeps in its trace

/** What the model would say after each step of the residual stream: [{name, logits}]. */
export function logitLens(model, trace) {
  const steps = [["embeddings", trace.x]];
  for (const [l, { middle, x }] of trace.layers.entries())
    steps.push([`attention ${l}`, middle], [`feed-forward ${l}`, x]);
  return steps.map(([name, x]) => ({ name, logits: model.logitsOf(x) }));
}

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
const minus = (a, b) => a.map((value, i) => value - b[i]);
const mean = (x) => x.reduce((sum, value) => sum + value, 0) / x.length;

/** What each part of the model adds to the residual stream: [[name, vector (C)]]. */
function writtenVectors(model, trace) {
  const { tensors, config, headDim: D } = model;
  const { embed_dim: C, num_heads: H } = config;
  const written = [["token", trace.token]];
  if (trace.place) written.push(["position", trace.place]);
  for (const [l, { heads, fed }] of trace.layers.entries()) {
    const matrix = tensors[`blocks.${l}.attention.proj.weight`]; // (C, C)
    for (let head = 0; head < H; head++) {
      const [from, to] = [head * D, (head + 1) * D];
      const own = heads.subarray(from, to);
      const vector = Float64Array.from({ length: C }, (_, row) =>
        dot(own, matrix.subarray(row * C + from, row * C + to)),
      );
      written.push([`head ${l}.${head}`, vector]);
    }
    const output = config.activation === "swiglu" ? "down" : "2";
    const bias = Float64Array.from(tensors[`blocks.${l}.ffn.${output}.bias`]);
    const ofAttention = Float64Array.from(tensors[`blocks.${l}.attention.proj.bias`]);
    written.push([`bias of attention ${l}`, ofAttention]);
    written.push([`feed-forward ${l}`, minus(fed, bias)], [`bias of feed-forward ${l}`, bias]);
  }
  return written;
}

/** What each part adds to the logit of `token`, or to how far it is above that of `other`, at the
 * scale that the final norm has here: [[name, value]]. The values sum to the logit. */
export function attribution(model, trace, token, other = null) {
  const C = model.config.embed_dim;
  const row = (id) => Float64Array.from(model.headMatrix.subarray(id * C, (id + 1) * C));
  const wanted = other === null ? row(token) : minus(row(token), row(other));
  const { "norm.weight": gain, "norm.bias": bias } = model.tensors; // RMSNorm has no bias
  const centre = (x) => (bias ? x.map((value) => value - mean(x)) : x);
  const x = centre(trace.layers.at(-1).x);
  const scale = 1 / Math.sqrt(dot(x, x) / C + 1e-5);
  const direction = centre(wanted.map((value, i) => value * gain[i])).map((v) => v * scale);
  const parts = writtenVectors(model, trace).map(([name, vector]) => [
    name,
    dot(vector, direction),
  ]);
  if (bias) parts.push(["bias of the final norm", dot(wanted, bias)]);
  return parts;
}

/** Read a text, and give the trace of every token. `patches` gives for a position the Map from
 * "layer.head" to the vector that is put in place of what the head computes there. */
export function readTraces(model, ids, { off = new Set(), patches = new Map() } = {}) {
  const cache = model.emptyCache();
  return ids.map((id, i) => {
    const trace = {};
    model.read(id, cache, { off, patch: patches.get(i), trace });
    return trace;
  });
}

/** The output of one head at each position of a text that was read: Map for `readTraces`. */
export function outputsOf(model, traces, layer, head, positions) {
  const D = model.headDim;
  const vector = (i) => traces[i].layers[layer].heads.slice(head * D, (head + 1) * D);
  return new Map(positions.map((i) => [i, new Map([[`${layer}.${head}`, vector(i)]])]));
}

// --- the panel

const css = `
#inside h3 { font-size: 1rem; margin: 1rem 0 .25rem }
#inside .scroll { overflow-x: auto }
#inside table { width: auto; max-width: 44rem }
#inside th, #inside td { padding-right: 1.25rem }
#inside .bars { width: 100% }
#inside .bars td:last-child { width: 60%; min-width: 6rem; padding-right: 0 }
#inside .patch th { vertical-align: bottom }
#inside .bars th, #inside .lens th { text-align: left; font-weight: normal; white-space: nowrap }
@media (max-width: 47.99rem) { #inside .lens, #inside .bars { font-size: .85rem } #inside :is(.lens, .bars) :is(th, td) { padding-right: .6rem } }
#inside .lens td { white-space: pre }
#inside .lens .right { font-weight: 700; outline: 2px solid var(--blue); border-radius: 3px }
#inside .signed { position: relative; height: .7rem; background: linear-gradient(var(--line), var(--line)) 50% / 1px 100% no-repeat }
#inside .signed div { position: absolute; top: 0; height: 100%; background: var(--blue) }
#inside .signed div.against { background: var(--rare) }
#inside select { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line); border-radius: 4px; padding: .2rem }
`;

const paragraph = (textContent) => make("p", { className: "soft", textContent });
const quoted = (page, id) => `“${visible(page.tokenizer.show(id))}”`;
const byValue = (logits) => [...logits.keys()].sort((a, b) => logits[b] - logits[a]);

function table(className, names, rows, caption) {
  const head = make(
    "tr",
    {},
    ...names.map((name) => make("th", { textContent: name, scope: "col" })),
  );
  const body = make("tbody", {}, ...rows);
  const all = [make("caption", { textContent: caption }), make("thead", {}, head), body];
  const box = make(
    "div",
    { className: "scroll", tabIndex: 0 },
    make("table", { className }, ...all),
  );
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", caption);
  return box;
}

/** The position that is explained, and the token that came after it or is the likeliest there;
 * null where nothing came before the chosen token, or the model no longer sees it. */
function question(page) {
  const { ids, traces } = page.text;
  const next = page.chosen ?? ids.length; // index of the token that is explained
  const at = next - 1 - (ids.length - traces.length); // of the trace that it comes from
  if (at < 0) return null;
  const order = byValue(traces[at].logits);
  const token = page.chosen === null ? order[0] : ids[next];
  return { at, next, token, other: order.find((id) => id !== token) };
}

function lensTable(page, { at, token }) {
  const rows = logitLens(page.model, page.text.traces[at]).map(({ name, logits }) => {
    const p = softmax(logits);
    const cells = byValue(logits)
      .slice(0, SHOWN)
      .map((id) => {
        const text = `${visible(page.tokenizer.show(id))} ${percent(p[id])}`;
        return make(
          "td",
          {},
          make("span", { textContent: text, className: id === token ? "right" : "" }),
        );
      });
    return make("tr", {}, make("th", { textContent: name, scope: "row" }), ...cells);
  });
  const names = ["after", "likeliest", "second", "third"];
  return table("lens", names, rows, `Framed where it is ${quoted(page, token)}.`);
}

function bars(parts, caption) {
  const most = Math.max(...parts.map(([, value]) => Math.abs(value))) || 1;
  const rows = parts.map(([name, value]) => {
    const bar = make("div", { className: value < 0 ? "against" : "" });
    const width = (50 * Math.abs(value)) / most;
    bar.style.width = `${width.toFixed(1)}%`;
    bar.style.left = `${value < 0 ? (50 - width).toFixed(1) : 50}%`;
    const signed = make("div", { className: "signed" }, bar);
    signed.setAttribute("aria-hidden", "true");
    const number = value
      .toFixed(2)
      .replace(/^-0\.00$/, "0.00")
      .replace("-", "−");
    return make(
      "tr",
      {},
      make("th", { textContent: name, scope: "row" }),
      make("td", { className: "number", textContent: number }),
      make("td", {}, signed),
    );
  });
  return table("bars", ["part", "adds", ""], rows, caption);
}

function attributionTable(page, { at, token, other }) {
  const trace = page.text.traces[at];
  const parts = attribution(page.model, trace, token, other);
  const sum = parts.reduce((total, [, value]) => total + value, 0).toFixed(2);
  const logits = (trace.logits[token] - trace.logits[other]).toFixed(2);
  const caption =
    `The logit of ${quoted(page, token)} minus that of ${quoted(page, other)}: the parts sum to` +
    ` ${sum}, and the model has ${logits}.`.replaceAll("-", "−");
  return bars(parts, caption);
}

/** A second text that differs in one year, if the text has one; else empty. */
function example(text) {
  const year = text.match(/\b18\d(\d)\b/);
  if (!year) return "";
  const changed = year[0].slice(0, 3) + ((Number(year[1]) + 1) % 10);
  return text.replaceAll(year[0], changed);
}

/** Compare two texts, and patch one head from the second at the last position, or everywhere. */
function patchRows(page, ids, sourceIds, name, everywhere) {
  const { model, off } = page;
  const traces = readTraces(model, sourceIds, { off });
  const own = readTraces(model, ids, { off }).at(-1).logits;
  const [layer, head] = name.split(".").map(Number);
  const positions = everywhere ? [...ids.keys()] : [ids.length - 1];
  const patches = outputsOf(model, traces, layer, head, positions);
  const patched = readTraces(model, ids, { off, patches }).at(-1).logits;
  const all = [own, patched, traces.at(-1).logits].map((logits) => softmax(logits));
  const shown = new Set(all.flatMap((p) => byValue(p).slice(0, 3)));
  return [...shown].map((id) => ({ id, p: all.map((p) => p[id]) }));
}

function patchTable(page, rows, name) {
  const body = rows.map(({ id, p }) =>
    make(
      "tr",
      {},
      make("th", { textContent: visible(page.tokenizer.show(id)), scope: "row" }),
      ...p.map((value) => make("td", { className: "number", textContent: percent(value) })),
    ),
  );
  const names = ["next token", "this text", `with head ${name} of the second`, "second text"];
  return table(
    "patch",
    names,
    body,
    "Probabilities before and after the patch, and in the second text.",
  );
}

/** The form for the second text, and what comes of it. */
function patchForm(page) {
  const { num_layers: layers, num_heads: heads } = page.model.config;
  const names = [...Array(layers * heads).keys()].map(
    (i) => `${Math.floor(i / heads)}.${i % heads}`,
  );
  const head = make(
    "select",
    { id: "inside-head" },
    ...names.map((name) => make("option", { textContent: name })),
  );
  const second = make("textarea", { id: "inside-second", rows: 3, spellcheck: false });
  const everywhere = make("input", { type: "checkbox", id: "inside-everywhere" });
  const result = make("div", { id: "inside-result" });
  result.setAttribute("role", "status");
  let proposed = null; // what was put into the field last
  let asked = null; // the tokens of the first text

  function show() {
    const sourceIds = page.tokenizer.encode(second.value);
    if (!asked) result.replaceChildren(paragraph("There is no text to patch yet."));
    else if (second.value === "")
      result.replaceChildren(
        paragraph("Write a second text that differs in one word, for example in a name."),
      );
    else if (sourceIds.length !== asked.length)
      result.replaceChildren(
        paragraph(
          `The first text has ${asked.length} tokens up to here, and the second ${sourceIds.length}.` +
            " Patching needs the same number, so that each position has a partner: change a word for" +
            " one of as many tokens.",
        ),
      );
    else
      result.replaceChildren(
        patchTable(
          page,
          patchRows(page, asked, sourceIds, head.value, everywhere.checked),
          head.value,
        ),
      );
  }

  /** Ask about the text up to the chosen token. */
  function update(next) {
    const { ids, traces } = page.text;
    asked = next === null ? null : ids.slice(ids.length - traces.length, next);
    if (second.value === (proposed ?? "")) {
      proposed = asked ? example(page.tokenizer.decode(asked)) : "";
      second.value = proposed;
    }
    show();
  }

  for (const control of [head, second, everywhere]) control.addEventListener("input", show);
  const form = make(
    "div",
    {},
    make("label", { textContent: "Second text, in which one fact differs" }, second),
    make(
      "div",
      { className: "row" },
      make("label", { textContent: "head " }, head),
      make("label", {}, everywhere, " at every position, not only the last"),
    ),
    result,
  );
  return { form, update };
}

function start(host, page) {
  const lens = make("div", { id: "inside-lens" });
  const shares = make("div", { id: "inside-attribution" });
  const what = paragraph("");
  const { form, update } = patchForm(page);
  host.replaceChildren(
    what,
    make("h3", { textContent: "What would it say after each layer?" }),
    paragraph(
      "The logit lens: what the model would answer if it stopped there. The final norm and the output matrix are applied early, so the numbers before the end are only hints.",
    ),
    lens,
    make("h3", { textContent: "Which part speaks for this token?" }),
    paragraph(
      "What each part of the model adds to the logit of this token, compared with its strongest rival: blue speaks for it, orange against it.",
    ),
    shares,
    make("h3", { textContent: "What if a head had read another text?" }),
    paragraph(
      "Here the output of one head is taken from a second text. If the answer then becomes that of the second text, this head carries the fact in which they differ.",
    ),
    form,
  );
  return (changed) => {
    if (changed === "settings") return;
    const asked = page.text.ids.length ? question(page) : null;
    update(asked ? asked.next : null);
    lens.replaceChildren(...(asked ? [lensTable(page, asked)] : []));
    shares.replaceChildren(...(asked ? [attributionTable(page, asked)] : []));
    if (!asked) what.textContent = "Nothing came before this token: choose a later one.";
    else if (page.chosen === null)
      what.textContent = `About the likeliest next token, ${quoted(page, asked.token)}. Choose a token of the text to ask about that one.`;
    else what.textContent = `About ${quoted(page, asked.token)}, token ${asked.next} of the text.`;
  };
}

export const panel = {
  id: "inside",
  title: "Look inside: who says this token, and when?",
  css,
  start,
};
