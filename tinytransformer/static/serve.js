// The server's page. It asks for text, shows each token as soon as it comes, and how likely it was. What a model writes is always inserted as text, never as HTML.
import map from "./attention_map.js";

const $ = (id) => document.getElementById(id),
  make = (name, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(name), properties);
    node.append(...children);
    return node;
  };
const shown = (token) => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅"; // white space becomes visible
const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 0.1 ? `${p.toFixed(1)} %` : `${p.toPrecision(2)} %`;
};
let running = null,
  model = null,
  endMap = null,
  text = "";

function say(message, wrong = false) {
  $("said").textContent = message;
  $("said").classList.toggle("wrong", wrong);
}

async function ask(path, body) {
  const headers = {
    ...(body && { "Content-Type": "application/json" }),
    ...($("key").value && { Authorization: `Bearer ${$("key").value}` }),
  };
  const answer = await fetch(path, {
    method: body ? "POST" : "GET",
    headers,
    body: body && JSON.stringify(body),
    signal: running?.signal,
  });
  if (answer.ok) return answer;
  if (answer.status === 401) {
    $("locked").hidden = false;
    $("key").focus();
  }
  throw new Error((await answer.json()).error.message);
}

async function nameModel() {
  model ??= (await (await ask("v1/models")).json()).data[0].id;
  $("model").textContent = model;
}

// --- the text

async function* events(answer) {
  let rest = "";
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

function addToken(choice) {
  const node = make("span", { textContent: choice.text });
  node.setAttribute("role", "option");
  node.setAttribute("aria-selected", "false");
  node.logprobs = choice.logprobs;
  const p = Math.exp(Math.min(...choice.logprobs.token_logprobs));
  node.style.background = `color-mix(in srgb, var(--rare) ${(40 * (1 - p)).toFixed(1)}%, transparent)`;
  node.title = `${shown(choice.logprobs.tokens.join(""))}: ${percent(choice.logprobs.token_logprobs[0])}`;
  $("tokens").append(node);
}

function choose(node) {
  for (const old of $("tokens").querySelectorAll("[aria-selected=true]"))
    old.setAttribute("aria-selected", "false");
  node.setAttribute("aria-selected", "true");
  node.id = "chosen-token";
  for (const other of $("tokens").querySelectorAll("[id]"))
    if (other !== node) other.removeAttribute("id");
  $("tokens").setAttribute("aria-activedescendant", node.id);
  const { tokens, token_logprobs, top_logprobs } = node.logprobs;
  $("token").replaceChildren(
    ...tokens.map((token, i) => {
      const bar = (p) => {
        const div = make("div");
        div.style.width = `${100 * Math.exp(p)}%`;
        return div;
      };
      const row = ([name, p]) =>
        make(
          "tr",
          { className: name === token ? "chosen" : "" },
          make("td", { textContent: shown(name) }),
          make("td", { textContent: percent(p) }),
          make("td", {}, bar(p)),
        );
      const rows = Object.entries(top_logprobs[i])
        .sort((a, b) => b[1] - a[1])
        .map(row);
      return make(
        "table",
        {},
        make("caption", { textContent: `“${shown(token)}”: ${percent(token_logprobs[i])}` }),
        make("tbody", {}, ...rows),
      );
    }),
  );
}

$("tokens").addEventListener("pointerover", ({ target }) => {
  if (target.logprobs) choose(target);
});
$("tokens").addEventListener("click", ({ target }) => {
  if (target.logprobs) choose(target);
});
$("tokens").addEventListener("focus", () => {
  if (!$("tokens").querySelector("[aria-selected=true]") && $("tokens").firstElementChild)
    choose($("tokens").firstElementChild);
});
$("tokens").addEventListener("keydown", (event) => {
  const all = [...$("tokens").children],
    at = all.findIndex((node) => node.id === "chosen-token");
  const to = {
    ArrowRight: at + 1,
    ArrowDown: at + 1,
    ArrowLeft: at - 1,
    ArrowUp: at - 1,
    Home: 0,
    End: all.length - 1,
  }[event.key];
  if (to === undefined || !all.length) return;
  event.preventDefault();
  choose(all[Math.max(0, Math.min(all.length - 1, to))]);
});

// --- the buttons

async function busy(work) {
  running = new AbortController();
  $("stop").disabled = false;
  document.querySelector("[type=submit]").disabled = $("draw").disabled = true;
  try {
    await nameModel();
    await work();
  } catch (error) {
    error.name === "AbortError" ? say("stopped") : say(error.message, true);
  } finally {
    running = null;
    $("stop").disabled = true;
    document.querySelector("[type=submit]").disabled = false;
    $("draw").disabled = !text;
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  busy(async () => {
    const knobs = Object.fromEntries(
      [...new FormData($("ask"))]
        .filter(([, value]) => value !== "")
        .map(([name, value]) => [name, Number(value)]),
    );
    const prompt = $("prompt").value;
    const began = performance.now();
    text = prompt;
    endMap?.();
    endMap = null;
    $("map").replaceChildren();
    $("tokens").replaceChildren();
    $("tokens").removeAttribute("aria-activedescendant");
    $("prompted").textContent = prompt;
    say("writing …");
    let written = 0,
      reason = null;
    for await (const chunk of events(
      await ask("v1/completions", { model, prompt, stream: true, logprobs: 5, ...knobs }),
    )) {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      text += choice.text;
      written += choice.logprobs.tokens.length;
      reason = choice.finish_reason;
      addToken(choice);
    }
    say(
      `${written} tokens in ${((performance.now() - began) / 1000).toFixed(2)} s, ended by ${reason === "stop" ? "a stop string" : "max_tokens"}`,
    );
  });
});

$("stop").addEventListener("click", () => running?.abort());
$("draw").addEventListener("click", () =>
  busy(async () => {
    say("drawing the attention map …");
    const data = await (await ask("attention", { prompt: text })).json();
    endMap?.();
    endMap = map.render({ model: { get: () => data, on() {}, off() {} }, el: $("map") });
    say(`attention map of ${data.tokens.length} tokens`);
  }),
);
$("ask").addEventListener("input", ({ target }) => {
  if (target.type === "range") target.previousElementSibling.textContent = target.value;
});
$("key").addEventListener("change", () =>
  nameModel().then(
    () => say(""),
    (error) => say(error.message, true),
  ),
);
nameModel().catch((error) => say(error.message, true));
document.documentElement.dataset.ready = "true";
