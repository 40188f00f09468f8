"""The style sheet of the report: one column of text, figures side by side, light and dark."""

from __future__ import annotations

from .charts import CHART_CSS

CSS = (
    """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2530;--muted:#5b6672;--soft:#f4f6f8}
@media(prefers-color-scheme:dark){:root{--bg:#14181d;--fg:#e3e8ee;--muted:#9aa5b1;--soft:#1c2229}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1240px;margin:0 auto;padding:24px 16px 60px}
h1{font-size:1.55rem;margin:0 0 .2em}h2{font-size:1.15rem;margin:2.2em 0 .8em}
p{margin:.5em 0}.muted{color:var(--muted);font-size:.9rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:1em 0 .4em}
th,td{padding:.4em .9em .4em 0;text-align:right;white-space:nowrap;
 border-bottom:1px solid var(--grid)}
th{font-weight:500;color:var(--muted);
 font-size:.85rem}th:first-child,td:first-child{text-align:left}
td small{display:block;color:var(--muted)}
.big{font-size:1.25rem;font-weight:650}
.strip{position:relative;width:150px;height:12px;background:var(--soft);border-radius:6px}
.strip i{position:absolute;top:3px;height:6px;border-radius:3px;background:var(--c0);opacity:.45}
.strip b{position:absolute;top:0;width:3px;height:12px;margin-left:-1px;border-radius:2px;
 background:var(--c0)}
@media(max-width:600px){.wide{display:none}table{font-size:.8rem}th,td{padding-right:.5em}
 .big{font-size:1rem}th{font-size:.72rem}}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));
 gap:30px 34px}
.puzzle{padding:.9em 0;border-top:1px solid var(--grid)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:6px 28px}
.prompt{font-weight:600;white-space:pre-wrap;overflow-wrap:anywhere}
pre{background:var(--soft);padding:1em;border-radius:8px;overflow-x:auto;font-size:.82rem;
 line-height:1.45}
summary{cursor:pointer}
"""
    + CHART_CSS
)
