"""The tokenizer against open_clip's, on any Unicode string; trained vocabularies by round trip."""

import importlib.util
import json
import pickle
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data import tokenizer


@pytest.fixture(scope="module")
def reference():
  """open_clip's SimpleTokenizer; its file alone, because the package needs torchvision."""
  folder = importlib.util.find_spec("open_clip").submodule_search_locations[0]
  spec = importlib.util.spec_from_file_location("open_clip_tokenizer", f"{folder}/tokenizer.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module.SimpleTokenizer()


ours = tokenizer.original()


@pytest.mark.parametrize(
  ("text", "ids"),
  [
    ("a photo of a cat", [320, 1125, 539, 320, 2368]),
    ("", []),
    ("Hello,   WORLD!", None),
    ("it's 2021 &amp;amp; they've gone", None),
    ("naïve café – déjà vu… 東京 🚀", None),
    ("<start_of_text> and <END_OF_TEXT>", None),
    ("l&#39;été &lt;b&gt; ﬁne “quotes”", None),
    ("schÃ¶n mojibake", None),
  ],
)
def test_known_texts(reference, text, ids):
  assert ours.encode(text) == reference.encode(text)
  if ids is not None:
    assert ours.encode(text) == ids


def test_every_code_point(reference):
  """Alone and between letters, in one text for each block of code points; of the planes from 4 on,
  where hardly anything is assigned, one block in 16."""
  for start in (*range(0, 0x40000, 64), *range(0x40000, 0x110000, 1024)):
    points = [chr(i) for i in range(start, start + 64) if not 0xD800 <= i < 0xE000]
    text = " ".join(f"{p} a{p}b" for p in points)
    assert ours.encode(text) == reference.encode(text), hex(start)


pieces = st.one_of(
  st.text(max_size=20),
  st.text(st.characters(max_codepoint=0x17F), max_size=20),
  st.sampled_from(
    ["&amp;", "&amp;lt;", "&#39;", "&#x1F600;", "&nbsp;", "'s", "'VE", "<end_of_text>", "Ã©", "â€™",
     "\x1b[31m", "\r\n", "\u2028", "ﬀ", "\ufeff", "１２", "ǆ", "İ", "ß", "\u0301", "  ", "\x00",
     "“a”", "25°C", "©", "®x", "™", "‘", "–", "…"]
  ),
)  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(st.lists(pieces, max_size=6).map("".join))
def test_any_string(reference, text):
  try:
    expected = reference.encode(text)
  except Exception:
    with pytest.raises(tokenizer.TokenizerError):
      ours.encode(text)
    return
  assert ours.encode(text) == expected


def test_rows_are_padded_and_marked(reference):
  tokens = ours(["a cat", "", "two dogs run"], context_length=8)
  assert tokens.dtype == np.int32
  assert tokens.shape == (3, 8)
  np.testing.assert_array_equal(tokens, reference(["a cat", "", "two dogs run"], 8).numpy())
  assert tokens[1].tolist() == [49406, 49407, 0, 0, 0, 0, 0, 0]
  assert ours("a cat").shape == (1, 77)
  assert (tokens.argmax(1) == [3, 1, 4]).all()


def test_an_over_long_text_is_an_error_unless_it_may_be_cut(reference):
  text = "word " * 100
  with pytest.raises(tokenizer.TokenizerError, match=r"text 1 .* 102 tokens .*truncate=True"):
    ours(["short", text])
  cut = ours([text], truncate=True)
  assert cut.shape == (1, 77)
  assert cut[0, -1] == 49407
  np.testing.assert_array_equal(cut, reference([text]).numpy())


@pytest.mark.parametrize("texts", [[3], [None], ["a", b"b"], [["nested"]]])
def test_what_is_no_string_is_named(texts):
  with pytest.raises(tokenizer.TokenizerError, match=f"{len(texts) - 1}"):
    ours(texts)


@pytest.mark.parametrize("text", ["\ud800", "a\udc00b", "\ud83d\ude00"])
def test_surrogates(reference, text):
  assert ours.encode(text) == reference.encode(text)


@given(st.text(st.characters(categories=("L", "N")), max_size=30))
def test_decode_gives_the_cleaned_text(text):
  assert "\ufffd" not in ours.decode(ours.encode(unicodedata.normalize("NFC", text)))


def test_decode_stops_at_the_end():
  assert ours.decode(ours("A photo of a Cat")[0]) == "a photo of a cat"
  with pytest.raises(tokenizer.TokenizerError, match="outside"):
    ours.decode([50000])


CAPTIONS = ["a red circle", "two red circles", "a blue square", "three blue squares", "red! red?"]


def test_a_trained_vocabulary():
  small = tokenizer.train(CAPTIONS, 540)
  assert small.vocab_size <= 540
  assert (small.start_id, small.end_id) == (small.vocab_size - 2, small.vocab_size - 1)
  assert len(small.encode("red")) == 1
  for text in [*CAPTIONS, "something else, entirely 東京"]:
    assert small.decode(small.encode(text)).replace(" ", "") == text.replace(" ", "")
  assert tokenizer.train(reversed(CAPTIONS), 540) == small
  assert tokenizer.train(CAPTIONS, 530) != small
  assert tokenizer.train(CAPTIONS, 5000).vocab_size < 700  # no pairs left
  for copy in (tokenizer.Tokenizer.from_json(small.to_json()), pickle.loads(pickle.dumps(small))):
    assert copy == small
    assert copy.encode("two red squares") == small.encode("two red squares")


def test_training_the_original_vocabulary_way():
  """The first merges by hand: the most frequent pair, ties by code point."""
  small = tokenizer.train(["aaab aaab ab"], 516)
  assert list(small.merges) == [("a", "a"), ("a", "b</w>")]


def test_a_vocabulary_too_small_is_refused():
  with pytest.raises(tokenizer.TokenizerError, match="514"):
    tokenizer.train(CAPTIONS, 500)


@pytest.mark.parametrize("field", ["kind", "vocab_size", "fingerprint", "merges"])
def test_a_changed_file_is_refused_by_field(field):
  fields = json.loads(tokenizer.train(CAPTIONS, 540).to_json())
  for value in (None, "nonsense"):
    with pytest.raises(tokenizer.TokenizerError, match=field):
      tokenizer.Tokenizer.from_json(json.dumps({**fields, field: value}))
  del fields[field]
  with pytest.raises(tokenizer.TokenizerError, match=field):
    tokenizer.Tokenizer.from_json(json.dumps(fields))
  for text in ("", "[]", "{"):
    with pytest.raises(tokenizer.TokenizerError):
      tokenizer.Tokenizer.from_json(text)
