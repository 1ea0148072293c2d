// One line to type in, and a model that writes an article about it. Point at a word to see how likely
// it was, and where the head that copies facts looked. article.html is its page.

import { drawToken, nextDistribution, randomNumbers, readModel, SETTINGS, Text } from "engine";
import { fitFrame } from "frame";
import { make, percent, visible } from "parts";

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const LONGEST = 180; // tokens of an article
const PACE = 35; // milliseconds from one token to the next, slow enough to read along
const CONTROLS = { ...SETTINGS, temperature: 0.8 };
const random = randomNumbers(Date.now());

let model;
let tokenizer;
let text; // what the model has read
let given = 0; // how many of its tokens are the heading
let chances = []; // of each token, before it came; null for the heading
let timer;

function say(message) {
  $("said").textContent = message;
}

/** Put the newest token on the page. */
function show() {
  const i = text.ids.length - 1;
  const pieces = tokenizer.pieces(text.ids); // a character can need several tokens
  for (const [at, node] of [...$("text").children].entries()) node.textContent = pieces[at];
  const node = make("span", { id: `token-${i}`, textContent: pieces[i] });
  node.setAttribute("role", "option");
  node.setAttribute("aria-label", visible(tokenizer.show(text.ids[i])));
  node.setAttribute("aria-selected", "false");
  node.classList.toggle("given", i < given);
  const isAtEnd = $("text").scrollTop + $("text").clientHeight > $("text").scrollHeight - 40;
  $("text").append(node);
  if (isAtEnd) $("text").scrollTop = $("text").scrollHeight;
}

/** Write one token more. False if the article has ended: where the heading of another begins. */
function writeOne() {
  const { ids, logits } = text;
  const bent = nextDistribution(logits, ids, ids.slice(given), CONTROLS);
  const id = drawToken(bent, random());
  const isHeading = tokenizer.decode(ids.slice(-3)).endsWith("\n =");
  if (isHeading && tokenizer.show(id) !== " =") {
    $("text").lastElementChild.remove(); // the sign that was to open the heading
    return false;
  }
  chances.push(bent[id]);
  text.push(id);
  show();
  return text.ids.length < given + LONGEST;
}

/** Begin an article with this heading, and write on, a token at a time. */
function write(name) {
  clearTimeout(timer);
  $("text").replaceChildren();
  const ids = tokenizer.encode(` = ${name.trim()} = \n`).slice(0, model.config.seq_len / 2);
  text = new Text(model);
  given = ids.length;
  chances = ids.map(() => null);
  for (const id of ids) {
    text.push(id);
    show();
  }
  say("Point at a word of the text to see how likely it was, and where the model looked for it.");
  const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const goOn = () => {
    let goesOn = writeOne();
    while (isStill && goesOn) goesOn = writeOne();
    if (goesOn) timer = setTimeout(goOn, PACE);
  };
  goOn();
}

/** Mark what the copying head looked at when this token was about to be written. */
function choose(i) {
  const nodes = [...$("text").children];
  for (const [at, node] of nodes.entries()) {
    node.style.background = "";
    node.setAttribute("aria-selected", String(at === i));
  }
  $("text").setAttribute("aria-activedescendant", `token-${i}`);
  const word = visible(tokenizer.show(text.ids[i]));
  const first = text.ids.length - text.traces.length; // earlier tokens have left the window
  const trace = text.traces[i - 1 - first];
  if (chances[i] === null) return say(`“${word}” is part of the heading, which was given.`);
  const [layer, head] = data.head;
  const weights = trace?.layers[layer].weights[head] ?? [];
  for (const [at, weight] of weights.entries())
    if (weight > 0.02)
      nodes[first + at].style.background =
        `color-mix(in srgb, var(--rare) ${Math.round(75 * weight)}%, transparent)`;
  const most = weights.indexOf(Math.max(...weights));
  const looked =
    most < 0
      ? ""
      : ` Head ${head} of layer ${layer}, which often copies facts, looked most at` +
        ` “${visible(tokenizer.show(text.ids[first + most]))}” (${percent(weights[most])}).`;
  say(`“${word}” had a probability of ${percent(chances[i])}.${looked}`);
}

function listen() {
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if ($("name").value.trim()) write($("name").value);
    else say("Give a name, for example that of a friend.");
  });
  $("other").addEventListener("click", () => {
    $("name").value = data.names[Math.floor(random() * data.names.length)];
    write($("name").value);
  });
  for (const kind of ["click", "pointerover"])
    $("text").addEventListener(kind, ({ target }) => {
      if (target.role === "option") choose([...$("text").children].indexOf(target));
    });
  $("text").addEventListener("keydown", (event) => {
    const at = [...$("text").children].findIndex((node) => node.ariaSelected === "true");
    const to = { ArrowRight: at + 1, ArrowLeft: at < 0 ? $("text").children.length - 1 : at - 1 }[
      event.key
    ];
    if (to === undefined) return;
    event.preventDefault();
    choose(Math.min(Math.max(to, 0), $("text").children.length - 1));
    $("text").children[to]?.scrollIntoView({ block: "nearest" });
  });
}

async function start() {
  [model, tokenizer] = await readModel(data);
  listen();
  $("name").value = data.names[0];
  write(data.names[0]);
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => say(`The model cannot be read: ${error.message}.`));
fitFrame();
