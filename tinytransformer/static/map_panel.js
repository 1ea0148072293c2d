// The attention map of the text, as a panel of the page.
import { describe, drawMap } from "attention_map";
import { make } from "parts";

const FLOOR = 1e-8; // the smallest weight that the map shows, in 16 bits

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

function start(host, page) {
  let end = null;
  const current = () => host.firstElementChild?.attentionMap;
  return async (changed) => {
    if (changed === "choice") chooseToken(current(), page);
    if (changed !== "text") return;
    const old = current()?.state;
    end?.();
    end = null;
    if (page.text.ids.length < 2) {
      host.textContent = "A map needs at least two tokens.";
      return;
    }
    const map = make("div", { className: "attention-map" });
    map.dataset.begun = "true";
    host.replaceChildren(map);
    end = await drawMap(map, mapData(page));
    if (old) map.attentionMap.choose({ layer: old.layer, head: old.head });
    chooseToken(map.attentionMap, page);
  };
}

export const panel = { id: "map", title: "Where each token looks", isOpen: true, start };
