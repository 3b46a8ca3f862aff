"""Data in, batches out: the input of the CIFAR-10 network.

    folder = maybe_download_and_extract(CIFAR10, '/tmp/cifar10_data')
    images, labels = distorted_inputs(folder, batch_size=128)

A training batch takes the road that the tutorial teaches, one queue after
another, each filled by threads that run beside the network:

    file names -> queue -> records -> shuffle queue -> distortion -> queue

The shuffle queue holds records as they lie on disk, one string each; a batch
is distorted when it has left that queue, all of its images at once, and then
waits in the last queue, so that the network never does.
"""
import collections
import contextlib
import dataclasses
import errno
import fcntl
import functools
import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import sys
import tarfile
import time
import types
import zlib

import numpy as np


@contextlib.contextmanager
def _quiet_start():
  """Hides what TensorFlow says of itself before it reads any log setting.

  Who wants to see it, and which GPUs it found, sets TF_CPP_MIN_LOG_LEVEL=0.
  """
  quiet = os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2') >= '2'
  stderr = os.dup(2)
  if quiet:
    with open(os.devnull, 'w') as devnull:
      os.dup2(devnull.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(stderr, 2)
    os.close(stderr)


with _quiet_start():
  import tensorflow.compat.v1 as tf
  tf.config.list_physical_devices()

# Graphs, queues and sessions are what this suite teaches: that TensorFlow calls
# them deprecated is no news here. And its step counter reads a step while it is
# raised, perhaps twice the same. Other warnings still come through.
tf.get_logger().addFilter(
    lambda record: record.levelno > logging.WARNING
    or not re.search('deprecated|global step .* has not been increased',
                     str(record.msg)))
tf.disable_eager_execution()

# The network sees this much of each side of a picture, unless a `Dataset` says
# otherwise: a random square of it in training, the central one in evaluation.
IMAGE_SIZE = 24

# At least this part of an epoch is in the shuffle queue after each batch, so
# that neighbours in a file do not end up in one batch.
MIN_FRACTION_OF_EXAMPLES_IN_QUEUE = 0.4

# Records that one run of the reader moves. Moved one by one, the way through
# Python's threads costs more than the network's input is worth.
_RECORDS_PER_READ = 256

# Distorted batches that wait for the network.
_BATCHES_AHEAD = 4

_DOWNLOAD_TIMEOUT_SECS = 60


class UserError(ValueError):
  """A mistake that the user can mend. Its text is one line that says how."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """The description of a data set in CIFAR-10's binary format.

  A record is `label_bytes` bytes, one of which is the label, and then the
  picture: its red, its green and its blue plane, each row by row.
  """
  name: str          # What --dataset calls it.
  title: str         # What the console calls its images.
  folder: str        # Where its files lie below the data directory.
  train_files: dict  # Number of records of each file to train on, by file name.
  eval_files: dict   # The same for the files to evaluate on.
  classes: tuple     # The name of each label.
  label_bytes: int = 1
  label_byte: int = 0  # Which of them is the label.
  height: int = 32   # Of a picture, in pixels.
  width: int = 32
  depth: int = 3     # Channels.
  image_size: int = IMAGE_SIZE  # Of the square that the network sees.
  downloads: dict = dataclasses.field(default_factory=dict)  # SHA-256 by URL.
  make: object = None  # Function of the data set, its downloads and a folder,
                       # which writes the files there.

  @property
  def record_bytes(self):
    return self.label_bytes + self.height * self.width * self.depth

  @property
  def files(self):
    return {**self.train_files, **self.eval_files}

  def size_bytes(self, name):
    return self.files[name] * self.record_bytes

  @property
  def num_train_examples(self):
    return sum(self.train_files.values())

  @property
  def num_eval_examples(self):
    return sum(self.eval_files.values())


# Getting the data.


def maybe_download_and_extract(dataset, data_dir, url=None, sha256=None):
  """Makes sure that the files of a data set are there.

  Args:
    dataset: the `Dataset`.
    data_dir: folder of all data sets; made if need be.
    url: where to take the archive from (http, https or file) instead of the
      place where it is published.
    sha256: the archive's checksum, if it is not the published one.

  Returns:
    The folder with the data set's files.

  Raises:
    UserError: the data set is not there and cannot be had.
  """
  folder = os.path.join(data_dir, dataset.folder)

  def is_there():  # Whether it is whole is for `check_files` to say.
    return all(os.path.exists(os.path.join(folder, name))
               for name in dataset.files)

  if not is_there():
    with locked(data_dir, 'data_dir', wait=True):
      try:
        if not is_there():  # Another process may have got it meanwhile.
          _get(dataset, folder, url, sha256)
      except OSError as error:
        raise UserError('--data_dir=%s cannot hold the data set: %s'
                        % (data_dir, error)) from error
  return folder


def say(text, file=None):
  """Prints a line. That nobody can read it any more is no reason to end."""
  file = file or sys.stdout
  try:
    print(text, file=file, flush=True)
  except OSError as error:
    if error.errno in (errno.EPIPE, errno.EIO):  # A console that was closed.
      with open(os.devnull, 'w') as devnull:
        os.dup2(devnull.fileno(), file.fileno())


@contextlib.contextmanager
def locked(folder, flag, wait=False):
  """Lets one process at a time into a folder, which is made if need be.

  The lock is the system's: it goes with the process that has it, however that
  ends. The file stays, for to remove it would let two processes in.

  Args:
    folder: path.
    flag: name of the flag that named the folder, for messages.
    wait: whether to wait for another process or to complain about it.

  Raises:
    UserError: the folder cannot be written to, or another process is in it.

  Yields:
    A function that tells whether the lock is still worth something: it is not
    when somebody has removed the folder.
  """
  try:
    os.makedirs(folder, exist_ok=True)
    lock = open(os.path.join(folder, '.lock'), 'a+')
  except OSError as error:
    raise UserError('--%s=%s cannot be written to: %s'
                    % (flag, folder, error)) from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      lock.seek(0)
      holder = 'process %s uses --%s=%s' % (lock.read(), flag, folder)
      if not wait:
        raise UserError('%s: end it first, or name another folder.'
                        % holder) from None
      print('Waiting: %s.' % holder, flush=True)
      fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
      raise UserError('--%s=%s cannot be locked: %s'
                      % (flag, folder, error)) from error
    with contextlib.suppress(OSError):  # A full disk can do without our number.
      lock.truncate(0)
      print(os.getpid(), file=lock, end='', flush=True)
    yield lambda: os.path.exists(lock.name) and os.path.samestat(
        os.stat(lock.name), os.fstat(lock.fileno()))


def _get(dataset, folder, url, sha256):
  """Downloads, converts or generates a data set's files."""
  # They move to their folder when all of them are whole, not before.
  partial = folder + '.partial'
  shutil.rmtree(partial, ignore_errors=True)
  os.makedirs(partial)
  try:
    downloads = [
        _download(published, url or published, (sha256 or its_sha256).lower(),
                  os.path.dirname(folder))
        for published, its_sha256 in dataset.downloads.items()]
    dataset.make(dataset, downloads, partial)
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(partial):
      if not os.path.exists(os.path.join(folder, name)):  # Else it is theirs.
        os.replace(os.path.join(partial, name), os.path.join(folder, name))
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _download(published, url, sha256, data_dir):
  """Returns the path of a download in data_dir, whose checksum is right.

  A plain http mirror is as good as any: it is the checksum that we trust.
  """
  archive = os.path.join(data_dir, os.path.basename(published))
  if os.path.isfile(archive):
    found = _sha256(archive)
    if found != sha256:
      raise UserError(
          '%s has the SHA-256 %s, not %s: delete it, or accept it with '
          '--data_sha256.' % (archive, found, sha256))
    return archive
  if not sys.stdout.isatty():  # A log file would keep each state of the bar.
    print('Downloading %s' % url, flush=True)
    tf.keras.utils.disable_interactive_logging()
  timeout = socket.getdefaulttimeout()
  socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECS)
  partial = archive + '.partial'
  try:
    tf.keras.utils.get_file(
        os.path.basename(partial), url, file_hash=sha256,
        hash_algorithm='sha256', cache_dir=os.path.abspath(data_dir),
        cache_subdir='')
    os.replace(partial, archive)
    return archive
  except Exception as error:  # get_file raises nothing more precise.
    reason = str(error).split(url + ': ')[-1].replace('None -- ', '')
    if os.path.exists(partial):  # get_file removes all broken ones but this.
      os.remove(partial)
      reason = 'its SHA-256 is not %s' % sha256
    raise UserError(
        '%s cannot be used: %s. Name a mirror with --data_url, put the archive '
        'in place as %s, or take --dataset=synthetic, which needs no download.'
        % (url, reason, archive)) from error
  finally:
    socket.setdefaulttimeout(timeout)


def _sha256(path):
  digest = hashlib.sha256()
  with open(path, 'rb') as f:
    for block in iter(lambda: f.read(1 << 20), b''):
      digest.update(block)
  return digest.hexdigest()


def _extract(dataset, archives, destination):
  """Extracts the data set's files, and nothing else that is in its archive."""
  archive, = archives
  missing = {'%s/%s' % (dataset.folder, name): name for name in dataset.files}
  # Nobody waits for a bomb that unpacks to far more than this.
  max_bytes = 4 * sum(map(dataset.size_bytes, dataset.files)) + (1 << 20)
  print('Extracting %s' % archive, flush=True)
  try:
    with tarfile.open(archive, 'r:gz') as tar:
      for member in tar:
        if member.offset_data + member.size > max_bytes:
          raise tarfile.TarError('it unpacks to more than %d bytes' % max_bytes)
        name = missing.get(member.name)
        if name and member.isfile() and member.size == dataset.size_bytes(name):
          with open(os.path.join(destination, name), 'wb') as f:
            shutil.copyfileobj(tar.extractfile(member), f)
          del missing[member.name]
  except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise UserError('%s cannot be extracted (%s): delete it and start again.'
                    % (archive, error)) from error
  if missing:
    raise UserError('%s is not the archive of %s: it has no %s of %d bytes.' % (
        archive, dataset.name, min(missing),
        dataset.size_bytes(missing[min(missing)])))


def _convert_svhn(dataset, downloads, folder):
  """Writes the records of SVHN's MATLAB files."""
  try:
    import scipy.io
  except ImportError:
    raise UserError('--dataset=svhn needs scipy to read its files: pip install '
                    'scipy.') from None
  for path, name in zip(downloads, dataset.files):
    print('Converting %s' % path, flush=True)
    try:
      contents = scipy.io.loadmat(path)
      pictures, labels = contents['X'], contents['y']
    except (OSError, ValueError, TypeError, KeyError) as error:
      raise UserError('%s is not a file of SVHN (%s): delete it and start '
                      'again.' % (path, error)) from error
    # X is [height, width, depth, n]. The digit 0 has the label 10.
    _write_records(os.path.join(folder, name), labels % 10,
                   pictures.transpose(3, 2, 0, 1))


def _write_records(path, labels, planes):
  """Writes labels [n] and planes [n, depth, height, width] as records."""
  # As bytes first: together they would be as wide as the widest of the two.
  np.c_[labels.reshape(-1).astype(np.uint8),
        planes.reshape(len(planes), -1).astype(np.uint8)].tofile(path)


def pictures(folder, data_dir):
  """Describes a reader's own pictures, converted to records if need be.

  Args:
    folder: absolute path; has train/CLASS/ and test/CLASS/, with JPEG, PNG, GIF
      or BMP files of any size.
    data_dir: folder of all data sets, where the records go.

  Returns:
    A `Dataset`.

  Raises:
    UserError: there are no such folders, or no pictures in them.
  """
  classes = sorted(
      name for name in os.listdir(os.path.join(folder, 'train'))
      if os.path.isdir(os.path.join(folder, 'train', name))
  ) if os.path.isdir(os.path.join(folder, 'train')) else []
  listing = [
      (part, label, path, os.path.getsize(path), os.path.getmtime(path))
      for part in ('train', 'test') for label, name in enumerate(classes)
      for path in _files_below(os.path.join(folder, part, name))]
  if len(classes) < 2 or {row[0] for row in listing} != {'train', 'test'}:
    raise UserError(
        '--dataset=%s is no data set that is known by that name, nor a folder '
        'with pictures in train/CLASS/ and test/CLASS/.' % folder)
  digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
  dataset = Dataset(
      name=folder, title=os.path.basename(folder),
      folder='%s-%s' % (os.path.basename(folder), digest),
      train_files={'train.bin': 0}, eval_files={'test.bin': 0},
      classes=tuple(classes),
      make=functools.partial(_convert_pictures, listing))
  converted = maybe_download_and_extract(dataset, data_dir)

  def counted(files):  # Known only now, for some could not be read.
    return {name: os.path.getsize(os.path.join(converted, name))
                  // dataset.record_bytes for name in files}

  return dataclasses.replace(dataset, train_files=counted(dataset.train_files),
                             eval_files=counted(dataset.eval_files))


def _files_below(folder):
  return sorted(os.path.join(root, name) for root, _, names in os.walk(folder)
                for name in names if not name.startswith('.'))


def _convert_pictures(listing, dataset, downloads, folder):
  """Writes the records of picture files, and how many there are."""
  records = {'train': [], 'test': []}
  with tf.Graph().as_default(), tf.Session() as session:
    contents = tf.placeholder(tf.string, [])
    decoded = decode(contents, dataset)
    for part, label, path, *_ in progress(listing, 'Converting pictures'):
      try:
        with open(path, 'rb') as f:
          planes = session.run(decoded, {contents: f.read()})
        records[part].append((label, planes[0]))
      except (OSError, tf.errors.OpError):
        print('Skipped %s: it is no picture.' % path, flush=True)
  if not all(records.values()):
    raise UserError('--dataset=%s has no picture that can be read.'
                    % dataset.name)
  for part in records:
    labels, planes = map(np.array, zip(*records[part]))
    _write_records(os.path.join(folder, part + '.bin'), labels, planes)


def decode(contents, dataset):
  """Makes of a JPEG, PNG, GIF or BMP file what `fit` makes of one picture.

  Args:
    contents: scalar string, the file's bytes.
    dataset: the `Dataset`.

  Returns:
    float32 [1, depth, dataset.height, dataset.width].
  """
  picture = tf.io.decode_image(contents, 3, expand_animations=False)
  return fit(tf.ensure_shape(picture, [None, None, 3])[tf.newaxis], dataset)


def fit(images, dataset):
  """Scales pictures until they cover those of a data set, and cuts them to it.

  Args:
    images: [batch, height, width, depth], 0 to 255, of any type.
    dataset: the `Dataset`.

  Returns:
    float32 [batch, depth, dataset.height, dataset.width], whole numbers from 0
    to 255. What has that size already is as it was.
  """
  size = tf.constant([dataset.height, dataset.width], tf.float32)
  shape = tf.cast(tf.shape(images)[1:3], tf.float32)
  scale = tf.reduce_max(size / shape)
  fitted = tf.raw_ops.ScaleAndTranslate(
      images=tf.cast(images, tf.float32), size=tf.cast(size, tf.int32),
      scale=[scale, scale], translation=(size - scale * shape) / 2,
      kernel_type='triangle', antialias=True)
  return tf.transpose(tf.round(tf.clip_by_value(fitted, 0, 255)), [0, 3, 1, 2])


def progress(items, what):
  """Yields items, and says now and then how many of them are done."""
  start = last = time.time()
  for i, item in enumerate(items):
    yield item
    if time.time() > last + 2:
      last = time.time()
      print('%s: %d of %d, %d s to go.' % (
          what, i + 1, len(items), (last - start) / (i + 1) * (len(items) - i)),
          end='\r' if sys.stdout.isatty() else '\n', flush=True)


def _write_synthetic(dataset, downloads, folder):
  """Writes pictures of `dataset.classes`, the same ones on every machine."""
  print('Generating the %s data set.' % dataset.name, flush=True)
  random = np.random.default_rng(seed=1)
  for name, num_examples in dataset.files.items():
    labels = random.integers(len(dataset.classes), size=num_examples)
    _write_records(
        os.path.join(folder, name), labels,
        _draw_shapes(random, labels, dataset.height, dataset.width))


def _draw_shapes(random, labels, height, width):
  """Returns a picture for each label, [n, 3, height, width], 0 to 255.

  The shape has any place, size and colours, and there is much noise.
  """
  def uniform(low, high, *shape):
    return random.uniform(low, high, (len(labels),) + shape)

  # x and y run from -1 to 1 over the shape, which must survive a random crop.
  radius = uniform(6, 11, 1, 1)
  y, x = np.ogrid[-height / 2:height / 2, -width / 2:width / 2]
  x, y = ((t - uniform(-4, 4, 1, 1)) / radius for t in (x, y))
  labels = labels[:, np.newaxis, np.newaxis]
  nearer, farther = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
  distance = np.choose(labels % 5, [  # Less than 0.85 inside the solid shape.
      np.hypot(x, y), farther, (nearer + farther) / 1.3,
      np.maximum(y + 0.1, 1.7 * abs(x) - 0.9 * y),
      np.maximum(2.8 * nearer, farther)])
  inside = np.where(labels < 5, 0.85 - distance, 0.2 - abs(0.7 - distance))
  shape = np.clip(inside * radius + 0.5, 0, 1)[:, np.newaxis]

  colour = random.standard_normal((len(labels), 3, 1, 1))
  colour *= uniform(40, 140, 1, 1, 1) / np.linalg.norm(colour, axis=1)[:, None]
  light = uniform(-2, 2, 1, 1, 1) * np.arange(-width / 2, width / 2)
  noise = uniform(10, 40, 1, 1, 1) * random.standard_normal(
      (len(labels), 3, height, width))
  background = uniform(0, 255, 3, 1, 1)
  return np.clip(background + shape * colour + light + noise, 0, 255)


# The data sets that --dataset knows by name.


CIFAR10 = Dataset(
    name='cifar10',
    title='CIFAR',
    folder='cifar-10-batches-bin',
    train_files={'data_batch_%d.bin' % i: 10000 for i in range(1, 6)},
    eval_files={'test_batch.bin': 10000},
    classes=('airplane', 'automobile', 'bird', 'cat', 'deer',
             'dog', 'frog', 'horse', 'ship', 'truck'),
    downloads={
        'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz':
        'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'},
    make=_extract)

CIFAR100 = Dataset(
    name='cifar100',
    title='CIFAR-100',
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
    label_byte=1,
    downloads={
        'https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz':
        '58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec'},
    make=_extract)

# The same pictures with the labels of their superclasses (--label=coarse).
CIFAR100_COARSE = dataclasses.replace(CIFAR100, label_byte=0, classes=tuple("""
    aquatic_mammals fish flowers food_containers fruit_and_vegetables
    household_electrical_devices household_furniture insects large_carnivores
    large_man-made_outdoor_things large_natural_outdoor_scenes
    large_omnivores_and_herbivores medium_mammals non-insect_invertebrates
    people reptiles small_mammals trees vehicles_1 vehicles_2""".split()))

SVHN = Dataset(
    name='svhn',
    title='SVHN',
    folder='svhn-batches-bin',
    train_files={'train_32x32.bin': 73257},
    eval_files={'test_32x32.bin': 26032},
    classes=tuple('0123456789'),
    downloads={
        'http://ufldl.stanford.edu/housenumbers/train_32x32.mat':
        '435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8',
        'http://ufldl.stanford.edu/housenumbers/test_32x32.mat':
        'cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b'},
    make=_convert_svhn)

SYNTHETIC = Dataset(
    name='synthetic',
    title='synthetic',
    folder='synthetic-batches-bin',
    train_files={'data_batch_1.bin': 5000, 'data_batch_2.bin': 5000},
    eval_files={'test_batch.bin': 2000},
    classes=('disc', 'square', 'diamond', 'triangle', 'cross', 'ring',
             'square_outline', 'diamond_outline', 'triangle_outline',
             'cross_outline'),
    make=_write_synthetic)

DATASETS = {dataset.name: dataset
            for dataset in (CIFAR10, CIFAR100, SVHN, SYNTHETIC)}

NUM_CLASSES = len(CIFAR10.classes)
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = CIFAR10.num_train_examples
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = CIFAR10.num_eval_examples


# Reading it.


def check_files(dataset, folder, files):
  """Finds what is wrong with a data set before a thread trips over it.

  Args:
    dataset: the `Dataset`.
    folder: where its files lie.
    files: names of the ones to look at.

  Returns:
    The paths of the files.

  Raises:
    UserError: a file is missing, has the wrong size, or a record of it has a
      label that the data set does not know.
  """
  paths = [os.path.join(folder, name) for name in files]
  for path in paths:
    try:
      stat = os.stat(path)
      flaw = _find_flaw(path, dataset, stat.st_size, stat.st_mtime_ns)
    except FileNotFoundError:
      flaw = 'is missing'
    except OSError as error:
      raise UserError('%s cannot be read: %s.'
                      % (path, error.strerror)) from error
    if flaw:
      raise UserError('%s %s: delete %s and start again to get it anew.'
                      % (path, flaw, folder))
  return paths


@functools.lru_cache(maxsize=None)  # To look again at the same file is free.
def _find_flaw(path, dataset, found_bytes, mtime_ns):
  """Returns what is wrong with a file, or None."""
  if not os.path.isfile(path):
    return 'is not a file'
  size_bytes = dataset.size_bytes(os.path.basename(path))
  if found_bytes != size_bytes:
    return 'has %d bytes, not %d' % (found_bytes, size_bytes)
  labels = np.memmap(path, np.uint8, 'r').reshape(
      -1, dataset.record_bytes)[:, dataset.label_byte]
  wrong, = np.nonzero(labels >= len(dataset.classes))
  if wrong.size:
    return 'has the label %d in record %d, not one of 0 to %d' % (
        labels[wrong[0]], wrong[0], len(dataset.classes) - 1)
  return None


def read_cifar10(filename_queue, dataset=CIFAR10):
  """Reads and parses one record.

  Args:
    filename_queue: a queue of strings, the paths of the files to read.
    dataset: the `Dataset` that says how a record is laid out.

  Returns:
    An object that stands for one example, with the attributes
      height, width, depth: int, 32, 32 and 3.
      key: scalar string Tensor, FILE:RECORD.
      label: int32 Tensor of shape [1].
      uint8image: uint8 Tensor of shape [height, width, depth].
  """
  reader = tf.FixedLengthRecordReader(dataset.record_bytes)
  key, value = reader.read(filename_queue)
  planes, label = parse_records([value], dataset)
  return types.SimpleNamespace(
      height=dataset.height, width=dataset.width, depth=dataset.depth,
      key=key, label=label, uint8image=tf.stack(tf.unstack(planes[0]), axis=2))


def parse_records(values, dataset):
  """Splits records into pictures and labels.

  Args:
    values: strings [n], each a record of the file.
    dataset: the `Dataset` that says how a record is laid out.

  Returns:
    planes: uint8 [n, depth, height, width].
    labels: int32 [n].
  """
  records = tf.ensure_shape(
      tf.decode_raw(values, tf.uint8), [None, dataset.record_bytes])
  labels = tf.cast(records[:, dataset.label_byte], tf.int32)
  planes = tf.reshape(records[:, dataset.label_bytes:],
                      [-1, dataset.depth, dataset.height, dataset.width])
  return planes, labels


def _fill(queue, filename_queue, dataset):
  """Adds a thread to the session that moves records from files to a queue."""
  reader = tf.FixedLengthRecordReader(dataset.record_bytes)
  _, values = reader.read_up_to(filename_queue, _RECORDS_PER_READ)
  tf.train.add_queue_runner(
      tf.train.QueueRunner(queue, [queue.enqueue_many([values])]))


# Distorting it: chance first, then arithmetic.


class Distortions(collections.namedtuple(
    'Distortions', ['top', 'left', 'flip', 'brightness', 'contrast'])):
  """How to distort each image of a batch.

  top, left: int32 [batch], in pixels: the corner of the crop.
  flip: bool [batch], whether to mirror it left to right.
  brightness: float32 [batch], added to each value.
  contrast: float32 [batch], factor of each value's distance from its channel's
    mean.
  """


def draw_distortions(batch_size, dataset=CIFAR10):
  """Draws the `Distortions` of a training batch, each image's for itself."""
  def uniform(low, high, dtype=tf.float32):
    return tf.random_uniform([batch_size], low, high, dtype)

  return Distortions(
      top=uniform(0, dataset.height - dataset.image_size + 1, tf.int32),
      left=uniform(0, dataset.width - dataset.image_size + 1, tf.int32),
      flip=uniform(0, 1) < 0.5,
      brightness=uniform(-63, 63),
      contrast=uniform(0.2, 1.8))


def no_distortions(batch_size, dataset=CIFAR10):
  """The `Distortions` of evaluation: the central crop, nothing else."""
  return Distortions(*(tf.fill([batch_size], value) for value in (
      (dataset.height - dataset.image_size) // 2,
      (dataset.width - dataset.image_size) // 2, False, 0.0, 1.0)))


def distort(planes, distortions, dataset=CIFAR10):
  """Crops, flips, recolours and standardizes a batch of images.

  It works plane by plane, as records have them: a CPU runs along a row of
  pixels much faster than from one channel of a pixel to the next.

  Args:
    planes: [batch, depth, height, width], 0 to 255, of any type.
    distortions: the batch's `Distortions`.
    dataset: the `Dataset`, whose `image_size` is what to leave of each side.

  Returns:
    float32 [batch, size, size, depth], where size is `dataset.image_size`, each
    image with mean 0 and, unless it is all of one grey, standard deviation 1.
  """
  crops = _crop_and_flip(planes, distortions, dataset.image_size)
  brightness, contrast = (
      tf.reshape(values, [-1, 1, 1, 1])
      for values in (distortions.brightness, distortions.contrast))

  # All that follows a crop shifts and scales whole channels. So brightness and
  # contrast change a channel's mean and variance in a way that we can work out
  # without the pixels, and one pass over them does for all three operations.
  # (Standardization takes back whatever brightness does; the tutorial has it.)
  means, variances = tf.nn.moments(crops, [2, 3], keepdims=True)
  channel_means = means + brightness
  offsets = channel_means - tf.reduce_mean(channel_means, 1, keepdims=True)
  variance = tf.reduce_mean(
      tf.square(contrast) * variances + tf.square(offsets), 1, keepdims=True)
  # As tf.image.per_image_standardization: never divide by (almost) nothing.
  num_values = crops.shape[1:].num_elements()
  scale = 1 / tf.maximum(tf.sqrt(variance), num_values ** -0.5)
  standardized = (crops - means) * (contrast * scale) + offsets * scale
  return tf.transpose(standardized, [0, 2, 3, 1])


def _crop_and_flip(planes, distortions, image_size):
  """Returns float32 [batch, depth, image_size, image_size] for `distort`."""
  _, depth, _, width = planes.shape.as_list()
  steps = tf.range(image_size)
  rows = distortions.top[:, tf.newaxis] + steps
  columns = distortions.left[:, tf.newaxis] + tf.where_v2(
      distortions.flip[:, tf.newaxis], steps[::-1], steps)
  # Whole rows are gathered. Columns, single pixels, are not: a product with a
  # matrix of zeros and ones selects them just as exactly, and faster.
  values = tf.cast(tf.gather(planes, rows, axis=2, batch_dims=1), tf.float32)
  selected = tf.matmul(tf.reshape(values, [-1, depth * image_size, width]),
                       tf.one_hot(columns, width, axis=1))
  return tf.reshape(selected, [-1, depth, image_size, image_size])


# How a view differs from the central crop: pixels down and right, as far as the
# picture reaches, and whether it is mirrored.
CENTRAL_VIEW = ((0, 0, False),)
TEN_VIEWS = tuple(
    (down, right, flip) for flip in (False, True)
    for down, right in [(0, 0), (-2, -2), (-2, 2), (2, -2), (2, 2)])


def views(planes, kinds, dataset=CIFAR10):
  """Makes of pictures what evaluation shows the network.

  Krizhevsky et al. 2012, section 4.1, average over five crops and their mirror
  images. Theirs are in the corners, but of 24 pixels, nearer ones did better.

  Args:
    planes: [batch, depth, height, width], 0 to 255, of any type.
    kinds: the views to make, `CENTRAL_VIEW` or `TEN_VIEWS`.
    dataset: the `Dataset`.

  Returns:
    float32 [len(kinds) * batch, size, size, depth], view by view, where size is
    `dataset.image_size`.
  """
  central = no_distortions(tf.shape(planes)[0], dataset)

  def shift(corner, pixels, side):
    return tf.clip_by_value(corner + pixels, 0, side - dataset.image_size)

  return tf.concat([
      distort(planes, central._replace(
          top=shift(central.top, down, dataset.height),
          left=shift(central.left, right, dataset.width),
          flip=tf.fill(tf.shape(central.flip), flip)), dataset)
      for down, right, flip in kinds], axis=0)


# The two inputs of the network.


def distorted_inputs(
    data_dir, batch_size, dataset=CIFAR10, num_threads=None,
    min_fraction_of_examples_in_queue=MIN_FRACTION_OF_EXAMPLES_IN_QUEUE,
    deterministic=False):
  """Builds the input of training: batches drawn at random, without end.

  Args:
    data_dir: folder with the data set's files.
    batch_size: images a batch.
    dataset: the `Dataset`.
    num_threads: how many threads distort batches; by default one for every
      four processors, for the operations inside are parallel themselves.
    min_fraction_of_examples_in_queue: how much of an epoch is in the shuffle
      queue when it is drawn from.
    deterministic: whether a graph with a seed gives the same batches each time.
      They are drawn from a full queue then, however fast it is filled, and
      distorted in one thread.

  Returns:
    images: float32 [batch_size, size, size, 3], where size is
      `dataset.image_size`.
    labels: int32 [batch_size].

  Raises:
    UserError: a file is not as the data set's description says.
  """
  paths = check_files(dataset, data_dir, dataset.train_files)
  if batch_size > dataset.num_train_examples:
    raise UserError('a batch of %d images is more than the %d there are: lower '
                    '--batch_size.' % (batch_size, dataset.num_train_examples))
  min_queue_examples = int(
      dataset.num_train_examples * min_fraction_of_examples_in_queue)
  capacity = min_queue_examples + (1 if deterministic else 3 * batch_size)
  with tf.name_scope('input'):
    queue = tf.RandomShuffleQueue(
        capacity, min_queue_examples, [tf.string], [[]], name='shuffle_queue')
    tf.summary.scalar('shuffle_queue_fullness', queue.size() / capacity)
    _fill(queue, tf.train.string_input_producer(
        paths, name='file_names'), dataset)
    planes, labels = parse_records(queue.dequeue_many(batch_size), dataset)
    images = distort(planes, draw_distortions(batch_size, dataset), dataset)
    batches = tf.FIFOQueue(
        _BATCHES_AHEAD, [images.dtype, labels.dtype],
        [images.shape, labels.shape], name='batches')
    tf.train.add_queue_runner(tf.train.QueueRunner(
        batches, [batches.enqueue([images, labels])]
        * (1 if deterministic else num_threads or max(1, os.cpu_count() // 4))))
    images, labels = batches.dequeue()
  print('Filling queue with %d %s images before starting to train. '
        'This will take a few seconds.' % (min_queue_examples, dataset.title),
        flush=True)
  return images, labels


def inputs(eval_data, data_dir, batch_size, dataset=CIFAR10,
           kinds=CENTRAL_VIEW):
  """Builds the input of evaluation: each example once, in the files' order.

  Args:
    eval_data: whether to read the files to evaluate on; else those to train on.
    data_dir: folder with the data set's files.
    batch_size: images a batch; the last batch holds what is left.
    dataset: the `Dataset`.
    kinds: the `views` to make of each example.

  Returns:
    images: float32 [n, size, size, 3], as `views` returns them, with n =
      batch_size or fewer for each view.
    labels: int32 [batch_size or fewer].
    Both raise `tf.errors.OutOfRangeError` after the last example.

  Raises:
    UserError: a file is not as the data set's description says.
  """
  files = dataset.eval_files if eval_data else dataset.train_files
  paths = check_files(dataset, data_dir, files)
  with tf.name_scope('input'):
    queue = tf.FIFOQueue(
        4 * max(batch_size, _RECORDS_PER_READ), [tf.string], [[]], name='queue')
    _fill(queue, _queue_once(paths), dataset)
    planes, labels = parse_records(queue.dequeue_up_to(batch_size), dataset)
    images = views(planes, kinds, dataset)
  return images, labels


def _queue_once(paths):
  """Returns a queue that gives each path once, and then is at its end.

  `string_input_producer(num_epochs=1)` would do, but for the local variable in
  which it counts: a program of one's own would have to initialize it.
  """
  queue = tf.FIFOQueue(len(paths), [tf.string], [[]], name='file_names')
  with tf.control_dependencies([queue.enqueue_many([paths])]):
    enqueue_and_close = queue.close()
  tf.train.add_queue_runner(tf.train.QueueRunner(
      queue, [enqueue_and_close], queue_closed_exception_types=(
          tf.errors.OutOfRangeError, tf.errors.CancelledError)))
  return queue
