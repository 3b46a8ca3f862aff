"""cifar10: the network, its loss and its training step are the tutorial's.

The numbers are those that the original publishes: shapes, initial weights, the
loss of a fresh model, the schedule of the learning rate. The arithmetic is held
against TensorFlow's elementary operations and against numpy.
"""
import numpy as np
import pytest

from benchmarks import plain
import cifar10
import cifar10_train
from cifar10_input import CIFAR10, SYNTHETIC, tf

SHAPES = {
    'conv1/weights': [5, 5, 3, 64], 'conv1/biases': [64],
    'conv2/weights': [5, 5, 64, 64], 'conv2/biases': [64],
    'local3/weights': [2304, 384], 'local3/biases': [384],
    'local4/weights': [384, 192], 'local4/biases': [192],
    'softmax_linear/weights': [192, 10], 'softmax_linear/biases': [10],
}

DEVIATIONS = {
    'conv1': 0.05, 'conv2': 0.05, 'local3': 0.04, 'local4': 0.04,
    'softmax_linear': 1 / 192}

BIASES = {
    'conv1': 0.0, 'conv2': 0.1, 'local3': 0.1, 'local4': 0.1,
    'softmax_linear': 0.0}


def _batch(size, seed=0):
  """Returns images as standardization leaves them, and labels."""
  random = np.random.default_rng(seed)
  images = random.standard_normal((size, 24, 24, 3)).astype(np.float32)
  return images, random.integers(0, 10, size).astype(np.int32)


def _values(session):
  """Returns the values of the trainable variables, by name."""
  return session.run({v.op.name: v for v in tf.trainable_variables()})


def _disturb(session, seed=0):
  """Adds noise to all trainable variables, so that no two biases are equal."""
  random = np.random.default_rng(seed)
  for variable in tf.trainable_variables():
    variable.load(
        session.run(variable)
        + random.normal(0, 0.02, variable.shape.as_list()), session)


# Variables.


def test_variables_have_the_names_and_shapes_of_the_original():
  cifar10.inference(tf.zeros([1, 24, 24, 3]))
  assert {v.op.name: v.shape.as_list()
          for v in tf.trainable_variables()} == SHAPES
  assert {v.op.name for v in tf.global_variables()} == set(SHAPES)


def test_network_has_1068298_parameters():
  cifar10.inference(tf.zeros([1, 24, 24, 3]))
  assert sum(v.shape.num_elements()
             for v in tf.trainable_variables()) == 1068298


def test_variables_are_on_the_cpu_wherever_the_network_is():
  with tf.device('/gpu:0'):
    logits = cifar10.inference(tf.zeros([1, 24, 24, 3]))
  assert {v.device for v in tf.trainable_variables()} == {'/device:CPU:0'}
  assert logits.device == '/device:GPU:0'


def test_initial_variables_are_drawn_as_the_original_draws_them():
  cifar10.inference(tf.zeros([1, 24, 24, 3]))
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    values = _values(session)
  for layer, deviation in DEVIATIONS.items():
    weights = values[layer + '/weights']
    # Of a normal distribution cut off at two deviations, 0.8796 of it is left.
    assert weights.std() == pytest.approx(0.8796 * deviation, rel=0.05)
    assert abs(weights.mean()) < 5 * deviation / np.sqrt(weights.size)
    assert 1.8 * deviation < abs(weights).max() <= 2.0001 * deviation
    np.testing.assert_array_equal(
        values[layer + '/biases'], np.float32(BIASES[layer]))


def test_number_of_classes_can_be_chosen():
  logits = cifar10.inference(tf.zeros([1, 24, 24, 3]), 100)
  assert logits.shape.as_list() == [1, 100]


# The function that the network computes.


def _inference_of_the_table(images, values):
  """The network with nothing but elementary operations."""
  def convolve(images, layer):
    convolved = tf.nn.conv2d(
        images, values[layer + '/weights'], [1, 1, 1, 1], 'SAME')
    return tf.nn.relu(convolved + values[layer + '/biases'])

  def pool(images):
    return tf.nn.max_pool2d(images, [1, 3, 3, 1], [1, 2, 2, 1], 'SAME')

  def normalize(images):
    band = np.tri(64, k=4) * np.tri(64, k=4).T
    squares = tf.tensordot(tf.square(images), band.astype(np.float32), 1)
    return images / (1.0 + 0.001 / 9.0 * squares) ** 0.75

  def connect(rows, layer):
    return rows @ values[layer + '/weights'] + values[layer + '/biases']

  images = normalize(pool(convolve(images, 'conv1')))
  images = pool(normalize(convolve(images, 'conv2')))
  rows = tf.reshape(images, [-1, 6 * 6 * 64])
  rows = tf.nn.relu(connect(rows, 'local3'))
  rows = tf.nn.relu(connect(rows, 'local4'))
  return connect(rows, 'softmax_linear')


def test_inference_computes_the_network_of_the_table():
  images, _ = _batch(16)
  images *= 20  # So that normalization makes a difference.
  logits = cifar10.inference(tf.constant(images))
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    _disturb(session)
    expected = session.run(_inference_of_the_table(images, _values(session)))
    result = session.run(logits)
  np.testing.assert_allclose(
      result, expected, atol=1e-5 * abs(expected).max())
  assert expected.std() > 0.1


def test_pooling_before_bias_and_relu_changes_nothing():
  random = np.random.default_rng(0)
  images = tf.constant(random.standard_normal((2, 24, 24, 3)), tf.float32)
  with tf.variable_scope('') as scope:
    first = cifar10._convolution('conv1', images, 64, -0.5, pooling='pool1')
    scope.reuse_variables()
    last = cifar10._max_pooling(
        'pool1', cifar10._convolution('conv1', images, 64, -0.5))
  weights = tf.constant(random.standard_normal(last.shape), tf.float32)
  gradients = [tf.gradients(tf.reduce_sum(pooled * weights),
                            tf.trainable_variables())
               for pooled in (first, last)]
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    _disturb(session)
    (first, last), gradients = session.run([(first, last), gradients])
  assert 0.02 < np.mean(last == 0) < 0.98
  np.testing.assert_array_equal(first, last)
  for one, other in zip(*gradients):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


def test_gradients_are_those_of_the_network_of_the_table():
  images, labels = _batch(8)
  images *= 20
  logits = cifar10.inference(tf.constant(images))
  variables = {v.op.name: v for v in tf.trainable_variables()}
  gradients = [
      tf.gradients(tf.nn.sparse_softmax_cross_entropy_with_logits(
          labels=labels, logits=logits), list(variables.values()))
      for logits in (logits, _inference_of_the_table(images, variables))]
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    _disturb(session)
    results, expected = session.run(gradients)
  for result, gradient in zip(results, expected):
    assert abs(gradient).max() > 0
    np.testing.assert_allclose(
        result, gradient, atol=1e-4 * abs(gradient).max())


def test_inference_takes_batches_of_any_size():
  images = tf.placeholder(tf.float32, [None, 24, 24, 3])
  logits = cifar10.inference(images)
  assert logits.shape.as_list() == [None, 10]
  batch, _ = _batch(5)
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    together = session.run(logits, {images: batch})
    alone = session.run(logits, {images: batch[3:4]})
  np.testing.assert_allclose(together[3:4], alone, rtol=1e-3, atol=1e-6)


# Loss.


def test_loss_of_a_fresh_model_is_4_68():
  images, labels = _batch(128)
  loss = cifar10.loss(cifar10.inference(tf.constant(images)), labels)
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    assert session.run(loss) == pytest.approx(4.68, abs=0.05)


def _expected_losses(logits, labels, values):
  """Returns mean cross entropy and the weight decays, by numpy."""
  logits = logits.astype(np.float64)
  log_sums = np.log(np.exp(logits).sum(axis=1))
  cross_entropy = (log_sums - logits[np.arange(len(labels)), labels]).mean()
  return [cross_entropy] + [
      0.004 * np.square(values[layer + '/weights'].astype(np.float64)).sum() / 2
      for layer in ('local3', 'local4')]


@pytest.mark.parametrize('scope', ['', 'some/where'])
def test_loss_is_mean_cross_entropy_plus_all_weight_decays(scope):
  images, labels = _batch(16)
  logits = cifar10.inference(tf.constant(images))
  with tf.name_scope(scope):
    total_loss = cifar10.loss(logits, tf.constant(labels))
  losses = tf.get_collection('losses')
  assert len(losses) == 3
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    _disturb(session)
    values = _values(session)
    results, total, logit_values = session.run([losses, total_loss, logits])
  expected = _expected_losses(logit_values, labels, values)
  np.testing.assert_allclose(sorted(results), sorted(expected), rtol=1e-5)
  assert total == pytest.approx(sum(expected), rel=1e-5)
  assert total.dtype == np.float32 and total.shape == ()


def test_loss_counts_what_a_reader_adds_to_the_collection():
  images, labels = _batch(4)
  tf.add_to_collection('losses', tf.constant(1000.0))
  loss = cifar10.loss(cifar10.inference(tf.constant(images)), labels)
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    assert 1004 < session.run(loss) < 1006


def test_loss_of_a_scope_counts_that_scope_alone():
  images, labels = _batch(4)
  tf.add_to_collection('losses', tf.constant(1000.0))
  with tf.name_scope('mine') as scope:
    loss = cifar10.loss(cifar10.inference(tf.constant(images)), labels, scope)
  assert len(tf.get_collection('losses', scope)) == 3
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    assert 4 < session.run(loss) < 6


def test_weight_decays_and_cross_entropy_have_the_names_of_the_original():
  images, labels = _batch(1)
  cifar10.loss(cifar10.inference(tf.constant(images)), labels)
  assert [loss.op.name for loss in tf.get_collection('losses')] == [
      'local3/weight_loss', 'local4/weight_loss', 'cross_entropy']


# Learning rate.


@pytest.mark.parametrize('dataset, batch_size, decay_steps', [
    (CIFAR10, 128, 136718), (CIFAR10, 64, 273437), (SYNTHETIC, 128, 27343)])
def test_learning_rate_falls_tenfold_every_350_epochs(
    set_flags, dataset, batch_size, decay_steps):
  set_flags(batch_size=batch_size)
  variable = tf.get_variable('v', initializer=0.0)
  global_step = tf.train.get_or_create_global_step()
  step = cifar10.train(1.0 * variable, global_step, dataset)
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    # The step itself may fall to either side in 32-bit arithmetic.
    for start, rate in [
        (0, 0.1), (decay_steps - 1, 0.1), (decay_steps + 1, 0.01),
        (2 * decay_steps - 1, 0.01), (2 * decay_steps + 1, 0.001)]:
      variable.load(0.0, session)
      global_step.load(start, session)
      session.run(step)
      assert session.run(variable) == pytest.approx(-rate, rel=1e-5)


# One step.


class _Step:
  """A step on one batch, with all that it changes."""

  def __init__(self, global_step, batch_size=8):
    images, labels = _batch(batch_size)
    self.global_step = tf.train.get_or_create_global_step()
    self.loss = cifar10.loss(cifar10.inference(tf.constant(images)), labels)
    variables = tf.trainable_variables()
    self.gradients = dict(zip(
        [v.op.name for v in variables], tf.gradients(self.loss, variables)))
    self.step = cifar10.train(self.loss, self.global_step)
    self.averages = {
        v.op.name.split('/Exp')[0]: v for v in tf.global_variables()
        if v.op.name.endswith('/ExponentialMovingAverage')}
    self.session = tf.Session()
    self.session.run(tf.global_variables_initializer())
    _disturb(self.session)
    self.global_step.load(global_step, self.session)

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.session.close()


def test_a_step_is_plain_gradient_descent():
  with _Step(global_step=0) as training:
    before = _values(training.session)
    gradients = training.session.run(training.gradients)
    training.session.run(training.step)
    after = _values(training.session)
    assert training.session.run(training.global_step) == 1
  for name, gradient in gradients.items():
    expected = before[name] - 0.1 * gradient
    np.testing.assert_allclose(
        after[name], expected, rtol=1e-5, atol=1e-5 * abs(expected).max())
    change = after[name] - before[name]
    np.testing.assert_allclose(
        change, -0.1 * gradient, atol=1e-4 * abs(change).max())
    assert abs(change).max() > 0


def _one_step(build, values):
  """Returns what one step makes of variables: all of them, and averages."""
  with tf.Graph().as_default(), tf.Session() as session:
    step = build()
    session.run(tf.global_variables_initializer())
    for variable in tf.global_variables():
      name = variable.op.name.replace('/ExponentialMovingAverage', '')
      if name in values:
        variable.load(values[name], session)
    session.run(step)
    return session.run({
        v.op.name: v for v in tf.global_variables()
        if v.op.name.startswith(tuple(SHAPES)) or v.op.name == 'global_step'})


def test_a_step_by_default_is_that_of_the_plain_formulation(monkeypatch):
  batch = _batch(128)
  constant_batch = lambda *_: list(map(tf.constant, batch))
  monkeypatch.setattr(cifar10, 'distorted_inputs', constant_batch)
  with _Step(global_step=0) as training:
    before = _values(training.session)
  ours = _one_step(lambda: cifar10_train.build_step(
      CIFAR10, tf.train.get_or_create_global_step())[0], before)
  plain_ = _one_step(lambda: plain.build_step(
      None, batch=constant_batch())[0], before)
  assert set(ours) == set(plain_) and len(ours) == 2 * len(SHAPES) + 1
  for name in SHAPES:
    update, expected = ours[name] - before[name], plain_[name] - before[name]
    assert abs(expected).max() > 1e-4
    np.testing.assert_allclose(update, expected, atol=1e-5)
  for name, value in ours.items():
    np.testing.assert_allclose(value, plain_[name], atol=1e-5)


@pytest.mark.parametrize('global_step, decay', [
    (0, 2 / 11), (41, 43 / 52), (10 ** 6, 0.9999)])
def test_averages_follow_the_variables_after_the_gradients(global_step, decay):
  with _Step(global_step) as training:
    assert set(training.averages) == set(SHAPES)
    old = training.session.run(training.averages)
    training.session.run(training.step)
    averages = training.session.run(training.averages)
    new = _values(training.session)
  for name, average in averages.items():
    expected = decay * old[name] + (1 - decay) * new[name]
    np.testing.assert_allclose(
        average, expected, rtol=1e-3 * (1 - decay) + 1e-5,
        atol=1e-3 * (1 - decay) * abs(new[name]).max())


def test_checkpoint_names_and_types_are_those_of_the_original():
  with _Step(global_step=0):
    variables = {v.op.name: v for v in tf.global_variables()}
  averages = {name + '/ExponentialMovingAverage' for name in SHAPES}
  assert set(variables) == {'global_step'} | set(SHAPES) | averages | {
      'cross_entropy/avg', 'total_loss/avg', 'local3/weight_loss/avg',
      'local4/weight_loss/avg'}
  assert variables.pop('global_step').dtype.base_dtype == tf.int64
  assert {v.dtype.base_dtype for v in variables.values()} == {tf.float32}
  for name, shape in SHAPES.items():
    assert variables[name + '/ExponentialMovingAverage'].shape == shape


def _scalars(summary):
  return {value.tag: value.simple_value
          for value in tf.Summary.FromString(summary).value
          if value.HasField('simple_value')}


def test_displayed_losses_are_raw_and_averaged_over_steps():
  with _Step(global_step=0) as training:
    summaries = tf.summary.merge_all()
    raw = []
    for _ in range(2):
      raw.append(_scalars(training.session.run(summaries))['total_loss (raw)'])
      training.session.run(training.step)
    averaged = _scalars(training.session.run(summaries))['total_loss']
  assert raw[0] != raw[1]
  assert averaged == pytest.approx(0.09 * raw[0] + 0.1 * raw[1], rel=1e-5)


def test_sparsity_is_the_share_of_zeros():
  images, labels = _batch(8)
  loss = cifar10.loss(cifar10.inference(tf.constant(images)), labels)
  cifar10.train(loss, tf.train.get_or_create_global_step())
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    values = _values(session)
    values['local4/biases'][:96] = -1000
    values['local4/biases'][96:] = 1000
    for variable in tf.trainable_variables():
      variable.load(values[variable.op.name], session)
    scalars = _scalars(session.run(tf.summary.merge_all()))
  assert scalars['local4/sparsity'] == 0.5
  assert 0 < scalars['conv1/sparsity'] < 1
  assert scalars['softmax_linear/sparsity'] == 0


# 16-bit floating point.


@pytest.mark.parametrize('flag, dtype, tolerance', [
    ('use_fp16', tf.float16, 0.01), ('use_bfloat16', tf.bfloat16, 0.03)])
def test_16_bits_are_for_activations_and_not_for_variables(
    set_flags, flag, dtype, tolerance):
  images, labels = _batch(8)
  exact = cifar10.inference(tf.constant(images))
  set_flags(**{flag: True})
  with tf.variable_scope(tf.get_variable_scope(), reuse=True), \
      tf.name_scope('rounded'):
    logits = cifar10.inference(tf.constant(images))
  assert {v.dtype.base_dtype for v in tf.global_variables()} == {tf.float32}
  assert logits.dtype == tf.float32
  for name in ('conv1/Conv2D', 'conv2/Conv2D', 'local3/MatMul'):
    operation = tf.get_default_graph().get_operation_by_name(
        'rounded/' + name)
    assert operation.outputs[0].dtype == dtype
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    result, expected = session.run([logits, exact])
  np.testing.assert_allclose(result, expected, atol=tolerance)
  assert (result != expected).any()


def test_use_fp16_trains(set_flags):
  set_flags(use_fp16=True)
  with _Step(global_step=0) as training:
    before = _values(training.session)
    gradients = training.session.run(training.gradients)
    assert training.session.run(training.loss).dtype == np.float32
    training.session.run(training.step)
    after = _values(training.session)
  for name, gradient in gradients.items():
    assert gradient.dtype == np.float32
    assert 0 < abs(gradient).max() < 1000
    np.testing.assert_allclose(
        after[name], before[name] - 0.1 * gradient,
        atol=1e-5 * abs(after[name]).max())


# Names that readers of the original know.


@pytest.mark.parametrize('name, value', [
    ('MOVING_AVERAGE_DECAY', 0.9999), ('NUM_EPOCHS_PER_DECAY', 350.0),
    ('LEARNING_RATE_DECAY_FACTOR', 0.1), ('INITIAL_LEARNING_RATE', 0.1),
    ('TOWER_NAME', 'tower'), ('IMAGE_SIZE', 24), ('NUM_CLASSES', 10),
    ('NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN', 50000),
    ('NUM_EXAMPLES_PER_EPOCH_FOR_EVAL', 10000)])
def test_constants_are_those_of_the_original(name, value):
  assert getattr(cifar10, name) == value


def test_a_variable_outside_of_the_loss_does_no_harm():
  variable = tf.get_variable('v', initializer=1.0)
  tf.get_variable('unused', initializer=1.0)
  step = cifar10.train(2.0 * variable, tf.train.get_or_create_global_step())
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    session.run(step)
    assert session.run(variable) == pytest.approx(0.8)
