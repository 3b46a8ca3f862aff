"""cifar10: the network, its loss and its training step are the tutorial's.

Its numbers are those that the original publishes, or TensorFlow's and numpy's.
Scripts of readers, who know the original alone, run as they are.
"""
import csv
import dataclasses
import os
import re
import shutil

import numpy as np
import pytest

from conftest import (
    FLAGS, ROOT, SHAPES, events, finish, newest_step, parse_flags,
    write_random)
import tensorflow.compat.v1 as tf

from benchmarks import plain
import cifar10
import cifar10_eval
import cifar10_train
from cifar10_input import CIFAR10

# Deviation of the initial weights, and the initial biases.
INITIAL = {
    'conv1': (0.05, 0.0), 'conv2': (0.05, 0.1), 'local3': (0.04, 0.1),
    'local4': (0.04, 0.1), 'softmax_linear': (1 / 192, 0.0)}

AVERAGE = '/ExponentialMovingAverage'


def _batch(size, scale=1.0):
  """Returns images as standardization leaves them, and labels."""
  random = np.random.default_rng(0)
  images = scale * random.standard_normal((size, 24, 24, 3))
  return images.astype(np.float32), random.integers(0, 10, size, np.int32)


def _values(session):
  """Returns the values of the trainable variables, by name."""
  return session.run({v.op.name: v for v in tf.trainable_variables()})


def _session(noise=0.02):
  """Starts a session with noise on all variables."""
  session = tf.Session()
  session.run(tf.global_variables_initializer())
  for v in tf.trainable_variables():
    session.run(tf.assign_add(v, tf.random.normal(v.shape, stddev=noise)))
  return session


def test_variables_have_the_names_and_shapes_of_the_original():
  with tf.device('/gpu:0'):
    logits = cifar10.inference(tf.zeros([1, 24, 24, 3]))
  variables = tf.global_variables()
  assert {v.op.name: v.shape.as_list() for v in variables} == SHAPES
  assert tf.trainable_variables() == variables
  assert {v.device for v in variables} == {'/device:CPU:0'}
  assert logits.device == '/device:GPU:0'


def test_initial_variables_are_drawn_as_the_original_draws_them():
  cifar10.inference(tf.zeros([1, 24, 24, 3]))
  with _session(noise=0) as session:
    values = _values(session)
  for layer, (deviation, bias) in INITIAL.items():
    weights = values[layer + '/weights']
    # Of a normal distribution cut off at two deviations, 0.8796 of it is left.
    assert weights.std() == pytest.approx(0.8796 * deviation, rel=0.05)
    assert abs(weights.mean()) < 5 * deviation / np.sqrt(weights.size)
    assert 1.8 * deviation < abs(weights).max() <= 2.0001 * deviation
    np.testing.assert_array_equal(values[layer + '/biases'], np.float32(bias))


def _layers_of_the_table(images, values):
  """Returns the network's layers, in the tutorial's operations, by name."""
  def convolve(images, layer):
    convolved = tf.nn.conv2d(images, values[layer + '/weights'], 1, 'SAME')
    return tf.nn.relu(convolved + values[layer + '/biases'])

  def connect(rows, layer):
    return rows @ values[layer + '/weights'] + values[layer + '/biases']

  def normalize(images):
    return tf.nn.lrn(images, 4, bias=1.0, alpha=0.001 / 9.0, beta=0.75)

  pool1 = tf.nn.max_pool2d(convolve(images, 'conv1'), 3, 2, 'SAME')
  norm1 = normalize(pool1)
  conv2 = convolve(norm1, 'conv2')
  norm2 = normalize(conv2)
  pool2 = tf.nn.max_pool2d(norm2, 3, 2, 'SAME')
  local3 = tf.nn.relu(connect(tf.reshape(pool2, [-1, 6 * 6 * 64]), 'local3'))
  local4 = tf.nn.relu(connect(local3, 'local4'))
  return {'pool1': pool1, 'norm1': norm1, 'conv2/conv2': conv2, 'norm2': norm2,
          'pool2': pool2, 'local3/local3': local3, 'local4/local4': local4,
          'softmax_linear/softmax_linear': connect(local4, 'softmax_linear')}


def test_layers_have_the_names_and_values_of_the_table():
  batch, _ = _batch(16, scale=20)  # So that normalization makes a difference.
  images = tf.placeholder(tf.float32, [None, 24, 24, 3])
  logits = cifar10.inference(images)
  assert logits.shape.as_list() == [None, 10]
  with _session() as session:
    expected = session.run(_layers_of_the_table(batch, _values(session)))
    layers = {name: name + ':0' for name in expected}
    results = session.run(layers, {images: batch})
    alone = session.run(logits, {images: batch[3:4]})
  for name, values in expected.items():
    assert values.std() > 0.1
    np.testing.assert_allclose(
        results[name], values, atol=1e-5 * abs(values).max())
  np.testing.assert_allclose(alone, values[3:4], atol=1e-5 * abs(values).max())


@pytest.mark.parametrize('depth_radius, bias, alpha, channels, scale, dtype', [
    (4, 1.0, 0.001 / 9, 64, 10, tf.float32),
    (4, 1.0, 0.001 / 9, 64, 1e4, tf.float32),
    (4, 1.0, 0.001 / 9, 8, 0, tf.float32),
    (7, 2.0, 0.1, 33, 10, tf.float32),
    (40, 2.0, 0.1, 16, 10, tf.float32),
    (4, 1.0, 0.001, 64, 10, tf.bfloat16)])
def test_normalization_and_its_gradient_are_those_of_tensorflow(
    depth_radius, bias, alpha, channels, scale, dtype):
  random = np.random.default_rng(1)
  images, upstream = (
      tf.constant(random.normal(size=(3, 5, 4, channels)), tf.float32)
      for _ in range(2))
  rounded = tf.cast(scale * images, dtype)
  exact = tf.cast(rounded, tf.float32)
  ours = cifar10.local_response_normalization(
      rounded, depth_radius, bias, alpha)
  ours = [ours, *tf.gradients(ours, rounded, tf.cast(upstream, dtype))]
  oracle = tf.nn.lrn(exact, depth_radius, bias, alpha, beta=0.75)
  oracle = [oracle, *tf.gradients(oracle, exact, upstream)]
  with tf.Session() as session:
    results, expected = session.run([
        [tf.cast(values, tf.float32) for values in ours], oracle])
  # What float32 loses in two orders of summation; and half a unit in the last
  # of 8 bits, twice, since the gradient that comes in is rounded likewise.
  tolerance = 2e-6 if dtype == tf.float32 else 2 ** -7
  for values, expected_values in zip(results, expected):
    np.testing.assert_allclose(
        values, expected_values, atol=tolerance * abs(expected_values).max())


@pytest.mark.parametrize('dtype, tolerance', [
    (tf.float16, 0.01), (tf.bfloat16, 0.03)])
def test_16_bits_are_for_activations_and_not_for_variables(dtype, tolerance):
  images = tf.constant(_batch(8)[0])
  logits = cifar10.inference(images, cifar10.Recipe(dtype=dtype))
  assert {v.dtype.base_dtype for v in tf.global_variables()} == {tf.float32}
  assert logits.dtype == tf.float32
  graph = tf.get_default_graph()
  for name in ('conv1/Conv2D', 'norm1', 'conv2/Conv2D', 'local3/MatMul'):
    assert graph.get_tensor_by_name(name + ':0').dtype == dtype
  with tf.variable_scope('', reuse=True):
    exact = cifar10.inference(images)
  with _session(noise=0) as session:
    result, expected = session.run([logits, exact])
  np.testing.assert_allclose(result, expected, atol=tolerance)


def test_locally_connected_layer_is_a_convolution_with_weights_of_its_own():
  images, _ = _batch(2)
  cifar10.inference(tf.constant(images), cifar10.Recipe(model='local'))
  with _session() as session:
    values = _values(session)
    layers = session.run(['pool2:0', 'local3/local3:0', 'local4/local4:0'])
  for name, before, after in zip(('local3', 'local4'), layers, layers[1:]):
    padded = np.pad(before, [[0, 0], [1, 1], [1, 1], [0, 0]])
    for i, (y, x) in enumerate(np.ndindex(6, 6)):
      patches = padded[:, y:y + 3, x:x + 3].reshape(2, -1)
      expected = np.maximum(0, patches @ values[name + '/weights'][i]
                            + values[name + '/biases'][y, x])
      np.testing.assert_allclose(after[:, y, x], expected, atol=1e-5)


def test_local_model_shares_all_but_its_top_with_the_default():
  cifar10.inference(tf.zeros([1, 24, 24, 3]), cifar10.Recipe(model='local'))
  shapes = {v.op.name: v.shape.as_list() for v in tf.trainable_variables()}
  assert shapes == {
      **SHAPES, 'local3/weights': [36, 576, 32], 'local3/biases': [6, 6, 32],
      'local4/weights': [36, 288, 32], 'local4/biases': [6, 6, 32],
      'softmax_linear/weights': [1152, 10]}


@pytest.mark.parametrize('decay', [0.0, 0.1])
def test_loss_is_mean_cross_entropy_plus_weight_decays(decay):
  images, labels = _batch(16)
  recipe = cifar10.Recipe(weight_decay=decay)
  logits = cifar10.inference(tf.constant(images), recipe)
  total_loss = cifar10.loss(logits, tf.constant(labels))
  losses = {loss.op.name: loss for loss in tf.get_collection('losses')}
  with _session() as session:
    values = _values(session)
    losses, total, logits = session.run([losses, total_loss, logits])
  logits = logits.astype(np.float64)
  expected = {
      '%s/weight_loss' % layer:
      decay * (values[layer + '/weights'].astype(np.float64) ** 2).sum() / 2
      for layer in ('local3', 'local4')}
  expected['cross_entropy'] = (np.log(np.exp(logits).sum(axis=1))
                               - logits[np.arange(16), labels]).mean()
  assert losses == pytest.approx(expected, rel=1e-5)
  assert total == pytest.approx(sum(expected.values()), rel=1e-5)


def test_label_smoothing_gives_all_classes_a_share_of_each_label():
  random = np.random.default_rng(0)
  logits = random.normal(0, 3, [16, 10]).astype(np.float32)
  labels = random.integers(0, 10, 16)
  ours = cifar10.loss(tf.constant(logits), tf.constant(labels),
                      recipe=cifar10.Recipe(label_smoothing=0.1))
  expected = tf.losses.softmax_cross_entropy(
      np.eye(10)[labels], logits, label_smoothing=0.1)
  with tf.Session() as session:
    ours, expected = session.run([ours, expected])
  assert ours == pytest.approx(expected, rel=1e-5)


def test_loss_counts_what_a_reader_adds_but_not_in_a_scope_of_its_own():
  images, labels = _batch(4)
  tf.add_to_collection('losses', tf.constant(1000.0))
  with tf.name_scope('mine') as scope:
    logits = cifar10.inference(tf.constant(images))
    losses = [cifar10.loss(logits, labels, scope)]
  losses.append(cifar10.loss(logits, labels))
  with _session(noise=0) as session:
    scoped, whole = session.run(losses)
  assert 4 < scoped < 6
  assert 1006 < whole < 1009  # With a second cross entropy.


@pytest.mark.parametrize('batch_size, stair', [(128, 136718), (64, 273437)])
def test_step_has_the_rate_and_the_averages_of_the_original(batch_size, stair):
  FLAGS.batch_size = batch_size
  variable = tf.get_variable('v', initializer=0.0)
  tf.get_variable('unused', initializer=0.0)  # By the loss: it does no harm.
  global_step = tf.train.get_or_create_global_step()
  train_op = cifar10.train(1.0 * variable, global_step)
  average, = tf.global_variables('v' + AVERAGE)
  with _session(noise=0) as session:
    # The stair itself may be on either side in 32-bit arithmetic.
    for step, rate, decay in [
        (0, 0.1, 2 / 11), (41, 0.1, 43 / 52), (stair - 1, 0.1, 0.9999),
        (stair + 1, 0.01, 0.9999), (2 * stair - 1, 0.01, 0.9999),
        (2 * stair + 1, 0.001, 0.9999)]:
      variable.load(0.0, session)
      average.load(1.0, session)
      global_step.load(step, session)
      session.run(train_op)
      assert session.run(variable) == pytest.approx(-rate, rel=1e-5)
      assert session.run(average) == pytest.approx(
          decay - (1 - decay) * rate, abs=1e-7)


@pytest.mark.parametrize('schedule, rates', [
    ('staircase', [0.2, 0.2, 0.2, 0.02, 0.02]),
    ('linear', [0.2, 0.15, 0.1, 0, 0]),
    ('cosine', [0.2, 0.1 + 0.1 * 0.5 ** 0.5, 0.1, 0, 0])])
def test_learning_rate_follows_its_schedule(schedule, rates):
  step = tf.placeholder(tf.int64, [])
  rate = cifar10.learning_rate(step, cifar10.Recipe(
      learning_rate=0.2, schedule=schedule, decay_steps=100))
  with tf.Session() as session:
    found = [session.run(rate, {step: n}) for n in (0, 25, 50, 100, 120)]
  np.testing.assert_allclose(found, rates, atol=1e-6)


def test_momentum_is_that_of_nesterov():
  variable = tf.get_variable('v', initializer=1.0)
  step = cifar10.train(2 * variable, tf.train.get_or_create_global_step(),
                       cifar10.Recipe(learning_rate=0.1, momentum=0.9))
  with _session(noise=0) as session:
    session.run(step)
    session.run(step)
    # Velocities of 2 and 3.8, and a look ahead from each.
    assert session.run(variable) == pytest.approx(
        1 - 0.1 * (2 + 0.9 * 2) - 0.1 * (2 + 0.9 * 3.8))


def test_muon_centres_gradients_and_moves_kernels_equally_far_all_ways():
  normal = np.random.default_rng(0).normal
  gradients = {'kernel': normal(1, 1, [5, 5, 2, 8]),
               'matrix': normal(1, 1, [6, 4]), 'biases': normal(1, 1, [4]),
               'at_three_places': normal(1, 1, [3, 6, 4])}
  variables = {name: tf.get_variable(name, initializer=tf.zeros(value.shape))
               for name, value in gradients.items()}
  loss = tf.add_n([tf.reduce_sum(variables[name] * value.astype(np.float32))
                   for name, value in gradients.items()])
  step = cifar10.train(
      loss, tf.train.get_or_create_global_step(),
      cifar10.Recipe(optimizer='muon', learning_rate=0.1, momentum=0.9))
  with _session(noise=0) as session:
    session.run(step)
    moved = {name: value / -0.1
             for name, value in session.run(variables).items()}
  for name in 'biases', 'at_three_places':
    np.testing.assert_allclose(moved[name], 1.9 * gradients[name], rtol=1e-5)
  matrix = gradients['matrix']
  np.testing.assert_allclose(
      moved['matrix'], 1.9 * (matrix - matrix.mean(axis=0)), atol=1e-5)
  matrix = gradients['kernel'].reshape(50, 8)
  left, _, right = np.linalg.svd(matrix - matrix.mean(axis=0), False)
  spread = left.T @ moved['kernel'].reshape(50, 8) @ right.T
  values = spread.diagonal() / (0.05 * 50 ** 0.5)
  assert 0.6 < values.min() and values.max() < 1.3
  np.testing.assert_allclose(spread, np.diag(spread.diagonal()), atol=1e-4)


def test_weights_that_muon_will_keep_centred_begin_so():
  cifar10.inference(
      tf.zeros([1, 24, 24, 3]), cifar10.Recipe(optimizer='muon'))
  with _session(noise=0) as session:
    for name, values in _values(session).items():
      if 'weights' in name:
        means = values.reshape(-1, values.shape[-1]).mean(axis=0)
        np.testing.assert_allclose(means, 0, atol=1e-6)
        deviation, _ = INITIAL[name.split('/')[0]]
        assert values.std() == pytest.approx(0.88 * deviation, rel=0.04)


def _one_step(build, values):
  """Returns what one step makes of variables that start with given values."""
  with tf.Graph().as_default(), tf.Session() as session:
    train_op = build()
    session.run(tf.global_variables_initializer())
    variables = {v.op.name: v for v in tf.global_variables()
                 if v.op.name.replace(AVERAGE, '') in values}
    for name, variable in variables.items():
      variable.load(values[name.replace(AVERAGE, '')], session)
    session.run(train_op)
    return session.run(variables)


def test_step_by_default_is_that_of_the_plain_formulation(monkeypatch):
  batch = _batch(128)
  monkeypatch.setattr(cifar10, 'distorted_inputs',
                      lambda *_, **__: map(tf.constant, batch))
  parse_flags(cifar10_train)
  normal = np.random.default_rng(0).normal
  before = {name: normal(0, 0.04, shape) for name, shape in SHAPES.items()}
  before['global_step'] = 0
  ours = _one_step(lambda: cifar10_train.build_step(
      CIFAR10, cifar10_train.training_recipe(CIFAR10, 128),
      tf.train.get_or_create_global_step())[0], before)
  expected = _one_step(lambda: plain.build_step(
      None, batch=list(map(tf.constant, batch)))[0], before)
  assert len(ours) == len(expected) == 2 * len(SHAPES) + 1
  for name, value in ours.items():
    np.testing.assert_allclose(value, expected[name], atol=1e-5)
    update = abs(expected[name] - before[name.replace(AVERAGE, '')]).max()
    assert update > 1e-4
    # Rounding decides which of two equal values a pool takes.
    np.testing.assert_allclose(
        value, expected[name], rtol=0, atol=1e-2 * update)


def _build():
  """Builds a training on two images. Returns gradients and a step."""
  images, labels = _batch(2)
  loss = cifar10.loss(cifar10.inference(tf.constant(images)), labels)
  gradients = tf.gradients(loss, tf.trainable_variables())
  return gradients, cifar10.train(loss, tf.train.get_or_create_global_step())


def test_checkpoint_of_16_bits_is_as_that_of_the_original():
  FLAGS.use_fp16 = True
  gradients, train_op = _build()
  variables = {v.op.name: v for v in tf.global_variables()}
  assert set(variables) == {
      'global_step', *SHAPES, *(name + AVERAGE for name in SHAPES),
      *(loss + '/avg' for loss in (
          'cross_entropy', 'total_loss', 'local3/weight_loss',
          'local4/weight_loss'))}
  assert variables.pop('global_step').dtype.base_dtype == tf.int64
  assert {v.dtype.base_dtype for v in variables.values()} == {tf.float32}
  with _session() as session:
    before, gradients = session.run([tf.trainable_variables(), gradients])
    session.run(train_op)
    after = session.run(tf.trainable_variables())
  for old, new, gradient in zip(before, after, gradients):
    assert 0 < abs(gradient).max() < 1000
    np.testing.assert_allclose(
        new - old, -0.1 * gradient, atol=1e-3 * abs(gradient).max())


def test_displayed_are_raw_and_averaged_losses_and_the_share_of_zeros():
  _, train_op = _build()
  fetches = [tf.summary.merge_all(), 'pool1:0', 'local4/local4:0']
  raw = []
  with _session() as session:
    for _ in range(3):
      summary, pool1, local4 = session.run(fetches)
      scalars = {value.tag: value.simple_value
                 for value in tf.Summary.FromString(summary).value}
      raw.append(scalars['total_loss (raw)'])
      session.run(train_op)
  assert len(set(raw)) == 3
  assert scalars['total_loss'] == pytest.approx(
      0.81 * raw[0] + 0.09 * raw[1] + 0.1 * raw[2], rel=1e-5)
  assert 0 <= scalars['Precision @ 1'] <= 1
  for layer, values in ('conv1', pool1), ('local4', local4):
    assert 0 < scalars[layer + '/sparsity'] < 1
    assert scalars[layer + '/sparsity'] == pytest.approx((values == 0).mean())


# Readers.


def test_constants_are_those_of_the_original():
  assert (cifar10.IMAGE_SIZE, cifar10.TOWER_NAME) == (24, 'tower')
  assert cifar10.NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN == 50000
  assert cifar10.NUM_EXAMPLES_PER_EPOCH_FOR_EVAL == 10000
  assert cifar10.Recipe() == cifar10.Recipe(
      num_classes=10, model='default', dtype=tf.float32, learning_rate=0.1,
      schedule='staircase', decay_steps=136718, momentum=0.0,
      weight_decay=0.004, moving_average_decay=0.9999)


@pytest.fixture(scope='module')
def readers_run(start_script, tmp_path_factory):
  """The run of readers_script.py, on noise in files as large as CIFAR-10's."""
  data_dir, train_dir = map(tmp_path_factory.mktemp, ('noise', 'readers_run'))
  folder = data_dir / CIFAR10.folder
  write_random(dataclasses.replace(CIFAR10, train_files={}), folder)
  for name in CIFAR10.train_files:
    os.link(folder / 'test_batch.bin', folder / name)
  run = finish(start_script(
      'tests/readers_script', '--data_dir=%s' % data_dir,
      '--train_dir=%s' % train_dir, '--max_steps=3'))
  run.data_dir, run.train_dir = data_dir, train_dir
  yield run
  shutil.rmtree(data_dir)


def test_script_that_knows_the_tutorial_alone_runs_unchanged(readers_run):
  assert readers_run.code == 0, readers_run.stderr
  losses = re.findall(r'^my step \d: loss (.*), ', readers_run.stdout, re.M)
  assert len(losses) == 3 and float(losses[0]) == pytest.approx(4.68, abs=0.05)
  assert newest_step(readers_run.train_dir) == 3


def test_script_of_the_first_years_counts_as_evaluation_does(
    readers_run, start_script, call_script, tmp_path):
  flags = ['--data_dir=%s' % readers_run.data_dir,
           '--checkpoint_dir=%s' % readers_run.train_dir]
  classic = start_script(
      'tests/readers_classic', *flags, PYTHONPATH=str(ROOT))
  path = tmp_path / 'predictions.csv'
  call_script(cifar10_eval, *flags, '--eval_dir=%s' % tmp_path, '--run_once',
              '--predictions_csv=%s' % path)
  hits = [row['label'] == row['prediction']
          for row in csv.DictReader(path.read_text().splitlines())]
  assert len(hits) == 10000
  classic = finish(classic)
  assert classic.code == 0, classic.stderr
  # Its last batch is filled up with the first examples.
  assert classic.stdout.splitlines()[-1] == 'my count: %d' % (
      sum(hits) + sum(hits[:79 * 128 - 10000]))


def test_script_has_constants_and_flags_of_its_own(start_script, tmp_path):
  dataset = dataclasses.replace(
      CIFAR10, classes=tuple('abcdef'),
      train_files=dict.fromkeys(CIFAR10.train_files, 50),
      eval_files={'test_batch.bin': 50})
  write_random(dataset, tmp_path / dataset.folder)
  run = finish(start_script(
      'tests/readers_constants', '--data_dir=%s' % tmp_path,
      '--train_dir=%s' % tmp_path, '--batch_size=50', PYTHONPATH=str(ROOT)))
  assert run.code == 0, run.stderr
  assert len(re.findall(r'^my counts: (\d+) \1$', run.stdout, re.M)) == 4
  rates = [value.simple_value for _, tag, value in events(tmp_path)
           if tag == 'learning_rate']
  assert (rates[0], rates[-1]) == pytest.approx((0.01, 0.005))
  checkpoint = tf.train.load_checkpoint(str(tmp_path))
  shapes = checkpoint.get_variable_to_shape_map()
  assert shapes['local3/weights'] == [8 * 8 * 64, 384]
  assert shapes['softmax_linear/weights'] == [192, 6]
  assert not any('Momentum' in name for name in shapes)
  value, average = (checkpoint.get_tensor('conv1/biases' + suffix)
                    for suffix in ('', AVERAGE))
  np.testing.assert_allclose(average, value, rtol=1e-3)
