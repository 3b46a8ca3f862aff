"""cifar10_input: what is in the files reaches the network, distorted as said.

The arithmetic of distortions is held against TensorFlow's own image operations,
one image at a time; their chance against its distribution; the queues against
pictures that tell the number of their record.
"""
import dataclasses
import os

import numpy as np
import pytest

import cifar10_input
from cifar10_input import CIFAR10, IMAGE_SIZE, SYNTHETIC, UserError, tf

NUM_DRAWS = 20000


# Arithmetic.


def _pictures(kind, count, random):
  """Returns uint8 [count, 32, 32, 3]."""
  noise = random.integers(0, 256, (count, 32, 32, 3))
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


def _some_distortions(random):
  """Every corner with and without a flip, and extremes of the rest."""
  top, left, flip = np.indices([9, 9, 2]).reshape(3, -1)
  brightness = random.uniform(-63, 63, len(top))
  contrast = random.uniform(0.2, 1.8, len(top))
  brightness[:4], contrast[:4] = [-63, -63, 63, 63], [0.2, 1.8, 0.2, 1.8]
  return cifar10_input.Distortions(
      top.astype(np.int32), left.astype(np.int32), flip.astype(bool),
      brightness.astype(np.float32), contrast.astype(np.float32))


def _parse(pictures):
  """Returns pictures as they come out of records."""
  rows = np.moveaxis(pictures, 3, 1).reshape(len(pictures), -1)
  records = np.c_[np.zeros(len(rows), np.uint8), rows]
  values = [record.tobytes() for record in records]
  return cifar10_input.parse_records(values, CIFAR10)[0]


def _distort(pictures, distortions):
  with tf.Session() as session:
    return session.run(cifar10_input.distort(
        _parse(pictures), cifar10_input.Distortions(
            *map(tf.constant, distortions))))


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
  random = np.random.default_rng(1)
  distortions = _some_distortions(random)
  pictures = _pictures(kind, len(distortions.top), random)
  expected = _distort_one_by_one(pictures, distortions)
  result = _distort(pictures, distortions)
  assert result.shape == (len(pictures), IMAGE_SIZE, IMAGE_SIZE, 3)
  assert result.dtype == np.float32
  errors = abs(result - expected).max(axis=(1, 2, 3))
  assert (errors <= tolerance * abs(expected).max(axis=(1, 2, 3))).all()


@pytest.mark.parametrize('kind', ['of one grey', 'black', 'white'])
def test_images_of_one_grey_become_zero(kind):
  random = np.random.default_rng(2)
  distortions = _some_distortions(random)
  pictures = _pictures(kind, len(distortions.top), random)
  np.testing.assert_allclose(_distort(pictures, distortions), 0, atol=1e-2)


def test_crop_and_flip_are_exact():
  random = np.random.default_rng(3)
  distortions = _some_distortions(random)
  distortions = distortions._replace(
      brightness=0 * distortions.brightness,
      contrast=0 * distortions.contrast + 1)
  pictures = _pictures('random', len(distortions.top), random)
  results = _distort(pictures, distortions)
  for picture, result, top, left, flip in zip(
      pictures, results, *distortions[:3]):
    crop = picture[top:top + IMAGE_SIZE, left:left + IMAGE_SIZE]
    crop = crop[:, ::-1] if flip else crop
    np.testing.assert_array_equal(
        np.rint(result * crop.std() + crop.mean()), crop)


def test_standardized_images_have_mean_0_and_deviation_1():
  random = np.random.default_rng(4)
  distortions = _some_distortions(random)
  result = _distort(
      _pictures('random', len(distortions.top), random), distortions)
  np.testing.assert_allclose(result.mean(axis=(1, 2, 3)), 0, atol=1e-5)
  np.testing.assert_allclose(result.std(axis=(1, 2, 3)), 1, rtol=1e-5)


@pytest.mark.parametrize('kind', ['random', 'dim', 'of one colour', 'black'])
def test_no_distortions_leave_the_standardized_centre(kind):
  pictures = _pictures(kind, 16, np.random.default_rng(5))
  result = cifar10_input.distort(
      _parse(pictures), cifar10_input.no_distortions(16))
  expected = [
      tf.image.per_image_standardization(tf.image.resize_with_crop_or_pad(
          tf.cast(picture, tf.float32), IMAGE_SIZE, IMAGE_SIZE))
      for picture in pictures]
  with tf.Session() as session:
    result, expected = session.run([result, tf.stack(expected)])
  np.testing.assert_allclose(result, expected, atol=1e-5 * abs(expected).max())


# Chance.


@pytest.mark.parametrize('seeds, same', [((7, 7), True), ((7, 8), False)])
def test_seed_repeats_the_distortions(seeds, same):
  drawn = []
  for seed in seeds:
    with tf.Graph().as_default(), tf.Session() as session:
      tf.set_random_seed(seed)
      drawn.append(session.run(cifar10_input.draw_distortions(64)))
  for first, second in zip(*drawn):
    assert np.array_equal(first, second) == same


@pytest.fixture(scope='module')
def draws():
  with tf.Graph().as_default(), tf.Session() as session:
    tf.set_random_seed(1)
    return session.run(cifar10_input.draw_distortions(NUM_DRAWS))


def _five_sigma(deviation):
  return 5 * deviation / np.sqrt(NUM_DRAWS)


@pytest.mark.parametrize('side', ['top', 'left'])
def test_all_offsets_of_the_crop_are_as_likely(draws, side):
  counts = np.bincount(getattr(draws, side))
  assert counts.shape == (9,)
  np.testing.assert_allclose(
      counts / NUM_DRAWS, 1 / 9, atol=_five_sigma(np.sqrt(8) / 9))


def test_half_of_the_images_are_flipped(draws):
  assert draws.flip.dtype == bool
  assert abs(draws.flip.mean() - 0.5) < _five_sigma(0.5)


@pytest.mark.parametrize('name, low, high', [
    ('brightness', -63, 63), ('contrast', 0.2, 1.8)])
def test_colours_are_changed_evenly_over_their_range(draws, name, low, high):
  values = (getattr(draws, name) - low) / (high - low)
  assert 0 <= values.min() < 0.001
  assert 0.999 < values.max() <= 1
  counts, _ = np.histogram(values, bins=10)
  np.testing.assert_allclose(counts / NUM_DRAWS, 0.1, atol=_five_sigma(0.3))


def test_distortions_do_not_depend_on_each_other(draws):
  correlations = np.corrcoef([values.astype(float) for values in draws])
  np.testing.assert_allclose(correlations, np.eye(5), atol=_five_sigma(1))


def test_every_image_and_every_batch_has_its_own_distortions():
  drawn = cifar10_input.draw_distortions(64)
  with tf.Session() as session:
    batches = [session.run(drawn) for _ in range(2)]
  assert len(set(batches[0].brightness) | set(batches[1].brightness)) == 128
  assert len(set(batches[0].contrast) | set(batches[1].contrast)) == 128
  for batch in batches:
    assert len(set(zip(batch.top, batch.left))) > 20
    assert set(batch.flip) == {True, False}


def test_the_crop_has_the_room_that_the_pictures_give():
  wide = dataclasses.replace(CIFAR10, height=25, width=40)
  drawn = cifar10_input.draw_distortions(2000, wide)
  with tf.Session() as session:
    drawn = session.run(drawn)
    central = session.run(cifar10_input.no_distortions(1, wide))
  assert set(drawn.top) == {0, 1}
  assert set(drawn.left) == set(range(17))
  assert (central.top, central.left) == ([0], [8])


@pytest.mark.parametrize('size, middle, far', [
    (24, 4, (2, 6)), (28, 2, (0, 4)), (30, 1, (0, 2)), (32, 0, (0, 0))])
def test_ten_views_are_crops_around_the_centre_and_their_mirror_images(
    size, middle, far):
  dataset = dataclasses.replace(CIFAR10, image_size=size)
  rows = np.arange(32, dtype=np.float32)
  planes = np.stack([rows[:, None] + 0 * rows, 0 * rows[:, None] + rows,
                     0 * rows[:, None] + rows ** 2])[np.newaxis]
  with tf.Session() as session:
    views = session.run(cifar10_input.views(
        tf.constant(planes), cifar10_input.TEN_VIEWS, dataset))
    drawn = session.run(cifar10_input.draw_distortions(1000, dataset))
  assert views.shape == (10, size, size, 3)
  expected = []
  for step in (1, -1):
    for top, left in [(middle, middle)] + [(y, x) for y in far for x in far]:
      crop = planes[0, :, top:top + size, left:left + size][:, :, ::step]
      expected.append((crop - crop.mean()) / crop.std())
  np.testing.assert_allclose(
      views, np.moveaxis(expected, 1, 3), atol=1e-4)
  assert set(drawn.top) == set(drawn.left) == set(range(32 - size + 1))


# Reading.


def _random_files(dataset, folder, seed=0):
  """Writes random records. Returns labels and pictures of each file."""
  random = np.random.default_rng(seed)
  os.makedirs(folder, exist_ok=True)
  written = {}
  for name, size in dataset.files.items():
    records = random.integers(
        0, 256, (size, dataset.record_bytes), dtype=np.uint8)
    labels = random.integers(0, len(dataset.classes), size)
    records[:, dataset.label_bytes - 1] = labels
    records.tofile(os.path.join(folder, name))
    written[name] = labels, np.moveaxis(
        records[:, dataset.label_bytes:].reshape(size, 3, 32, 32), 1, 3)
  return written


@pytest.mark.parametrize('layout', ['tiny', 'two_labels'])
def test_read_cifar10_gives_one_record(request, tmp_path, layout):
  dataset = request.getfixturevalue(layout)
  written = _random_files(dataset, tmp_path)
  paths = [str(tmp_path / name) for name in dataset.train_files]
  example = cifar10_input.read_cifar10(
      tf.train.string_input_producer(paths, shuffle=False), dataset)
  assert (example.height, example.width, example.depth) == (32, 32, 3)
  assert example.label.dtype == tf.int32
  assert example.label.shape.as_list() == [1]
  assert example.uint8image.dtype == tf.uint8
  assert example.uint8image.shape.as_list() == [32, 32, 3]
  with tf.Session() as session:
    threads = tf.train.Coordinator()
    tf.train.start_queue_runners(session, threads)
    for path, name in zip(paths, dataset.train_files):
      for i, (label, picture) in enumerate(zip(*written[name])):
        key, read_label, read_picture = session.run(
            [example.key, example.label, example.uint8image])
        assert key.decode() == '%s:%d' % (path, i)
        assert read_label == [label]
        np.testing.assert_array_equal(read_picture, picture)
    threads.request_stop()


def test_read_cifar10_reads_cifar10_if_nothing_else_is_said(tmp_path):
  records = np.random.default_rng(0).integers(0, 10, (2, 3073), np.uint8)
  records.tofile(tmp_path / 'batch.bin')
  queue = tf.FIFOQueue(1, [tf.string], [[]])
  example = cifar10_input.read_cifar10(queue)
  with tf.Session() as session:
    session.run(queue.enqueue([str(tmp_path / 'batch.bin')]))
    for record in records:
      assert session.run(example.label) == record[:1]


def test_training_batches_are_pairs_of_image_and_label(
    tmp_path, tiny, write_coded, decode, session):
  images, labels = cifar10_input.distorted_inputs(
      data_dir=write_coded(tiny, tmp_path), batch_size=25, dataset=tiny)
  assert images.dtype == tf.float32 and labels.dtype == tf.int32
  assert images.shape.as_list() == [25, IMAGE_SIZE, IMAGE_SIZE, 3]
  assert labels.shape.as_list() == [25]
  run = session()
  numbers = []
  for _ in range(60):
    image_values, label_values = run.run([images, labels])
    numbers.extend(decode(image_values))
    np.testing.assert_array_equal(label_values, np.array(numbers[-25:]) % 10)
  counts = np.bincount(numbers, minlength=250)
  assert counts.shape == (250,)
  assert counts.min() >= 1 and counts.max() <= 20


def test_training_batches_are_shuffled(
    tmp_path, tiny, write_coded, decode, session):
  images, _ = cifar10_input.distorted_inputs(
      write_coded(tiny, tmp_path), 40, tiny)
  run = session()
  for _ in range(3):
    numbers = decode(run.run(images))
    assert np.ptp(numbers) > 0.4 * 250
    assert (np.diff(numbers) == 1).sum() < 5


def test_training_images_differ_in_their_distortions(tmp_path, tiny, session):
  folder = tmp_path / tiny.folder
  folder.mkdir()
  picture = np.random.default_rng(0).integers(0, 256, 3072)
  for name, size in tiny.files.items():
    np.tile(np.r_[0, picture], size).astype(np.uint8).tofile(folder / name)
  images, _ = cifar10_input.distorted_inputs(str(folder), 64, tiny)
  values = session().run(images)
  assert len(np.unique(values.round(3), axis=0)) > 32


@pytest.mark.parametrize('batch_size', [1, 25])
def test_the_shuffle_queue_keeps_two_fifths_of_an_epoch_as_records(
    tmp_path, tiny, write_coded, batch_size):
  cifar10_input.distorted_inputs(
      write_coded(tiny, tmp_path), batch_size, tiny)
  queue, = (op for op in tf.get_default_graph().get_operations()
            if op.type.startswith('RandomShuffleQueue'))
  assert queue.get_attr('min_after_dequeue') >= 0.4 * 250
  assert queue.get_attr('capacity') >= (
      queue.get_attr('min_after_dequeue') + batch_size)
  assert queue.get_attr('component_types') == [tf.string]
  assert queue.get_attr('capacity') <= 250 + 16 * batch_size


def test_filling_the_queue_is_announced_in_images_of_the_data_set(
    tmp_path, tiny, write_coded, capsys):
  folder = write_coded(tiny, tmp_path)
  cifar10_input.distorted_inputs(folder, 8, tiny)
  assert capsys.readouterr().out.startswith(
      'Filling queue with 100 synthetic images before starting to train.')


def _read_to_the_end(session, images, labels):
  batches = []
  with pytest.raises(tf.errors.OutOfRangeError):
    while len(batches) <= 250:
      batches.append(session.run([images, labels]))
  return batches


@pytest.mark.parametrize('batch_size', [1, 25, 32, 250, 300])
@pytest.mark.parametrize('eval_data', [True, False])
def test_evaluation_reads_each_example_once_and_in_order(
    tmp_path, tiny, write_coded, decode, session, eval_data, batch_size):
  folder = write_coded(tiny, tmp_path)
  images, labels = cifar10_input.inputs(
      eval_data=eval_data, data_dir=folder, batch_size=batch_size, dataset=tiny)
  assert images.dtype == tf.float32 and labels.dtype == tf.int32
  assert images.shape.as_list()[1:] == [IMAGE_SIZE, IMAGE_SIZE, 3]
  expected = np.arange(70) if eval_data else np.arange(250)
  read = _read_to_the_end(session(), images, labels)
  sizes = [len(batch[1]) for batch in read]
  assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
  assert 0 < sizes[-1] <= batch_size
  assert all(len(batch[0]) == len(batch[1]) for batch in read)
  np.testing.assert_array_equal(
      decode(np.concatenate([batch[0] for batch in read])), expected)
  np.testing.assert_array_equal(
      np.concatenate([batch[1] for batch in read]), expected % 10)


def test_evaluation_needs_no_more_than_a_plain_session(
    tmp_path, tiny, write_coded, decode):
  images, labels = cifar10_input.inputs(
      True, write_coded(tiny, tmp_path), 32, tiny)
  with tf.Session() as session:
    threads = tf.train.Coordinator()
    tf.train.start_queue_runners(session, threads)
    read = _read_to_the_end(session, images, labels)
    threads.request_stop()
    threads.join()
  np.testing.assert_array_equal(
      decode(np.concatenate([batch[0] for batch in read])), np.arange(70))


def test_the_second_of_two_label_bytes_is_the_label(
    tmp_path, two_labels, session):
  written = _random_files(two_labels, tmp_path)
  images, labels = cifar10_input.inputs(True, str(tmp_path), 70, two_labels)
  image_values, label_values = session().run([images, labels])
  expected_labels, pictures = written['test.bin']
  np.testing.assert_array_equal(label_values, expected_labels)
  crops = pictures[:, 4:28, 4:28].astype(float)
  expected = (crops - crops.mean(axis=(1, 2, 3), keepdims=True)) / (
      crops.std(axis=(1, 2, 3), keepdims=True))
  np.testing.assert_allclose(image_values, expected, atol=1e-4)


# What is wrong with the files.


def _cut(path):
  with open(path, 'r+b') as f:
    f.truncate(33 * 3073)


def _grow(path):
  with open(path, 'ab') as f:
    f.write(bytes(3073))


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
    'cut': (_cut, 'has 101409 bytes, not 307300'),
    'grown': (_grow, 'has 310373 bytes, not 307300'),
    'mislabelled': (_mislabel, 'label 200 in record 41'),
    'a folder': (_replace_by_folder, 'is not a file'),
}


@pytest.mark.parametrize('flaw', FLAWS)
def test_a_file_is_refused_that_is(tmp_path, tiny, write_coded, flaw):
  folder = write_coded(tiny, tmp_path)
  spoil, message = FLAWS[flaw]
  path = os.path.join(folder, 'second.bin')
  spoil(path)
  for build in (
      lambda: cifar10_input.distorted_inputs(folder, 8, tiny),
      lambda: cifar10_input.inputs(False, folder, 8, tiny)):
    with pytest.raises(UserError) as error:
      build()
    assert path in str(error.value)
    assert message in str(error.value)
    assert '\n' not in str(error.value)
  cifar10_input.inputs(True, folder, 8, tiny)


@pytest.mark.parametrize('byte, refused', [(0, False), (1, True)])
def test_only_the_byte_that_is_the_label_is_checked(
    tmp_path, two_labels, byte, refused):
  _random_files(two_labels, tmp_path)
  path = tmp_path / 'test.bin'
  records = bytearray(path.read_bytes())
  records[69 * 3074 + byte] = 100
  path.write_bytes(records)
  if refused:
    with pytest.raises(UserError, match='test.bin.* 100 in record 69'):
      cifar10_input.check_files(two_labels, str(tmp_path), ['test.bin'])
  else:
    assert cifar10_input.check_files(
        two_labels, str(tmp_path), ['test.bin']) == [str(path)]


def test_cifar10_is_described_as_published():
  assert CIFAR10.folder == 'cifar-10-batches-bin'
  assert {name: CIFAR10.size_bytes(name) for name in CIFAR10.files} == {
      'data_batch_1.bin': 30730000, 'data_batch_2.bin': 30730000,
      'data_batch_3.bin': 30730000, 'data_batch_4.bin': 30730000,
      'data_batch_5.bin': 30730000, 'test_batch.bin': 30730000}
  assert list(CIFAR10.eval_files) == ['test_batch.bin']
  assert CIFAR10.classes == (
      'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse',
      'ship', 'truck')
  assert cifar10_input.NUM_CLASSES == 10
  assert cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN == 50000
  assert cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_EVAL == 10000
  assert IMAGE_SIZE == 24


# The generated pictures.


def _contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_generated_files_have_their_exact_sizes(synthetic_dir):
  contents = _contents(synthetic_dir / SYNTHETIC.folder)
  assert {name: len(content) for name, content in contents.items()} == {
      'data_batch_1.bin': 15365000, 'data_batch_2.bin': 15365000,
      'test_batch.bin': 6146000}
  assert sorted(os.listdir(synthetic_dir)) == ['.lock', SYNTHETIC.folder]


def test_generated_labels_are_of_all_classes(synthetic_dir):
  for name in SYNTHETIC.files:
    labels = np.fromfile(
        synthetic_dir / SYNTHETIC.folder / name, np.uint8)[::3073]
    shares = np.bincount(labels, minlength=10) / len(labels)
    assert shares.shape == (10,)
    assert shares.min() > 0.08 and shares.max() < 0.12


def test_generated_pictures_have_contents_and_are_all_different(synthetic_dir):
  pictures = np.concatenate([
      np.fromfile(synthetic_dir / SYNTHETIC.folder / name, np.uint8)
      .reshape(-1, 3073)[:, 1:] for name in SYNTHETIC.files])
  assert len(np.unique(pictures[:, :64], axis=0)) > 11900
  assert (pictures.std(axis=1) > 5).all()


def test_two_generations_have_the_same_bytes(tmp_path, tiny, tiny_dir):
  cifar10_input.maybe_download_and_extract(tiny, str(tmp_path))
  assert _contents(tmp_path / tiny.folder) == _contents(tiny_dir / tiny.folder)


def test_what_was_generated_is_kept(tmp_path, tiny):
  folder = tmp_path / tiny.folder
  assert cifar10_input.maybe_download_and_extract(
      tiny, str(tmp_path)) == str(folder)
  (folder / 'first.bin').write_bytes(b'mine')
  assert cifar10_input.maybe_download_and_extract(
      tiny, str(tmp_path)) == str(folder)
  assert (folder / 'first.bin').read_bytes() == b'mine'


def test_what_is_missing_is_generated_again(tmp_path, tiny, tiny_dir):
  cifar10_input.maybe_download_and_extract(tiny, str(tmp_path))
  os.remove(tmp_path / tiny.folder / 'second.bin')
  (tmp_path / (tiny.folder + '.partial')).mkdir()
  (tmp_path / (tiny.folder + '.partial') / 'first.bin').write_bytes(b'half')
  cifar10_input.maybe_download_and_extract(tiny, str(tmp_path))
  assert _contents(tmp_path / tiny.folder) == _contents(tiny_dir / tiny.folder)
  assert sorted(os.listdir(tmp_path)) == ['.lock', tiny.folder]


def test_a_data_directory_that_cannot_be_used_is_named(tmp_path, tiny):
  (tmp_path / 'file').write_text('')
  data_dir = str(tmp_path / 'file')
  with pytest.raises(UserError) as error:
    cifar10_input.maybe_download_and_extract(tiny, data_dir)
  assert '--data_dir=' + data_dir in str(error.value)
  assert '\n' not in str(error.value)
