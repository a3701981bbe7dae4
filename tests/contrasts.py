"""How well the texts of a page stand out from their ground, for tests of pages in a browser."""

# text -> contrast to the first ground behind it that is not transparent, by the formula of WCAG 2.2 (relative luminance)
CONTRASTS = """() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => {
    const [r, g, b] = parts(colour).map(part => part / 255).map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = {};
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter(node => node.nodeType === 3).map(node => node.data.trim()).join("");
    if (!text || !element.checkVisibility() || element.closest("script, option, kbd")) continue;
    let ground = element;
    while (parts(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
    const [low, high] = [light(getComputedStyle(element).color), light(getComputedStyle(ground).backgroundColor)].sort((a, b) => a - b);
    found[text] = (high + 0.05) / (low + 0.05);
  }
  return found;
}"""
