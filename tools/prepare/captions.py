"""Captions of clip art: from the title, description and keywords of the SVG of the same name.

Much of this metadata says nothing of the picture: names of collections, mail addresses, "made with
Inkscape". Such a text is dropped, and counted under a reason; where a title is the name of a
collection, the words of the file's name stand in for it.
"""

import contextlib
import dataclasses
import pathlib
import re
import xml.etree.ElementTree as ElementTree
import xml.parsers.expat
from collections import Counter
from collections.abc import Mapping, Sequence

_MAX_LETTERS = 200  # of a description; the rest is cut at the end of a sentence or word
_MAX_ENTITY = 300  # characters
_KEYWORDS = 6
_COLLECTION = 3  # a title or description on so many pictures is looked at with suspicion
_EVERYWHERE = 10  # a description on so many pictures is none of any of them

_LINK = re.compile(r"\S*(https?:|www\.|\S@\S)\S*")
_ABOUT_THE_FILE = re.compile(
  r"\b(inkscape|sodipodi|illustrator|autotraced?|converted|eps|svg|public domain|licen[cs]e"
  r"|copyright|permission|contact|clip ?art|collection|submission|sibmission|contest|untitled"
  r"|theme|version|tutorial|tutoral|upload\w*|openclipart|openoffice|vectori[sz]\w+|icons?et"
  r"|created (by|with|in|for)|made (by|with|in|for)|designed (by|with|in|for)"
  r"|drawn (by|with|in) |part of|hash\(0x\w+)\b",
  re.IGNORECASE,
)
_NOT_A_WORD = """
  hash unsorted special theme themes magick mapsym icon icons clipart openclipart svg png inkscape
  misc miscellany various stock appicon webpage lemon_theme_icon signs_and_symbols
  united_nations_member mime-types mimetypes contrib test flat etiquette aiga nicu color colour
  colours new final copy architetto francesco rollandin
""".split()  # noqa: SIM905
_CREDIT = re.compile(r"^(clip ?art|drawing|image) by [\w .]+? - ", re.IGNORECASE)
_IN_SVG = re.compile(r"\s+in svg( format)?$", re.IGNORECASE)
_NUMBER_AT_END = re.compile(r"(?<=[^\W\d])\d{1,3}$|\s0\d*$")
_WORD = re.compile(r"[^\W\d_]+")
_SHORT_WORDS = ("no", "up", "on", "in", "of", "to", "at", "by", "or", "go", "tv", "cd", "us", "uk")


@dataclasses.dataclass(frozen=True)
class Metadata:
  """What an SVG says of itself."""

  title: str = ""
  description: str = ""
  keywords: tuple[str, ...] = ()
  creator: str = ""


def read_metadata(path: pathlib.Path) -> Metadata:
  """The Dublin Core of an SVG's RDF. Raises: ElementTree.ParseError, ValueError, OSError."""
  data = path.read_bytes()
  _refuse_entities(data)
  work = next((e for e in ElementTree.fromstring(data).iter() if _tag(e) == "Work"), None)
  parts = {_tag(e): e for e in work} if work is not None else {}
  texts = {name: "".join(part.itertext()) for name, part in parts.items()}
  subject = parts.get("subject", ())
  keywords = (tidy("".join(e.itertext())) for bag in subject for e in bag if _tag(e) == "li")
  return Metadata(
    title=tidy(texts.get("title", "")),
    description=tidy(texts.get("description", "")),
    keywords=tuple(k for k in keywords if k),
    creator=tidy(texts.get("creator", "")),
  )


class _PrologIsOver(Exception):
  pass


def _refuse_entities(data: bytes) -> None:
  """Raises: ValueError for entities that name a file, or that could grow when they are expanded.

  Short plain ones stay: drawing programs abbreviate the names of their namespaces so.
  """

  def check(name: str, is_parameter: int, value: str | None, *place: str | None) -> None:
    if is_parameter or value is None or "&" in value or len(value) > _MAX_ENTITY:
      raise ValueError(f"entity {name!r} in its DOCTYPE, which is not expanded")

  def stop(*unused: object) -> None:
    raise _PrologIsOver

  parser = xml.parsers.expat.ParserCreate()
  parser.EntityDeclHandler = check
  parser.StartElementHandler = stop
  with contextlib.suppress(_PrologIsOver, xml.parsers.expat.ExpatError):  # ElementTree says it
    parser.Parse(data, True)


def of_clip_art(
  metadata: Mapping[str, Metadata], dropped: Counter[str]
) -> dict[str, tuple[str, ...]]:
  """Key (path without its suffix) -> captions, the most telling first; none where none is useful.

  Counts in `dropped` every text that was passed over, as "title: collection" and the like.
  """
  titles = Counter(m.title.casefold() for m in metadata.values())
  descriptions = Counter(m.description.casefold() for m in metadata.values())
  out = {}
  for key, own in metadata.items():
    name = _name_words(key, own.creator)
    found: list[str] = []
    around = name if " " in own.title else [*name, *letters(" ".join(own.keywords)).split()]
    title, reason = _title(own.title, around, titles[own.title.casefold()])
    _keep(found, title or " ".join(name))
    if reason:
      dropped[f"title: {reason}"] += 1
    text, reason = _description(own.description, descriptions[own.description.casefold()])
    if not _keep(found, text) and text:
      reason = "says the same"
    if reason:
      dropped[f"description: {reason}"] += 1
    words = _keywords(own.keywords, own.creator)
    dropped["keyword: says nothing"] += len(own.keywords) - len(words)
    if words:
      found.append("clip art of " + ", ".join(words[:_KEYWORDS]))
    out[key] = tuple(found)
  return out


def of_stamp(path: pathlib.Path) -> str:
  """The English caption of a Tux Paint stamp: the first line, before the translations.

  Raises: UnicodeDecodeError, OSError.
  """
  lines = path.read_bytes().decode("utf-8-sig").splitlines()
  first = tidy(lines[0]) if lines else ""
  return "" if re.match(r"\w+\.utf8=", first) else first.lstrip("\u2013\u2014 ")


def tidy(text: str) -> str:
  """One line, single spaces, no control characters."""
  return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def letters(text: str) -> str:
  """Lower-case words alone: what two captions are compared by."""
  return " ".join(_WORD.findall(text.casefold()))


def _tag(element: ElementTree.Element) -> str:
  return str(element.tag).rpartition("}")[2]


def _keep(found: list[str], text: str) -> bool:
  """Adds a text that is not there yet."""
  fresh = bool(text) and letters(text) not in map(letters, found)
  if fresh:
    found.append(text)
  return fresh


def _title(title: str, around: Sequence[str], times: int) -> tuple[str, str]:
  """(the cleaned title or nothing, why it was passed over).

  A title on many pictures is kept where the words around it bear it out: the file's name for
  "Bullet Hole", a keyword too for "Clouds", nothing for the name of a collection.
  """
  if not title:
    return "", "empty"
  text = _IN_SVG.sub("", _CREDIT.sub("", title))
  if " " not in text:
    text = re.sub(r"[-_]", " ", text)
  text = tidy(_NUMBER_AT_END.sub("", text.replace("_", " ")))
  if _LINK.search(text) or _ABOUT_THE_FILE.search(text):
    return "", "about the file"
  words = letters(text).split()
  if max(map(len, words), default=0) < 3:
    return "", "no words"
  if times >= _COLLECTION:
    if not all(_among(word, around) for word in words):
      return "", "a collection's"
    text = tidy(re.sub(r"\d+", " ", text))
  return text, ""


def _among(word: str, around: Sequence[str]) -> bool:
  """Whether a word is one of these, of which some are cut short."""
  return any(part.startswith(word) or (len(part) > 2 and word.startswith(part)) for part in around)


def _description(text: str, times: int) -> tuple[str, str]:
  if not text:
    return "", "empty"
  if times >= _EVERYWHERE:
    return "", "on many pictures"
  if _LINK.search(text) or _ABOUT_THE_FILE.search(text):
    sentences = re.split(r"(?<=[.!?;])\s+", text)
    text = " ".join(s for s in sentences if not (_LINK.search(s) or _ABOUT_THE_FILE.search(s)))
    if len(letters(text).split()) < 2:
      return "", "about the file"
  if max(map(len, letters(text).split()), default=0) < 3:
    return "", "no words"
  if len(text) > _MAX_LETTERS:
    head = text[:_MAX_LETTERS]
    stop = max(head.rfind(mark) for mark in (". ", "! ", "? "))
    text = head[: stop + 1] if stop > 40 else head[: head.rfind(" ")]
  return text, ""


def _keywords(keywords: Sequence[str], creator: str) -> list[str]:
  """The telling ones, in plain words, each once."""
  author = letters(creator)
  out: list[str] = []
  for keyword in keywords:
    text = tidy(keyword.replace("_", " ").strip(" =,;.:"))
    known = keyword.casefold() in _NOT_A_WORD or letters(text) in ("", author) or "0x" in text
    telling = not known and 3 <= len(letters(text)) <= 40 and max(map(len, text.split())) <= 20
    if telling and not _ABOUT_THE_FILE.search(text) and text not in out:
      out.append(text)
  return out


def _name_words(key: str, creator: str) -> list[str]:
  """The words of a file's name, without numbers and without the author's name, often cut short."""
  author = [name for name in letters(creator).split() if len(name) > 1]
  words = []
  for part in re.split(r"[\W_]+", pathlib.PurePosixPath(key).name.casefold()):
    word = re.fullmatch(r"\d*([^\W\d_]+)\d*", part)  # not "49pt16step"
    if word is None:
      continue
    text = word[1]
    is_author = any(name.startswith(text) or text.startswith(name) for name in author)
    if text in _SHORT_WORDS or (len(text) > 2 and text not in _NOT_A_WORD and not is_author):
      words.append(text)
  return words if any(len(word) > 2 for word in words) else []
