"""Train the CIFAR-10 network on several GPUs at once, or on several machines.

    python cifar10_multi_gpu_train.py --num_gpus=2

Each GPU has a tower: a copy of the network with its own batch of --batch_size
images. The variables are in the CPU's memory. In each step all towers compute
gradients of the same variables, which are averaged and applied once: two towers
of 64 images learn just as one batch of 128 does. With fewer GPUs than towers,
towers share them, or the CPU: that saves no time, but can be tried everywhere.

Started on several machines, each with its place in a `TF_CONFIG`, the script is
a TensorFlow cluster; README.md has an example.
"""
import cifar10_input  # Before TensorFlow: it hides the start-up messages.
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_train

FLAGS = tf.flags.FLAGS


def train():
  """Trains on --num_gpus towers."""
  with cifar10_train.locked(FLAGS.train_dir) as train_dir:
    cifar10_train.run_training(train_dir, build_step, FLAGS.num_gpus)


# Towers.


def build_step(dataset, recipe, global_step, num_workers=1,
               apply_gradients=cifar10.apply_gradients):
  """Builds one step of training on all towers; see `cifar10_train.build_step`.

  In a cluster, num_workers share a step, and apply_gradients differs.
  """
  examples = recipe.batch_size * FLAGS.num_gpus
  # Everything outside the towers runs on the CPU, which all towers can reach.
  with tf.device('/cpu:0'):
    images, labels = cifar10_train.training_batches(dataset, recipe, examples)
    with tf.name_scope('train'):
      rate = cifar10.learning_rate(global_step, recipe, examples * num_workers)
      optimizer = cifar10.make_optimizer(rate, recipe)
    tower_losses, tower_grads = [], []
    for i, device in enumerate(tower_devices(FLAGS.num_gpus)):
      # The first tower makes the variables; with `reuse`, the others get them.
      with tf.variable_scope(tf.get_variable_scope(), reuse=i > 0), \
          tf.device(device), \
          tf.name_scope(f'{cifar10.TOWER_NAME}_{i}') as scope:
        part = slice(i * recipe.batch_size, (i + 1) * recipe.batch_size)
        loss = tower_loss(scope, images[part], labels[part], recipe)
        tower_losses.append(tf.get_collection('losses', scope) + [loss])
        tower_grads.append(optimizer.compute_gradients(loss))
    losses = average_losses(tower_losses)
    with tf.name_scope('train/'):
      gradients = average_gradients(tower_grads)
      update_op = apply_gradients(optimizer, gradients, global_step, recipe)
      train_op = tf.group(
          update_op, cifar10.observe(losses, gradients, rate), name='step')
  return train_op, losses[-1]


def tower_devices(num_towers):
  """Returns the device of each tower, and prints them. Towers may share one."""
  gpus = len(tf.config.list_physical_devices('GPU'))
  devices = [f'/gpu:{i % gpus}' if gpus else '/cpu:0'
             for i in range(num_towers)]
  cifar10_input.say(f'The towers are on {", ".join(devices)}.')
  return devices


def tower_loss(scope, images, labels, recipe=None):
  """Returns the total loss of the tower with that name scope, see `loss`."""
  return cifar10.loss(cifar10.inference(images, recipe), labels, scope, recipe)


def average_losses(tower_losses):
  """Averages each loss over all towers, which have a list of scalars each."""
  return [_average(losses, losses[0].op.name.partition('/')[2])
          for losses in zip(*tower_losses)]  # Named as without a tower.


def average_gradients(tower_grads):
  """Averages each variable's gradient over all towers, which wait here.

  Takes a list of (gradient, variable) pairs for each tower, of the same
  variables. Returns one such list.
  """
  average_grads = []
  for grads_and_vars in zip(*tower_grads):
    gradients = [gradient for gradient, _ in grads_and_vars]
    _, variable = grads_and_vars[0]  # The towers share it.
    average_grads.append((
        _average(gradients, variable.op.name + '/gradient'), variable))
  return average_grads


def _average(tensors, name):
  total = tf.add_n(tensors, name=name + '/sum')
  return tf.multiply(total, 1 / len(tensors), name=name)


def define_flags():
  """Defines the flags of training on several devices."""
  cifar10_train.define_flags()
  if 'num_gpus' in FLAGS:
    return
  tf.flags.adopt_module_key_flags(cifar10_train)  # So that --help shows them.
  tf.flags.DEFINE_integer('num_gpus', 1, 'How many towers, each on another GPU '
                          'if there are enough.', 1, 256)


def main(argv=None):
  cifar10_train.parse_flags(argv, define_flags)
  train()


if __name__ == '__main__':
  cifar10_train.run_script(main, define_flags)
