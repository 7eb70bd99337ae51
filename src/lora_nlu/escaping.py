"""Text from untrusted files, escaped for the files that the program writes; for the screen it is `errors.printable`.

Each function returns one line: control characters, and others that are invisible, become escapes such as \\n.
"""

import json
import re
from typing import Any

from lora_nlu.errors import printable

_LENGTH = 5000  # of the longest text: a path has up to 4,096 characters
_JSON_CONTROLS = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # json.dumps leaves them as they are
_TSV_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# "_" and "@" stay: emphasis does no harm, and labels and the names of models contain them.
_MARKDOWN = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": r"\|"} | {c: f"&#{ord(c)};" for c in "\\`[]*~$"}
)
_LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    | {character: rf"\{character}" for character in "&%$#_{}"}
)


def yaml_scalar(text: object) -> str:
    """A quoted YAML string."""
    return json.dumps(printable(text, _LENGTH), ensure_ascii=False)


def markdown_text(text: object) -> str:
    """Text in Markdown, also in a table's cell, without HTML, links, code and formulas."""
    escaped = printable(text, _LENGTH).translate(_MARKDOWN)
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;")  # many renderers make a bare address a link


def latex_text(text: object) -> str:
    """Text in LaTeX, without commands; in a comment `printable` is enough."""
    return printable(text, _LENGTH).translate(_LATEX)


def tsv_cell(text: str) -> str:
    """A cell of a file without quoting: only what would end the cell or its line is escaped, the rest is unchanged."""
    return _TSV_CONTROLS.sub(lambda match: printable(match[0]), text)


def json_line(value: object) -> str:
    """JSON in one line of readable UTF-8, also for readers that end a line at other characters than \\n."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _JSON_CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def csv_cell(value: Any) -> Any:
    """A cell for `csv.writer`: text after an apostrophe if a spreadsheet would take it for a formula; numbers stay."""
    if value is None or isinstance(value, int | float):
        return value
    text = printable(value, _LENGTH)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠")) else text
