"""Text as the original tokenizer cleans it: ftfy, HTML entities twice, white space, lower case.

Source: openai/CLIP `clip/simple_tokenizer.py`. The result is ftfy's on every Unicode string; most
texts need little of it and are cleaned without calling it.
"""

import functools
import html
import re
import unicodedata

import ftfy
from ftfy import fixes
from ftfy.badness import is_bad

# What `clean` knows of ftfy; the tests hold it against ftfy itself over every code point.
_ASCII_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")  # ftfy removes these
_REWRITTEN = re.compile(  # Latin ligatures, curly quotes, wide and narrow forms: ftfy replaces them
  "[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06\u02bc\u2018-\u201f\uff01-\uffee]"
)
_NEVER_MOJIBAKE = re.compile(  # a text of one of these sets alone passes ftfy's slow test
  "(?:[ -~\u00df-\u00f6\u00f8-\u00ff\u0401\u0410-\u044f\u0451\u2013\u2014\u2019\u2026"
  "\u3001-\u30ff\u4e00-\u9fff\uac00-\ud7a3]*"
  "|[ -~\u00a9\u00ae\u00b0\u2013\u2014\u2018\u2019\u201c\u201d\u2026\u2122]*)"
)


def clean(text: str) -> str:
  """ftfy, HTML entities twice, lower case; the white space is left to `str.split`.

  Most texts need little of it. Plain ASCII is only put in lower case. Other plain text goes through
  the four steps of ftfy that can change it, until they do not; ftfy itself gets the rest.
  """
  simple = text.isascii() and "&" not in text
  if simple and (text.isprintable() or not _ASCII_CONTROL.search(text)):
    return text.lower()
  fixed = text
  while _is_plain(fixed):
    before = fixed
    fixed = unicodedata.normalize("NFC", _REWRITTEN.sub(_rewrite, fixed))
    if fixed == before or (fixed.isascii() and "&" not in fixed):
      return fixed.lower()
  # Lower case comes after the white space: what a capital sigma turns into depends on neighbours.
  return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def _rewrite(match: re.Match[str]) -> str:
  return _rewrite_character(match.group())


@functools.cache
def _rewrite_character(character: str) -> str:
  """What ftfy puts in its place: each of these steps looks at one character at a time."""
  return fixes.uncurl_quotes(fixes.fix_character_width(fixes.fix_latin_ligatures(character)))


def _is_plain(text: str) -> bool:
  """Whether ftfy can only replace characters: no entity, control character, mojibake, segments."""
  return (
    text.isprintable()
    and "&" not in text
    and "\ufffc" not in text
    and len(text) < 100_000
    and bool(_NEVER_MOJIBAKE.fullmatch(text) or not is_bad(text))
  )
