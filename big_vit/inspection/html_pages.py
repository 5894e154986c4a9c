"""Building blocks of a self-contained HTML page: text, tables, SVG charts, embedded images.

Charts are whole without scripts. The one script, `page_script`, adds values under the pointer and
smoothing; the page's own policy allows no other, and nothing from elsewhere.

Every function takes plain text, escapes it, and returns HTML.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from big_vit.inspection.line_styles import DARK, DASHES, LIGHT
from big_vit.inspection.page_script import SCRIPT

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 380, 246
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 20, 12, 40

_COLOURS = ''.join(f'--line{i}:{c};' for i, c in enumerate(LIGHT))
_COLOURS_DARK = ''.join(f'--line{i}:{c};' for i, c in enumerate(DARK))
_LINES = ''.join(
    f'.l{i}{{stroke:var(--line{i})}}.m{i}{{fill:var(--line{i})}}' for i in range(len(LIGHT))
) + ''.join(
    f'.d{i}{{stroke-dasharray:{",".join(f"{2 * part:g}" for part in dash) or "none"}}}'
    for i, dash in enumerate(DASHES)
)
STYLE = f"""
:root{{color-scheme:light dark;--paper:#fbfbfa;--card:#fff;--ink:#1c2024;--soft:#5a6169;
--rule:#dfe2e6;--accent:#0b62c4;--warn:#fff4e0;--warnrule:#c77700;{_COLOURS}}}
@media (prefers-color-scheme:dark){{:root{{--paper:#14171a;--card:#1c2024;--ink:#e8eaed;
--soft:#a4abb3;--rule:#353b42;--accent:#6cb2ff;--warn:#33270f;--warnrule:#e0a030;{_COLOURS_DARK}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--paper);color:var(--ink);line-height:1.55;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}}
header,main,footer{{max-width:76rem;margin:0 auto;padding:0 1.25rem}}
header{{padding-top:2.5rem}}
h1{{font-size:clamp(1.5rem,4vw,2.2rem);line-height:1.2;margin:0;overflow-wrap:anywhere}}
h2{{font-size:1.3rem;margin:2.75rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--rule)}}
h3{{font-size:1rem;margin:1.5rem 0 .5rem}}
p{{max-width:46rem;margin:.5rem 0}}
.soft,figcaption,caption{{color:var(--soft)}}
.lead{{font-size:1.1rem;max-width:none}}
nav ul{{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;list-style:none;padding:0;margin:1rem 0}}
a{{color:var(--accent)}}
a:focus-visible,summary:focus-visible,.wide:focus-visible{{outline:2px solid var(--accent)}}
.facts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;
margin:1.25rem 0}}
.facts div,.card{{background:var(--card);border:1px solid var(--rule);border-radius:.6rem;
padding:.7rem .9rem}}
.facts dt{{color:var(--soft);font-size:.82rem}}
.facts dd{{margin:0;font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums;
overflow-wrap:anywhere}}
.charts{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:1rem;
margin:.75rem 0}}
figure{{margin:0}}
.card figcaption{{font-weight:600;color:var(--ink);font-size:.95rem}}
svg{{display:block;width:100%;height:auto}}
svg text{{fill:var(--soft);font-size:12px}}
.axis{{stroke:var(--rule)}}
.line{{fill:none;stroke-width:2;stroke-linejoin:round}}
{_LINES}
.key{{display:flex;flex-wrap:wrap;gap:.1rem 1rem;list-style:none;margin:.2rem 0 0;padding:0;
font-size:.85rem;color:var(--soft)}}
.key svg,th svg{{display:inline-block;width:1.8rem;height:.7rem;margin-right:.35rem}}
.key [role=button]{{cursor:pointer;border-radius:.3rem}}
.key li,tbody th{{overflow-wrap:anywhere}}
.legend{{display:block;columns:16rem auto;margin:.5rem 0 1rem}}
.legend li{{break-inside:avoid;display:flex;align-items:baseline}}
.legend svg{{flex:none}}
.dim{{opacity:.18}}
.off{{opacity:.3}}
svg .off{{display:none}}
.smoothed circle[class^=m]{{display:none}}
.dot{{fill:none;stroke:var(--ink);stroke-width:1.5}}
figure.card{{position:relative}}
.tip{{position:absolute;z-index:2;background:var(--ink);color:var(--paper);border-radius:.35rem;
padding:.2rem .5rem;font-size:.8rem;line-height:1.3;white-space:pre-line;pointer-events:none;
max-width:90%;overflow-wrap:anywhere}}
[hidden]{{display:none!important}}
.smoothing{{display:flex;align-items:center;gap:.6rem;margin:.5rem 0;font-size:.9rem}}
.smoothing input{{width:12rem;accent-color:var(--accent)}}
.smoothing output{{font-variant-numeric:tabular-nums}}
.runs{{max-height:27rem;overflow:auto}}
.runs th{{background:var(--card)}}
.runs thead th{{position:sticky;top:0;z-index:1}}
.runs th:first-child{{position:sticky;left:0;min-width:8rem;max-width:min(18rem,50vw)}}
.runs thead th:first-child{{z-index:2}}
.many .line{{stroke-width:1.1}}
.wide{{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:.6rem;
max-width:100%}}
table{{border-collapse:collapse;width:100%;font-size:.92rem}}
th,td{{text-align:left;padding:.4rem .8rem;border-bottom:1px solid var(--rule);
vertical-align:top}}
tr:last-child td,tr:last-child th{{border-bottom:0}}
thead th{{color:var(--soft);font-weight:600;white-space:nowrap}}
tbody th{{font-weight:500}}
.n{{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}}
code,pre{{font-family:ui-monospace,SFMono-Regular,Menlo,"Liberation Mono",monospace;
font-size:.88em}}
td code{{overflow-wrap:anywhere}}
pre{{margin:0;padding:.8rem 1rem;white-space:pre-wrap;overflow-wrap:anywhere}}
details{{margin:.75rem 0}}
summary{{cursor:pointer;color:var(--accent)}}
.pictures{{display:grid;gap:.6rem;margin:.6rem 0;
grid-template-columns:repeat(auto-fill,minmax(5.5rem,1fr))}}
.pictures.small{{gap:.35rem;grid-template-columns:repeat(auto-fill,minmax(3.4rem,1fr))}}
.pictures img{{width:100%;display:block;border-radius:.3rem;image-rendering:pixelated}}
.pictures img.photo{{image-rendering:auto}}
.pictures figcaption{{font-size:.78rem;line-height:1.25;margin-top:.15rem;white-space:pre-line;
overflow-wrap:anywhere}}
.pictures.wide-captions{{gap:.9rem .7rem;
grid-template-columns:repeat(auto-fill,minmax(7rem,1fr))}}
.matrix th,.matrix td{{padding:.25rem .4rem;border:0}}
.matrix thead th{{font-weight:500;vertical-align:bottom;text-align:center}}
.matrix thead span{{writing-mode:vertical-rl;transform:rotate(180deg);max-height:9rem;
overflow:hidden;text-overflow:ellipsis}}
.matrix tbody th{{max-width:11rem;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;
position:sticky;left:0;background:var(--card)}}
.matrix td{{text-align:center;font-variant-numeric:tabular-nums;min-width:2rem;
background:color-mix(in srgb,var(--accent) calc(var(--share)*85%),transparent)}}
.matrix td.strong{{color:var(--paper)}}
.matrix table{{width:auto;margin:.4rem}}
.notice{{background:var(--warn);border-left:.3rem solid var(--warnrule);padding:.6rem .9rem;
border-radius:.3rem;max-width:none;overflow-wrap:anywhere}}
ul.notice{{padding-left:2rem}}
footer{{margin-top:3rem;padding-bottom:2.5rem;color:var(--soft);font-size:.88rem}}
@media print{{.charts,.card,tr{{break-inside:avoid}}}}
"""


def text(value: object) -> str:
    return html.escape(str(value))


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    return f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'


def page(title: str, header: str, sections: Sequence[tuple[str, str]], footer: str) -> str:
    """Return a complete document; sections are (heading, HTML), omitted if the HTML is empty."""
    kept = [(name, body) for name, body in sections if body]
    links = ''.join(f'<li><a href="#{_anchor(n)}">{text(n)}</a></li>' for n, _ in kept)
    bodies = ''.join(
        f'<section aria-labelledby="{_anchor(n)}"><h2 id="{_anchor(n)}">{text(n)}</h2>\n{b}'
        '</section>\n'
        for n, b in kept
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{_policy(SCRIPT)}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f'<header>\n{header}\n<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n'
        f'<main>\n{bodies}</main>\n<footer><p>{text(footer)}</p></footer>\n'
        f'<script>{SCRIPT}</script>\n</body>\n</html>\n'
    )


def _anchor(name: str) -> str:
    return ''.join(c if c.isalnum() else '-' for c in name.lower())


def heading(name: str) -> str:
    return f'<h3>{text(name)}</h3>\n'


def paragraph(words: str, kind: str = '') -> str:
    return f'<p class="{kind}">{text(words)}</p>\n' if kind else f'<p>{text(words)}</p>\n'


def notice(words: str) -> str:
    return f'<p class="notice">{text(words)}</p>\n'


def notices(lines: Sequence[str]) -> str:
    items = ''.join(f'<li>{text(line)}</li>' for line in lines)
    return f'<ul class="notice">{items}</ul>\n' if lines else ''


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return large values with small labels."""
    items = ''.join(f'<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>' for k, v in pairs)
    return f'<dl class="facts">{items}</dl>\n'


def table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    marks: Sequence[tuple[int, int]] | None = None,
) -> str:
    """Return a table of text with the first cell of a row as its heading; numbers align right.

    Args:
      marks: colour and dash of the run that each row is of, shown before its heading.
    """
    numbers = [
        i > 0 and bool(rows) and all(r[i][:1].isdigit() or r[i][:1] in '-+−–' for r in rows)
        for i in range(len(header))
    ]
    kind = [' class="n"' if number else '' for number in numbers]
    head = ''.join(f'<th scope="col"{k}>{text(c)}</th>' for k, c in zip(kind, header, strict=True))
    body, runs = '', '' if marks is None else ' runs'
    for place, (first, *rest) in enumerate(rows):
        mark = '' if marks is None else _swatch(marks[place])
        cells = ''.join(f'<td{k}>{text(c)}</td>' for k, c in zip(kind[1:], rest, strict=True))
        body += f'<tr><th scope="row">{mark}{text(first)}</th>{cells}</tr>\n'
    return (
        f'<div class="wide{runs}" tabindex="0" role="region" aria-label="{text(caption)}"><table>'
        f'<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
    )


def matrix(caption: str, names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Return a table of numbers [row, column] with the names of both, coloured by the row's share.

    Zeros are left blank.
    """
    head = ''.join(f'<th scope="col"><span>{text(name)}</span></th>' for name in names)
    body = ''
    for name, row in zip(names, counts, strict=True):
        total = max(sum(row), 1)
        cells = ''
        for count in row:
            share = count / total
            strong = ' class="strong"' if share > 0.55 else ''
            cells += f'<td{strong} style="--share:{share:.3f}">{count or ""}</td>'
        body += f'<tr><th scope="row" title="{text(name)}">{text(name)}</th>{cells}</tr>\n'
    return (
        f'<div class="wide matrix" tabindex="0" role="region" aria-label="{text(caption)}"><table>'
        f'<thead><tr><td></td>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
    )


def details(summary: str, preformatted: str) -> str:
    return (
        f'<details class="card"><summary>{text(summary)}</summary>'
        f'<pre>{text(preformatted)}</pre></details>\n'
    )


# Pictures.


def data_uri(picture: np.ndarray) -> str:
    """Encode a uint8 picture [height, width, 1 or 3] as a data URI: PNG if small, else JPEG."""
    import cv2

    shown = picture[..., 0] if picture.shape[-1] < 3 else picture[..., 2::-1]
    small = max(picture.shape[:2]) <= 96
    kind, options = ('png', []) if small else ('jpeg', [cv2.IMWRITE_JPEG_QUALITY, 88])
    _, encoded = cv2.imencode('.png' if small else '.jpg', np.ascontiguousarray(shown), options)
    return f'data:image/{kind};base64,{base64.b64encode(encoded.tobytes()).decode()}'


def pictures(
    items: Iterable[tuple[np.ndarray, str, str]], kind: str = '', columns: int | None = None
) -> str:
    """Return a grid of pictures.

    Args:
      items: (picture, caption, alternative text).
      columns: pictures per row, however narrow the page is; as many as fit if None.
    """
    figures = ''
    for picture, caption, alt in items:
        photo = ' class="photo"' if max(picture.shape[:2]) > 96 else ''
        below = f'<figcaption>{text(caption)}</figcaption>' if caption else ''
        figures += (
            f'<figure><img{photo} src="{data_uri(picture)}" alt="{text(alt)}">{below}</figure>\n'
        )
    rows = f' style="grid-template-columns:repeat({columns},minmax(0,8rem))"' if columns else ''
    return f'<div class="pictures {kind}"{rows}>{figures}</div>\n'


# Charts.


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
      marked: draw a dot at each point; for lines with few points.
      joined: connect the points.
      style: places of the colour and of the dash; by default those of the line in the chart.
    """

    name: str
    points: Points
    marked: bool = False
    joined: bool = True
    style: tuple[int, int] | None = None


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return at most about `most` round numbers between low and high."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Format a number briefly: 1,500; 0.001; 2.5e-06."""
    if value == 0:
        return '0'
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        mantissa, _, exponent = f'{value:.3e}'.partition('e')
        return f'{float(mantissa):g}e{int(exponent)}'
    return f'{value:,.4g}' if abs(value) < 1e4 else f'{value:,.0f}'


def chart(
    title: str,
    lines: Sequence[Line],
    below: str = 'step',
    zero: bool = False,
    legend: bool = True,
    most: int = 600,
) -> str:
    """Return a card with lines over common axes, or '' if there is nothing to draw.

    Args:
      below: label of the horizontal axis.
      zero: start the vertical axis at 0.
      legend: name the lines below, where there are several.
      most: points of a line; of more it has every n-th.
    """
    lines = [
        line._replace(
            points=[point for point in line.points if math.isfinite(point[1])],
            style=(i % len(DASHES), i % len(DASHES)) if line.style is None else line.style,
        )
        for i, line in enumerate(lines)
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return ''
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    left, right = min(xs), max(xs)
    low, high = min(ys), max(ys)
    low = min(low, 0.0) if zero else low
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = (low if zero and low == 0 else low - margin), high + margin
    across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def to_pixels(x: float, y: float) -> tuple[float, float]:
        share = (x - left) / (right - left) if right > left else 0.5
        return _LEFT + across * share, _TOP + down * (high - y) / (high - low)

    drawn = []
    for y in ticks(low, high):
        _, position = to_pixels(left, y)
        drawn.append(
            f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{position:.1f}" '
            f'y2="{position:.1f}"/><text x="{_LEFT - 6}" y="{position + 4:.1f}" text-anchor="end">'
            f'{text(number(y))}</text>'
        )
    for x in ticks(left, right):
        position, _ = to_pixels(x, low)
        drawn.append(
            f'<text x="{position:.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">'
            f'{text(number(x))}</text>'
        )
    drawn.append(
        f'<text x="{_LEFT + across / 2}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f'{text(below)}</text>'
    )
    thinned = [line._replace(points=_thinned(line.points, most)) for line in lines]
    for i, line in enumerate(thinned):
        positions = [to_pixels(*point) for point in line.points]
        assert line.style is not None
        (n, dash), of = line.style, f'data-line="{text(line.name)}"'
        if line.joined and len(positions) > 1:
            path = ' '.join(f'{x:.1f},{y:.1f}' for x, y in positions)
            drawn.append(
                f'<polyline class="line l{n} d{dash}" {of} data-at="{i}" points="{path}"/>'
            )
        if line.marked or len(positions) == 1:
            drawn += [
                f'<circle class="m{n}" {of} cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
                for x, y in positions
            ]
    data = {
        'box': [left, right, low, high],
        'frame': [_LEFT, _TOP, across, down],
        'below': below,
        'lines': [
            {'name': line.name, 'points': [[x, float(f'{y:.6g}')] for x, y in line.points]}
            for line in thinned
        ],
    }
    summary = '; '.join(
        f'{line.name} from {number(line.points[0][1])} to {number(line.points[-1][1])}'
        for line in lines
    )
    key = _key(lines) if legend and len(lines) > 1 else ''
    many = ' class="many"' if len(lines) > 12 else ''
    return (
        f'<figure class="card"><figcaption>{text(title)}</figcaption>'
        f'<svg{many} viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'data-chart="{text(json.dumps(data))}" aria-label="{text(title)}: {text(summary)}">'
        f'{"".join(drawn)}</svg>{key}</figure>\n'
    )


def _swatch(style: tuple[int, int], joined: bool = True, marked: bool = False) -> str:
    n, dash = style
    stroke = f'<line class="line l{n} d{dash}" x1="0" x2="36" y1="7" y2="7"/>' if joined else ''
    dot = f'<circle class="m{n}" cx="18" cy="7" r="4"/>' if marked else ''
    return f'<svg viewBox="0 0 36 14" aria-hidden="true">{stroke}{dot}</svg>'


def _key(lines: Sequence[Line]) -> str:
    items = ''.join(
        f'<li>{_swatch(line.style or (0, 0), line.joined, line.marked)}{text(line.name)}</li>'
        for line in lines
    )
    return f'<ul class="key">{items}</ul>'


def legend(runs: Sequence[tuple[str, tuple[int, int]]]) -> str:
    """Return a legend for all charts of a page, of names with colour and dash."""
    items = ''.join(
        f'<li data-line="{text(name)}">{_swatch(style)}{text(name)}</li>' for name, style in runs
    )
    return f'<ul class="key legend">{items}</ul>\n{smoothing()}'


def smoothing() -> str:
    """Return the control that smooths all charts of a page; without scripts it is not shown."""
    return (
        '<label class="smoothing" hidden>Smoothing <input type="range" min="0" max="0.99" '
        'step="0.01" value="0"><output>0.00</output></label>\n'
    )


def _thinned(points: Points, most: int) -> Points:
    """Keep about `most` points and the last: a chart has fewer pixels than a long run has steps."""
    stride = -(-len(points) // most)
    return [*points[:-1:stride], points[-1]]


def charts(items: Iterable[str]) -> str:
    cards = ''.join(items)
    return f'<div class="charts">{cards}</div>\n' if cards else ''
