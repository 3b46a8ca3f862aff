"""How fast a training step is beside PyTorch, JAX and Keras.

    pip install torch jax                 # What is missing is left out.
    python tests/benchmarks/peers.py      # about half an hour

A step of the tutorial's network on 128 images of 24x24 pixels: the same layers,
weight decay and gradient descent, each as the library's own users would write
it: with its own normalization, if there is one, and its own order of
dimensions. All variants train on one constant batch, give the loss of each step
to Python, and use the GPU or, without one, as many threads as the library does
by default. Plain and ours also move the averages of all variables and losses,
as the tutorial does; the peers do not. Two more variants of PyTorch have our
normalization's forward pass, which takes less time than its own.

As in train_speed.py, each figure comes from another process, and the variants
take turns. Each process starts from the same weights, and its first losses must
be those of plain in float32. Prints a table; writes results/peers.json and a
picture, peers.png.
"""
import argparse
import functools
import importlib.util
from importlib import metadata
import json
import os
import shutil
import statistics
import sys
import tempfile
import time

import numpy as np

import train_speed

# A name, after which comes what is true of the variant.
VARIANTS = [
    'plain', 'ours', 'keras', 'keras xla', 'jax', 'torch',
    'torch channels_last', 'torch compiled', 'torch compiled channels_last',
    'torch channels_last our_normalization',
    'torch compiled channels_last our_normalization']
# How far losses may be from those of plain in float32, as a fraction. A GPU
# rounds the factors of float32 products to TF32's 11 bits.
TOLERANCES = {'float32': 2e-3 if train_speed.gpus() else 1e-5, 'bfloat16': 2e-2}
CHECKED_STEPS = 3  # The first loss shows the layers, the next two the updates.
WEIGHT_DECAY = 0.004
LEARNING_RATE = 0.1


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=train_speed.TIMED_STEPS)
  parser.add_argument('--worker', help='JSON; used by the benchmark itself')
  args = parser.parse_args()
  if args.worker:
    work(**json.loads(args.worker))
    return
  results = {'machine': train_speed.machine()}
  results['machine']['versions'].update(
      {library: metadata.version(library) for library in ('jax', 'torch')
       if importlib.util.find_spec(library)})
  with tempfile.TemporaryDirectory() as folder:
    os.environ['TORCHINDUCTOR_CACHE_DIR'] = folder  # Nothing is compiled yet.
    path = os.path.join(folder, 'weights.npz')
    write_weights(path)
    results['steps'] = take_turns(args.rounds, args.steps, path)
  path = os.path.join(train_speed.HERE, 'results', 'peers')
  with open(path + '.json', 'w') as f:
    json.dump(results, f, indent=1)
  print_table(results)
  draw(results, path + '.png')


def write_weights(path):
  """Writes weights, under the names of the tutorial, and a batch of noise.

  With the tutorial's own standard deviations, all logits are nearly zero, and
  the loss would hardly show a layer that is wrong.
  """
  random = np.random.default_rng(1)
  arrays = {'images': random.standard_normal([128, 24, 24, 3]),
            'labels': random.integers(0, 10, [128])}
  for layer, shape, stddev in [
      ('conv1', [5, 5, 3, 64], 0.5), ('conv2', [5, 5, 64, 64], 0.02),
      ('local3', [2304, 384], 0.01), ('local4', [384, 192], 0.03),
      ('softmax_linear', [192, 10], 0.04)]:
    arrays[layer + '/weights'] = random.normal(0, stddev, shape)
    arrays[layer + '/biases'] = random.normal(0, 0.1, shape[-1:])
  np.savez(path, **{
      name: array.astype('int32' if name == 'labels' else 'float32')
      for name, array in arrays.items()})


# The process that measures one variant.


def work(variant, dtype, path, steps):
  """Trains a few steps of a variant, and prints a dict of figures."""
  name, *options = variant.split()
  build = {'keras': build_keras, 'jax': build_jax, 'torch': build_torch}.get(
      name, functools.partial(build_tensorflow, suite=name))
  with np.load(path) as arrays:
    weights = dict(arrays)
  step = build(weights, weights.pop('images'), weights.pop('labels'), dtype,
               **dict.fromkeys(options, True))
  losses = [step()]
  figures = {'first_step_secs': time.time() - train_speed.START}
  losses += [step() for _ in range(train_speed.WARM_UP_STEPS)]
  step_ms = []
  for _ in range(steps):
    start = time.perf_counter()
    step()
    step_ms.append((time.perf_counter() - start) * 1e3)
  print(json.dumps({**figures, 'ms': statistics.median(step_ms),
                    'losses': losses[:CHECKED_STEPS]}), flush=True)


# Each library gets the weights in the order of the layers, float32, images and
# labels. It returns a function that trains a step and returns the loss.


def build_tensorflow(weights, images, labels, dtype, suite):
  import cifar10_input  # Before TensorFlow: it hides the start-up messages.
  import tensorflow.compat.v1 as tf
  batch = [
      tf.identity(tf.get_variable(name, initializer=value, trainable=False))
      for name, value in [('images', images), ('labels', labels)]]
  build = getattr(train_speed, 'build_' + suite)
  train_op, loss = build(
      tf, suite, dtype, batch, data_dir='', batch_size=len(images), towers=1)
  session = tf.Session()
  session.run(tf.global_variables_initializer())
  for variable in tf.trainable_variables():
    variable.load(weights[variable.op.name], session)
  return lambda: float(session.run([loss, train_op])[0])


def build_keras(weights, images, labels, dtype, xla=False):
  os.environ['KERAS_BACKEND'] = 'tensorflow'
  import cifar10_input  # Before TensorFlow: it hides the start-up messages.
  import keras
  from keras import layers
  import tensorflow as tf
  tf.compat.v1.enable_eager_execution()  # Which cifar10_input disables.
  if dtype == 'bfloat16':
    keras.config.set_dtype_policy('mixed_bfloat16')

  def normalize(values):  # On CPUs, TensorFlow has no kernel for bfloat16.
    return tf.cast(tf.nn.local_response_normalization(
        tf.cast(values, tf.float32), depth_radius=4, bias=1.0,
        alpha=0.001 / 9, beta=0.75), values.dtype)

  decay = keras.regularizers.L2(WEIGHT_DECAY / 2)
  model = keras.Sequential([
      keras.Input(images.shape[1:]),
      layers.Conv2D(64, 5, padding='same', activation='relu'),
      layers.MaxPooling2D(3, 2, padding='same'),
      layers.Lambda(normalize),
      layers.Conv2D(64, 5, padding='same', activation='relu'),
      layers.Lambda(normalize),
      layers.MaxPooling2D(3, 2, padding='same'),
      layers.Flatten(),
      layers.Dense(384, activation='relu', kernel_regularizer=decay),
      layers.Dense(192, activation='relu', kernel_regularizer=decay),
      layers.Dense(10),
      layers.Activation('linear', dtype='float32')])
  model.set_weights(list(weights.values()))
  model.compile(
      keras.optimizers.SGD(LEARNING_RATE), jit_compile=xla,
      loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
  images, labels = tf.constant(images), tf.constant(labels)

  def step():
    model.reset_metrics()  # Or the loss would be the mean of all steps.
    return float(model.train_on_batch(images, labels))

  return step


def build_jax(weights, images, labels, dtype):
  import jax
  from jax import lax, numpy as jnp

  def convolve(values, kernel, biases):
    return jax.nn.relu(lax.conv_general_dilated(
        values, kernel.astype(dtype), (1, 1), 'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC')) + biases.astype(dtype))

  def pool(values):
    return lax.reduce_window(
        values, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), 'SAME')

  def normalize(values):
    x = values.astype(jnp.float32)
    squares = lax.reduce_window(
        x * x, 0.0, lax.add, (1, 1, 1, 9), (1, 1, 1, 1), 'SAME')
    return (x * (1 + 0.001 / 9 * squares) ** -0.75).astype(dtype)

  def affine(values, weights, biases):
    return values @ weights.astype(dtype) + biases.astype(dtype)

  def compute_loss(layers):
    conv1, conv2, local3, local4, softmax_linear = layers
    values = normalize(pool(convolve(images.astype(dtype), *conv1)))
    values = pool(normalize(convolve(values, *conv2)))
    values = jax.nn.relu(affine(values.reshape(len(values), -1), *local3))
    values = jax.nn.relu(affine(values, *local4))
    logits = affine(values, *softmax_linear).astype(jnp.float32)
    cross_entropies = -jax.nn.log_softmax(logits)[jnp.arange(128), labels]
    decay = WEIGHT_DECAY / 2 * (
        jnp.sum(local3[0] ** 2) + jnp.sum(local4[0] ** 2))
    return cross_entropies.mean() + decay

  @functools.partial(jax.jit, donate_argnums=0)
  def train(layers):
    loss, gradients = jax.value_and_grad(compute_loss)(layers)
    return jax.tree.map(
        lambda value, gradient: value - LEARNING_RATE * gradient,
        layers, gradients), loss

  values = [jnp.asarray(value) for value in weights.values()]
  layers = list(zip(values[::2], values[1::2]))
  images, labels = jnp.asarray(images), jnp.asarray(labels)

  def step():
    nonlocal layers
    layers, loss = train(layers)
    return float(loss)

  return step


def build_torch(weights, images, labels, dtype, compiled=False,
                channels_last=False, our_normalization=False):
  import torch
  from torch.nn import functional as F

  device = 'cuda' if torch.cuda.is_available() else 'cpu'

  # Its images are [batch, channels, height, width], in any order in memory; its
  # weights are [outputs, inputs, ...].
  def place(array):
    tensor = torch.from_numpy(array).contiguous().to(device)
    return (tensor.contiguous(memory_format=torch.channels_last)
            if channels_last and tensor.ndim == 4 else tensor)

  weights['local3/weights'] = np.moveaxis(
      weights['local3/weights'].reshape(6, 6, 64, 384), 2, 0).reshape(2304, 384)
  parameters = [
      place(value.transpose({1: [0], 2: [1, 0], 4: [3, 2, 0, 1]}[value.ndim]))
      .requires_grad_() for value in weights.values()]
  conv1, conv2, local3, local4, softmax_linear = zip(
      parameters[::2], parameters[1::2])
  decayed = [local3[0], local4[0]]
  optimizer = torch.optim.SGD([
      {'params': decayed, 'weight_decay': WEIGHT_DECAY},
      {'params': [*conv1, *conv2, local3[1], local4[1], *softmax_linear]},
  ], lr=LEARNING_RATE, fused=True)
  images, labels = place(images.transpose(0, 3, 1, 2)), place(labels).long()
  band = place((np.abs(np.subtract.outer(np.arange(64), np.arange(64))) <= 4)
               [:, :, None, None] * np.float32(0.001 / 9))

  def normalize(values):
    if not our_normalization:  # PyTorch divides alpha by the size.
      return F.local_response_norm(values, 9, alpha=0.001, beta=0.75, k=1.0)
    with torch.autocast(device, enabled=False):
      x = values.float()
      root = torch.rsqrt(1 + F.conv2d(x * x, band))
      return (x * root * root.sqrt()).to(values.dtype)

  def pool(values):
    return F.max_pool2d(values, 3, stride=2, ceil_mode=True)

  def inference(images):
    values = normalize(pool(F.relu(F.conv2d(images, *conv1, padding=2))))
    values = pool(normalize(F.relu(F.conv2d(values, *conv2, padding=2))))
    values = F.relu(F.linear(values.flatten(1), *local3))
    return F.linear(F.relu(F.linear(values, *local4)), *softmax_linear)

  if compiled:
    inference = torch.compile(inference)

  def step():
    optimizer.zero_grad()
    with torch.autocast(device, torch.bfloat16, dtype == 'bfloat16'):
      logits = inference(images)
    loss = F.cross_entropy(logits.float(), labels)
    loss.backward()
    with torch.no_grad():  # Of the loss; the optimizer has its gradient.
      decay = WEIGHT_DECAY / 2 * sum(value.square().sum() for value in decayed)
    optimizer.step()
    return float(loss.detach() + decay)

  return step


# The process that compares.


def take_turns(rounds, steps, path):
  """Returns for each variant and dtype a list of figures, one a round."""
  variants = [variant for variant in VARIANTS if is_possible(variant)]
  figures = {f'{variant} {dtype}': []
             for dtype in TOLERANCES for variant in variants}
  for i in range(rounds):
    for key, each in figures.items():
      variant, dtype = key.rsplit(maxsplit=1)
      figure = train_speed.run_worker(
          __file__, variant=variant, dtype=dtype, path=path, steps=steps)
      each.append(figure)
      expected = figures['plain float32'][0]['losses']
      figure['error'] = max(abs(loss / other - 1) for loss, other in zip(
          figure['losses'], expected))
      print(f'round {i + 1} of {rounds}: {key:56} {figure["ms"]:7.1f} ms',
            flush=True)
      if not figure['error'] <= TOLERANCES[dtype]:
        sys.exit(f'Its losses are {figure["losses"]} and should be {expected}.')
  return figures


def is_possible(variant):
  """Returns whether a variant has what it needs; prints what is missing."""
  library = variant.split()[0]
  missing = None
  if library in ('jax', 'torch') and not importlib.util.find_spec(library):
    missing = library
  elif 'compiled' in variant and not shutil.which(os.getenv('CXX', 'g++')):
    missing = 'a C++ compiler'
  if missing:
    print(f'left out: {variant}, which needs {missing}')
  return not missing


def print_table(results):
  print(f'\n{json.dumps(results["machine"])}')
  print(f'\n{"a step of 128 images":56} {"ms":>7} {"min to max":>15} '
        f'{"ours/":>6} {"min to max":>13} {"first step":>10} {"error":>7}')
  for key, figures in results['steps'].items():
    ms = [figure['ms'] for figure in figures]
    middle, low, high = train_speed.ratio(
        results['steps'], 'ours ' + key.split()[-1], key)
    error = max(figure['error'] for figure in figures)
    print(f'{key:56} {statistics.median(ms):7.1f} {min(ms):7.1f} '
          f'{max(ms):7.1f} {middle:6.2f} {low:6.2f} {high:6.2f} '
          f'{figures[0]["first_step_secs"]:8.1f} s {error:7.0e}')


def draw(results, path):
  ms = {key.replace('_', ' '): train_speed.median(figures, 'ms')
        for key, figures in results['steps'].items()}
  train_speed.draw_bars(ms, [
      '#e07a1f' if name.startswith('ours') else
      '#9db4c0' if name.endswith('float32') else '#5c6b73' for name in ms],
                        results['machine'], path)


if __name__ == '__main__':
  main()
