"use strict";
// Shows the values of a chart's lines at the point nearest to the pointer.
const box = document.getElementById("values");
for (const svg of document.querySelectorAll("figure.chart svg")) {
  const series = [...svg.querySelectorAll("[data-points]")].map((group) => ({
    group, name: group.dataset.name, points: JSON.parse(group.dataset.points),
  }));
  if (!series.length) continue;
  const rule = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "path"));
  rule.setAttribute("stroke", "var(--soft)");
  rule.setAttribute("stroke-dasharray", "2 3");
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const shown = series.filter((one) => one.points.length && getComputedStyle(one.group).display !== "none");
    const all = shown.flatMap((one) => one.points);
    if (!all.length) return;
    const nearest = (points) => points.reduce((a, b) => (Math.abs(b[0] - at.x) < Math.abs(a[0] - at.x) ? b : a));
    const [x, , where] = nearest(all);
    rule.setAttribute("d", `M${x} 20V${svg.viewBox.baseVal.height - 40}`);
    box.replaceChildren(where, ...shown.map((one) => [one.name, nearest(one.points)])
      .filter(([, point]) => Math.abs(point[0] - x) < 1)
      .map(([name, point]) => Object.assign(document.createElement("div"), { textContent: `${name}: ${point[3]}` })));
    box.hidden = false;
    box.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8))}px`;
    box.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8))}px`;
  });
  svg.addEventListener("pointerleave", () => {
    box.hidden = true;
    rule.removeAttribute("d");
  });
}
