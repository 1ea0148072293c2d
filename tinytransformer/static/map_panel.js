// The attention map of the text, as a panel of the page.
import { describe, drawMap } from "attention_map";
import { make, percent, visible } from "parts";

const FLOOR = 1e-8; // the smallest weight that the map shows, in 16 bits
const css = `
#map p { max-width: 46rem }
`;
const INTRODUCTION =
  "With attention, a token looks back at earlier ones and takes over what it needs from them. Each" +
  " row of a map is one token that looks, and the stronger the colour, the more it looks there." +
  " The small maps are the heads, which all look for something different; choose one of them, and" +
  " then a token.";

/** The weights and vectors of the tokens in the window, as attention_map.js takes them. */
function mapData({ model, text, tokenizer }) {
  const { num_layers: layers, num_heads: heads } = model.config;
  const { traces } = text;
  const D = model.headDim;
  const T = traces.length;
  const size = (T * (T + 1)) / 2;
  const codes = new Uint16Array(layers * heads * size);
  const vectors = new Float32Array(3 * layers * heads * T * D);
  const code = (w) => (w < FLOOR ? 0 : Math.round(65535 - (65534 * Math.log(w)) / Math.log(FLOOR)));
  for (const [t, trace] of traces.entries())
    for (const [l, layer] of trace.layers.entries())
      for (let h = 0; h < heads; h++) {
        const start = (l * heads + h) * size + (t * (t + 1)) / 2;
        for (let s = 0; s <= t; s++) codes[start + s] = code(layer.weights[h][s]);
        for (const [kind, vector] of [layer.q, layer.k, layer.v].entries())
          vectors.set(
            vector.subarray(h * D, (h + 1) * D),
            (((kind * layers + l) * heads + h) * T + t) * D,
          );
      }
  const tokens = text.ids.slice(-T).map((id) => tokenizer.show(id));
  const numbers = (n) => [...Array(n).keys()];
  const shape = { tokens, layers: numbers(layers), heads: numbers(heads), head_dim: D };
  return describe({ ...shape, title: "", statistics: {}, bits: 16, floor: FLOOR }, codes, vectors);
}

/** Show the chosen token in the map, too, if the model still sees it. */
function chooseToken(map, page) {
  const seen = page.text.traces.length;
  const first = page.text.ids.length - seen;
  const isDrawn = map?.tokens.length === seen; // and not still the map of an earlier text
  if (isDrawn && page.chosen !== null && page.chosen >= first)
    map.choose({ token: page.chosen - first });
}

/** Where the shown token repeats an earlier one, the head that looked there most when the model was
 * asked for it: {layer, head, weight, source}, else null. */
function findRecall({ sources, text, chosen }) {
  const { ids, traces } = text;
  const first = ids.length - traces.length;
  const trace = traces[(chosen ?? ids.length) - 1 - first];
  const source = sources[0];
  if (!trace || source === undefined || source < first) return null;
  const found = trace.layers.flatMap(({ weights }, layer) =>
    weights.map((row, head) => ({ layer, head, weight: row[source - first] ?? 0, source })),
  );
  return found.reduce((a, b) => (b.weight > a.weight ? b : a));
}

function describeRecall(recall, { text, tokenizer }) {
  if (!recall) return "";
  const { layer, head, weight, source } = recall;
  return (
    `Here the model has to repeat “${visible(tokenizer.show(text.ids[source]))}” (token ${source}).` +
    ` Of all heads, head ${head} of layer ${layer} looks there most, with ${percent(weight)} of its` +
    " attention. Whether it also carries the fact, you can test under “Look inside”."
  );
}

function start(host, page) {
  let end = null;
  const recalled = make("p");
  recalled.setAttribute("role", "status");
  const box = make("div");
  host.replaceChildren(make("p", { className: "soft", textContent: INTRODUCTION }), recalled, box);
  const current = () => box.firstElementChild?.attentionMap;
  return async (changed) => {
    const recall = findRecall(page);
    if (changed !== "settings") recalled.textContent = describeRecall(recall, page);
    if (changed === "choice") chooseToken(current(), page);
    if (changed !== "text") return;
    const old = current()?.state;
    end?.();
    end = null;
    if (page.text.ids.length < 2) {
      box.textContent = "A map needs at least two tokens.";
      return;
    }
    const map = make("div", { className: "attention-map" });
    map.dataset.begun = "true";
    box.replaceChildren(map);
    end = await drawMap(map, mapData(page));
    const shown = old ?? recall; // at first the head that looks at a recalled fact
    if (shown) map.attentionMap.choose({ layer: shown.layer, head: shown.head });
    chooseToken(map.attentionMap, page);
  };
}

export const panel = { id: "map", title: "Where each token looks", css, isOpen: true, start };
