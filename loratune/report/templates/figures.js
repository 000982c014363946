// Hover, keyboard and zoom for the figures whose marks are trials. Without this script they are ordinary pictures.
// report/live.py says what the attributes data-trial, data-study and data-panel are; a trial's words are its row of the table.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg", NEAR = 12;  // how near the pointer has to come, in units of the drawing
  const make = (name, attributes, text = "") => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  };
  const tip = document.body.appendChild(document.createElement("div"));
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "status");

  // ["trial 3, complete", "loss 1.0312", "rank 8", ...]: the head of the table and the trial's row side by side.
  const words = (mark) => {
    const row = document.getElementById(`${mark.closest("[data-study]").dataset.study}trial-${mark.dataset.trial}`);
    const heads = [...row.closest("table").tHead.rows[0].cells].map((cell) => cell.textContent);
    const cells = [...row.cells].map((cell) => cell.firstChild.textContent.trim());
    const article = row.closest("article");
    const study = article && !article.contains(mark) ? [article.querySelector("h2").textContent] : [];
    return [...study, `trial ${cells[0]}, ${cells[1]}`, ...heads.slice(2).map((head, k) => `${head} ${cells[k + 2]}`)];
  };

  const spell = (axis, value, step) => {
    const digits = (size) => Math.max(0, -Math.floor(Math.log10(size) + 1e-9));
    const [unit, letter] = axis.large ? [[1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([size]) => Math.abs(value) >= size) || [1, ""] : [1, ""];
    if (value && Math.abs(value) < 1e-3) return value.toExponential(Math.max(0, digits(step) - digits(Math.abs(value)))).replace(/\.0+e/, "e");
    return (value / unit).toFixed(digits(step / unit)) + (letter && " " + letter);
  };
  // [place, text] of an axis between the places a and b, which are shares of the unzoomed axis.
  const ticks = (axis, a, b) => {
    const found = (axis.named || []).filter(([place]) => place >= a && place <= b);
    if (axis.low === undefined) return found;
    const at = (share) => (axis.log ? axis.low * (axis.high / axis.low) ** share : axis.low + (axis.high - axis.low) * share);
    const place = (v) => (axis.log ? Math.log(v / axis.low) / Math.log(axis.high / axis.low) : (v - axis.low) / (axis.high - axis.low));
    const [low, high] = [at(a), at(b)].sort((x, y) => x - y);
    const add = (value, step) => found.push([place(value), spell(axis, value, step)]);
    if (axis.log && high / low > 8) {
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1)
        for (const k of high / low > 300 ? [1] : [1, 3])
          if (k * 10 ** power >= low && k * 10 ** power <= high) add(k * 10 ** power, 10 ** power);
      return found;
    }
    const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
    const step = Math.max([1, 2, 5, 10].find((k) => k * power >= rough) * power, axis.whole ? 1 : 0);
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) add(k * step, step);
    return found;
  };

  const middle = (e) => { const box = e.getBBox(); return [box.x + box.width / 2, box.y + box.height / 2]; };
  // A single mark is a path too: closed, or a cross of two strokes.
  const isLine = (e) => e.tagName === "path" && !/z\s*$/.test(e.getAttribute("d")) && !(e.dataset.trial && /M[^M]*M/.test(e.getAttribute("d")));

  // A pair of axes: `view` holds the part shown, [from, to] of x and of y, as shares of the whole.
  const panel = (group) => {
    const { box: [left, top, right, bottom], ...axes } = JSON.parse(group.dataset.panel);
    const view = { x: [0, 1], y: [0, 1] };
    const share = (x, y) => ({ x: (x - left) / (right - left), y: (bottom - y) / (bottom - top) });
    const scaled = (which, part) => (part - view[which][0]) / (view[which][1] - view[which][0]);
    const X = (x) => left + scaled("x", share(x, 0).x) * (right - left), Y = (y) => bottom - scaled("y", share(0, y).y) * (bottom - top);
    const own = (e) => !e.closest('[id*="axis_"], [id*="legend_"], [id*="axes_"]');
    for (const path of [...group.querySelectorAll("path[clip-path]")].filter(own)) {  // the clip must not move with the line
      const frame = make("g", { "clip-path": path.getAttribute("clip-path") });
      path.replaceWith(frame);
      path.removeAttribute("clip-path");
      frame.append(path);
    }
    const drawn = [...group.querySelectorAll("g[clip-path] > *")].filter(own);
    const lines = new Map(drawn.filter(isLine).map((e) => [e, e.getAttribute("d")]));
    const marks = new Map(drawn.filter((e) => !lines.has(e)).map((e) => [e, middle(e)]));
    const scales = { x: [...group.children].find((e) => /axis_\d*[13579]$/.test(e.id)), y: [...group.children].find((e) => /axis_\d*[02468]$/.test(e.id)) };
    const anchors = Object.entries(scales).map(([which, scale]) => [which, scale, scale && scale.querySelector("text")]);
    const finer = group.appendChild(make("g", { class: "finer" }));
    group.prepend(finer);

    const draw = () => {
      const whole = [...view.x, ...view.y].join() === "0,1,0,1";
      for (const [line, d] of lines) line.setAttribute("d", whole ? d : d.replace(/(-?[\d.]+) (-?[\d.]+)/g, (_, x, y) => `${X(+x)} ${Y(+y)}`));
      for (const [mark, [x, y]] of marks)
        whole ? mark.removeAttribute("transform") : mark.setAttribute("transform", `translate(${X(x) - x} ${Y(y) - y})`);
      finer.replaceChildren();
      for (const [which, scale, text] of anchors) {
        for (const tick of scale ? scale.children : []) if (/[xy]tick_/.test(tick.id)) tick.style.display = whole ? "" : "none";
        for (const [place, words] of whole ? [] : ticks(axes[which], ...view[which])) {
          const along = scaled(which, place), x = left + along * (right - left), y = bottom - along * (bottom - top);
          finer.append(make("path", { d: which === "x" ? `M ${x} ${top} V ${bottom}` : `M ${left} ${y} H ${right}` }));
          if (text) finer.append(which === "x" ? make("text", { x, y: bottom + 13, "text-anchor": "middle" }, words) : make("text", { x: left - 7, y: y + 3, "text-anchor": "end" }, words));
        }
      }
    };
    const zoom = (which, from, to) => {
      const [a, b] = [Math.max(0, Math.min(from, to)), Math.min(1, Math.max(from, to))];
      if (b - a > 1e-3) view[which] = [a, b];
      draw();
    };
    const unscaled = (which, part) => view[which][0] + part * (view[which][1] - view[which][0]);
    return {
      axes, view, zoom, X, Y, group,
      // The share of the whole at a point of the drawing, and which axes a movement there means.
      at: (x, y) => ({ x: unscaled("x", share(x, y).x), y: unscaled("y", share(x, y).y) }),
      holds: (x, y) => x >= left - 45 && x <= right + 4 && y >= top - 4 && y <= bottom + 22,
      inside: (x, y) => x >= left && x <= right && y >= top && y <= bottom,
      means: (x, y) => (x < left ? ["y"] : y > bottom ? ["x"] : ["x", "y"]),
      clamp: (x, y) => [Math.min(right, Math.max(left, x)), Math.min(bottom, Math.max(top, y))],
      box: [left, top, right, bottom],
    };
  };
  // The distance of a point from a chain of points.
  const distance = (x, y, chain) => chain.reduce((nearest, [bx, by], k) => {
    const [ax, ay] = chain[Math.max(0, k - 1)], length = (bx - ax) ** 2 + (by - ay) ** 2;
    const t = length ? Math.max(0, Math.min(1, ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length)) : 0;
    return Math.min(nearest, Math.hypot(ax + t * (bx - ax) - x, ay + t * (by - ay) - y));
  }, Infinity);

  for (const drawing of document.querySelectorAll(".drawing")) {
    const svg = drawing.querySelector("svg"), trials = [...svg.querySelectorAll("[data-trial]")];
    if (!trials.length) continue;
    let places = null, shown = null, panels = null, drag = null;
    const start = () => {  // measured when the figure is first used: a report may have thousands of marks
      if (places) return;
      places = trials.map((e) => {
        const length = isLine(e) ? e.getTotalLength() : 0;
        return length ? Array.from({ length: 49 }, (_, k) => e.getPointAtLength((length * k) / 48)).map((p) => [p.x, p.y]) : [middle(e)];
      });
      panels = [...svg.querySelectorAll("[data-panel]")].map(panel);
    };
    const panelOf = (e) => panels.find((p) => p.group.contains(e));
    const place = (k) => { const p = panelOf(trials[k]); return p ? places[k].map(([x, y]) => [p.X(x), p.Y(y)]) : places[k]; };
    const point = (event) => { const p = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()); return [p.x, p.y]; };

    const show = (k, keep) => {
      const mark = trials[k], study = mark.closest("[data-study]").dataset.study;
      hide();
      shown = k;
      trials.forEach((e) => e.classList.toggle("on", e.dataset.trial === mark.dataset.trial && e.closest("[data-study]").dataset.study === study));
      const [head, ...rest] = words(mark);
      tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: head }), ...rest.map((text) => Object.assign(document.createElement("span"), { textContent: text })));
      tip.hidden = false;
      const last = place(k).at(-1), p = panelOf(mark), [x, y] = keep || (p ? p.clamp(...last) : last), on = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
      const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
      tip.style.left = `${scrollX + Math.max(8, Math.min(room, on.x + 14))}px`;
      const above = on.y - tip.offsetHeight - 12, below = on.y + 18;  // above on a phone, where the buttons below are wanted
      tip.style.top = `${scrollY + (below + tip.offsetHeight > innerHeight || (above > 0 && matchMedia("(hover: none)").matches) ? above : below)}px`;
    };
    const hide = () => {
      shown = null;
      tip.hidden = true;
      trials.forEach((e) => e.classList.remove("on"));
    };
    const near = (x, y) => {
      const inside = panels.find((p) => p.inside(x, y));
      let [best, least] = [null, NEAR];
      trials.forEach((e, k) => {
        if (inside ? !inside.group.contains(e) : panels.length) return;
        const far = distance(x, y, place(k));
        if (far < least) [best, least] = [k, far];
      });
      return best;
    };
    // Panels that share a y axis are zoomed together.
    const zoom = (one, which, from, to) => {
      for (const p of panels) if (p === one || (which === "y" && JSON.stringify(p.axes.y) === JSON.stringify(one.axes.y))) p.zoom(which, from, to);
      drawing.classList.toggle("zoomed", panels.some((p) => [...p.view.x, ...p.view.y].join() !== "0,1,0,1"));
    };
    const reset = () => panels.forEach((p) => ["x", "y"].forEach((which) => zoom(p, which, 0, 1)));
    // Nearer by `factor` at the point of the panel `about`, which stays where it is.
    const nearer = (p, factor, which, about) => {
      const [a, b] = p.view[which], width = Math.min(1, (b - a) / factor), low = Math.max(0, Math.min(1 - width, about - ((about - a) / (b - a)) * width));
      zoom(p, which, low, low + width);
    };
    const step = (factor) => {
      start();
      const seen = new Set();
      for (const p of panels) for (const which of ["x", "y"]) {
        if (which === "y" && seen.has(JSON.stringify(p.axes.y))) continue;
        if (which === "y") seen.add(JSON.stringify(p.axes.y));
        const k = shown === null ? -1 : trials.findIndex((e) => e.dataset.trial === trials[shown].dataset.trial && p.group.contains(e));
        const on = k < 0 ? null : place(k).at(-1);
        nearer(p, factor, which, on ? p.at(...on)[which] : (p.view[which][0] + p.view[which][1]) / 2);
      }
      if (shown !== null) show(shown);
    };

    svg.addEventListener("pointerdown", (event) => {
      start();
      const [x, y] = point(event), p = panels.find((p) => p.holds(x, y));
      if (event.pointerType === "touch") return near(x, y) === null ? hide() : show(near(x, y));
      if (!p || event.button) return;
      hide();
      drag = { p, x, y, means: p.means(x, y), frame: svg.appendChild(make("rect", { class: "frame" })) };
      svg.setPointerCapture(event.pointerId);
      event.preventDefault();  // no text is selected
      drawing.focus({ preventScroll: true });
    });
    const span = (x, y) => {  // the part of the panel that the drag covers; a thin one is meant for one axis
      const [l, t, r, b] = drag.p.box, [ax, ay] = drag.p.clamp(drag.x, drag.y), [bx, by] = drag.p.clamp(x, y);
      const one = drag.means.length === 1 ? drag.means[0] : Math.abs(by - ay) < 8 ? "x" : Math.abs(bx - ax) < 8 ? "y" : "";
      return [one === "y" ? [l, r] : [ax, bx], one === "x" ? [t, b] : [ay, by], one === "y" ? Math.abs(by - ay) : Math.abs(bx - ax)];
    };
    svg.addEventListener("pointermove", (event) => {
      if (event.pointerType === "touch") return;
      start();
      const [x, y] = point(event);
      if (drag) {
        const [[ax, bx], [ay, by]] = span(x, y);
        for (const [key, value] of Object.entries({ x: Math.min(ax, bx), y: Math.min(ay, by), width: Math.abs(bx - ax), height: Math.abs(by - ay) })) drag.frame.setAttribute(key, value);
        return;
      }
      const k = near(x, y);
      if (k === null) hide();
      else if (k !== shown) show(k, [x, y]);
    });
    const drop = (event) => {
      if (!drag) return;
      const [[ax, bx], [ay, by], wide] = span(...point(event)), { p, frame } = drag;
      frame.remove();
      drag = null;
      if (event.type === "pointercancel" || wide < 8) return;
      const [from, to] = [p.at(ax, ay), p.at(bx, by)];
      hide();
      zoom(p, "x", ...(Math.abs(bx - ax) >= p.box[2] - p.box[0] ? p.view.x : [from.x, to.x]));
      zoom(p, "y", ...(Math.abs(by - ay) >= p.box[3] - p.box[1] ? p.view.y : [from.y, to.y]));
    };
    svg.addEventListener("pointerup", drop);
    svg.addEventListener("pointercancel", drop);
    svg.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && hide());
    svg.addEventListener("dblclick", () => { start(); reset(); });
    svg.addEventListener("wheel", (event) => {  // with Ctrl, or by pinching: the wheel alone goes on scrolling the page
      start();
      const [x, y] = point(event), p = panels.find((p) => p.holds(x, y));
      if (!p || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      for (const which of p.means(x, y)) nearer(p, Math.exp(-Math.sign(event.deltaY) * Math.min(50, Math.abs(event.deltaY)) / 150), which, p.at(x, y)[which]);
    }, { passive: false });

    const zooms = svg.querySelector("[data-panel]") !== null;
    const hint = zooms ? "arrow keys go through the trials, + and − zoom, 0 resets" : "arrow keys go through the trials";
    drawing.tabIndex = 0;
    drawing.setAttribute("role", "group");
    drawing.setAttribute("aria-label", `${svg.querySelector("title").textContent}: ${hint}`);
    drawing.addEventListener("keydown", (event) => {
      start();
      const order = [...new Set(trials.map((e, k) => k))].sort((a, b) => trials[a].dataset.trial - trials[b].dataset.trial)
        .filter((k, i, all) => !i || trials[k].dataset.trial !== trials[all[i - 1]].dataset.trial || !sameStudy(trials[k], trials[all[i - 1]]));
      const now = shown === null ? -1 : order.findIndex((k) => trials[k].dataset.trial === trials[shown].dataset.trial && sameStudy(trials[k], trials[shown]));
      const go = { ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1, Home: 0, End: -1 }[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey || event.target !== drawing) return;
      if (go !== undefined) show(order[(go + order.length) % order.length]);
      else if (zooms && "+=".includes(event.key)) step(1.5);
      else if (zooms && "-−".includes(event.key)) step(1 / 1.5);
      else if (zooms && event.key === "0") reset();
      else if (event.key === "Escape") hide();
      else return;
      event.preventDefault();
    });
    drawing.addEventListener("blur", (event) => event.relatedTarget?.closest(".tools") || hide());
    if (!zooms) continue;
    const tools = document.createElement("div");
    tools.className = "tools";
    tools.append(Object.assign(document.createElement("span"), { textContent: "Drag to zoom, double-click to reset" }));
    for (const [text, name, act] of [["+", "Zoom in", () => step(1.5)], ["−", "Zoom out", () => step(1 / 1.5)], ["Reset", "Reset the zoom", () => { start(); reset(); }]]) {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: text, onclick: act });
      button.setAttribute("aria-label", name);
      tools.append(button);
    }
    drawing.after(tools);
  }
  function sameStudy(a, b) { return a.closest("[data-study]").dataset.study === b.closest("[data-study]").dataset.study; }
})();
