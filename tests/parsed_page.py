"""A page of HTML as a test sees it, and a string that no page may fall for."""

import html.parser

EVIL = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }} \u202e\x00\ud800"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
  """Reads a page; fails where a tag is closed that was not open."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.attributes, self.words, self.ids = [], [], [], [], []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.attributes.extend((tag, *pair) for pair in attributes)
    self.ids.extend(value for name, value in attributes if name == "id")
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append(tag)
    self.attributes.extend((tag, *pair) for pair in attributes)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

  def handle_data(self, data):
    if self.open and self.open[-1] != "style":
      self.words.append(data)

  @property
  def text(self):
    return " ".join(" ".join(self.words).split())
