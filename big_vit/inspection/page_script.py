"""The script of report pages: values under the pointer, smoothing, and a legend that hides runs.

It makes no markup of text, so what a run is called cannot run.
"""

SCRIPT = r"""'use strict';
// Values under the pointer, smoothing, and a legend that shows one run or hides it.
(() => {
  const all = (query, node = document) => [...node.querySelectorAll(query)];
  const shown = (x) => x === 0 || (Math.abs(x) >= 1e-3 && Math.abs(x) < 1e6)
    ? Number(x.toPrecision(5)).toLocaleString('en', {maximumFractionDigits: 9})
    : x.toExponential(3);
  const charts = all('svg[data-chart]').map((svg) => ({svg, ...JSON.parse(svg.dataset.chart)}));

  // An average with the weight of its first values made up for.
  const smooth = (points, keep) => {
    let sum = 0, weight = 0;
    return points.map(([x, y]) => {
      sum = keep * sum + (1 - keep) * y;
      weight = keep * weight + 1 - keep;
      return [x, sum / weight];
    });
  };

  for (const chart of charts) {
    const {svg, box: [left, right, low, high], frame: [x0, y0, width, height]} = chart;
    const across = (x) => x0 + width * (right > left ? (x - left) / (right - left) : 0.5);
    const down = (y) => y0 + height * (high - y) / (high - low);
    chart.place = ([x, y]) => [across(x), down(y)];
    chart.now = chart.lines.map((line) => line.points);
    const figure = svg.closest('figure');
    const tip = figure.appendChild(document.createElement('div'));
    tip.className = 'tip';
    tip.hidden = true;
    const dot = svg.appendChild(document.createElementNS(svg.namespaceURI, 'circle'));
    dot.setAttribute('r', 4.5);
    dot.setAttribute('class', 'dot');
    dot.setAttribute('visibility', 'hidden');
    const leave = () => {
      tip.hidden = true;
      dot.setAttribute('visibility', 'hidden');
      focus(null);
    };
    svg.addEventListener('pointerleave', leave);
    svg.addEventListener('pointermove', (event) => {
      const frame = svg.getBoundingClientRect();
      const scale = svg.viewBox.baseVal.width / frame.width;
      const at = [(event.clientX - frame.left) * scale, (event.clientY - frame.top) * scale];
      let best = null, least = Infinity;
      chart.now.forEach((points, i) => {
        if (hidden.has(chart.lines[i].name)) return;
        for (const point of points) {
          const [x, y] = chart.place(point);
          const far = (x - at[0]) ** 2 + (y - at[1]) ** 2;
          if (far < least) [best, least] = [{line: chart.lines[i], point, x, y}, far];
        }
      });
      if (!best || least > 3600) return leave();
      const [x, y] = best.point;
      tip.textContent = `${best.line.name}\n${chart.below} ${shown(x)}: ${shown(y)}`;
      tip.hidden = false;
      const home = figure.getBoundingClientRect();
      const px = frame.left - home.left + best.x / scale;
      const py = frame.top - home.top + best.y / scale;
      tip.style.left = `${Math.max(0, Math.min(px + 10, home.width - tip.offsetWidth - 4))}px`;
      tip.style.top = `${py > tip.offsetHeight + 16 ? py - tip.offsetHeight - 10 : py + 14}px`;
      dot.setAttribute('cx', best.x);
      dot.setAttribute('cy', best.y);
      dot.setAttribute('visibility', 'visible');
      focus(best.line.name);
    });
  }

  const hidden = new Set();
  const marked = all('[data-line]');
  function focus(name) {
    for (const node of marked) {
      node.classList.toggle('dim', name !== null && node.dataset.line !== name);
      node.classList.toggle('off', hidden.has(node.dataset.line));
    }
  }
  for (const item of all('.key [data-line]')) {
    const name = item.dataset.line;
    const flip = () => {
      if (!hidden.delete(name)) hidden.add(name);
      item.setAttribute('aria-pressed', String(!hidden.has(name)));
      focus(null);
    };
    item.setAttribute('role', 'button');
    item.setAttribute('tabindex', '0');
    item.setAttribute('aria-pressed', 'true');
    item.addEventListener('click', flip);
    item.addEventListener('keydown', (event) => {
      if (event.key !== 'Enter' && event.key !== ' ') return;
      event.preventDefault();
      flip();
    });
    item.addEventListener('pointerenter', () => focus(name));
    item.addEventListener('pointerleave', () => focus(null));
  }

  for (const control of all('.smoothing')) {
    const slider = control.querySelector('input'), said = control.querySelector('output');
    control.hidden = false;
    slider.addEventListener('input', () => {
      const keep = Number(slider.value);
      said.textContent = keep.toFixed(2);
      for (const chart of charts) {
        chart.now = chart.lines.map(({points}) => keep ? smooth(points, keep) : points);
        for (const line of all('polyline', chart.svg)) {
          const points = chart.now[Number(line.dataset.at)].map(chart.place);
          const texts = points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`);
          line.setAttribute('points', texts.join(' '));
        }
        chart.svg.classList.toggle('smoothed', keep > 0);
      }
    });
  }
})();
"""
