"""A little of what fuzz.py does, and properties that hold for any input."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies

import cifar10_input
import fuzz
from cifar10_input import CIFAR10, tf


@pytest.mark.parametrize('kind, count', [
    ('records', 200), ('archives', 200), ('checkpoints', 60), ('flags', 150)])
def test_nothing_that_is_wrong_is_taken(kind, count):
  refused = fuzz.fuzz(kind, seed=2, count=count)
  assert count / 4 < refused <= count


@settings(deadline=None, max_examples=50)
@given(strategies.binary(min_size=3072, max_size=3072),
       strategies.integers(0, 255))
def test_any_record_is_parsed_as_it_lies_on_disk(pixels, label):
  with tf.Graph().as_default(), tf.Session() as session:
    planes, labels = session.run(cifar10_input.parse_records(
        [bytes([label]) + pixels], CIFAR10))
  assert labels.tolist() == [label]
  assert planes.dtype == np.uint8 and planes.tobytes() == pixels


@settings(deadline=None, max_examples=200)
@given(strategies.binary(max_size=3 * 3073))
def test_file_is_taken_if_it_has_whole_records_with_known_labels(
    tmp_path_factory, content):
  folder = tmp_path_factory.mktemp('any')
  (folder / 'a.bin').write_bytes(content)
  dataset = fuzz.dataclasses.replace(
      fuzz.DATASET, train_files={'a.bin': max(1, len(content) // 3073)})
  right = (len(content) == dataset.size_bytes('a.bin')
           and max(content[::3073]) < 10)
  with fuzz.refusal() as messages:
    cifar10_input.check_files(dataset, str(folder), ['a.bin'])
  assert bool(messages) != right
