"""Data in, batches out: the input of the CIFAR-10 network.

    folder = maybe_download_and_extract(CIFAR10, '/tmp/cifar10_data')
    images, labels = distorted_inputs(folder, batch_size=128)

A training batch goes from queue to queue. Threads beside the network fill them:

    file names -> queue -> records -> shuffle queue -> distortion -> queue

The shuffle queue holds records as they lie on disk. A batch is distorted after
it has left that queue, all of its images at once, and then waits in the last
queue, so that the network need not wait.
"""
import sys


def _show_error(kind, *error, show=sys.excepthook):
  if kind is not KeyboardInterrupt:
    show(kind, *error)


# The imports take seconds, in which Ctrl-C ends a script without a traceback.
sys.excepthook = _show_error

import contextlib
import dataclasses
import errno
import functools
import gzip
import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import re
import shutil
import socket
import tarfile
import types
import typing
import warnings
import zlib

try:
  import fcntl
except ImportError:  # Windows has no such locks.
  fcntl = None

import numpy as np
import PIL.Image
import PIL.ImageOps

# TensorFlow prints things before it reads any log setting. They are shown with
# TF_CPP_MIN_LOG_LEVEL=0, as is which GPUs it found.
try:
  _stderr = os.dup(2)
except OSError:  # It is closed: no file of ours may get its number.
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
  sys.stderr, _stderr = open(2, 'w'), os.dup(2)
if os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2') >= '2':
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
try:
  import tensorflow.compat.v1 as tf
  tf.config.list_physical_devices()
finally:
  os.dup2(_stderr, 2)
  os.close(_stderr)

# A picture is read, or refused with an exception.
warnings.filterwarnings('ignore', module='PIL')

# Graphs, queues and sessions are what this suite teaches, so nobody needs to
# read that TensorFlow calls them deprecated. Its step counter may read the step
# during an update, and then warns that it did not rise. Other warnings stay.
tf.get_logger().addFilter(
    lambda record: record.levelno > logging.WARNING
    or not re.search('deprecated|global step .* has not been increased',
                     str(record.msg)))
tf.disable_eager_execution()

# The size of every picture in every data set, as in CIFAR-10.
HEIGHT, WIDTH, DEPTH = 32, 32, 3

# The network sees this many pixels of each side of a picture: a random square
# in training, the central one in evaluation.
IMAGE_SIZE = 24

# What CIFAR-10 has. A script with data of its own may set these and IMAGE_SIZE
# before it builds its input, which reads them then.
NUM_CLASSES = 10
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = 50000
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = 10000

DATA_URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'

# At least this part of an epoch stays in the shuffle queue when a batch leaves
# it, so that neighbours in a file seldom meet in a batch.
MIN_FRACTION_OF_EXAMPLES_IN_QUEUE = 0.4

# Records that one run of the reader moves. A Python thread starts each run:
# with one record in each, that would take longer than the rest of the input.
_RECORDS_PER_READ = 256

# Distorted batches that wait for the network.
_BATCHES_AHEAD = 4

_DOWNLOAD_TIMEOUT_SECS = 60


# Data sets, and how to get them.


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """The description of a data set in CIFAR-10's binary format.

  A record is `label_bytes` bytes, one of which is the label, and then the
  picture: its red, its green and its blue plane, each row by row.
  """
  name: str          # What --dataset calls it.
  title: str         # What the console calls its images.
  folder: str        # Where its files lie below the data directory.
  train_files: dict  # Records in each file to train on, by file name. None
                     # stands for any number.
  eval_files: dict   # The same for the files to evaluate on.
  classes: tuple     # The name of each label.
  label_bytes: int = 1
  label_byte: int = 0  # Which of them is the label.
  examples_per_epoch: int = 0  # Of training; 0 for all that train_files have.
  downloads: dict = dataclasses.field(default_factory=dict)  # SHA-256 by URL.
  make: object = None  # Function of the data set, its downloads and a folder
                       # that writes the files there. A reader's own files have
                       # none.
  needs: str = ''      # The package that it takes to make them.

  @property
  def record_bytes(self):
    return self.label_bytes + HEIGHT * WIDTH * DEPTH

  @property
  def files(self):
    return {**self.train_files, **self.eval_files}

  @property
  def num_train_examples(self):
    return self.examples_per_epoch or sum(self.train_files.values())

  def size_bytes(self, name):
    return self.files[name] * self.record_bytes


def maybe_download_and_extract(dataset, data_dir, url=None):
  """Makes sure that a data set's files are there, and returns their folder.

  Args:
    dataset: the `Dataset`.
    data_dir: local folder of all data sets; made if need be.
    url: another address (http, https or file) of the archive; or of the folder
      with its files, if there are several.

  Raises:
    UserError: the data set is not there and cannot be had.
  """
  if not data_dir or '://' in data_dir:
    raise UserError(f'--data_dir={data_dir} is no local folder: name one.')
  data_dir = os.path.expanduser(data_dir)
  folder = data_folder(dataset, data_dir)

  def is_there():  # `check_files` tells whether it is whole.
    return all(os.path.exists(os.path.join(folder, name))
               for name in dataset.files)

  if not is_there():
    with locked(data_dir, 'data_dir', wait=True):
      try:
        if not is_there():  # Another process may have got it meanwhile.
          _get(dataset, data_dir, folder, url)
      except OSError as error:
        raise UserError(f'--data_dir={data_dir} cannot hold the data set: '
                        f'{error}') from error
  return folder


def data_folder(dataset, data_dir):
  """Returns the folder of a data set's files, which need not be there yet.

  It is below `data_dir`, unless that has its name already. A reader's own
  records stay where they are: the path of their folder is absolute.
  """
  data_dir = os.path.abspath(os.path.expanduser(data_dir))
  if os.path.basename(data_dir) == dataset.folder:
    return data_dir
  return os.path.join(data_dir, dataset.folder)


def _get(dataset, data_dir, folder, url):
  """Downloads, converts or generates a data set's files."""
  if dataset.needs and not importlib.util.find_spec(dataset.needs):
    raise UserError(f'--dataset={dataset.name} needs {dataset.needs} to read '
                    f'its files: pip install {dataset.needs}.')
  # They move to their folder when all of them are whole, not before.
  partial = os.path.join(data_dir, os.path.basename(folder) + '.partial')
  shutil.rmtree(partial, ignore_errors=True)
  os.makedirs(partial)
  try:
    downloads = []
    for source, sha256 in dataset.downloads.items():
      name = os.path.basename(source)
      if url:
        source = f'{url}/{name}' if len(dataset.downloads) > 1 else url
      downloads.append(_download(name, source, sha256, partial))
    dataset.make(dataset, downloads, partial)
    os.makedirs(folder, exist_ok=True)
    for name in set(os.listdir(partial)) - set(os.listdir(folder)):
      os.replace(os.path.join(partial, name), os.path.join(folder, name))
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _download(name, url, sha256, partial):
  """Downloads a file to a folder, and moves it up from there if it is right."""
  archive = os.path.join(os.path.dirname(partial), name)
  advice = ('Name a mirror with --data_url, put the archive in place as '
            f'{archive}, or take --dataset=synthetic, which needs none.')
  if os.path.isfile(archive):  # Perhaps put there by hand: it is checked, too.
    url = pathlib.Path(archive).absolute().as_uri()
    advice = ('It is not the published one: move it away. Other data in that '
              'format are a --dataset=FOLDER with its files.')
  elif not is_watched():
    say(f'Downloading {url}')
  if not is_watched():  # A log would keep all states of keras's bar.
    tf.keras.utils.disable_interactive_logging()
  timeout = socket.getdefaulttimeout()
  socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECS)
  try:
    tf.keras.utils.get_file(
        name, url, file_hash=sha256, hash_algorithm='sha256', cache_subdir='',
        cache_dir=os.path.abspath(partial))
  except Exception as error:  # get_file raises nothing more precise.
    raise UserError(
        f'{url} cannot be used ({what_went_wrong(error)}). {advice}'
        ) from error
  finally:
    socket.setdefaulttimeout(timeout)
  os.replace(os.path.join(partial, name), archive)
  return archive


def _extract(dataset, archives, destination):
  """Extracts the data set's files, and nothing else that is in its archive."""
  archive, = archives
  missing = {f'{dataset.folder}/{name}': name for name in dataset.files}
  say(f'Extracting {archive}')
  try:
    with tarfile.open(archive, 'r:gz') as tar:
      for member in tar:
        name = missing.get(member.name)
        if name and member.isfile() and member.size == dataset.size_bytes(name):
          with open(os.path.join(destination, name), 'wb') as f:
            shutil.copyfileobj(tar.extractfile(member), f)
          del missing[member.name]
  except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise UserError(f'{archive} cannot be extracted ({error}): delete it and '
                    'start again.') from error
  if missing:
    name = min(missing.values())
    raise UserError(f'{archive} is not the archive of {dataset.name}: it has '
                    f'no {name} of {dataset.size_bytes(name)} bytes.')


def _convert_svhn(dataset, downloads, folder):
  """Writes the records of SVHN's MATLAB files."""
  import scipy.io
  for path, name in zip(downloads, dataset.files):
    say(f'Converting {path}')
    try:
      contents = scipy.io.loadmat(path)
      images, labels = contents['X'], contents['y']
    except (OSError, ValueError, TypeError, KeyError) as error:
      raise UserError(f'{path} is not a file of SVHN ({error}): delete it and '
                      'start again.') from error
    # X is [height, width, depth, n]. The digit 0 has the label 10.
    _write_records(os.path.join(folder, name), labels % 10,
                   images.transpose(3, 2, 0, 1))


def _write_records(path, labels, planes):
  """Writes labels [n] and planes [n, depth, height, width] as records."""
  # As bytes first: together they would be as wide as the widest of the two.
  np.c_[labels.reshape(-1).astype(np.uint8),
        planes.reshape(len(planes), -1).astype(np.uint8)].tofile(path)


def own_dataset(folder, data_dir):
  """Returns the `Dataset` of a reader's own folder.

  It has records, as CIFAR-10 does: files *.bin, of which those whose names
  begin with `test` are to evaluate on, and batches.meta.txt, which has the name
  of a class in each line. Or it has pictures, which become such records in
  `data_dir`: files that Pillow reads, of any size, in folder/train/CLASS/ and
  folder/test/CLASS/. A UserError says what is missing there.
  """
  names = sorted(path.name for path in pathlib.Path(folder).glob('[!.]*.bin'))
  if not names or os.path.isdir(os.path.join(folder, 'train')):
    return _own_pictures(folder, data_dir)
  tests = [name for name in names if name.startswith('test')]
  path, classes = os.path.join(folder, 'batches.meta.txt'), ()
  if os.path.isfile(path):
    with open(path, encoding='utf-8-sig', errors='backslashreplace') as f:
      classes = tuple(filter(None, map(str.strip, f)))
  if (len(classes) < 2 or len(set(classes)) < len(classes) or not tests
      or tests == names):
    raise UserError(f'--dataset={folder} needs files *.bin to train on, others '
                    'named test*.bin, and the names of two classes or more in '
                    'batches.meta.txt, no two alike, a line each.')
  return _counted(Dataset(
      name=folder, title=os.path.basename(folder), folder=folder,
      train_files={name: None for name in names if name not in tests},
      eval_files=dict.fromkeys(tests), classes=classes), folder)


def _counted(dataset, folder):
  """Returns a data set with the numbers of records that its files have now."""
  def count(files):
    return {name: os.path.getsize(os.path.join(folder, name))
                  // dataset.record_bytes for name in files}

  check_files(dataset, folder, dataset.files)
  return dataclasses.replace(
      dataset, train_files=count(dataset.train_files),
      eval_files=count(dataset.eval_files))


def _own_pictures(folder, data_dir):
  """Returns the `Dataset` of pictures, which are converted if need be."""
  paths = {(part, name): files_at(os.path.join(folder, part, name))
           for part in ('train', 'test')
           for name in _class_folders(os.path.join(folder, part))}
  # In the same order whatever the language.
  classes = sorted({name for _, name in paths}, key=os.fsencode)
  if not 2 <= len(classes) <= 256:  # The label of a record is one byte.
    raise UserError(f'--dataset={folder} has {len(classes)} classes in '
                    'train/CLASS/ and test/CLASS/, not 2 to 256.')
  for name in classes:
    if not paths.get(('train', name)):
      raise UserError(f'--dataset={folder} has no files in train/{name}.')
    if not paths.get(('test', name)):
      say(f'{folder} has no files in test/{name}: that class is not evaluated.')
  listing = [
      (part, label, path, *_size_and_time(path))
      for part in ('train', 'test') for label, name in enumerate(classes)
      for path in paths.get((part, name), [])]
  # Another listing is another data set, and its records have another folder.
  digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
  title = os.path.basename(folder)
  dataset = Dataset(
      name=folder, title=title, folder=f'{title}-{digest}',
      train_files={'train.bin': None}, eval_files={'test.bin': None},
      # The names may be any bytes.
      classes=tuple(os.fsencode(name).decode('utf-8', 'backslashreplace')
                    for name in classes),
      make=functools.partial(_convert_pictures, listing))
  return _counted(dataset, maybe_download_and_extract(dataset, data_dir))


def _class_folders(folder):
  names = os.listdir(folder) if os.path.isdir(folder) else []
  return [name for name in names if not name.startswith('.')
          and os.path.isdir(os.path.join(folder, name))]


def files_at(path):
  """Returns the path of a file, or those of the visible files below a folder.

  Also of those behind links, but each folder once.
  """
  def refuse(error):
    raise error

  if not os.path.isdir(path):
    return [path]
  paths, seen = [], set(map(str, pathlib.Path(path).resolve().parents))
  for root, folders, names in os.walk(path, onerror=refuse, followlinks=True):
    if os.path.realpath(root) in seen:
      folders.clear()
      continue
    seen.add(os.path.realpath(root))
    folders[:] = sorted(name for name in folders if not name.startswith('.'))
    paths += [os.path.join(root, name) for name in sorted(names)
              if not name.startswith('.')]
  return paths


def _size_and_time(path):
  status = os.stat(path) if os.path.exists(path) else os.lstat(path)
  return status.st_size, status.st_mtime


def _convert_pictures(listing, dataset, downloads, folder):
  """Writes the records of picture files."""
  say(f'Converting {len(listing)} pictures of {dataset.name}')
  for part in ('test', 'train'):
    rows = [row for row in listing if row[0] == part]
    count = 0
    with open(os.path.join(folder, part + '.bin'), 'wb') as f:
      for _, label, path, *_ in rows:
        try:
          picture = read_picture(path)
        except Exception as error:  # Pillow has one for each kind of damage.
          say(f'Skipped {path}: {what_went_wrong(error)}')
          continue
        f.write(bytes([label]) + picture.tobytes())
        count += 1
    if not count:
      raise UserError(f'--dataset={dataset.name} has no picture that can be '
                      f'read in {part}/.')
    say(f'{count} of {len(rows)} files in {part}/ are pictures.')


def _write_synthetic(dataset, downloads, folder):
  """Writes pictures of `dataset.classes`, the same ones on every machine."""
  say(f'Generating the {dataset.name} data set.')
  random = np.random.default_rng(seed=1)
  for name, num_examples in dataset.files.items():
    labels = random.integers(len(dataset.classes), size=num_examples)
    _write_records(
        os.path.join(folder, name), labels, _draw_shapes(random, labels))


def _draw_shapes(random, labels):
  """Returns a picture for each label, [n, depth, height, width], 0 to 255.

  The shape has any place, size and colours, and there is much noise.
  """
  def uniform(low, high, *shape):
    return random.uniform(low, high, (len(labels),) + shape)

  # x and y run from -1 to 1 over the shape, which must survive a random crop.
  radius = uniform(6, 11, 1, 1)
  y, x = np.ogrid[-HEIGHT / 2:HEIGHT / 2, -WIDTH / 2:WIDTH / 2]
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
  light = uniform(-2, 2, 1, 1, 1) * np.arange(-WIDTH / 2, WIDTH / 2)
  noise = uniform(10, 40, 1, 1, 1) * random.standard_normal(
      (len(labels), DEPTH, HEIGHT, WIDTH))
  background = uniform(0, 255, 3, 1, 1)
  return np.clip(background + shape * colour + light + noise, 0, 255)


# Pictures of any size, from files, and for a model that is served.


def read_picture(path):
  """Returns a picture file as uint8 [3, 32, 32], whatever its size.

  It is upright, as its EXIF data say, and fitted as `fit` does it. Pillow's
  exceptions tell why that cannot be done.
  """
  if not os.path.isfile(path):  # A pipe would never end.
    raise FileNotFoundError('not a file' if os.path.exists(path)
                            else 'no such file')
  with PIL.Image.open(path) as image:
    upright = PIL.ImageOps.exif_transpose(image)
    if upright.mode == 'F' or upright.mode == 'I' and image.format == 'TIFF':
      raise ValueError('it has 32 bits a pixel, and nothing says what is white')
    if upright.mode.startswith('I'):  # 16 bits, of which 8 are enough.
      upright = PIL.Image.fromarray(
          (np.asarray(upright) >> 8).astype(np.uint8))
    fitted = PIL.ImageOps.fit(upright.convert('RGB'), (WIDTH, HEIGHT),
                              PIL.Image.Resampling.BILINEAR)
  return np.moveaxis(np.asarray(fitted), 2, 0)


def decode(contents):
  """Decodes the bytes of a picture file, a scalar string, and fits them."""
  image = tf.io.decode_image(contents, DEPTH, expand_animations=False)
  return fit(tf.ensure_shape(image, [None, None, DEPTH])[tf.newaxis])


def fit(images):
  """Scales pictures until they cover 32x32 pixels, and cuts off the rest.

  Takes [batch, height, width, 3], 0 to 255, of any type; returns whole numbers,
  float32 [batch, 3, 32, 32]. Pictures of 32x32 pixels are unchanged. It is
  `tf.raw_ops.ScaleAndTranslate` with a triangle for kernel and antialiasing, in
  operations that TensorFlow Lite has: a matrix product for each direction.
  """
  shape = tf.cast(tf.shape(images)[1:3], tf.float32)
  scale = tf.reduce_max([HEIGHT, WIDTH] / shape)
  rows = _resampling(shape[0], HEIGHT, scale)
  columns = _resampling(shape[1], WIDTH, scale)
  planes = tf.transpose(tf.cast(images, tf.float32), [0, 3, 1, 2])
  fitted = tf.matmul(tf.matmul(rows, planes), columns, transpose_b=True)
  return tf.round(tf.clip_by_value(fitted, 0, 255))


def _resampling(size, new_size, scale):
  """Returns the share of each old pixel in each new one, [new_size, size]."""
  old = tf.range(size) + 0.5
  new = tf.range(new_size, dtype=tf.float32) + 0.5
  centres = (new - new_size / 2) / scale + size / 2  # Among the old pixels.
  distances = tf.abs(centres[:, tf.newaxis] - old)
  shares = tf.nn.relu(1 - distances * tf.minimum(scale, 1))
  return shares / tf.reduce_sum(shares, axis=1, keepdims=True)


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
        DATA_URL:
        'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'},
    make=_extract)

CIFAR10_HOLDOUT = dataclasses.replace(  # To choose settings by.
    CIFAR10, name='cifar10_holdout', eval_files={'data_batch_5.bin': 10000},
    train_files={'data_batch_%d.bin' % i: 10000 for i in range(1, 5)})

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

# The same pictures with the labels of their superclasses.
CIFAR100_COARSE = dataclasses.replace(
    CIFAR100, name='cifar100_coarse', label_byte=0, classes=tuple("""
        aquatic_mammals fish flowers food_containers fruit_and_vegetables
        household_electrical_devices household_furniture insects
        large_carnivores large_man-made_outdoor_things
        large_natural_outdoor_scenes large_omnivores_and_herbivores
        medium_mammals non-insect_invertebrates people reptiles small_mammals
        trees vehicles_1 vehicles_2""".split()))

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
    make=_convert_svhn,
    needs='scipy')

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
            for dataset in (CIFAR10, CIFAR10_HOLDOUT, CIFAR100, CIFAR100_COARSE,
                            SVHN, SYNTHETIC)}


def described_dataset():
  """Returns CIFAR-10, or what a script has put in its place.

  Its files may have any number of records. How many classes they have, and how
  many examples an epoch, this module's constants tell.
  """
  return dataclasses.replace(
      CIFAR10, train_files=dict.fromkeys(CIFAR10.train_files),
      eval_files=dict.fromkeys(CIFAR10.eval_files),
      classes=tuple(map(str, range(NUM_CLASSES))),
      examples_per_epoch=NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN, make=None)


# Reading it.


def check_files(dataset, folder, files):
  """Returns the paths of a data set's files, if nothing is wrong with them.

  A UserError says which file is missing, has the wrong size, or has a label
  that the data set does not know: here, before a thread trips over it.
  """
  paths = [os.path.join(folder, name) for name in files]
  for path in paths:
    try:
      flaw = _flaw_of_file(path, dataset)
    except OSError as error:
      raise UserError(f'{path} cannot be read: {error.strerror}.') from error
    if flaw:  # To delete a reader's own data is no advice.
      advice = ': delete it and start again to get it anew'
      raise UserError(f'{path} {flaw}{advice if dataset.make else ""}.')
  return paths


def _flaw_of_file(path, dataset):
  """Returns what is wrong with a file, or None."""
  if not os.path.isfile(path):
    return 'is not a file' if os.path.exists(path) else 'is missing'
  size_bytes, name = os.path.getsize(path), os.path.basename(path)
  if dataset.files[name] is None:
    if size_bytes == 0 or size_bytes % dataset.record_bytes:
      return (f'has {size_bytes} bytes, not a multiple of '
              f'{dataset.record_bytes}')
  elif size_bytes != dataset.size_bytes(name):
    return f'has {size_bytes} bytes, not {dataset.size_bytes(name)}'
  labels = np.memmap(path, np.uint8, 'r').reshape(
      -1, dataset.record_bytes)[:, dataset.label_byte]
  wrong, = np.nonzero(labels >= len(dataset.classes))
  if wrong.size:
    return (f'has the label {labels[wrong[0]]} in record {wrong[0]}, not one '
            f'of 0 to {len(dataset.classes) - 1}')
  return None


def read_cifar10(filename_queue, dataset=None):
  """Reads and parses one record.

  Args:
    filename_queue: a queue of strings, the paths of the files to read.
    dataset: the `Dataset` of the files; by default CIFAR-10.

  Returns:
    An object that stands for one example, with the attributes
      height, width, depth: int, 32, 32 and 3.
      key: scalar string Tensor, FILE:RECORD.
      label: int32 Tensor of shape [1].
      uint8image: uint8 Tensor of shape [height, width, depth].
  """
  dataset = dataset or CIFAR10
  reader = tf.FixedLengthRecordReader(dataset.record_bytes)
  key, value = reader.read(filename_queue)
  planes, label = parse_records([value], dataset)
  return types.SimpleNamespace(
      height=HEIGHT, width=WIDTH, depth=DEPTH, key=key, label=label,
      uint8image=tf.stack(tf.unstack(planes[0]), axis=2))


def parse_records(values, dataset):
  """Splits strings [n] into planes, uint8 [n, 3, 32, 32], and int32 labels [n].
  """
  records = tf.ensure_shape(
      tf.decode_raw(values, tf.uint8), [None, dataset.record_bytes])
  labels = tf.cast(records[:, dataset.label_byte], tf.int32)
  planes = tf.reshape(records[:, dataset.label_bytes:],
                      [-1, DEPTH, HEIGHT, WIDTH])
  return planes, labels


def _fill(queue, paths, dataset, shuffle):
  """Adds a thread to the session that moves records from files to a queue."""
  filename_queue = tf.train.string_input_producer(
      paths, shuffle=shuffle, name='file_names')
  reader = tf.FixedLengthRecordReader(dataset.record_bytes)
  _, values = reader.read_up_to(filename_queue, _RECORDS_PER_READ)
  tf.train.add_queue_runner(
      tf.train.QueueRunner(queue, [queue.enqueue_many([values])]))


# Distorting it: chance first, then arithmetic.


class Distortions(typing.NamedTuple):
  """How to distort each image of a batch."""
  top: tf.Tensor         # int32 [batch], in pixels: the corner of the crop.
  left: tf.Tensor
  flip: tf.Tensor        # bool [batch], whether to mirror it left to right.
  brightness: tf.Tensor  # float32 [batch], added to each value.
  contrast: tf.Tensor    # float32 [batch], factor of each value's distance from
                         # its channel's mean.


def draw_distortions(batch_size, image_size=None, crop_margin=0):
  """Draws the `Distortions` of a training batch; see `distorted_inputs`."""
  def uniform(low, high, dtype=tf.float32):
    return tf.random_uniform([batch_size], low, high, dtype)

  last = HEIGHT - (image_size or IMAGE_SIZE) + crop_margin
  return Distortions(
      top=uniform(-crop_margin, last + 1, tf.int32),
      left=uniform(-crop_margin, last + 1, tf.int32),
      flip=uniform(0, 1) < 0.5,
      brightness=uniform(-63, 63),
      contrast=uniform(0.2, 1.8))


def distort(planes, distortions, image_size=None):
  """Crops, flips, recolours and standardizes a batch of images.

  It works plane by plane, as records have them: a CPU runs along a row of
  pixels much faster than from one channel of a pixel to the next.

  Args:
    planes: [batch, 3, 32, 32], 0 to 255, of any type.
    distortions: the batch's `Distortions`.
    image_size: int, how much to leave of each side; by default IMAGE_SIZE.

  Returns:
    float32 [batch, image_size, image_size, 3], each image with mean 0 and,
    unless it is all of one grey, standard deviation 1.
  """
  crops = _crop_and_flip(planes, distortions, image_size or IMAGE_SIZE)
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
  """Returns float32 [batch, 3, image_size, image_size] for `distort`."""
  steps = tf.range(image_size)
  rows = distortions.top[:, tf.newaxis] + steps
  columns = distortions.left[:, tf.newaxis] + tf.where_v2(
      distortions.flip[:, tf.newaxis], steps[::-1], steps)
  # Beyond its edges, a picture goes on with the last pixels that it has.
  rows, columns = (tf.clip_by_value(pixels, 0, last) for pixels, last in (
      (rows, HEIGHT - 1), (columns, WIDTH - 1)))
  # Whole rows are gathered. Columns, single pixels, are not: a product with a
  # matrix of zeros and ones selects them just as exactly, and faster.
  values = tf.cast(tf.gather(planes, rows, axis=2, batch_dims=1), tf.float32)
  selected = tf.matmul(tf.reshape(values, [-1, DEPTH * image_size, WIDTH]),
                       tf.one_hot(columns, WIDTH, axis=1))
  return tf.reshape(selected, [-1, DEPTH, image_size, image_size])


# How a view differs from the central crop: pixels down and right, as far as the
# picture reaches, and whether it is mirrored.
CENTRAL_VIEW = ((0, 0, False),)
TEN_VIEWS = tuple(
    (down, right, flip) for flip in (False, True)
    for down, right in [(0, 0), (-2, -2), (-2, 2), (2, -2), (2, 2)])


def crop_views(planes, views=CENTRAL_VIEW, image_size=None):
  """Crops and standardizes pictures as evaluation shows them to the network.

  Krizhevsky et al. 2012, section 4.1, average over five crops and their mirror
  images. Theirs are in the corners, but of 24 pixels, nearer ones did better.

  Args:
    planes: [batch, 3, 32, 32], 0 to 255, of any type.
    views: what to make of each picture, `CENTRAL_VIEW` or `TEN_VIEWS`.
    image_size: int, how much to leave of each side; by default IMAGE_SIZE.

  Returns:
    float32 [len(views) * batch, image_size, image_size, 3], view by view.
  """
  image_size = image_size or IMAGE_SIZE
  room = HEIGHT - image_size
  crops = []
  for down, right, flip in views:
    top, left = (min(max(room // 2 + shift, 0), room)
                 for shift in (down, right))
    crop = planes[:, :, top:top + image_size, left:left + image_size]
    crops.append(crop[..., ::-1] if flip else crop)
  standardized = tf.image.per_image_standardization(tf.concat(crops, axis=0))
  return tf.transpose(standardized, [0, 2, 3, 1])


# The two inputs of the network.


def distorted_inputs(
    data_dir, batch_size, dataset=None, image_size=None, crop_margin=0,
    min_fraction_of_examples_in_queue=MIN_FRACTION_OF_EXAMPLES_IN_QUEUE,
    deterministic=False):
  """Builds the input of training: batches drawn at random, without end.

  Args:
    data_dir: folder with the data set's files.
    batch_size: images a batch.
    dataset: the `Dataset`; by default see `described_dataset`.
    image_size: pixels of each side to leave; by default IMAGE_SIZE.
    crop_margin: how many pixels a crop may reach beyond the picture's edges.
    min_fraction_of_examples_in_queue: how much of an epoch stays in the shuffle
      queue.
    deterministic: whether a graph with a seed gives the same batches each time.
      They are drawn from a full queue then, and distorted in one thread.

  Returns:
    images: float32 [batch_size, image_size, image_size, 3].
    labels: int32 [batch_size].

  Raises:
    UserError: a file is not as the data set's description says.
  """
  dataset = dataset or described_dataset()
  paths = check_files(dataset, data_dir, dataset.train_files)
  min_queue_examples = int(
      dataset.num_train_examples * min_fraction_of_examples_in_queue)
  capacity = min_queue_examples + (1 if deterministic else 3 * batch_size)
  # The operations inside of a thread use all processors, too.
  num_threads = 1 if deterministic else max(1, os.cpu_count() // 4)
  with tf.name_scope('input'):
    queue = tf.RandomShuffleQueue(
        capacity, min_queue_examples, [tf.string], [[]], name='shuffle_queue')
    tf.summary.scalar('shuffle_queue_fullness', queue.size() / capacity)
    _fill(queue, paths, dataset, shuffle=True)
    planes, labels = parse_records(queue.dequeue_many(batch_size), dataset)
    distortions = draw_distortions(batch_size, image_size, crop_margin)
    images = distort(planes, distortions, image_size)
    batches = tf.FIFOQueue(
        _BATCHES_AHEAD, [images.dtype, labels.dtype],
        [images.shape, labels.shape], name='batches')
    enqueue = batches.enqueue([images, labels])
    tf.train.add_queue_runner(
        tf.train.QueueRunner(batches, [enqueue] * num_threads))
    images, labels = batches.dequeue()
  say(f'Filling queue with {min_queue_examples} {dataset.title} images before '
      'starting to train. This will take a few seconds.')
  return images, labels


def inputs(eval_data, data_dir, batch_size, dataset=None, image_size=None,
           views=CENTRAL_VIEW):
  """Builds the input of evaluation: all examples in order, again and again.

  Args:
    eval_data: whether to read the files to evaluate on, or those to train on.
    data_dir, batch_size, dataset, image_size: as for `distorted_inputs`.
    views: what to make of each example, see `crop_views`.

  Returns:
    images: float32 [len(views) * batch_size, image_size, image_size, 3], view
      by view.
    labels: int32 [batch_size].

  Raises:
    UserError: a file is not as the data set's description says.
  """
  dataset = dataset or described_dataset()
  files = dataset.eval_files if eval_data else dataset.train_files
  paths = check_files(dataset, data_dir, files)
  with tf.name_scope('input'):
    queue = tf.FIFOQueue(
        4 * max(batch_size, _RECORDS_PER_READ), [tf.string], [[]], name='queue')
    _fill(queue, paths, dataset, shuffle=False)
    planes, labels = parse_records(queue.dequeue_many(batch_size), dataset)
    images = crop_views(planes, views, image_size)
  return images, labels


# What all scripts share: how to tell the user, and how to write files.


class UserError(ValueError):
  """A mistake that the user can mend. Its text is one line that says how."""


speaker = ''  # What each line begins with: in a cluster, the task's name.


def say(text, file=None):
  """Prints a line, as far as the console goes: it may be ASCII, or closed.

  A line stays one line, whatever is in the names that it tells.
  """
  file = file or sys.stdout
  encoding = getattr(file, 'encoding', None) or 'utf-8'
  text = re.sub('[\x00-\x1f\x7f-\x9f\u2028\u2029]', ' ', text)
  text = text.encode(encoding, 'backslashreplace').decode(encoding)
  try:
    print(speaker + text, file=file, flush=True)
  except OSError as error:
    if error.errno in (errno.EPIPE, errno.EIO):
      with open(os.devnull, 'w') as devnull:
        os.dup2(devnull.fileno(), file.fileno())


def is_watched():
  """Returns whether the console is a terminal."""
  return sys.stdout is not None and sys.stdout.isatty()


def what_went_wrong(error):
  """Returns what an error says in one line, without TensorFlow's stack."""
  message = getattr(error, 'message', None) or str(error) or repr(error)
  before_stack = re.search(r'^(.*)\n\s*\[\[\{\{node', message, re.MULTILINE)
  return before_stack[1] if before_stack else message.splitlines()[0]


@contextlib.contextmanager
def locked(folder, flag, wait=False):
  """Lets one process at a time into a folder, which is made if need be.

  The system takes the lock back when the process ends, however it ends; to
  remove its file could let two processes in. Folders behind a URL and systems
  without `flock` do without. A UserError names the flag if the folder cannot be
  written to, or another process has the lock and `wait` is false.
  """
  path = os.path.join(folder, f'.{flag}.lock')
  flag = f'--{flag}={folder}'
  try:
    tf.io.gfile.makedirs(folder)
    lock = contextlib.nullcontext()
    if fcntl and '://' not in folder:
      lock = open(path, 'a+', opener=lambda path, flags: os.open(
          path, flags | os.O_NOFOLLOW, 0o666))
  except (OSError, tf.errors.OpError) as error:
    raise UserError(f'{flag} cannot be written to: '
                    f'{what_went_wrong(error)}') from error
  with lock as file:
    if file:
      _lock(file, flag, wait)
    yield


def _lock(file, flag, wait):
  """Locks an open file, and writes the number of this process to it."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    holder = f'process {file.read()} uses {flag}'
    if not wait:
      raise UserError(
          f'{holder}: end it first, or name another folder.') from None
    say(f'Waiting: {holder}.')
    fcntl.flock(file, fcntl.LOCK_EX)
  except OSError as error:  # Some file systems have no locks.
    say(f'{flag} cannot be locked ({error.strerror}): take care that no other '
        'process writes to it.')
    return
  with contextlib.suppress(OSError):  # A full disk can do without the number.
    os.truncate(file.fileno(), 0)
    os.write(file.fileno(), b'%d' % os.getpid())


def write_file(path, write, is_trial=False):
  """Writes a text file, whole or not at all: `write` gets it open.

  It takes its name when it is complete. A UserError names a path that is in the
  way of that: a link, which may lead out of the folder, or no file.
  """
  if os.path.islink(path) or os.path.exists(path) and not os.path.isfile(path):
    raise UserError(f'{path} is no regular file: remove it, or name another.')
  unfinished = path + '.tmp'
  try:
    with contextlib.suppress(tf.errors.NotFoundError):
      tf.io.gfile.remove(unfinished)
    with tf.io.gfile.GFile(unfinished, 'w') as f:
      write(f)
    if is_trial:  # Of whether it can be done.
      tf.io.gfile.remove(unfinished)
    else:
      tf.io.gfile.rename(unfinished, path, overwrite=True)
  except tf.errors.OpError as error:
    raise UserError(f'{path} cannot be written: '
                    f'{what_went_wrong(error)}') from error
