"""The style sheet of the report: no external resource, light and dark."""

CSS = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1d21;--muted:#646a73;--rule:#dcdfe4;--bad:#b3141f;--tint:#fdf0f0;
--good:#176c43;--s0:#0b6fb8;--s1:#d05a00;--s2:#00896a;--s3:#b04f8c;--s4:#a97c00;--s5:#3f9fd1;--s6:#7a5646;--s7:#6560cf}
@media (prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e7e9ec;--muted:#9aa1ab;--rule:#34383e;--bad:#ff7d80;
--tint:#331a1c;--good:#5fc793;--s0:#58aef0;--s1:#ff9a4d;--s2:#35c79f;--s3:#e58fc4;--s4:#e0b63a;--s5:#8fd3f5;--s6:#c4a08f;
--s7:#a6a2ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:960px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:.2rem 0 1rem;font-weight:650;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.6rem 0 .8rem;padding-top:.7rem;border-top:1px solid var(--rule);font-weight:650}
h3{font-size:.95rem;margin:0 0 .3rem;font-weight:600}
p{margin:0 0 .8rem}
code{font:.9em ui-monospace,"SF Mono",Menlo,Consolas,monospace;overflow-wrap:anywhere}
.over,.note,figcaption,.legend,.none{color:var(--muted);font-size:.875rem}
.over{margin:0}
.status{font-size:.8rem;font-weight:600;vertical-align:.35em;margin-left:.4rem;padding:.1rem .5rem;border:1px solid;
border-radius:1rem;color:var(--muted)}
.finished{color:var(--good)}
.failed,.bad{color:var(--bad)}
.banner{background:var(--tint);border-left:4px solid var(--bad);padding:.6rem .9rem;overflow-wrap:anywhere}
.banner strong{color:var(--bad)}
.summary{font-size:1.125rem;overflow-wrap:anywhere}
.key{display:grid;grid-template-columns:repeat(4,1fr);gap:1rem;margin:1.6rem 0 0}
.key div{border-top:2px solid var(--ink);padding-top:.45rem}
.key dt{color:var(--muted);font-size:.8rem;font-weight:400}
.key dd{margin:0;font-size:1.35rem;line-height:1.3;font-weight:600;font-variant-numeric:tabular-nums}
.key small{display:block;font-size:.8rem;font-weight:400;color:var(--muted)}
.charts{display:grid;grid-template-columns:1fr 1fr;gap:1.6rem 1.5rem}
.chart{margin:0;min-width:0}
.wide{grid-column:1/-1}
.drawing{overflow-x:auto}
svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round}
.legend span{margin-right:1rem;white-space:nowrap}
i{display:inline-block;width:.9em;height:.25em;margin-right:.4em;vertical-align:.2em;border-radius:1px}
.box{overflow:auto;max-height:30rem;margin-bottom:.8rem}
table{border-collapse:collapse;width:100%;font-size:.8125rem;line-height:1.35;font-variant-numeric:tabular-nums}
th{position:sticky;top:0;background:var(--paper);color:var(--muted);font-weight:500;vertical-align:bottom;
box-shadow:inset 0 -1px var(--rule)}
td{border-bottom:1px solid var(--rule);vertical-align:top}
th,td{padding:.35rem .4rem;text-align:left}
.sites th,.sites td{text-align:right}
.sites th:first-child,.sites td:first-child{text-align:left;min-width:7rem;overflow-wrap:anywhere}
.sites td+td{white-space:nowrap}
.plain td{overflow-wrap:anywhere}
.plain td:first-child,.missing td:nth-child(-n+2){white-space:nowrap}
.missing td:last-child{min-width:12rem;overflow-wrap:anywhere}
section>dl{display:grid;grid-template-columns:10rem 1fr;gap:.5rem 1.25rem;margin:0}
section>dl dt{font-weight:600}
section>dl dd{margin:0;overflow-wrap:anywhere}
summary{cursor:pointer}
ul{padding-left:1.1rem;margin:0;overflow-wrap:anywhere}
@media (max-width:700px){.charts,.key{grid-template-columns:1fr 1fr}.charts>*{grid-column:1/-1}
.wide svg{min-width:38rem}
section>dl{display:block}section>dl dd{margin-bottom:.7rem}}
@media print{.box{max-height:none;overflow:visible}main{padding:0;max-width:none}h2{break-after:avoid}
.chart,tr{break-inside:avoid}}
"""
