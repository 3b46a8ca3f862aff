"""cifar10_input: data come whole, and reach the network distorted as said.

The arithmetic of distortions is held against TensorFlow's own image operations,
one image at a time; their chance against its distribution; the queues against
pictures that tell the number of their record. Archives come from a server on
this machine; after each attempt, the data directory holds what it should.
"""
import dataclasses
import errno
import gzip
import hashlib
import http.server
import io
import os
import shutil
import signal
import socket
import sys
import tarfile
import threading
import time
import types

from hypothesis import given, settings, strategies
import numpy as np
import pytest

from conftest import (
    TINY, TWO_LABELS, contents, is_one_line, read_codes, run_queues,
    write_coded, write_random)
import cifar10_eval
import cifar10_input
import cifar10_train
import fuzz
from cifar10_input import CIFAR10, IMAGE_SIZE, SVHN, SYNTHETIC, UserError, tf

NUM_DRAWS = 20000


# Arithmetic.


def _pictures(kind, count):
  """Returns uint8 [count, 32, 32, 3]."""
  noise = np.random.default_rng(1).integers(0, 256, (count, 32, 32, 3))
  return {
      'random': noise,
      'dim': 100 + noise // 64,
      'one bright pixel each': np.where(
          np.arange(32 * 32).reshape(1, 32, 32, 1) == 16 * 33, 255, 0 * noise),
      'tinted': noise // 4 + [0, 90, 190],
      'ramps': np.broadcast_to(
          np.arange(32).reshape(1, 1, 32, 1) * 8, noise.shape),
      'of one colour': np.broadcast_to(noise[:, :1, :1, :], noise.shape),
      'of one grey': np.broadcast_to(noise[:, :1, :1, :1], noise.shape),
      'black': 0 * noise,
      'white': 0 * noise + 255,
  }[kind].astype(np.uint8)


def _some_distortions():
  """Every corner with and without a flip, and extremes of the rest."""
  random = np.random.default_rng(2)
  top, left, flip = np.indices([9, 9, 2]).reshape(3, -1)
  brightness = random.uniform(-63, 63, len(top))
  contrast = random.uniform(0.2, 1.8, len(top))
  brightness[:4], contrast[:4] = [-63, -63, 63, 63], [0.2, 1.8, 0.2, 1.8]
  return cifar10_input.Distortions(
      top.astype(np.int32), left.astype(np.int32), flip.astype(bool),
      brightness.astype(np.float32), contrast.astype(np.float32))


def _distort(pictures, distortions):
  with tf.Session() as session:
    return session.run(cifar10_input.distort(
        tf.constant(np.moveaxis(pictures, 3, 1)),
        cifar10_input.Distortions(*map(tf.constant, distortions))))


def _distort_one_by_one(pictures, distortions):
  """The same with the operations that TensorFlow has for single images."""
  picture, top, left, flip, brightness, contrast = inputs = [
      tf.placeholder(tf.as_dtype(values.dtype), values.shape[1:])
      for values in (pictures,) + tuple(distortions)]
  image = tf.cast(
      picture[top:top + IMAGE_SIZE, left:left + IMAGE_SIZE], tf.float32)
  image = tf.cond(flip, lambda: tf.image.flip_left_right(image), lambda: image)
  image = tf.image.adjust_brightness(image, brightness)
  image = tf.image.adjust_contrast(image, contrast)
  image = tf.image.per_image_standardization(image)
  with tf.Session() as session:
    return np.stack([session.run(image, dict(zip(inputs, values)))
                     for values in zip(pictures, *distortions)])


# On faint pictures, TensorFlow's own 32-bit arithmetic is not better than that.
@pytest.mark.parametrize('kind, tolerance', [
    ('random', 1e-5), ('one bright pixel each', 1e-5), ('tinted', 1e-5),
    ('ramps', 1e-5), ('dim', 2e-4), ('of one colour', 1e-4)])
def test_distortions_equal_those_of_tf_image(kind, tolerance):
  distortions = _some_distortions()
  pictures = _pictures(kind, len(distortions.top))
  expected = _distort_one_by_one(pictures, distortions)
  result = _distort(pictures, distortions)
  assert result.shape == (len(pictures), IMAGE_SIZE, IMAGE_SIZE, 3)
  assert result.dtype == np.float32
  errors = abs(result - expected).max(axis=(1, 2, 3))
  assert (errors <= tolerance * abs(expected).max(axis=(1, 2, 3))).all()


@pytest.mark.parametrize('kind', ['of one grey', 'black', 'white'])
def test_images_of_one_grey_become_zero(kind):
  distortions = _some_distortions()
  result = _distort(_pictures(kind, len(distortions.top)), distortions)
  np.testing.assert_allclose(result, 0, atol=1e-2)


def test_crop_and_flip_are_exact():
  distortions = _some_distortions()
  distortions = distortions._replace(
      brightness=0 * distortions.brightness,
      contrast=0 * distortions.contrast + 1)
  pictures = _pictures('random', len(distortions.top))
  results = _distort(pictures, distortions)
  for picture, result, top, left, flip in zip(
      pictures, results, *distortions[:3]):
    crop = picture[top:top + IMAGE_SIZE, left:left + IMAGE_SIZE]
    crop = crop[:, ::-1] if flip else crop
    np.testing.assert_array_equal(
        np.rint(result * crop.std() + crop.mean()), crop)


@pytest.mark.parametrize('size, middle, far', [
    (24, 4, (2, 6)), (28, 2, (0, 4)), (32, 0, (0, 0))])
def test_ten_views_are_crops_around_the_centre_and_their_mirror_images(
    size, middle, far):
  picture = _pictures('random', 1)[0].astype(np.float32)
  planes = tf.constant(np.moveaxis(picture, 2, 0)[np.newaxis])
  with tf.Session() as session:
    views = session.run(cifar10_input.crop_views(
        planes, cifar10_input.TEN_VIEWS, size))
    central = session.run(cifar10_input.crop_views(planes, image_size=size))
  corners = [(middle, middle)] + [(y, x) for y in far for x in far]
  crops = [picture[y:y + size, x:x + size] for y, x in corners]
  crops += [crop[:, ::-1] for crop in crops]
  expected = [(crop - crop.mean()) / crop.std() for crop in crops]
  np.testing.assert_allclose(views, expected, atol=1e-4)
  np.testing.assert_allclose(central, expected[:1], atol=1e-4)


# Chance.


def _draw(count, seed=1, **arguments):
  with tf.Graph().as_default(), tf.Session() as session:
    tf.set_random_seed(seed)
    return session.run(cifar10_input.draw_distortions(count, **arguments))


def test_seed_repeats_the_distortions():
  for same, first, second in ((True, 7, 7), (False, 7, 8)):
    for one, other in zip(_draw(64, first), _draw(64, second)):
      assert np.array_equal(one, other) == same


def test_distortions_are_drawn_evenly_and_do_not_depend_on_each_other():
  draws = _draw(NUM_DRAWS)
  assert draws.flip.dtype == bool
  for name, low, high, shares in (
      ('top', 0, 9, 9), ('left', 0, 9, 9), ('flip', 0, 2, 2),
      ('brightness', -63, 63, 10), ('contrast', 0.2, 1.8, 10)):
    values = getattr(draws, name).astype(float)
    assert values.min() >= low and values.max() <= high
    counts, _ = np.histogram(values, shares, (low, high))
    deviation = np.sqrt((1 - 1 / shares) / shares / NUM_DRAWS)
    np.testing.assert_allclose(
        counts / NUM_DRAWS, 1 / shares, atol=5 * deviation)
  correlations = np.corrcoef([values.astype(float) for values in draws])
  np.testing.assert_allclose(
      correlations, np.eye(5), atol=5 / np.sqrt(NUM_DRAWS))


def test_every_image_and_every_batch_has_its_own_distortions():
  drawn = cifar10_input.draw_distortions(64)
  with tf.Session() as session:
    batches = [session.run(drawn) for _ in range(2)]
  assert len(set(batches[0].brightness) | set(batches[1].brightness)) == 128
  assert len(set(batches[0].contrast) | set(batches[1].contrast)) == 128
  for batch in batches:
    assert len(set(zip(batch.top, batch.left))) > 20


@pytest.mark.parametrize('size, room', [(24, 9), (30, 3), (32, 1)])
def test_crops_have_the_room_that_their_size_leaves(size, room):
  draws = _draw(1000, image_size=size)
  assert set(draws.top) == set(draws.left) == set(range(room))


# Reading.


@pytest.mark.parametrize('dataset', [TINY, TWO_LABELS], ids=['1', '2'])
def test_read_cifar10_gives_one_record(tmp_path, dataset):
  written = write_random(dataset, tmp_path)
  paths = [str(tmp_path / name) for name in dataset.train_files]
  example = cifar10_input.read_cifar10(
      tf.train.string_input_producer(paths, shuffle=False),
      dataset if dataset is TWO_LABELS else None)  # CIFAR-10's has one label.
  assert (example.height, example.width, example.depth) == (32, 32, 3)
  assert example.label.dtype == tf.int32
  assert example.label.shape.as_list() == [1]
  assert example.uint8image.dtype == tf.uint8
  assert example.uint8image.shape.as_list() == [32, 32, 3]
  with run_queues() as session:
    for path, name in zip(paths, dataset.train_files):
      for i, (label, picture) in enumerate(zip(*written[name])):
        key, read_label, read_picture = session.run(
            [example.key, example.label, example.uint8image])
        assert key.decode() == '%s:%d' % (path, i)
        assert read_label == [label]
        np.testing.assert_array_equal(read_picture, picture)


def test_training_batches_are_shuffled_pairs_of_image_and_label(tmp_path):
  images, labels = cifar10_input.distorted_inputs(
      data_dir=write_coded(TINY, tmp_path), batch_size=25, dataset=TINY)
  assert images.dtype == tf.float32 and labels.dtype == tf.int32
  assert images.shape.as_list() == [25, IMAGE_SIZE, IMAGE_SIZE, 3]
  assert labels.shape.as_list() == [25]
  numbers = []
  with run_queues() as session:
    for _ in range(60):
      image_values, label_values = session.run([images, labels])
      batch = read_codes(image_values)
      np.testing.assert_array_equal(label_values, batch % 10)
      assert (np.diff(batch) == 1).sum() < 5 and np.ptp(batch) > 50
      numbers.extend(batch)
  counts = np.bincount(numbers, minlength=250)
  assert counts.shape == (250,)
  assert counts.min() >= 1 and counts.max() <= 20


def test_training_images_differ_in_their_distortions(tmp_path):
  picture = np.random.default_rng(0).integers(0, 256, 3072)
  for name, size in TINY.files.items():
    np.tile(np.r_[0, picture], size).astype(np.uint8).tofile(tmp_path / name)
  images, _ = cifar10_input.distorted_inputs(str(tmp_path), 64, TINY)
  with run_queues() as session:
    values = session.run(images)
  assert len(np.unique(values.round(3), axis=0)) > 32


def test_deterministic_batches_follow_from_the_seed(tmp_path):
  folder = write_coded(TINY, tmp_path)
  drawn = []
  for seed in (3, 3, 4):
    with tf.Graph().as_default():
      tf.set_random_seed(seed)
      images, _ = cifar10_input.distorted_inputs(
          folder, 8, TINY, deterministic=True)
      with run_queues() as session:
        drawn.append([session.run(images) for _ in range(5)])
  assert np.array_equal(drawn[0], drawn[1])
  assert not np.array_equal(drawn[0], drawn[2])


def _shuffle_queue(graph=None):
  queue, = (op for op in tf.get_default_graph().get_operations()
            if op.type.startswith('RandomShuffleQueue'))
  return queue


@pytest.mark.parametrize('options, size', [
    ({}, 100), ({'min_fraction_of_examples_in_queue': 0.1}, 25),
    ({'min_fraction_of_examples_in_queue': 1.0}, 250)])
def test_the_shuffle_queue_keeps_its_part_of_an_epoch_as_records(
    tmp_path, capsys, options, size):
  cifar10_input.distorted_inputs(
      write_coded(TINY, tmp_path), 25, TINY, **options)
  queue = _shuffle_queue()
  assert queue.get_attr('min_after_dequeue') == size
  assert size + 25 <= queue.get_attr('capacity') <= size + 16 * 25
  assert queue.get_attr('component_types') == [tf.string]
  assert capsys.readouterr().out.startswith(
      'Filling queue with %d synthetic images before starting to train.' % size)


@pytest.mark.parametrize('eval_data, size', [(True, 70), (False, 250)])
@pytest.mark.parametrize('batch_size', [1, 25, 300])
def test_evaluation_reads_all_examples_in_order_again_and_again(
    tmp_path, eval_data, size, batch_size):
  images, labels = cifar10_input.inputs(
      eval_data=eval_data, data_dir=write_coded(TINY, tmp_path),
      batch_size=batch_size, dataset=TINY)
  assert images.dtype == tf.float32 and labels.dtype == tf.int32
  assert images.shape.as_list() == [batch_size, IMAGE_SIZE, IMAGE_SIZE, 3]
  assert labels.shape.as_list() == [batch_size]
  numbers, read_labels = [], []
  with tf.Session() as session:  # It needs no more than a plain one.
    threads = tf.train.Coordinator()
    tf.train.start_queue_runners(session, threads)
    while len(numbers) < 2 * size + 30:
      image_values, label_values = session.run([images, labels])
      numbers.extend(read_codes(image_values))
      read_labels.extend(label_values)
    threads.request_stop()
  expected = np.arange(len(numbers)) % size
  np.testing.assert_array_equal(numbers, expected)
  np.testing.assert_array_equal(read_labels, expected % 10)


def test_evaluation_sees_the_centres_of_pictures_and_the_label_that_counts(
    tmp_path):
  labels, pictures = write_random(TWO_LABELS, tmp_path)['test.bin']
  batch = cifar10_input.inputs(True, str(tmp_path), 70, TWO_LABELS)
  with run_queues() as session:
    image_values, label_values = session.run(batch)
  np.testing.assert_array_equal(label_values, labels)
  crops = pictures[:, 4:28, 4:28].astype(float)
  expected = (crops - crops.mean(axis=(1, 2, 3), keepdims=True)) / (
      crops.std(axis=(1, 2, 3), keepdims=True))
  np.testing.assert_allclose(image_values, expected, atol=1e-4)


def test_constants_of_a_script_are_what_is_read_with(tmp_path, monkeypatch):
  monkeypatch.setattr(cifar10_input, 'NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN', 100)
  monkeypatch.setattr(cifar10_input, 'NUM_EXAMPLES_PER_EPOCH_FOR_EVAL', 7)
  monkeypatch.setattr(cifar10_input, 'IMAGE_SIZE', 32)
  folder = write_coded(dataclasses.replace(
      CIFAR10, train_files=dict(zip(CIFAR10.train_files, (30, 1, 40, 2, 50))),
      eval_files={'test_batch.bin': 7}), tmp_path)
  images, _ = cifar10_input.distorted_inputs(folder, 8)
  assert _shuffle_queue().get_attr('min_after_dequeue') == 40
  eval_images, eval_labels = cifar10_input.inputs(True, folder, 8)
  for batch in (images, eval_images):
    assert batch.shape.as_list() == [8, 32, 32, 3]
  with run_queues() as session:
    assert session.run(images).shape == (8, 32, 32, 3)
    # The record after the 123 to train on, whose label is 3, and so on.
    assert session.run(eval_labels).tolist() == [3, 4, 5, 6, 7, 8, 9, 3]
  monkeypatch.setattr(cifar10_input, 'NUM_CLASSES', 9)
  with pytest.raises(UserError, match='test_batch.* label 9 in record 6'):
    cifar10_input.inputs(True, folder, 8)
  for size in (0, 3073 * 2 + 5):
    os.truncate(tmp_path / 'data_batch_1.bin', size)
    with pytest.raises(UserError, match='data_batch_1.* has %d bytes' % size):
      cifar10_input.distorted_inputs(folder, 8)


# What is wrong with the files.


def _mislabel(path):
  with open(path, 'r+b') as f:
    f.seek(41 * 3073)
    f.write(bytes([200]))


def _replace_by_folder(path):
  os.remove(path)
  os.mkdir(path)


FLAWS = {
    'missing': (os.remove, 'is missing'),
    'empty': (lambda path: os.truncate(path, 0), 'has 0 bytes, not 307300'),
    'cut': (lambda path: os.truncate(path, 33 * 3073), 'has 101409 bytes, not'),
    'grown': (lambda path: os.truncate(path, 310373), 'has 310373 bytes, not'),
    'mislabelled': (_mislabel, 'label 200 in record 41'),
    'a folder': (_replace_by_folder, 'is not a file'),
}


@pytest.mark.parametrize('flaw', FLAWS)
def test_a_file_is_refused_that_is(tmp_path, flaw):
  folder = write_coded(TINY, tmp_path)
  spoil, message = FLAWS[flaw]
  path = os.path.join(folder, 'second.bin')
  spoil(path)
  for build in (
      lambda: cifar10_input.distorted_inputs(folder, 8, TINY),
      lambda: cifar10_input.inputs(False, folder, 8, TINY)):
    with pytest.raises(UserError) as error:
      build()
    assert path in str(error.value) and message in str(error.value)
    assert '\n' not in str(error.value)
  cifar10_input.inputs(True, folder, 8, TINY)


def test_only_the_byte_that_is_the_label_is_checked(tmp_path):
  write_random(TWO_LABELS, tmp_path)
  path = tmp_path / 'test.bin'
  records = bytearray(path.read_bytes())
  records[69 * 3074] = 255
  path.write_bytes(records)
  assert cifar10_input.check_files(
      TWO_LABELS, str(tmp_path), ['test.bin']) == [str(path)]
  records[69 * 3074 + 1] = 100
  path.write_bytes(records)
  with pytest.raises(UserError, match='test.bin.* 100 in record 69'):
    cifar10_input.check_files(TWO_LABELS, str(tmp_path), ['test.bin'])


# Data sets.


def test_cifar10_is_described_as_published():
  assert CIFAR10.folder == 'cifar-10-batches-bin'
  assert {name: CIFAR10.size_bytes(name) for name in CIFAR10.train_files} == {
      'data_batch_%d.bin' % i: 30730000 for i in (1, 2, 3, 4, 5)}
  assert list(CIFAR10.eval_files) == ['test_batch.bin']
  assert CIFAR10.size_bytes('test_batch.bin') == 30730000
  assert CIFAR10.classes == (
      'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse',
      'ship', 'truck')


@pytest.mark.parametrize('dataset, label, num_classes', [
    (cifar10_input.CIFAR100, 42, 100), (cifar10_input.CIFAR100_COARSE, 7, 20)])
def test_cifar100_has_two_labels_and_takes_the_right_one(
    dataset, label, num_classes):
  with tf.Session() as session:
    planes, labels = session.run(cifar10_input.parse_records(
        [bytes([7, 42]) + bytes(3072)], dataset))
  assert labels.tolist() == [label]
  assert not planes.any()
  assert len(set(dataset.classes)) == len(dataset.classes) == num_classes


def test_generated_data_have_exact_sizes_all_classes_and_no_picture_twice(
    synthetic_dir):
  files = contents(synthetic_dir)
  sizes = {name: len(content) for name, content in files.items()}
  assert sizes == {SYNTHETIC.folder + '/data_batch_1.bin': 15365000,
                   SYNTHETIC.folder + '/data_batch_2.bin': 15365000,
                   SYNTHETIC.folder + '/test_batch.bin': 6146000}
  for content in files.values():
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    shares = np.bincount(records[:, 0], minlength=10) / len(records)
    assert shares.shape == (10,)
    assert shares.min() > 0.08 and shares.max() < 0.12
    assert (records[:, 1:].std(axis=1) > 5).all()
    unique = np.unique(records[:, 1:65], axis=0)
    assert len(unique) > 0.99 * len(records)


def test_two_generations_have_the_same_bytes(tmp_path, tiny_dir):
  cifar10_input.maybe_download_and_extract(TINY, str(tmp_path))
  assert contents(tmp_path) == contents(tiny_dir)


def test_fit_leaves_pictures_of_the_right_size_as_they_are():
  pictures = _pictures('random', 3)
  with tf.Session() as session:
    fitted = session.run(cifar10_input.fit(tf.constant(pictures)))
  np.testing.assert_array_equal(fitted, pictures.transpose(0, 3, 1, 2))


def test_fit_halves_and_cuts_as_an_antialiased_resize_does():
  random = np.random.default_rng(0)
  picture = random.integers(0, 256, (1, 64, 96, 3)).astype(np.float32)
  with tf.Session() as session:
    fitted, resized = session.run([
        cifar10_input.fit(tf.constant(picture)),
        tf.compat.v2.image.resize(picture, [32, 48], antialias=True)])
  np.testing.assert_allclose(
      fitted, np.rint(resized[:, :, 8:40].transpose(0, 3, 1, 2)), atol=1)


def test_svhn_is_converted_from_matlab(tmp_path, monkeypatch):
  scipy_io = pytest.importorskip('scipy.io')
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (32, 32, 3, 20), np.uint8)
  labels = random.integers(1, 11, (20, 1)).astype(np.uint8)
  downloads = {}
  for name in ('train_32x32.mat', 'test_32x32.mat'):
    scipy_io.savemat(tmp_path / name, {'X': images, 'y': labels})
    downloads['http://127.0.0.1:1/' + name] = _sha256(
        (tmp_path / name).read_bytes())
  svhn = dataclasses.replace(
      SVHN, train_files={'train_32x32.bin': 20},
      eval_files={'test_32x32.bin': 20}, downloads=downloads)
  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, 'scipy', None)
    assert 'pip install scipy' in _fail(svhn, tmp_path)
  folder = cifar10_input.maybe_download_and_extract(svhn, str(tmp_path))
  for path in cifar10_input.check_files(svhn, folder, svhn.files):
    records = np.fromfile(path, np.uint8).reshape(20, 3073)
    np.testing.assert_array_equal(records[:, 0], labels[:, 0] % 10)
    np.testing.assert_array_equal(
        records[:, 1:].reshape(20, 3, 32, 32), images.transpose(3, 2, 0, 1))


@pytest.fixture
def pictures_dir(tmp_path):
  """A folder with two classes of pictures of several sizes and kinds."""
  random = np.random.default_rng(0)
  encoders = tf.io.encode_png, tf.io.encode_jpeg
  for part, count in (('train', 12), ('test', 5)):
    for label, name in enumerate(['dark', 'light']):
      folder = tmp_path / 'mine' / part / name
      folder.mkdir(parents=True)
      for i in range(count):
        picture = 180 * label + random.integers(
            0, 60, (*random.integers(20, 90, 2), 3), np.uint8)
        with tf.Graph().as_default(), tf.Session() as session:
          encoded = session.run(encoders[i % 2](picture))
        (folder / ('%d.picture' % i)).write_bytes(encoded)
  (tmp_path / 'mine' / 'train' / 'dark' / 'broken.png').write_text('nothing')
  return tmp_path / 'mine'


def test_own_pictures_are_converted_once(pictures_dir, tmp_path, capfd):
  arguments = str(pictures_dir), str(tmp_path / 'data')
  dataset = cifar10_input.own_pictures(*arguments)
  assert dataset.classes == ('dark', 'light')
  assert dataset.files == {'train.bin': 24, 'test.bin': 10}
  assert 'Skipped %s' % (pictures_dir / 'train' / 'dark' / 'broken.png') in (
      capfd.readouterr().out)
  folder = tmp_path / 'data' / dataset.folder
  records = np.fromfile(folder / 'train.bin', np.uint8).reshape(-1, 3073)
  assert records[:, 0].tolist() == [0] * 12 + [1] * 12
  assert records[:12, 1:].max() < 90 < 150 < records[12:, 1:].min()
  assert cifar10_input.own_pictures(*arguments).folder == dataset.folder
  assert capfd.readouterr().out == ''
  (pictures_dir / 'test' / 'dark' / '0.picture').unlink()
  assert cifar10_input.own_pictures(*arguments).files['test.bin'] == 9


def test_own_pictures_are_trained_on_and_evaluated(
    pictures_dir, tmp_path, call_script):
  run = call_script(
      cifar10_train, '--dataset=%s' % pictures_dir, '--batch_size=4',
      '--data_dir=%s' % (tmp_path / 'data'), '--max_steps=2',
      '--train_dir=%s' % (tmp_path / 'run'))
  assert (run.code, run.stderr) == (0, '')
  run = call_script(
      cifar10_eval, '--checkpoint_dir=%s' % (tmp_path / 'run'), '--run_once',
      '--eval_dir=%s' % (tmp_path / 'eval'))
  assert '/10 correct at step 2\n' in run.stdout
  assert '  light ' in run.stdout


def test_folder_without_pictures_is_explained_in_one_line(tmp_path):
  for i, paths in enumerate((
      [], ['train/a/x', 'train/b/x'], ['train/a/x', 'test/a/x'],
      ['train/a/.x', 'train/b/.x', 'test/a/x'],
      ['train/a/x', 'train/b/x', 'test/a/x'])):
    folder = tmp_path / str(i)
    folder.mkdir()
    for path in paths:
      (folder / path).parent.mkdir(parents=True)
      (folder / path).write_text('no picture')
    with pytest.raises(UserError) as error:
      cifar10_input.own_pictures(str(folder), str(tmp_path / 'data'))
    assert '--dataset=%s ' % folder in str(error.value)
    assert '\n' not in str(error.value)


# Downloads. Members of archives are named as the files that come of them.


ARCHIVE = 'small.tar.gz'
SMALL = dataclasses.replace(
    TINY, train_files={'first.bin': 20, 'second.bin': 10},
    eval_files={'test.bin': 5}, make=CIFAR10.make)
FILES = {
    '%s/%s' % (SMALL.folder, name): np.random.default_rng(0).integers(
        0, 10, SMALL.size_bytes(name), np.uint8).tobytes()
    for name in SMALL.files}
SECOND = SMALL.folder + '/second.bin'


def _member(name, content=b'', **attributes):
  member = tarfile.TarInfo(name)
  member.size = len(content)
  for attribute in attributes.items():
    setattr(member, *attribute)
  return member, io.BytesIO(content)


def _archive(*members):
  archive = io.BytesIO()
  with tarfile.open(fileobj=archive, mode='w:gz') as tar:
    for member, content in members:
      tar.addfile(member, content if member.isfile() else None)
  return archive.getvalue()


WHOLE = _archive(*map(_member, FILES, FILES.values()),
                 _member(SMALL.folder + '/batches.meta.txt', b'airplane\n'))


def _sha256(content):
  return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server():
  """A server of one archive: its `url`, `content`, and what was asked of it.

  It breaks off after `sends` bytes if that is set, or then says nothing more
  until `patience` is set.
  """
  state = types.SimpleNamespace(
      content=WHOLE, sends=None, status=200, requests=[], patience=None)

  class Handler(http.server.BaseHTTPRequestHandler):

    def do_GET(self):
      state.requests.append(self.path)
      self.send_response(302 if self.path == '/moved' else state.status)
      self.send_header('Location', '/' + ARCHIVE)
      self.send_header('Content-Length', str(len(state.content)))
      self.end_headers()
      self.wfile.write(state.content[:state.sends])
      if state.patience:
        state.patience.wait()

    def log_message(self, *unused):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
    thread = threading.Thread(target=httpd.serve_forever, args=[0.05])
    thread.start()
    state.url = 'http://127.0.0.1:%d/%s' % (httpd.server_port, ARCHIVE)
    yield state
    httpd.shutdown()
    thread.join()


def _published(server, sha256=None):
  """Returns the data set in the archive that the server has now."""
  return dataclasses.replace(
      SMALL, downloads={server.url: sha256 or _sha256(server.content)})


def _get(dataset, data_dir, **arguments):
  return cifar10_input.maybe_download_and_extract(
      dataset, str(data_dir), **arguments)


def _fail(dataset, data_dir, **arguments):
  """Returns the complaint, a single line."""
  with pytest.raises(UserError) as error:
    _get(dataset, data_dir, **arguments)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_archive_is_downloaded_and_extracted_once(
    server, tmp_path, monkeypatch, capfd):
  monkeypatch.setenv('HOME', str(tmp_path))
  folder = _get(_published(server), '~/of/mine')
  assert folder == str(tmp_path / 'of' / 'mine' / SMALL.folder)
  assert contents(tmp_path / 'of' / 'mine') == {ARCHIVE: WHOLE, **FILES}
  stdout, stderr = capfd.readouterr()
  assert 'Downloading %s' % server.url in stdout
  assert stderr == ''
  _get(_published(server), tmp_path / 'of' / 'mine')
  assert server.requests == ['/' + ARCHIVE]


def test_what_is_missing_is_added_from_the_archive_and_no_file_replaced(
    server, tmp_path):
  folder = tmp_path / SMALL.folder
  _get(_published(server), tmp_path)
  (folder / 'first.bin').write_bytes(b'mine')
  (folder / 'second.bin').unlink()
  (tmp_path / (SMALL.folder + '.partial')).mkdir()
  (tmp_path / (SMALL.folder + '.partial') / 'second.bin').write_bytes(b'half')
  _get(_published(server), tmp_path)
  assert len(server.requests) == 1
  assert contents(tmp_path) == {
      ARCHIVE: WHOLE, **FILES, SMALL.folder + '/first.bin': b'mine'}


def test_mirror_is_held_to_the_published_checksum(server, tmp_path):
  dataset = dataclasses.replace(SMALL, downloads={
      'http://example.invalid/' + ARCHIVE: _sha256(WHOLE)})
  moved = server.url.replace(ARCHIVE, 'moved')
  _get(dataset, tmp_path / 'one', url=moved)
  assert server.requests == ['/moved', '/' + ARCHIVE]
  (tmp_path / 'file.tgz').write_bytes(WHOLE)
  _get(dataset, tmp_path / 'two', url=(tmp_path / 'file.tgz').as_uri())
  for name in ('one', 'two'):
    assert contents(tmp_path / name) == {ARCHIVE: WHOLE, **FILES}
  server.content += b'more'
  message = _fail(dataset, tmp_path / 'three', url=server.url)
  assert server.url in message and _sha256(WHOLE) in message
  assert contents(tmp_path / 'three') == {}
  _get(dataset, tmp_path / 'three', url=server.url,
       sha256=_sha256(server.content).upper())
  assert contents(tmp_path / 'three') == {ARCHIVE: WHOLE + b'more', **FILES}


def test_archive_put_in_place_by_hand_is_used_and_kept_even_if_wrong(
    server, tmp_path):
  for content, result in ((WHOLE, FILES), (b'mine', {})):
    data_dir = tmp_path / ('%d bytes' % len(content))
    data_dir.mkdir()
    (data_dir / ARCHIVE).write_bytes(content)
    if result:
      _get(_published(server), data_dir)
    else:
      message = _fail(_published(server), data_dir)
      for part in ((data_dir / ARCHIVE).as_uri(), _sha256(WHOLE),
                   '--data_sha256'):
        assert part in message
    assert contents(data_dir) == {ARCHIVE: content, **result}
  assert server.requests == []


@pytest.mark.parametrize('share', [0, 0.5, 0.999])
def test_download_that_breaks_off_leaves_nothing_and_can_be_retried(
    server, tmp_path, share):
  server.sends = int(share * len(WHOLE))
  assert server.url in _fail(_published(server), tmp_path)
  assert contents(tmp_path) == {}
  server.sends = None
  _get(_published(server), tmp_path)
  assert contents(tmp_path) == {ARCHIVE: WHOLE, **FILES}


@pytest.mark.parametrize('status, content, complaint', [
    (404, b'', '404'), (500, b'', '500'), (200, WHOLE[:-1] + b'?', 'sha256'),
    (200, b'<html>Please log in.</html>', 'sha256')])
def test_wrong_answer_of_the_server_is_reported_and_leaves_nothing(
    server, tmp_path, status, content, complaint):
  dataset = _published(server)
  server.status, server.content = status, content
  message = _fail(dataset, tmp_path)
  assert server.url in message and complaint in message
  assert contents(tmp_path) == {}


@pytest.mark.parametrize('sends', [0, 1000])
def test_server_that_falls_silent_is_given_up(
    server, tmp_path, monkeypatch, sends):
  monkeypatch.setattr(cifar10_input, '_DOWNLOAD_TIMEOUT_SECS', 0.5)
  before = socket.getdefaulttimeout()
  server.sends, server.patience = sends, threading.Event()
  try:
    message = _fail(_published(server), tmp_path)
  finally:
    server.patience.set()
  assert 'timed out' in message and server.url in message
  assert contents(tmp_path) == {}
  assert socket.getdefaulttimeout() == before


def test_signal_ends_a_download_and_leaves_nothing(
    server, tmp_path, monkeypatch, call_script):
  server.sends, server.patience = 1000, threading.Event()
  monkeypatch.setitem(
      cifar10_input.DATASETS, 'cifar10', _published(server))

  def interrupt():
    while not server.requests:
      time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    server.patience.set()

  threading.Thread(target=interrupt).start()
  run = call_script(
      cifar10_train, '--data_dir=%s' % (tmp_path / 'data'),
      '--train_dir=%s' % (tmp_path / 'run'))
  assert run.code == 143
  assert run.stderr == 'script.py: stopped by SIGTERM.\n'
  assert contents(tmp_path) == {}


@pytest.mark.parametrize('url', [
    'http://127.0.0.1:1/' + ARCHIVE, 'http://127.0.0.1:1/\u00e4.tar.gz',
    'http://[/small.tar.gz'])
def test_unreachable_host_is_one_line_that_says_what_to_do(
    server, tmp_path, monkeypatch, call_script, url):
  monkeypatch.setitem(cifar10_input.DATASETS, 'cifar10', _published(server))
  run = call_script(
      cifar10_train, '--data_dir=%s' % tmp_path, '--data_url=' + url,
      '--train_dir=%s' % (tmp_path / 'run'))
  assert is_one_line(run, url, '--data_url', '--dataset=synthetic',
                     tmp_path / ARCHIVE)
  assert contents(tmp_path) == {}


@pytest.mark.parametrize('spoilt', [
    WHOLE[:len(WHOLE) // 2], WHOLE[:20], b'', b'<html>Please log in.</html>',
    WHOLE[:50000] + bytes(200) + WHOLE[50200:],
    gzip.compress(b'no archive' * 1000),
], ids=['half', 'head', 'empty', 'page', 'hole', 'no tar'])
def test_archive_that_cannot_be_extracted_is_reported(
    server, tmp_path, spoilt):
  server.content = spoilt
  assert str(tmp_path / ARCHIVE) in _fail(_published(server), tmp_path)
  assert contents(tmp_path) == {ARCHIVE: spoilt}


@pytest.mark.parametrize('second', [
    _member('other'), _member(SECOND), _member(SECOND, FILES[SECOND][1:]),
    _member(SECOND, FILES[SECOND] + b'x'),
    _member(SECOND, type=tarfile.DIRTYPE),
    _member(SECOND, type=tarfile.SYMTYPE, size=SMALL.size_bytes('second.bin'),
            linkname='first.bin'),
], ids=['missing', 'empty', 'short', 'long', 'a folder', 'a link'])
def test_archive_without_a_file_of_the_right_size_is_reported(
    server, tmp_path, second):
  server.content = _archive(second, *(
      _member(name, content) for name, content in FILES.items()
      if name != SECOND))
  message = _fail(_published(server), tmp_path)
  assert 'second.bin of 30730 bytes' in message
  assert contents(tmp_path) == {ARCHIVE: server.content}


def test_hostile_members_write_nothing_but_the_files(server, tmp_path):
  outside = tmp_path / 'outside'
  outside.mkdir()
  (outside / 'secret').write_text('secret')
  way = {'type': tarfile.SYMTYPE, 'linkname': str(outside)}
  server.content = _archive(
      _member('../evil', b'x'), _member(SECOND + '/../../../evil', b'x'),
      _member(str(outside / 'evil'), b'x'), _member('evil', b'x'),
      _member('way', **way), _member('way/evil', b'x'),
      _member(SMALL.folder, **way), _member(SMALL.folder + '/evil', b'x'),
      _member(SECOND, type=tarfile.SYMTYPE, linkname=str(outside / 'evil')),
      _member(SECOND, type=tarfile.LNKTYPE, linkname=str(outside / 'secret')),
      _member(SECOND, type=tarfile.FIFOTYPE), *map(
          _member, FILES, FILES.values()))
  _get(_published(server), tmp_path / 'data')
  assert contents(tmp_path / 'data') == {ARCHIVE: server.content, **FILES}
  assert contents(outside) == {'secret': b'secret'}
  assert sorted(os.listdir(tmp_path)) == ['data', 'outside']


# The data directory, which one process at a time writes to.


def test_of_two_first_starts_one_gets_the_data_and_the_other_waits(
    tmp_path, tiny_dir, monkeypatch):
  said = []
  monkeypatch.setattr(cifar10_input, 'say', said.append)
  other = threading.Thread(target=_get, args=[TINY, tmp_path])
  with cifar10_input.locked(str(tmp_path), 'data_dir'):
    other.start()
    while not said and other.is_alive():
      time.sleep(0.01)
    shutil.copytree(tiny_dir / TINY.folder, tmp_path / TINY.folder)
  other.join()
  assert said == ['Waiting: process %d uses --data_dir=%s.'
                  % (os.getpid(), tmp_path)]


def test_folder_in_use_is_refused_with_the_process_that_uses_it(tmp_path):
  for _ in range(2):
    with cifar10_input.locked(str(tmp_path), 'train_dir'):
      with pytest.raises(UserError, match='process %d uses --train_dir=%s: end'
                         % (os.getpid(), tmp_path)):
        with cifar10_input.locked(str(tmp_path), 'train_dir'):
          pass


@pytest.mark.parametrize('code', [
    errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_system_without_locks_costs_a_line(
    tmp_path, tiny_dir, monkeypatch, capfd, code):
  def refuse(*unused):
    raise OSError(code, os.strerror(code))
  monkeypatch.setattr(cifar10_input.fcntl, 'flock', refuse)
  _get(TINY, tmp_path)
  assert contents(tmp_path) == contents(tiny_dir)
  line = capfd.readouterr().out.splitlines()[0]
  assert line.startswith('--data_dir=%s cannot be locked (%s)' % (
      tmp_path, os.strerror(code)))


def test_system_without_locks_does_without(tmp_path, tiny_dir, monkeypatch):
  monkeypatch.setattr(cifar10_input, 'fcntl', None)
  _get(TINY, tmp_path)
  assert contents(tmp_path) == contents(tiny_dir)


def test_data_directory_that_cannot_be_used_is_named(tmp_path):
  (tmp_path / 'file').write_text('mine')
  assert '--data_dir=%s' % (tmp_path / 'file') in _fail(TINY, tmp_path / 'file')
  assert contents(tmp_path) == {'file': b'mine'}


@pytest.mark.parametrize('url', ['ram://data', 'gs://data', 'file:///data'])
def test_data_directory_that_is_a_url_is_one_line(
    tmp_path, monkeypatch, call_script, url):
  monkeypatch.chdir(tmp_path)
  run = call_script(
      cifar10_train, '--dataset=synthetic', '--data_dir=' + url,
      '--train_dir=%s' % (tmp_path / 'run'))
  assert is_one_line(run, '--data_dir=' + url, 'is a URL')
  assert os.listdir(tmp_path) == ['run'] and contents(tmp_path) == {}


# Anything.


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
  dataset = dataclasses.replace(TINY, train_files={'a.bin': None})
  is_right = content and len(content) % 3073 == 0 and max(content[::3073]) < 10
  message = fuzz.refusal(
      cifar10_input.check_files, dataset, str(folder), ['a.bin'])
  assert bool(message) != bool(is_right)


@pytest.mark.parametrize('kind, count', [
    ('records', 200), ('archives', 200), ('checkpoints', 40), ('flags', 150)])
def test_nothing_that_is_wrong_is_taken(kind, count):
  refused = fuzz.fuzz(kind, seed=2, count=count)
  assert count / 4 < refused <= count
