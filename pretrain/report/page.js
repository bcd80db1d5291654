"use strict";
// The curves of a report, drawn anew from the numbers in the page so that they answer a hand: the values under the
// pointer or the arrow keys, a dragged stretch as zoom, log or linear axes, runs on and off. Nothing is loaded or sent;
// without this script the page shows its pictures. What was chosen stays when the page is loaded again.
(() => {
  const NS = "http://www.w3.org/2000/svg", KEY = `report ${location.pathname}`;
  const EDGE = { left: 60, right: 24, top: 10, bottom: 40 };
  const { runs, plots } = JSON.parse(document.getElementById("numbers").textContent);
  const chosen = { off: [], views: {}, ...remembered() };
  const off = new Set(chosen.off); // numbers of runs, and kinds of lines

  function remembered() {
    try { return JSON.parse(sessionStorage.getItem(KEY)) ?? {}; } catch { return {}; }
  }

  function remember() {
    try { sessionStorage.setItem(KEY, JSON.stringify({ off: [...off], views: chosen.views })); } catch { /* private */ }
  }

  function svg(name, attributes = {}, ...children) {
    const made = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function html(name, className, ...children) {
    const made = document.createElement(name);
    made.className = className;
    made.append(...children);
    return made;
  }

  const exact = v => Number.isInteger(v) && Math.abs(v) < 1e9 ? v.toLocaleString("en")
    : Math.abs(v) >= 1e6 ? compact(v) : Number(v.toPrecision(5)).toLocaleString("en", { maximumSignificantDigits: 5 });

  function compact(v) {
    for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "K"]])
      if (Math.abs(v) >= size) return Number((v / (letter === "K" ? 1e3 : size)).toPrecision(4)) + letter;
    return v && Math.abs(v) < 1e-3 ? v.toExponential().replace(/(\.\d{2})\d+/, "$1")
      : Number(v.toPrecision(6)).toLocaleString("en", { maximumFractionDigits: 6 });
  }

  // Round numbers from low to high, about `most` of them.
  function ticks(low, high, most, log) {
    if (log && high / low > 5) {
      const found = [];
      for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++)
        for (const m of [1, 2, 5]) found.push(m * 10 ** p);
      const inside = found.filter(v => v >= low && v <= high);
      if (inside.length > 1) return inside.length <= most ? inside : inside.filter(v => Number.isInteger(Math.log10(v)));
    }
    const rough = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find(m => m * power >= rough * 0.999);
    const count = Math.floor(high / step) - Math.ceil(low / step) + 1;
    return Array.from({ length: count }, (_, i) => Number(((Math.ceil(low / step) + i) * step).toPrecision(12)));
  }

  function nearest(sorted, value) {
    let low = 0, high = sorted.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < value) low = middle + 1; else high = middle;
    }
    return low && value - sorted[low - 1] < sorted[low] - value ? low - 1 : low;
  }

  class Chart {
    constructor(plot, figure) {
      this.plot = plot;
      this.view = chosen.views[plot.name] ??= { logX: plot.logX, logY: plot.logY, from: null, to: null };
      this.alt = figure.querySelector("img").alt;
      this.tip = html("div", "tip");
      this.tip.setAttribute("role", "status");
      this.box = html("div", "chart", this.tip);
      figure.querySelector("picture").replaceWith(this.box);
      this.buttons = { logX: this.button("log x"), logY: this.button("log y"), whole: this.button("whole") };
      for (const name of ["logX", "logY"]) this.buttons[name].onclick = () => this.show({ [name]: !this.view[name] });
      this.buttons.whole.onclick = () => this.show({ from: null, to: null });
      figure.querySelector(".head").append(html("span", "tools", ...Object.values(this.buttons)));
      new ResizeObserver(() => this.box.clientWidth !== this.width && this.draw()).observe(this.box);
      this.draw();
    }

    button(text) {
      const made = html("button", "", text);
      made.type = "button";
      return made;
    }

    show(change) {
      Object.assign(this.view, change);
      remember();
      this.draw();
    }

    // Where values lie in pixels, for the lines that are on.
    measure() {
      const { view, plot } = this, { logX, logY } = view;
      const usable = (line, i) => (!logX || line.x[i] > 0) && (!logY || line.y[i] > 0);
      this.lines = plot.lines.filter(line => !off.has(line.run) && !off.has(line.kind)).map(line => {
        const kept = line.x.map((_, i) => i).filter(i => usable(line, i));
        return { ...line, x: kept.map(i => line.x[i]), y: kept.map(i => line.y[i]), errors: line.errors && kept.map(i => line.errors[i]) };
      }).filter(line => line.x.length);
      const xs = this.lines.flatMap(line => [line.x[0], line.x.at(-1)]);
      const zoomed = view.from !== null;
      let [x0, x1] = zoomed ? [view.from, view.to] : xs.length ? [Math.min(...xs), Math.max(...xs)] : [1, 2];
      if (x0 === x1) [x0, x1] = logX ? [x0 / 2, x1 * 2] : [x0 - 1, x1 + 1];
      const seen = this.lines.flatMap(line => line.y.filter((_, i) => line.x[i] >= x0 && line.x[i] <= x1));
      if (!zoomed) seen.push(...plot.marks.map(mark => mark[1]).filter(y => !logY || y > 0));
      let y0 = seen.reduce((a, b) => Math.min(a, b), Infinity), y1 = seen.reduce((a, b) => Math.max(a, b), -Infinity);
      if (!seen.length) [y0, y1] = [1, 2];
      if (plot.limits && !zoomed && !logY) [y0, y1] = plot.limits;
      else if (logY) { const pad = (y1 / y0) ** 0.05 || 1; [y0, y1] = y0 === y1 ? [y0 / 2, y1 * 2] : [y0 / pad, y1 * pad]; }
      else { const pad = (y1 - y0) * 0.05 || Math.abs(y0) * 0.1 || 1; [y0, y1] = [y0 - pad, y1 + pad]; }
      const [w, h] = [this.width - EDGE.left - EDGE.right, this.height - EDGE.top - EDGE.bottom];
      const scale = (low, high, from, to, log) => {
        const f = log ? Math.log : v => v;
        return v => from + (to - from) * (f(v) - f(low)) / (f(high) - f(low));
      };
      Object.assign(this, { x0, x1, y0, y1, w, h });
      this.px = scale(x0, x1, 0, w, logX);
      this.py = scale(y0, y1, h, 0, logY);
      this.at = p => logX ? x0 * (x1 / x0) ** (p / w) : x0 + (x1 - x0) * p / w;
    }

    draw() {
      this.width = Math.max(200, this.box.clientWidth);
      this.height = this.box.closest(".wide") ? Math.min(400, Math.max(250, this.width * 0.4)) : this.width * 0.62;
      this.measure();
      const { view, plot, w, h } = this, frame = svg("g", { class: "frame" });
      for (const v of ticks(this.x0, this.x1, Math.max(2, w / 80), view.logX)) {
        frame.append(svg("line", { x1: this.px(v), x2: this.px(v), y1: 0, y2: h }),
          svg("text", { x: this.px(v), y: h + 17, "text-anchor": "middle" }, compact(v)));
      }
      for (const v of ticks(this.y0, this.y1, Math.max(2, h / 32), view.logY)) {
        frame.append(svg("line", { x1: 0, x2: w, y1: this.py(v), y2: this.py(v) }),
          svg("text", { x: -7, y: this.py(v) + 4, "text-anchor": "end" }, compact(v)));
      }
      frame.append(svg("text", { x: w / 2, y: h + 34, "text-anchor": "middle" }, plot.x),
        svg("text", { x: 0, y: 0, transform: `translate(${13 - EDGE.left} ${h / 2}) rotate(-90)`, "text-anchor": "middle" }, plot.y));
      const inside = svg("svg", { width: w, height: h, overflow: "hidden" });
      for (const [name, y, onLeft] of plot.marks) {
        if (view.logY && y <= 0) continue;
        const place = onLeft ? { x: 3, y: this.py(y) + (this.py(y) < 18 ? 14 : -4) }
          : { x: w - 3, y: this.py(y) + (this.py(y) > h - 18 ? -4 : 14), "text-anchor": "end" };
        inside.append(svg("line", { class: "mark", x1: 0, x2: w, y1: this.py(y), y2: this.py(y) }),
          svg("text", place, `${name}: ${exact(y)}`));
      }
      for (const x of plot.moments) inside.append(svg("line", { class: "moment", x1: this.px(x), x2: this.px(x), y1: 0, y2: h }));
      for (const line of this.lines) inside.append(...this.strokes(line));
      this.hand = svg("g");
      this.root = svg("svg", { viewBox: `0 0 ${this.width} ${this.height}`, role: "img", tabindex: 0, "aria-label": this.alt },
        svg("g", { transform: `translate(${EDGE.left} ${EDGE.top})` }, frame, inside, this.hand));
      this.box.replaceChildren(this.root, this.tip);
      this.tip.hidden = true;
      this.listen();
      for (const name of ["logX", "logY"]) this.buttons[name].setAttribute("aria-pressed", view[name]);
      this.buttons.whole.hidden = view.from === null;
    }

    strokes({ x, y, errors, color, dash, faint, kind }) {
      const width = faint ? 0.8 : runs.length > 1 && kind === "training" ? 1.2 : 2, found = [];
      const place = (i, shift = 0) => `${this.px(x[i]).toFixed(1)} ${this.py(y[i] + shift).toFixed(1)}`;
      const path = points => `M${points.join("L")}`;
      if (errors && !this.view.logY) {
        const up = x.map((_, i) => place(i, errors[i])), down = x.map((_, i) => place(i, -errors[i])).reverse();
        found.push(svg("path", { d: `${path([...up, ...down])}Z`, fill: color, opacity: 0.18 }));
      }
      found.push(svg("path", { d: path(x.map((_, i) => place(i))), fill: "none", stroke: color, "stroke-width": width,
        "stroke-dasharray": faint ? "" : dash.map(length => length * width).join(" "), opacity: faint ? 0.3 : 1 }));
      if (!faint && (x.length === 1 || kind !== "training" && x.length <= 40))
        found.push(...x.map((v, i) => svg("circle", { cx: this.px(v), cy: this.py(y[i]), r: 2.6, fill: color })));
      return found;
    }

    listen() {
      let start = null;
      const place = event => {
        const box = this.root.getBoundingClientRect();
        return Math.min(this.w, Math.max(0, (event.clientX - box.left) * this.width / box.width - EDGE.left));
      };
      this.root.onpointerdown = event => { start = place(event); this.root.setPointerCapture(event.pointerId); };
      this.root.onpointermove = event => {
        const now = place(event);
        this.point(this.at(now));
        if (start !== null) this.hand.append(svg("rect", { class: "stretch", x: Math.min(start, now), width: Math.abs(now - start), height: this.h }));
      };
      this.root.onpointerup = event => {
        const ends = start === null ? [] : [start, place(event)].sort((a, b) => a - b);
        start = null;
        if (ends[1] - ends[0] > 8) this.show({ from: this.at(ends[0]), to: this.at(ends[1]) });
      };
      this.root.onpointercancel = () => { start = null; };
      this.root.onpointerleave = () => this.point(null);
      this.root.onblur = () => this.point(null);
      this.root.ondblclick = () => this.show({ from: null, to: null });
      this.root.onkeydown = event => {
        const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key], line = this.lines.find(one => !one.faint);
        if (event.key === "Escape") this.show({ from: null, to: null });
        if (!step || !line) return;
        event.preventDefault();
        const i = this.shown === undefined || this.shown === null ? 0 : nearest(line.x, this.shown) + step;
        this.point(line.x[Math.min(line.x.length - 1, Math.max(0, i))]);
      };
    }

    // The values at x, of every line that reaches so far: of its nearest point, whose x is said where it is another.
    point(x) {
      this.shown = x;
      this.hand.replaceChildren();
      const slack = this.at(this.w * 0.02) - this.x0;
      const rows = x === null ? [] : this.lines.filter(line => !line.faint && x >= line.x[0] - slack && x <= line.x.at(-1) + slack)
        .map(line => ({ line, i: nearest(line.x, x) })).filter(({ line, i }) => line.x[i] >= this.x0 && line.x[i] <= this.x1);
      this.tip.hidden = !rows.length;
      if (!rows.length) return;
      const distance = ({ line, i }) => Math.abs(this.px(line.x[i]) - this.px(x));
      const at = rows.reduce((a, b) => distance(b) < distance(a) ? b : a), here = at.line.x[at.i];
      this.hand.append(svg("line", { class: "cross", x1: this.px(here), x2: this.px(here), y1: 0, y2: this.h }));
      const several = new Set(this.plot.lines.map(line => line.kind)).size > 1;
      this.tip.replaceChildren(html("b", "", `${this.plot.x} ${exact(here)}`), ...rows.map(({ line, i }) => {
        this.hand.append(svg("circle", { cx: this.px(line.x[i]), cy: this.py(line.y[i]), r: 4, fill: line.color }));
        const name = [runs.length > 1 ? runs[line.run] : "", several || runs.length < 2 ? line.kind : ""].filter(Boolean).join(", ");
        const mark = html("i", "");
        mark.style.background = line.color;
        const error = line.errors ? ` ± ${exact(line.errors[i])}` : "";
        return html("div", "", mark, html("span", "", name), html("b", "", exact(line.y[i]) + error), line.x[i] === here ? "" : html("small", "", `at ${exact(line.x[i])}`));
      }));
      const left = this.px(here) + EDGE.left, toLeft = left > this.width / 2;
      this.tip.style.left = toLeft ? "" : `${left + 12}px`;
      this.tip.style.right = toLeft ? `${this.width - left + 12}px` : "";
    }
  }

  const charts = plots.map(plot => new Chart(plot, document.getElementById(`plot-${plot.name}`)));
  for (const entry of document.querySelectorAll("#legend [data-of]")) {
    const name = /^\d+$/.test(entry.dataset.of) ? Number(entry.dataset.of) : entry.dataset.of;
    const press = () => entry.setAttribute("aria-pressed", !off.has(name));
    entry.setAttribute("role", "button");
    entry.tabIndex = 0;
    entry.onclick = () => {
      if (!off.delete(name)) off.add(name);
      press();
      remember();
      for (const chart of charts) chart.draw();
    };
    entry.onkeydown = event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); entry.click(); } };
    press();
  }
})();
