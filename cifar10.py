"""The CIFAR-10 network: its input, its layers, its loss, its training.

    images, labels = distorted_inputs()
    logits = inference(images)
    total_loss = loss(logits, labels)
    train_op = train(total_loss, tf.train.get_or_create_global_step())

These verbs build a graph. To run it is the business of cifar10_train.py and its
siblings, or of a script of your own.
"""
import collections
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import sys

import numpy as np

import cifar10_input
from cifar10_input import (  # Known to readers as constants of this module.
    IMAGE_SIZE, NUM_CLASSES, NUM_EXAMPLES_PER_EPOCH_FOR_EVAL,
    NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN)
from cifar10_input import CIFAR10, UserError, say, tf

FLAGS = tf.flags.FLAGS

tf.flags.DEFINE_integer('batch_size', 128, 'Images a batch.', lower_bound=1,
                        upper_bound=1000000)
tf.flags.DEFINE_string(
    'data_dir', '/tmp/cifar10_data', 'Where the data sets lie.')
tf.flags.DEFINE_boolean(
    'use_fp16', False, 'Compute activations in float16, on GPUs; variables and '
    'losses stay in float32.')

# The recipe of training, the original's. Flags of the same names change it.
RECIPE_HEADING = 'cifar10, the recipe'  # Of these flags, in --help.
INITIAL_LEARNING_RATE = 0.1
LEARNING_RATE_SCHEDULE = 'staircase'
NUM_EPOCHS_PER_DECAY = 350.0      # Epochs until the learning rate falls.
LEARNING_RATE_DECAY_FACTOR = 0.1  # What it is multiplied with then.
MOMENTUM = 0.0
WEIGHT_DECAY = 0.004              # Of the layers after the convolutions.
MOVING_AVERAGE_DECAY = 0.9999     # Of the variables, for evaluation.

# The recipes that --recipe knows, by what they change in it.
_FAST = {
    'max_steps': 30000, 'batch_size': 64, 'image_size': 28,
    'learning_rate': 0.02, 'learning_rate_schedule': 'linear', 'momentum': 0.9,
    'weight_decay': 0.008, 'moving_average_decay': 0.999}
RECIPES = {
    'original': {},
    'fast': _FAST,
    'strong': {**_FAST, 'max_steps': 72000},
}

# What the names of the operations of each tower of a multi-GPU run start with.
TOWER_NAME = 'tower'


def flag(name, default):
  """Returns a flag's value; a reader's own script may not have such a flag."""
  return FLAGS[name].value if name in FLAGS else default


# The input, from where the flags say.


def maybe_download_and_extract(dataset=CIFAR10, url=None, sha256=None):
  """Makes sure that a data set is in --data_dir; see `cifar10_input`."""
  cifar10_input.maybe_download_and_extract(
      dataset, FLAGS.data_dir, url, sha256)


def distorted_inputs(dataset=CIFAR10, batch_size=None):
  """Builds the input of training, from --data_dir; see `cifar10_input`.

  Returns:
    images: float32 [batch_size, size, size, 3], where size is
      `dataset.image_size`; a batch is of --batch_size if nothing else is said.
    labels: int32 [batch_size].
  """
  images, labels = cifar10_input.distorted_inputs(
      os.path.join(FLAGS.data_dir, dataset.folder),
      batch_size or FLAGS.batch_size, dataset,
      num_threads=flag('num_preprocess_threads', None),
      min_fraction_of_examples_in_queue=flag(
          'min_fraction_of_examples_in_queue',
          cifar10_input.MIN_FRACTION_OF_EXAMPLES_IN_QUEUE),
      deterministic=flag('deterministic', False))
  _image_summary('images', images)
  return images, labels


def inputs(eval_data, dataset=CIFAR10, kinds=cifar10_input.CENTRAL_VIEW):
  """Builds the input of evaluation, from --data_dir; see `cifar10_input`.

  Args:
    eval_data: whether to read the test images, not those of training.
    dataset: the `cifar10_input.Dataset`.
    kinds: the views of each image, as `cifar10_input.views` makes them.

  Returns:
    images: float32 [n, size, size, 3], where size is `dataset.image_size` and
      n is --batch_size, or fewer, for each view.
    labels: int32 [--batch_size or fewer].
  """
  images, labels = cifar10_input.inputs(
      eval_data, os.path.join(FLAGS.data_dir, dataset.folder),
      FLAGS.batch_size, dataset, kinds)
  _image_summary('images', images)
  return images, labels


def check_files(dataset, files):
  """Finds what is wrong with files in --data_dir; see `cifar10_input`."""
  return cifar10_input.check_files(
      dataset, os.path.join(FLAGS.data_dir, dataset.folder), files)


# The network.


def inference(images, num_classes=NUM_CLASSES):
  """Builds the network.

  Args:
    images: float32 [batch, height, width, 3], IMAGE_SIZE each in the original.
    num_classes: how many classes to tell apart.

  Returns:
    Logits, float32 [batch, num_classes]; `tf.nn.softmax` makes them
    probabilities.
  """
  images = tf.cast(images, _activation_dtype())
  decay = flag('weight_decay', WEIGHT_DECAY)
  pool1 = _convolution('conv1', images, channels=64, bias=0.0, pooling='pool1')
  norm1 = local_response_normalization(pool1, name='norm1')
  conv2 = _convolution('conv2', norm1, channels=64, bias=0.1)
  norm2 = local_response_normalization(conv2, name='norm2')
  pool2 = _max_pooling('pool2', norm2)
  if flag('model', 'default') == 'local':  # As cuda-convnet has it.
    local3 = _locally_connected('local3', pool2, 32, stddev=0.04, decay=decay)
    local4 = _locally_connected('local4', local3, 32, stddev=0.04, decay=decay)
    stddev = 0.01
  else:
    local3 = _fully_connected('local3', pool2, 384, stddev=0.04, decay=decay)
    local4 = _fully_connected('local4', local3, 192, stddev=0.04, decay=decay)
    stddev = 1 / 192.0
  logits = _fully_connected('softmax_linear', local4, num_classes, stddev,
                            bias=0.0, activation=tf.identity)
  return tf.cast(logits, tf.float32)


def _activation_dtype():
  """Returns what the flags say, with a warning where that is not wise."""
  use_bfloat16 = flag('use_bfloat16', False)
  if not tf.config.list_physical_devices('GPU'):
    if FLAGS.use_fp16:
      tf.logging.log_first_n(
          tf.logging.WARN, '--use_fp16 is for GPUs: on a CPU it is slow.', 1)
    if use_bfloat16 and not _cpu_has('avx512_bf16|amx_bf16'):
      tf.logging.log_first_n(
          tf.logging.WARN, '--use_bfloat16 is slow on this CPU: it has neither '
          'AVX512-BF16 nor AMX.', 1)
  return (tf.float16 if FLAGS.use_fp16 else
          tf.bfloat16 if use_bfloat16 else tf.float32)


def _cpu_has(features):
  try:
    with open('/proc/cpuinfo') as cpuinfo:
      return re.search(features, cpuinfo.read())
  except OSError:
    return True  # Only Linux tells.


def _convolution(name, images, channels, bias, pooling=None):
  """5x5 convolution with ReLU, perhaps with max-pooling of that name.

  To add a bias and to apply ReLU leaves the largest value of a window the
  largest. So pooling comes first: a quarter as many values are left to do.
  """
  with tf.variable_scope(name):
    weights, biases = _weights_and_biases(
        [5, 5, images.shape.as_list()[-1], channels], images.dtype,
        stddev=0.05, decay=None, bias=bias)
    values = tf.nn.conv2d(images, weights, strides=1, padding='SAME')
    if pooling:
      values = _max_pooling(pooling, values)
    return _activation(tf.nn.relu(tf.nn.bias_add(values, biases)))


def _max_pooling(name, images):
  """3x3 windows that overlap, two pixels apart."""
  return tf.nn.max_pool(images, ksize=3, strides=2, padding='SAME', name=name)


def local_response_normalization(
    images, depth_radius=4, bias=1.0, alpha=0.001 / 9.0, name=None):
  """Divides each value by what its neighbouring channels amount to.

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
    depth_radius: int, in channels.
    bias, alpha: float.
    name: of the scope of the operations.

  Returns:
    The same shape and type.
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

  with tf.name_scope(name or 'local_response_normalization'):
    return normalize(images)


def _locally_connected(name, images, channels, stddev, decay):
  """3x3 convolution with weights of its own at each place, then ReLU."""
  with tf.variable_scope(name):
    _, height, width, depth = images.shape.as_list()
    weights, biases = _weights_and_biases(
        [height * width, 9 * depth, channels], images.dtype, stddev, decay,
        bias=0.1, bias_shape=[height, width, channels])
    # With the places in front it is a matrix product for each of them, and a
    # patch is made of whole neighbours.
    padded = tf.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]])
    height_2, width_2 = height + 2, width + 2
    places = tf.reshape(tf.transpose(padded, [1, 2, 0, 3]),
                        [height_2 * width_2, -1, depth])
    number = np.arange(height_2 * width_2).reshape(height_2, width_2)
    patches = tf.concat([
        tf.gather(places, number[y:y + height, x:x + width].ravel())
        for y in range(3) for x in range(3)], axis=2)
    products = tf.transpose(tf.matmul(patches, weights), [1, 0, 2])
    products = tf.reshape(products, [-1, height, width, channels])
    return _activation(tf.nn.relu(products + biases))


def _fully_connected(name, values, units, stddev, decay=None, bias=0.1,
                     activation=tf.nn.relu):
  """Matrix product with ReLU, or with another activation function."""
  with tf.variable_scope(name):
    size = values.shape[1:].num_elements()
    weights, biases = _weights_and_biases(
        [size, units], values.dtype, stddev, decay, bias)
    product = tf.matmul(tf.reshape(values, [-1, size]), weights)
    return _activation(activation(tf.nn.bias_add(product, biases)))


def _weights_and_biases(shape, dtype, stddev, decay, bias, bias_shape=None):
  """Makes a layer's variables.

  They are float32 in the CPU's memory, where all towers share them.

  Args:
    shape: of the weights; the last number is that of the outputs.
    dtype: what the layer computes in.
    stddev: of the truncated normal distribution of the initial weights.
    decay: factor of the weights' L2 loss in the collection `losses`, or None.
    bias: the initial biases.
    bias_shape: of the biases; by default one for each output.

  Returns:
    Weights and biases, as tensors of the dtype.
  """
  with tf.device('/cpu:0'):
    weights = tf.get_variable(
        'weights', shape,
        initializer=tf.truncated_normal_initializer(stddev=stddev))
    biases = tf.get_variable(
        'biases', bias_shape or shape[-1:],
        initializer=tf.constant_initializer(bias))
  if decay is not None:
    weight_loss = tf.multiply(tf.nn.l2_loss(weights), decay, name='weight_loss')
    tf.add_to_collection('losses', weight_loss)
  return tf.cast(weights, dtype), tf.cast(biases, dtype)


def _activation(values):
  """Remembers a layer's activations, for the summaries."""
  tf.add_to_collection(tf.GraphKeys.ACTIVATIONS, values)
  return values


# Training.


def loss(logits, labels, scope=None):
  """Adds the mean cross entropy to the collection `losses`, and sums that up.

  Args:
    logits: float32 [batch, classes], from `inference`.
    labels: int32 [batch], from `distorted_inputs`.
    scope: the name scope whose losses count, as for a tower; None for all.

  Returns:
    Scalar float32: mean cross entropy plus weight decays.
  """
  cross_entropies = tf.nn.sparse_softmax_cross_entropy_with_logits(
      labels=tf.cast(labels, tf.int64), logits=logits,
      name='cross_entropy_per_example')
  tf.add_to_collection(
      'losses', tf.reduce_mean(cross_entropies, name='cross_entropy'))
  return tf.add_n(tf.get_collection('losses', scope), name='total_loss')


class Replicas(collections.namedtuple('Replicas', ['aggregated', 'total'])):
  """How many workers train together, each with a replica of the graph.

  aggregated: int, how many gradients are averaged in a step.
  total: int, how many there are to take them from.
  """


ALONE = Replicas(1, 1)

# No string: TensorFlow would want to save the collection in checkpoints.
SYNC_REPLICAS = ('sync_replicas',)


def train(total_loss, global_step, dataset=CIFAR10, replicas=ALONE):
  """Builds one step of training.

  Args:
    total_loss: scalar float32, from `loss`.
    global_step: int64 variable, the number of steps done.
    dataset: the `cifar10_input.Dataset`, whose size makes an epoch.
    replicas: the `Replicas` that do a step together.

  Returns:
    The operation that does the step.
  """
  with tf.name_scope('train'):
    optimizer = make_optimizer(
        global_step, FLAGS.batch_size * replicas.aggregated, dataset)
    return apply_gradients(
        optimizer, optimizer.compute_gradients(total_loss), global_step,
        tf.get_collection('losses') + [total_loss], replicas)


def make_optimizer(global_step, examples_per_step, dataset=CIFAR10):
  """Returns gradient descent, whose learning rate falls as the flags say.

  Args:
    global_step: int64 variable, the number of steps done.
    examples_per_step: images that one step learns from, over all towers and
      all replicas.
    dataset: the `cifar10_input.Dataset`, whose size makes an epoch.
  """
  initial_rate = flag('learning_rate', INITIAL_LEARNING_RATE)
  schedule = flag('learning_rate_schedule', LEARNING_RATE_SCHEDULE)
  if schedule == 'staircase':  # Tenfold every 350 epochs.
    decay_steps = max(1, int(
        dataset.num_train_examples / examples_per_step * NUM_EPOCHS_PER_DECAY))
    learning_rate = tf.train.exponential_decay(
        initial_rate, global_step, decay_steps, LEARNING_RATE_DECAY_FACTOR,
        staircase=True)
  else:  # To zero at the last step.
    done = tf.minimum(1.0, tf.cast(global_step, tf.float32) / FLAGS.max_steps)
    learning_rate = initial_rate * (
        1 - done if schedule == 'linear' else (1 + tf.cos(np.pi * done)) / 2)
  _scalar_summary('learning_rate', learning_rate)
  momentum = flag('momentum', MOMENTUM)
  if momentum:
    return tf.train.MomentumOptimizer(
        learning_rate, momentum, use_nesterov=True)
  return tf.train.GradientDescentOptimizer(learning_rate)


def apply_gradients(optimizer, gradients, global_step, losses, replicas=ALONE):
  """Updates the variables and then their averages, and draws all summaries.

  Args:
    optimizer: from `make_optimizer`.
    gradients: list of (gradient, variable) pairs.
    global_step: int64 variable, raised by one.
    losses: scalars whose names the summaries take.
    replicas: the `Replicas` that do a step together. What keeps more than one
      in step, a `tf.train.SyncReplicasOptimizer`, is in the collection
      `SYNC_REPLICAS` then.

  Returns:
    The operation that does all of it.
  """
  variable_averages = tf.train.ExponentialMovingAverage(
      flag('moving_average_decay', MOVING_AVERAGE_DECAY), global_step)
  if replicas.total > 1:
    optimizer = tf.train.SyncReplicasOptimizer(
        optimizer, replicas.aggregated, replicas.total,
        variable_averages=variable_averages,
        variables_to_average=tf.trainable_variables())
    tf.add_to_collection(SYNC_REPLICAS, optimizer)
    update_op = optimizer.apply_gradients(gradients, global_step)
  else:
    apply_gradient_op = optimizer.apply_gradients(gradients, global_step)
    # In a cluster, the averages need not travel to a worker and back.
    with tf.control_dependencies([apply_gradient_op]), \
        tf.device(global_step.device):
      update_op = variable_averages.apply(tf.trainable_variables())
  # The losses of single batches jump: their averages are for looking at. The
  # original's checkpoints have them under this name.
  loss_averages = tf.train.ExponentialMovingAverage(0.9, name='avg')
  loss_averages_op = loss_averages.apply(losses)

  for batch_loss in losses:
    _scalar_summary(batch_loss.op.name + ' (raw)', batch_loss)
    _scalar_summary(batch_loss.op.name, loss_averages.average(batch_loss))
  for gradient, variable in gradients:
    _histogram_summary(variable.op.name, variable)
    if gradient is not None:  # The loss need not depend on all variables.
      _histogram_summary(variable.op.name + '/gradients', gradient)
  _activation_summaries()
  _filter_summary()
  return tf.group(update_op, loss_averages_op, name='step')


# Summaries. TensorFlow's own functions make tags from scopes (conv1/conv1_1,
# total_loss__raw_); the operations below them take any tag.


def without_tower(name):
  """Returns an operation's name without the tower that it belongs to."""
  return re.sub('^%s_[0-9]+/' % TOWER_NAME, '', name)


def _summary(operation, **arguments):
  with tf.name_scope(None), tf.name_scope('summaries/'), tf.device('/cpu:0'):
    tf.add_to_collection(tf.GraphKeys.SUMMARIES, operation(**arguments))


def _scalar_summary(tag, value):
  _summary(tf.raw_ops.ScalarSummary, tags=tag, values=value)


def _histogram_summary(tag, values):
  _summary(tf.raw_ops.HistogramSummary, tag=tag, values=values)


def _image_summary(tag, images):
  _summary(tf.raw_ops.ImageSummary, tag=tag, tensor=images)


def _activation_summaries():
  """How each layer's activations are spread, and how many of them are zero."""
  layers = {}  # The first tower speaks for all.
  for values in tf.get_collection(tf.GraphKeys.ACTIVATIONS):
    layers.setdefault(without_tower(os.path.dirname(values.op.name)), values)
  for layer, values in layers.items():
    with tf.name_scope(None), tf.name_scope('summaries/'):
      zeros = tf.reduce_mean(tf.cast(tf.equal(values, 0), tf.float32))
    _histogram_summary(layer + '/activations', values)
    _scalar_summary(layer + '/sparsity', zeros)


def _filter_summary():
  """The filters of conv1, side by side, as colours around grey."""
  for variable in tf.trainable_variables('conv1/weights'):
    filters = tf.pad(variable, [[1, 0], [1, 0], [0, 0], [0, 0]])
    height, width, depth, count = filters.shape.as_list()
    across = int(np.ceil(count ** 0.5))
    filters = tf.pad(filters, [[0, 0]] * 3 + [[0, across * across - count]])
    picture = tf.reshape(
        tf.transpose(tf.reshape(
            filters, [height, width, depth, across, across]), [3, 0, 4, 1, 2]),
        [1, across * height, across * width, depth])
    _image_summary('conv1/filters', picture)


# What the scripts share beside the network.


def define_flags():
  """Defines what all scripts offer beside the flags of this module."""
  if 'dataset' in FLAGS:
    return  # Another script, imported by the same program, has done it.
  tf.flags.DEFINE_boolean(
      'use_bfloat16', False, 'Compute activations in bfloat16, on GPUs and on '
      'CPUs with AVX512-BF16 or AMX; variables and losses stay in float32.')
  tf.flags.DEFINE_string(
      'dataset', CIFAR10.name, 'What to learn from: %s, or a folder with your '
      'own pictures in train/CLASS/ and test/CLASS/. (synthetic is made here.)'
      % ', '.join(sorted(cifar10_input.DATASETS)))
  tf.flags.DEFINE_enum(
      'label', 'fine', ['fine', 'coarse'], 'Which labels of CIFAR-100: '
      'those of the 100 classes, or of the 20 superclasses.')
  tf.flags.DEFINE_enum(
      'model', 'default', ['default', 'local'], 'The network: with two fully '
      'connected layers, or with two locally connected ones.')
  tf.flags.DEFINE_integer(
      'image_size', IMAGE_SIZE, 'How many of the 32 pixels of each side of a '
      'picture the network sees.', lower_bound=8, upper_bound=32)
  tf.flags.DEFINE_string(
      'data_url', None, 'Where to download the archive of the data set from '
      '(http, https or file) instead of the place where it is published.')
  tf.flags.DEFINE_string(
      'data_sha256', None, 'Its checksum, if it is not the published archive.')
  tf.flags.mark_bool_flags_as_mutual_exclusive(['use_fp16', 'use_bfloat16'])
  tf.flags.register_validator(
      'dataset', lambda name: name in cifar10_input.DATASETS
      or os.path.isdir(os.path.expanduser(name)),
      'must be %s, or a folder with pictures'
      % ', '.join(sorted(cifar10_input.DATASETS)))
  tf.flags.register_validator(
      'data_url', lambda url: not url or re.match('(https?|file)://', url),
      'must start with http://, https:// or file://')
  tf.flags.register_validator(
      'data_sha256', lambda sha: not sha or re.fullmatch('[0-9a-fA-F]{64}',
                                                         sha),
      'must be 64 hexadecimal digits')


def refuse_patterns(flag):
  """Has a flag for a folder with checkpoints refuse what would not be found."""
  tf.flags.register_validator(
      flag, lambda folder: not re.search(r'[][*?\\]', folder),
      r'must do without * ? [ ] \, which mean something else to TensorFlow')


def prepare_dataset():
  """Returns the data set that --dataset names, after a download if need be."""
  return dataclasses.replace(_find_dataset(), image_size=FLAGS.image_size)


def _find_dataset():
  name = _dataset_name()
  if name not in cifar10_input.DATASETS:
    return cifar10_input.pictures(name, FLAGS.data_dir)
  dataset = cifar10_input.DATASETS[name]
  if FLAGS.label == 'coarse':
    if name != 'cifar100':
      raise UserError('--label=coarse is for --dataset=cifar100.')
    dataset = cifar10_input.CIFAR100_COARSE
  maybe_download_and_extract(dataset, FLAGS.data_url, FLAGS.data_sha256)
  return dataset


def _dataset_name():
  """Returns --dataset: a known name, or the absolute path of a folder."""
  if FLAGS.dataset not in cifar10_input.DATASETS:
    FLAGS.dataset = os.path.abspath(os.path.expanduser(FLAGS.dataset))
  return FLAGS.dataset


_JOBS = ('chief', 'master', 'worker', 'ps', 'evaluator')


def cluster_task():
  """Returns what TF_CONFIG says of a cluster and of this process's task in it.

  Returns:
    None without a cluster. Else a dict from 'ps', 'worker' and either 'chief'
    or 'master' to lists of addresses, HOST:PORT; the task's job, one of these
    or 'evaluator'; and its index.

  Raises:
    UserError: one cannot train with what it says.
  """
  if not os.environ.get('TF_CONFIG'):
    return None
  try:
    if not isinstance(json.loads(os.environ['TF_CONFIG']), dict):
      raise ValueError('it is no object in JSON')
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    jobs = resolver.cluster_spec().as_dict()
    job, index = resolver.task_type, resolver.task_id or 0
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError('TF_CONFIG cannot be read: %s' % error) from error
  jobs.pop('evaluator', None)  # It is beside the cluster.
  if not jobs:
    return None
  unknown = sorted(set(jobs) - set(_JOBS))
  chiefs = sum(len(jobs.get(name, ())) for name in ('chief', 'master'))
  strange = [address for addresses in jobs.values() for address in addresses
             if not re.fullmatch(r'[^\s/]+:\d+', address)
             or int(address.rpartition(':')[2]) > 65535]
  for is_wrong, what in (
      (unknown, 'has a job in its cluster that is none of %s: %s' % (
          ', '.join(_JOBS), ', '.join(unknown))),
      (strange, 'has an address that is not HOST:PORT: %s' % ' '.join(strange)),
      (chiefs != 1, 'has %d tasks chief or master, not one' % chiefs),
      (not jobs.get('ps'), 'has no ps in its cluster'),
      (job not in (*jobs, 'evaluator'), 'has the task type %s, which is not in '
       'its cluster: %s' % (job, ', '.join(jobs))),
      (not 0 <= index < len(jobs.get(job, 'e')), 'has the task index %d, but '
       'its cluster only %d of %s' % (index, len(jobs.get(job, 'e')), job))):
    if is_wrong:
      raise UserError('TF_CONFIG %s.' % what)
  return jobs, job, index


def is_listening(address):
  """Returns whether a process accepts connections at an address, HOST:PORT."""
  host, _, port = address.rpartition(':')
  with contextlib.suppress(OSError):
    socket.create_connection((host.strip('[]'), int(port)), timeout=2).close()
    return True
  return False


# What a run was started with, in its train_dir.

_RUN_FILE = 'run.json'
_SHAPING_FLAGS = ('dataset', 'label', 'model', 'image_size')
_ADOPTED_FLAGS = _SHAPING_FLAGS + ('data_dir', 'use_bfloat16', 'use_fp16')


def write_run(folder):
  """Writes all flags, and versions, for those who want to know later."""
  flags = FLAGS.flags_by_module_dict()
  values = {flag.name: flag.value
            for module in _modules() for flag in flags[module]}
  values['data_dir'] = os.path.abspath(FLAGS.data_dir)
  with open(os.path.join(folder, _RUN_FILE), 'w') as f:
    json.dump({
        'flags': values,
        'versions': {'tensorflow': tf.version.VERSION, 'numpy': np.__version__,
                     'python': sys.version.split()[0]}}, f, indent=1)


def _modules():
  """Returns absl's names of the modules of our flags, the script's first."""
  return [module for module in reversed(FLAGS.flags_by_module_dict())
          if os.path.basename(module).startswith('cifar10')]


def read_run(folder):
  """Returns the flags of the run in a folder, none if they are not known."""
  try:
    with open(os.path.join(folder, _RUN_FILE)) as f:
      return json.load(f)['flags']
  except (OSError, ValueError, KeyError, TypeError):
    return {}


def check_run(folder):
  """Raises a UserError if the run in a folder is not what the flags say."""
  _dataset_name()
  run = read_run(folder)
  fixed = _SHAPING_FLAGS + ('recipe',)
  if (run.get('learning_rate_schedule') == FLAGS.learning_rate_schedule
      != 'staircase'):
    fixed += ('max_steps',)  # The learning rate would jump.
  for name, value in run.items():
    if name in fixed and value != FLAGS[name].value:
      raise UserError(
          '%s was trained with --%s=%s, not %s: say so again, or name another '
          '--train_dir.' % (folder, name, value, FLAGS[name].value))


def adopt_run(folder):
  """Takes what is not said otherwise from the run in a folder."""
  _adopt({name: value for name, value in read_run(folder).items()
          if name in _ADOPTED_FLAGS})


def adopt_recipe():
  """Takes what is not said otherwise from --recipe."""
  # A program may have trained by another recipe before.
  original = {name: FLAGS[name].default
              for recipe in RECIPES.values() for name in recipe}
  _adopt({**original, **RECIPES[FLAGS.recipe]})


def _adopt(values):
  for name, value in values.items():
    if FLAGS[name].using_default_value:
      FLAGS[name].value = value


# Checkpoints.


def checkpoints(folder):
  """Returns the paths of the checkpoints in a folder, the oldest first.

  The files tell, not the file `checkpoint` that lists them: that may be lost,
  or behind them. An index comes last when TensorFlow writes a checkpoint, and
  goes first when it removes one.
  """
  names = os.listdir(folder) if os.path.isdir(folder) else []
  steps = [int(name[11:-6]) for name in names
           if re.fullmatch(r'model\.ckpt-\d+\.index', name)]
  return [os.path.join(folder, 'model.ckpt-%d' % step)
          for step in sorted(steps)]


def latest_checkpoint(folder):
  """Returns the newest undamaged checkpoint in a folder, or None."""
  for checkpoint in reversed(checkpoints(folder)):
    damage = _find_damage(checkpoint)
    if not damage:
      return checkpoint
    if checkpoint in checkpoints(folder):  # Else it was removed just now.
      say('%s is damaged and passed over: %s' % (checkpoint, damage),
          sys.stderr)
  return None


def _find_damage(checkpoint):
  """Returns what is wrong with a checkpoint, or None."""
  try:
    reader = tf.train.load_checkpoint(checkpoint)
    for name in reader.get_variable_to_shape_map():
      reader.get_tensor(name)  # Checks the CRC-32C of its bytes.
  except (tf.errors.PermissionDeniedError, tf.errors.ResourceExhaustedError):
    raise  # It need not be damaged.
  except Exception as error:  # An IndexError, for a file that was cut.
    return what_went_wrong(error)
  return None


def check_checkpoint(checkpoint, variables):
  """Finds out before a session does that a checkpoint is not of this network.

  Args:
    checkpoint: its path, without a suffix.
    variables: dict from a name in the checkpoint to the variable to restore.

  Raises:
    cifar10_input.UserError: it lacks a variable, or has another shape or type.
  """
  reader = tf.train.load_checkpoint(checkpoint)
  shapes = reader.get_variable_to_shape_map()
  dtypes = reader.get_variable_to_dtype_map()
  for name, variable in variables.items():
    there, here = shapes.get(name, 'missing'), variable.shape.as_list()
    if there == here:
      there, here = dtypes[name].name, variable.dtype.base_dtype.name
    if there != here:
      raise UserError(
          '%s does not fit the network: %s is %s there and %s here.'
          % (checkpoint, name, there, here))


# Errors that come from outside of the program.
_ENVIRONMENT_ERRORS = (
    OSError, tf.errors.NotFoundError, tf.errors.PermissionDeniedError,
    tf.errors.ResourceExhaustedError, tf.errors.DataLossError)


def run(main, takes_arguments=False):
  """Parses the flags, runs a script's `main(argv)` and exits with its result.

  What a user can mend is one line on stderr: exit code 2 for flags, 1 for all
  else. Ctrl-C gives 130, SIGTERM 143, and a terminal that is closed 129.
  """
  handle_signals(_interrupt)
  tf.flags.DEFINE_boolean('help', False, 'Show this.', short_name='h')
  try:
    try:
      argv = FLAGS(sys.argv)
    except ValueError as error:  # As for --norun_once=1.
      raise tf.flags.Error(error) from error
    if FLAGS.help:
      print(sys.modules['__main__'].__doc__)
      print('\n'.join(map(FLAGS.module_help, _modules())))
      sys.exit(0)
    if argv[1:] and not takes_arguments:
      raise tf.flags.Error('what is %r? Flags look like --name=value' % argv[1])
    _leave(main(argv))
  except tf.flags.Error as error:
    fail(2, str(error).replace('\n', '; ') + _allowed(error))
  except UserError as error:
    fail(1, error)
  except _ENVIRONMENT_ERRORS as error:
    fail(1, what_went_wrong(error))
  except KeyboardInterrupt as interruption:
    signum, = interruption.args
    fail(128 + signum, 'stopped by %s.' % signum.name)


def fail(code, message):
  """Ends the process with one line on stderr."""
  say('%s: %s' % (os.path.basename(sys.argv[0]), message), sys.stderr)
  _leave(code)


def _leave(code):
  if os.environ.get('TF_CONFIG'):  # A server would keep Python from its exit.
    sys.stdout.flush()
    os._exit(code or 0)
  sys.exit(code)


def handle_signals(handler):
  """Calls a handler at the first signal to end; a second ends the process."""
  def handle_once(signum, frame):
    signal.signal(signum, signal.SIG_DFL)
    handler(signal.Signals(signum))

  for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    # Who ignores SIGHUP, as nohup does, has a reason.
    if (signum != signal.SIGHUP
        or signal.getsignal(signum) != signal.SIG_IGN):
      signal.signal(signum, handle_once)


def _interrupt(signum):
  raise KeyboardInterrupt(signum)


def what_went_wrong(error):
  """Returns what an error says, without the stack of the operation."""
  message = getattr(error, 'message', None) or str(error) or repr(error)
  line = re.search(r'^(.*)\n\s*\[\[\{\{node', message, re.MULTILINE)
  return line[1] if line else message.splitlines()[0]


def _allowed(error):
  """Says which values a flag may have, where a parser's message does not."""
  match = re.search(r'flag --(\w+)=', str(error))
  if not match:
    return ''
  flag = FLAGS[match[1]]
  allowed = ('true or false' if flag.flag_type() == 'bool'
             else flag.parser.syntactic_help)
  return '' if allowed in str(error) else ' (allowed: %s)' % allowed
