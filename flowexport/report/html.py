"""report.html: one file, no script, no request, readable offline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowexport.report import format as fmt
from flowexport.report.view import page

TEMPLATES = Path(__file__).parent / "templates"


def render_html(manifest: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Render a bundle's report.

    Every string of the manifest and the document is escaped; the only markup
    put in unescaped is the SVG that :mod:`flowexport.report.svg` makes.

    Args:
        manifest: of the bundle.
        document: of report.json (:func:`flowexport.report.build_report`).
    """
    return render_page("report.html", page(manifest, document))


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """Render a template of this folder with the common style sheet and filters.

    Args:
        values: the template's ``page``; strings are escaped unless they are ``Markup``.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": fmt.number,
        "percent": fmt.percent,
        "size": fmt.size,
        "closeness": fmt.closeness,
        "words": fmt.words,
    }
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(page=values, style=Markup(style))
