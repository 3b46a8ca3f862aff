"""cifar10_eval: each example counts once, each checkpoint is evaluated once.

The checkpoints are made by hand: networks that answer always the same, and ones
whose answers a graph of this file's own foretells.
"""
import csv
import os
import re
import signal

import numpy as np
import pytest

import cifar10
import cifar10_eval
import cifar10_train
from cifar10_input import SYNTHETIC, tf

PRECISION_LINE = re.compile(
    r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}: precision @ 1 = ([01]\.\d{3})')
CORRECT_LINE = re.compile(r'(\d+)/(\d+) correct at step (\d+)')
CLASS_LINE = re.compile(
    r'  (\w+) +([01]\.\d{3}) \((\d+)/(\d+)\) +([01]\.\d{3}) \((\d+)/(\d+)\)')


def _outcome(stdout):
  """Returns what the console tells of one evaluation."""
  lines = stdout.splitlines()
  start = next(i for i, line in enumerate(lines) if 'precision' in line)
  correct, total, step = CORRECT_LINE.fullmatch(lines[start + 1]).groups()
  assert lines[start + 2].split() == ['recall', 'precision']
  rest = lines.index(
      '  Row: true class; column: predicted class, in the same order.')
  classes = [CLASS_LINE.fullmatch(line).groups()
             for line in lines[start + 3:rest]]
  confusion = np.array([[int(count) for count in line.split()[1:]]
                        for line in lines[rest + 1:]])
  assert [row[2:4] for row in classes] == [
      (str(row[i]), str(row.sum())) for i, row in enumerate(confusion)]
  assert [row[5:] for row in classes] == [
      (str(row[i]), str(row.sum())) for i, row in enumerate(confusion.T)]
  return {
      'precision': PRECISION_LINE.fullmatch(lines[start])[1],
      'correct': int(correct), 'total': int(total), 'step': int(step),
      'classes': {name: (share, int(correct), int(total))
                  for name, share, correct, total, *_ in classes}}


def _labels(data_dir, dataset, files):
  return np.concatenate([
      np.fromfile(data_dir / dataset.folder / name, np.uint8)
      [::dataset.record_bytes] for name in files])


@pytest.fixture(scope='module')
def initial_values():
  with tf.Graph().as_default(), tf.Session() as session:
    tf.set_random_seed(1)
    cifar10.inference(tf.zeros([1, 24, 24, 3]))
    session.run(tf.global_variables_initializer())
    return session.run({v.op.name: v for v in tf.trainable_variables()})


@pytest.fixture
def always(initial_values):
  """Function that gives the variables of a network that knows one answer."""
  return lambda label: {
      **{name: np.zeros_like(value) for name, value in initial_values.items()},
      'softmax_linear/biases': np.eye(10, dtype=np.float32)[label]}


def _save(folder, step, averages, variables=None):
  """Writes a checkpoint, whose variables are not their averages if given."""
  with tf.Graph().as_default(), tf.Session() as session:
    for suffix, values in [
        ('', variables or averages), ('/ExponentialMovingAverage', averages)]:
      for name, value in values.items():
        tf.get_variable(name + suffix, initializer=value)
    tf.get_variable('global_step', initializer=np.int64(step))
    session.run(tf.global_variables_initializer())
    return tf.train.Saver().save(
        session, str(folder / 'model.ckpt'), global_step=step)


@pytest.fixture
def evaluate(use_tiny, call_script, tmp_path):
  """Function that runs the script on the checkpoints in tmp_path / 'run'."""
  (tmp_path / 'run').mkdir()
  return lambda *flags: call_script(
      cifar10_eval.main, '--checkpoint_dir=%s' % (tmp_path / 'run'),
      '--eval_dir=%s' % (tmp_path / 'eval'), *flags)


# Counting.


def test_moving_averages_stand_in_for_the_variables(
    evaluate, always, tmp_path, tiny, tiny_dir):
  _save(tmp_path / 'run', 7, averages=always(3), variables=always(5))
  run = evaluate('--run_once')
  assert run.code == 0
  assert run.stderr == ''
  counts = np.bincount(
      _labels(tiny_dir, tiny, tiny.eval_files), minlength=10)
  assert counts[3] != counts[5]
  assert _outcome(run.stdout) == {
      'precision': '%.3f' % (counts[3] / 70), 'correct': counts[3],
      'total': 70, 'step': 7,
      'classes': {
          name: ('1.000' if i == 3 else '0.000', counts[3] * (i == 3), count)
          for i, (name, count) in enumerate(zip(tiny.classes, counts))}}


CENTRE = [(4, 4, 1)]
TEN_VIEWS = [(top, left, step) for step in (1, -1) for top, left in (
    (4, 4), (2, 2), (2, 6), (6, 2), (6, 6))]


def _foretell(data_dir, dataset, values, views):
  """Returns a network's logits for the evaluation data, [views, n, classes].

  A view is the corner of the crop, and -1 to mirror it.
  """
  records = np.concatenate([
      np.fromfile(data_dir / dataset.folder / name, np.uint8)
      for name in dataset.eval_files]).reshape(-1, dataset.record_bytes)
  pictures = np.moveaxis(records[:, 1:].reshape(-1, 3, 32, 32), 1, 3)
  crops = np.concatenate([
      pictures[:, top:top + 24, left:left + 24][:, :, ::step]
      for top, left, step in views])
  images = tf.map_fn(
      tf.image.per_image_standardization, tf.constant(crops, tf.float32))
  with tf.variable_scope('foretold'):
    logits = cifar10.inference(images)
  with tf.Session() as session:
    for variable in tf.trainable_variables():
      variable.load(values[variable.op.name.split('/', 1)[1]], session)
    return session.run(logits).reshape(len(views), len(pictures), -1)


@pytest.mark.parametrize('batch_size, flags, views', [
    (7, [], CENTRE), (32, [], CENTRE), (100, [], CENTRE),
    (32, ['--multiview'], TEN_VIEWS)])
def test_each_answer_is_held_against_the_label_of_its_image(
    evaluate, initial_values, tmp_path, tiny, tiny_dir, set_flags, batch_size,
    flags, views):
  set_flags(batch_size=batch_size)
  random = np.random.default_rng(0)
  values = {**initial_values, 'softmax_linear/weights': random.standard_normal(
      (192, 10)).astype(np.float32)}
  logits = _foretell(tiny_dir, tiny, values, views)
  mean = logits.mean(axis=(0, 1))
  values['softmax_linear/biases'] = -mean
  probabilities = np.exp(logits - mean)
  probabilities /= probabilities.sum(axis=2, keepdims=True)
  answers = probabilities.mean(axis=0).argmax(axis=1)
  labels = _labels(tiny_dir, tiny, tiny.eval_files)
  assert len(set(answers)) > 5
  _save(tmp_path / 'run', 1, values)
  path = tmp_path / 'predictions.csv'
  outcome = _outcome(evaluate(
      '--run_once', '--predictions_csv=%s' % path, *flags).stdout)
  assert outcome['correct'] == (answers == labels).sum()
  assert {name: row[1:] for name, row in outcome['classes'].items()} == {
      name: ((answers[labels == i] == i).sum(), (labels == i).sum())
      for i, name in enumerate(tiny.classes)}
  with open(path) as f:
    written = [[float(row[name]) for name in tiny.classes]
               for row in csv.DictReader(f)]
  np.testing.assert_allclose(written, probabilities.mean(axis=0), atol=1e-4)


@pytest.mark.parametrize('eval_data, num_examples, total', [
    ('test', 1, 1), ('test', 8, 8), ('test', 33, 33), ('test', 70, 70),
    ('test', 71, 70), ('test', 10000, 70), ('train_eval', 10000, 250),
    ('train_eval', 249, 249)])
def test_exactly_the_examples_asked_for_are_counted(
    evaluate, always, tmp_path, tiny, tiny_dir, eval_data, num_examples, total):
  _save(tmp_path / 'run', 1, always(2))
  outcome = _outcome(evaluate(
      '--run_once', '--eval_data=%s' % eval_data,
      '--num_examples=%d' % num_examples).stdout)
  files = tiny.eval_files if eval_data == 'test' else tiny.train_files
  labels = _labels(tiny_dir, tiny, files)[:total]
  assert outcome['total'] == total
  assert outcome['correct'] == (labels == 2).sum()
  assert sum(row[2] for row in outcome['classes'].values()) == total


def test_all_2000_synthetic_examples_are_counted(
    run_script, trained, synthetic_dir, tmp_path):
  run = run_script(
      'cifar10_eval', '--dataset=synthetic', '--data_dir=%s' % synthetic_dir,
      '--checkpoint_dir=%s' % trained.train_dir, '--eval_dir=%s' % tmp_path,
      '--run_once')
  assert run.code == 0
  assert run.stderr == ''
  outcome = _outcome(run.stdout)
  assert (outcome['total'], outcome['step']) == (2000, 11)
  assert list(outcome['classes']) == list(SYNTHETIC.classes)
  counts = np.bincount(
      _labels(synthetic_dir, SYNTHETIC, SYNTHETIC.eval_files))
  assert [row[2] for row in outcome['classes'].values()] == list(counts)
  assert outcome['precision'] == '%.3f' % (outcome['correct'] / 2000)


@pytest.mark.parametrize(
    'flag', ['--nouse_fp16', '--use_fp16', '--use_bfloat16'])
def test_what_a_trainer_saves_can_be_evaluated(evaluate, call_script, tmp_path,
                                               flag):
  trained = call_script(
      cifar10_train.main, '--train_dir=%s' % (tmp_path / 'run'),
      '--max_steps=2', flag)
  assert trained.code == 0
  outcome = _outcome(evaluate('--run_once', flag).stdout)
  assert (outcome['total'], outcome['step']) == (70, 2)


# TensorBoard.


def test_precision_is_written_at_the_step_of_the_checkpoint(
    evaluate, always, tmp_path, events):
  _save(tmp_path / 'run', 123456, always(0))
  outcome = _outcome(evaluate('--run_once').stdout)
  found = events(tmp_path / 'eval')
  (step, _, value), = (
      event for event in found if event[1] == 'Precision @ 1')
  assert step == 123456
  assert '%.3f' % value.simple_value == outcome['precision']
  assert {tag for _, tag, _ in found if tag.startswith('images')} == {
      'images/image/0', 'images/image/1', 'images/image/2'}


# Which checkpoints.


def test_without_a_checkpoint_run_once_fails_in_one_line(evaluate, tmp_path):
  run = evaluate('--run_once')
  assert run.code == 1
  assert 'precision' not in run.stdout
  assert re.fullmatch(
      r'script\.py: .*--checkpoint_dir=%s\b.*\n' % (tmp_path / 'run'),
      run.stderr)


def test_run_once_evaluates_the_latest_checkpoint(evaluate, always, tmp_path):
  for step in (3, 20, 100):
    _save(tmp_path / 'run', step, always(0))
  stdout = evaluate('--run_once').stdout
  assert [m[3] for m in CORRECT_LINE.finditer(stdout)] == ['100']


def test_each_checkpoint_is_evaluated_once_until_none_comes(
    evaluate, always, tmp_path, monkeypatch, events):
  _save(tmp_path / 'run', 1, always(0))
  coming = [2, 3]
  eval_once = cifar10_eval.eval_once

  def eval_and_save_the_next(*arguments):
    precision = eval_once(*arguments)
    if coming:
      _save(tmp_path / 'run', coming.pop(0), always(0))
    return precision

  monkeypatch.setattr(cifar10_eval, 'eval_once', eval_and_save_the_next)
  run = evaluate('--eval_interval_secs=0', '--eval_timeout_secs=2')
  assert run.code == 0
  assert [m[3] for m in CORRECT_LINE.finditer(run.stdout)] == ['1', '2', '3']
  assert [step for step, tag, _ in events(tmp_path / 'eval')
          if tag == 'Precision @ 1'] == [1, 2, 3]


def test_evaluation_ends_if_no_checkpoint_comes_in_time(evaluate, tmp_path):
  run = evaluate('--eval_timeout_secs=1')
  assert run.code == 1
  assert 'Waiting for a checkpoint in %s' % (tmp_path / 'run') in run.stdout
  assert run.stderr.count('\n') == 1
  assert '--eval_timeout_secs=1' in run.stderr


@pytest.mark.parametrize('signum, code', [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signal_ends_the_evaluation_in_one_line(
    evaluate, always, tmp_path, monkeypatch, signum, code):
  monkeypatch.setattr(
      cifar10_eval, 'eval_once', lambda *unused: os.kill(os.getpid(), signum))
  _save(tmp_path / 'run', 1, always(0))
  run = evaluate()
  assert run.code == code
  assert re.fullmatch(r'script\.py: .*%s.*\n' % signum.name, run.stderr)


# What cannot be evaluated.


def test_checkpoint_of_other_shapes_is_explained_in_one_line(
    evaluate, always, tmp_path):
  values = always(0)
  values['local4/weights'] = np.zeros([384, 100], np.float32)
  checkpoint = _save(tmp_path / 'run', 1, values)
  run = evaluate('--run_once')
  assert run.code == 1
  assert run.stderr.count('\n') == 1
  assert checkpoint in run.stderr
  assert ('local4/weights/ExponentialMovingAverage is [384, 100] there and '
          '[384, 192] here') in run.stderr


def test_checkpoint_without_averages_is_explained_in_one_line(
    evaluate, tmp_path):
  with tf.Graph().as_default(), tf.Session() as session:
    cifar10.inference(tf.zeros([1, 24, 24, 3]))
    tf.train.get_or_create_global_step()
    session.run(tf.global_variables_initializer())
    tf.train.Saver().save(session, str(tmp_path / 'run' / 'model.ckpt'), 1)
  run = evaluate('--run_once')
  assert run.code == 1
  assert re.fullmatch(
      r'.*/ExponentialMovingAverage is missing there and \[.*\n', run.stderr)


def test_eval_dir_that_is_a_file_is_refused_in_one_line(
    evaluate, always, tmp_path):
  _save(tmp_path / 'run', 1, always(0))
  (tmp_path / 'eval').write_text('mine')
  run = evaluate('--run_once')
  assert run.code == 1
  assert run.stderr.count('\n') == 1
  assert '--eval_dir=%s' % (tmp_path / 'eval') in run.stderr
  assert (tmp_path / 'eval').read_text() == 'mine'
