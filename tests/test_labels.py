"""Classes of copies by name and by number, labels by rule, our own random splits."""

import numpy as np
import pytest

from clip_jax.data import labels

EUROSAT = ("forest", "permanent crop land", "river")


def test_classes_are_matched_by_name_whatever_their_order_and_spelling():
  pets = ("Abyssinian", "Bengal", "American Bulldog")
  assert labels.match(("abyssinian", "american_bulldog", "BENGAL"), pets, {}) == (0, 2, 1)
  assert labels.match(("/f/forest", "River"), EUROSAT, {}) == (0, 2)
  assert labels.match(("PermanentCrop", "Forest"), EUROSAT, {"PermanentCrop": 1}) == (1, 0)
  assert labels.match(pets, pets, {}) == (0, 1, 2)


def test_equal_names_keep_their_places_where_the_lists_are_equal():
  classes = ("missile", "crane", "missile")
  assert labels.match(("Missile", "crane", "missile"), classes, {}) == (0, 1, 2)
  assert labels.distinct(classes) == ("missile", "crane", "missile (2)")


def test_numbers_count_only_where_they_are_known_to():
  digits = ("0", "1", "2")
  assert labels.match(("2", "0", "1"), EUROSAT, {}, numbered=True) == (2, 0, 1)
  assert labels.match(("00001", "00002", "00000"), EUROSAT, {}, numbered=True) == (1, 2, 0)
  for names, numbered in ((digits, False), (("1", "2", "3"), True), (("0", "1"), True)):
    assert set(labels.match(names, EUROSAT, {}, numbered)) == {None}
  # Names come before numbers: of CLEVR's folders 0 to 7 none may be taken for a number of objects.
  counts = ("10", "3", "4", "5", "6", "7", "8", "9")
  found = labels.match(tuple("01234567"), counts, {}, numbered=True)
  assert found == (None, None, None, 1, 2, 3, 4, 5)
  with pytest.raises(labels.LabelError, match=r"class '0' is none of the 8 .*, as 3 of 8"):
    labels.check(found, tuple("01234567"), counts)


def test_places_count_where_that_is_known():
  assert labels.match(("AD", "AE", "AF"), EUROSAT, {}, in_order=True) == (0, 1, 2)
  assert labels.match(("AD", "AE"), EUROSAT, {}, in_order=True) == (None, None)


def test_two_names_of_one_class_are_an_error():
  with pytest.raises(labels.LabelError, match="'forest' and 'Forest' are both 'forest'"):
    labels.match(("forest", "Forest"), EUROSAT, {})


def test_a_number_out_of_range_is_an_error():
  assert labels.at(EUROSAT, 2) == "river"
  for number in (-1, 3):
    with pytest.raises(labels.LabelError, match=f"label {number} is out of range: there are 3"):
      labels.at(EUROSAT, number)
  with pytest.raises(labels.LabelError, match="label 1 is none of the classes"):
    labels.at(("a", None), 1)


def test_several_classes_in_one_label():
  classes = ("dog", "dining table", "person")
  text = labels.join(["person"], ["dining table"])
  np.testing.assert_array_equal(labels.row(text, classes), [0, -1, 1])
  np.testing.assert_array_equal(labels.row(labels.join([]), classes), [0, 0, 0])
  with pytest.raises(labels.LabelError, match="'cat' is none of the 3"):
    labels.row("dog; cat", classes)


@pytest.mark.parametrize(
  ("kinds", "depths", "expected"),
  [
    ([0], [7.9], 0),
    ([1], [8.0], 0),  # up to 8 m, that too
    ([2, 0], [30.0, 8.1], 1),
    ([0], [20.0], 1),
    ([0], [20.5], 2),
    ([3, 4, 5, 6, 7], [1.0] * 5, 3),  # people, a tram: no vehicles here
    ([3, 0], [1.0, 50.0], 2),
    ([], [], 3),
    ([0], [-3.0], 0),
  ],
)
def test_the_nearest_vehicle(kinds, depths, expected):
  assert labels.vehicle_distance(kinds, depths) == expected


def test_objects_are_counted_from_three():
  assert [labels.object_count(n) for n in range(3, 11)] == list(range(8))
  for n in (2, 11):
    with pytest.raises(labels.LabelError, match=f"{n} objects"):
      labels.object_count(n)


def test_our_own_split_is_the_same_everywhere_and_has_the_sizes_asked_for():
  train, test = labels.draw(1000, train=300, test=100)
  assert (len(train), len(test)) == (300, 100)
  assert not set(train) & set(test)
  assert set(train) | set(test) < set(range(1000))
  assert list(test) == sorted(test)
  assert list(test[:5]) == [38, 44, 61, 68, 72]  # as long as this stands, figures can be compared
  assert abs(test.mean() - 500) < 100
  assert set(labels.draw(1000, 300, 100, seed=1)[1]) != set(test)


def test_a_small_pool_is_shared_out():
  train, test = labels.draw(9, train=10_000, test=5_000)
  assert (len(train), len(test)) == (6, 3)
  assert sorted([*train, *test]) == list(range(9))
