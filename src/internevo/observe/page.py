"""The style and the script of the pages of reports."""

HEAD = "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>"
"""The beginning of every report."""
STYLE = """
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1240px; padding: 0 1rem; color: #1c2733; }
h1 { margin-bottom: 0; overflow-wrap: anywhere } h2 { margin-top: 2.5rem }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 1rem }
.plot { min-width: 0; min-height: 320px } .plot.wide { grid-column: 1 / -1 }
.choice { color: #5b6773; margin-bottom: .5rem }
.choice button { font: inherit; border: 1px solid #c5ccd4; background: white; border-radius: 6px; padding: .1rem .7rem }
.choice button.chosen { background: #1f6fb5; border-color: #1f6fb5; color: white }
.figures { display: flex; flex-wrap: wrap; gap: .7rem; margin-top: 1rem }
.figure { background: #f2f5f9; border-radius: 8px; padding: .6rem 1rem }
.figure b { display: block; font-size: 1.3rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1.2rem 0 0 }
dt { color: #5b6773 } dd { margin: 0; min-width: 0; overflow-wrap: anywhere }
pre { background: #f2f5f9; border-radius: 8px; padding: 1rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere }
summary { cursor: pointer } details > pre { margin: .5rem 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; margin-bottom: 1rem } td, th { padding: .2rem .7rem; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f2f5f9 }
mark { background: #d6e9ff } svg { max-width: 100%; height: auto }
@media (max-width: 600px) {
  body { margin-top: 1rem; padding: 0 .7rem } dl { grid-template-columns: 1fr } dd { margin-bottom: .5rem }
  .figure { padding: .4rem .7rem } .figure b { font-size: 1.1rem }
}
"""
SCRIPT = """
// Draws the figures, and changes what their x axis is: steps, tokens or hours.
const touch = matchMedia("(pointer: coarse)").matches;  // a finger scrolls the page, and does not zoom a figure
const options = {displaylogo: false, responsive: true, displayModeBar: false};
const buttons = document.querySelectorAll(".choice button");
const steps = new Map();  // line or shape -> its steps

function converted(step, run, unit) {
  const of = report.axes[run] || {step: []}, known = of.step;
  if (unit === "step" || !known.length) return step;
  let low = 0, high = known.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (known[middle] <= step) low = middle; else high = middle;
  }
  const part = known[high] === known[low] ? 0 : (step - known[low]) / (known[high] - known[low]);
  return of[unit][low] + part * (of[unit][high] - of[unit][low]);
}

function choose(unit) {
  for (const button of buttons) button.classList.toggle("chosen", button.dataset.x === unit);
  report.figures.forEach((figure, number) => {
    if (!figure.fixed) {
      for (const line of figure.data) {
        if (!steps.has(line)) steps.set(line, line.x);
        line.x = steps.get(line).map(step => converted(step, line.meta, unit));
      }
      for (const shape of figure.layout.shapes || []) {
        if (!steps.has(shape)) steps.set(shape, shape.x0);
        shape.x0 = shape.x1 = converted(steps.get(shape), 0, unit);
      }
      figure.layout.xaxis.title.text = unit;
      delete figure.layout.xaxis.range;
      figure.layout.xaxis.autorange = true;
    }
    if (touch) figure.layout.dragmode = false;
    Plotly.react(`figure-${number}`, figure.data, figure.layout, options);
  });
}

for (const button of buttons) button.onclick = () => choose(button.dataset.x);
choose("step");
"""
