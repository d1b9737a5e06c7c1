"""What results say of the code that measured them."""

from clip_jax import code_version


def test_it_names_the_commit():
  version = code_version.current()
  assert version.startswith("0.1.0")
  assert version == "0.1.0" or version.partition("+g")[2]


def test_figures_of_other_code_are_counted_by_version():
  assert code_version.note([], "v2") == ""
  assert code_version.note(["v2", "v2"], "v2") == ""
  others = "than this one, v2: not known (1), v1 (1,000)"
  assert code_version.note(["v1"] * 1000 + ["v2", ""], "v2") == (
    f"1,001 of 1,002 figures were measured by other versions of the code {others}"
  )
  assert code_version.note(["v1"], "v2").startswith("1 of 1 figures was measured by other ")
