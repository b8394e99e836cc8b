"""The page at `/` as text, and what browsers may load on each page (Content-Security-Policy)."""

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _inline(element: str) -> str:
    """The policy source that allows the page's own inline `element` and no other."""
    [content] = re.findall(f"<{element}>(.*?)</{element}>", PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


PAGE_POLICY = (
    f"default-src 'none'; script-src {_inline('script')}; style-src {_inline('style')}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Swagger UI starts with an inline script and styles its elements inline; it draws its icons from data: addresses.
DOCS_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
