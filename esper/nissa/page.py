"""The report's style sheet and script. Nothing here knows of runs; nothing is loaded from anywhere."""

from __future__ import annotations

from importlib.resources import files

from esper.nissa.palette import DARK, LIGHT
from esper.nissa.stages import LOOKS, css_name


def _variables(colors: dict[str, str]) -> str:
    return "".join(f"--{name.replace('_', '-')}:{value};" for name, value in colors.items())


def _stage_rules(theme: str) -> str:
    return "".join(
        f".stage-{css_name(stage)}{{background:{getattr(look, theme)}}}"
        f".s-{css_name(stage)}{{--stage:{getattr(look, theme)}}}"
        for stage, look in LOOKS.items()
    )


STYLE = f"""
:root{{color-scheme:light dark;{_variables(dict(LIGHT))}}}
@media (prefers-color-scheme:dark){{:root{{{_variables(dict(DARK))}}}}}
{_stage_rules("light")}
@media (prefers-color-scheme:dark){{{_stage_rules("dark")}}}
""" + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);line-height:1.5;
  font:16px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;font-variant-numeric:tabular-nums}
a{color:var(--accent)}
main,header.top,footer{max-width:1120px;margin:0 auto;padding:0 24px}
header.top{padding-top:40px}
.brand{display:flex;align-items:center;gap:10px;color:var(--muted);font-size:14px;margin:0 0 18px;flex-wrap:wrap}
.brand svg{width:22px;height:22px;flex:none}
.brand b{color:var(--ink);font-weight:600;overflow-wrap:anywhere}
.status{border-radius:99px;padding:1px 10px;font-size:13px;font-weight:600;background:var(--accent-soft);
  color:var(--accent)}
.status.interrupted,.status.running{background:var(--warn-soft);color:var(--warn)}
.status.failed{background:transparent;border:1px solid var(--bad);color:var(--bad)}
h1{font-size:clamp(26px,4.6vw,42px);line-height:1.12;letter-spacing:-.022em;margin:0 0 10px;font-weight:700;
  text-wrap:balance}
h1 em{font-style:normal;color:var(--accent)}
.lead{color:var(--muted);font-size:17px;max-width:68ch;margin:0 0 26px}
h2{font-size:21px;letter-spacing:-.01em;margin:44px 0 14px;line-height:1.25}
h3{font-size:16px;margin:0 0 2px;line-height:1.3}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:12px;margin:0;padding:0}
.cards div{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:14px 16px}
.cards dt{color:var(--muted);font-size:13px}
.cards dd{margin:2px 0 0;font-size:25px;font-weight:650;letter-spacing:-.02em;line-height:1.2}
.cards dd small{display:block;font-size:13px;font-weight:400;color:var(--muted);letter-spacing:0;margin-top:2px}
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:16px;padding:18px 20px;margin:0;min-width:0}
figure.card{display:flex;flex-direction:column}
figure.card [id^=chart-]{margin-top:auto}
.wide{grid-column:1/-1}
figure.card figcaption{color:var(--muted);font-size:14px;margin:0 0 10px;max-width:86ch;overflow-wrap:anywhere}
.notice{border-left:4px solid var(--warn);background:var(--warn-soft);border-radius:0 12px 12px 0;padding:12px 16px;
  margin:18px 0 0}
.notice.bad{border-color:var(--bad)}
.notice ul{margin:4px 0 0;padding-left:20px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:15px}
th,td{text-align:left;vertical-align:top;padding:10px 14px 10px 0;border-bottom:1px solid var(--line)}
tr:last-child>td,tr:last-child>th{border-bottom:0}
thead th{color:var(--muted);font-weight:500;font-size:13px;padding-top:0;white-space:nowrap}
tbody th{font-weight:600;min-width:14ch;overflow-wrap:anywhere}
td.number{text-align:right;white-space:nowrap}
thead th.number{text-align:right}
.figure{white-space:nowrap;font-weight:600}
.kind{display:block;font-weight:400;color:var(--muted);font-size:13px}
.reason{min-width:26ch}
.kind{white-space:nowrap}
.pill{display:inline-flex;align-items:center;gap:7px;white-space:nowrap;font-weight:600}
.pill i{width:11px;height:11px;border-radius:3px;flex:none}
details,details.card{margin-top:14px}
[id^=chart-]{min-width:0;overflow:hidden}
summary{cursor:pointer;color:var(--muted);font-size:15px;padding:4px 0}
summary:hover,summary:focus-visible{color:var(--ink)}
details .scroll{max-height:440px;overflow:auto;margin-top:8px}
ol.path{list-style:none;margin:8px 0 0;padding:0;font-size:14px}
ol.path li{padding:5px 0 5px 14px;border-left:2px solid var(--line);overflow-wrap:anywhere}
ol.path .when{color:var(--muted);margin-right:8px}
dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:6px 20px;margin:0;font-size:15px}
dl.facts dt{color:var(--muted)}
dl.facts dd{margin:0;overflow-wrap:anywhere}
pre{background:var(--page);border:1px solid var(--line);border-radius:10px;padding:12px 14px;margin:6px 0 14px;
  overflow-x:auto;font:14px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.muted{color:var(--muted)}
footer{color:var(--muted);font-size:13px;padding-top:34px;padding-bottom:48px}
.skip{position:absolute;left:-9999px}
.skip:focus{left:12px;top:12px;background:var(--card);padding:8px 12px;border-radius:8px}
@media (max-width:720px){
  main,header.top,footer{padding-left:14px;padding-right:14px}
  header.top{padding-top:24px}
  .grid{grid-template-columns:minmax(0,1fr)}
  .card{padding:14px}
  .cards{grid-template-columns:repeat(2,minmax(0,1fr))}
  .cards dd{font-size:21px}
  table.stack thead{position:absolute;left:-9999px}
  table.stack tr{display:block;padding:12px 0;border-bottom:1px solid var(--line)}
  table.stack tr:last-child{border-bottom:0}
  table.stack th,table.stack td{display:block;border:0;padding:2px 0;text-align:left}
  table.stack td[data-label]::before{content:attr(data-label) ' ';font-weight:400;color:var(--muted);font-size:13px}
  dl.facts{grid-template-columns:1fr;gap:0}
  dl.facts dd{margin-bottom:8px}
}
@media print{
  :root{color-scheme:light;LIGHT_VARIABLES}
  body{background:#fff;font-size:12px}
  .card,.cards div,tr{break-inside:avoid}
  h2{break-after:avoid}
  details .scroll{max-height:none}
  .skip{display:none}
}
@media (prefers-reduced-motion:no-preference){html{scroll-behavior:smooth}}
""".replace("LIGHT_VARIABLES", _variables(dict(LIGHT)))

PICTURES = (files("esper.nissa") / "assets" / "pictures.css").read_text()
"""The style of the pictures that the report has in common with the live page."""

SCRIPT = """
(() => {
  const read = id => JSON.parse(document.getElementById(id).textContent);
  const dark = read('dark-colors'), charts = read('charts');
  const prefersDark = matchMedia('(prefers-color-scheme: dark)');
  const narrow = matchMedia('(max-width: 720px)');
  const paint = value => {
    if (typeof value === 'string') return dark[value] || value;
    if (Array.isArray(value)) return value.map(paint);
    if (value && typeof value === 'object')
      return Object.fromEntries(Object.entries(value).map(([key, v]) => [key, paint(v)]));
    return value;
  };
  const draw = isDark => {
    for (const [name, chart] of Object.entries(charts)) {
      const drawn = isDark ? paint(chart) : JSON.parse(JSON.stringify(chart));
      if (narrow.matches) {
        drawn.layout.margin = {...drawn.layout.margin, l: 40, r: 6};
        drawn.layout.font = {...drawn.layout.font, size: 12};
      }
      Plotly.react('chart-' + name, drawn.data, drawn.layout, {displayModeBar: false, responsive: false});
    }
  };
  draw(prefersDark.matches);
  const fit = new ResizeObserver(entries => entries.forEach(entry => Plotly.Plots.resize(entry.target)));
  for (const name of Object.keys(charts)) fit.observe(document.getElementById('chart-' + name));
  prefersDark.addEventListener('change', event => draw(event.matches));
  narrow.addEventListener('change', () => draw(prefersDark.matches));
  addEventListener('beforeprint', () => {
    document.querySelectorAll('details.print').forEach(d => { d.open = true; });
    draw(false);
  });
  addEventListener('afterprint', () => draw(prefersDark.matches));
})();
"""

MARK = (
    '<svg viewBox="0 0 24 24" aria-hidden="true" fill="none" stroke="var(--accent)" stroke-width="2" '
    'stroke-linecap="round"><path d="M12 21V11"/><path d="M12 13C12 8 8.5 5.5 4 5.5c0 5 3.5 7.5 8 7.5Z"/>'
    '<path d="M12 11c0-4.5 3-7.5 8-7.5 0 5-3 7.5-8 7.5Z"/></svg>'
)
"""A sprout."""
