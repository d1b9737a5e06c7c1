import numpy as np
import pytest
from parsed_page import EVIL, Page

from clip_jax.evaluation import curves, pages


def test_words_of_strangers_are_escaped_cut_and_pictures_are_inside():
  image = np.zeros((4, 4, 3), np.uint8)
  example = {"image": image, "label": EVIL, "correct": False, "probability": 0.25, "rank": 1234}
  example["likeliest"] = [(EVIL, 0.5), ("x" * 500, 0.25)]
  source = """{% from "parts.html.j2" import draw_example, draw_facts, draw_panel, head %}
    {{ head(evil) }}<body>{{ draw_example(example, 2000, "a {}!", {}, evil) }}
    {{ draw_panel(panel) }}{{ draw_facts({evil: evil}) }}</body></html>"""
  panel = curves.panel(EVIL, {EVIL: [(0.0, 0.5), (1.0, 0.25)]}, curves.PERCENT, True, 0.1)
  text = pages._environment().from_string(source).render(evil=EVIL, example=example, panel=panel)
  page = Page(text)
  assert "script" not in page.tags
  assert page.text.count("<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }}") >= 6
  assert "25.0% for the true label, ranked 1,234 out of 2,000" in page.text
  assert "x" * 159 + "…" in page.text
  assert "x" * 160 not in page.text
  (picture,) = [v for tag, name, v in page.attributes if name == "src"]
  assert picture.startswith("data:image/png;base64,")
  widths = [v for tag, name, v in page.attributes if name == "style" and v.startswith("width:")]
  assert widths == ["width:50.0%", "width:25.0%"]


def test_a_missing_value_is_an_error_and_no_gap():
  with pytest.raises(pages.jinja2.UndefinedError, match="effect"):
    pages.render("overlap.html.j2")


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
  target = tmp_path / "page.html"
  pages.write(target, "half \ud800 a pair")
  assert target.read_text() == "half ? a pair"
  (tmp_path / "page.html.tmp").mkdir()
  with pytest.raises(OSError, match=r"page\.html"):
    pages.write(target, "new")
  assert target.read_text() == "half ? a pair"
