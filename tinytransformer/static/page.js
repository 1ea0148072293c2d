// A model in a page: it writes, shows what else could have come, and draws where it looked.
// `engine` is engine.js and `attention_map` is attention_map.js; model_page.py puts all of them into
// one file. What a model writes is only ever set as text, never as HTML.
//
// A panel is a part of the page in a module of its own, such as map_panel.js: {id, title, css,
// isOpen, isFor, start}. `isFor(data)` says whether this page has it; default: it has. `start(host, page)` fills its element, and gives the function that is called with
// what changed. It reads `page` (below), and may call page.choose, page.read and page.useModel.
import { listAlternatives, truths } from "alternatives";
import {
  drawToken,
  nextDistribution,
  randomNumbers,
  readModel,
  SETTINGS,
  softmax,
  Text,
} from "engine";
import { fitFrame } from "frame";
import { TokenReader } from "grammar";
import { panel as learned } from "history";
import { panel as inside } from "inside";
import { panel as map } from "map_panel";
import { make, visible } from "parts";
import { panel as walk } from "walk";

const $ = (id) => document.getElementById(id);
const LONGEST = 200; // tokens that one click on Write adds at most
const PANELS = [learned, map, walk, inside];

// --- the state of the page

const data = JSON.parse($("data").textContent);
const random = randomNumbers(Date.now());
const page = {
  data,
  model: null,
  tokenizer: null,
  reader: null, // knows the truth, if the text is that of a grammar
  prompt: 0, // how many of the tokens are the prompt
  text: null, // what the model has read, with its heads off
  whole: null, // the same text with every head on; the same object if none is off
  before: [], // for each token the logits (V) that came before it
  off: new Set(), // "layer.head" of those that are switched off
  known: null, // the truths about the text, as alternatives.js keeps them
  sources: [], // the earlier tokens that the shown one repeats, if it is a recalled fact
  chosen: null, // index of the token that is shown; null: the next one
  running: false,
  isPainted: false, // the first table is drawn with no truth, because the truth takes its time
  panels: [],
  wait: null, // the timer until the panels hear of a new text
  typing: null, // the timer that waits for the end of typing; null if nothing was typed
  settings,
  truths: () => (page.isPainted ? truths(page) : []),
  choose,
  take,
  read, // (ids): read these tokens as the prompt
  useModel, // (model): from now on this model reads and writes, as one of an earlier step would
};

function say(message, wrong = false) {
  $("said").textContent = message;
  $("said").classList.toggle("wrong", wrong);
}

function settings() {
  const given = [...$("controls").querySelectorAll("input")].map((input) => [
    input.name,
    Number(input.value),
  ]);
  return { ...SETTINGS, ...Object.fromEntries(given) };
}

function push(id) {
  page.before.push(page.text.logits);
  page.text.push(id);
  if (page.whole !== page.text) page.whole.push(id);
}

/** Read these tokens from the start. */
function restart(ids) {
  page.before = [];
  page.text = new Text(page.model, page.off);
  page.whole = page.off.size ? new Text(page.model) : page.text;
  for (const id of ids) push(id);
}

/** Read these tokens as the prompt. */
function read(ids) {
  page.running = false;
  page.chosen = null;
  page.prompt = ids.length;
  restart(ids);
  $("tokens").replaceChildren();
  showAll();
}

/** What the prompt says, cut to what the model can see. */
function readPrompt() {
  clearTimeout(page.typing);
  page.typing = null;
  const { seq_len: context } = page.model.config;
  const prompt = $("prompt").value;
  const ids = page.tokenizer.encode(prompt);
  read(ids.slice(-context));
  if (ids.length === 0) say("The prompt is empty: give the model at least one character.");
  else if (ids.length > context)
    say(
      `The prompt has ${ids.length.toLocaleString("en")} tokens, and the model sees at most` +
        ` ${context}: it reads the last ${context}.`,
    );
  else if (!prompt.isWellFormed())
    say("The prompt holds half of a character; the model reads � in its place.");
  else say("");
}

// --- the text

function probability(i) {
  const logits = page.before[i];
  return logits && softmax(logits)[page.text.ids[i]];
}

function makeOption(id, piece, i) {
  const node = make("span", { id: `token-${i}`, tokenId: id, piece, textContent: piece });
  node.setAttribute("role", "option");
  node.setAttribute("aria-label", visible(page.tokenizer.show(id)));
  node.classList.toggle("prompt", i < page.prompt);
  node.p = probability(i) ?? 1;
  return node;
}

/** Darker where the model was more surprised, or where it was more surprised than it had to be. */
function shade() {
  const isAbove = $("above").checked;
  const known = isAbove ? page.truths() : [];
  for (const [i, node] of [...$("tokens").children].entries()) {
    const truth = isAbove ? known[i]?.get(node.tokenId) : 1;
    const rare = truth ? Math.max(0, 1 - node.p / truth) : 0;
    if (node.rare === rare) continue;
    node.rare = rare;
    node.style.background = `color-mix(in srgb, var(--rare) ${(45 * rare).toFixed(0)}%, transparent)`;
  }
}

function showText() {
  const box = $("tokens");
  const { ids } = page.text;
  const pieces = page.tokenizer.pieces(ids);
  const nodes = [...box.children];
  const isOther = (node, i) => node.tokenId !== ids[i] || node.piece !== pieces[i];
  const changed = nodes.findIndex(isOther);
  if (changed >= 0) for (const node of nodes.slice(changed)) node.remove();
  for (let i = box.children.length; i < ids.length; i++)
    box.append(makeOption(ids[i], pieces[i], i));
  shade();
  for (const [i, node] of [...box.children].entries())
    node.setAttribute("aria-selected", String(i === page.chosen));
  if (page.chosen === null) box.removeAttribute("aria-activedescendant");
  else box.setAttribute("aria-activedescendant", `token-${page.chosen}`);
}

function showAlternatives() {
  page.sources = listAlternatives($("token"), page);
  for (const [i, node] of [...$("tokens").children].entries())
    node.classList.toggle("source", page.sources.includes(i));
}

// --- what can be done with it

/** Write this token: next, or in place of the chosen one, and forget what came after. */
function take(id) {
  if (page.running) return;
  if (page.chosen !== null) {
    const ids = page.text.ids.slice(0, page.chosen);
    page.prompt = Math.min(page.prompt, page.chosen);
    page.chosen = null;
    restart(ids);
  }
  push(id);
  say(`“${visible(page.tokenizer.show(id))}” was written; the text goes on from there.`);
  showAll();
}

// --- heads and loss

/** Nats per token that follows another in the text. */
function meanLoss(text) {
  const { ids, surprises } = text;
  return ids.length < 2 ? null : surprises.reduce((sum, s) => sum + s, 0) / surprises.length;
}

function showLoss() {
  const [now, whole] = [meanLoss(page.text), meanLoss(page.whole)];
  if (now === null) $("loss").textContent = "";
  else if (page.off.size === 0)
    $("loss").textContent = `Loss of this text: ${whole.toFixed(3)} nats per token.`;
  else
    $("loss").textContent =
      `Loss of this text without ${[...page.off].join(", ")}: ${now.toFixed(3)} nats per token;` +
      ` with every head ${whole.toFixed(3)}.`;
}

function makeHeads() {
  const { num_layers: layers, num_heads: heads } = page.model.config;
  for (let layer = 0; layer < layers; layer++)
    for (let head = 0; head < heads; head++) {
      const name = `${layer}.${head}`;
      const button = make("button", { type: "button", className: "small", textContent: name });
      button.setAttribute("aria-pressed", "false");
      button.setAttribute("aria-label", `switch off head ${head} of layer ${layer}`);
      button.addEventListener("click", () => switchHead(name, button));
      $("heads").append(button);
    }
}

function switchHead(name, button) {
  if (page.running) return;
  if (!page.off.delete(name)) page.off.add(name);
  button.setAttribute("aria-pressed", String(page.off.has(name)));
  readAgain();
}

/** The same text once more: what the model thinks of its tokens has changed. */
function readAgain() {
  restart(page.text.ids);
  $("tokens").replaceChildren();
  showAll();
}

function useModel(model) {
  page.model = model;
  readAgain();
}

// --- panels

/** What changed: "text" (or the model that reads it), "choice" (of a token) or "settings". The
 * open panels hear of a new text once nothing has changed for a moment. */
function showPanels(changed) {
  if (changed === "text") {
    clearTimeout(page.wait);
    page.wait = setTimeout(() => {
      page.wait = null;
      if (!page.running) for (const panel of page.panels) panel.update(changed);
    }, 150);
  } else if (page.wait === null) for (const panel of page.panels) panel.update(changed);
}

/** A `details` element of its own for a panel, which begins when it is first opened. An error in
 * it becomes a sentence there, and the page goes on. */
function addPanel({ id, title, css = "", isOpen = false, start }) {
  const host = make("div", { id });
  const details = make("details", { id: `${id}-details`, open: isOpen });
  details.append(make("summary", { textContent: title }), host);
  $("panels").append(make("style", { textContent: css }), details);
  let change = null;
  const update = async (changed) => {
    if (!details.open || !page.text || page.running) return;
    try {
      const isFirst = !change;
      change ??= start(host, page);
      await change(isFirst ? "text" : changed);
      details.dataset.ready = "true";
    } catch (error) {
      change = null;
      host.replaceChildren(make("p", { role: "alert", textContent: `${error.message}.` }));
    }
  };
  page.panels.push({ update });
  details.addEventListener("toggle", () => update("text"));
}

// --- what can be asked for

function showAll() {
  showText();
  showAlternatives();
  showLoss();
  $("write").disabled = $("one").disabled = page.running || !page.text.ids.length;
  $("stop").disabled = !page.running;
  if (!page.running) showPanels("text");
}

function writeOne() {
  const { ids, logits } = page.text;
  const p = nextDistribution(logits, ids, ids.slice(page.prompt), settings());
  push(drawToken(p, random()));
}

/** Do not wait any longer for the end of typing. */
function finishTyping() {
  if (page.typing !== null) readPrompt();
}

/** Write many tokens, as many in each frame as there is time for. */
function write() {
  finishTyping();
  if (page.running || !page.text.ids.length) return;
  page.running = true;
  page.chosen = null;
  const began = performance.now();
  let written = 0;
  say("writing …");
  const frame = guarded(() => {
    const until = performance.now() + 10;
    while (page.running && written < LONGEST && performance.now() < until) {
      writeOne();
      written++;
    }
    const done = !page.running || written >= LONGEST;
    if (done) {
      page.running = false;
      say(`${written} tokens in ${((performance.now() - began) / 1000).toFixed(2)} s`);
    } else requestAnimationFrame(frame);
    showAll();
    $("tokens").scrollTop = $("tokens").scrollHeight;
  });
  requestAnimationFrame(frame);
}

/** The function, with a sentence in place of an error. */
function guarded(work) {
  return (...args) => {
    try {
      return work(...args);
    } catch (error) {
      page.running = false;
      say(error.message, true);
    }
  };
}

function choose(i) {
  if (page.running) return;
  page.chosen = i;
  showText();
  showAlternatives();
  showPanels("choice");
}

function moveChoice(event) {
  const last = page.text.ids.length - 1;
  const at = page.chosen ?? last + 1;
  const to = {
    ArrowRight: at + 1,
    ArrowDown: at + 1,
    ArrowLeft: at - 1,
    ArrowUp: at - 1,
    Home: 0,
    End: last,
    Escape: last + 1,
  }[event.key];
  if (to === undefined || last < 0) return;
  event.preventDefault();
  choose(to > last ? null : Math.max(0, to));
  if (page.chosen !== null) $(`token-${page.chosen}`).scrollIntoView({ block: "nearest" });
}

function listen() {
  $("prompt").addEventListener("input", () => {
    page.running = false;
    clearTimeout(page.typing);
    page.typing = setTimeout(guarded(readPrompt), 120);
  });
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    guarded(write)();
  });
  $("one").addEventListener(
    "click",
    guarded(() => {
      finishTyping();
      if (!page.text.ids.length) return;
      page.chosen = null;
      writeOne();
      say("");
      showAll();
    }),
  );
  $("stop").addEventListener("click", () => {
    page.running = false;
  });
  $("clear").addEventListener("click", guarded(readPrompt));
  $("tokens").addEventListener("click", ({ target }) => {
    if (target.role === "option") choose([...$("tokens").children].indexOf(target));
  });
  $("tokens").addEventListener("keydown", moveChoice);
  $("above").addEventListener("change", guarded(shade));
  $("controls").addEventListener("input", ({ target }) => {
    const { value, name } = target;
    target.previousElementSibling.textContent = name === "top_k" && value === "0" ? "all" : value;
    showAlternatives();
    showPanels("settings");
  });
}

const shorten = (text) => (text.length > 40 ? `${text.slice(0, 16)}…${text.slice(-23)}` : text);

function makeExamples() {
  for (const example of data.examples) {
    const button = make("button", {
      type: "button",
      className: "small",
      textContent: shorten(visible(example)),
    });
    button.addEventListener("click", () => {
      page.running = false;
      $("prompt").value = example;
      guarded(readPrompt)();
    });
    $("examples").append(button);
  }
}

/** Wait until what there is has been drawn. A hidden tab draws nothing, so the wait is short. */
function nextPaint() {
  return new Promise((done) => {
    requestAnimationFrame(() => setTimeout(done));
    setTimeout(done, 200);
  });
}

async function start() {
  [page.model, page.tokenizer] = await readModel(data);
  if (data.grammar) page.reader = new TokenReader(page.tokenizer, data.grammar);
  $("above").parentElement.hidden = !page.reader;
  $("app").hidden = false;
  makeHeads();
  makeExamples();
  for (const panel of PANELS) if (panel.isFor?.(data) ?? true) addPanel(panel);
  listen();
  $("prompt").value = data.prompt;
  guarded(readPrompt)();
  await nextPaint();
  page.isPainted = true;
  if (page.reader) showAlternatives();
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  $("about").after(
    make("p", { role: "alert", textContent: `The model cannot be read: ${error.message}.` }),
  );
});
fitFrame();
