"""Byte-pair encoding of single words: the symbols, the merges, how they are applied and learned.

A word is its UTF-8 bytes, each written as one printable character, the last one with `</w>`. A
vocabulary is a list of merges: the pairs of neighbouring symbols that become one, first ones first.
Ids: 0..255 the bytes, 256..511 the same at a word's end, 512.. the merges.

Source: Sennrich et al. 2016 (arXiv 1508.07909), section 3.2; on bytes as in GPT-2 (2019),
section 2.2. The order of ids is that of openai/CLIP.
"""

import collections
import functools
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence

import tokenizers

Pair = tuple[str, str]

BASE_SIZE = 512
WORD_END = "</w>"


class TokenizerError(ValueError):
  """A text, a token or a vocabulary that cannot be used; the message says which and why."""


def symbol_table(merges: Sequence[Pair]) -> dict[str, bytes]:
  """Symbol -> the bytes it stands for, in the order of ids; the end of a word reads as a space.

  Raises: TokenizerError naming the merge that uses an unknown symbol or makes a known one.
  """
  table = _base_symbols()
  for index, (left, right) in enumerate(merges):
    for symbol in (left, right):
      if symbol not in table:
        raise TokenizerError(
          f"merges, entry {index}: symbol {symbol!r} is neither a byte nor made by an earlier merge"
        )
    if left + right in table:
      raise TokenizerError(f"merges, entry {index}: symbol {left + right!r} exists already")
    table[left + right] = table[left] + table[right]
  return table


def word_encoder(symbols: Sequence[str], merges: Sequence[Pair]) -> Callable[[str], list[int]]:
  """A function from a word (not empty, no white space) to its ids; `symbols` in their order."""
  # A symbol is made by one merge only, so taking the first pair of lowest rank again and again (the
  # engine) gives what merging all its occurrences at once gives (the original).
  engine = tokenizers.models.BPE(
    vocab={symbol: index for index, symbol in enumerate(symbols)},
    merges=list(merges),
    end_of_word_suffix=WORD_END,
    cache_capacity=0,
  )
  characters = dict(enumerate(_byte_characters()))

  def encode_word(word: str) -> list[int]:
    if not (word.isascii() and word.isprintable()):  # these bytes stand for themselves
      word = word.encode("utf-8").decode("latin-1").translate(characters)
    return [token.id for token in engine.tokenize(word)]

  return encode_word


def learn(word_counts: Mapping[str, int], most: int) -> list[Pair]:
  """At most `most` merges for the words: each time the most frequent pair of neighbours.

  Of equally frequent pairs it takes the first in code point order (left symbol, then right), so
  the order of the words does not matter. A pair that would spell an existing symbol is passed over.
  """
  words = [_spell(word) for word in word_counts]
  weights = list(word_counts.values())
  counts: collections.Counter[Pair] = collections.Counter()
  places: dict[Pair, set[int]] = collections.defaultdict(set)  # words that may hold the pair
  for place, word in enumerate(words):
    for pair in itertools.pairwise(word):
      counts[pair] += weights[place]
      places[pair].add(place)
  queue = [(-count, pair) for pair, count in counts.items()]
  heapq.heapify(queue)
  known = set(_base_symbols())
  merges: list[Pair] = []
  while queue and len(merges) < most:
    negative_count, pair = heapq.heappop(queue)
    if -negative_count != counts[pair] or "".join(pair) in known:
      continue  # an entry from before the count changed, or a symbol that exists
    merges.append(pair)
    known.add("".join(pair))
    changed = set()
    for place in places.pop(pair):
      for neighbours in itertools.pairwise(words[place]):
        counts[neighbours] -= weights[place]
        changed.add(neighbours)
      words[place] = _merge(words[place], pair)
      for neighbours in itertools.pairwise(words[place]):
        counts[neighbours] += weights[place]
        places[neighbours].add(place)
        changed.add(neighbours)
    for neighbours in changed:
      if counts[neighbours]:
        heapq.heappush(queue, (-counts[neighbours], neighbours))
  return merges


def _merge(word: list[str], pair: Pair) -> list[str]:
  """The word with every occurrence of the pair made one symbol, from left to right."""
  merged: list[str] = []
  position = 0
  while position < len(word):
    found = tuple(word[position : position + 2]) == pair
    merged.append("".join(pair) if found else word[position])
    position += 2 if found else 1
  return merged


def _spell(word: str) -> list[str]:
  """A word's byte symbols, the last with the end of the word."""
  *head, last = (_byte_characters()[byte] for byte in word.encode("utf-8"))
  return [*head, last + WORD_END]


@functools.cache
def _byte_characters() -> list[str]:
  """The printable character that stands for each byte 0..255: itself, or one from U+0100 on."""
  spare = itertools.count(256)
  return [chr(byte) if _is_visible(byte) else chr(next(spare)) for byte in range(256)]


def _is_visible(byte: int) -> bool:
  return 33 <= byte <= 126 or (161 <= byte <= 255 and byte != 173)


def _base_symbols() -> dict[str, bytes]:
  """Symbol -> its byte, in the order of ids 0..511: first the bytes that stand for themselves."""
  order = sorted(range(256), key=lambda byte: (not _is_visible(byte), byte))
  symbols = {_byte_characters()[byte]: bytes([byte]) for byte in order}
  return symbols | {symbol + WORD_END: byte + b" " for symbol, byte in symbols.items()}
