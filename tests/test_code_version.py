"""What results say of the code that measured them."""

from clip_jax import code_version


def test_it_names_the_commit():
  version = code_version.current()
  assert version.startswith("0.1.0")
  assert version == "0.1.0" or version.partition("+g")[2]
