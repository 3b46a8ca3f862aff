"""cifar10_eval: each example counts once, each checkpoint is evaluated once.

The checkpoints are made by hand, as the original's are: of networks that answer
always the same, and of one whose answers a graph of this file foretells.
"""
import csv
import io
import json
import os
import re
import shutil
import signal
import sys
import time
import types

import numpy as np
import PIL.Image
import pytest

from conftest import (
    CORRECT_LINE, PRECISION_LINE, SHAPES, TINY, events, finish, is_one_line)
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_eval
from cifar10_input import SYNTHETIC
import cifar10_train

# The corner of each crop, and -1 to mirror it. The first is the central one.
VIEWS = [(top, left, step) for step in (1, -1) for top, left in (
    (4, 4), (2, 2), (2, 6), (6, 2), (6, 6))]


def always(label):
  """Returns the variables of a network that knows one answer."""
  return {**{name: np.zeros(shape, 'f') for name, shape in SHAPES.items()},
          'softmax_linear/biases': np.eye(10, dtype='f')[label]}


def opinionated(image_size=24):
  """Returns the variables of a network that gives several answers."""
  random = np.random.default_rng(0)
  local3 = {'local3/weights': [4 * image_size ** 2, 384]}
  return {name: random.normal(0, 0.08, shape).astype(np.float32)
          for name, shape in {**SHAPES, **local3}.items()}


@pytest.fixture
def save(tmp_path):
  """Function that adds a checkpoint to a run, and what its trainer tells."""
  def save(step, averages, variables=None, **run):
    with tf.Graph().as_default(), tf.Session() as session:
      for name, value in (variables or averages).items():
        tf.get_variable(name, initializer=value)
        if averages:
          tf.get_variable(name + '/ExponentialMovingAverage',
                          initializer=averages[name])
      tf.get_variable('total_loss/avg', initializer=4.6)
      tf.get_variable('global_step', initializer=np.int64(step))
      session.run(tf.global_variables_initializer())
      if run:
        (folder / 'run.json').write_text(json.dumps(
            {'flags': run, 'classes': TINY.classes}))
      return tf.train.Saver().save(
          session, str(folder / 'model.ckpt'), global_step=step)

  folder = tmp_path / 'run'
  folder.mkdir()
  return save


def read_outcome(run):
  """Returns what the console tells of one evaluation."""
  assert (run.code, run.stderr) == (0, '')
  precision, counts, heading, *lines = run.stdout.splitlines()
  correct, total, step = map(int, CORRECT_LINE.fullmatch(counts).groups())
  assert PRECISION_LINE.fullmatch(precision)[1] == '%.3f' % (correct / total)
  assert heading.split() == ['recall', 'precision']
  middle = lines.index(
      '  Row: true class; column: predicted class, in the same order.')
  confusion = np.array([line.split()[1:] for line in lines[middle + 1:]], int)
  classes = {}
  for i, line in enumerate(lines[:middle]):
    name, *figures = line.split()
    right, true, predicted = (
        confusion[i, i], confusion[i].sum(), confusion[:, i].sum())
    assert figures == [
        '%.3f' % (right / max(true, 1)), '(%d/%d)' % (right, true),
        '%.3f' % (right / max(predicted, 1)), '(%d/%d)' % (right, predicted)]
    classes[name] = right, true
  return dict(correct=correct, total=total, step=step, classes=classes)


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


@pytest.mark.parametrize('flags, label', [
    ([], 3), (['--nouse_moving_average'], 5)])
def test_latest_checkpoint_of_the_original_is_evaluated_by_averages_or_not(
    evaluate, save, tiny_dir, flags, label):
  save(3, always(0))
  save(20, averages=always(3), variables=always(5))
  labels, _ = read_pictures(tiny_dir, TINY, TINY.eval_files)
  counts = np.bincount(labels, minlength=10)
  assert counts[3] != counts[5]
  assert read_outcome(evaluate('--run_once', *flags)) == {
      'correct': counts[label], 'total': 70, 'step': 20,
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
    (7, [], VIEWS[:1]), (32, ['--multiview'], VIEWS), (100, [], VIEWS[:1])])
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
      '--predictions_csv=%s' % path, *flags))
  assert outcome['classes'] == {
      name: ((answers[labels == i] == i).sum(), (labels == i).sum())
      for i, name in enumerate(TINY.classes)}
  rows = list(csv.DictReader(path.read_text().splitlines()))
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
  outcome = read_outcome(evaluate('--run_once', '--eval_data=' + eval_data,
                                  '--num_examples=%d' % num_examples))
  files = TINY.eval_files if eval_data == 'test' else TINY.train_files
  labels = read_pictures(tiny_dir, TINY, files)[0][:total]
  assert outcome['total'] == total
  assert outcome['correct'] == (labels == 2).sum()


def test_evaluator_of_a_cluster_counts_all_2000_examples_and_ends(
    start_script, trained, synthetic_dir, tmp_path):
  run = finish(start_script(
      'cifar10_eval', '--checkpoint_dir=%s' % trained.train_dir,
      '--eval_dir=%s' % tmp_path, TF_CONFIG='{"task": {"type": "evaluator"}, '
      '"cluster": {"chief": ["127.0.0.1:1"], "ps": ["127.0.0.1:2"]}}'))
  labels, _ = read_pictures(synthetic_dir, SYNTHETIC, SYNTHETIC.eval_files)
  outcome = read_outcome(run)
  assert (outcome['total'], outcome['step']) == (2000, 11)
  assert {name: n for name, (_, n) in outcome['classes'].items()} == dict(
      zip(SYNTHETIC.classes, np.bincount(labels)))


@pytest.mark.parametrize('flag, dtype', [
    ('--use_fp16', tf.float16), ('--use_bfloat16', tf.bfloat16)])
def test_data_network_and_precision_are_those_of_the_run(
    call_script, tmp_path, flag, dtype):
  for folder in ('train/light', 'train/dark', 'test/light', 'test/dark'):
    write_picture(tmp_path / 'mine' / folder / 'a.jpg', np.full([9, 9, 3], 9))
  run = call_script(
      cifar10_train, '--dataset=%s' % (tmp_path / 'mine'), '--batch_size=2',
      '--data_dir=%s' % (tmp_path / 'data'), '--max_steps=1', '--model=local',
      '--image_size=28', '--train_dir=%s' % (tmp_path / 'run'), flag)
  assert run.code == 0
  classes = read_outcome(call_script(
      cifar10_eval, '--checkpoint_dir=%s' % (tmp_path / 'run'),
      '--eval_dir=%s' % (tmp_path / 'eval')))['classes']
  assert list(classes) == ['dark', 'light']
  path, = (tmp_path / 'eval').glob('events.out.*')
  graphs = [event.graph_def for event in tf.train.summary_iterator(str(path))]
  graph = tf.GraphDef.FromString(next(filter(None, graphs)))
  assert [node.attr['T'].type for node in graph.node
          if node.name == 'conv1/Conv2D'] == [dtype.as_datatype_enum]


def test_evaluation_is_shown_below_its_run_and_goes_with_it(
    call_script, train, tiny_flags, tmp_path):
  train('--max_steps=1')
  run_dir = tmp_path / 'run'
  for path in run_dir, run_dir / 'model.ckpt-1':
    run = call_script(cifar10_eval, *tiny_flags, '--checkpoint_dir=%s' % path)
    assert run.code == 0
  assert len(list((run_dir / 'eval').iterdir())) == 2
  (run_dir / 'eval' / 'notes').touch()
  train('--max_steps=1', '--overwrite')
  assert [path.name for path in (run_dir / 'eval').iterdir()] == ['notes']


@pytest.mark.parametrize('is_terminal, shown', [
    (True, '.* 200/1000.*1000/1000.*'),
    (False, '800 of 1000 examples.\n')])
def test_progress_is_a_bar_on_a_terminal_and_else_a_line_at_times(
    monkeypatch, capsys, is_terminal, shown):
  now = [0]
  monkeypatch.setattr(cifar10_eval.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: is_terminal)
  tf.keras.utils.enable_interactive_logging()  # A download may have ended it.
  progress = cifar10_eval.Progress(1000)
  for done in 200, 600, 800, 1000:
    progress.show(done)
    now[0] += 20
  assert re.fullmatch(shown, capsys.readouterr().out, re.DOTALL)


def test_tensorboard_gets_precision_and_pictures_at_the_step_of_the_run(
    evaluate, save, tmp_path):
  save(123456, always(0))
  correct = read_outcome(evaluate('--run_once'))['correct']
  found = events(tmp_path / 'eval')
  assert {step for step, _, _ in found} == {123456}
  values = {tag: value for _, tag, value in found}
  assert values['Precision @ 1'].simple_value == pytest.approx(correct / 70)
  assert values['cross_entropy'].simple_value == pytest.approx(
      np.log(np.e + 9) - correct / 70, rel=1e-5)
  for tag, width in ('confusion', 450), ('surest_mistakes', 750):
    picture = PIL.Image.open(io.BytesIO(values[tag].image.encoded_image_string))
    assert (picture.width, values[tag].image.width) == (width, width)
    assert len(picture.getcolors(1 << 20)) > 5


# Which checkpoints, and how long.


def test_without_a_checkpoint_it_fails_in_one_line(evaluate, tmp_path):
  run = evaluate('--run_once')
  assert is_one_line(run, '--checkpoint_dir=%s' % (tmp_path / 'run'))
  assert not run.stdout


def while_it_waits(monkeypatch, *actions):
  """Takes one action after the other in the pauses of evaluation."""
  actions = list(actions)
  monkeypatch.setattr(cifar10_eval, 'time', types.SimpleNamespace(
      time=time.time, monotonic=time.monotonic,
      sleep=lambda secs: actions and actions.pop(0)()))


@pytest.mark.parametrize('interval_secs, steps', [
    (0, [1, 2, 3]), (1000, [1, 3])])
def test_each_checkpoint_is_evaluated_once_up_to_that_of_the_last_step(
    evaluate, save, tmp_path, monkeypatch, interval_secs, steps):
  while_it_waits(
      monkeypatch, lambda: save(1, always(0), max_steps=3), lambda: None,
      lambda: save(2, always(0)), lambda: save(3, always(0)))
  run = evaluate('--eval_interval_secs=%d' % interval_secs)
  assert (run.code, run.stderr) == (0, '')
  assert 'Waiting for a checkpoint in %s' % (tmp_path / 'run') in run.stdout
  assert [step for step, tag, _ in events(tmp_path / 'eval')
          if tag == 'Precision @ 1'] == steps


def test_run_that_is_overwritten_under_its_evaluator_is_read_anew(
    evaluate, save, monkeypatch):
  save(1, always(0), max_steps=3)
  while_it_waits(monkeypatch, lambda: save(
      2, opinionated(image_size=28), image_size=28, max_steps=2))
  run = evaluate('--eval_interval_secs=0')
  assert (run.code, run.stderr) == (0, '')
  assert '/70 correct at step 2\n' in run.stdout


def test_checkpoint_dir_may_name_one_checkpoint(evaluate, save, tmp_path):
  older = save(1, always(3))
  newer = save(2, always(5), max_steps=9)
  flag = '--checkpoint_dir=%s' % older
  assert read_outcome(evaluate(flag))['step'] == 1  # It ends, and waits not.
  write_picture(tmp_path / 'a.png', np.zeros([32, 32, 3]))
  run = evaluate(flag, '--predict=%s' % (tmp_path / 'a.png'))
  assert 'a.png: %s ' % TINY.classes[3] in run.stdout
  run = evaluate(flag, '--export_dir=%s' % (tmp_path / 'model'))
  assert run.stdout == 'Exported %s to %s.\n' % (older, tmp_path / 'model')
  assert is_one_line(evaluate('--checkpoint_dir=%s9' % newer), newer + '9')


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGHUP'])
def test_run_without_an_end_is_evaluated_until_a_signal_comes(
    evaluate, save, monkeypatch, name):
  save(1, always(0))
  while_it_waits(
      monkeypatch, lambda: os.kill(os.getpid(), signal.Signals[name]))
  run = evaluate('--num_examples=1')
  assert run.code == 128 + signal.Signals[name]
  assert '1 correct at step 1\n' in run.stdout
  assert re.fullmatch(r'script\.py: .*%s.*\n' % name, run.stderr)


# What cannot be evaluated.


def test_checkpoint_of_another_network_is_explained_in_one_line(evaluate, save):
  values = {**always(0), 'local4/weights': np.zeros([384, 100], np.float32)}
  checkpoint = save(1, values)
  assert is_one_line(evaluate('--run_once'), checkpoint, 'local4/weights/',
                     'is [384, 100] there and [384, 192] here')
  del values['local4/weights']
  save(2, values)
  assert is_one_line(evaluate('--run_once'), 'local4', 'is missing there')


def test_checkpoint_without_averages_names_the_flag_that_does_without(
    evaluate, save):
  save(1, averages={}, variables=always(3))
  assert is_one_line(evaluate('--run_once'), '--nouse_moving_average')
  assert evaluate('--run_once', '--nouse_moving_average').code == 0


def test_eval_dir_that_is_a_file_is_refused(evaluate, save, tmp_path):
  save(1, always(0))
  (tmp_path / 'eval').write_text('mine')
  assert is_one_line(evaluate('--run_once'), tmp_path / 'eval')
  assert (tmp_path / 'eval').read_text() == 'mine'


@pytest.mark.parametrize('content, complaint', [
    (bytes(30 * TINY.record_bytes), 'has %d bytes' % (30 * TINY.record_bytes)),
    (b'\x0a' * 70 * TINY.record_bytes, 'the label 10 in record 0')])
def test_data_file_that_changes_during_an_evaluation_is_refused(
    evaluate, save, tmp_path, tiny_dir, monkeypatch, content, complaint):
  shutil.copytree(tiny_dir, tmp_path / 'data')
  path = tmp_path / 'data' / TINY.folder / 'test.bin'
  monkeypatch.setattr(  # By then, the files have been looked at.
      cifar10_train, 'check_checkpoint',
      lambda *unused: path.write_bytes(content))
  save(1, always(0))
  run = evaluate('--run_once', '--data_dir=%s' % (tmp_path / 'data'))
  assert is_one_line(run, path, complaint)
  assert not run.stdout


# Prediction and serving.

LOAD = """
import os, sys
import numpy as np, tensorflow as tf
os.chdir(sys.argv[1])
signatures = tf.saved_model.load('model').signatures
pictures = np.load('pictures.npy')
served = signatures['serving_default'](images=tf.constant(pictures))
encoded = tf.constant([open('0.png', 'rb').read()])
lite = tf.lite.Interpreter(
    model_content=tf.lite.TFLiteConverter.from_saved_model(
        'model', signature_keys=['serving_default']).convert())
on_phone = lite.get_signature_runner('serving_default')(images=pictures)
for labels in (served['labels'].numpy(), on_phone['labels'],
               signatures['encoded'](encoded=encoded)['labels'].numpy()):
  print(b' '.join(labels).decode())
np.testing.assert_allclose(
    on_phone['probabilities'], served['probabilities'], atol=1e-5)
"""


@pytest.mark.parametrize('name', ['none/table.csv', 'file/table.csv', 'pipe'])
def test_table_that_cannot_be_written_is_told_before_the_evaluation(
    evaluate, save, tmp_path, name):
  save(1, always(0))
  (tmp_path / 'file').touch()
  os.mkfifo(tmp_path / 'pipe')
  run = evaluate('--run_once', '--predictions_csv=%s' % (tmp_path / name))
  assert is_one_line(run, tmp_path / name) and run.stdout == ''


def test_prediction_and_exported_model_say_what_evaluation_says(
    evaluate, save, start_script, tmp_path, tiny_dir):
  save(1, opinionated(image_size=28), image_size=28)
  table, model = tmp_path / 'predictions.csv', tmp_path / 'model'
  evaluate('--run_once', '--multiview', '--predictions_csv=%s' % table)
  rows = list(csv.DictReader(table.read_text().splitlines()))
  _, pictures = read_pictures(tiny_dir, TINY, TINY.eval_files)
  paths = [tmp_path / ('%d.png' % i) for i in range(5)]
  for path, picture in zip(paths, pictures):
    write_picture(path, picture)
  run = evaluate('--multiview', *('--predict=%s' % path for path in paths))
  assert [line.split(',')[0] for line in run.stdout.splitlines()] == [
      '%s: %s %.3f' % (path, row['prediction'], float(row[row['prediction']]))
      for path, row in zip(paths, rows)]

  assert evaluate('--export_dir=%s' % model, '--multiview').code == 0
  np.save(tmp_path / 'pictures.npy', pictures)
  (tmp_path / 'load.py').write_text(LOAD)
  run = finish(start_script(str(tmp_path / 'load.py'), str(tmp_path)))
  assert run.code == 0, run.stderr
  expected = [row['prediction'] for row in rows]
  served, on_phone, encoded = map(str.split, run.stdout.splitlines())
  assert served == on_phone == expected and encoded == expected[:1]
  assert is_one_line(evaluate('--export_dir=%s' % model), 'exists already')


def test_pictures_of_any_size_are_predicted_and_others_named(
    evaluate, save, tmp_path):
  save(1, always(4))
  paths = [tmp_path / name for name in (
      'mine/1,1.png', 'mine/a/300.jpg', '500.png', 'broken.png', 'none.png')]
  random = np.random.default_rng(0)
  for path, shape in zip(paths, [(1, 1, 3), (300, 20, 3), (17, 500, 3)]):
    write_picture(path, random.integers(0, 256, shape))
  paths[3].write_bytes(b'no picture')
  write_picture(tmp_path / 'mine/.thumbnails/1.png', np.zeros([9, 9, 3]))
  run = evaluate('--predict=%s' % (tmp_path / 'mine'), *map(str, paths[2:]))
  assert run.code == 1
  sure = np.e / (np.e + 9)
  for path, line in zip(paths[:3], run.stdout.splitlines(), strict=True):
    assert re.fullmatch(r'%s: %s %.3f(, \w+ %.3f){2}' % (
        re.escape(str(path)), TINY.classes[4], sure, (1 - sure) / 9), line)
  broken, none = run.stderr.splitlines()
  assert 'broken.png: ' in broken and 'none.png' in none
  (tmp_path / 'empty').mkdir()
  assert is_one_line(evaluate('--predict=%s' % (tmp_path / 'empty')), 'empty')
