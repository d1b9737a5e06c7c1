"""Text -> int32 [N, L]: the original byte-pair tokenizer, and smaller ones trained on own captions.

A text is cleaned (`cleaning.py`) and cut into words; each word's bytes are merged as the
vocabulary says (`bytepairs.py`). A row is the start token, the words' ids, the end token, zeros.
The end token has the largest id: an encoder may pool at argmax.

Source: Radford et al. 2021, section 2.4; openai/CLIP `clip/simple_tokenizer.py`, whose behaviour
this module reproduces on every Unicode string. The vocabulary's own source: `assets/README.md`.
Differs: an over-long text is an error unless `truncate=True`; `decode` stops at the end token and
leaves no space at the end.
"""

import collections
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib.resources
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import regex

from clip_jax.data import bytepairs, cleaning
from clip_jax.data.bytepairs import Pair, TokenizerError

_KIND = "clip-bpe/1"  # cleaning, words and byte symbols as written here; part of every fingerprint
_SPECIAL = ("<start_of_text>", "<end_of_text>")  # written out in a text, they mean the tokens
_WORDS = regex.compile(
  "|".join(_SPECIAL) + r"|'(?:s|t|re|ve|m|ll|d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
  regex.IGNORECASE,
)
_MIN_VOCAB_SIZE = bytepairs.BASE_SIZE + len(_SPECIAL)
_FIELDS = ("kind", "vocab_size", "fingerprint", "merges")

_ORIGINAL_FILE = "bpe_simple_vocab_16e6.txt.gz"
_ORIGINAL_MERGES = 49152 - 256 - 2
_ORIGINAL_FINGERPRINT = "55ccccb5f5cc5a7dcf13402ce65df0ba5d31d4a98c67686d51a3fafe5e7785f1"

_CACHED_CHUNKS = 1 << 17  # about 30 MB; when full the cache starts again from nothing
_CACHED_CHUNK_LENGTH = 40


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
  """An immutable byte-pair tokenizer, defined by its merges; safe to share, pickle and send.

  Attributes:
    merges: pairs of symbols, the first merged first.
    vocab_size: number of ids: 512 + merges + 2.
    start_id, end_id: vocab_size - 2 and vocab_size - 1. Padding is 0.
    fingerprint: sha256 over the kind and the merges: the same exactly where all ids are the same.

  Raises: TokenizerError naming the merge that uses an unknown symbol or makes a known one.
  """

  merges: tuple[Pair, ...]
  vocab_size: int = dataclasses.field(init=False)
  start_id: int = dataclasses.field(init=False)
  end_id: int = dataclasses.field(init=False)
  fingerprint: str = dataclasses.field(init=False)
  _symbol_bytes: list[bytes] = dataclasses.field(init=False)
  _chunk_ids: "_ChunkIds" = dataclasses.field(init=False)
  _start: bytes = dataclasses.field(init=False)
  _end: bytes = dataclasses.field(init=False)

  def __post_init__(self) -> None:
    merges = tuple(self.merges)
    table = bytepairs.symbol_table(merges)
    lines = [_KIND, *(" ".join(pair) for pair in merges)]
    self.__dict__.update(  # frozen: the one place where attributes are set
      merges=merges,
      vocab_size=len(table) + 2,
      start_id=len(table),
      end_id=len(table) + 1,
      fingerprint=hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest(),
      _symbol_bytes=list(table.values()),
      _start=_as_bytes([len(table)]),
      _end=_as_bytes([len(table) + 1]),
      _chunk_ids=_ChunkIds(bytepairs.word_encoder(list(table), merges), len(table)),
    )

  def __call__(
    self, texts: str | Sequence[str], context_length: int = 77, truncate: bool = False
  ) -> np.ndarray:
    """Token ids of N texts, int32 [N, L = context_length]; a single string gives N = 1.

    truncate: cut an over-long text, keep the end token. Raises: TokenizerError naming the text
    that is too long (without truncate) or no string.
    """
    if isinstance(texts, str):
      texts = [texts]
    if context_length < 2:
      raise TokenizerError(f"context_length is {context_length}; start and end alone need 2")
    row_bytes = 4 * context_length
    rows = []
    for index, text in enumerate(texts):
      row = self._row(text, index)
      if len(row) > row_bytes:
        if not truncate:
          raise TokenizerError(
            f"text {index} ({_excerpt(text)}) has {len(row) // 4} tokens with start and end, the "
            f"limit is context_length = {context_length}: shorten it, or pass truncate=True to cut "
            "it and keep the end token"
          )
        row = row[: row_bytes - 4] + self._end
      rows.append(row.ljust(row_bytes, b"\0"))
    return np.frombuffer(bytearray().join(rows), np.int32).reshape(len(rows), context_length)

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without start, end and padding. Raises: TokenizerError if no string."""
    return memoryview(self._row(text, 0)).cast("i").tolist()[1:-1]

  def decode(self, tokens: Iterable[int]) -> str:
    """The text of one row of ids, up to the end token; start tokens are left out.

    It is the cleaned, lower-case text with a space after every word ("dog's" -> "dog 's"), with
    U+FFFD where the bytes are no UTF-8. Raises: TokenizerError naming an id out of range.
    """
    parts = []
    for position, token in enumerate(tokens):
      if token == self.end_id:
        break
      if not 0 <= token < self.vocab_size:
        raise TokenizerError(
          f"token {token!r} at position {position} is outside [0, {self.vocab_size}): were the "
          "ids made by another tokenizer?"
        )
      if token != self.start_id:
        parts.append(self._symbol_bytes[token])
    return b"".join(parts).decode("utf-8", errors="replace").removesuffix(" ")

  def to_json(self) -> str:
    """Everything needed to make this tokenizer again, as `from_json` reads it."""
    values = (_KIND, self.vocab_size, self.fingerprint, [" ".join(pair) for pair in self.merges])
    return json.dumps(dict(zip(_FIELDS, values, strict=True)))

  @classmethod
  def from_json(cls, text: str) -> "Tokenizer":
    """The tokenizer that `to_json` wrote. Raises: TokenizerError naming the malformed field."""
    fields = _json_fields(text)
    try:
      tokenizer = cls(tuple(_pair(line, index) for index, line in enumerate(fields["merges"])))
    except TokenizerError as error:
      raise TokenizerError(f"tokenizer JSON, field 'merges': {error}") from error
    for name in ("vocab_size", "fingerprint"):
      if fields[name] != getattr(tokenizer, name):
        raise TokenizerError(
          f"tokenizer JSON, field '{name}': {fields[name]!r}, but the merges give "
          f"{getattr(tokenizer, name)!r}: the text was cut or edited, take it from its source again"
        )
    return tokenizer

  def _row(self, text: str, index: int) -> bytes:
    """The ids of a text from start to end token, as int32 bytes; `index` is for the message."""
    if not isinstance(text, str):
      raise _no_string(text, index)
    try:
      ids = map(self._chunk_ids.__getitem__, cleaning.clean(text).split())
      return b"".join((self._start, *ids, self._end))
    except ValueError as error:  # as the original: a numeric entity of thousands of digits
      raise TokenizerError(f"text {index} ({_excerpt(text)}) cannot be read: {error}") from error

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Tokenizer) and self.fingerprint == other.fingerprint

  def __hash__(self) -> int:
    return hash(self.fingerprint)

  def __repr__(self) -> str:
    return f"Tokenizer(vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:12]!r})"

  def __reduce__(self) -> tuple[Callable[..., "Tokenizer"], tuple[Any, ...]]:
    # The cache stays at home, and the original travels by name: read once in each process.
    if self.fingerprint == _ORIGINAL_FINGERPRINT:
      return original, ()
    return Tokenizer, (self.merges,)


@functools.cache
def original() -> Tokenizer:
  """The published models' tokenizer: 49,408 ids. Raises: TokenizerError on a damaged asset."""
  asset = importlib.resources.files("clip_jax") / "assets" / _ORIGINAL_FILE
  try:
    lines = gzip.decompress(asset.read_bytes()).decode("utf-8").split("\n")
    merges = (_pair(line, index) for index, line in enumerate(lines[1 : 1 + _ORIGINAL_MERGES]))
    tokenizer = Tokenizer(tuple(merges))
    if tokenizer.fingerprint != _ORIGINAL_FINGERPRINT:
      raise TokenizerError(f"fingerprint {tokenizer.fingerprint}, not {_ORIGINAL_FINGERPRINT}")
  except (OSError, EOFError, ValueError, zlib.error) as error:
    raise TokenizerError(
      f"{asset}: not the original vocabulary ({error}); install clip_jax again"
    ) from error
  return tokenizer


def tokenize(
  texts: str | Sequence[str], context_length: int = 77, truncate: bool = False
) -> np.ndarray:
  """`original()(texts, context_length, truncate)`: int32 [N, L] for the published models."""
  return original()(texts, context_length, truncate)


def train(captions: Iterable[str], vocab_size: int) -> Tokenizer:
  """A tokenizer of at most `vocab_size` ids, its merges learned from the captions.

  Cleaning and words are the original's. Each merge is the most frequent pair of neighbouring
  symbols; ties go to the first in code point order, so the captions' order does not matter. It
  stops early when no pairs are left: the result's `vocab_size` is what was reached.

  Raises: TokenizerError on a size below 514, or naming the caption that is no string.
  """
  if vocab_size < _MIN_VOCAB_SIZE:
    raise TokenizerError(
      f"vocab_size is {vocab_size}; the bytes and special tokens alone take {_MIN_VOCAB_SIZE}"
    )
  if isinstance(captions, str):
    raise TokenizerError("captions is one str; pass a list of them")
  chunks: collections.Counter[str] = collections.Counter()
  for index, caption in enumerate(captions):
    if not isinstance(caption, str):
      raise _no_string(caption, index)
    with contextlib.suppress(ValueError):  # unreadable (see `_row`): nothing is learned from it
      chunks.update(cleaning.clean(caption).split())
  words: collections.Counter[str] = collections.Counter()
  for chunk, count in chunks.items():
    for word in _WORDS.findall(chunk):
      if word not in _SPECIAL:
        words[word] += count
  return Tokenizer(tuple(bytepairs.learn(words, vocab_size - _MIN_VOCAB_SIZE)))


class _ChunkIds(dict[str, bytes]):
  """Cleaned text without white space -> its ids as int32 bytes; computed once, bounded.

  Words never reach across white space, so a text's ids are those of its chunks, joined. Each
  operation on the dict is atomic; threads that miss together compute the same value twice.
  """

  def __init__(self, encode_word: Callable[[str], list[int]], start_id: int):
    super().__init__()
    self._encode_word = encode_word
    self._special = {word: start_id + index for index, word in enumerate(_SPECIAL)}

  def __missing__(self, chunk: str) -> bytes:
    words = [chunk] if chunk.isascii() and chunk.isalpha() else _WORDS.findall(chunk)
    if len(words) != 1:  # each word is shorter than the chunk, and alone it is one word again
      ids = b"".join(map(self.__getitem__, words))
    else:
      word = words[0]
      ids = _as_bytes([self._special[word]] if word in self._special else self._encode_word(word))
    if len(chunk) <= _CACHED_CHUNK_LENGTH:
      if len(self) >= _CACHED_CHUNKS:
        self.clear()
      self[chunk] = ids
    return ids


def _no_string(text: object, index: int) -> TokenizerError:
  return TokenizerError(
    f"text {index} is {type(text).__name__} ({_excerpt(text)}), it must be a str"
  )


def _pair(line: str, index: int) -> Pair:
  left, _, right = line.partition(" ")
  if not left or not right or " " in right:
    raise TokenizerError(f"merges, entry {index}: {line!r} is not two symbols and one space")
  return left, right


def _json_fields(text: str) -> dict[str, Any]:
  """The fields of a tokenizer's JSON. Raises: TokenizerError naming one that is wrong."""
  try:
    fields = json.loads(text)
  except ValueError as error:
    raise TokenizerError(f"tokenizer JSON: not JSON ({error})") from error
  if not isinstance(fields, dict):
    raise TokenizerError(f"tokenizer JSON: an object was expected, not {type(fields).__name__}")
  for name in sorted(set(_FIELDS) ^ set(fields)):
    problem = "missing" if name in _FIELDS else f"unknown; the fields are {', '.join(_FIELDS)}"
    raise TokenizerError(f"tokenizer JSON, field '{name}': {problem}")
  if fields["kind"] != _KIND:
    raise TokenizerError(
      f"tokenizer JSON, field 'kind': {fields['kind']!r}, this version reads {_KIND!r}"
    )
  merges = fields["merges"]
  if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
    raise TokenizerError("tokenizer JSON, field 'merges': a list of strings was expected")
  return fields


def _as_bytes(ids: list[int]) -> bytes:
  return struct.pack(f"={len(ids)}i", *ids)


def _excerpt(text: object) -> str:
  quoted = repr(text)
  return quoted if len(quoted) <= 60 else f"{quoted[:56]}...{quoted[-1]}"
