"""Feeds the suite mutated files and flags, and stops at the first one it takes.

    python tests/fuzz.py [SEED]     # 10,000 record files and so on

Whatever is wrong must be refused with one line: no traceback, no hang, no
silent acceptance, no file outside of its folder. test_input.py runs a little.
"""
import contextlib
import dataclasses
import gzip
import io
import os
import pathlib
import random
import sys
import tarfile
import tempfile

import numpy as np

from conftest import (
    FLAGS, SCRIPTS, TINY, contents, forgotten_flags, write_random)
import cifar10_input
import cifar10_train
from cifar10_input import UserError, tf

DATASET = dataclasses.replace(
    TINY, train_files={'a.bin': 12, 'b.bin': 5}, eval_files={'test.bin': 7},
    make=cifar10_input.CIFAR10.make)
FILES = ['%s/%s' % (DATASET.folder, name) for name in DATASET.files]
STRANGERS = FILES[:1] + [
    '../evil', '/tmp/evil', 'evil', DATASET.folder, FILES[0] + '/../../../evil']
KINDS = [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE,
         tarfile.CHRTYPE, tarfile.DIRTYPE]
WEIGHTS = np.random.default_rng(0).standard_normal([50, 50])
VALUES = [
    '', '0', '-1', '1', '7', '1.5', '1e9', '-1e-9', 'nan', 'inf', 'true',
    'maybe', 'fast', 'test', 'None', '0x10', '\u4f60', 'a b', '=', '--', '[*]',
    '9' * 30, '-' + '9' * 30, '1' * 5000, 'http://', 'ram://a', 'f' * 64]


def mutate(chance, content):
  """Returns bytes that differ in one of the ways in which files go wrong."""
  start, other = (chance.randrange(len(content)) for _ in range(2))
  end = start + chance.choice([1, 1, 4, 100, len(content)])
  before, part, after = content[:start], content[start:end], content[end:]
  bit = bytes([content[start] ^ 1 << chance.randrange(8)])
  noise = chance.randbytes(len(part))
  return chance.choice([
      before,  # Cut short.
      before + bit + content[start + 1:],
      before + noise + after,
      before + bytes(len(part)) + after,  # A hole in a sparse file.
      before + noise + part + after,
      before + after,
      before + content[other:other + len(part)] + after])


def refusal(function, *args):
  """Calls a function, and returns the text of its UserError, or None."""
  try:
    function(*args)
  except UserError as error:
    assert '\n' not in str(error), error
    return str(error)


def fuzz_records(chance, folder):
  """Record files are refused if and only if a size or a label is wrong."""
  write_random(DATASET, folder)
  path = folder / chance.choice(list(DATASET.files))
  content = mutate(chance, path.read_bytes())
  path.write_bytes(content)
  wrong = (len(content) != DATASET.size_bytes(path.name)
           or max(content[::DATASET.record_bytes]) > 9)
  message = refusal(
      cifar10_input.check_files, DATASET, str(folder), DATASET.files)
  assert (str(path) in message) if wrong else message is None, message
  return wrong


def fuzz_archives(chance, folder):
  """Of archives with a stranger in them, only the data set's files are written.

  (What is in these is for the checksum to say, before anything is extracted.)
  """
  path, destination = folder / 'archive.tar.gz', folder / 'in' / 'here'
  destination.mkdir(parents=True)
  members = [(name, tarfile.REGTYPE) for name in FILES]
  stranger = (chance.choice(STRANGERS), chance.choice(KINDS))
  members.insert(chance.randrange(4), stranger)
  with tarfile.open(path, 'w') as tar:
    for name, kind in members:
      member = tarfile.TarInfo(name)
      member.type, member.linkname = kind, '../../evil'
      if (name, kind) != stranger:
        member.size = DATASET.size_bytes(os.path.basename(name))
      tar.addfile(member, io.BytesIO(bytes(member.size)))
  steps = [lambda content: gzip.compress(content, 1),
           lambda content: mutate(chance, content)]
  for step in chance.sample(steps, 2):
    path.write_bytes(step(path.read_bytes()))
  with contextlib.redirect_stdout(io.StringIO()):
    message = refusal(DATASET.make, DATASET, [str(path)], str(destination))
  assert message is None or str(path) in message, message
  path.unlink()
  sizes = {name: len(content) for name, content in contents(folder).items()}
  expected = {'in/here/' + name: DATASET.size_bytes(name)
              for name in DATASET.files}
  assert sizes == expected or message and set(sizes) <= set(expected), sizes
  return bool(message)


def fuzz_checkpoints(chance, folder):
  """A mutated checkpoint gives way to the one before."""
  with tf.Graph().as_default(), tf.Session() as session:
    tf.get_variable('weights', initializer=WEIGHTS)
    session.run(tf.global_variables_initializer())
    saver = tf.train.Saver()
    for step in (1, 2):
      newest = saver.save(session, str(folder / 'model.ckpt'), step)
  path = chance.choice(sorted(folder.glob('model.ckpt-2.[id]*')))
  path.write_bytes(mutate(chance, path.read_bytes()))
  with contextlib.redirect_stderr(io.StringIO()):
    found = cifar10_train.latest_checkpoint(str(folder))
  assert (tf.train.load_variable(found, 'weights') == WEIGHTS).all()
  return found != newest  # It may differ in padding alone.


def fuzz_flags(chance, folder):
  """Wrong flags are one line that names one; others are as their type says."""
  script = chance.choice(SCRIPTS)
  with forgotten_flags():
    foreign = set(FLAGS) - {'batch_size', 'data_dir', 'use_fp16'}
    script.define_flags()
    names = sorted(set(FLAGS) - foreign)
  argv = ['--%s=%s' % (chance.choice(names), chance.choice(VALUES))
          for _ in range(chance.randrange(1, 4))]
  argv += chance.choice([[], [], [], ['--nonsense'], ['word']])
  sys.argv = ['script.py'] + argv
  with forgotten_flags(), contextlib.redirect_stderr(io.StringIO()) as stderr:
    try:
      cifar10_train.run_script(lambda argv: 0, script.define_flags)
    except SystemExit as end:
      code = end.code
    for name in ('batch_size', 'max_steps', 'num_examples', 'num_gpus'):
      assert code or name not in FLAGS or FLAGS[name].value >= 1, argv
  case = argv, code, stderr.getvalue()
  assert code in (0, 2) and case[2].count('\n') == code / 2, case
  assert code == 0 or any(
      flag.split('=')[0].strip('-') in case[2] for flag in argv), case
  return code == 2


def fuzz(kind, seed, count):
  """Returns how many of so many mutated ones were refused."""
  chance = random.Random('%s %d' % (kind, seed))
  refused = 0
  for _ in range(count):
    with tempfile.TemporaryDirectory() as folder:
      refused += globals()['fuzz_' + kind](chance, pathlib.Path(folder))
  return refused


if __name__ == '__main__':
  seed = int((sys.argv + ['1'])[1])
  for kind, count in (('records', 10000), ('archives', 10000),
                      ('checkpoints', 1000), ('flags', 1000)):
    print('%s: %d of %d refused, nothing wrong taken' % (
        kind, fuzz(kind, seed, count), count), flush=True)
