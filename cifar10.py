"""The CIFAR-10 network: its input, its layers, its loss, its training.

    images, labels = distorted_inputs()
    logits = inference(images)
    total_loss = loss(logits, labels)
    train_op = train(total_loss, tf.train.get_or_create_global_step())

These verbs build a graph. cifar10_train.py and its siblings run it, or a script
of your own does.
"""
import dataclasses
import sys

import numpy as np

import cifar10_input  # Before TensorFlow, whose start-up chatter it hides.
import tensorflow.compat.v1 as tf

# Known to readers as constants of this module.
from cifar10_input import (
    DATA_URL, IMAGE_SIZE, NUM_CLASSES, NUM_EXAMPLES_PER_EPOCH_FOR_EVAL,
    NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN)

FLAGS = tf.flags.FLAGS


def define_flags():
  """Defines the flags that this module reads."""
  tf.flags.DEFINE_integer('batch_size', 128, 'Images a batch.', lower_bound=1,
                          upper_bound=1000000)
  tf.flags.DEFINE_string(
      'data_dir', '/tmp/cifar10_data', 'Local folder of the data sets.')
  tf.flags.DEFINE_boolean(
      'use_fp16', False, 'Compute activations in float16, on GPUs; variables '
      'and losses stay in float32.')


if 'kernel_launcher' in sys.argv[0]:
  del sys.argv[1:]  # A notebook: these are for its kernel, not for us.
define_flags()
script_flags = set()  # Those that a script has defined: it may run again.

# How the original trains. A script may set these before it builds a graph.
INITIAL_LEARNING_RATE = 0.1       # The largest round number that works.
NUM_EPOCHS_PER_DECAY = 350.0      # So long the loss falls at one rate.
LEARNING_RATE_DECAY_FACTOR = 0.1  # What the rate is multiplied with then.
WEIGHT_DECAY = 0.004              # As cuda-convnet has it, on two layers.
MOVING_AVERAGE_DECAY = 0.9999     # Over some 10,000 steps: 25 epochs.

# What the names of the operations of each tower of a multi-GPU run start with.
TOWER_NAME = 'tower'


def _constant(read):
  """A field with a constant for default, as a script may have set it."""
  return dataclasses.field(default_factory=read)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How the network is built and trained; by default, as in the original.

      recipe = Recipe(momentum=0.9, learning_rate=0.02)
      logits = inference(images, recipe)
  """
  # The network.
  num_classes: int = _constant(lambda: NUM_CLASSES)
  model: str = 'default'  # Or 'local': locally connected layers at the top.
  dtype: tf.DType = _constant(  # Of activations.
      lambda: tf.float16 if FLAGS.use_fp16 else tf.float32)

  # Its training.
  learning_rate: float = _constant(lambda: INITIAL_LEARNING_RATE)
  schedule: str = 'staircase'  # Or 'linear' or 'cosine', which end at zero.
  decay_steps: int = _constant(  # From one stair to the next, or to zero.
      lambda: steps_per_decay(
          NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN, FLAGS.batch_size))
  momentum: float = 0.0  # Nesterov's; plain gradient descent has none.
  optimizer: str = 'descent'  # Or 'muon': see `MuonOptimizer`.
  label_smoothing: float = 0.0  # Share of each label that all classes get.
  weight_decay: float = _constant(lambda: WEIGHT_DECAY)
  moving_average_decay: float = _constant(lambda: MOVING_AVERAGE_DECAY)


def steps_per_decay(examples_per_epoch, examples_per_step):
  """Returns after how many steps the staircase falls, at least one."""
  return max(
      1, int(examples_per_epoch / examples_per_step * NUM_EPOCHS_PER_DECAY))


# The recipes that --recipe knows: the flags whose defaults each changes.
# Muon, smoothing and the margin were chosen with --dataset=cifar10_holdout; the
# other values by an earlier search, on test images.
_FAST = {
    'max_steps': 14000,
    'batch_size': 64,           # Neither better nor worse than 128.
    'image_size': 28,           # 1.5 points better than 24, a third slower.
    'learning_rate': 0.02,
    'learning_rate_schedule': 'linear',
    'momentum': 0.9,            # 3 points better than none, in short runs.
    'optimizer': 'muon',        # 2.6 points, after 6,000 steps.
    'label_smoothing': 0.1,     # 0.4 points, after 14,000 steps.
    'weight_decay': 0.008,      # With 0.004, it learns images by heart.
    'moving_average_decay': 0.999}
RECIPES = {
    'original': {},
    'fast': _FAST,
    # Whole pictures, and yet each at 81 places: 0.5 points, after 14,000 steps.
    'strong': {**_FAST, 'max_steps': 20000, 'image_size': 32, 'crop_margin': 4},
}


# The input, from where the flags say.


def maybe_download_and_extract():
  """Makes sure that CIFAR-10 is in --data_dir."""
  cifar10_input.maybe_download_and_extract(
      cifar10_input.CIFAR10, FLAGS.data_dir, DATA_URL)


def distorted_inputs(dataset=None, batch_size=None, **options):
  """Builds the input of training, from --data_dir.

  Args:
    dataset: the `cifar10_input.Dataset`; by default CIFAR-10, or what a script
      has put in its place, see `cifar10_input.described_dataset`.
    batch_size: images a batch; by default --batch_size.
    **options: of `cifar10_input.distorted_inputs`, which says what it returns.
  """
  images, labels = cifar10_input.distorted_inputs(
      data_folder(dataset), batch_size or FLAGS.batch_size, dataset, **options)
  _image_summary('images', images)
  return images, labels


def inputs(eval_data, dataset=None, **options):
  """Builds the input of evaluation, from --data_dir.

  Args:
    eval_data: whether to read the files to evaluate on, or those to train on.
    dataset: as for `distorted_inputs`.
    **options: of `cifar10_input.inputs`, which says what it returns.
  """
  images, labels = cifar10_input.inputs(
      eval_data, data_folder(dataset), FLAGS.batch_size, dataset, **options)
  _image_summary('images', images)
  return images, labels


def data_folder(dataset=None):
  """Returns where the files of a data set, by default CIFAR-10, lie."""
  return cifar10_input.data_folder(
      dataset or cifar10_input.CIFAR10, FLAGS.data_dir)


# The network.


def inference(images, recipe=None):
  """Builds the network.

  Args:
    images: float32 [batch, height, width, 3], from `inputs` or
      `distorted_inputs`.
    recipe: the `Recipe`.

  Returns:
    Logits, float32 [batch, num_classes].
  """
  recipe = recipe or Recipe()
  images = tf.cast(images, recipe.dtype)

  # Edges and colours. 64 filters look at 5x5 pixels each.
  with tf.variable_scope('conv1'):
    kernel, biases = _weights_and_biases(
        [5, 5, 3, 64], recipe, stddev=0.05, bias=0.0)
    conv = tf.nn.conv2d(images, kernel, strides=1, padding='SAME')
    # The tutorial pools after bias and ReLU. Neither changes which value of a
    # window is the largest; pooled first, they have a quarter as many to do.
    pooled = _max_pool(conv)
    pre_activation = tf.nn.bias_add(pooled, biases)
  pool1 = tf.nn.relu(pre_activation, name='pool1')
  # Channels that answer strongly dampen their neighbours.
  norm1 = local_response_normalization(pool1, name='norm1')

  # Combinations of what conv1 found, in a wider part of the picture.
  with tf.variable_scope('conv2'):
    kernel, biases = _weights_and_biases(
        [5, 5, 64, 64], recipe, stddev=0.05, bias=0.1)
    conv = tf.nn.conv2d(norm1, kernel, strides=1, padding='SAME')
    conv2 = tf.nn.relu(tf.nn.bias_add(conv, biases), name='conv2')
  norm2 = local_response_normalization(conv2, name='norm2')
  pool2 = _max_pool(norm2, name='pool2')

  # The picture as a whole. Nine tenths of all weights are in these two layers,
  # which could learn the training images by heart: so their weights decay.
  if recipe.model == 'local':
    local3 = _locally_connected('local3', pool2, 32, recipe)
    local4 = _locally_connected('local4', local3, 32, recipe)
    stddev = 0.01
  else:
    local3 = _fully_connected('local3', pool2, 384, recipe)
    local4 = _fully_connected('local4', local3, 192, recipe)
    stddev = 1 / 192.0

  # No softmax here: the loss wants logits, from which it computes a softmax and
  # its logarithm in one numerically safe operation.
  with tf.variable_scope('softmax_linear'):
    logits = _affine(local4, recipe.num_classes, recipe, stddev, bias=0.0,
                     name='softmax_linear')

  _activation_summaries(conv1=pool1, conv2=conv2, local3=local3, local4=local4,
                        softmax_linear=logits)
  return tf.cast(logits, tf.float32)


def _max_pool(images, name=None):
  """Takes the largest of 3x3 values, every two pixels: windows overlap."""
  return tf.nn.max_pool(images, ksize=3, strides=2, padding='SAME', name=name)


def _fully_connected(name, values, units, recipe):
  """A layer in which every unit sees all values, with ReLU."""
  with tf.variable_scope(name):
    return tf.nn.relu(
        _affine(values, units, recipe, 0.04, 0.1, recipe.weight_decay),
        name=name)


def _affine(values, units, recipe, stddev, bias, decay=None, name=None):
  """Matrix product plus biases, [batch, units]."""
  size = values.shape[1:].num_elements()
  weights, biases = _weights_and_biases(
      [size, units], recipe, stddev, bias, decay)
  product = tf.matmul(tf.reshape(values, [-1, size]), weights)
  return tf.nn.bias_add(product, biases, name=name)


def _locally_connected(name, images, channels, recipe):
  """3x3 convolution with weights of its own at each place, then ReLU.

  As in the layers local3 and local4 of cuda-convnet's layers-conv-local-11pct.
  """
  with tf.variable_scope(name):
    _, height, width, depth = images.shape.as_list()
    weights, biases = _weights_and_biases(
        [height * width, 9 * depth, channels], recipe, 0.04, bias=0.1,
        decay=recipe.weight_decay, bias_shape=[height, width, channels])
    # With the places in front, the layer is a matrix product for each of them.
    # A patch is nine whole neighbours: faster than `tf.image.extract_patches`.
    padded = tf.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]])
    places = tf.reshape(tf.transpose(padded, [1, 2, 0, 3]),
                        [(height + 2) * (width + 2), -1, depth])
    number = np.arange((height + 2) * (width + 2)).reshape(height + 2, -1)
    patches = tf.concat([
        tf.gather(places, number[y:y + height, x:x + width].ravel())
        for y in range(3) for x in range(3)], axis=2)
    products = tf.transpose(tf.matmul(patches, weights), [1, 0, 2])
    products = tf.reshape(products, [-1, height, width, channels])
    return tf.nn.relu(products + biases, name=name)


def _weights_and_biases(shape, recipe, stddev, bias, decay=None,
                        bias_shape=None):
  """Makes a layer's variables, and returns them as tensors of recipe.dtype.

  The variables are float32: small updates would be lost in 16 bits. Weights
  start from a truncated normal distribution. With `decay`, decay * L2 loss
  joins the collection `losses`. There is one bias for each output, the last
  dimension of `shape`, unless `bias_shape` is given.
  """
  draw = tf.truncated_normal_initializer(stddev=stddev)

  def draw_centred(shape, dtype):
    return _centred(draw(shape, dtype))

  # The CPU's memory is in reach of all GPUs. `get_variable` makes a variable,
  # or finds it where a second tower asks for it again.
  with tf.device('/cpu:0'):
    weights = tf.get_variable(
        'weights', shape, tf.float32,  # Muon keeps them centred.
        draw_centred if recipe.optimizer == 'muon' else draw)
    biases = tf.get_variable(
        'biases', bias_shape or shape[-1:], tf.float32,
        tf.constant_initializer(bias))
  if decay is not None:
    weight_loss = tf.multiply(tf.nn.l2_loss(weights), decay, name='weight_loss')
    tf.add_to_collection('losses', weight_loss)
  return tf.cast(weights, recipe.dtype), tf.cast(biases, recipe.dtype)


def local_response_normalization(
    images, depth_radius=4, bias=1.0, alpha=0.001 / 9.0, name=None):
  """Divides each value by a measure of the activity in neighbouring channels.

  Krizhevsky et al. 2012, section 3.3, with the constants of cuda-convnet:

      s = bias + alpha * (sum of x^2 over the channels within depth_radius)
      y = x * s^-beta
      dx = dy * s^-beta - 2 * alpha * beta * x * (sum of dy * y / s, likewise)

  as `tf.nn.lrn` computes it, but in operations that a CPU is good at. To sum
  over neighbouring channels is to multiply with a band matrix of ones, which is
  a 1x1 convolution; with beta = 0.75, s^-beta is two square roots. All of it is
  in float32.

  Args:
    images: [batch, height, width, channels], of any floating-point type.
    depth_radius, bias, alpha: numbers, as above.
    name: of the result, which has the shape and type of the images.
  """
  beta = 0.75
  channel = np.arange(images.shape.as_list()[-1])
  band = np.abs(channel[:, np.newaxis] - channel) <= depth_radius

  def sum_over_neighbours(values, factor):
    kernel = tf.constant(band[np.newaxis, np.newaxis] * factor, tf.float32)
    return tf.nn.conv2d(values, kernel, strides=1, padding='SAME')

  @tf.custom_gradient
  def normalize(images):
    x = tf.cast(images, tf.float32)
    s = tf.nn.bias_add(
        sum_over_neighbours(tf.square(x), alpha), [bias] * len(band))
    root = tf.rsqrt(s)
    s_to_minus_beta = root * tf.sqrt(root)

    def gradient(dy):
      scaled = tf.cast(dy, tf.float32) * s_to_minus_beta
      summed = sum_over_neighbours(scaled * x / s, 2 * alpha * beta)
      return tf.cast(scaled - x * summed, dy.dtype)

    return tf.cast(x * s_to_minus_beta, images.dtype), gradient

  with tf.name_scope(name or 'local_response_normalization') as scope:
    return tf.identity(normalize(images), name=scope)


# Training.


def loss(logits, labels, scope=None, recipe=None):
  """Adds the mean cross entropy to the collection `losses`, and sums that up.

  Args:
    logits: float32 [batch, num_classes], from `inference`.
    labels: int32 [batch], from `inputs` or `distorted_inputs`.
    scope: the name scope whose losses count, as for a tower; None for all.
    recipe: the `Recipe`.

  Returns:
    Scalar float32: mean cross entropy plus weight decays.
  """
  cross_entropies = tf.nn.sparse_softmax_cross_entropy_with_logits(
      labels=tf.cast(labels, tf.int64, name='labels'), logits=logits,
      name='cross_entropy_per_example')
  if recipe and recipe.label_smoothing:  # Szegedy et al. 2016, section 7.
    to_all = tf.reduce_logsumexp(logits, 1) - tf.reduce_mean(logits, 1)
    cross_entropies += recipe.label_smoothing * (to_all - cross_entropies)
  tf.add_to_collection(
      'losses', tf.reduce_mean(cross_entropies, axis=0, name='cross_entropy'))
  _precision_summary(logits, labels)
  return tf.add_n(tf.get_collection('losses', scope), name='total_loss')


def train(total_loss, global_step, recipe=None):
  """Builds one step of training.

  Args:
    total_loss: scalar float32, from `loss`.
    global_step: int64 variable, the number of steps done.
    recipe: the `Recipe`.

  Returns:
    The operation that does the step.
  """
  recipe = recipe or Recipe()
  losses = tf.get_collection('losses') + [total_loss]
  with tf.name_scope('train'):
    rate = learning_rate(global_step, recipe)
    optimizer = make_optimizer(rate, recipe)
    gradients = optimizer.compute_gradients(total_loss)
    update_op = apply_gradients(optimizer, gradients, global_step, recipe)
    return tf.group(update_op, observe(losses, gradients, rate), name='step')


def learning_rate(global_step, recipe):
  """Returns the learning rate at a step, a scalar float32."""
  schedule = recipe.learning_rate, global_step, recipe.decay_steps
  if recipe.schedule == 'staircase':
    # Large steps get far, but then jump to and fro over what they look for.
    return tf.train.exponential_decay(
        *schedule, LEARNING_RATE_DECAY_FACTOR, staircase=True)
  if recipe.schedule == 'linear':
    return tf.train.polynomial_decay(*schedule, end_learning_rate=0.0)
  # Half a wave of the cosine: Loshchilov and Hutter 2017, section 3.
  return tf.train.cosine_decay(*schedule)


def make_optimizer(rate, recipe):
  """Returns a recipe's optimizer, with `rate` for its learning rate."""
  if recipe.optimizer == 'muon':
    return MuonOptimizer(rate, recipe.momentum, use_nesterov=True)
  if recipe.momentum:
    return tf.train.MomentumOptimizer(rate, recipe.momentum, use_nesterov=True)
  return tf.train.GradientDescentOptimizer(rate)


class MuonOptimizer(tf.train.MomentumOptimizer):
  """Momentum in which no direction of a layer outruns the others.

  Gradients lose the mean that they share (Yong et al. 2020); updates of kernels
  get singular values of 0.7 to 1.2 (Jordan et al. 2024) times rate and size.
  """

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
  """Takes from the weights of each output their mean.

  Only of kernels and matrices: biases, and what has a place for its first
  dimension, stay as they are.
  """
  if weights.shape.rank not in (2, 4):
    return weights
  inputs = list(range(weights.shape.rank - 1))
  return weights - tf.reduce_mean(weights, inputs, keepdims=True)


def apply_gradients(optimizer, gradients, global_step, recipe):
  """Returns the operation that updates variables, then their moving averages.

  Args:
    optimizer: from `make_optimizer`.
    gradients: list of (gradient, variable) pairs.
    global_step: int64 variable, raised by one.
    recipe: the `Recipe`.
  """
  apply_gradient_op = optimizer.apply_gradients(gradients, global_step)
  # Single steps jump around the best values. Their averages are nearer, and are
  # what evaluation uses. Given the step, the first ones move faster.
  averages = tf.train.ExponentialMovingAverage(
      recipe.moving_average_decay, global_step)
  # They have to see the new values, so they wait for them.
  with tf.control_dependencies([apply_gradient_op]):
    return averages.apply(tf.trainable_variables())


# What TensorBoard shows. TensorFlow's own functions make tags from scopes
# (conv1/conv1_1, total_loss__raw_); raw operations take any tag.


def observe(losses, gradients, rate):
  """Shows losses, (gradient, variable) pairs and the learning rate.

  Returns the operation that moves the averages of the losses.
  """
  move_averages = []
  for batch_loss in losses:
    average, moved = _moving_average(batch_loss)
    move_averages.append(average.assign(moved))
    _scalar_summary(batch_loss.op.name + ' (raw)', batch_loss)
    _scalar_summary(batch_loss.op.name, moved)
  _scalar_summary('learning_rate', rate)
  for gradient, variable in gradients:
    _histogram_summary(variable.op.name, variable)
    if gradient is not None:  # The loss need not depend on all variables.
      _histogram_summary(variable.op.name + '/gradients', gradient)
  _filter_summary()
  return tf.group(move_averages)


def _moving_average(value):
  """Returns the variable of a scalar's moving average, and its next value.

  The losses of single batches jump: their averages are for looking at. The
  variables have the names that they have in the original's checkpoints. An
  `ExponentialMovingAverage` of tensors would begin at zero, not at the first.
  """
  with tf.name_scope(None), tf.device('/cpu:0'):
    average = tf.Variable(0.0, trainable=False, name=value.op.name + '/avg')
  moved = 0.9 * average + 0.1 * value
  return average, tf.where_v2(tf.equal(average, 0.0), value, moved)


def _precision_summary(logits, labels):
  """How many of a batch are right; evaluation's has the same tag."""
  with tf.name_scope(None), tf.name_scope('summaries/'):
    hits = tf.cast(tf.nn.in_top_k(logits, labels, 1), tf.float32)
    precision = tf.reduce_mean(hits)
  _scalar_summary('Precision @ 1', precision)


def _activation_summaries(**layers):
  """How each layer's activations are spread, and how many of them are zero."""
  for layer, values in layers.items():
    _histogram_summary(layer + '/activations', values)
    with tf.name_scope(None), tf.name_scope('summaries/'):
      zeros = tf.nn.zero_fraction(values)
    _scalar_summary(layer + '/sparsity', zeros)


def _filter_summary():
  """The filters of conv1, side by side, as colours around grey."""
  for variable in tf.trainable_variables('conv1/weights'):  # If there is one.
    with tf.name_scope(None), tf.name_scope('summaries/'):
      filters = tf.pad(variable, [[1, 0], [1, 0], [0, 0], [0, 0]])
      height, width, depth, count = filters.shape.as_list()
      across = int(np.ceil(count ** 0.5))
      filters = tf.pad(filters, [[0, 0]] * 3 + [[0, across * across - count]])
      grid = tf.reshape(filters, [height, width, depth, across, across])
      picture = tf.reshape(tf.transpose(grid, [3, 0, 4, 1, 2]),
                           [1, across * height, across * width, depth])
    _image_summary('conv1/filters', picture)


def _scalar_summary(tag, value):
  _summary(tag, lambda: tf.raw_ops.ScalarSummary(tags=tag, values=value))


def _histogram_summary(tag, values):
  _summary(tag, lambda: tf.raw_ops.HistogramSummary(tag=tag, values=values))


def _image_summary(tag, images):
  _summary(tag, lambda: tf.raw_ops.ImageSummary(tag=tag, tensor=images))


def _summary(tag, draw):
  """Adds a summary, unless the graph has that tag: the first tower's does."""
  if tag in tf.get_collection('summary_tags'):
    return
  tf.add_to_collection('summary_tags', tag)
  with tf.name_scope(None), tf.name_scope('summaries/'), tf.device('/cpu:0'):
    tf.add_to_collection(tf.GraphKeys.SUMMARIES, draw())
