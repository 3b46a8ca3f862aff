"""Feeds the suite mutated files and flags, and stops at the first one it takes.

    python tests/fuzz.py                # 10,000 record files and so on
    python tests/fuzz.py --seed=7 --records=100 --archives=0

Whatever is wrong must be refused with one line: no traceback, no hang, no
silent acceptance, no file outside of its folder. `tests/test_fuzz.py` does a
little of this in every run of the tests.
"""
import argparse
import contextlib
import dataclasses
import io
import os
import pathlib
import random
import sys
import tarfile
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cifar10
import cifar10_eval
import cifar10_input
import cifar10_multi_gpu_train
import cifar10_train
from cifar10_input import UserError, tf

FLAGS = tf.flags.FLAGS
COUNTS = {'records': 10000, 'archives': 10000, 'checkpoints': 1000,
          'flags': 1000}

DATASET = dataclasses.replace(
    cifar10_input.SYNTHETIC, name='fuzz', folder='fuzz-bin',
    train_files={'a.bin': 12, 'b.bin': 5}, eval_files={'test.bin': 7})


def mutate(chance, content):
  """Returns bytes that differ in one of the ways in which files go wrong."""
  content = bytearray(content)
  position = chance.randrange(len(content))
  length = chance.choice([1, 1, 4, 100, len(content)])
  kind = chance.randrange(7)
  if kind == 0:  # Cut.
    del content[position:]
  elif kind == 1:  # A bit.
    content[position] ^= 1 << chance.randrange(8)
  elif kind == 2:  # Some bytes.
    new = chance.randbytes(min(length, len(content) - position))
    content[position:position + len(new)] = new
  elif kind == 3:  # A hole in a sparse file.
    new = bytes(min(length, len(content) - position))
    content[position:position + len(new)] = new
  elif kind == 4:  # Something in between.
    content[position:position] = chance.randbytes(length)
  elif kind == 5:  # Something left out.
    del content[position:position + length]
  else:  # One part in the place of another.
    other = chance.randrange(len(content))
    part = content[other:other + length]
    content[position:position + len(part)] = part
  return bytes(content)


@contextlib.contextmanager
def refusal():
  """Yields a list, which has the message if a UserError came."""
  messages = []
  try:
    yield messages
  except UserError as error:
    messages.append(str(error))
    assert '\n' not in messages[0], messages[0]


def fuzz_records(chance, count, folder):
  """Record files: refused if and only if a size or a label is wrong."""
  names = list(DATASET.train_files)
  refused = 0
  for i in range(count):
    place = folder / ('records_%d' % i)  # A new one: mtime is coarse.
    place.mkdir()
    wrong = False
    for name in names:
      records = np.random.default_rng(chance.randrange(1 << 32)).integers(
          0, 256, [DATASET.files[name], DATASET.record_bytes], np.uint8)
      records[:, 0] %= 10
      content = records.tobytes()
      if chance.random() < 0.5:
        content = mutate(chance, content)
      (place / name).write_bytes(content)
      wrong |= (len(content) != DATASET.size_bytes(name)
                or max(content[::DATASET.record_bytes], default=0) > 9)
    with refusal() as messages:
      cifar10_input.check_files(DATASET, str(place), names)
    assert bool(messages) == wrong, (i, messages)
    assert not wrong or str(place) in messages[0]
    refused += wrong
    for name in names:
      (place / name).unlink()
    place.rmdir()
  return refused


def _archive(chance):
  """Returns the bytes of a tar file with the data set and a stranger."""
  archive = io.BytesIO()
  stranger = chance.choice([
      '../evil', '/tmp/evil', 'evil', DATASET.folder + '/../../evil',
      DATASET.folder + '/a.bin', DATASET.folder])
  kind = chance.choice([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
                        tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
  with tarfile.open(fileobj=archive, mode='w') as tar:
    members = [(DATASET.folder + '/' + name, DATASET.size_bytes(name),
                tarfile.REGTYPE) for name in DATASET.files]
    members.insert(chance.randrange(4), (stranger, 10, kind))
    for name, size, kind in members:
      member = tarfile.TarInfo(name)
      member.type, member.linkname = kind, '../../evil'
      member.size = size if kind == tarfile.REGTYPE else 0
      tar.addfile(member, io.BytesIO(bytes(size)))
  return archive.getvalue()


def fuzz_archives(chance, count, folder):
  """Archives: nothing but the files, in full size, is ever written.

  (What is in them is for the checksum to say, before anything is extracted.)
  """
  import gzip
  destination, path = folder / 'in' / 'here', folder / 'archive.tar.gz'
  destination.mkdir(parents=True)
  refused = 0
  for i in range(count):
    content = _archive(chance)
    if chance.random() < 0.5:
      content = gzip.compress(mutate(chance, content), 1)
    else:
      content = mutate(chance, gzip.compress(content, 1))
    path.write_bytes(content)
    with refusal() as messages, contextlib.redirect_stdout(io.StringIO()):
      cifar10_input._extract(DATASET, [str(path)], str(destination))
    refused += bool(messages)
    assert not messages or str(path) in messages[0]
    written = {p.name: p.lstat().st_size for p in destination.iterdir()}
    assert set(written) <= set(DATASET.files), (i, written)
    assert messages or written == {
        name: DATASET.size_bytes(name) for name in DATASET.files}, (i, written)
    assert sorted(os.listdir(folder)) == ['archive.tar.gz', 'in'], i
    assert os.listdir(folder / 'in') == ['here'], i
    for name in written:
      (destination / name).unlink()
  return refused


def fuzz_checkpoints(chance, count, folder):
  """Checkpoints: a mutated one gives way to the one before."""
  values = np.random.default_rng(0).standard_normal([3, 50, 20])
  with tf.Graph().as_default(), tf.Session() as session:
    for i, value in enumerate(values):
      tf.get_variable('v%d' % i, initializer=value)
    session.run(tf.global_variables_initializer())
    saver = tf.train.Saver()
    for step in (1, 2):
      saver.save(session, str(folder / 'model.ckpt'), step)
  refused = 0
  for i in range(count):
    path = folder / ('model.ckpt-2' + chance.choice([
        '.index', '.data-00000-of-00001']))
    sound = path.read_bytes()
    path.write_bytes(mutate(chance, sound))
    with contextlib.redirect_stderr(io.StringIO()):
      found = cifar10.latest_checkpoint(str(folder))
    if found.endswith('-2'):  # Then it may differ in padding alone.
      for j, value in enumerate(values):
        assert (tf.train.load_variable(found, 'v%d' % j) == value).all(), i
    else:
      assert found == str(folder / 'model.ckpt-1'), (i, found)
      refused += 1
    path.write_bytes(sound)
  return refused


def _some_value(chance):
  return chance.choice([
      '', '0', '-1', '1', '7', '1.5', '1e9', '-1e-9', 'nan', 'inf', 'true',
      'maybe', 'cifar10', 'test', 'None', '0x10', '\u4f60', 'a b', '=', '--',
      '9' * 30, '-' + '9' * 30, '1' * 5000, 'http://', 'f' * 64,
      str(chance.randrange(-10 ** 6, 10 ** 6))])


def fuzz_flags(chance, count, folder):
  """Flags: one line that names one of them, or they are as their type says."""
  scripts = [cifar10_train, cifar10_multi_gpu_train, cifar10_eval]
  refused = 0
  for i in range(count):
    script = chance.choice(scripts)
    names = [flag.name for module in (script, cifar10, cifar10_train)
             for flag in FLAGS.get_flags_for_module(module.__name__)]
    argv = ['--%s=%s' % (chance.choice(names), _some_value(chance))
            for _ in range(chance.randrange(1, 4))]
    if chance.random() < 0.1:
      argv.append(chance.choice(['--no_such_flag', 'word', '-', '--', '-x']))
    before = FLAGS.flag_values_dict()
    stderr = io.StringIO()
    sys.argv = ['script.py'] + argv
    try:
      with contextlib.redirect_stderr(stderr), \
          contextlib.redirect_stdout(io.StringIO()):
        cifar10.run(lambda argv: 0)
    except SystemExit as end:
      code = end.code
    finally:
      for name in set(FLAGS) - set(before):
        delattr(FLAGS, name)
    if code == 2:
      refused += 1
      assert stderr.getvalue().count('\n') == 1, (argv, stderr.getvalue())
      assert any(flag.split('=')[0].strip('-') in stderr.getvalue()
                 for flag in argv), (argv, stderr.getvalue())
    else:
      assert (code, stderr.getvalue()) == (0, ''), (argv, stderr.getvalue())
      for name in ('batch_size', 'max_steps', 'log_frequency', 'num_examples',
                   'save_checkpoint_secs', 'num_gpus'):
        assert FLAGS[name].value >= 1, (argv, name)
    for name, value in before.items():
      FLAGS[name].value = value
  return refused


def fuzz(kind, seed, count):
  """Returns how many of the mutated ones were refused."""
  with tempfile.TemporaryDirectory() as folder:
    chance = random.Random('%s %d' % (kind, seed))
    return globals()['fuzz_' + kind](chance, count, pathlib.Path(folder))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--seed', type=int, default=1)
  for kind, count in COUNTS.items():
    parser.add_argument('--' + kind, type=int, default=count)
  args = parser.parse_args()
  FLAGS(['fuzz'])
  for kind in COUNTS:
    count = getattr(args, kind)
    print('%s: %d of %d refused, nothing wrong taken' % (
        kind, fuzz(kind, args.seed, count), count), flush=True)


if __name__ == '__main__':
  main()
