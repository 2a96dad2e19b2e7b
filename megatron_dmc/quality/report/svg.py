"""Figures as inline SVG: one unit is one CSS pixel, text stays text, and colours are CSS variables with the light
theme's value as fallback, so that one figure serves the light and the dark page."""

import io
import re

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from megatron_dmc.plotting import BLUE, FONT, GREEN, GRID, INK, MUTED, ORANGE, PALE

CSS_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid",
    BLUE: "--blue", ORANGE: "--orange", GREEN: "--green", PALE: "--pale",
}  # fmt: skip


def new_figure(width: int, height: int) -> Figure:
    """An empty figure of this size in CSS pixels, without a background."""
    return Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")


def to_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element that can share a page with others."""
    for ax in figure.axes:
        ax.set_facecolor("none")
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href").replace(
        ' xmlns:xlink="http://www.w3.org/1999/xlink"', ""
    )
    # ids are unique in a page, not only in a figure; most are never referred to
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"',
                  lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)  # fmt: skip
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    for color, variable in CSS_VARIABLES.items():
        text = re.sub(rf"(fill|stroke): {color}", rf"\1: var({variable}, {color})", text)
    text = text.replace(f"'{FONT}'", f"system-ui, '{FONT}'")
    width, height = (
        round(float(x)) for x in re.search(r'viewBox="0 0 (\S+) (\S+)"', text).groups()
    )
    head = f'<svg role="img" aria-label="{title}" style="max-width: {width}px" '
    text = re.sub(r'^<svg width="\S+" height="\S+" ', head, text)
    return text.replace("<defs>", f"<title>{title}</title>\n<defs>", 1)
