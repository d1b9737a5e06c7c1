"""How fast the tokenizer is beside open_clip's: captions a second of both, and the ratio.

Run: python tools/bench/tokenizer.py [--captions N] [--runs R] [--json]

The captions are drawn anew for every run from a fixed seed, so no caption is met twice: what a
cache may know are the words, as in training. English words come from the original vocabulary's
own whole words, by a Zipf law over their rank (they were learned from web captions), with rare
words, numbers, capitals and punctuation; other languages from sentence patterns. Both sides are
warm (a first batch, not timed), take turns at going first, and are compared run by run: medians.
The `typographic` group is English with curly quotes, dashes or an accent in every caption.
"""

import argparse
import importlib.util
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

from clip_jax.data import tokenizer

Texts = list[str]
Tokenize = Callable[[Texts], object]

_LATIN = (
  ("Un", "Une petite photo d'un", "Le"),
  ("chien", "bébé éléphant", "garçon", "vélo", "château", "café", "gâteau", "bateau à voile"),
  ("très coloré", "près de la rivière", "âgé", "abandonné", "fatigué", "à côté d'un mur"),
  ("pendant l'été.", "en forêt", "à Besançon", "au marché de Noël", "sur la plage déserte"),
  ("Ein", "Kleines Foto: ein", "Der müde"),
  ("Hund", "Bär", "Vogel über dem See", "Käsekuchen", "Schlüssel", "Löwe", "Zug nach München"),
  ("läuft schnell", "steht vor der Tür", "schläft gemütlich", "fährt über die Brücke"),
  ("im Frühling.", "auf der grünen Wiese", "neben dem großen Haus", "in der Küche"),
  ("Una foto de un", "El pequeño", "Aquel"),
  ("niño", "camión", "pingüino", "jardín", "músico", "balcón", "avión", "cachorro de león"),
  ("está sentado", "mira hacia atrás", "jugó con un balón", "espera al autobús", "salió corriendo"),
  ("en el jardín.", "junto al océano", "después de la lluvia", "en la montaña", "mañana"),
)
_OTHER = (
  ("Фотография:", "Большая", "Маленькая"),
  ("собака", "кошка", "лодка", "девочка", "птица", "машина", "лошадь", "ёлка"),
  ("бежит", "стоит рядом с домом", "спит", "смотрит в окно", "ждёт друга"),
  ("на пляже.", "в лесу зимой", "у старого моста", "под дождём", "в Санкт-Петербурге"),
  ("一只", "一张照片，", "两只"),
  ("棕色的狗", "小猫", "红色的汽车", "骑自行车的人", "白马", "熊猫", "飞机"),
  ("在草地上", "在海边", "在城市的街道上", "在雪山前", "在厨房里"),
  ("奔跑。", "休息", "拍摄于夏天", "等待日落", "吃竹子"),
  ("大きな", "写真に写る", "二匹の"),
  ("犬が", "猫が", "電車が", "子供が", "鳥が", "自転車が", "桜の木が"),
  ("公園で", "海辺で", "東京の街で", "雪の中で", "窓のそばで"),
  ("走っている。", "眠っている", "遊んでいます", "並んでいる", "見えます"),
)


def english(rng: np.random.Generator, count: int) -> Texts:
  """ASCII captions of 4 to 22 words, 10.5 in the mean."""
  symbols = ("".join(pair) for pair in tokenizer.original().merges)
  whole = [symbol[:-4] for symbol in symbols if symbol.endswith("</w>")]
  words = [word for word in whole if word.isascii() and word.isalpha() and len(word) > 1]
  weights = 1 / (np.arange(len(words)) + 2.7)
  lengths = np.clip(rng.gamma(6, 1.75, count), 4, 22).astype(int)
  total = int(lengths.sum())
  picked = iter(rng.choice(len(words), total, p=weights / weights.sum()).tolist())
  odds = iter(rng.random(total).tolist())

  def word() -> str:
    text, odd = words[next(picked)], next(odds)
    if odd < 0.02:  # a name or a rare word: nothing that a cache knows
      return f"{text}{words[int(odd * 50 * len(words))]}".capitalize()
    if odd < 0.04:
      return str(int(odd * 1e6) % 2500)
    if odd < 0.12:
      return text.capitalize()
    if odd < 0.20:
      return text + (",", ",", "'s", " -", "!", " (2012)", ":", "-style")[int(odd * 100) - 12]
    return text

  captions = (" ".join(word() for _ in range(length)) for length in lengths)
  return [caption + (".", "")[index % 2] for index, caption in enumerate(captions)]


def typographic(rng: np.random.Generator, count: int) -> Texts:
  marks = ("’s café", " – the best of", " “at home”", "… more", " naïve art", " 25°C", " © 2019")
  chosen = rng.choice(len(marks), count).tolist()
  return [f"{text}{marks[i]}" for text, i in zip(english(rng, count), chosen, strict=True)]


def patterned(rng: np.random.Generator, count: int, patterns: tuple) -> Texts:
  """Sentences of four parts from one of three languages, two of them joined in every third."""
  groups = [patterns[first : first + 4] for first in range(0, len(patterns), 4)]

  def sentence(group: tuple) -> str:
    space = "" if not group[1][0].isalpha() or ord(group[1][0][0]) > 0x3000 else " "
    return space.join(parts[rng.integers(len(parts))] for parts in group)

  captions = []
  for index in range(count):
    group = groups[rng.integers(len(groups))]
    parts = [sentence(group) for _ in range(1 + (index % 3 == 0))]
    captions.append(" ".join((*parts, str(index))))
  return captions


GROUPS: dict[str, Callable[[np.random.Generator, int], Texts]] = {
  "english": english,
  "typographic": typographic,
  "latin": lambda rng, count: patterned(rng, count, _LATIN),
  "other_scripts": lambda rng, count: patterned(rng, count, _OTHER),
}


def open_clip_tokenize() -> Tokenize | None:
  """open_clip's tokenizer, its one file loaded alone (its package wants torchvision), or None."""
  package = importlib.util.find_spec("open_clip")
  if package is None or package.origin is None or importlib.util.find_spec("torch") is None:
    return None
  path = pathlib.Path(package.origin).with_name("tokenizer.py")
  spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
  if spec is None or spec.loader is None:
    return None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.SimpleTokenizer()


def seconds(function: Tokenize, texts: Texts) -> float:
  start = time.perf_counter()
  function(texts)
  return time.perf_counter() - start


def measure(group: str, theirs: Tokenize | None, captions: int, runs: int) -> dict[str, object]:
  """The medians of one group: captions a second of each, and of the paired ratios."""
  rng = np.random.default_rng(0)

  def ours(texts: Texts) -> object:
    return tokenizer.tokenize(texts, truncate=True)

  batches: Iterator[Texts] = (GROUPS[group](rng, captions) for _ in itertools.count())
  sides = [ours] if theirs is None else [ours, theirs]
  warm_up = next(batches) + next(batches)
  for side in sides:
    side(warm_up)
  times: dict[Tokenize, list[float]] = {side: [] for side in sides}
  for run in range(runs):
    batch = next(batches)
    for side in sides if run % 2 else sides[::-1]:
      times[side].append(seconds(side, batch))
  result: dict[str, object] = {
    "group": group,
    "example": batch[0],
    "distinct_chunks": len({chunk for text in batch for chunk in text.split()}),
    "clip_jax_captions_per_second": round(captions / statistics.median(times[ours])),
  }
  if theirs is not None:
    ratios = [slow / fast for fast, slow in zip(times[ours], times[theirs], strict=True)]
    result["open_clip_captions_per_second"] = round(captions / statistics.median(times[theirs]))
    result["ratio"] = round(statistics.median(ratios), 1)
    result["ratio_least"] = round(min(ratios), 1)
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--captions", type=int, default=4096, help="captions in a batch")
  parser.add_argument("--runs", type=int, default=9, help="paired runs of each group")
  parser.add_argument("--json", action="store_true", help="one JSON object a line")
  arguments = parser.parse_args()
  theirs = open_clip_tokenize()
  if theirs is None and not arguments.json:
    print("open_clip_torch (with torch) is not installed: only clip_jax is measured")
  for group in GROUPS:
    result = measure(group, theirs, arguments.captions, arguments.runs)
    if arguments.json:
      print(json.dumps({**result, "open_clip_installed": theirs is not None}, ensure_ascii=False))
      continue
    print(f"{group}: {result['clip_jax_captions_per_second']:,} captions/s", end="")
    if theirs is not None:
      print(f", open_clip {result['open_clip_captions_per_second']:,}", end="")
      print(f", ratio {result['ratio']} (least {result['ratio_least']})", end="")
    print(f"; {result['distinct_chunks']:,} distinct words, as: {result['example']}")


if __name__ == "__main__":
  main()
