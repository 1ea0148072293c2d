// The truth about a text of TinyWiki: the exact distribution of its next token, given the grammar.
// A copy of what nbs/appendix/answer_key.ipynb explains and proves; the tests hold both together.

const FIELD = /\{(\w+)(?:([:=])([^{}]*))?\}/; // {name}, {fact:rule} and {fact=text}
const NEXT_ARTICLE = " = "; // how the text goes on after the end of an article

/** The alternatives of a rule and their probabilities. */
function odds(rule) {
  const weights = Array.isArray(rule) ? rule.map((option) => [option, 1]) : Object.entries(rule);
  const total = weights.reduce((sum, [, weight]) => sum + weight, 0);
  return weights.map(([option, weight]) => [option, weight / total]);
}

/** What can follow `text`: Map from the words up to the next choice, or "" where the article can
 * end, to their probabilities. Empty where the grammar cannot write such a beginning. Facts of the
 * text that can be repeated here are put into `recalls`: {name, words, first letter}. */
export function continuations(grammar, text, symbol = "article", recalls = []) {
  const found = new Map();
  const keep = (words, p) => found.set(words, (found.get(words) ?? 0) + p);

  function read(words, at, p) {
    if (text.startsWith(words, at)) return at + words.length;
    if (words.startsWith(text.slice(at))) keep(words.slice(text.length - at), p);
    return null;
  }

  /** Every way to read a template from character `at` on: [end, probability, facts]. */
  function* match(template, at, p, facts) {
    const field = FIELD.exec(template);
    const start = read(field ? template.slice(0, field.index) : template, at, p);
    if (start === null) return;
    if (!field) {
      yield [start, p, facts];
      return;
    }
    for (const way of fill(field, start, p, facts))
      yield* match(template.slice(field.index + field[0].length), ...way);
  }

  function* fill([, name, kind, value], start, p, facts) {
    if (kind === "=") yield [start, p, { ...facts, [name]: value }];
    else if (kind === ":")
      for (const [end, q, known] of expand(value, start, p, facts))
        yield [end, q, { ...known, [name]: text.slice(start, end) }];
    else if (Object.hasOwn(facts, name)) {
      const end = read(facts[name], start, p);
      if (end === null && facts[name].startsWith(text.slice(start)))
        recalls.push({ name, words: facts[name], first: start });
      if (end !== null) yield [end, p, facts];
    } else yield* expand(name, start, p, facts);
  }

  function* expand(rule, at, p, facts) {
    for (const [option, q] of odds(grammar[rule])) yield* match(option, at, p * q, facts);
  }

  for (const [end, p] of expand(symbol, 0, 1, {})) if (end === text.length) keep("", p);
  const total = [...found.values()].reduce((sum, p) => sum + p, 0);
  return new Map([...found].map(([words, p]) => [words, p / total]));
}

/** The exact distribution of the next token of an article. */
export class TokenReader {
  #words = new Map(); // text -> its next words

  constructor(tokenizer, grammar, symbol = "article") {
    this.tokenizer = tokenizer;
    this.grammar = grammar;
    this.symbol = symbol;
  }

  #isComplete(text) {
    return text.length >= this.tokenizer.cut(text)[0].length + 2;
  }

  /** Texts that go on until the word from character `start` on is complete: [text, probability]. */
  *#extend(text, start, p) {
    const options = continuations(this.grammar, text, this.symbol);
    if (options.has("")) {
      yield [text + NEXT_ARTICLE, p * options.get("")];
      options.delete("");
    }
    const isOpen = (words) => !this.#isComplete(text.slice(start) + words);
    while (options.size) {
      const words = [...options.keys()].reduce((a, b) => (b.length < a.length ? b : a));
      if (!isOpen(words)) {
        yield [text + words, p * options.get(words)];
        options.delete(words);
        continue;
      }
      // what goes on from here is found again further on, so it is taken out of the options
      let mass = 0;
      for (const [other, q] of [...options])
        if (other.startsWith(words)) {
          mass += q;
          options.delete(other);
        }
      yield* this.#extend(text + words, start, p * mass);
    }
  }

  /** What the next word can be, given that the last word, from `last` on, has ended. */
  nextWords(text, last) {
    if (this.#words.has(text)) return this.#words.get(text);
    const found = new Map();
    for (const [longer, p] of this.#extend(text, text.length, 1)) {
      const words = this.tokenizer.cut(longer.slice(last));
      if (text && words[0].length !== text.length - last) continue; // the last word goes on
      const word = words[text ? 1 : 0];
      found.set(word, (found.get(word) ?? 0) + p);
    }
    const total = [...found.values()].reduce((sum, p) => sum + p, 0);
    for (const [word, p] of found) found.set(word, p / total);
    if (this.#words.size > 5000) this.#words.clear();
    this.#words.set(text, found);
    return found;
  }

  /** What can follow the first tokens of a word: Map from token id to probability. */
  #nextTokens(words, known, text) {
    const fitting = [...words]
      .map(([word, p]) => [word, p, this.tokenizer.encode(word)])
      .filter(([, , ids]) => known.every((id, i) => ids[i] === id));
    const total = fitting.reduce((sum, [, p]) => sum + p, 0);
    const found = new Map();
    const keep = (id, p) => found.set(id, (found.get(id) ?? 0) + p);
    for (const [word, p, ids] of fitting)
      if (ids.length > known.length) keep(ids[known.length], p / total);
      else
        for (const [after, q] of this.nextWords(text + word, text.length))
          keep(this.tokenizer.encode(after)[0], (q * p) / total);
    return found;
  }

  /** The fact that an article recalls in its letters from `start` on, where nothing else could have
   * come: {name, words, letters}, with where its earlier mentions have the same letter. Else null. */
  recall(text, start) {
    for (let letter = start; letter < text.length; letter++) {
      const recalls = [];
      continuations(this.grammar, text.slice(0, letter), this.symbol, recalls);
      for (const { name, words, first } of recalls) {
        const before = text.slice(0, first);
        const possible = [...continuations(this.grammar, before, this.symbol).keys()];
        if (
          possible.length !== 1 ||
          possible[0] !== words ||
          text[letter] !== words[letter - first]
        )
          continue;
        const letters = [];
        for (let at = before.indexOf(words); at >= 0; at = before.indexOf(words, at + words.length))
          letters.push(at + letter - first);
        if (letters.length) return { name, words, letters };
      }
    }
    return null;
  }

  /** For each token of an article the truth before it, and one more for what comes next. null from
   * where the grammar could not have written the text. */
  read(text) {
    const truths = [];
    let [start, last] = [0, 0];
    let truth = this.#nextTokens(this.nextWords("", 0), [], "");
    for (const word of this.tokenizer.cut(text)) {
      const words = this.nextWords(text.slice(0, start), last);
      const ids = this.tokenizer.encode(word);
      for (const [k, id] of ids.entries()) {
        truths.push(truth);
        truth = truth?.get(id)
          ? this.#nextTokens(words, ids.slice(0, k + 1), text.slice(0, start))
          : null;
      }
      [last, start] = [start, start + word.length];
      if (!truth) break;
    }
    while (truths.length < this.tokenizer.encode(text).length) truths.push(null);
    return [...truths, truth];
  }
}
