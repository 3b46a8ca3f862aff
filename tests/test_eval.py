"""cifar10_eval: each example counts once, each checkpoint is evaluated once.

The checkpoints are made by hand, after what the original publishes of its own:
networks that answer always the same, and one whose answers a graph of this file
foretells.
"""
import csv
import json
import os
import re
import shutil
import signal
import time
import types

import numpy as np
import pytest

from conftest import (
    CORRECT_LINE, PRECISION_LINE, TINY, events, finish, is_one_line)
import cifar10
import cifar10_eval
from cifar10_input import SYNTHETIC, tf
import cifar10_train

CLASS_LINE = re.compile(
    r'  (\w+) +([01]\.\d{3}) \((\d+)/(\d+)\) +([01]\.\d{3}) \((\d+)/(\d+)\)')

# The variables of the original, which sees 24 pixels of each side.
SHAPES = {
    'conv1/weights': [5, 5, 3, 64], 'conv1/biases': [64],
    'conv2/weights': [5, 5, 64, 64], 'conv2/biases': [64],
    'local3/weights': [2304, 384], 'local3/biases': [384],
    'local4/weights': [384, 192], 'local4/biases': [192],
    'softmax_linear/weights': [192, 10], 'softmax_linear/biases': [10],
}

# A view is the corner of the crop, and -1 to mirror it.
CENTRE = [(4, 4, 1)]
TEN_VIEWS = [(top, left, step) for step in (1, -1) for top, left in (
    (4, 4), (2, 2), (2, 6), (6, 2), (6, 6))]


def always(label):
  """Returns the variables of a network that knows one answer."""
  values = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
  return {**values, 'softmax_linear/biases': np.eye(10, dtype='f')[label]}


def opinionated(image_size=24):
  """Returns the variables of a network that gives several answers."""
  random = np.random.default_rng(0)
  shapes = {**SHAPES, 'local3/weights': [4 * image_size ** 2, 384]}
  return {name: random.normal(0, 0.08, shape).astype(np.float32)
          for name, shape in shapes.items()}


@pytest.fixture
def save(tmp_path):
  """Function that adds a checkpoint to the run that `evaluate` evaluates.

  The variables are not their averages if they are given, too. What else a
  trainer tells of the run are keywords.
  """
  def save(step, averages, variables=None, **run):
    with tf.Graph().as_default(), tf.Session() as session:
      for suffix, values in [
          ('', variables or averages), ('/ExponentialMovingAverage', averages)]:
        for name, value in values.items():
          tf.get_variable(name + suffix, initializer=value)
      tf.get_variable('total_loss/avg', initializer=4.6)
      tf.get_variable('global_step', initializer=np.int64(step))
      session.run(tf.global_variables_initializer())
      if run:
        (folder / 'run.json').write_text(json.dumps({'flags': run}))
      return tf.train.Saver().save(
          session, str(folder / 'model.ckpt'), global_step=step)

  folder = tmp_path / 'run'
  folder.mkdir()
  return save


def read_outcome(stdout):
  """Returns what the console tells of one evaluation."""
  lines = stdout.splitlines()
  start = next(i for i, line in enumerate(lines) if 'precision' in line)
  correct, total, step = map(
      int, CORRECT_LINE.fullmatch(lines[start + 1]).groups())
  assert PRECISION_LINE.fullmatch(lines[start])[1] == '%.3f' % (correct / total)
  assert lines[start + 2].split() == ['recall', 'precision']
  rest = lines.index(
      '  Row: true class; column: predicted class, in the same order.')
  classes = [CLASS_LINE.fullmatch(line).groups()
             for line in lines[start + 3:rest]]
  confusion = np.array([[int(count) for count in line.split()[1:]]
                        for line in lines[rest + 1:]])
  for i, (_, _, right, true, _, right_too, predicted) in enumerate(classes):
    assert int(right) == int(right_too) == confusion[i, i]
    assert int(true) == confusion[i].sum()
    assert int(predicted) == confusion[:, i].sum()
  return {'correct': correct, 'total': total, 'step': step,
          'classes': {row[0]: (int(row[2]), int(row[3])) for row in classes}}


def evaluated_steps(run):
  return [int(match[3]) for match in CORRECT_LINE.finditer(run.stdout)]


def read_csv(path):
  with open(path) as f:
    return list(csv.DictReader(f))


def read_pictures(data_dir, dataset, files):
  """Returns labels, and pictures [n, height, width, depth]."""
  records = np.concatenate([
      np.fromfile(data_dir / dataset.folder / name, np.uint8)
      for name in files]).reshape(-1, dataset.record_bytes)
  return records[:, 0], np.moveaxis(
      records[:, 1:].reshape(-1, 3, 32, 32), 1, 3)


def write_picture(path, picture):
  encode = tf.io.encode_png if path.suffix == '.png' else tf.io.encode_jpeg
  path.parent.mkdir(parents=True, exist_ok=True)
  with tf.Session() as session:
    path.write_bytes(session.run(encode(picture.astype(np.uint8))))


# Counting.


@pytest.mark.parametrize('flags, label', [
    ([], 3), (['--nouse_moving_average'], 5)])
def test_checkpoint_of_the_original_is_evaluated_by_its_averages_or_without(
    evaluate, save, tiny_dir, flags, label):
  save(7, averages=always(3), variables=always(5))
  run = evaluate('--run_once', *flags)
  assert (run.code, run.stderr) == (0, '')
  labels, _ = read_pictures(tiny_dir, TINY, TINY.eval_files)
  counts = np.bincount(labels, minlength=10)
  assert counts[3] != counts[5]
  assert read_outcome(run.stdout) == {
      'correct': counts[label], 'total': 70, 'step': 7,
      'classes': {name: (counts[label] * (i == label), count)
                  for i, (name, count) in enumerate(zip(TINY.classes, counts))}}


def foretell(pictures, values, views):
  """Returns what a network says of pictures, averaged over views."""
  crops = np.concatenate([
      pictures[:, top:top + 24, left:left + 24][:, :, ::step]
      for top, left, step in views])
  images = tf.map_fn(
      tf.image.per_image_standardization, tf.constant(crops, tf.float32))
  probabilities = tf.nn.softmax(cifar10.inference(images))
  with tf.Session() as session:
    for variable in tf.trainable_variables():
      variable.load(values[variable.op.name], session)
    return session.run(probabilities).reshape(
        len(views), len(pictures), -1).mean(axis=0)


@pytest.mark.parametrize('batch_size, flags, views', [
    (7, [], CENTRE), (32, ['--multiview'], TEN_VIEWS), (100, [], CENTRE)])
def test_each_answer_is_held_against_the_label_of_its_image(
    evaluate, save, tmp_path, tiny_dir, batch_size, flags, views):
  labels, pictures = read_pictures(tiny_dir, TINY, TINY.eval_files)
  probabilities = foretell(pictures, opinionated(), views)
  answers = probabilities.argmax(axis=1)
  assert len(set(answers)) > 2
  save(1, opinionated())
  path = tmp_path / 'predictions.csv'
  outcome = read_outcome(evaluate(
      '--run_once', '--batch_size=%d' % batch_size,
      '--predictions_csv=%s' % path, *flags).stdout)
  assert outcome['correct'] == (answers == labels).sum()
  assert outcome['classes'] == {
      name: ((answers[labels == i] == i).sum(), (labels == i).sum())
      for i, name in enumerate(TINY.classes)}
  rows = read_csv(path)
  assert list(rows[0]) == ['key', 'label', 'prediction', *TINY.classes]
  assert [(row['key'], row['label'], row['prediction']) for row in rows] == [
      ('test.bin:%d' % i, TINY.classes[label], TINY.classes[answer])
      for i, (label, answer) in enumerate(zip(labels, answers))]
  np.testing.assert_allclose(
      [[float(row[name]) for name in TINY.classes] for row in rows],
      probabilities, atol=1e-4)


@pytest.mark.parametrize('eval_data, num_examples, total', [
    ('test', 1, 1), ('test', 33, 33), ('test', 71, 70),
    ('train_eval', 249, 249), ('train_eval', 10000, 250)])
def test_exactly_the_examples_asked_for_are_counted(
    evaluate, save, tiny_dir, eval_data, num_examples, total):
  save(1, always(2))
  outcome = read_outcome(evaluate(
      '--run_once', '--eval_data=%s' % eval_data,
      '--num_examples=%d' % num_examples).stdout)
  files = TINY.eval_files if eval_data == 'test' else TINY.train_files
  labels = read_pictures(tiny_dir, TINY, files)[0][:total]
  assert outcome['total'] == total
  assert outcome['correct'] == (labels == 2).sum()
  assert sum(n for _, n in outcome['classes'].values()) == total


def test_evaluator_of_a_cluster_counts_all_2000_examples_and_ends(
    start_script, trained, synthetic_dir, tmp_path):
  run = finish(start_script(
      'cifar10_eval', '--checkpoint_dir=%s' % trained.train_dir,
      '--eval_dir=%s' % tmp_path, TF_CONFIG=json.dumps({
          'cluster': {'chief': ['127.0.0.1:1'], 'ps': ['127.0.0.1:2']},
          'task': {'type': 'evaluator', 'index': 0}})))
  assert (run.code, run.stderr) == (0, '')
  labels, _ = read_pictures(synthetic_dir, SYNTHETIC, SYNTHETIC.eval_files)
  outcome = read_outcome(run.stdout)
  assert (outcome['total'], outcome['step']) == (2000, 11)
  assert {name: n for name, (_, n) in outcome['classes'].items()} == dict(
      zip(SYNTHETIC.classes, np.bincount(labels)))


# What is taken over from the run.


@pytest.mark.parametrize('flag, dtype', [
    ('--use_fp16', tf.float16), ('--use_bfloat16', tf.bfloat16)])
def test_precision_is_that_of_the_run(train, evaluate, tmp_path, flag, dtype):
  assert train('--max_steps=1', flag).code == 0
  assert evaluated_steps(evaluate()) == [1]
  path, = (tmp_path / 'eval').glob('events.out.*')
  graphs = [event.graph_def for event in tf.train.summary_iterator(str(path))]
  assert {node.attr['T'].type for node in tf.GraphDef.FromString(
      next(filter(None, graphs))).node
          if node.name == 'conv1/Conv2D'} == {dtype.as_datatype_enum}


def test_data_and_network_are_those_of_the_run(call_script, tmp_path):
  for part in ('train', 'test'):
    for name in ('dark', 'light'):
      for i in range(3):
        write_picture(tmp_path / 'mine' / part / name / ('%d.png' % i),
                      np.full([20, 50 + i, 3], 20 if name == 'dark' else 220))
  run = call_script(
      cifar10_train, '--dataset=%s' % (tmp_path / 'mine'), '--batch_size=2',
      '--data_dir=%s' % (tmp_path / 'data'), '--max_steps=1', '--model=local',
      '--image_size=28', '--train_dir=%s' % (tmp_path / 'run'))
  assert (run.code, run.stderr) == (0, '')
  run = call_script(cifar10_eval, '--checkpoint_dir=%s' % (tmp_path / 'run'),
                    '--eval_dir=%s' % (tmp_path / 'eval'))
  classes = read_outcome(run.stdout)['classes']
  assert {name: n for name, (_, n) in classes.items()} == {
      'dark': 3, 'light': 3}


def test_tensorboard_gets_precision_and_pictures_at_the_step_of_the_run(
    evaluate, save, tmp_path):
  save(123456, always(0))
  correct = read_outcome(evaluate('--run_once').stdout)['correct']
  found = events(tmp_path / 'eval')
  assert {step for step, _, _ in found} == {123456}
  values = {tag: value for _, tag, value in found}
  assert values['Precision @ 1'].simple_value == pytest.approx(correct / 70)
  confusion = values['confusion/image'].image
  assert (confusion.width, confusion.height) == (160, 160)
  assert {'images/image/0', 'images/image/2'} <= set(values)
  mistakes = [tag for tag in values if tag.startswith('surest_mistakes/')]
  assert len(mistakes) == cifar10_eval.NUM_MISTAKES
  assert all('_taken_for_%s/' % TINY.classes[0] in tag for tag in mistakes)


# Which checkpoints, and how long.


def test_run_once_evaluates_the_latest_checkpoint(evaluate, save):
  for step in (3, 20, 100):
    save(step, always(0))
  assert evaluated_steps(evaluate('--run_once')) == [100]


@pytest.mark.parametrize('flag', ['--run_once', '--predict=cat.png'])
def test_without_a_checkpoint_it_fails_in_one_line(evaluate, tmp_path, flag):
  run = evaluate(flag)
  assert is_one_line(run, '--checkpoint_dir=%s' % (tmp_path / 'run'))
  assert 'precision' not in run.stdout


def while_it_waits(monkeypatch, *actions):
  """Takes one action after the other in the pauses of evaluation."""
  actions = list(actions)
  monkeypatch.setattr(cifar10_eval, 'time', types.SimpleNamespace(
      time=time.time, sleep=lambda secs: actions and actions.pop(0)()))


def test_each_checkpoint_is_evaluated_once_up_to_that_of_the_last_step(
    evaluate, save, tmp_path, monkeypatch):
  save(1, always(0), max_steps=3)
  while_it_waits(monkeypatch, lambda: None, lambda: save(2, always(0)),
                 lambda: None, lambda: save(3, always(0)))
  run = evaluate('--eval_interval_secs=0')
  assert (run.code, evaluated_steps(run)) == (0, [1, 2, 3])
  assert [step for step, tag, _ in events(tmp_path / 'eval')
          if tag == 'Precision @ 1'] == [1, 2, 3]


def test_checkpoint_of_the_last_step_ends_the_waiting(
    evaluate, save, tmp_path, monkeypatch):
  while_it_waits(monkeypatch, lambda: save(1, always(0), max_steps=3),
                 lambda: save(3, always(0)))
  run = evaluate('--eval_interval_secs=1000')
  assert (run.code, evaluated_steps(run)) == (0, [1, 3])
  assert 'Waiting for a checkpoint in %s' % (tmp_path / 'run') in run.stdout


@pytest.mark.parametrize('signum, code', [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_run_without_an_end_is_evaluated_until_a_signal_comes(
    evaluate, save, monkeypatch, signum, code):
  save(1, always(0))
  while_it_waits(monkeypatch, lambda: os.kill(os.getpid(), signum))
  run = evaluate('--num_examples=1')
  assert (run.code, evaluated_steps(run)) == (code, [1])
  assert re.fullmatch(r'script\.py: .*%s.*\n' % signum.name, run.stderr)


# What cannot be evaluated.


def test_checkpoint_of_another_network_is_explained_in_one_line(evaluate, save):
  values = {**always(0), 'local4/weights': np.zeros([384, 100], np.float32)}
  found = 'local4/weights/ExponentialMovingAverage is '
  assert is_one_line(
      evaluate('--run_once', '--checkpoint_dir=' + os.path.dirname(
          save(1, values))), found + '[384, 100] there and [384, 192] here')
  del values['local4/weights']
  save(2, values)
  assert is_one_line(evaluate('--run_once'), found + 'missing there')


def test_eval_dir_that_is_a_file_is_refused_in_one_line(
    evaluate, save, tmp_path):
  save(1, always(0))
  (tmp_path / 'eval').write_text('mine')
  assert is_one_line(evaluate('--run_once'), tmp_path / 'eval')
  assert (tmp_path / 'eval').read_text() == 'mine'


def test_data_file_that_shrinks_during_an_evaluation_is_refused(
    evaluate, save, tmp_path, tiny_dir, monkeypatch):
  shutil.copytree(tiny_dir, tmp_path / 'data')
  path = tmp_path / 'data' / TINY.folder / 'test.bin'
  check_checkpoint = cifar10_train.check_checkpoint

  def shrink_and_check(*arguments):  # The files have been looked at by then.
    os.truncate(path, 30 * TINY.record_bytes)
    check_checkpoint(*arguments)

  monkeypatch.setattr(cifar10_train, 'check_checkpoint', shrink_and_check)
  save(1, always(0))
  run = evaluate('--run_once', '--data_dir=%s' % (tmp_path / 'data'))
  assert is_one_line(run, path, 'has %d bytes' % (30 * TINY.record_bytes))
  assert 'precision' not in run.stdout


@pytest.mark.parametrize('argument, name', [
    ('--max_steps=5', 'max_steps'), ('--recipe=fast', 'recipe'),
    ('--train_dir=run', 'train_dir'), ('cat.png', 'cat.png')])
def test_what_only_training_knows_is_refused(
    evaluate, tmp_path, argument, name):
  run = evaluate(argument)
  assert run.code == 2
  assert run.stderr.count('\n') == 1 and name in run.stderr
  assert not (tmp_path / 'eval').exists()


# Prediction and serving.

LOAD = """
import numpy as np, tensorflow as tf
signatures = tf.saved_model.load('model').signatures
pictures = tf.constant(np.load('pictures.npy'))
encoded = tf.constant([open('0.png', 'rb').read()])
print(*signatures['serving_default'](images=pictures)['classes'].numpy(),
      *signatures['encoded'](encoded=encoded)['classes'].numpy())
"""


@pytest.mark.parametrize('image_size, flags', [
    (24, []), (28, ['--multiview'])])
def test_prediction_and_exported_model_say_what_evaluation_says(
    evaluate, save, start_script, tmp_path, tiny_dir, image_size, flags):
  save(1, opinionated(image_size), image_size=image_size)
  table, model = tmp_path / 'predictions.csv', tmp_path / 'model'
  evaluate('--run_once', '--predictions_csv=%s' % table, *flags)
  rows = read_csv(table)
  _, pictures = read_pictures(tiny_dir, TINY, TINY.eval_files)
  paths = [tmp_path / ('%d.png' % i) for i in range(5)]
  for path, picture in zip(paths, pictures):
    write_picture(path, picture)
  run = evaluate('--predict=%s' % paths[0], *map(str, paths[1:]), *flags)
  assert [line.split(',')[0] for line in run.stdout.splitlines()] == [
      '%s: %s %.3f' % (path, row['prediction'], float(row[row['prediction']]))
      for path, row in zip(paths, rows)]

  assert evaluate('--export_dir=%s' % model, *flags).code == 0
  np.save(tmp_path / 'pictures.npy', pictures)
  (tmp_path / 'load.py').write_text(
      'import os\nos.chdir(%r)\n%s' % (str(tmp_path), LOAD))
  run = finish(start_script(str(tmp_path / 'load.py')))
  assert run.code == 0, run.stderr
  assert [TINY.classes[int(label)] for label in run.stdout.split()] == [
      row['prediction'] for row in rows + rows[:1]]
  assert is_one_line(evaluate('--export_dir=%s' % model), 'exists already')


def test_pictures_of_any_size_are_predicted_and_others_named(
    evaluate, save, tmp_path):
  save(1, always(4))
  names = ('1.png', '300.jpg', '500.png', 'broken.png', 'none.png')
  paths = [tmp_path / name for name in names]
  random = np.random.default_rng(0)
  for path, shape in zip(paths, [(1, 1, 3), (300, 20, 3), (17, 500, 3)]):
    write_picture(path, random.integers(0, 256, shape))
  paths[3].write_bytes(b'no picture')
  run = evaluate('--predict=%s' % paths[0], *map(str, paths[1:]))
  assert run.code == 1
  sure = np.e / (np.e + 9)
  for path, line in zip(paths[:3], run.stdout.splitlines(), strict=True):
    assert re.fullmatch(r'%s: %s %.3f(, \w+ %.3f){2}' % (
        re.escape(str(path)), TINY.classes[4], sure, (1 - sure) / 9), line)
  broken, none = run.stderr.splitlines()
  assert 'broken.png: is no' in broken and 'none.png' in none
