// A page of ours inside a frame of another page of the same origin, as in a notebook or on the site.

/** Be as tall as the content, so that nothing scrolls twice, and as light or dark as the page around.
 * Opened by itself, a page does nothing here. */
export function fitFrame() {
  const frame = window.frameElement;
  if (!frame) return;
  const fit = () => {
    frame.style.height = `${document.body.offsetHeight + 4}px`;
  };
  new ResizeObserver(fit).observe(document.body);
  const outside = frame.ownerDocument;
  const follow = () => {
    const { classList, dataset } = outside.body;
    const isKnown = classList.contains("quarto-light") || "jpThemeLight" in dataset;
    const isDark = classList.contains("quarto-dark") || dataset.jpThemeLight === "false";
    document.documentElement.style.colorScheme = isDark ? "dark" : isKnown ? "light" : "";
  };
  follow();
  new MutationObserver(follow).observe(outside.body, { attributes: true });
}
