"""cifar10_input: data come whole, and reach the network distorted as said.

Distortions are compared with TensorFlow's own image operations, the queues with
pictures that show the number of their record. Archives come from this machine.
"""
import dataclasses
import functools
import hashlib
import http.server
import io
import itertools
import os
import random
import re
import subprocess
import sys
import tarfile
import threading
import types

import numpy as np
import PIL.Image
import pytest

from conftest import (
    ROOT, TINY, TWO_LABELS, contents, is_one_line, read_codes,
    run_queues, write_coded, write_random)
import cifar10_eval
import cifar10_input
import cifar10_train
from cifar10_input import CIFAR10, IMAGE_SIZE, SYNTHETIC, UserError, tf


def test_import_is_quiet_and_needs_no_fcntl():
  script = f"""
import os, sys, warnings
sys.path.insert(0, {str(ROOT)!r})
sys.modules['fcntl'] = None  # As on Windows.
sys.argv = ['/x/ipykernel_launcher.py', '-f', 'x.json']
def state():
  return sys.argv[:], sys.excepthook, sys.stderr, os.stat(2).st_ino
before = state()
import cifar10_eval, cifar10_multi_gpu_train  # They import the other three.
assert state() == before
with warnings.catch_warnings(record=True) as shown:
  for kind in UserWarning, FutureWarning, RuntimeWarning, DeprecationWarning:
    warnings.warn('mine', kind)
assert len(shown) == 4
"""
  environment = {name: value for name, value in os.environ.items()
                 if name != 'TF_CPP_MIN_LOG_LEVEL'}  # cifar10_input set it.
  run = subprocess.run([sys.executable, '-c', script], env=environment,
                       capture_output=True, text=True)
  assert (run.returncode, run.stdout, run.stderr) == (0, '', '')


# Distorting pictures.


NOISE = np.random.default_rng(1).integers(0, 256, (338, 32, 32, 3), np.uint8)


def _distort_one(image, top, left, flip, brightness, contrast):
  """Distorts with the operations that TensorFlow has for single images."""
  image = image[top:top + IMAGE_SIZE, left:left + IMAGE_SIZE]
  image = tf.cond(flip, lambda: tf.image.flip_left_right(image), lambda: image)
  image = tf.image.adjust_brightness(tf.cast(image, tf.float32), brightness)
  image = tf.image.adjust_contrast(image, contrast)
  return tf.image.per_image_standardization(image)


# On faint pictures, TensorFlow's own 32-bit arithmetic is not better than that.
@pytest.mark.parametrize('pictures, tolerance', [
    (NOISE, 1e-5), (100 + NOISE // 64, 2e-4), (0 * NOISE, 1e-2),
    (np.broadcast_to(NOISE[:, :1, :1, :1], NOISE.shape), 2e-2)],
    ids=['noise', 'dim', 'black', 'grey'])
def test_distortions_equal_those_of_tf_image(pictures, tolerance):
  chance = np.random.default_rng(2)
  # All there are, and those that reach up to two pixels beyond an edge.
  top, left, flip = np.indices([13, 13, 2], np.int32).reshape(3, -1)
  colours = (chance.uniform(-63, 63, len(top)).astype(np.float32),
             chance.uniform(0.2, 1.8, len(top)).astype(np.float32))
  padded = np.pad(pictures, [(0, 0), (2, 2), (2, 2), (0, 0)], 'edge')
  with tf.Session() as session:
    result, expected = session.run([
        cifar10_input.distort(
            pictures.transpose(0, 3, 1, 2), cifar10_input.Distortions(
                *map(tf.constant, (top - 2, left - 2, flip > 0, *colours))),
            IMAGE_SIZE),
        tf.map_fn(lambda values: _distort_one(*values),
                  (padded, top, left, flip > 0, *colours),
                  fn_output_signature=tf.float32)])
  assert result.shape == (338, IMAGE_SIZE, IMAGE_SIZE, 3)
  size = np.maximum(1, abs(expected).max(axis=(1, 2, 3), keepdims=True))
  assert (abs(result - expected) <= tolerance * size).all()


@pytest.mark.parametrize('size, middle, far', [
    (24, 4, (2, 6)), (28, 2, (0, 4)), (32, 0, (0, 0))])
def test_ten_views_are_five_crops_and_their_mirror_images(size, middle, far):
  picture = NOISE[0].astype(np.float32)
  planes = tf.constant(picture.transpose(2, 0, 1)[np.newaxis])
  with tf.Session() as session:
    views, central = session.run([
        cifar10_input.crop_views(planes, kind, size)
        for kind in (cifar10_input.TEN_VIEWS, cifar10_input.CENTRAL_VIEW)])
  corners = [(middle, middle)] + [(y, x) for y in far for x in far]
  crops = [picture[y:y + size, x:x + size] for y, x in corners]
  crops += [crop[:, ::-1] for crop in crops]
  expected = [(crop - crop.mean()) / crop.std() for crop in crops]
  np.testing.assert_allclose(views, expected, atol=1e-4)
  np.testing.assert_allclose(central, expected[:1], atol=1e-4)


@pytest.mark.parametrize('size, margin, places', [
    (24, 0, 9), (32, 0, 1), (32, 4, 9), (28, 2, 9)])
def test_distortions_are_drawn_evenly_and_independently(size, margin, places):
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


def test_read_cifar10_gives_one_record(tmp_path):
  written = write_random(TINY, tmp_path)
  paths = [str(tmp_path / name) for name in TINY.train_files]
  example = cifar10_input.read_cifar10(
      tf.train.string_input_producer(paths, shuffle=False))
  assert (example.height, example.width, example.depth) == (32, 32, 3)
  assert example.label.dtype == tf.int32 and example.label.shape == [1]
  assert example.uint8image.dtype == tf.uint8
  assert example.uint8image.shape == [32, 32, 3]
  with run_queues() as session:
    for path, name in zip(paths, TINY.train_files):
      for i, (label, picture) in enumerate(zip(*written[name])):
        read = session.run([example.key, example.label, example.uint8image])
        assert read[0].decode() == f'{path}:{i}' and read[1] == [label]
        np.testing.assert_array_equal(read[2], picture)


def test_training_draws_from_two_fifths_of_an_epoch(tmp_path, capsys):
  dataset = dataclasses.replace(TINY, folder=write_coded(TINY, tmp_path))
  images, labels = cifar10_input.distorted_inputs(
      data_dir=dataset.folder, batch_size=25, dataset=dataset)
  assert capsys.readouterr().out.startswith(
      'Filling queue with 100 synthetic images before starting to train.')
  queue = images.graph.get_operation_by_name('input/shuffle_queue')
  assert queue.get_attr('min_after_dequeue') == 100
  assert queue.get_attr('component_types') == [tf.string]  # A record.
  assert images.shape == [25, IMAGE_SIZE, IMAGE_SIZE, 3]
  assert labels.shape == [25] and labels.dtype == tf.int32
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


@pytest.mark.parametrize('eval_data, size', [(True, 70), (False, 250)])
@pytest.mark.parametrize('batch_size', [1, 25, 300])
def test_evaluation_reads_all_in_order_again_and_again(
    tmp_path, eval_data, size, batch_size):
  dataset = dataclasses.replace(TINY, folder=write_coded(TINY, tmp_path))
  images, labels = cifar10_input.inputs(
      eval_data, dataset.folder, batch_size, dataset)
  assert images.shape == [batch_size, IMAGE_SIZE, IMAGE_SIZE, 3]
  assert labels.shape == [batch_size] and labels.dtype == tf.int32
  numbers, read_labels = [], []
  with run_queues() as session:
    while len(numbers) < 2 * size + 30:
      image_values, label_values = session.run([images, labels])
      numbers.extend(read_codes(image_values))
      read_labels.extend(label_values)
  # Those to train on are the first 250 of all.
  expected = np.arange(len(numbers)) % size + (250 if eval_data else 0)
  np.testing.assert_array_equal(numbers, expected % 250)
  np.testing.assert_array_equal(read_labels, expected % 10)


@pytest.mark.parametrize('build', [
    lambda folder: cifar10_input.distorted_inputs(folder, 8),
    lambda folder: cifar10_input.inputs(True, folder, 8)])
def test_images_larger_than_the_pictures_are_refused(
    monkeypatch, tmp_path, build):
  monkeypatch.setattr(cifar10_input, 'IMAGE_SIZE', 40)
  with pytest.raises(UserError, match='40 is more than the 32x32 pixels'):
    build(str(tmp_path))


def test_constants_of_a_script_are_used(tmp_path, monkeypatch, capsys):
  for name, value in (('HEIGHT', 28), ('WIDTH', 36), ('IMAGE_SIZE', 20),
                      ('NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN', 100)):
    monkeypatch.setattr(cifar10_input, name, value)
  folder = write_coded(dataclasses.replace(
      CIFAR10, train_files=dict(zip(CIFAR10.train_files, (30, 1, 40, 2, 50))),
      eval_files={'test_batch.bin': 7}), tmp_path)
  np.memmap(tmp_path / 'test_batch.bin', np.uint8)[0] = 200  # Any label.
  images, _ = cifar10_input.distorted_inputs(folder, 8)
  assert 'Filling queue with 40 ' in capsys.readouterr().out
  eval_images, eval_labels = cifar10_input.inputs(True, folder, 8)
  assert images.shape == eval_images.shape == [8, 20, 20, 3]
  with run_queues() as session:
    labels, _ = session.run([eval_labels, images])
  # Of the records 123 to 129, the first has another label.
  assert labels.tolist() == [200, 4, 5, 6, 7, 8, 9, 200]
  os.truncate(tmp_path / 'data_batch_1.bin', 3025 * 2 + 5)
  with pytest.raises(UserError, match='data_batch_1.* 6055 bytes'):
    cifar10_input.distorted_inputs(folder, 8)


def test_wrong_label_or_missing_file_is_named_at_once(tmp_path):
  dataset = dataclasses.replace(
      TWO_LABELS, folder=write_coded(TWO_LABELS, tmp_path))
  path = tmp_path / 'second.bin'
  labels = np.memmap(path, np.uint8).reshape(-1, 3074)[41, :2]
  labels[:] = [255, 99]  # The second one counts, and may be up to 99.
  assert cifar10_input.check_files(dataset, dataset.files) == {
      str(tmp_path / name): count for name, count in dataset.files.items()}
  labels[1] = 100
  with pytest.raises(UserError, match=f'{path} .*label 100 in record 41'):
    cifar10_input.distorted_inputs(dataset.folder, 8, dataset)
  path.unlink()
  with pytest.raises((UserError, OSError), match=str(path)):
    cifar10_input.inputs(False, dataset.folder, 8, dataset)


def test_mutated_files_are_refused_or_right(tmp_path):
  dataset = dataclasses.replace(TINY, folder=str(tmp_path))
  write_random(dataset, tmp_path)
  path, chance, refused = tmp_path / 'test.bin', random.Random(2), 0
  whole = path.read_bytes()
  check = functools.partial(
      cifar10_input.check_files, dataset, dataset.eval_files)
  for _ in range(300):
    start = chance.randrange(len(whole))
    end = start + chance.choice([1, 4, 100, 3073, len(whole)])
    noise, rest = chance.randbytes(end - start), whole[end:]
    content = whole[:start] + chance.choice(
        [b'', rest, noise + rest, bytes(len(noise)) + rest])
    path.write_bytes(content)
    if len(content) == 70 * 3073 and max(content[::3073]) < 10:
      assert check() == {str(path): 70}
    else:
      refused += 1
      with pytest.raises(UserError, match=f'^{path} has .*\\Z'):
        check()
  assert 100 < refused < 250


# Data sets.


def test_data_sets_are_described_as_published():
  toronto = 'https://www.cs.toronto.edu/~kriz/cifar-10'
  stanford = 'http://ufldl.stanford.edu/housenumbers/'
  for name, num_classes, counts, downloads in [
      ('cifar10', 10, 6 * [10000], {
          toronto + '-binary.tar.gz':
          'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'}),
      ('cifar100', 100, [50000, 10000], {
          toronto + '0-binary.tar.gz':
          '58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec'}),
      ('svhn', 10, [73257, 26032], {
          stanford + 'train_32x32.mat':
          '435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8',
          stanford + 'test_32x32.mat':
          'cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b'})]:
    dataset = cifar10_input.find_dataset(name)
    assert len(set(dataset.classes)) == len(dataset.classes) == num_classes
    assert list(dataset.files.values()) == counts
    assert dataset.downloads == downloads
  assert (CIFAR10.folder, list(CIFAR10.files)) == ('cifar-10-batches-bin', [
      *(f'data_batch_{i}.bin' for i in (1, 2, 3, 4, 5)), 'test_batch.bin'])
  assert CIFAR10.classes == (
      'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse',
      'ship', 'truck')


def test_holdout_evaluates_on_training_images():
  holdout = cifar10_input.find_dataset('cifar10_holdout')
  assert list(holdout.files) == list(CIFAR10.train_files)
  assert list(holdout.eval_files) == ['data_batch_5.bin']


def test_cifar100_is_read_with_its_fine_label():
  record = bytes([7, 42]) + bytes(3071) + b'\x09'
  with tf.Session() as session:
    planes, labels = session.run(
        cifar10_input.parse_records([record], cifar10_input.CIFAR100))
  assert labels.tolist() == [42]
  assert planes.sum() == planes[0, 2, 31, 31] == 9


def test_synthetic_data_are_balanced_and_always_the_same(
    synthetic_dir, tiny_dir, tmp_path):
  files = contents(synthetic_dir / SYNTHETIC.folder)
  assert {name: len(content) for name, content in files.items()} == {
      'data_batch_1.bin': 15365000, 'data_batch_2.bin': 15365000,
      'test_batch.bin': 6146000}
  for content in files.values():
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    shares = np.bincount(records[:, 0], minlength=10) / len(records)
    assert shares.shape == (10,)
    assert shares.min() > 0.08 and shares.max() < 0.12
    assert len(np.unique(records[:, 1:65], axis=0)) > 0.99 * len(records)
  cifar10_input.prepare(TINY, str(tmp_path))
  assert contents(tmp_path) == contents(tiny_dir)


def test_svhn_is_converted_from_matlab(tmp_path, monkeypatch):
  scipy_io = pytest.importorskip('scipy.io')
  chance = np.random.default_rng(0)
  images = chance.integers(0, 256, (32, 32, 3, 20), np.uint8)
  labels = chance.integers(1, 11, (20, 1)).astype(np.uint8)
  downloads = {}
  for url in cifar10_input.SVHN.downloads:
    path = tmp_path / os.path.basename(url)
    scipy_io.savemat(path, {'X': images, 'y': labels})
    downloads[url] = hashlib.sha256(path.read_bytes()).hexdigest()
  svhn = dataclasses.replace(
      cifar10_input.SVHN, downloads=downloads,
      train_files={'train_32x32.bin': 20}, eval_files={'test_32x32.bin': 20})
  monkeypatch.setattr(cifar10_input, 'SVHN', svhn)
  dataset = cifar10_input.prepare(
      svhn, str(tmp_path / 'data'), tmp_path.as_uri())
  for path in cifar10_input.check_files(dataset, dataset.files):
    records = np.fromfile(path, np.uint8).reshape(20, 3073)
    np.testing.assert_array_equal(records[:, 0], labels[:, 0] % 10)
    np.testing.assert_array_equal(
        records[:, 1:].reshape(20, 3, 32, 32), images.transpose(3, 2, 0, 1))


# Pictures of a reader's own.


@pytest.fixture
def pictures_dir(tmp_path):
  """A folder with two classes of pictures, and three files to skip."""
  chance = np.random.default_rng(0)
  for part, count in (('train', 12), ('test', 5)):
    for label, name in enumerate(['dark', 'light']):
      folder = tmp_path / 'mine' / part / name
      folder.mkdir(parents=True)
      for i in range(count):
        size = *chance.integers(20, 90, 2), 3
        picture = 180 * label + chance.integers(0, 60, size, np.uint8)
        PIL.Image.fromarray(picture).save(
            folder / f'{i}.picture', 'JPEG' if i % 2 else 'PNG')
  folder = tmp_path / 'mine' / 'train' / 'dark'
  (folder / 'broken.png').write_text('nothing')
  (folder / '.hidden').write_text('nothing')
  PIL.Image.fromarray(np.eye(40, dtype=np.uint16)).save(folder / '16bit.png')
  return tmp_path / 'mine'


@pytest.fixture
def train_own(call_script, tmp_path):
  """Function that trains on a folder of pictures in tmp_path / 'run'."""
  return lambda folder: call_script(
      cifar10_train, f'--dataset={folder}', f'--data_dir={tmp_path / "data"}',
      f'--train_dir={tmp_path / "run"}', '--batch_size=4', '--max_steps=2')


def test_own_pictures_are_converted_once_and_mixed(
    pictures_dir, tmp_path, capfd):
  for name in ('one', 'two', 'one'):
    dataset = cifar10_input.prepare(
        cifar10_input.find_dataset(str(pictures_dir)), str(tmp_path / name))
    output = capfd.readouterr().out
  assert output == ''  # The second time, they are there.
  assert contents(tmp_path / 'one') == contents(tmp_path / 'two')
  path = os.path.join(dataset.folder, 'train.bin')
  records = np.fromfile(path, np.uint8).reshape(24, 3073)
  is_light = records[:, 0] == dataset.classes.index('light')
  assert is_light.sum() == 12 and np.diff(is_light).sum() > 5
  assert records[~is_light, 1:].max() < 90 < 150 < records[is_light, 1:].min()
  (pictures_dir / 'test' / 'dark' / '0.picture').write_text('changed')
  other = cifar10_input.find_dataset(str(pictures_dir)).folder
  assert other not in dataset.folder


def test_own_pictures_are_trained_on_and_evaluated(
    pictures_dir, tmp_path, train_own, call_script):
  run = train_own(pictures_dir)
  assert (run.code, run.stderr) == (0, '')
  for name, fault in (('broken', 'cannot identify'), ('16bit', '8 bits')):
    assert re.search(f'Skipped: .*/dark/{name}.png .*{fault}', run.stdout)
  assert 'hidden' not in run.stdout
  run = call_script(cifar10_eval, f'--checkpoint_dir={tmp_path / "run"}')
  assert '/10 correct at step 2\n' in run.stdout and '  light ' in run.stdout


def test_renamed_class_is_refused(
    pictures_dir, tmp_path, train_own, call_script):
  assert train_own(pictures_dir).code == 0
  for part in ('train', 'test'):
    (pictures_dir / part / 'dark').rename(pictures_dir / part / 'night')
  for run in (train_own(pictures_dir), call_script(
      cifar10_eval, f'--checkpoint_dir={tmp_path / "run"}')):
    assert is_one_line(run, 'classes', pictures_dir)


@pytest.mark.parametrize('paths', [
    'train/a train/b', 'test/a test/b', 'train/a test/a',
    'train/a train/b test/a test/new', 'train/a train/b test/a'],
    ids=['no test', 'no train', 'one class', 'class in test', 'no picture'])
def test_folder_without_classes_or_pictures_is_refused(tmp_path, paths):
  for path in paths.split():
    (tmp_path / 'mine' / path).mkdir(parents=True)
    (tmp_path / 'mine' / path / 'note').write_text('no picture')
  with pytest.raises(UserError, match=f'^--dataset={tmp_path / "mine"} .*\\Z'):
    cifar10_input.prepare(
        cifar10_input.find_dataset(str(tmp_path / 'mine')),
        str(tmp_path / 'data'))
  assert contents(tmp_path / 'data') == {}


def test_accents_may_be_written_as_macos_does(tmp_path):
  for folder in 'train/a', 'train/caf\u00e9', 'test/a', 'test/cafe\u0301':
    (tmp_path / folder).mkdir(parents=True)
    PIL.Image.new('RGB', (9, 9)).save(tmp_path / folder / '1.png')
  dataset = cifar10_input.prepare(
      cifar10_input.find_dataset(str(tmp_path)), str(tmp_path / 'data'))
  assert dataset.classes == ('a', 'caf\u00e9')
  assert list(cifar10_input.check_files(
      dataset, dataset.files).values()) == [2, 2]


def _read(pixels, path, **options):
  """Saves a picture, and returns it as the suite reads it."""
  PIL.Image.fromarray(pixels).save(path, **options)
  return np.moveaxis(cifar10_input.read_picture(path), 0, 2)


def test_pictures_are_read_as_they_look(tmp_path):
  y, x = np.mgrid[:32, :32]
  colours = np.stack([x * 8, y * 8, 128 + x * 2 - y * 2], 2).astype(np.uint8)
  for name, options, tolerance in (
      ('a.png', {}, 0), ('a.webp', {'lossless': True}, 0), ('a.jpg', {}, 20)):
    np.testing.assert_allclose(
        _read(colours, tmp_path / name, **options), colours, atol=tolerance)
  grey = colours[:, :, 0]
  np.testing.assert_array_equal(
      _read(grey, tmp_path / 'grey.gif', transparency=80),
      np.stack([np.where(grey == 80, 255, grey)] * 3, 2))
  on_white = 255 - (255.0 - colours) * grey[..., np.newaxis] / 255
  read = _read(np.dstack([colours, grey]), tmp_path / 'alpha.png')
  np.testing.assert_allclose(read, on_white, atol=1)
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # To be turned clockwise: TIFF 6.0, page 36.
  np.testing.assert_array_equal(
      _read(np.rot90(colours), tmp_path / 'turned.png', exif=exif), colours)
  # The same, and an XResolution of two bytes, which Pillow does not write.
  odd = (b'Exif\0\0II*\0\x08\0\0\0\2\0' b'\x12\1\3\0\1\0\0\0\6\0\0\0'
         b'\x1a\1\1\0\2\0\0\0ab\0\0' b'\0\0\0\0')
  np.testing.assert_array_equal(
      _read(np.rot90(colours), tmp_path / 'odd.png', exif=odd), colours)
  wide = NOISE[:6].reshape(64, 96, 3)
  with tf.Session() as session:
    scaled = session.run(
        tf.compat.v2.image.resize(wide, [32, 48], antialias=True))
  np.testing.assert_allclose(
      _read(wide, tmp_path / 'wide.png'), scaled[:, 8:40], atol=1)


# Downloads. Members of archives are named as the files that come of them.


FILES = {f'{TINY.folder}/{name}': np.random.default_rng(0).integers(
    0, 10, 3073 * count, np.uint8).tobytes()
         for name, count in TINY.files.items()}


def _archive(*strangers):
  """Returns a .tar.gz with strangers, (name, where it links to), and FILES."""
  archive = io.BytesIO()
  with tarfile.open(fileobj=archive, mode='w:gz') as tar:
    for name, link in strangers:
      member = tarfile.TarInfo(name)
      member.linkname = link
      member.type = tarfile.SYMTYPE if link else tarfile.REGTYPE
      tar.addfile(member)
    for name, content in FILES.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return archive.getvalue()


WHOLE = _archive((TINY.folder + '/batches.meta.txt', ''))
PUBLISHED = dataclasses.replace(TINY, downloads={
    'http://example.invalid/small.tar.gz': hashlib.sha256(WHOLE).hexdigest()})


@pytest.fixture
def server():
  """A server of one archive, which breaks off after `sends` bytes."""
  state = types.SimpleNamespace(
      content=WHOLE, sends=None, status=200, requests=[], hours_a_look=0)

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      state.requests.append(self.path)
      self.send_response(state.status)
      self.send_header('Content-Length', str(len(state.content)))
      self.end_headers()
      self.wfile.write(state.content[:state.sends])

    def log_message(self, *unused):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
    threading.Thread(target=httpd.serve_forever, args=[0.05]).start()
    state.url = f'http://127.0.0.1:{httpd.server_port}/small.tar.gz'
    yield state
    httpd.shutdown()


def test_archive_is_downloaded_once_and_adds_what_is_missing(
    server, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  dataset = cifar10_input.prepare(PUBLISHED, '~/mine', server.url)
  assert dataset.folder == str(tmp_path / 'mine' / TINY.folder)
  assert contents(tmp_path / 'mine') == {'small.tar.gz': WHOLE, **FILES}
  first, second, _ = (tmp_path / 'mine' / name for name in FILES)
  first.write_bytes(b'mine')
  second.unlink()
  cifar10_input.prepare(PUBLISHED, '~/mine', server.url)
  assert server.requests == ['/small.tar.gz']
  assert first.read_bytes() == b'mine' and second.exists()


def test_archive_in_place_is_used_if_it_is_right(tmp_path):
  archive = tmp_path / 'small.tar.gz'
  archive.write_bytes(b'wrong')
  with pytest.raises(UserError, match=f'^{archive} .*\\Z'):
    cifar10_input.prepare(PUBLISHED, str(tmp_path))
  assert contents(tmp_path) == {'small.tar.gz': b'wrong'}
  archive.write_bytes(WHOLE)
  cifar10_input.prepare(PUBLISHED, str(tmp_path))
  assert contents(tmp_path) == {'small.tar.gz': WHOLE, **FILES}


@pytest.mark.parametrize('faults, complaint', [
    ({'status': 404}, '404'), ({'sends': 5000}, ''),
    ({'content': WHOLE + b'more'}, hashlib.sha256(WHOLE).hexdigest()),
    ({'content': 2 * WHOLE}, 'larger'), ({'hours_a_look': 1}, 'a second'),
    ({'url': 'http://127.0.0.1:1/small.tar.gz'}, '--dataset=synthetic')],
    ids=['404', 'broken off', 'other content', 'too large', 'drips',
         'no server'])
def test_download_that_fails_is_one_line_and_leaves_nothing(
    server, tmp_path, monkeypatch, call_script, faults, complaint):
  monkeypatch.setitem(cifar10_input.DATASETS, 'cifar10', PUBLISHED)
  monkeypatch.setattr(cifar10_input, '_MAX_DOWNLOAD_BYTES', 1.5 * len(WHOLE))
  vars(server).update(faults)
  monkeypatch.setattr(cifar10_input, 'time', types.SimpleNamespace(
      monotonic=itertools.count(0, 3600 * server.hours_a_look).__next__))
  run = call_script(cifar10_train, f'--data_dir={tmp_path}',
                    f'--data_url={server.url}', f'--train_dir={tmp_path}/run')
  assert is_one_line(run, server.url, complaint)
  assert contents(tmp_path) == {} and not (tmp_path / TINY.folder).exists()


def test_hostile_archive_writes_nothing_but_the_files(tmp_path):
  outside, second = str(tmp_path), TINY.folder + '/second.bin'
  hostile = _archive(
      ('../evil', ''), (second + '/../../../evil', ''), ('evil', ''),
      (outside + '/evil', ''), ('way', outside), ('way/evil', ''),
      (TINY.folder, outside), (second, outside + '/evil'))
  dataset = dataclasses.replace(
      TINY, downloads={'a.tar.gz': hashlib.sha256(hostile).hexdigest()})
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'a.tar.gz').write_bytes(hostile)
  cifar10_input.prepare(dataset, str(tmp_path / 'data'))
  assert contents(tmp_path) == {'data/a.tar.gz': hostile, **{
      'data/' + name: content for name, content in FILES.items()}}
