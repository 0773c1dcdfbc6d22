"use strict";
// Draws every chart of the page again from its own data, so that it can be pointed at, zoomed and smoothed, and
// colours the tokens of completions.
// Nothing is loaded, and no text of a run becomes markup: words are only ever set as textContent.
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const [W, H, LEFT, RIGHT, TOP, BOTTOM] = [330, 175, 45, 56, 12, 26];
  const charts = [];
  const hidden = new Set();
  let smoothing = 0.02;

  function make(name, attributes, parent, text) {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }

  function format(value, percent, digits = 4) {
    if (percent) return `${+(100 * value).toPrecision(3)} %`;
    const size = Math.abs(value);
    if (size >= 1000 && size < 1e6) return String(Math.round(value));
    if (value === 0 || (size >= 1e-3 && size < 1e6)) return String(+value.toPrecision(digits));
    return value.toExponential(2);
  }

  function ticks(low, high, count) {
    const raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw * 0.999);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) {
      found.push(Math.abs(at) < step * 1e-9 ? 0 : +at.toPrecision(12));
    }
    return found;
  }

  // A Gaussian running mean, as wide as a share of the points.
  function smooth(points) {
    const width = points.length * smoothing;
    if (width < 0.5) return points;
    const reach = Math.ceil(3 * width);
    return points.map(([step], at) => {
      let [sum, total] = [0, 0];
      for (let near = Math.max(0, at - reach); near <= Math.min(points.length - 1, at + reach); near++) {
        const weight = Math.exp(-0.5 * ((near - at) / width) ** 2);
        sum += weight * points[near][1];
        total += weight;
      }
      return [step, sum / total];
    });
  }

  function valueAt(points, step) {
    const after = points.findIndex((point) => point[0] >= step);
    if (after < 0) return NaN;
    if (points[after][0] === step) return points[after][1];
    if (after === 0) return NaN;
    const [[x0, y0], [x1, y1]] = [points[after - 1], points[after]];
    return y0 + ((y1 - y0) * (step - x0)) / (x1 - x0);
  }

  // The mean of lines where all of them are.
  function meanOf(lines) {
    const steps = [...new Set(lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
    const rows = steps.map((step) => [step, lines.map((line) => valueAt(line.points, step))]);
    const whole = rows.filter(([, values]) => values.every(Number.isFinite));
    return whole.map(([step, values]) => [step, values.reduce((a, b) => a + b) / values.length]);
  }

  function shownLines(data) {
    return data.lines.filter((line) => !hidden.has(line.name));
  }

  // Thick lines: of several runs each its own, else the mean of the seeds.
  function trends(data) {
    const lines = shownLines(data);
    if (data.runs) return lines.map((line) => ({ ...line, points: smooth(line.points) }));
    const mean = lines.length > 1 ? meanOf(lines) : (lines[0] || { points: [] }).points;
    const longest = mean.length ? mean : (lines[0] || { points: [] }).points;
    return [{ name: lines.length > 1 ? "mean" : "", points: smooth(longest) }];
  }

  function draw(chart) {
    const { figure, data } = chart;
    const svg = chart.svg;
    svg.replaceChildren();
    const lines = shownLines(data);
    const thick = trends(data);
    const all = lines.flatMap((line) => line.points);
    if (!all.length) return;
    const steps = all.map((point) => point[0]);
    const [first, last] = chart.zoom || [Math.min(...steps), Math.max(...steps)];
    const inside = [...lines, ...thick].flatMap((line) => line.points).filter(([step]) => step >= first && step <= last);
    const values = inside.map((point) => point[1]);
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (data.percent && !chart.zoom) [low, high] = [0, 1];
    if (!(high > low)) [low, high] = [low - (Math.abs(low) || 1) / 2, low + (Math.abs(low) || 1) / 2];
    if (!data.percent || chart.zoom) {
      const room = 0.06 * (high - low);
      [low, high] = [low - room, high + room];
    }
    const x = (step) => LEFT + ((W - LEFT - RIGHT) * (step - first)) / (last - first || 1);
    const y = (value) => H - BOTTOM - ((H - TOP - BOTTOM) * (value - low)) / (high - low);
    Object.assign(chart, { x, y, first, last, thick });
    for (const value of ticks(low, high, 4)) {
      make("line", { x1: LEFT, x2: W - RIGHT, y1: y(value), y2: y(value), stroke: "var(--chart-grid)" }, svg);
      make("text", { x: LEFT - 6, y: y(value) + 3.5, "text-anchor": "end", class: "tick" }, svg, format(value, data.percent));
    }
    for (const step of ticks(first, last, 4)) {
      make("text", { x: x(step), y: H - 8, "text-anchor": "middle", class: "tick" }, svg, format(step, false));
    }
    const clip = make("svg", { x: LEFT, y: 0, width: W - LEFT - RIGHT, height: H, viewBox: `${LEFT} 0 ${W - LEFT - RIGHT} ${H}`, overflow: "hidden" }, svg);
    const path = (points) => points.map(([step, value], at) => `${at ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    const colour = (line) => line.colour || "var(--chart-line)";
    for (const line of lines) make("path", { d: path(line.points), fill: "none", stroke: colour(line), "stroke-width": 0.8, opacity: 0.28 }, clip);
    let taken = [];
    for (const line of thick) {
      make("path", { d: path(line.points), fill: "none", stroke: colour(line), "stroke-width": 1.9 }, clip);
      const end = line.points.filter(([step]) => step <= last).at(-1);
      if (!end || end[0] < first) continue;
      make("circle", { cx: x(end[0]), cy: y(end[1]), r: 2.6, fill: colour(line) }, svg);
      let place = y(end[1]) + 3.5;
      while (taken.some((other) => Math.abs(other - place) < 11)) place += 11;
      taken.push(place);
      make("text", { x: x(end[0]) + 6, y: place, class: "end", fill: colour(line) }, svg, format(end[1], data.percent, 3));
    }
    chart.cursor = make("g", {}, svg);
  }

  function point(chart, event) {
    const box = chart.svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * W;
    const share = (at - LEFT) / (W - LEFT - RIGHT);
    return chart.first + Math.min(1, Math.max(0, share)) * (chart.last - chart.first);
  }

  function hover(chart, event) {
    if (!chart.x) return;
    const step = point(chart, event);
    const steps = shownLines(chart.data).flatMap((line) => line.points.map((one) => one[0]));
    const near = steps.reduce((best, one) => (Math.abs(one - step) < Math.abs(best - step) ? one : best), steps[0]);
    chart.cursor.replaceChildren();
    const at = chart.x(near);
    make("line", { x1: at, x2: at, y1: TOP, y2: H - BOTTOM, stroke: "var(--chart-text)", "stroke-width": 0.8 }, chart.cursor);
    const words = [`step ${Math.round(near)}`];
    const several = chart.data.lines.length > 1;
    for (const line of shownLines(chart.data)) {
      const value = valueAt(line.points, near);
      if (Number.isFinite(value)) words.push(`${several ? line.name + " " : ""}${format(value, chart.data.percent)}`);
    }
    if (chart.from !== undefined) {
      const [a, b] = [chart.x(chart.from), chart.x(step)].sort((one, other) => one - other);
      make("rect", { x: a, y: TOP, width: b - a, height: H - TOP - BOTTOM, fill: "var(--chart-text)", opacity: 0.15 }, chart.cursor);
    }
    chart.tip.textContent = words.join("\n");
    chart.tip.hidden = false;
    chart.tip.style.left = `${Math.min(72, (100 * at) / W + 2)}%`;
  }

  function leave(chart) {
    chart.from = undefined;
    chart.tip.hidden = true;
    if (chart.cursor) chart.cursor.replaceChildren();
  }

  function release(chart, event) {
    const step = point(chart, event);
    if (chart.from !== undefined && Math.abs(chart.x(step) - chart.x(chart.from)) > 8) {
      chart.zoom = [chart.from, step].sort((a, b) => a - b);
      draw(chart);
    }
    chart.from = undefined;
  }

  function addChart(figure) {
    const svg = document.createElementNS(NS, "svg");
    svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
    figure.querySelector("svg").replaceWith(svg);
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    figure.append(tip);
    const chart = { figure, svg, tip, data: JSON.parse(figure.dataset.chart) };
    svg.addEventListener("pointermove", (event) => hover(chart, event));
    svg.addEventListener("pointerleave", () => leave(chart));
    svg.addEventListener("pointerdown", (event) => (chart.from = point(chart, event)));
    svg.addEventListener("pointerup", (event) => release(chart, event));
    svg.addEventListener("dblclick", () => {
      chart.zoom = undefined;
      draw(chart);
    });
    charts.push(chart);
    draw(chart);
  }

  function addControls(place) {
    const label = document.createElement("label");
    label.textContent = "Smoothing ";
    const slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: 0, max: 0.1, step: 0.005, value: smoothing });
    slider.addEventListener("input", () => {
      smoothing = +slider.value;
      charts.forEach(draw);
    });
    label.append(slider);
    place.append(label);
    const names = new Map();
    for (const chart of charts) for (const line of chart.data.lines) names.set(line.name, line.colour);
    if (names.size > 1) {
      for (const [name, colour] of names) {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = name;
        button.setAttribute("aria-pressed", "true");
        if (colour) button.style.setProperty("--c", colour);
        button.addEventListener("click", () => {
          hidden.has(name) ? hidden.delete(name) : hidden.add(name);
          button.setAttribute("aria-pressed", String(!hidden.has(name)));
          charts.forEach(draw);
        });
        place.append(button);
      }
    }
    const hint = document.createElement("span");
    hint.textContent = "Point at a curve for its values; drag to zoom, double-click to see all.";
    place.append(hint);
    place.hidden = false;
  }

  // Tokens of completions, coloured by one of their numbers; its place in a token's list, and its colours.
  const MEASURES = [
    { name: "advantage", at: 1, above: "--right", below: "--wrong", says: "green above 0, red below" },
    { name: "KL", at: 2, above: "--c2", below: "--c5", says: "blue where likelier than under the reference, orange where less likely" },
    { name: "log-prob", at: 3, above: "--c1", below: "--c1", says: "the stronger, the less likely" },
  ];

  function addTokens(section, place, tip) {
    const spans = [];
    for (const node of section.querySelectorAll("[data-tokens]")) {
      const tokens = JSON.parse(node.dataset.tokens);
      node.replaceChildren(
        ...tokens.map((token) => {
          const span = document.createElement("span");
          span.className = "token";
          span.textContent = token[0];
          span.addEventListener("pointerenter", () => showToken(tip, span, token));
          span.addEventListener("pointerleave", () => (tip.hidden = true));
          spans.push([span, token]);
          return span;
        }),
      );
    }
    const known = MEASURES.filter(({ at }) => spans.some(([, token]) => token[at] !== null));
    if (!known.length) return;
    const says = document.createElement("span");
    const buttons = known.map((measure) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = measure.name;
      button.addEventListener("click", () => choose(measure));
      return button;
    });
    function choose(measure) {
      known.forEach((one, at) => buttons[at].setAttribute("aria-pressed", String(one === measure)));
      says.textContent = `${measure.says}. Point at a token for its numbers.`;
      paint(spans, measure);
    }
    place.append("Tokens coloured by", ...buttons, says);
    place.hidden = false;
    choose(known[0]);
  }

  function paint(spans, { at, above, below }) {
    const sizes = spans.map(([, token]) => Math.abs(token[at])).sort((a, b) => a - b);
    const limit = sizes[Math.floor(0.95 * (sizes.length - 1))] || sizes.at(-1) || 1;
    for (const [span, token] of spans) {
      const share = 60 * Math.min(1, Math.abs(token[at]) / limit);
      const colour = `var(${token[at] < 0 ? below : above})`;
      span.style.background = share < 1 ? "none" : `color-mix(in srgb, ${colour} ${share.toFixed(0)}%, transparent)`;
    }
  }

  function showToken(tip, span, token) {
    const said = MEASURES.filter(({ at }) => token[at] !== null);
    tip.textContent = said.map(({ name, at }) => `${name} ${format(token[at], false)}`).join("\n");
    tip.hidden = false;
    const box = span.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${box.top > tip.offsetHeight + 8 ? box.top - tip.offsetHeight - 4 : box.bottom + 4}px`;
  }

  document.querySelectorAll("figure[data-chart]").forEach(addChart);
  const place = document.querySelector(".controls.curves");
  if (place && charts.length) addControls(place);
  const tip = document.createElement("div");
  tip.className = "tip fixed";
  tip.hidden = true;
  document.body.append(tip);
  document.querySelectorAll(".controls.tokens").forEach((one) => addTokens(one.closest("section"), one, tip));
})();
