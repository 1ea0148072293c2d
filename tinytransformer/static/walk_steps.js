// The steps of the walk: for each its numbers, all taken from the engine's trace, what it says of
// them in two sentences, its formula, and what it draws (with one scale of colours where `isSum`). `v` is what the reader follows: see walk.js.
import { nextDistribution, softmax } from "engine";
import { percent, visible } from "parts";

const list = (values) => (values ? Array.from(values) : null);
const sum = (values) => values.reduce((total, value) => total + value, 0);
const norm = (x) => Math.sqrt(sum(x.map((value) => value * value)));
const mean = (x) => sum(x) / x.length;
const short = (x) => (Math.abs(x) >= 100 ? x.toFixed(0) : x.toFixed(2)).replace("-", "−");
const best = (values) => values.reduce((at, value, i) => (value > values[at] ? i : at), 0);
const topOf = (values, n = 8) =>
  [...values.keys()].sort((a, b) => values[b] - values[a]).slice(0, n);
const share = (x, v) => x.slice(v.h * v.D, (v.h + 1) * v.D); // what belongs to the head

/** A strip with one cell for each value; `names` say what each cell is. */
const strip = (title, values, names = null) => ({ title, values: list(values), names });
const bars = (title, rows) => ({ title, rows });
const tokenStrip = (title, values, v) => strip(title, values, v.tokens.slice(0, values.length));

/** The likeliest tokens, with what stands beside them. */
const candidates = (title, order, values, v, write) =>
  bars(
    title,
    order.map((id) => [visible(v.show(id)), values[id], write(values[id])]),
  );

/** The tokens with the largest weights, with their weights. */
const lookedAt = (title, weights, v) =>
  bars(
    title,
    topOf(weights).map((s) => [`${v.tokens[s]} ${s}`, weights[s], percent(weights[s])]),
  );

function followed(v) {
  const ids = v.ids.slice(0, v.first + v.t + 1);
  const written = ids.slice(v.prompt);
  return nextDistribution(v.trace.logits, ids, written, v.settings);
}

const TO_HEAD = [
  {
    id: "id",
    title: "A token and its id",
    part: "id",
    chapter: ["00_data", "A look at tokens"],
    formula: "text → tokens → ids",
    numbers: (v) => ({ id: v.trace.id, position: v.t }),
    say: (v, n) =>
      `The tokenizer cut your text into ${v.ids.length} tokens, and we follow ${v.name(v.t)}. Its id is ${n.id} of ${v.model.config.vocab_size}, and it stands at position ${n.position} of what the model sees` +
      (v.first ? `, because the window has jumped past the first ${v.first} tokens.` : "."),
    draw: (v) => [
      bars(
        "the tokens around it",
        [v.t - 2, v.t - 1, v.t, v.t + 1, v.t + 2]
          .filter((s) => s >= 0 && s < v.T)
          .map((s) => [v.tokens[s], s === v.t ? 1 : 0, `id ${v.ids[v.first + s]}`]),
      ),
    ],
  },
  {
    id: "embedding",
    title: "Its row of the token table",
    part: "token",
    chapter: ["01_embeddings", "A lookup is a one-hot vector times a table"],
    formula: "e = E[id], C values",
    numbers: (v) => ({ token: list(v.trace.token) }),
    say: (v, n) =>
      `The id ${v.trace.id} picks one row out of the token table, ${v.C} numbers that training has found for ${v.name(v.t)}. Its length is ${short(norm(n.token))}, and wherever this token stands, it begins with the same row.`,
    draw: (_, n) => [strip("token embedding", n.token)],
  },
  {
    id: "position",
    title: "Where it stands",
    isSum: true,
    part: "position",
    chapter: ["01_embeddings", "A vector for each position"],
    formula: (v) => (v.isRotary ? "x = E[id]" : "x = E[id] + P[position]"),
    numbers: (v) => ({
      token: list(v.trace.token),
      position: list(v.trace.place || null),
      x: list(v.trace.x),
    }),
    say: (v, n) =>
      n.position
        ? `Row ${v.t} of the position table is added, so that ${v.name(v.t)} at position ${v.t} differs from the same token elsewhere. For example, the first value becomes ${short(n.token[0])} + ${short(n.position[0])} = ${short(n.x[0])}.`
        : `This model has rotary positions, so nothing is added here and ${v.name(v.t)} keeps its row. Its position ${v.t} comes in later, when queries and keys are rotated by an angle that grows with it.`,
    draw: (_, n) => [
      strip("token embedding", n.token),
      ...(n.position ? [strip("+ position embedding", n.position)] : []),
      strip("= x", n.x),
    ],
  },
  {
    id: "norm",
    title: "Normalized before attention",
    part: "norm1",
    chapter: ["03_block", "LayerNorm: keeping values in range"],
    formula: (v) => (v.isRms ? "x / √mean(x²) · g" : "(x − mean) / √variance · g + b"),
    numbers: (v) => ({ x: list(v.input), normed: list(v.layer.normed1) }),
    say: (v, n) =>
      v.isRms
        ? `RMSNorm divides the vector of ${v.name(v.t)} by the root of its mean square, ${short(norm(n.x) / Math.sqrt(v.C))}, without subtracting a mean. Then each value is multiplied by a gain of its own.`
        : `Layer ${v.l} reads a normalized copy of the vector of ${v.name(v.t)}: its mean of ${short(mean(n.x))} is subtracted, and its values are divided by their standard deviation, ${short(Math.sqrt(mean(n.x.map((x) => (x - mean(n.x)) ** 2))))}. Then each value gets a gain and a bias of its own; x itself stays as it is in the residual stream.`,
    draw: (v, n) => [
      strip(v.l ? `x after layer ${v.l - 1}` : "x", n.x),
      strip("normalized", n.normed),
    ],
  },
  {
    id: "qkv",
    title: "Query, key and value",
    part: "qkv",
    chapter: ["02_attention", "Queries, keys and values"],
    formula: "q = W<sub>q</sub> x, k = W<sub>k</sub> x, v = W<sub>v</sub> x",
    numbers: (v) => ({
      q: list(share(v.layer.q, v)),
      k: list(share(v.layer.k, v)),
      v: list(share(v.layer.v, v)),
    }),
    say: (v) =>
      `Three matrices turn the normalized vector of ${v.name(v.t)} into ${v.D} values each for head ${v.h}: a query for what it looks for, a key by which it can be found, and a value that it hands over.` +
      (v.isRotary
        ? ` The query and the key are already rotated by the angles of position ${v.t}.`
        : ` There are ${v.H} heads in layer ${v.l}, and each has matrices of its own.`),
    draw: (v, n) => [
      strip(`query of head ${v.h}`, n.q),
      strip(`key of head ${v.h}`, n.k),
      strip(`value of head ${v.h}`, n.v),
    ],
  },
  {
    id: "score",
    title: "Its query meets every key",
    part: "scores",
    chapter: ["02_attention", "One query, by hand"],
    formula: "q · k = Σ q<sub>i</sub> k<sub>i</sub>",
    numbers: (v) => ({ q: list(share(v.layer.q, v)), scores: list(v.layer.scores[v.h]) }),
    say: (v, n) => {
      const at = best(n.scores);
      return `The query of ${v.name(v.t)} is multiplied value by value with the key of each token that it can see, and the products are added up. It agrees most with the key of ${v.name(at)} at position ${at}, whose score is ${short(n.scores[at])}.`;
    },
    draw: (v, n) => [
      strip("its query", n.q),
      tokenStrip("q · k for each token", n.scores, v),
      bars(
        "the largest scores",
        topOf(n.scores).map((s) => [`${v.tokens[s]} ${s}`, n.scores[s], short(n.scores[s])]),
      ),
    ],
  },
  {
    id: "scale",
    title: "Scaled",
    isSum: true,
    part: "scores",
    chapter: ["02_attention", "Why the scores are scaled"],
    formula: "s = q · k / √D",
    numbers: (v) => ({
      scores: list(v.layer.scores[v.h]),
      scaled: list(v.layer.scores[v.h].map((score) => score / Math.sqrt(v.D))),
    }),
    say: (v, n) =>
      `A sum of ${v.D} products grows with √${v.D}, so every score is divided by √${v.D} = ${short(Math.sqrt(v.D))}. The score of ${v.name(v.t)} with itself goes from ${short(n.scores[v.t])} to ${short(n.scaled[v.t])}.`,
    draw: (v, n) => [tokenStrip("q · k", n.scores, v), tokenStrip("q · k / √D", n.scaled, v)],
  },
  {
    id: "mask",
    title: "The future is hidden",
    part: "mask",
    chapter: ["02_attention", "The causal mask"],
    formula: "s = −∞ for every later token",
    numbers: (v) => ({
      masked: Array.from({ length: v.T }, (_, s) =>
        s > v.t ? Number.NEGATIVE_INFINITY : v.layer.scores[v.h][s] / Math.sqrt(v.D),
      ),
    }),
    say: (v) =>
      `A token may look at itself and at what came before it, which for ${v.name(v.t)} makes ${v.t + 1} of ${v.T} tokens.` +
      (v.t + 1 < v.T
        ? ` The ${v.T - v.t - 1} after it, from ${v.name(v.t + 1)} on, get a score of −∞, so that they count for nothing.`
        : " Nothing stands after it here, so the mask hides nothing; follow an earlier token to see it at work."),
    draw: (v, n) => [strip("scores, −∞ where masked", n.masked, v.tokens)],
  },
];

const TO_STREAM = [
  {
    id: "softmax",
    title: "Scores become weights",
    part: "mask",
    chapter: ["02_attention", "Attention weights, in one formula"],
    formula: "w<sub>j</sub> = exp(s<sub>j</sub>) / Σ exp(s<sub>i</sub>)",
    numbers: (v) => ({ weights: list(v.layer.weights[v.h]) }),
    say: (v, n) => {
      const at = best(n.weights);
      return `Softmax turns the scores into weights that are positive and sum to ${sum(n.weights).toFixed(3)}. Head ${v.h} of layer ${v.l} gives the largest one, ${percent(n.weights[at])}, to ${v.name(at)} at position ${at}.`;
    },
    draw: (v, n) => [
      tokenStrip("attention weights", n.weights, v),
      lookedAt("the largest", n.weights, v),
    ],
  },
  {
    id: "values",
    title: "A weighted sum of values",
    isSum: true,
    part: "values",
    chapter: ["02_attention", "One query, by hand"],
    formula: "o = Σ w<sub>j</sub> v<sub>j</sub>",
    numbers: (v) => ({
      weights: list(v.layer.weights[v.h]),
      values: v.traces.slice(0, v.t + 1).map((trace) => list(share(trace.layers[v.l].v, v))),
      output: list(share(v.layer.heads, v)),
    }),
    say: (v, n) =>
      v.isOff
        ? `Head ${v.h} of layer ${v.l} is switched off, so its output of ${v.D} values is zero. With the head on, ${v.name(best(n.weights))} would count most in the sum.`
        : `Each token hands over its value, multiplied by its weight, and ${v.name(v.t)} adds up what it gets. Most of it comes from ${v.name(best(n.weights))}, which counts ${percent(n.weights[best(n.weights)])}.`,
    draw: (v, n) => [
      ...topOf(n.weights, 4).map((s) =>
        strip(
          `${percent(n.weights[s])} of the value of ${v.name(s)}`,
          n.values[s].map((value) => n.weights[s] * value),
        ),
      ),
      strip(`output of head ${v.h}`, n.output),
    ],
  },
  {
    id: "join",
    title: "Heads joined and projected",
    part: "join",
    chapter: ["02_attention", "The output projection"],
    formula: "a = W<sub>o</sub> [o<sub>0</sub>, o<sub>1</sub>, …] + b",
    numbers: (v) => ({ heads: list(v.layer.heads), attended: list(v.layer.attended) }),
    say: (v, n) =>
      `The outputs of all ${v.H} heads stand side by side, ${v.H} × ${v.D} = ${v.C} values, and head ${v.h} fills number ${v.h * v.D} to ${(v.h + 1) * v.D - 1}. One more matrix mixes them into what attention adds to ${v.name(v.t)}, a vector of length ${short(norm(n.attended))}.`,
    draw: (_, n) => [strip("heads, side by side", n.heads), strip("projected", n.attended)],
  },
  {
    id: "residual",
    title: "Added to the residual stream",
    isSum: true,
    part: "plus1",
    chapter: ["03_block", "The shortcut"],
    formula: "x ← x + a",
    numbers: (v) => ({
      x: list(v.input),
      attended: list(v.layer.attended),
      middle: list(v.layer.middle),
    }),
    say: (v, n) =>
      `Attention does not replace the vector of ${v.name(v.t)}; its result is added to it, as in ${short(n.x[0])} + ${short(n.attended[0])} = ${short(n.middle[0])} for the first value. The length of the vector goes from ${short(norm(n.x))} to ${short(norm(n.middle))}.`,
    draw: (_, n) => [
      strip("x", n.x),
      strip("+ what attention adds", n.attended),
      strip("= x", n.middle),
    ],
  },
  {
    id: "feed-forward",
    title: "The feed-forward layer",
    part: "ffn",
    chapter: ["03_block", "The feed-forward layer"],
    formula: (v) =>
      v.activation === "swiglu"
        ? "x ← x + W<sub>down</sub> (silu(W<sub>gate</sub> x̂) · W<sub>up</sub> x̂)"
        : `x ← x + W<sub>2</sub> ${v.activation === "gelu" ? "GELU" : "ReLU"}(W<sub>1</sub> x̂ + b<sub>1</sub>) + b<sub>2</sub>`,
    numbers: (v) => ({
      normed: list(v.layer.normed2),
      inner: list(v.layer.inner),
      active: list(v.layer.inner).filter((value) => value > 0).length,
      fed: list(v.layer.fed),
      x: list(v.layer.x),
    }),
    say: (v, n) => {
      const many = `${n.active} of ${n.inner.length}`;
      const units = {
        relu: `${many} units are active for it, and ReLU has set the others to zero`,
        gelu: `${many} units are above zero, and GELU lets the others through only slightly below it`,
        swiglu: `each of the ${n.inner.length} units of this SwiGLU layer is multiplied by a gate, and ${n.active} come out positive`,
      }[v.activation];
      return `Now ${v.name(v.t)} is by itself: a normalized copy of its vector goes through a layer that is wider than the stream; ${units}. What comes back to ${v.C} values is added to the stream, which then has length ${short(norm(n.x))}.`;
    },
    draw: (_, n) => [
      strip("units", n.inner),
      strip("back to C values", n.fed),
      strip("x after the layer", n.x),
    ],
  },
];

const TO_TOKEN = [
  {
    id: "layers",
    title: "All layers, in short",
    part: "layers",
    chapter: ["03_block", "The block, step by step"],
    formula: "x ← x + attention(norm(x)), x ← x + feed-forward(norm(x))",
    numbers: (v) => ({ layers: v.trace.layers.map(({ x }) => list(x)) }),
    say: (v, n) => {
      const { weights } = v.trace.layers.at(-1);
      const head = best(weights.map((row) => row[best(row)]));
      return `Each of the ${n.layers.length} layers does the same with weights of its own, and the lengths of ${v.name(v.t)} after them are ${n.layers.map((x) => short(norm(x))).join(", ")}. In the last one, head ${head} looks hardest at one token: ${percent(weights[head][best(weights[head])])} of its weight is on ${v.name(best(weights[head]))}.`;
    },
    draw: (_, n) => n.layers.map((x, l) => strip(`x after layer ${l}`, x)),
  },
  {
    id: "final-norm",
    title: "The last norm",
    part: "norm",
    chapter: ["04_model", "Filling it in"],
    formula: "h = norm(x)",
    numbers: (v) => ({ x: list(v.trace.layers.at(-1).x), normed: list(v.trace.normed) }),
    say: (v, n) =>
      `A last ${v.isRms ? "RMSNorm" : "LayerNorm"} brings the vector of ${v.name(v.t)} from length ${short(norm(n.x))} to ${short(norm(n.normed))}. It now holds what the model has to say about the token that comes next.`,
    draw: (_, n) => [strip("x after the last layer", n.x), strip("normalized", n.normed)],
  },
  {
    id: "logits",
    title: "A logit for every token",
    part: "head",
    chapter: ["04_model", "From logits to a loss"],
    formula: "z = W<sub>head</sub> h, V values",
    numbers: (v) => ({ logits: list(v.trace.logits) }),
    say: (v, n) => {
      const [first, second] = topOf(n.logits, 2);
      return `The vector is compared with one row of the head for each of the ${n.logits.length} tokens, by a dot product again, and the results are called logits. After ${v.name(v.t)} the largest is ${short(n.logits[first])} for “${visible(v.show(first))}”, ahead of ${short(n.logits[second])} for “${visible(v.show(second))}”.`;
    },
    draw: (v, n) => [
      candidates("the largest logits", topOf(n.logits), n.logits, v, short),
      strip(
        `logits of tokens 0 to ${Math.min(255, n.logits.length - 1)}`,
        n.logits.slice(0, 256),
        [...Array(256).keys()].map((id) => (id < n.logits.length ? visible(v.show(id)) : "")),
      ),
    ],
  },
  {
    id: "probabilities",
    title: "Probabilities",
    part: "probabilities",
    chapter: ["06_generate", "All the controls together"],
    formula: "p = softmax(z / temperature), then top-k, top-p and min-p",
    numbers: (v) => ({ own: list(softmax(v.trace.logits)), bent: list(followed(v)) }),
    say: (v, n) => {
      const at = best(n.bent);
      return `Softmax makes probabilities of the logits: by itself, the model gives “${visible(v.show(at))}” ${percent(n.own[at])}. With the controls above, at temperature ${v.settings.temperature}, it is ${percent(n.bent[at])}, and ${n.bent.filter((p) => p > 0).length} tokens are left to draw from.`;
    },
    draw: (v, n) => [
      candidates("the model", topOf(n.bent, 6), n.own, v, percent),
      candidates("with your settings", topOf(n.bent, 6), n.bent, v, percent),
    ],
  },
  {
    id: "draw",
    title: "The token drawn",
    part: "drawn",
    chapter: ["06_generate", "Sampling"],
    formula: "next token ~ p",
    numbers: (v) => ({
      next: v.ids[v.first + v.t + 1] ?? null,
      bent: list(followed(v)),
    }),
    say: (v, n) => {
      const at = n.next ?? best(n.bent);
      const what = `“${visible(v.show(at))}”`;
      return n.next === null
        ? `Nothing stands after ${v.name(v.t)} yet: one token is drawn at random, each with its probability, and ${what} would come in ${percent(n.bent[at])} of the draws. Press “One token” to draw, and the walk begins again with the token that was drawn.`
        : `After ${v.name(v.t)} your text goes on with ${what}${v.first + v.t + 1 < v.prompt ? ", which you gave it" : ", which was drawn"}. With the present settings its probability is ${percent(n.bent[at])}, and its own walk begins at its id, ${at}.`;
    },
    draw: (v, n) => [candidates("what can be drawn", topOf(n.bent), n.bent, v, percent)],
  },
];

export const STEPS = [...TO_HEAD, ...TO_STREAM, ...TO_TOKEN];
