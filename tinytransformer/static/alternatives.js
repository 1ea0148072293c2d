// What could come in place of a token, or next: by the model, under the reader's settings and, for a
// text that the grammar could have written, in truth.
import { nextDistribution, softmax } from "engine";
import { make, percent, visible } from "parts";

const SHOWN = 10; // tokens in the list

/** Where the articles of a text begin. */
function headings(text) {
  const found = [...text.matchAll(/^ = (?!=).*? = $/gm)].map((heading) => heading.index);
  return found[0] === 0 ? found : [0, ...found];
}

/** For each token the truth before it, and one more for what comes next; null where the text is
 * none that the grammar could have written. The truth about an article begins with its heading. */
export function truths(page) {
  if (!page.reader || page.running) return [];
  const { text, known } = page;
  if (known?.text !== text || known.length !== text.ids.length)
    page.known = { text, length: text.ids.length, truths: readTruths(page) };
  return page.known.truths;
}

function readTruths(page) {
  const text = page.tokenizer.decode(page.text.ids);
  const starts = headings(text);
  const found = starts.flatMap((start, i) => {
    const truth = page.reader.read(text.slice(start, starts[i + 1]));
    return i + 1 < starts.length ? truth.slice(0, -1) : truth;
  });
  return found.length === page.text.ids.length + 1 ? found : [];
}

function distributions(page) {
  const i = page.chosen ?? page.text.ids.length;
  const logits = page.chosen === null ? page.text.logits : page.before[i];
  if (!logits) return null;
  const ids = page.text.ids.slice(0, i);
  return {
    own: softmax(logits),
    bent: nextDistribution(logits, ids, ids.slice(page.prompt), page.settings()),
    truth: page.truths()[i] ?? null,
  };
}

/** Show the list for the chosen token, or for the next one, in `host`. Gives the earlier tokens
 * that a recalled fact repeats. */
export function listAlternatives(host, page) {
  const found = page.text.ids.length ? distributions(page) : null;
  if (!found) {
    const why = page.text.ids.length
      ? "This is the first token: nothing came before it, so the model was not asked for it."
      : "There is no text yet.";
    host.replaceChildren(make("p", { className: "soft", textContent: why }));
    return [];
  }
  const { own, bent, truth } = found;
  const order = [...own.keys()].sort((a, b) => bent[b] - bent[a] || own[b] - own[a]);
  const current = page.chosen === null ? null : page.text.ids[page.chosen];
  const rows = order.slice(0, SHOWN);
  if (current !== null && !rows.includes(current)) rows.push(current);
  const title =
    current === null ? "Next token: " : `In place of “${visible(page.tokenizer.show(current))}”: `;
  const caption = make("caption", {}, make("strong", { textContent: title }));
  const names = ["token", "model", "your settings", ...(truth ? ["truth"] : [])];
  const head = make("tr", {}, ...names.map((name) => make("th", { textContent: name })));
  const body = rows.map((id) => makeRow(page, id, own, bent, truth));
  host.replaceChildren(
    make("table", {}, caption, make("thead", {}, head), make("tbody", {}, ...body)),
  );
  const recalled = truth && recalledFact(page, truth);
  const words = truth ? [judge(own, truth), ...(recalled ? [recalled.words] : [])] : [];
  host.append(...words.map((textContent) => make("p", { className: "soft", textContent })));
  return recalled?.tokens ?? [];
}

/** How far the model is from the truth at this token, in a sentence. */
function judge(own, truth) {
  let far = 0;
  for (const [id, p] of truth) far += p * Math.log(p / own[id]);
  const many =
    truth.size === 1 ? "only one token is possible" : `${truth.size} tokens are possible`;
  return `In truth, ${many} here. The model pays ${Math.max(0, far).toFixed(3)} nats above it.`;
}

function makeRow(page, id, own, bent, truth) {
  const bar = (p) => {
    const div = make("div");
    div.style.width = `${(100 * p).toFixed(2)}%`;
    return div;
  };
  const text = page.tokenizer.show(id);
  const button = make("button", { type: "button", className: "small", textContent: visible(text) });
  button.title = page.chosen === null ? "write this token" : "take this token instead";
  button.addEventListener("click", () => page.take(id));
  const isCurrent = page.chosen !== null && page.text.ids[page.chosen] === id;
  return make(
    "tr",
    { className: isCurrent ? "chosen" : "" },
    make("td", {}, button),
    make("td", { className: "number", textContent: percent(own[id]) }),
    make("td", { className: "number", textContent: percent(bent[id]) }),
    truth
      ? make("td", { className: "number truth", textContent: percent(truth.get(id) ?? 0) })
      : make("td", { className: "bar" }, bar(own[id]), bar(bent[id])),
  );
}

/** The recalled fact in the chosen token, or in the only one that can come next: what it says, and
 * the earlier tokens that it repeats. */
function recalledFact(page, truth) {
  const { tokenizer, text } = page;
  const i = page.chosen ?? text.ids.length;
  const id = page.chosen === null && truth.size === 1 ? [...truth.keys()][0] : text.ids[i];
  if (id === undefined) return null;
  const pieces = tokenizer.pieces([...text.ids.slice(0, i), id]);
  const starts = [];
  let end = 0;
  for (const piece of pieces) {
    starts.push(end);
    end += piece.length;
  }
  const whole = pieces.join("");
  const begin = headings(whole)
    .filter((start) => start <= starts[i])
    .at(-1);
  const found = page.reader.recall(whole.slice(begin), starts[i] - begin);
  if (!found) return null;
  const tokens = found.letters.map((letter) =>
    starts.findLastIndex((start) => start <= begin + letter),
  );
  const names = tokens.map((at) => `“${visible(tokenizer.show(text.ids[at]))}” (token ${at})`);
  const words = `Here the fact “${found.name}” is recalled, ${found.words}. The token repeats ${names.join(" and ")}, underlined in the text.`;
  return { tokens, words };
}
