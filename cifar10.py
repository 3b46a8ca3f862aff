"""The CIFAR-10 network: its input, its layers, its loss, its training.

    images, labels = distorted_inputs()
    logits = inference(images)
    total_loss = loss(logits, labels)
    train_op = train(total_loss, tf.train.get_or_create_global_step())

These functions only build a graph of operations. A session then runs it, in
cifar10_train.py and its siblings, or in a script of yours.
"""
import dataclasses
import os

import numpy as np

import cifar10_input  # Before TensorFlow: it hides the start-up messages.
import tensorflow.compat.v1 as tf

# In the tutorial, these are constants of this module, too.
from cifar10_input import (
    DATA_URL, IMAGE_SIZE, NUM_CLASSES, NUM_EXAMPLES_PER_EPOCH_FOR_EVAL,
    NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN)

FLAGS = tf.flags.FLAGS
tf.flags.DEFINE_integer('batch_size', 128, 'Images in a batch.', lower_bound=1)
tf.flags.DEFINE_string(
    'data_dir', '/tmp/cifar10_data', 'Local folder of the data sets.')
tf.flags.DEFINE_boolean(
    'use_fp16', False, 'Compute activations in float16, on GPUs. Variables and '
    'losses stay in float32.')

# How the original trains. A script may set these before it builds a graph.
INITIAL_LEARNING_RATE = 0.1       # The largest round number that works.
NUM_EPOCHS_PER_DECAY = 350.0      # Epochs until the learning rate drops.
LEARNING_RATE_DECAY_FACTOR = 0.1  # Factor of each drop.
WEIGHT_DECAY = 0.004              # As in cuda-convnet, on two layers.
MOVING_AVERAGE_DECAY = 0.9999     # Averages over about 10,000 steps.

TOWER_NAME = 'tower'  # The towers of a multi-GPU run are tower_0, tower_1, ...


def _flag(default, help_text, lower=None, upper=None, choices=None):
  """A field of `Recipe` that cifar10_train.py turns into a flag."""
  limits = ({'enum_values': choices} if choices else
            {'lower_bound': lower, 'upper_bound': upper})
  return dataclasses.field(
      default=default, metadata={'help': help_text, **limits})


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How the network is built and trained; by default, as in the original.

      recipe = Recipe(momentum=0.9, learning_rate=0.02)
      logits = inference(images, recipe)
  """
  # The network.
  image_size: int = _flag(
      24, 'The network sees so many pixels of each side of a picture.', 8)
  model: str = _flag(
      'default', 'Top layers: fully connected (default) or locally (local).',
      choices=['default', 'local'])
  num_classes: int = 10
  dtype: str = 'float32'  # Of activations: float32, float16 or bfloat16.

  # Its training.
  max_steps: int = _flag(
      100000, 'Train up to this step. Those of earlier runs count.', 1)
  batch_size: int = 128
  examples_per_epoch: int = 50000
  crop_margin: int = _flag(
      0, 'Crops may reach so many pixels beyond the edges of a picture.', 0)
  learning_rate: float = _flag(
      INITIAL_LEARNING_RATE, 'Initial learning rate.', 0)
  learning_rate_schedule: str = _flag(
      'staircase', 'How the learning rate falls: tenfold every 350 epochs '
      '(staircase), or evenly to zero at --max_steps (linear).',
      choices=['staircase', 'linear'])
  momentum: float = _flag(0.0, 'Nesterov momentum; 0 is plain SGD.', 0, 1)
  optimizer: str = _flag('sgd', 'Muon (Jordan et al. 2024) or plain SGD.',
                         choices=['sgd', 'muon'])
  label_smoothing: float = _flag(
      0.0, 'Share of each label that is spread over all classes.', 0, 1)
  weight_decay: float = _flag(
      WEIGHT_DECAY, 'Factor of the L2 losses, which keep the weights of local3 '
      'and local4 small.', 0)
  moving_average_decay: float = _flag(
      MOVING_AVERAGE_DECAY, 'Decay of the moving averages of the variables, '
      'which evaluation uses.', 0, 1)


# Muon, smoothing, steps and margin were chosen with --dataset=cifar10_holdout;
# the other values by an earlier search, on test images.
_FAST = Recipe(
    max_steps=14000,
    batch_size=64,           # Neither better nor worse than 128.
    image_size=28,           # 2.2 points better than 24, in the same time.
    learning_rate=0.02,
    learning_rate_schedule='linear',
    momentum=0.9,            # 3 points better than none, in short runs.
    optimizer='muon',        # 2.6 points, after 6,000 steps.
    label_smoothing=0.1,     # 0.4 points, after 14,000 steps.
    weight_decay=0.008,      # With 0.004, it memorizes images.
    moving_average_decay=0.999)

RECIPES = {
    'original': Recipe(),
    'fast': _FAST,
    # Whole pictures, shifted to 81 places: 0.5 points, after 14,000 steps.
    'strong': dataclasses.replace(
        _FAST, max_steps=20000, image_size=32, crop_margin=4),
}


def original_recipe():
  """Returns the original's recipe, from flags and constants as they are now."""
  return Recipe(
      image_size=cifar10_input.IMAGE_SIZE, num_classes=NUM_CLASSES,
      dtype='float16' if FLAGS.use_fp16 else 'float32',
      batch_size=FLAGS.batch_size, learning_rate=INITIAL_LEARNING_RATE,
      examples_per_epoch=NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN,
      weight_decay=WEIGHT_DECAY, moving_average_decay=MOVING_AVERAGE_DECAY)


def maybe_download_and_extract():
  """Makes sure that CIFAR-10 is in --data_dir."""
  cifar10_input.prepare(cifar10_input.CIFAR10, FLAGS.data_dir, DATA_URL)


def distorted_inputs(dataset=None, batch_size=None, **options):
  """Builds the input of training; see `cifar10_input.distorted_inputs`.

  The `Dataset` is from `cifar10_input.prepare`; by default it is CIFAR-10 in
  --data_dir, or what a script has put in its place.
  """
  images, labels = cifar10_input.distorted_inputs(
      _folder(dataset), batch_size or FLAGS.batch_size, dataset, **options)
  _summary(tf.raw_ops.ImageSummary, tag='images', tensor=images)
  return images, labels


def inputs(eval_data, dataset=None, **options):
  """Builds the input of evaluation; see `cifar10_input.inputs`."""
  images, labels = cifar10_input.inputs(
      eval_data, _folder(dataset), FLAGS.batch_size, dataset, **options)
  _summary(tf.raw_ops.ImageSummary, tag='images', tensor=images)
  return images, labels


def _folder(dataset):
  return dataset.folder if dataset else os.path.join(
      os.path.expanduser(FLAGS.data_dir), cifar10_input.CIFAR10.folder)


# The network.


def inference(images, recipe=None):
  """Builds the network; the default `Recipe` is the original's.

  Takes images, float32 [batch, height, width, 3], from `inputs` or
  `distorted_inputs`. Returns logits, float32 [batch, num_classes].
  """
  recipe = recipe or original_recipe()
  images = tf.cast(images, recipe.dtype)

  # Edges and colours. 64 filters look at 5x5 pixels each. A variable's name
  # begins with that of its scope: 'conv1/weights'.
  with tf.variable_scope('conv1'):
    conv, biases = _convolution(images, 64, 0.0, recipe)
    # Nothing below needs it: it is computed only if it is fetched or shown.
    conv1 = tf.nn.relu(tf.nn.bias_add(conv, biases), name='conv1')
    # The tutorial pools after bias and ReLU. Neither changes which value of a
    # window is the largest, and after pooling only a quarter of them is left.
    pre_activation = tf.nn.bias_add(tf.nn.max_pool(conv, 3, 2, 'SAME'), biases)
  pool1 = tf.nn.relu(pre_activation, name='pool1')
  # Channels that answer strongly dampen their neighbours.
  norm1 = local_response_normalization(pool1, name='norm1')

  # Combinations of what conv1 found, in a wider part of the picture.
  with tf.variable_scope('conv2'):
    conv, biases = _convolution(norm1, 64, 0.1, recipe)
    conv2 = tf.nn.relu(tf.nn.bias_add(conv, biases), name='conv2')
  norm2 = local_response_normalization(conv2, name='norm2')
  pool2 = tf.nn.max_pool(norm2, 3, 2, 'SAME', name='pool2')

  # The picture as a whole. These two layers hold nine tenths of the weights
  # and would overfit, so only they have weight decay.
  if recipe.model == 'local':
    local3 = _locally_connected('local3', pool2, 32, recipe)
    local4 = _locally_connected('local4', local3, 32, recipe)
    stddev = 0.01
  else:
    local3 = _fully_connected('local3', pool2, 384, recipe)
    local4 = _fully_connected('local4', local3, 192, recipe)
    stddev = 1 / 192.0

  # Logits (scores before the softmax), not probabilities: the loss computes
  # softmax and logarithm in one operation, which is numerically safe.
  with tf.variable_scope('softmax_linear'):
    logits = _affine(local4, recipe.num_classes, recipe, stddev, bias=0.0,
                     name='softmax_linear')

  _activation_summaries(conv1=conv1, conv2=conv2, local3=local3, local4=local4,
                        softmax_linear=logits)
  return tf.cast(logits, tf.float32)


def _variable_on_cpu(name, shape, initializer):
  """Makes a variable in the CPU's memory, which all GPUs can reach.

  `get_variable` makes it or, where `reuse` is set, finds it by its name: so all
  towers share it. It is float32: 16 bits would lose small updates.
  """
  with tf.device('/cpu:0'):
    return tf.get_variable(
        name, shape, tf.float32, initializer, use_resource=True)


def _variable_with_weight_decay(name, shape, stddev, recipe, decay=None):
  """Makes a variable that starts from a truncated normal distribution.

  With `decay`, decay * L2 loss joins `losses`, a list that the graph keeps.
  """
  draw = tf.truncated_normal_initializer(stddev=stddev)
  variable = _variable_on_cpu(
      name, shape, draw if recipe.optimizer != 'muon' else
      lambda shape, dtype, **_: _centred(draw(shape, dtype)))
  if decay is not None:
    weight_loss = tf.multiply(
        tf.nn.l2_loss(variable), decay, name='weight_loss')
    tf.add_to_collection('losses', weight_loss)
  return variable


def _convolution(images, channels, bias, recipe):
  """Returns a 5x5 convolution and the biases to add, one for each channel."""
  kernel = _variable_with_weight_decay(
      'weights', [5, 5, images.shape[-1], channels], 0.05, recipe)
  biases = _variable_on_cpu('biases', [channels], tf.constant_initializer(bias))
  conv = tf.nn.conv2d(images, tf.cast(kernel, images.dtype), 1, 'SAME')
  return conv, tf.cast(biases, images.dtype)


def _fully_connected(name, values, units, recipe):
  """A layer in which every unit sees all values, with ReLU."""
  with tf.variable_scope(name):
    return tf.nn.relu(
        _affine(values, units, recipe, 0.04, 0.1, recipe.weight_decay),
        name=name)


def _affine(values, units, recipe, stddev, bias, decay=None, name=None):
  """Matrix product plus biases, [batch, units]."""
  size = values.shape[1:].num_elements()
  weights = _variable_with_weight_decay(
      'weights', [size, units], stddev, recipe, decay)
  biases = _variable_on_cpu('biases', [units], tf.constant_initializer(bias))
  product = tf.matmul(
      tf.reshape(values, [-1, size]), tf.cast(weights, values.dtype))
  return tf.nn.bias_add(product, tf.cast(biases, values.dtype), name=name)


def _locally_connected(name, images, channels, recipe):
  """3x3 convolution with different weights at each place, then ReLU.

  As in the layers local3 and local4 of cuda-convnet's layers-conv-local-11pct.
  """
  with tf.variable_scope(name):
    _, height, width, depth = images.shape.as_list()
    weights = _variable_with_weight_decay(
        'weights', [height * width, 9 * depth, channels], 0.04, recipe,
        recipe.weight_decay)
    biases = _variable_on_cpu('biases', [height, width, channels],
                              tf.constant_initializer(0.1))
    patches = tf.image.extract_patches(
        images, [1, 3, 3, 1], [1, 1, 1, 1], [1, 1, 1, 1], 'SAME')
    products = tf.einsum(
        'bpi,pio->bpo', tf.reshape(patches, [-1, height * width, 9 * depth]),
        tf.cast(weights, images.dtype))
    products = tf.reshape(products, [-1, height, width, channels])
    return tf.nn.relu(products + tf.cast(biases, images.dtype), name=name)


def local_response_normalization(
    images, depth_radius=4, bias=1.0, alpha=0.001 / 9.0, name=None):
  """Divides each value by a measure of the activity in neighbouring channels.

  Krizhevsky et al. 2012, section 3.3, with the constants of cuda-convnet:

      s = bias + alpha * (sum of x^2 over the channels within depth_radius)
      y = x * s^-beta
      dx = dy * s^-beta - 2 * alpha * beta * x * (sum of dy * y / s, likewise)

  as `tf.nn.lrn` computes it, but in operations that a CPU is good at, backwards
  (dx) as well. Summing over neighbouring channels is a product with a band
  matrix of ones, as a 1x1 convolution; with beta = 0.75, s^-beta is two square
  roots. It computes in float32; the result has the shape and type of the
  images, [batch, height, width, channels].
  """
  beta = 0.75
  channel = np.arange(images.shape.as_list()[-1])
  band = np.abs(channel[:, np.newaxis] - channel) <= depth_radius

  def sum_over_neighbours(values, factor):
    kernel = tf.constant(band[np.newaxis, np.newaxis] * factor, tf.float32)
    return tf.nn.conv2d(values, kernel, strides=1, padding='SAME')

  @tf.custom_gradient
  def normalize(x):
    s = tf.nn.bias_add(
        sum_over_neighbours(tf.square(x), alpha), [bias] * len(band))
    root = tf.rsqrt(s)
    s_to_minus_beta = root * tf.sqrt(root)

    def gradient(dy):
      scaled = dy * s_to_minus_beta
      summed = sum_over_neighbours(scaled * x / s, 2 * alpha * beta)
      return scaled - x * summed

    return x * s_to_minus_beta, gradient

  with tf.name_scope(name or 'local_response_normalization') as scope:
    x = tf.cast(images, tf.float32)
    if tf.config.list_physical_devices('GPU'):  # cuDNN has a kernel for it.
      y = tf.nn.lrn(x, depth_radius, bias, alpha, beta)
    else:
      y = normalize(x)
    return tf.identity(tf.cast(y, images.dtype), name=scope)


# Training.


def loss(logits, labels, scope=None, recipe=None):
  """Adds the mean cross entropy to the collection `losses`, and sums up all.

  Takes logits, float32 [batch, num_classes], and labels, int32 [batch]. With a
  name scope, as for a tower, only its losses count. Returns a scalar float32:
  mean cross entropy plus weight decays.
  """
  labels = tf.cast(labels, tf.int64, name='labels')
  logits = tf.cast(logits, tf.float32)
  cross_entropies = tf.nn.sparse_softmax_cross_entropy_with_logits(
      labels=labels, logits=logits, name='cross_entropy_per_example')
  cross_entropy = tf.reduce_mean(cross_entropies, name='cross_entropy')
  if recipe and recipe.label_smoothing:  # Szegedy et al. 2016, section 7.
    _scalar_summary('cross_entropy', cross_entropy)  # As evaluation's.
    with tf.name_scope('label_smoothing'):
      to_all = tf.reduce_logsumexp(logits, 1) - tf.reduce_mean(logits, 1)
      smoothed = cross_entropies + recipe.label_smoothing * (
          to_all - cross_entropies)
    cross_entropy = tf.reduce_mean(smoothed, name='smoothed_cross_entropy')
  tf.add_to_collection('losses', cross_entropy)
  with tf.name_scope(None), tf.name_scope('summaries/'):
    hits = tf.cast(tf.nn.in_top_k(logits, labels, 1), tf.float32)
    # Evaluation has this tag, too, but of pictures without distortion.
    _scalar_summary('Precision @ 1', tf.reduce_mean(hits))
  return tf.add_n(tf.get_collection('losses', scope), name='total_loss')


def train(total_loss, global_step, recipe=None):
  """Builds one step of training; the default `Recipe` is the original's.

  Takes the scalar float32 of `loss`, and the int64 variable that counts steps.
  Returns the operation that does the step.
  """
  recipe = recipe or original_recipe()
  losses = tf.get_collection('losses') + [total_loss]
  with tf.name_scope('train'):
    rate = learning_rate(global_step, recipe, recipe.batch_size)
    optimizer = make_optimizer(rate, recipe)
    gradients = optimizer.compute_gradients(total_loss)
    update_op = apply_gradients(optimizer, gradients, global_step, recipe)
    return tf.group(update_op, observe(losses, gradients, rate), name='step')


def learning_rate(global_step, recipe, examples_per_step):
  """Returns the learning rate at a step, a scalar float32."""
  if recipe.learning_rate_schedule == 'staircase':
    # Large steps learn fast at first, but later overshoot the minimum.
    decay_steps = int(recipe.examples_per_epoch / examples_per_step
                      * NUM_EPOCHS_PER_DECAY)
    return tf.train.exponential_decay(
        recipe.learning_rate, global_step, decay_steps,
        LEARNING_RATE_DECAY_FACTOR, staircase=True)
  return tf.train.polynomial_decay(
      recipe.learning_rate, global_step, recipe.max_steps,
      end_learning_rate=0.0)


def make_optimizer(rate, recipe):
  """Returns a recipe's optimizer; `rate` is its learning rate."""
  if recipe.optimizer == 'muon':
    return MuonOptimizer(rate, recipe.momentum, use_nesterov=True)
  if recipe.momentum:
    return tf.train.MomentumOptimizer(rate, recipe.momentum, use_nesterov=True)
  return tf.train.GradientDescentOptimizer(rate)


class MuonOptimizer(tf.train.MomentumOptimizer):
  """Momentum that moves convolution kernels equally far in all directions.

  Each output's mean gradient is subtracted (Yong et al. 2020). Five steps bring
  the singular values of kernels' updates to 0.7 to 1.2 (Jordan et al. 2024).
  """

  def _apply_dense(self, grad, var):
    raise cifar10_input.UserError(f'Muon needs use_resource=True: {var.name}.')

  def _resource_apply_dense(self, grad, var):
    grad = _centred(grad)
    if var.shape.rank != 4:
      return super()._resource_apply_dense(grad, var)
    slot, momentum = self.get_slot(var, 'momentum'), self._momentum_tensor
    update = grad + momentum * slot.assign(momentum * slot + grad)
    matrix = tf.reshape(tf.nn.l2_normalize(update), [-1, var.shape[-1]])
    for _ in range(5):
      gram = tf.matmul(matrix, matrix, transpose_a=True)
      matrix = 3.4445 * matrix + tf.matmul(
          matrix, 2.0315 * tf.matmul(gram, gram) - 4.775 * gram)
    size = 0.05 * matrix.shape.as_list()[0] ** 0.5 * self._learning_rate_tensor
    return var.assign_sub(tf.reshape(size * matrix, var.shape))


def _centred(weights):
  """Subtracts each output's mean weight (kernels and matrices only)."""
  if weights.shape.rank not in (2, 4):
    return weights
  axes = list(range(weights.shape.rank - 1))  # All but the outputs.
  return weights - tf.reduce_mean(weights, axes, keepdims=True)


def apply_gradients(optimizer, gradients, global_step, recipe):
  """Returns the operation that updates variables, then their moving averages.

  Takes (gradient, variable) pairs. The operation raises global_step by one.
  """
  apply_gradient_op = optimizer.apply_gradients(gradients, global_step)
  # Data flow alone would not order these: make averages wait for new values.
  with tf.control_dependencies([apply_gradient_op]), \
      tf.name_scope('moving_averages'):
    return MovingAverages(recipe, global_step).apply(tf.trainable_variables())


class MovingAverages:
  """Moving averages of variables, as `tf.train.ExponentialMovingAverage` has.

  Weights oscillate around a good solution. Their averages lie closer to it, and
  evaluation uses them. average -= (1 - decay) * (average - variable) is a step
  of gradient descent: one operation, where TensorFlow's averages need two.
  """

  def __init__(self, recipe, global_step):
    self._decay, self._global_step = recipe.moving_average_decay, global_step

  def apply(self, variables):
    """Returns the operation that moves the averages towards the variables."""
    step = tf.cast(self._global_step, tf.float32)
    # At first, the averages move faster.
    optimizer = tf.train.GradientDescentOptimizer(
        1 - tf.minimum(self._decay, (1 + step) / (10 + step)))
    distances = []
    for variable in variables:
      with tf.device(variable.device):
        average = tf.get_variable(
            variable.op.name + '/ExponentialMovingAverage', trainable=False,
            initializer=variable.initial_value, use_resource=True)
        distances.append((average - variable.read_value(), average))
    return optimizer.apply_gradients(distances)


# What TensorBoard shows. `tf.summary` would number tags that are also names of
# operations ('conv1/weights_1'); raw operations take any tag.


def observe(losses, gradients, rate):
  """Summarizes losses, (gradient, variable) pairs and the learning rate.

  The loss varies from batch to batch, so there are moving averages of it, too,
  which start at 0. Returns the operation that updates these.
  """
  with tf.device('/cpu:0'):
    averages = tf.train.ExponentialMovingAverage(0.9, name='avg')
    averages_op = averages.apply(losses)
  for batch_loss in losses:
    _scalar_summary(batch_loss.op.name + ' (raw)', batch_loss)
    _scalar_summary(batch_loss.op.name, averages.average(batch_loss))
  _scalar_summary('learning_rate', rate)
  for gradient, variable in gradients:
    _histogram_summary(variable.op.name, variable)
    if gradient is not None:  # The loss depends on it.
      _histogram_summary(variable.op.name + '/gradients', gradient)
  return averages_op


def _activation_summaries(**layers):
  """How each layer's activations are spread, and how many of them are zero."""
  with tf.name_scope(None), tf.name_scope('summaries/'):
    for layer, values in layers.items():
      _histogram_summary(layer + '/activations', values)
      zeros = tf.cast(tf.equal(values, 0), tf.float32)
      _scalar_summary(layer + '/sparsity', tf.reduce_mean(zeros))


def _scalar_summary(tag, value):
  _summary(tf.raw_ops.ScalarSummary, tags=tag, values=value)


def _histogram_summary(tag, values):
  values = tf.convert_to_tensor(values)
  # A histogram of nan would end the step before the loss is checked.
  values = tf.where_v2(tf.math.is_finite(values), values, 0)
  _summary(tf.raw_ops.HistogramSummary, tag=tag, values=values)


def _summary(operation, **arguments):
  """Adds a summary unless its tag is taken: only the first tower is shown."""
  tag = arguments.get('tag') or arguments['tags']
  if tag in tf.get_collection('summary_tags'):
    return
  tf.add_to_collection('summary_tags', tag)
  with tf.name_scope(None), tf.name_scope('summaries/'), tf.device('/cpu:0'):
    tf.add_to_collection(tf.GraphKeys.SUMMARIES, operation(**arguments))
