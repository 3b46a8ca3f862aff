"""Data in, batches out: the input of the CIFAR-10 network.

    dataset = prepare(CIFAR10, '/tmp/cifar10_data')
    images, labels = distorted_inputs(dataset.folder, 128, dataset)

A training batch goes from queue to queue:

    file names -> queue -> records -> shuffle queue -> distortion -> queue

Reading and distorting images takes time, and the network should not wait for
it. So threads do it in advance: those of a `QueueRunner` run the operation that
fills a queue over and over, and the network takes batches out at its other end.
"""
import dataclasses
import hashlib
import os
import pathlib
import sys
import tarfile
import tempfile
import time
import types
import typing
import unicodedata
import urllib.request

import numpy as np
import PIL.Image
import PIL.ImageOps


# TensorFlow uses the fast kernels of oneDNN by default only on processors with
# AVX512-VNNI or better. With AVX2 alone, they make a step 1.7 times as fast.
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
# So that training leaves memory of a GPU to evaluation beside it.
os.environ.setdefault('TF_FORCE_GPU_ALLOW_GROWTH', 'true')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
_stderr = os.dup(2)
with open(os.devnull, 'w') as _devnull:
  os.dup2(_devnull.fileno(), 2)  # TensorFlow prints before it reads its level.
try:
  import tensorflow.compat.v1 as tf
finally:
  os.dup2(_stderr, 2)
  os.close(_stderr)

# TensorFlow calls graphs, queues and sessions deprecated; but we teach them.
tf.get_logger().addFilter(lambda record: 'deprecated' not in str(record.msg))

# TensorFlow 2 computes each operation at once. In graph mode, we first build a
# graph of all operations, as in TensorFlow 1, and a session then runs it.
tf.disable_eager_execution()

# The size of all pictures in all data sets. Scripts may set it, IMAGE_SIZE and
# NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN here; DATA_URL and NUM_CLASSES in cifar10.py.
HEIGHT, WIDTH, DEPTH = 32, 32, 3

# The network sees this many pixels of each side of a picture: a random square
# in training, the central one in evaluation.
IMAGE_SIZE = 24

NUM_CLASSES = 10
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = 50000
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = 10000

DATA_URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'

# The shuffle queue holds at least this part of an epoch, to mix batches well.
MIN_FRACTION_OF_EXAMPLES_IN_QUEUE = 0.4

_MAX_DOWNLOAD_BYTES = 200e6  # The largest archive has 182 million.
# Records read per call: one a call would be slow, as Python starts each call.
_RECORDS_PER_READ = 256


class UserError(ValueError):
  """A mistake that the user can correct. Its text is one line that says how."""


def say(text):
  """Prints a line. If the reader of a pipe has gone, the script continues."""
  try:
    print(text, flush=True)
  except OSError:
    with open(os.devnull, 'w') as devnull:
      os.dup2(devnull.fileno(), sys.stdout.fileno())


# Data sets, and how to get them.


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A data set in CIFAR-10's binary format.

  A record is `label_bytes` bytes, the last of which is the label, and then the
  picture: its red, its green and its blue plane, each row by row.
  """
  name: str          # What --dataset calls it.
  folder: str        # In --data_dir; after `prepare`, its whole path.
  train_files: dict  # Records in each file, by file name; None is any number.
  eval_files: dict
  classes: tuple     # The name of each label; () accepts all labels.
  label_bytes: int = 1
  downloads: dict = dataclasses.field(default_factory=dict)  # SHA-256 by URL.
  pictures: dict = dataclasses.field(default_factory=dict)  # Paths by file.

  @property
  def files(self):
    return {**self.train_files, **self.eval_files}

  @property
  def record_bytes(self):
    return self.label_bytes + HEIGHT * WIDTH * DEPTH


def prepare(dataset, data_dir, url=None):
  """Downloads, generates or converts a data set's files, unless they are there.

  data_dir is the local folder of all data sets. `url` is another address (http,
  https or file) of the archive; for svhn, of the folder of its two files.
  Returns the `Dataset` with the path of its files as `folder`. Raises a
  UserError if a download fails, or is not the published file.
  """
  data_dir = os.path.abspath(os.path.expanduser(data_dir))
  folder = os.path.join(data_dir, dataset.folder)
  missing = [name for name in dataset.files
             if not os.path.exists(os.path.join(folder, name))]
  if missing:
    os.makedirs(data_dir, exist_ok=True)
    # Files move to their folder only when all are complete, so that an
    # interrupted start leaves nothing that looks like the data set.
    with tempfile.TemporaryDirectory(dir=data_dir) as unfinished:
      archives = [_archive(dataset, source, data_dir, unfinished, url)
                  for source in dataset.downloads]
      make = (_convert_pictures if dataset.pictures else
              _write_synthetic if not archives else
              _convert_svhn if dataset is SVHN else _extract)
      make(dataset, archives, unfinished)
      os.makedirs(folder, exist_ok=True)
      for name in missing:
        os.replace(os.path.join(unfinished, name), os.path.join(folder, name))
  return dataclasses.replace(dataset, folder=folder)


def _archive(dataset, source, data_dir, unfinished, url):
  """Returns the path of an archive in data_dir, downloaded if it is missing."""
  name, sha256 = os.path.basename(source), dataset.downloads[source]
  if url:
    source = f'{url}/{name}' if len(dataset.downloads) > 1 else url
  archive = os.path.join(data_dir, name)
  if os.path.exists(archive):  # It may have been put there by hand.
    source = found = archive
  else:
    found = os.path.join(unfinished, name)
    _download(source, found, archive)
  with open(found, 'rb') as f:
    digest = hashlib.file_digest(f, 'sha256').hexdigest()
  if digest != sha256:
    raise UserError(f'{source} is not the published file, or not all of it: '
                    f'its SHA-256 is {digest}, not {sha256}.')
  os.replace(found, archive)
  return archive


def _download(url, path, archive):
  """Downloads a file and, on a terminal, shows the progress."""
  say(f'Downloading {url}')
  try:
    with open(path, 'wb') as f, urllib.request.urlopen(
        url, timeout=60) as source:
      size_bytes = int(source.headers.get('Content-Length', 0))
      start = time.monotonic()
      while chunk := source.read1(1 << 20):
        f.write(chunk)
        if f.tell() > _MAX_DOWNLOAD_BYTES:
          raise ValueError('it is larger than the published file')
        if f.tell() < 1000 * (time.monotonic() - start - 60):
          raise ValueError('fewer than 1,000 bytes a second')
        if size_bytes and sys.stdout.isatty():
          print(f'{f.tell() / size_bytes:.0%}', end='\r', flush=True)
  except Exception as error:  # URLs and servers have many kinds of faults.
    raise UserError(
        f'{url} cannot be downloaded ({error}). Name a mirror with --data_url, '
        f'put it in place as {archive}, or use --dataset=synthetic.') from error


def _extract(dataset, archives, folder):
  """Extracts the data set's files, and nothing else that is in its archive."""
  with tarfile.open(archives[0]) as tar:
    for name in dataset.files:
      with tar.extractfile(f'{dataset.folder}/{name}') as member, \
          open(os.path.join(folder, name), 'wb') as f:
        f.write(member.read())


def _convert_svhn(dataset, archives, folder):
  """Writes the records of SVHN's MATLAB files."""
  import scipy.io  # pip install scipy
  for path, name in zip(archives, dataset.files):
    say(f'Converting {path}')
    contents = scipy.io.loadmat(path)
    # X is [height, width, depth, n]. The digit 0 has the label 10.
    _write_records(os.path.join(folder, name), contents['y'] % 10,
                   contents['X'].transpose(3, 2, 0, 1))


def _write_records(path, labels, planes):
  """Writes labels [n] and planes [n, depth, height, width] as records."""
  # Convert each to bytes: np.c_ would give both the wider of the two types.
  np.c_[labels.reshape(-1).astype(np.uint8),
        planes.reshape(len(planes), -1).astype(np.uint8)].tofile(path)


def _write_synthetic(dataset, archives, folder):
  """Writes pictures of `dataset.classes`, the same ones on every machine."""
  say(f'Generating the {dataset.name} data set.')
  chance = np.random.default_rng(seed=1)
  for name, num_examples in dataset.files.items():
    labels = chance.integers(len(dataset.classes), size=num_examples)
    _write_records(
        os.path.join(folder, name), labels, _draw_shapes(chance, labels))


def _draw_shapes(chance, labels):
  """Returns a picture for each label, [n, depth, height, width], 0 to 255.

  A shape is where |x|^p + |y|^p < 1, filled or as an outline. Place, size and
  colours are random, and there is much noise.
  """
  def uniform(low, high, depth=1):
    return chance.uniform(low, high, [len(labels), depth, 1, 1])

  labels = labels.reshape(-1, 1, 1, 1)
  radius = uniform(6, 11)  # In pixels: it must survive a random crop.
  y, x = np.ogrid[-HEIGHT / 2:HEIGHT / 2, -WIDTH / 2:WIDTH / 2]
  x, y = (abs(t - uniform(-4, 4)) / radius for t in (x, y))
  y = np.where(labels % 5 == 4, 2.5 * y, y)  # A bar is a flat square.
  p = np.choose(labels % 5, [0.5, 1, 2, 50, 50])
  distance = (x ** p + y ** p) ** (1 / p)
  inside = np.where(labels < 5, 1 - distance, 0.2 - abs(0.8 - distance))
  shape = np.clip(inside * radius + 0.5, 0, 1)
  noise = uniform(10, 40) * chance.standard_normal(
      (len(labels), DEPTH, HEIGHT, WIDTH))
  background, colour = uniform(0, 255, DEPTH), uniform(-140, 140, DEPTH)
  return np.clip(background + colour * shape + noise, 0, 255)


# Pictures of your own.


def find_dataset(name):
  """Returns the `Dataset` of that name, or of the pictures in that folder.

  Pictures may have any size: `prepare` scales them and writes them as records.
  """
  if name in DATASETS:
    return DATASETS[name]
  root = pathlib.Path(name).expanduser().resolve()
  train, test = (sorted(root.glob(f'{part}/[!.]*/[!.]*'))
                 for part in ('train', 'test'))
  classes = tuple(sorted(set(map(_class_of, train))))
  unknown = set(map(_class_of, test)) - set(classes)
  if unknown or not test or not 2 <= len(classes) <= 256:
    raise UserError(
        f'--dataset={name} is none of {", ".join(DATASETS)}, nor a folder with '
        'pictures of 2 to 256 classes in train/CLASS/ and test/CLASS/: found '
        f'{len(classes)} classes in train/, {len(test)} files in test/, and '
        f'{len(unknown)} classes only in test/.')
  listing = [(str(path.relative_to(root)), path.stat().st_size,
              path.stat().st_mtime) for path in train + test]
  # The folder's name contains a hash of the listing: if a picture changes, all
  # are converted again.
  digest = hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
  return Dataset(
      name=str(root), folder=f'{root.name}-{WIDTH}x{HEIGHT}-{digest}',
      train_files={'train.bin': None}, eval_files={'test.bin': None},
      classes=classes, pictures={'train.bin': train, 'test.bin': test})


def _class_of(path):
  """Returns the class of a picture; macOS writes accents in another way."""
  return unicodedata.normalize('NFC', path.parent.name)


def _convert_pictures(dataset, archives, folder):
  """Writes the records of picture files, and names those that it skips."""
  say(f'Converting the pictures of {dataset.name}')
  chance = np.random.default_rng(seed=1)
  for name, paths in dataset.pictures.items():
    labels, planes = [], []
    # A shuffle queue of 0.4 epochs could not mix files sorted by class.
    for path in chance.permutation(paths):
      try:
        planes.append(read_picture(path))
        labels.append(dataset.classes.index(_class_of(path)))
      except UserError as error:
        say(f'Skipped: {error}')
    if not planes:
      raise UserError(f'--dataset={dataset.name} has no picture for {name} '
                      'that can be read.')
    _write_records(
        os.path.join(folder, name), np.array(labels), np.array(planes))


def read_picture(path):
  """Returns a picture file of any size as uint8 [3, HEIGHT, WIDTH].

  It is rotated as its EXIF data say, laid over white, and scaled to cover
  HEIGHT and WIDTH; the rest is cut off. Raises a UserError if it is unreadable.
  """
  try:
    with PIL.Image.open(path) as image:
      if image.mode.startswith(('I', 'F')):
        raise ValueError('it has more than 8 bits a channel')
      image.getexif()  # Pillow keeps it; it cannot write all that it reads.
      image.info.pop('exif', None)
      upright = PIL.ImageOps.exif_transpose(image).convert('RGBA')
      white = PIL.Image.new('RGBA', upright.size, 'white')
      opaque = PIL.Image.alpha_composite(white, upright).convert('RGB')
      fitted = PIL.ImageOps.fit(
          opaque, (WIDTH, HEIGHT), PIL.Image.Resampling.BILINEAR)
  except Exception as error:  # Pillow has one for each kind of damage.
    raise UserError(f'{path} cannot be read as a picture: {error}') from error
  return np.moveaxis(np.asarray(fitted), 2, 0)


# The data sets that --dataset knows by name.


CIFAR10 = Dataset(
    name='cifar10',
    folder='cifar-10-batches-bin',
    train_files={f'data_batch_{i}.bin': 10000 for i in range(1, 6)},
    eval_files={'test_batch.bin': 10000},
    classes=('airplane', 'automobile', 'bird', 'cat', 'deer',
             'dog', 'frog', 'horse', 'ship', 'truck'),
    downloads={
        DATA_URL:
        'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'})

CIFAR10_HOLDOUT = dataclasses.replace(  # To choose settings with.
    CIFAR10, name='cifar10_holdout', eval_files={'data_batch_5.bin': 10000},
    train_files={f'data_batch_{i}.bin': 10000 for i in range(1, 5)})

CIFAR100 = Dataset(
    name='cifar100',
    folder='cifar-100-binary',
    train_files={'train.bin': 50000},
    eval_files={'test.bin': 10000},
    classes=tuple("""
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl
        boy bridge bus butterfly camel can castle caterpillar cattle chair
        chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
        dolphin elephant flatfish forest fox girl hamster house kangaroo
        keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
        motorcycle mountain mouse mushroom oak_tree orange orchid otter
        palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum
        rabbit raccoon ray road rocket rose sea seal shark shrew skunk
        skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper
        table tank telephone television tiger tractor train trout tulip turtle
        wardrobe whale willow_tree wolf woman worm""".split()),
    label_bytes=2,
    downloads={
        'https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz':
        '58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec'})

SVHN = Dataset(
    name='svhn',
    folder='svhn-batches-bin',
    train_files={'train_32x32.bin': 73257},
    eval_files={'test_32x32.bin': 26032},
    classes=tuple('0123456789'),
    downloads={
        'http://ufldl.stanford.edu/housenumbers/train_32x32.mat':
        '435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8',
        'http://ufldl.stanford.edu/housenumbers/test_32x32.mat':
        'cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b'})

SYNTHETIC = Dataset(
    name='synthetic',
    folder='synthetic-shapes-bin',
    train_files={'data_batch_1.bin': 5000, 'data_batch_2.bin': 5000},
    eval_files={'test_batch.bin': 2000},
    classes=('star', 'diamond', 'disc', 'square', 'bar', 'star_outline',
             'diamond_outline', 'disc_outline', 'square_outline',
             'bar_outline'))

DATASETS = {dataset.name: dataset for dataset in (
    CIFAR10, CIFAR10_HOLDOUT, CIFAR100, SVHN, SYNTHETIC)}


def _chosen(data_dir, dataset, image_size):
  """Returns a data set in a folder and an image size, with their defaults."""
  dataset = dataset or dataclasses.replace(  # Any records in CIFAR-10's files.
      CIFAR10, train_files=dict.fromkeys(CIFAR10.train_files),
      eval_files=dict.fromkeys(CIFAR10.eval_files), classes=())
  image_size = image_size or IMAGE_SIZE
  if image_size > min(HEIGHT, WIDTH):
    raise UserError(f'an image size of {image_size} is more than the '
                    f'{HEIGHT}x{WIDTH} pixels of a picture.')
  return dataclasses.replace(dataset, folder=data_dir), image_size


def check_files(dataset, files):
  """Checks a data set's train_files or eval_files before a thread reads them.

  Returns the number of records in each file, by its path. Raises a UserError if
  a file has a wrong size or an unknown label.
  """
  counts = {}
  for name, count in files.items():
    path = os.path.join(dataset.folder, name)
    size_bytes = os.path.getsize(path)
    count = count or max(1, size_bytes // dataset.record_bytes)
    whole_bytes = count * dataset.record_bytes
    if size_bytes != whole_bytes:
      raise UserError(f'{path} has {size_bytes} bytes, not {whole_bytes}: move '
                      'it away and start again.')
    labels = np.memmap(path, np.uint8, 'r').reshape(
        count, dataset.record_bytes)[:, dataset.label_bytes - 1]
    if dataset.classes and labels.max() >= len(dataset.classes):
      raise UserError(f'{path} has the unknown label {labels.max()} in record '
                      f'{labels.argmax()}: move it away and start again.')
    counts[path] = count
  return counts


def read_cifar10(filename_queue):
  """Reads one record from a queue of file names, as the tutorial did.

  Returns an object with the attributes height, width, depth (32, 32 and 3), key
  (scalar string, FILE:RECORD), label (int32 [1]) and uint8image (uint8 [height,
  width, depth]).
  """
  key, value = tf.FixedLengthRecordReader(CIFAR10.record_bytes).read(
      filename_queue)
  planes, label = parse_records([value], CIFAR10)
  return types.SimpleNamespace(
      height=HEIGHT, width=WIDTH, depth=DEPTH, key=key, label=label,
      uint8image=tf.transpose(planes[0], [1, 2, 0]))


def parse_records(values, dataset):
  """Splits strings into planes, uint8 [n, 3, 32, 32], and labels, int32 [n]."""
  with tf.name_scope('parse'):
    records = tf.ensure_shape(
        tf.decode_raw(values, tf.uint8), [None, dataset.record_bytes])
    labels = tf.cast(records[:, dataset.label_bytes - 1], tf.int32)
    planes = tf.reshape(records[:, dataset.label_bytes:],
                        [-1, DEPTH, HEIGHT, WIDTH])
    return planes, labels


def _fill(queue, paths, dataset, shuffle):
  """Fills a queue with records. The session starts the thread that does it."""
  filename_queue = tf.train.string_input_producer(
      paths, shuffle=shuffle, name='file_names')
  _, values = tf.FixedLengthRecordReader(dataset.record_bytes).read_up_to(
      filename_queue, _RECORDS_PER_READ)
  tf.train.add_queue_runner(
      tf.train.QueueRunner(queue, [queue.enqueue_many([values])]))


# Distorting images: chance first, then arithmetic.


class Distortions(typing.NamedTuple):
  """How to distort each image of a batch."""
  top: tf.Tensor         # int32 [batch], in pixels: the corner of the crop.
  left: tf.Tensor
  flip: tf.Tensor        # bool [batch], whether to mirror it left to right.
  brightness: tf.Tensor  # float32 [batch], added to each value.
  contrast: tf.Tensor    # float32 [batch], about each channel's mean.


def draw_distortions(batch_size, image_size, crop_margin=0):
  """Draws the `Distortions` of a training batch; see `distorted_inputs`."""
  def uniform(low, high, dtype=tf.float32):
    return tf.random_uniform([batch_size], low, high, dtype)

  end = crop_margin - image_size + 1
  return Distortions(
      top=uniform(-crop_margin, HEIGHT + end, tf.int32),
      left=uniform(-crop_margin, WIDTH + end, tf.int32),
      flip=uniform(0, 1) < 0.5,
      brightness=uniform(-63, 63),
      contrast=uniform(0.2, 1.8))


def distort(planes, distortions, image_size):
  """Crops, flips, recolours and standardizes a batch of images.

  It works plane by plane, as records have them: a CPU runs along a row of
  pixels much faster than from one channel of a pixel to the next.

  Takes planes [batch, 3, height, width], 0 to 255, of any type. Returns float32
  [batch, image_size, image_size, 3], each image with mean 0 and, unless all of
  its pixels are the same grey, standard deviation 1.
  """
  steps = tf.range(image_size)
  with tf.name_scope('flip'):
    order = tf.where_v2(distortions.flip[:, tf.newaxis], steps[::-1], steps)
  with tf.name_scope('crop'):
    # Outside the picture, repeat its edge pixels.
    rows = tf.clip_by_value(
        distortions.top[:, tf.newaxis] + steps, 0, HEIGHT - 1)
    columns = tf.clip_by_value(
        distortions.left[:, tf.newaxis] + order, 0, WIDTH - 1)
    values = tf.cast(
        tf.gather(planes, rows, axis=2, batch_dims=1), tf.float32)
    # Gathering columns is slow on a CPU; multiplying by a one-hot matrix
    # selects the same values faster.
    selected = tf.matmul(tf.reshape(values, [-1, DEPTH * image_size, WIDTH]),
                         tf.one_hot(columns, WIDTH, axis=1))
    crops = tf.reshape(selected, [-1, DEPTH, image_size, image_size])

  # The rest shifts and scales whole channels. How that changes their means and
  # variances is computed without the pixels; one pass over the pixels does all.
  # (Standardization cancels brightness, which is here as in the tutorial.)
  with tf.name_scope('brightness'):
    means, variances = tf.nn.moments(crops, [2, 3], keepdims=True)
    channel_means = means + tf.reshape(distortions.brightness, [-1, 1, 1, 1])
  with tf.name_scope('contrast'):
    contrast = tf.reshape(distortions.contrast, [-1, 1, 1, 1])
    offsets = channel_means - tf.reduce_mean(channel_means, 1, keepdims=True)
    variance = tf.reduce_mean(
        tf.square(contrast) * variances + tf.square(offsets), 1, keepdims=True)
  with tf.name_scope('standardize'):
    # As tf.image.per_image_standardization: never divide by (almost) nothing.
    num_values = crops.shape[1:].num_elements()
    scale = 1 / tf.maximum(tf.sqrt(variance), num_values ** -0.5)
    standardized = (crops - means) * (contrast * scale) + offsets * scale
    return tf.transpose(standardized, [0, 2, 3, 1])


# Views: pixels down and right of the central crop, and whether it is mirrored.
CENTRAL_VIEW = ((0, 0, False),)
TEN_VIEWS = tuple(
    (down, right, flip) for flip in (False, True)
    for down, right in [(0, 0), (-2, -2), (-2, 2), (2, -2), (2, 2)])


def crop_views(planes, views, image_size):
  """Crops and standardizes pictures as evaluation shows them to the network.

  Krizhevsky et al. 2012, section 4.1, average over the centre, the four corners
  and their mirror images. With 24 pixels, crops nearer the centre did better.

  Takes planes [batch, 3, height, width], 0 to 255, of any type, and
  `CENTRAL_VIEW` or `TEN_VIEWS`. Returns float32 [len(views) * batch,
  image_size, image_size, 3], view by view.
  """
  last_top, last_left = HEIGHT - image_size, WIDTH - image_size
  crops = []
  for down, right, flip in views:
    top = min(max(last_top // 2 + down, 0), last_top)
    left = min(max(last_left // 2 + right, 0), last_left)
    crop = planes[:, :, top:top + image_size, left:left + image_size]
    crops.append(crop[..., ::-1] if flip else crop)
  standardized = tf.image.per_image_standardization(tf.concat(crops, axis=0))
  return tf.transpose(standardized, [0, 2, 3, 1])


def distorted_inputs(
    data_dir, batch_size, dataset=None, image_size=None, crop_margin=0,
    min_fraction_of_examples_in_queue=MIN_FRACTION_OF_EXAMPLES_IN_QUEUE,
    deterministic=False):
  """Builds the input of training: batches drawn at random, without end.

  data_dir holds the files of a `Dataset`, by default any records in CIFAR-10's
  files. A crop has image_size pixels a side, by default IMAGE_SIZE, and reaches
  up to crop_margin pixels beyond the picture. The shuffle queue always holds
  the given fraction of an epoch. With `deterministic`, a graph with a seed
  gives the same batches each time: they are drawn from a full queue, and
  distorted in one thread.

  Returns images, float32 [batch_size, image_size, image_size, 3], and labels,
  int32 [batch_size]. Raises a UserError if a file has a wrong size or label.
  """
  dataset, image_size = _chosen(data_dir, dataset, image_size)
  files = check_files(dataset, dataset.train_files)
  num_examples = (sum(files.values()) if dataset.classes else
                  NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN)
  if batch_size > num_examples:
    raise UserError(f'a step of {batch_size} images is more than the '
                    f'{num_examples} there are: lower --batch_size.')
  min_queue_examples = int(num_examples * min_fraction_of_examples_in_queue)
  capacity = min_queue_examples + (1 if deterministic else 3 * batch_size)
  # Each operation is multi-threaded itself, so a few threads are enough.
  num_threads = 1 if deterministic else max(1, os.cpu_count() // 4)
  with tf.name_scope('input'):
    queue = tf.RandomShuffleQueue(
        capacity, min_queue_examples, [tf.string], [[]], name='shuffle_queue')
    tf.summary.scalar('shuffle_queue_fullness', queue.size() / capacity)
    _fill(queue, list(files), dataset, shuffle=True)
    planes, labels = parse_records(queue.dequeue_many(batch_size), dataset)
    with tf.name_scope('chance'):
      distortions = draw_distortions(batch_size, image_size, crop_margin)
    images = distort(planes, distortions, image_size)
    # Four batches wait here, ready when the network is.
    batches = tf.FIFOQueue(
        4, [images.dtype, labels.dtype],
        [images.shape, labels.shape], name='batches')
    tf.train.add_queue_runner(tf.train.QueueRunner(
        batches, [batches.enqueue([images, labels])] * num_threads))
    images, labels = batches.dequeue()
  say(f'Filling queue with {min_queue_examples} {dataset.name} images before '
      'starting to train. This will take a few seconds.')
  return images, labels


def inputs(eval_data, data_dir, batch_size, dataset=None, image_size=None,
           views=CENTRAL_VIEW):
  """Builds the input of evaluation: all examples in order, again and again.

  Takes eval_data, whether to read the evaluation files or the training files,
  and `views` as `crop_views` does; the rest as `distorted_inputs`. Returns
  images, float32 [len(views) * batch_size, image_size, image_size, 3], view by
  view, and labels, int32 [batch_size].
  """
  dataset, image_size = _chosen(data_dir, dataset, image_size)
  files = check_files(
      dataset, dataset.eval_files if eval_data else dataset.train_files)
  with tf.name_scope('input'):
    queue = tf.FIFOQueue(
        4 * max(batch_size, _RECORDS_PER_READ), [tf.string], [[]], name='queue')
    _fill(queue, list(files), dataset, shuffle=False)
    planes, labels = parse_records(queue.dequeue_many(batch_size), dataset)
    images = crop_views(planes, views, image_size)
  return images, labels
