// What every part of the page needs: elements, and how tokens and probabilities are written.

/** A new element with its properties and children. */
export function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** The text of a token with its white space made visible. */
export const visible = (text) =>
  text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";

/** A probability in percent. */
export function percent(p) {
  if (p === 0) return "0 %";
  if (p < 1e-4) return "< 0.01 %";
  return `${(100 * p).toFixed(p < 0.01 ? 2 : 1)} %`;
}
