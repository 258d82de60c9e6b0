// What a reader would trip over on a page, as a list of sentences sent to the window that holds it.
const problems = [];
const seen = (element) => element.checkVisibility() && element.getClientRects().length > 0;
const rgb = (colour) => colour.match(/[\d.]+/g).map(Number);
const luminance = (colour) => rgb(colour).slice(0, 3).map((part) => part / 255)
  .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
  .reduce((sum, x, place) => sum + x * [0.2126, 0.7152, 0.0722][place], 0);
const contrast = (one, other) => {
  const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (light + 0.05) / (dark + 0.05);
};
const background = (element) => {
  const cell = element.parentNode.tagName === "g" && element.parentNode.querySelector(":scope > rect");
  if (cell) return getComputedStyle(cell).fill;
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (rgb(colour).length < 4 || rgb(colour)[3] > 0) return colour;
  }
  return "rgb(255, 255, 255)";
};
const ownText = (element) => [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data).join("").trim();

function check() {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) problems.push(`the page is ${wide} pixels wide, the window ${innerWidth}`);
  const texts = [...document.querySelectorAll("main *")].filter((element) => seen(element) && ownText(element) && element.tagName !== "title");
  for (const element of texts) {
    const style = getComputedStyle(element), words = ownText(element).slice(0, 40), box = element.getBoundingClientRect();
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 600);
    const ratio = contrast(element.tagName === "text" ? style.fill : style.color, background(element));
    if (ratio < (large ? 3 : 4.5)) problems.push(`contrast ${ratio.toFixed(2)}: ${words}`);
    const svg = element.closest("svg");
    if (svg) {
      const frame = svg.getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        problems.push(`cut off: ${words} (${svg.getAttribute("aria-label").slice(0, 40)})`);
    } else if (!element.closest(".scroll, pre") && (box.right > innerWidth + 1 || element.scrollWidth > element.clientWidth + 1 && element.clientWidth))
      problems.push(`too wide: ${words}`);
  }
  for (let a = 0; a < texts.length; a++) {
    for (let b = a + 1; b < texts.length; b++) {
      if (texts[a].contains(texts[b]) || texts[b].contains(texts[a])) continue;
      const [one, other] = [texts[a], texts[b]].map((element) => element.getBoundingClientRect());
      const across = Math.min(one.right, other.right) - Math.max(one.left, other.left);
      const down = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
      if (across > 1 && down > 3) problems.push(`overlap: ${ownText(texts[a]).slice(0, 30)} | ${ownText(texts[b]).slice(0, 30)}`);
    }
  }
  for (const path of document.querySelectorAll("svg g[data-points] path[stroke]")) {
    const ratio = contrast(getComputedStyle(path).stroke, background(path));
    if (seen(path) && ratio < 3) problems.push(`a line of contrast ${ratio.toFixed(2)}`);
  }
  const svg = [...document.querySelectorAll("figure.chart svg")].find((one) => seen(one) && one.querySelector("[data-points]"));
  if (!svg) return;
  const frame = svg.getBoundingClientRect(), group = svg.querySelector("[data-points]");
  const at = { clientX: frame.left + 0.7 * frame.width, clientY: frame.top + 40 };
  svg.dispatchEvent(new PointerEvent("pointermove", at));
  const values = document.getElementById("values");
  if (!/: [−\d]/.test(values.textContent) || values.hidden) problems.push("a pointer shows no values");
  svg.closest("figure").querySelector("input").click();
  if (getComputedStyle(group).display !== "none") problems.push("an unticked line is still there");
}

addEventListener("load", () => {
  try {
    check();
  } catch (error) {
    problems.push(String(error));
  }
  parent.postMessage({ name, problems: [...new Set(problems)] }, "*");
});
