"""cifar10_eval: each example and each checkpoint is evaluated once.

The checkpoints are made by hand, as the original's are: of networks that always
give the same answer, and of one whose answers this file computes in a graph.
"""
import csv
import dataclasses
import io
import json
import time
import types

import numpy as np
import PIL.Image
import pytest

from conftest import (
    CORRECT_LINE, PRECISION_LINE, ROOT, SHAPES, TINY, events, finish,
    is_one_line)
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_eval
import cifar10_train

# The corner of each crop, and -1 to mirror it. The first is the central one.
VIEWS = [(top, left, step) for step in (1, -1) for top, left in (
    (4, 4), (2, 2), (2, 6), (6, 2), (6, 6))]


def always(label):
  """Returns the variables of a network that gives one answer."""
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
  """Function that adds a checkpoint to a run, and run.json with a recipe."""
  def save(step, averages, variables=None, **recipe):
    with tf.Graph().as_default(), tf.Session() as session:
      for name, value in (variables or averages).items():
        tf.get_variable(name, initializer=value)
      for name, value in averages.items():
        tf.get_variable(f'{name}/ExponentialMovingAverage', initializer=value)
      tf.get_variable('total_loss/avg', initializer=4.6)
      tf.get_variable('global_step', initializer=np.int64(step))
      session.run(tf.global_variables_initializer())
      if recipe:  # The flags of `evaluate` override the data.
        run = cifar10_train.Run(
            'cifar10', '/none', TINY.classes, cifar10.Recipe(**recipe))
        (folder / 'run.json').write_text(json.dumps(dataclasses.asdict(run)))
      return tf.train.Saver().save(
          session, str(folder / 'model.ckpt'), global_step=step)

  folder = tmp_path / 'run'
  folder.mkdir()
  return save


def read_outcome(run):
  """Returns what the console says about one evaluation."""
  assert (run.code, run.stderr) == (0, '')
  _, precision, counts, _, *lines = run.stdout.splitlines()
  correct, total, step = map(int, CORRECT_LINE.fullmatch(counts).groups())
  assert PRECISION_LINE.fullmatch(precision)[1] == f'{correct / total:.3f}'
  return types.SimpleNamespace(
      correct=correct, total=total, step=step,
      classes={line.split()[0]: line.split()[1:] for line in lines})


def read_pictures(data_dir, files):
  """Returns labels, and pictures [n, height, width, depth]."""
  records = np.concatenate([
      np.fromfile(data_dir / TINY.folder / name, np.uint8)
      for name in files]).reshape(-1, TINY.record_bytes)
  return records[:, 0], np.moveaxis(
      records[:, 1:].reshape(-1, 3, 32, 32), 1, 3)


def write_picture(path, picture):
  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.Image.fromarray(picture.astype(np.uint8)).save(path)


def predict(pictures, values, views):
  """Returns the probabilities of a network, averaged over views."""
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


@pytest.mark.parametrize('flags, label', [
    ([], 3), (['--nouse_moving_average'], 5)])
def test_latest_checkpoint_of_the_original_is_evaluated(
    evaluate, save, tiny_dir, flags, label):
  save(3, always(0))
  save(20, averages=always(3), variables=always(5))
  labels, _ = read_pictures(tiny_dir, TINY.eval_files)
  assert (labels == 3).sum() != (labels == 5).sum()
  outcome = read_outcome(evaluate('--run_once', *flags))
  assert (outcome.step, outcome.correct, outcome.total) == (
      20, (labels == label).sum(), 70)


@pytest.mark.parametrize('batch_size, flags, views', [
    (7, [], VIEWS[:1]), (100, ['--multiview'], VIEWS)])
def test_each_answer_is_compared_with_its_own_label(
    evaluate, save, tmp_path, tiny_dir, batch_size, flags, views):
  labels, pictures = read_pictures(tiny_dir, TINY.eval_files)
  probabilities = predict(pictures, opinionated(), views)
  answers = probabilities.argmax(axis=1)
  assert len(set(answers)) > 2
  save(1, opinionated())
  path = tmp_path / 'predictions.csv'
  outcome = read_outcome(evaluate(
      '--run_once', f'--batch_size={batch_size}', f'--predictions_csv={path}',
      *flags))
  assert outcome.correct == (answers == labels).sum()
  for i, name in enumerate(TINY.classes):
    right = ((labels == i) & (answers == i)).sum()
    true, predicted = (labels == i).sum(), (answers == i).sum()
    assert outcome.classes[name] == [
        f'{right / true:.3f}', f'({right}/{true})',
        f'{right / max(predicted, 1):.3f}', f'({right}/{predicted})']
  rows = list(csv.DictReader(path.read_text().splitlines()))
  assert list(rows[0]) == ['key', 'label', 'prediction', *TINY.classes]
  assert [(row['key'], row['label'], row['prediction']) for row in rows] == [
      (f'test.bin:{i}', TINY.classes[label], TINY.classes[answer])
      for i, (label, answer) in enumerate(zip(labels, answers))]
  np.testing.assert_allclose(
      [[float(row[name]) for name in TINY.classes] for row in rows],
      probabilities, atol=1e-4)


@pytest.mark.parametrize('part, asked, total', [
    ('test', '--num_examples=33', 33), ('test', '--num_examples=71', 70),
    ('test', '--run_once', 70), ('train_eval', '--num_examples=249', 249)])
def test_exactly_the_examples_asked_for_are_counted(
    evaluate, save, tiny_dir, part, asked, total):
  save(1, always(2))
  outcome = read_outcome(evaluate(
      '--run_once', f'--eval_data={part}', asked))
  files = TINY.eval_files if part == 'test' else TINY.train_files
  labels = read_pictures(tiny_dir, files)[0][:total]
  assert (outcome.correct, outcome.total) == ((labels == 2).sum(), total)


def test_data_network_and_precision_are_those_of_the_run(
    call_script, tmp_path):
  for folder in ('train/light', 'train/dark', 'test/light', 'test/dark'):
    write_picture(tmp_path / 'mine' / folder / 'a.jpg', np.full([9, 9, 3], 9))
  run = call_script(
      cifar10_train, f'--dataset={tmp_path / "mine"}', '--batch_size=2',
      f'--data_dir={tmp_path / "data"}', '--max_steps=1', '--model=local',
      '--image_size=28', f'--train_dir={tmp_path / "run"}', '--use_bfloat16')
  assert run.code == 0
  run = call_script(cifar10_eval, f'--checkpoint_dir={tmp_path / "run"}')
  assert list(read_outcome(run).classes) == ['dark', 'light']
  path, = (tmp_path / 'run' / 'eval').glob('events.out.*')
  graphs = [event.graph_def for event in tf.train.summary_iterator(str(path))]
  graph = tf.GraphDef.FromString(next(filter(None, graphs)))
  assert [node.attr['T'].type for node in graph.node
          if node.name == 'conv1/Conv2D'] == [tf.bfloat16.as_datatype_enum]


def test_tensorboard_gets_numbers_and_pictures_at_the_step(
    evaluate, save, tmp_path):
  pictures = []
  for step, label in (5, 3), (123456, 0):
    save(step, always(label))
    share = read_outcome(evaluate('--run_once')).correct / 70
    found = {tag: value for at, tag, value in events(tmp_path / 'eval')
             if at == step}
    assert found['Precision @ 1'].simple_value == pytest.approx(share)
    assert found['cross_entropy'].simple_value == pytest.approx(
        np.log(np.e + 9) - share, rel=1e-5)
    pictures.append([
        PIL.Image.open(io.BytesIO(found[tag].image.encoded_image_string))
        for tag in ('confusion', 'surest_mistakes')])
  for before, now in zip(*pictures):
    assert before.size == now.size and before.tobytes() != now.tobytes()


def test_surest_mistakes_are_kept():
  probabilities = np.random.default_rng(0).dirichlet(np.ones(10), size=70)
  outcome = cifar10_eval.Outcome(TINY.classes)
  for batch in np.split(probabilities, 7):
    outcome.add(np.zeros([10, 24, 24, 3]), np.zeros(10, int), batch)
  wrong = probabilities[probabilities.argmax(axis=1) != 0]
  assert [mistake[0] for mistake in outcome.mistakes] == sorted(
      wrong.max(axis=1), reverse=True)[:8]


# Which checkpoints.


@pytest.mark.parametrize('interval_secs, steps', [
    (0, [1, 2, 3]), (1000, [1, 3])])
def test_each_checkpoint_is_evaluated_once_up_to_the_last(
    evaluate, save, tmp_path, monkeypatch, interval_secs, steps):
  pauses = [lambda: save(1, always(0), max_steps=3), lambda: None,
            lambda: save(2, always(0)), lambda: save(3, always(0))]
  monkeypatch.setattr(cifar10_eval, 'time', types.SimpleNamespace(
      monotonic=time.monotonic, sleep=lambda secs: pauses.pop(0)()))
  run = evaluate(f'--eval_interval_secs={interval_secs}')
  assert (run.code, run.stderr) == (0, '')
  assert f'{tmp_path / "run"}' in run.stdout.splitlines()[0]  # It waits.
  assert [step for step, tag, _ in events(tmp_path / 'eval')
          if tag == 'Precision @ 1'] == steps


def test_without_a_checkpoint_it_fails_in_one_line(evaluate, tmp_path):
  run = evaluate('--run_once')
  assert is_one_line(run, f'--checkpoint_dir={tmp_path / "run"}')


def test_checkpoint_of_another_network_is_one_line(evaluate, save):
  values = {**always(0), 'local4/weights': np.zeros([384, 100], np.float32)}
  checkpoint = save(1, values)
  assert is_one_line(evaluate('--run_once'), checkpoint, 'local4')
  del values['local4/weights']
  checkpoint = save(2, values)
  assert is_one_line(evaluate('--run_once'), checkpoint, 'local4')


def test_checkpoint_without_averages_needs_a_flag(evaluate, save):
  save(1, averages={}, variables=always(3))
  assert is_one_line(
      evaluate('--run_once'), 'ExponentialMovingAverage is missing')
  assert evaluate('--run_once', '--nouse_moving_average').code == 0


def test_probabilities_that_are_not_finite_are_one_line(evaluate, save):
  checkpoint = save(1, {
      **opinionated(), 'local4/weights': np.full([384, 192], 1e38, 'f')})
  assert is_one_line(evaluate('--run_once'), checkpoint, 'finite')
  picture = ROOT / 'tests' / 'pictures' / 'ship.png'
  assert is_one_line(evaluate(f'--predict={picture}'), checkpoint, 'finite')


# Prediction and serving.

LOAD = """
import os, sys
import numpy as np, tensorflow as tf
os.chdir(sys.argv[1])
signatures = tf.saved_model.load('model').signatures
pictures = np.load('pictures.npy')
served = signatures['serving_default'](images=tf.constant(pictures))
encoded = tf.constant([open('0.png', 'rb').read()])
for name, is_read in ('0.jpg', True), ('0.bmp', False), ('0.gif', False):
  try:
    signatures['encoded'](encoded=tf.constant([open(name, 'rb').read()]))
    assert is_read, name
  except tf.errors.InvalidArgumentError as error:
    assert not is_read and 'JPEG and PNG' in str(error), name
lite = tf.lite.Interpreter(
    model_content=tf.lite.TFLiteConverter.from_saved_model(
        'model', signature_keys=['serving_default']).convert())
on_phone = lite.get_signature_runner('serving_default')(images=pictures)
for labels in (served['labels'].numpy(), on_phone['labels'],
               signatures['encoded'](encoded=encoded)['labels'].numpy()):
  print(b' '.join(labels).decode())
"""


def test_prediction_and_exported_model_agree_with_evaluation(
    evaluate, save, start_script, tmp_path, tiny_dir):
  save(1, opinionated(image_size=28), image_size=28)
  table, model = tmp_path / 'predictions.csv', tmp_path / 'model'
  evaluate('--run_once', '--multiview', f'--predictions_csv={table}')
  rows = list(csv.DictReader(table.read_text().splitlines()))
  _, pictures = read_pictures(tiny_dir, TINY.eval_files)
  paths = [tmp_path / f'{i}.png' for i in range(5)]
  for path, picture in zip(paths, pictures):
    write_picture(path, picture)
  table.rename(tmp_path / 'no_picture.png')
  run = evaluate('--multiview', f'--predict={paths[0]}', *map(str, paths[1:]),
                 f'{tmp_path / "no_picture.png"}')
  assert is_one_line(run, 'no_picture.png')
  assert [line.split(',')[0] for line in run.stdout.splitlines()] == [
      f'{path}: {row["prediction"]} {float(row[row["prediction"]]):.3f}'
      for path, row in zip(paths, rows)]

  assert evaluate(f'--export_dir={model}', '--multiview').code == 0
  np.save(tmp_path / 'pictures.npy', pictures)
  for kind in 'jpg', 'bmp', 'gif':
    PIL.Image.open(paths[0]).save(tmp_path / f'0.{kind}')
  (tmp_path / 'load.py').write_text(LOAD)
  run = finish(start_script(str(tmp_path / 'load.py'), str(tmp_path)))
  assert run.code == 0, run.stderr
  expected = [row['prediction'] for row in rows]
  served, on_phone, encoded = map(str.split, run.stdout.splitlines())
  assert served == on_phone == expected and encoded == expected[:1]
  assert is_one_line(evaluate(f'--export_dir={model}'), model)
