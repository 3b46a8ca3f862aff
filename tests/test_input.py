"""cifar10_input: data come whole, and reach the network distorted as said.

The arithmetic of distortions is held against TensorFlow's own image operations,
one image at a time; the queues against pictures that tell the number of their
record. Archives come from a server on this machine.
"""
import dataclasses
import errno
import functools
import gzip
import hashlib
import http.server
import io
import os
import re
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
    TINY, TWO_LABELS, contents, is_one_line, newest_step, read_codes,
    run_queues, write_coded, write_random)
import cifar10_eval
import cifar10_input
import cifar10_train
import fuzz
import pictures
from cifar10_input import CIFAR10, IMAGE_SIZE, SVHN, SYNTHETIC, UserError, tf


# Distorting pictures.


def _pictures(kind, count):
  """Returns uint8 [count, 32, 32, 3]."""
  noise = np.random.default_rng(1).integers(0, 256, (count, 32, 32, 3))
  middle = np.arange(32 * 32).reshape(1, 32, 32, 1) == 16 * 33
  return {
      'random': noise,
      'dim': 100 + noise // 64,
      'one bright pixel': np.where(middle, 255, 0 * noise),
      'tinted': noise // 4 + [0, 90, 190],
      'one colour': np.broadcast_to(noise[:, :1, :1, :], noise.shape),
      'one grey': np.broadcast_to(noise[:, :1, :1, :1], noise.shape),
      'black': 0 * noise,
  }[kind].astype(np.uint8)


def _distort_one_by_one(pictures, distortions):
  """Distorts with the operations that TensorFlow has for single images."""
  pictures = np.pad(pictures, [(0, 0), (2, 2), (2, 2), (0, 0)], 'edge')
  picture, top, left, flip, brightness, contrast = inputs = [
      tf.placeholder(tf.as_dtype(values.dtype), values.shape[1:])
      for values in (pictures,) + tuple(distortions)]
  image = tf.cast(picture[top + 2:top + 2 + IMAGE_SIZE,
                          left + 2:left + 2 + IMAGE_SIZE], tf.float32)
  image = tf.cond(flip, lambda: tf.image.flip_left_right(image), lambda: image)
  image = tf.image.adjust_brightness(image, brightness)
  image = tf.image.adjust_contrast(image, contrast)
  image = tf.image.per_image_standardization(image)
  with tf.Session() as session:
    return np.stack([session.run(image, dict(zip(inputs, values)))
                     for values in zip(pictures, *distortions)])


# On faint pictures, TensorFlow's own 32-bit arithmetic is not better than that.
@pytest.mark.parametrize('kind, tolerance', [
    ('random', 1e-5), ('one bright pixel', 1e-5), ('tinted', 1e-5),
    ('dim', 2e-4), ('one colour', 1e-4), ('one grey', 1e-2), ('black', 1e-2)])
def test_distortions_equal_those_of_tf_image(kind, tolerance):
  random = np.random.default_rng(2)
  # All there are, and those that reach up to two pixels beyond an edge.
  top, left, flip = np.indices([13, 13, 2]).reshape(3, -1)
  top, left = top - 2, left - 2
  brightness = random.uniform(-63, 63, len(top))
  contrast = random.uniform(0.2, 1.8, len(top))
  brightness[:4], contrast[:4] = [-63, -63, 63, 63], [0.2, 1.8, 0.2, 1.8]
  distortions = cifar10_input.Distortions(
      top.astype(np.int32), left.astype(np.int32), flip.astype(bool),
      brightness.astype(np.float32), contrast.astype(np.float32))
  pictures = _pictures(kind, len(top))
  expected = _distort_one_by_one(pictures, distortions)
  with tf.Session() as session:
    result = session.run(cifar10_input.distort(
        tf.constant(pictures.transpose(0, 3, 1, 2)),
        cifar10_input.Distortions(*map(tf.constant, distortions))))
  assert result.shape == (len(pictures), IMAGE_SIZE, IMAGE_SIZE, 3)
  assert result.dtype == np.float32
  size = np.maximum(1, abs(expected).max(axis=(1, 2, 3), keepdims=True))
  assert (abs(result - expected) <= tolerance * size).all()


@pytest.mark.parametrize('size, middle, far', [
    (24, 4, (2, 6)), (28, 2, (0, 4)), (32, 0, (0, 0))])
def test_ten_views_are_crops_around_the_centre_and_their_mirror_images(
    size, middle, far):
  picture = _pictures('random', 1)[0].astype(np.float32)
  planes = tf.constant(picture.transpose(2, 0, 1)[np.newaxis])
  with tf.Session() as session:
    views, central = session.run([
        cifar10_input.crop_views(planes, cifar10_input.TEN_VIEWS, size),
        cifar10_input.crop_views(planes, image_size=size)])
  corners = [(middle, middle)] + [(y, x) for y in far for x in far]
  crops = [picture[y:y + size, x:x + size] for y, x in corners]
  crops += [crop[:, ::-1] for crop in crops]
  expected = [(crop - crop.mean()) / crop.std() for crop in crops]
  np.testing.assert_allclose(views, expected, atol=1e-4)
  np.testing.assert_allclose(central, expected[:1], atol=1e-4)


@pytest.mark.parametrize('size, margin, places', [
    (24, 0, 9), (30, 0, 3), (32, 0, 1), (32, 4, 9), (28, 2, 9)])
def test_distortions_are_drawn_evenly_and_do_not_depend_on_each_other(
    size, margin, places):
  with tf.Session() as session:
    draws = session.run(cifar10_input.draw_distortions(20000, size, margin))
  corner = -margin, places - margin, places
  for name, low, high, shares in (
      ('top', *corner), ('left', *corner), ('flip', 0, 2, 2),
      ('brightness', -63, 63, 10), ('contrast', 0.2, 1.8, 10)):
    values = getattr(draws, name).astype(float)
    assert values.min() >= low and values.max() <= high
    counts, _ = np.histogram(values, shares, (low, high))
    deviation = np.sqrt((1 - 1 / shares) / shares / 20000)
    np.testing.assert_allclose(counts / 20000, 1 / shares, atol=5 * deviation)
  varied = [values.astype(float) for values in draws if values.any()]
  np.testing.assert_allclose(
      np.corrcoef(varied), np.eye(len(varied)), atol=5 / np.sqrt(20000))


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


def _shuffle_queue():
  queue, = (op for op in tf.get_default_graph().get_operations()
            if op.type.startswith('RandomShuffleQueue'))
  return queue


def test_training_batches_are_drawn_from_two_fifths_of_an_epoch(
    tmp_path, capsys):
  images, labels = cifar10_input.distorted_inputs(
      data_dir=write_coded(TINY, tmp_path), batch_size=25, dataset=TINY)
  assert capsys.readouterr().out.startswith(
      'Filling queue with 100 synthetic images before starting to train.')
  queue = _shuffle_queue()
  assert queue.get_attr('min_after_dequeue') == 100
  assert 125 <= queue.get_attr('capacity') <= 500
  assert queue.get_attr('component_types') == [tf.string]  # A record.
  assert images.shape.as_list() == [25, IMAGE_SIZE, IMAGE_SIZE, 3]
  assert labels.shape.as_list() == [25] and labels.dtype == tf.int32
  numbers = []
  with run_queues() as session:
    for _ in range(60):
      image_values, label_values = session.run([images, labels])
      batch = read_codes(image_values)
      np.testing.assert_array_equal(label_values, batch % 10)
      assert (np.diff(batch) == 1).sum() < 5 and np.ptp(batch) > 50
      numbers.extend(batch)
  counts = np.bincount(numbers, minlength=250)
  assert len(counts) == 250 and counts.min() >= 1 and counts.max() <= 20


def test_every_image_of_every_batch_has_its_own_distortions(tmp_path):
  picture = np.random.default_rng(0).integers(0, 256, 3072)
  for name, size in TINY.files.items():
    np.tile(np.r_[0, picture], size).astype(np.uint8).tofile(tmp_path / name)
  images, _ = cifar10_input.distorted_inputs(str(tmp_path), 40, TINY)
  with run_queues() as session:
    values = np.concatenate([session.run(images) for _ in range(2)])
  assert len(np.unique(values.round(3), axis=0)) > 70


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
  with run_queues() as session:
    while len(numbers) < 2 * size + 30:
      image_values, label_values = session.run([images, labels])
      numbers.extend(read_codes(image_values))
      read_labels.extend(label_values)
  expected = np.arange(len(numbers)) % size
  np.testing.assert_array_equal(numbers, expected)
  np.testing.assert_array_equal(read_labels, expected % 10)


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
  with run_queues() as session:
    # The record after the 123 to train on, whose label is 3, and so on.
    assert session.run(eval_labels).tolist() == [3, 4, 5, 6, 7, 8, 9, 3]
    for batch in (images, eval_images):
      assert session.run(batch).shape == (8, 32, 32, 3)
  monkeypatch.setattr(cifar10_input, 'NUM_CLASSES', 9)
  with pytest.raises(UserError, match='test_batch.* label 9 in record 6'):
    cifar10_input.inputs(True, folder, 8)
  for size in (0, 3073 * 2 + 5):
    os.truncate(tmp_path / 'data_batch_1.bin', size)
    with pytest.raises(
        UserError, match='data_batch_1.* has %d bytes' % size) as error:
      cifar10_input.distorted_inputs(folder, 8)
    assert 'delete' not in str(error.value)  # It is the reader's own.


def test_file_with_a_flaw_is_refused_before_it_is_read(tmp_path):
  folder = write_coded(TWO_LABELS, tmp_path)
  path = os.path.join(folder, 'second.bin')
  record = np.memmap(path, np.uint8).reshape(-1, 3074)[41]
  record[:2] = [255, 99]  # The second byte is the label, and may be up to 99.
  cifar10_input.distorted_inputs(folder, 8, TWO_LABELS)
  for spoil, complaint in (
      (lambda: record.put(1, 100), 'has the label 100 in record 41'),
      (lambda: os.truncate(path, 0), 'has 0 bytes, not 307400'),
      (lambda: os.truncate(path, 307300), 'has 307300 bytes, not 307400'),
      (lambda: os.truncate(path, 310474), 'has 310474 bytes, not 307400'),
      (lambda: os.remove(path), 'is missing')):
    spoil()
    for build in (cifar10_input.distorted_inputs,
                  functools.partial(cifar10_input.inputs, False)):
      with pytest.raises(UserError, match=r'^%s %s.*\Z' % (path, complaint)):
        build(folder, 8, TWO_LABELS)
  cifar10_input.inputs(True, folder, 8, TWO_LABELS)


# Data sets.


def test_cifar10_is_described_as_published():
  assert CIFAR10.folder == 'cifar-10-batches-bin'
  assert list(CIFAR10.train_files) == [
      'data_batch_%d.bin' % i for i in (1, 2, 3, 4, 5)]
  assert list(CIFAR10.eval_files) == ['test_batch.bin']
  assert {CIFAR10.size_bytes(name) for name in CIFAR10.files} == {30730000}
  assert CIFAR10.classes == (
      'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse',
      'ship', 'truck')


def test_holdout_keeps_one_training_file_to_evaluate_on_and_no_test_picture():
  holdout = cifar10_input.DATASETS['cifar10_holdout']
  assert list(holdout.train_files) + list(holdout.eval_files) == list(
      CIFAR10.train_files)
  assert list(holdout.eval_files) == ['data_batch_5.bin']
  assert holdout.num_train_examples == 40000
  assert (holdout.folder, holdout.downloads, holdout.classes) == (
      CIFAR10.folder, CIFAR10.downloads, CIFAR10.classes)


def test_cifar100_has_two_labels_and_takes_the_right_one():
  record = bytes([7, 42]) + bytes(3072)
  for dataset, label, num_classes in (
      (cifar10_input.CIFAR100, 42, 100),
      (cifar10_input.CIFAR100_COARSE, 7, 20)):
    with tf.Session() as session:
      planes, labels = session.run(
          cifar10_input.parse_records([record], dataset))
    assert labels.tolist() == [label] and not planes.any()
    assert len(set(dataset.classes)) == len(dataset.classes) == num_classes


def test_generated_data_have_exact_sizes_all_classes_and_no_picture_twice(
    synthetic_dir):
  files = contents(synthetic_dir / SYNTHETIC.folder)
  assert {name: len(content) for name, content in files.items()} == {
      'data_batch_1.bin': 15365000, 'data_batch_2.bin': 15365000,
      'test_batch.bin': 6146000}
  for content in files.values():
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    shares = np.bincount(records[:, 0], minlength=10) / len(records)
    assert shares.shape == (10,)
    assert shares.min() > 0.08 and shares.max() < 0.12
    assert (records[:, 1:].std(axis=1) > 5).all()
    assert len(np.unique(records[:, 1:65], axis=0)) > 0.99 * len(records)


def test_fit_leaves_what_has_the_right_size_and_else_is_an_antialiased_resize():
  pictures = _pictures('random', 6)
  wide = pictures.reshape(1, 64, 96, 3)
  with tf.Session() as session:
    same, fitted, resized = session.run([
        cifar10_input.fit(tf.constant(pictures)),
        cifar10_input.fit(tf.constant(wide)),
        tf.compat.v2.image.resize(wide, [32, 48], antialias=True)])
  np.testing.assert_array_equal(same, pictures.transpose(0, 3, 1, 2))
  np.testing.assert_allclose(
      fitted, np.rint(resized[:, :, 8:40].transpose(0, 3, 1, 2)), atol=1)


def test_svhn_is_had_from_a_mirror_and_converted_from_matlab(
    tmp_path, monkeypatch):
  scipy_io = pytest.importorskip('scipy.io')
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (32, 32, 3, 20), np.uint8)
  labels = random.integers(1, 11, (20, 1)).astype(np.uint8)
  mirror, data_dir = tmp_path / 'mirror', tmp_path / 'data'
  mirror.mkdir()
  for name in ('train_32x32.mat', 'test_32x32.mat'):
    scipy_io.savemat(mirror / name, {'X': images, 'y': labels})
  svhn = dataclasses.replace(
      SVHN, train_files={'train_32x32.bin': 20},
      eval_files={'test_32x32.bin': 20}, downloads={
          url: _sha256((mirror / os.path.basename(url)).read_bytes())
          for url in SVHN.downloads})
  url = mirror.as_uri()
  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, 'scipy', None)
    assert 'pip install scipy' in _fail(svhn, data_dir, url=url)
  assert contents(data_dir) == {}
  folder = _get(svhn, data_dir, url=url)
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
  (tmp_path / 'mine' / 'model.bin').write_text('no records')
  return tmp_path / 'mine'


def test_own_pictures_are_converted_once_trained_on_and_evaluated(
    pictures_dir, tmp_path, call_script):
  data_dir = train_dir = tmp_path / 'run'  # Each use has a lock of its own.
  run = call_script(
      cifar10_train, '--dataset=%s' % pictures_dir, '--data_dir=%s' % data_dir,
      '--train_dir=%s' % train_dir, '--batch_size=4', '--max_steps=2')
  assert (run.code, run.stderr) == (0, '')
  assert 'Skipped %s' % (pictures_dir / 'train/dark/broken.png') in run.stdout
  path, = data_dir.glob('mine-*/train.bin')
  records = np.fromfile(path, np.uint8).reshape(-1, 3073)
  assert records[:, 0].tolist() == [0] * 12 + [1] * 12
  assert records[:12, 1:].max() < 90 < 150 < records[12:, 1:].min()
  run = call_script(
      cifar10_eval, '--checkpoint_dir=%s' % train_dir, '--run_once',
      '--eval_dir=%s' % (tmp_path / 'eval'))
  assert '/10 correct at step 2\n' in run.stdout
  assert '  light ' in run.stdout and 'Converting' not in run.stdout
  (pictures_dir / 'test' / 'dark' / '0.picture').write_text('changed')
  dataset = cifar10_input.own_dataset(str(pictures_dir), str(data_dir))
  assert dataset.files == {'train.bin': 24, 'test.bin': 9}


@pytest.fixture
def pictures_run(pictures_dir, tmp_path, call_script):
  """Flags of a run of two steps on those pictures."""
  flags = ['--data_dir=%s' % (tmp_path / 'data'), '--batch_size=4',
           '--train_dir=%s' % (tmp_path / 'run')]
  assert call_script(cifar10_train, '--dataset=%s' % pictures_dir,
                     '--max_steps=2', *flags).code == 0
  return flags


def test_checkpoints_alone_predict_and_export_what_they_were_trained_on(
    pictures_dir, pictures_run, tmp_path, call_script):
  moved = pictures_dir.rename(tmp_path / 'moved')
  flags = ['--checkpoint_dir=%s' % (tmp_path / 'run'),
           '--data_dir=%s' % (tmp_path / 'none')]
  run = call_script(cifar10_eval, *flags, '--predict=%s' % (
      moved / 'test' / 'light' / '0.picture'))
  assert (run.code, run.stderr) == (0, '')
  assert re.search(r' light [01]\.', run.stdout)
  assert re.search(r' dark [01]\.', run.stdout)
  assert call_script(cifar10_eval, *flags, '--export_dir=%s' % (
      tmp_path / 'model')).code == 0
  assert not (tmp_path / 'none').exists()


def test_moved_pictures_are_evaluated_and_trained_on_where_they_are(
    pictures_dir, pictures_run, tmp_path, call_script):
  moved = pictures_dir.rename(tmp_path / 'moved')
  evaluate = [cifar10_eval, '--checkpoint_dir=%s' % (tmp_path / 'run'),
              '--eval_dir=%s' % (tmp_path / 'eval'), '--run_once']
  assert is_one_line(call_script(*evaluate), pictures_dir, 'give --dataset')
  run = call_script(*evaluate, '--dataset=%s' % moved)
  assert '/10 correct at step 2\n' in run.stdout
  run = call_script(cifar10_train, '--dataset=%s' % moved, '--max_steps=3',
                    *pictures_run)
  assert run.code == 0 and newest_step(tmp_path / 'run') == 3


def test_renamed_class_is_refused_in_training_and_evaluation(
    pictures_dir, pictures_run, tmp_path, call_script):
  for part in ('train', 'test'):
    (pictures_dir / part / 'dark').rename(pictures_dir / part / 'night')
  for run in (
      call_script(cifar10_train, '--dataset=%s' % pictures_dir,
                  '--max_steps=3', *pictures_run),
      call_script(cifar10_eval, '--checkpoint_dir=%s' % (tmp_path / 'run'),
                  '--eval_dir=%s' % (tmp_path / 'eval'), '--run_once')):
    assert is_one_line(run, 'classes dark, light', 'light, night')


def test_pictures_of_all_kinds_are_what_they_look_like_or_refused(tmp_path):
  shown = pictures.make(tmp_path)
  assert len(shown) > 55
  for name, pixels in shown.items():
    if pixels is not None:
      read = np.moveaxis(cifar10_input.read_picture(tmp_path / name), 0, 2)
      lossy = name.endswith(('.jpg', '.avif')) or name.startswith('lossy')
      assert abs(read.astype(int) - pixels).max() <= 20 * lossy, name
    elif name != 'secret.png' or os.geteuid():  # Root may read everything.
      with pytest.raises(Exception, match=pictures.FAULTS[name]):
        cifar10_input.read_picture(tmp_path / name)


def test_skipped_files_are_told_with_their_true_fault(
    pictures_dir, tmp_path, capfd):
  folder = pictures_dir / 'train' / 'dark'
  whole = (folder / '1.picture').read_bytes()
  (folder / 'cut.jpg').write_bytes(whole[:len(whole) // 2])
  os.mkfifo(folder / 'pipe')
  (folder / 'gone').symlink_to(tmp_path / 'nothing')
  (folder / '.hidden').write_text('')
  (folder / '.thumbnails').mkdir()
  (folder / '.thumbnails' / 'small.picture').write_bytes(whole)
  (folder / 'loop').symlink_to(pictures_dir)
  (pictures_dir / 'train' / '.git').mkdir()
  dataset = cifar10_input.own_dataset(str(pictures_dir), str(tmp_path / 'd'))
  assert dataset.classes == ('dark', 'light')
  output = capfd.readouterr().out
  for name, fault in (('broken.png', 'cannot identify'), ('pipe', 'not a file'),
                      ('cut.jpg', 'truncated'), ('gone', 'no such file')):
    line, = re.findall(r'Skipped \S+/dark/%s: .*' % name, output)
    assert fault in line
  assert 'hidden' not in output and 'small' not in output


def test_classes_of_any_name_are_told_on_an_ascii_console(
    pictures_dir, tmp_path, call_script, monkeypatch):
  for part in ('train', 'test'):
    folder = pictures_dir / part
    (folder / 'dark').rename(folder / 'd\udcffrk\nest')
    (folder / 'light').rename(folder / 'h\xe4us')
  monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(
      open(1, 'wb', closefd=False), encoding='ascii'))
  flags = '--batch_size=4', '--data_dir=%s' % (tmp_path / 'data')
  run = call_script(cifar10_train, '--dataset=%s' % pictures_dir, *flags,
                    '--max_steps=1', '--train_dir=%s' % (tmp_path / 'run'))
  assert (run.code, run.stderr) == (0, '')
  run = call_script(
      cifar10_eval, '--checkpoint_dir=%s' % (tmp_path / 'run'), *flags,
      '--eval_dir=%s' % (tmp_path / 'eval'))
  assert (run.code, run.stderr) == (0, '')
  assert re.search(r'^  d\\xffrk est +\d', run.stdout, re.MULTILINE)
  assert re.search(r'^  h\\xe4us +\d', run.stdout, re.MULTILINE)


@pytest.mark.parametrize('spoil, complaint', [
    (lambda d: (d / 'test' / 'third').mkdir(), 'no files in train/third'),
    (lambda d: (d / 'train' / 'third').mkdir(), 'no files in train/third'),
    (lambda d: [(d / 'train' / ('c%d' % i)).mkdir() for i in range(255)],
     '257 classes')])
def test_folders_that_would_train_something_else_are_refused(
    pictures_dir, tmp_path, spoil, complaint):
  spoil(pictures_dir)
  with pytest.raises(UserError, match=complaint):
    cifar10_input.own_dataset(str(pictures_dir), str(tmp_path / 'data'))


def test_folder_without_pictures_is_explained_in_one_line(tmp_path):
  for i, paths in enumerate((
      [], ['train/a/x', 'train/b/x'], ['train/a/x', 'test/a/x'],
      ['train/a/.x', 'train/b/.x', 'test/a/x'],
      ['train/a/x', 'train/b/x', 'test/a/x'])):
    for path in paths:
      (tmp_path / str(i) / path).parent.mkdir(parents=True)
      (tmp_path / str(i) / path).write_text('no picture')
    folder = str(tmp_path / str(i))
    with pytest.raises(UserError, match=r'^--dataset=%s .*\Z' % folder):
      cifar10_input.own_dataset(folder, str(tmp_path / 'data'))


# Own records.


@pytest.fixture
def records_dir(tmp_path):
  """A folder with a reader's own records, of three classes."""
  write_random(dataclasses.replace(
      TINY, train_files={'a.bin': 20, 'b.bin': 7}, eval_files={'test_1.bin': 9},
      classes=('one', 'two', 'three')), tmp_path / 'mine')
  (tmp_path / 'mine' / 'batches.meta.txt').write_text(
      '\ufeffone\ntwo\n\nthree\n')  # As an editor of Windows saves it.
  return tmp_path / 'mine'


def test_own_records_are_trained_on_and_evaluated_where_they_lie(
    records_dir, tmp_path, call_script):
  before = contents(records_dir)
  run = call_script(
      cifar10_train, '--dataset=%s' % records_dir, '--batch_size=4',
      '--data_dir=%s' % (tmp_path / 'data'), '--max_steps=2',
      '--train_dir=%s' % (tmp_path / 'run'))
  assert (run.code, run.stderr) == (0, '')
  assert 'Filling queue with 10 mine images' in run.stdout
  run = call_script(cifar10_eval, '--checkpoint_dir=%s' % (tmp_path / 'run'),
                    '--eval_dir=%s' % (tmp_path / 'eval'))
  assert '/9 correct at step 2\n' in run.stdout
  assert '\n  one ' in run.stdout and '\n  three ' in run.stdout
  assert contents(records_dir) == before and not (tmp_path / 'data').exists()


@pytest.mark.parametrize('name, content, complaint', [
    ('a.bin', bytes(3072), 'a.bin has 3072 bytes, not a multiple of 3073'),
    ('b.bin', b'', 'b.bin has 0 bytes'),
    ('b.bin', bytes(3073) + b'\3' + bytes(3072), 'the label 3 in record 1'),
    ('batches.meta.txt', b'one\n', 'the names of two classes'),
    ('batches.meta.txt', b'one\none\n', 'no two alike'),
    ('batches.meta.txt', None, 'batches.meta.txt'),
    ('test_1.bin', None, r'named test\*.bin')])
def test_own_records_with_a_flaw_are_refused_and_not_to_be_deleted(
    records_dir, tmp_path, name, content, complaint):
  (records_dir / name).unlink()
  if content is not None:
    (records_dir / name).write_bytes(content)
  with pytest.raises(UserError, match=complaint) as error:
    cifar10_input.own_dataset(str(records_dir), str(tmp_path))
  assert not re.search('delete|\n', str(error.value))


def test_data_dir_may_itself_be_the_folder_with_the_batches(
    train, evaluate, tiny_dir, tmp_path):
  folder = shutil.copytree(tiny_dir / TINY.folder, tmp_path / TINY.folder)
  flag = '--data_dir=%s/' % folder
  assert train('--max_steps=1', flag).code == 0
  assert '/70 correct at step 1\n' in evaluate(flag).stdout
  assert set(os.listdir(folder)) == set(TINY.files)
  os.truncate(folder / 'test.bin', 3073)
  assert evaluate(flag).stderr.endswith(
      '%s/test.bin has 3073 bytes, not 215110: delete it and start again to get '
      'it anew.\n' % folder)


# The console.


@pytest.mark.parametrize('stdout', [
    None, types.SimpleNamespace(write=len, flush=str)])
def test_line_stays_one_line_and_needs_no_console(capsys, monkeypatch, stdout):
  cifar10_input.say('a\nb\x9bc\u2028d\x85e')
  assert capsys.readouterr().out == 'a b c d e\n'
  monkeypatch.setattr(sys, 'stdout', stdout)  # Closed, and a notebook's.
  cifar10_input.say('a')


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
SOUND = dict(
    content=WHOLE, sends=None, status=200, is_silent=0, then=lambda: None)


def _sha256(content):
  return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server():
  """A server of one archive: its `url`, `content`, and what was asked of it.

  After `sends` bytes it breaks off, or says nothing more if it `is_silent`.
  """
  ended = threading.Event()
  state = types.SimpleNamespace(**SOUND, requests=[])

  class Handler(http.server.BaseHTTPRequestHandler):

    def do_GET(self):
      state.requests.append(self.path)
      self.send_response(302 if self.path == '/moved' else state.status)
      self.send_header('Location', '/' + ARCHIVE)
      self.send_header('Content-Length', str(len(state.content)))
      self.end_headers()
      self.wfile.write(state.content[:state.sends])
      state.then()
      ended.wait(state.is_silent and 60)

    def log_message(self, *unused):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
    threading.Thread(target=httpd.serve_forever, args=[0.05]).start()
    state.url = 'http://127.0.0.1:%d/%s' % (httpd.server_port, ARCHIVE)
    yield state
    ended.set()
    httpd.shutdown()


def _published(server):
  """Returns the data set in the archive that the server has now."""
  return dataclasses.replace(
      SMALL, downloads={server.url: _sha256(server.content)})


def _get(dataset, data_dir, **arguments):
  return cifar10_input.maybe_download_and_extract(
      dataset, str(data_dir), **arguments)


def _fail(dataset, data_dir, **arguments):
  """Returns the complaint, a single line."""
  with pytest.raises(UserError) as error:
    _get(dataset, data_dir, **arguments)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_archive_is_downloaded_once_and_adds_what_is_missing(
    server, tmp_path, monkeypatch, capfd):
  monkeypatch.setenv('HOME', str(tmp_path))
  data_dir = tmp_path / 'of' / 'mine'
  folder = _get(_published(server), '~/of/mine')
  assert folder == str(data_dir / SMALL.folder)
  assert contents(data_dir) == {ARCHIVE: WHOLE, **FILES}
  stdout, stderr = capfd.readouterr()
  assert 'Downloading %s' % server.url in stdout and stderr == ''
  _get(_published(server), data_dir)
  assert capfd.readouterr().out == ''
  shutil.copytree(folder, folder + '.partial/stray')
  (data_dir / SMALL.folder / 'first.bin').write_bytes(b'mine')
  (data_dir / SECOND).unlink()
  _get(_published(server), data_dir)
  assert server.requests == ['/' + ARCHIVE]
  assert contents(data_dir) == {
      ARCHIVE: WHOLE, **FILES, SMALL.folder + '/first.bin': b'mine'}


def test_mirror_is_held_to_the_published_checksum(server, tmp_path):
  dataset = dataclasses.replace(SMALL, downloads={
      'http://example.invalid/' + ARCHIVE: _sha256(WHOLE)})
  _get(dataset, tmp_path / 'one', url=server.url.replace(ARCHIVE, 'moved'))
  assert server.requests == ['/moved', '/' + ARCHIVE]
  (tmp_path / 'file.tgz').write_bytes(WHOLE)
  _get(dataset, tmp_path / 'two', url=(tmp_path / 'file.tgz').as_uri())
  for name in ('one', 'two'):
    assert contents(tmp_path / name) == {ARCHIVE: WHOLE, **FILES}
  server.content += b'more'
  message = _fail(dataset, tmp_path / 'three', url=server.url)
  assert server.url in message and _sha256(WHOLE) in message
  assert contents(tmp_path / 'three') == {}


def test_wrong_archive_in_place_is_reported_and_kept(server, tmp_path):
  (tmp_path / ARCHIVE).write_bytes(b'mine')
  message = _fail(_published(server), tmp_path)
  assert (tmp_path / ARCHIVE).as_uri() in message
  assert _sha256(WHOLE) in message and '--dataset=FOLDER' in message
  assert server.requests == []
  assert contents(tmp_path) == {ARCHIVE: b'mine'}


@pytest.mark.parametrize('faults, complaint', [
    ({'status': 404}, '404'), ({'status': 500}, '500'),
    ({'sends': 0}, ''), ({'sends': 5000}, ''), ({'sends': len(WHOLE) - 1}, ''),
    ({'sends': 0, 'is_silent': 1}, 'timed out'),
    ({'sends': 5000, 'is_silent': 1}, 'timed out'),
    ({'content': WHOLE[:-1] + b'?'}, 'sha256'),
    ({'content': b'<html>Please log in.</html>'}, 'sha256')])
def test_download_that_fails_leaves_nothing_and_can_be_retried(
    server, tmp_path, monkeypatch, faults, complaint):
  monkeypatch.setattr(cifar10_input, '_DOWNLOAD_TIMEOUT_SECS', 0.3)
  timeout = socket.getdefaulttimeout()
  dataset = _published(server)
  vars(server).update(faults)
  message = _fail(dataset, tmp_path)
  assert server.url in message and complaint in message
  assert contents(tmp_path) == {}
  assert socket.getdefaulttimeout() == timeout
  vars(server).update(SOUND)
  _get(dataset, tmp_path)
  assert contents(tmp_path) == {ARCHIVE: WHOLE, **FILES}


def test_signal_ends_a_download_and_leaves_nothing(
    server, tmp_path, monkeypatch, call_script):
  monkeypatch.setitem(cifar10_input.DATASETS, 'cifar10', _published(server))
  server.sends, server.is_silent = 5000, 1
  server.then = lambda: os.kill(os.getpid(), signal.SIGTERM)
  run = call_script(
      cifar10_train, '--data_dir=%s' % (tmp_path / 'data'),
      '--train_dir=%s' % (tmp_path / 'run'))
  assert (run.code, run.stderr) == (143, 'script.py: stopped by SIGTERM.\n')
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


def _with_second(*args, **attributes):
  others = [_member(*file) for file in FILES.items() if file[0] != SECOND]
  return _archive(_member(*args, **attributes), *others)


@pytest.mark.parametrize('archive, complaint', [
    (WHOLE[:len(WHOLE) // 2], ''), (b'', ''), (b'<html>Log in.</html>', ''),
    (WHOLE[:5000] + bytes(200) + WHOLE[5200:], ''),
    (gzip.compress(b'no archive' * 1000), ''),
    (_with_second('other'), 'second.bin of 30730 bytes'),
    (_with_second(SECOND, bytes(30731)), 'second.bin of 30730 bytes'),
    (_with_second(SECOND, type=tarfile.SYMTYPE, linkname='first.bin',
                  size=30730), 'second.bin of 30730 bytes'),
], ids=['half', 'empty', 'page', 'hole', 'no tar', 'missing', 'long', 'link'])
def test_archive_that_is_not_what_it_should_be_is_reported_and_kept(
    server, tmp_path, archive, complaint):
  server.content = archive
  message = _fail(_published(server), tmp_path)
  assert str(tmp_path / ARCHIVE) in message and complaint in message
  assert contents(tmp_path) == {ARCHIVE: archive}


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


@pytest.mark.parametrize('code', [
    None, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_it_goes_on(
    tmp_path, tiny_dir, monkeypatch, capfd, code):
  def flock(*unused):
    raise OSError(code, os.strerror(code))
  monkeypatch.setattr(
      cifar10_input, 'fcntl',
      code and types.SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
  _get(TINY, tmp_path)
  assert contents(tmp_path) == contents(tiny_dir)  # The same ones anew.
  line = '%s cannot be locked (%s)' % (tmp_path, os.strerror(code or 0))
  assert (line in capfd.readouterr().out) == bool(code)


def test_data_directory_that_cannot_be_used_is_named(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('mine')
  monkeypatch.chdir(tmp_path)
  for data_dir in ('', tmp_path / 'file', 'ram://a', 'gs://a', 'file:///a'):
    assert '--data_dir=%s ' % data_dir in _fail(TINY, data_dir)
  assert os.listdir(tmp_path) == ['file']


# Anything.


@settings(deadline=None, max_examples=100)
@given(strategies.lists(min_size=1, max_size=2, elements=strategies.tuples(
    strategies.integers(0, 12), strategies.binary(min_size=3072, max_size=3072),
)), strategies.integers(-1, 1))
def test_whole_records_with_known_labels_are_taken_as_they_are_and_no_others(
    tmp_path_factory, records, more):
  values = [bytes([label]) + pixels for label, pixels in records]
  path = tmp_path_factory.mktemp('any') / 'first.bin'
  path.write_bytes((b''.join(values) + b'x')[:len(values) * 3073 + more])
  message = fuzz.refusal(
      cifar10_input.check_files,
      dataclasses.replace(TINY, train_files={'first.bin': None}),
      str(path.parent), ['first.bin'])
  labels = [label for label, _ in records]
  assert bool(message) == (more != 0 or max(labels) > 9)
  with tf.Graph().as_default(), tf.Session() as session:
    planes, read = session.run(cifar10_input.parse_records(values, TINY))
  assert planes.dtype == np.uint8 and read.tolist() == labels
  assert planes.tobytes() == b''.join(pixels for _, pixels in records)


@pytest.mark.parametrize('kind, count', [
    ('records', 200), ('archives', 200), ('checkpoints', 40), ('flags', 150)])
def test_nothing_that_is_wrong_is_taken(kind, count):
  assert count / 4 < fuzz.fuzz(kind, seed=2, count=count) <= count
