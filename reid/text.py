"""Text and JSON files: UTF-8 whatever the computer's language, and checked when they are read."""

import codecs
import json
from pathlib import Path

from reid.errors import UserError

BOMS = {  # of other encodings than UTF-8; UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
TYPE_NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
TYPE_NAMES |= {float: "a number", bool: "true or false"}


def read_text(path, advice="check the path"):
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 where it begins with their mark.

    Raises UserError, which ends in `advice`, where there is no such file, or one of no text.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; {advice}")
    content = Path(path).read_bytes()
    encoding = next((name for bom, name in BOMS.items() if content.startswith(bom)), "utf-8-sig")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not text in UTF-8; save it as UTF-8") from None


def write_text(path, text):
    """Write a file in UTF-8."""
    Path(path).write_text(text, encoding="utf-8", newline="\n")


def read_json(path, advice, **types):
    """The object in a JSON file, as a dict.

    types: what the values under these names must be, where they are there. Raises UserError, which
    ends in `advice`, where the file is not such an object.
    """
    return parse_json(read_text(path, advice), path, advice, **types)


def parse_json(text, source, advice, **types):
    """As `read_json`, of text that comes from `source`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON ({error}); {advice}") from error
    check_types({"content": content}, source, advice, content=dict)
    check_types(content, source, advice, **types)
    return content


def check_types(content, source, advice, /, **types):
    """Raise UserError where a value of the dict `content` is not of the type of its name."""
    for name, kind in types.items():
        if name in content and not is_a(content[name], kind):
            raise UserError(f"{source}: its {name} is not {TYPE_NAMES[kind]}; {advice}")


def demand(content, source, advice, /, **types):
    """As `check_types`; a missing value is an error, too."""
    for name in types:
        if name not in content:
            raise UserError(f"{source}: has no {name}; {advice}")
    check_types(content, source, advice, **types)


def is_a(value, kind):
    """Whether a JSON value is of a type; whole numbers count as float, true and false as bool."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and abs(value) < float("inf")
    return isinstance(value, kind)


def dumps(content):
    """JSON text of an object, indented."""
    return json.dumps(content, indent=2) + "\n"
