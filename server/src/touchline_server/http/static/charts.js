// Charts with uPlot, in the colours of the theme.
import uPlot from "./uplot/uPlot.esm.js";
import { element } from "./dom.js";
import { compact, NONE } from "./format.js";

const HEIGHT = 150;

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function axis(extra) {
  return {
    stroke: colour("muted"),
    font: "11px system-ui, sans-serif",
    grid: { stroke: colour("grid"), width: 1 },
    ticks: { show: false },
    ...extra,
  };
}

/** A chart in a figure: a title, a legend with the newest values or those under the cursor, and the lines. */
class Chart {
  constructor(parent, { title, unit, series, text = compact, axisText = text, zero = true }) {
    Object.assign(this, { title, unit, series, text, axisText, zero, plot: null, data: [[], ...series.map(() => [])] });
    this.legend = series.map((one) => ({ value: element("b"), box: null }));
    const legend = element("ul", { className: "legend" });
    series.forEach((one, at) => {
      const swatch = element("span", { className: `swatch ${one.dash ? "dashed" : ""}`, "aria-hidden": "true" });
      swatch.dataset.colour = one.colour;
      this.legend[at].box = element("li", {}, swatch, element("span", {}, one.name), this.legend[at].value);
      legend.append(this.legend[at].box);
    });
    this.area = element("div", { className: "plot" });
    this.area.setAttribute("role", "img");
    const caption = element("figcaption", {}, element("strong", {}, title), ...(unit ? [element("span", { className: "unit" }, ` ${unit}`)] : []));
    this.figure = element("figure", { className: "card chart" }, caption, legend, this.area);
    parent.append(this.figure);
    new ResizeObserver(() => this.#resize()).observe(this.area);
  }

  options() {
    return {
      width: Math.max(this.area.clientWidth, 120),
      height: HEIGHT,
      legend: { show: false },
      padding: [8, 18, 0, 0],
      cursor: { points: { size: 6 }, y: false, drag: { x: false, y: false } },
      scales: { y: { range: (plot, low, high) => this.#range(low, high) } },
      axes: [axis({ size: 26 }), axis({ size: 52, values: (plot, splits) => splits.map((split) => this.axisText(split)) })],
      series: [{}, ...this.series.map((one) => ({
        stroke: colour(one.colour), width: 1.6, dash: one.dash, points: { show: false }, spanGaps: false,
        fill: one.fill ? `color-mix(in srgb, ${colour(one.colour)} 14%, transparent)` : undefined,
      }))],
      hooks: { setCursor: [(plot) => this.values(plot.cursor.idx)] },
    };
  }

  set(data) {
    this.data = data;
    if (!this.plot) this.plot = new uPlot(this.options(), data, this.area);
    else this.plot.setData(data);
    this.values(this.plot.cursor.idx);
  }

  restyle() {
    if (!this.plot) return;
    this.plot.destroy();
    this.plot = null;
    this.set(this.data);
  }

  remove() {
    this.plot?.destroy();
    this.figure.remove();
  }

  #resize() {
    const width = Math.max(this.area.clientWidth, 120);
    if (this.plot && this.plot.width !== width) this.plot.setSize({ width, height: HEIGHT });
  }

  #range(low, high) {
    if (low === null || high === null || low === undefined) return [0, 1];
    if (this.zero) return [Math.min(0, low), high > 0 ? high * 1.1 : 1];
    const pad = (high - low || Math.abs(high) || 1) * 0.08;
    return [low - pad, high + pad];
  }

  resting() {
    return this.data[0].length - 1;
  }

  values(at) {
    const shown = at === null || at === undefined ? this.resting() : at;
    const texts = this.series.map((one, number) => {
      const value = shown < 0 ? null : this.data[number + 1][shown];
      return value === null || value === undefined ? NONE : this.text(value);
    });
    texts.forEach((text, number) => { if (this.legend[number].value.textContent !== text) this.legend[number].value.textContent = text; });
    const now = this.series.map((one, number) => `${one.name} ${texts[number]}`).join(", ");
    if (at === null || at === undefined) this.area.setAttribute("aria-label", `${this.title}${this.unit ? ` (${this.unit})` : ""}: ${now}`);
  }
}

/** A chart over time, whose x values are seconds since 1970. */
export class TimeChart extends Chart {
  constructor(parent, options) {
    super(parent, options);
    this.span = options.span;
  }

  options() {
    const options = super.options();
    options.scales.x = { time: true, range: (plot, low, high) => (high ? [high - this.span(), high] : [0, 1]) };
    options.axes[0].values = (plot, splits) => splits.map((split) => new Date(split * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" }));
    options.axes[0].space = 70;
    options.axes[0].incrs = [60, 120, 300, 600, 900, 1800];
    options.cursor.sync = { key: "time" };
    return options;
  }
}

/** A plot over the rows of an episode; `onRow` is called with the row under the cursor. */
export class RowChart extends Chart {
  constructor(parent, options) {
    super(parent, { ...options, zero: false });
    this.onRow = options.onRow;
    this.marked = null;
  }

  options() {
    const options = super.options();
    options.scales.x = { time: false };
    options.cursor.sync = { key: "episode" };
    options.hooks.setCursor.push((plot) => { if (plot.cursor.event && plot.cursor.idx !== null) this.onRow?.(this.data[0][plot.cursor.idx]); });
    options.hooks.draw = [(plot) => this.#drawMark(plot)];
    return options;
  }

  /** The place of the marked row, whose values the legend shows while the cursor is elsewhere. */
  resting() {
    const rows = this.data[0];
    if (this.marked === null) return rows.length - 1;
    const after = rows.findIndex((row) => row >= this.marked);
    return after < 0 ? rows.length - 1 : after;
  }

  /** Marks the row that the image shows. */
  mark(row) {
    this.marked = row;
    this.plot?.redraw(false);
    this.values(null);
  }

  #drawMark(plot) {
    if (this.marked === null) return;
    const x = Math.round(plot.valToPos(this.marked, "x", true));
    plot.ctx.save();
    plot.ctx.strokeStyle = colour("accent");
    plot.ctx.lineWidth = devicePixelRatio;
    plot.ctx.beginPath();
    plot.ctx.moveTo(x, plot.bbox.top);
    plot.ctx.lineTo(x, plot.bbox.top + plot.bbox.height);
    plot.ctx.stroke();
    plot.ctx.restore();
  }
}
