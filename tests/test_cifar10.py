"""cifar10: the network, its loss and its training step are the tutorial's.

Expected numbers are the original's, or TensorFlow and numpy compute them.
Scripts of readers, who know only the original, run as they are.
"""
import dataclasses
import re

import numpy as np
import pytest

from conftest import (
    FLAGS, ROOT, SHAPES, events, finish, newest_step, parse_flags, write_random)
import tensorflow.compat.v1 as tf

from benchmarks import plain
import cifar10
import cifar10_eval
import cifar10_train
from cifar10_input import CIFAR10, UserError

# Deviation of the initial weights, and the initial biases.
INITIAL = {
    'conv1': (0.05, 0.0), 'conv2': (0.05, 0.1), 'local3': (0.04, 0.1),
    'local4': (0.04, 0.1), 'softmax_linear': (1 / 192, 0.0)}

LOSSES = ['cross_entropy', 'local3/weight_loss', 'local4/weight_loss',
          'total_loss']

LAYERS = {
    'conv1/conv1': [24, 24, 64],
    'pool1': [12, 12, 64], 'norm1': [12, 12, 64], 'conv2/conv2': [12, 12, 64],
    'norm2': [12, 12, 64], 'pool2': [6, 6, 64], 'local3/local3': [384],
    'local4/local4': [192], 'softmax_linear/softmax_linear': [10]}

AVERAGE = '/ExponentialMovingAverage'


def _batch(size, scale=1.0):
  """Returns images as standardization leaves them, and labels."""
  random = np.random.default_rng(0)
  images = scale * random.standard_normal((size, 24, 24, 3))
  return images.astype(np.float32), random.integers(0, 10, size, np.int32)


def _session(noise=0.02):
  """Starts a session with noise on all variables."""
  session = tf.Session()
  session.run(tf.global_variables_initializer())
  for v in tf.trainable_variables():
    session.run(tf.assign_add(v, tf.random.normal(v.shape, stddev=noise)))
  return session


def _values(session):
  """Returns the values of the trainable variables, by name."""
  return session.run({v.op.name: v for v in tf.trainable_variables()})


def _build_training():
  """Builds a training on two images. Returns its step."""
  images, labels = _batch(2)
  loss = cifar10.loss(cifar10.inference(tf.constant(images)), labels)
  return cifar10.train(loss, tf.train.get_or_create_global_step())


# The network.


def test_variables_are_those_of_the_original():
  FLAGS.use_fp16 = True  # Variables are float32 all the same.
  with tf.device('/gpu:0'):
    _build_training()
  variables = tf.trainable_variables()
  assert {v.op.name: v.shape.as_list() for v in variables} == SHAPES
  assert {v.device for v in variables} == {'/device:CPU:0'}
  pool1 = tf.get_default_graph().get_tensor_by_name('pool1:0')
  assert (pool1.dtype, pool1.device) == ('float16', '/device:GPU:0')
  others = [*(name + AVERAGE for name in SHAPES),
            *(loss + '/avg' for loss in LOSSES)]
  assert {v.op.name: v.dtype.base_dtype for v in tf.global_variables()} == {
      **dict.fromkeys([*SHAPES, *others], tf.float32), 'global_step': tf.int64}


@pytest.mark.parametrize('optimizer', ['sgd', 'muon'])
def test_initial_variables_are_drawn_as_in_the_original(optimizer):
  cifar10.inference(
      tf.zeros([1, 24, 24, 3]), cifar10.Recipe(optimizer=optimizer))
  with _session(noise=0) as session:
    values = _values(session)
  for layer, (deviation, bias) in INITIAL.items():
    np.testing.assert_array_equal(values[f'{layer}/biases'], np.float32(bias))
    weights = values[f'{layer}/weights']
    # The normal distribution is cut off at two deviations.
    assert weights.std() == pytest.approx(0.8796 * deviation, rel=0.05)
    if optimizer == 'muon':  # It keeps weights centred, so they start so.
      means = weights.reshape(-1, weights.shape[-1]).mean(axis=0)
      np.testing.assert_allclose(means, 0, atol=1e-6)
    else:
      assert abs(weights.mean()) < 5 * deviation / np.sqrt(weights.size)
      assert 1.8 * deviation < abs(weights).max() <= 2.0001 * deviation


def test_layers_have_the_names_and_values_of_the_table():
  images = tf.constant(_batch(16, scale=20)[0])  # So normalization matters.
  logits = cifar10.inference(images)
  with tf.variable_scope('', reuse=True):  # The same variables.
    expected = plain.inference(images, tf.float32)
  with _session() as session:
    logits, expected = session.run([logits, expected])
    layers = session.run({name: name + ':0' for name in LAYERS})
  assert expected.std() > 0.1
  np.testing.assert_allclose(logits, expected, atol=1e-5 * abs(expected).max())
  assert LAYERS == {
      name: list(values.shape[1:]) for name, values in layers.items()}


@pytest.mark.parametrize('depth_radius, bias, alpha, dtype, tolerance, gpus', [
    (4, 1.0, 0.001 / 9, tf.float32, 2e-6, 0),
    (40, 2.0, 0.1, tf.float32, 2e-6, 0),
    (4, 1.0, 0.001, tf.bfloat16, 2 ** -7, 0),
    (4, 1.0, 0.001, tf.bfloat16, 2 ** -7, 1)])
def test_normalization_and_its_gradient_are_tensorflows(
    depth_radius, bias, alpha, dtype, tolerance, gpus, monkeypatch):
  monkeypatch.setattr(
      tf.config, 'list_physical_devices', lambda kind: [kind] * gpus)
  random = np.random.default_rng(1)
  x, dy = (tf.cast(random.normal(0, deviation, [3, 5, 4, 64]), dtype)
           for deviation in (10, 1))
  ours = cifar10.local_response_normalization(x, depth_radius, bias, alpha)
  types = {op.type for op in tf.get_default_graph().get_operations()}
  assert ('LRN' in types) == (gpus > 0)
  ours = [ours, *tf.gradients(ours, x, dy)]
  x, dy = (tf.cast(values, tf.float32) for values in (x, dy))
  expected = tf.nn.lrn(x, depth_radius, bias, alpha, beta=0.75)
  expected = [expected, *tf.gradients(expected, x, dy)]
  with tf.Session() as session:
    for values, exact in zip(*session.run([ours, expected])):
      np.testing.assert_allclose(
          values.astype('f'), exact, atol=tolerance * abs(exact).max())


@pytest.mark.parametrize('dtype, tolerance', [
    ('float16', 0.01), ('bfloat16', 0.03)])
def test_layers_in_16_bits_say_about_the_same(dtype, tolerance):
  images = tf.constant(_batch(8)[0])
  logits = cifar10.inference(images, cifar10.Recipe(dtype=dtype))
  graph = tf.get_default_graph()
  for name in ('conv1/Conv2D', 'norm1', 'conv2/Conv2D', 'local3/MatMul'):
    assert graph.get_tensor_by_name(name + ':0').dtype == dtype
  assert logits.dtype == tf.float32
  with tf.variable_scope('', reuse=True):
    exact = cifar10.inference(images)
  with _session(noise=0) as session:
    result, expected = session.run([logits, exact])
  np.testing.assert_allclose(result, expected, atol=tolerance)


def test_local_layers_have_other_weights_at_each_place():
  cifar10.inference(tf.constant(_batch(2)[0]), cifar10.Recipe(model='local'))
  assert {v.op.name: v.shape.as_list() for v in tf.trainable_variables()} == {
      **SHAPES, 'local3/weights': [36, 576, 32], 'local3/biases': [6, 6, 32],
      'local4/weights': [36, 288, 32], 'local4/biases': [6, 6, 32],
      'softmax_linear/weights': [1152, 10]}
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


# The loss and the step.


@pytest.mark.parametrize('recipe, decay, smoothing', [
    (None, 0.1, 0.0),
    (cifar10.Recipe(weight_decay=0.0, label_smoothing=0.2), 0.0, 0.2)])
def test_loss_is_cross_entropy_and_weight_decays(
    monkeypatch, recipe, decay, smoothing):
  monkeypatch.setattr(cifar10, 'WEIGHT_DECAY', 0.1)  # As a script may.
  images, labels = _batch(16)
  logits = cifar10.inference(tf.constant(images), recipe)
  tf.add_to_collection('losses', tf.constant(1.0, name='mine'))
  total_loss = cifar10.loss(logits, tf.constant(labels), recipe=recipe)
  losses = {loss.op.name: loss for loss in tf.get_collection('losses')}
  cross_entropy = tf.losses.softmax_cross_entropy(
      np.eye(10)[labels], logits, label_smoothing=smoothing)
  with _session() as session:
    values = _values(session)
    losses, total, cross_entropy = session.run(
        [losses, total_loss, cross_entropy])
  expected = {
      'mine': 1.0,
      'smoothed_cross_entropy' if smoothing else 'cross_entropy': cross_entropy,
      **{f'{layer}/weight_loss':
         decay * np.square(values[f'{layer}/weights']).sum() / 2
         for layer in ('local3', 'local4')}}
  assert losses == pytest.approx(expected, rel=1e-5)
  assert total == pytest.approx(sum(expected.values()), rel=1e-5)


def test_conv1_is_before_pooling_as_in_the_tutorial():
  images, _ = _batch(2)
  cifar10.inference(tf.constant(images))
  graph = tf.get_default_graph()
  conv1, pool1 = (graph.get_tensor_by_name(name + ':0')
                  for name in ('conv1/conv1', 'pool1'))
  weights, biases = tf.trainable_variables()[:2]
  expected = tf.nn.relu(tf.nn.conv2d(images, weights, 1, 'SAME') + biases)
  with _session() as session:
    found, pooled, expected, expected_pooled = session.run(
        [conv1, pool1, expected, tf.nn.max_pool(expected, 3, 2, 'SAME')])
  np.testing.assert_allclose(found, expected, atol=1e-5)
  np.testing.assert_allclose(pooled, expected_pooled, atol=1e-5)


@pytest.mark.parametrize('dtype', [np.uint8, np.int64])
def test_loss_takes_any_integer_labels_and_floating_logits(dtype):
  logits = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float16)
  labels = np.arange(4)
  loss = cifar10.loss(tf.constant(logits), tf.constant(labels.astype(dtype)))
  shares = np.exp(logits.astype(np.float64))
  shares /= shares.sum(axis=1, keepdims=True)
  with tf.Session() as session:
    assert session.run(loss) == pytest.approx(
        -np.log(shares[labels, labels]).mean(), rel=1e-3)


@pytest.mark.parametrize('batch_size, stair', [(128, 136718), (64, 273437)])
def test_rate_and_averages_are_those_of_the_original(batch_size, stair):
  FLAGS.batch_size = batch_size
  variable = tf.get_variable('v', initializer=0.0)
  global_step = tf.train.get_or_create_global_step()
  train_op = cifar10.train(1.0 * variable, global_step)
  average, = tf.global_variables('v' + AVERAGE)
  with _session(noise=0) as session:
    # float32 may put the stair itself on either side.
    for step, rate, decay in [
        (0, 0.1, 2 / 11), (41, 0.1, 43 / 52), (stair - 1, 0.1, 0.9999),
        (stair + 1, 0.01, 0.9999), (2 * stair + 1, 0.001, 0.9999)]:
      variable.load(0.0, session)
      average.load(1.0, session)
      global_step.load(step, session)
      session.run(train_op)
      assert session.run(variable) == pytest.approx(-rate, rel=1e-5)
      assert session.run(average) == pytest.approx(
          decay - (1 - decay) * rate, abs=1e-7)


def test_learning_rate_falls_to_zero_at_the_last_step():
  step = tf.placeholder(tf.int64, [])
  rate = cifar10.learning_rate(step, cifar10.Recipe(
      learning_rate=0.2, learning_rate_schedule='linear', max_steps=100), 128)
  with tf.Session() as session:
    found = [session.run(rate, {step: n}) for n in (0, 25, 50, 100, 120)]
  np.testing.assert_allclose(found, [0.2, 0.15, 0.1, 0, 0], atol=1e-6)


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


def test_variables_are_resources_whatever_a_script_disables():
  # Muon needs that; with reference variables, it would be plain momentum.
  tf.disable_resource_variables()
  try:
    _build_training()
  finally:
    tf.enable_resource_variables()
  assert {v.handle.op.type for v in tf.trainable_variables()} == {'VarHandleOp'}
  mine = tf.get_variable('mine', [1, 1, 2, 2], use_resource=False)
  with pytest.raises(UserError, match='mine'):
    cifar10.MuonOptimizer(0.1, 0.9).minimize(tf.reduce_sum(mine))


def test_muon_moves_kernels_equally_far_in_all_directions():
  random = np.random.default_rng(0)
  gradients = [random.normal(1, 1, shape).astype(np.float32)
               for shape in ([5, 5, 2, 8], [6, 4], [4])]
  variables = [tf.get_variable(f'v{i}', initializer=tf.zeros(value.shape))
               for i, value in enumerate(gradients)]
  loss = tf.add_n([tf.reduce_sum(variable * value)
                   for variable, value in zip(variables, gradients)])
  step = cifar10.train(
      loss, tf.train.get_or_create_global_step(),
      cifar10.Recipe(optimizer='muon', learning_rate=0.1, momentum=0.9))
  with _session(noise=0) as session:
    session.run(step)
    kernel, matrix, biases = (
        value / -0.1 for value in session.run(variables))
  np.testing.assert_allclose(biases, 1.9 * gradients[2], rtol=1e-5)
  centred = gradients[1] - gradients[1].mean(axis=0)
  np.testing.assert_allclose(matrix, 1.9 * centred, atol=1e-5)
  centred = gradients[0].reshape(50, 8)
  left, _, right = np.linalg.svd(centred - centred.mean(axis=0), False)
  spread = left.T @ kernel.reshape(50, 8) @ right.T
  values = spread.diagonal() / (0.05 * 50 ** 0.5)
  assert 0.6 < values.min() and values.max() < 1.3
  np.testing.assert_allclose(spread, np.diag(spread.diagonal()), atol=1e-4)


def test_step_is_that_of_the_plain_formulation(monkeypatch):
  batch = _batch(128)
  monkeypatch.setattr(cifar10, 'distorted_inputs',
                      lambda *_, **__: map(tf.constant, batch))
  parse_flags(cifar10_train)
  normal = np.random.default_rng(0).normal
  before = {name: normal(0, 0.04, shape) for name, shape in SHAPES.items()}
  before.update({name + AVERAGE: value for name, value in before.items()})
  after = []
  for build in (
      lambda: cifar10_train.build_step(
          CIFAR10, cifar10_train.flags_recipe(CIFAR10),
          tf.train.get_or_create_global_step()),
      lambda: plain.build_step(None, batch=list(map(tf.constant, batch)))):
    with tf.Graph().as_default(), tf.Session() as session:
      train_op, *_ = build()
      session.run(tf.global_variables_initializer())
      variables = {
          v.op.name: v for v in tf.global_variables() if v.op.name in before}
      for name, variable in variables.items():
        variable.load(before[name], session)
      session.run(train_op)
      after.append(session.run(variables))
  for name, value in before.items():
    ours, expected = (values[name] for values in after)
    update = abs(expected - value).max()
    assert update > 1e-4
    # Rounding decides which of two equal values a pool takes.
    np.testing.assert_allclose(
        ours, expected, rtol=0, atol=min(1e-5, 1e-2 * update))


def test_tensorboard_gets_losses_weights_and_activations():
  train_op = _build_training()
  fetches, raw = [tf.summary.merge_all(), 'conv1/conv1:0'], []
  with _session() as session:
    for _ in range(3):
      summary, conv1 = session.run(fetches)
      values = {value.tag: value.simple_value
                for value in tf.Summary.FromString(summary).value}
      raw.append(values['total_loss (raw)'])
      session.run(train_op)
  assert set(values) == {
      'learning_rate', 'Precision @ 1',
      *LOSSES, *(f'{loss} (raw)' for loss in LOSSES),
      *SHAPES, *(f'{name}/gradients' for name in SHAPES),
      *(f'{layer}/activations' for layer in INITIAL),
      *(f'{layer}/sparsity' for layer in INITIAL)}
  assert len(set(raw)) == 3
  assert values['total_loss'] == pytest.approx(
      0.1 * (0.9 * raw[0] + raw[1]), rel=1e-5)
  assert values['conv1/sparsity'] == pytest.approx((conv1 == 0).mean())


# Readers.


def test_recipes_do_not_change_with_constants(monkeypatch):
  before = cifar10.Recipe()
  assert before == cifar10.original_recipe()
  assert (before.learning_rate, before.image_size) == (0.1, 24)
  monkeypatch.setattr(cifar10, 'INITIAL_LEARNING_RATE', 0.5)
  monkeypatch.setattr(cifar10, 'NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN', 7)
  FLAGS.batch_size = 9
  assert cifar10.Recipe() == before
  assert cifar10.original_recipe() == dataclasses.replace(
      before, learning_rate=0.5, examples_per_epoch=7, batch_size=9)


def test_scripts_of_a_reader_train_and_evaluate(
    start_script, call_script, tmp_path):
  dataset = dataclasses.replace(
      CIFAR10, train_files=dict.fromkeys(CIFAR10.train_files, 100))
  write_random(dataset, tmp_path / dataset.folder)
  train_dir = tmp_path / 'run'
  flags = [f'--data_dir={tmp_path}', '--batch_size=125']
  run = finish(start_script('tests/readers_script', *flags, '--max_steps=3',
                            f'--train_dir={train_dir}'))
  assert run.code == 0, run.stderr
  loss = re.search(r'^my step 0: loss (.*), ', run.stdout, re.M)[1]
  assert float(loss) == pytest.approx(4.68, abs=0.05)
  assert newest_step(train_dir) == 3

  flags.append(f'--checkpoint_dir={train_dir}')
  run = finish(start_script(
      'tests/readers_classic', *flags, PYTHONPATH=str(ROOT)))
  assert run.code == 0, run.stderr
  ours = call_script(cifar10_eval, *flags, '--run_once')
  correct = re.search(r'(\d+)/10000 correct', ours.stdout)[1]
  assert run.stdout.splitlines()[-1] == f'my count: {correct}'


def test_script_of_a_reader_may_set_constants_and_own_flags(
    start_script, tmp_path):
  dataset = dataclasses.replace(
      CIFAR10, classes=tuple('abcdef'),
      train_files=dict.fromkeys(CIFAR10.train_files, 50),
      eval_files={'test_batch.bin': 50})
  write_random(dataset, tmp_path / dataset.folder)
  run = finish(start_script(
      'tests/readers_constants', f'--data_dir={tmp_path}',
      f'--train_dir={tmp_path}', '--batch_size=50', PYTHONPATH=str(ROOT)))
  assert run.code == 0, run.stderr
  assert len(re.findall(r'^my counts: (\d+) \1$', run.stdout, re.M)) == 4
  rates = [value.simple_value for _, tag, value in events(tmp_path)
           if tag == 'learning_rate']
  assert (rates[0], rates[-1]) == pytest.approx((0.01, 0.005))
  shapes = dict(tf.train.list_variables(str(tmp_path)))
  assert shapes['local3/weights'] == [8 * 8 * 64, 384]
  assert shapes['softmax_linear/weights'] == [192, 6]
