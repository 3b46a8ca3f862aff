"""Train the CIFAR-10 network on several GPUs at once.

    python cifar10_multi_gpu_train.py --num_gpus=2

Each GPU has a tower: a copy of the network with a batch of its own, of
--batch_size images. The variables are in the CPU's memory. In each step all
towers compute gradients of the same variables, which are averaged and applied
once: two towers of 64 images learn just as one batch of 128 does.

Where there are fewer GPUs than asked for, towers share them, and without any
they share the CPU: nothing is won then, but everything can be tried out.
"""
import cifar10
import cifar10_train
from cifar10_input import tf

FLAGS = tf.flags.FLAGS

tf.flags.DEFINE_integer(
    'num_gpus', 1, 'How many towers, each on a GPU of its own if there is one.',
    lower_bound=1, upper_bound=256)


def train():
  """Trains on --num_gpus towers. Returns the exit code."""
  cifar10.adopt_recipe()
  return cifar10_train.run_training(
      build_step, FLAGS.batch_size * FLAGS.num_gpus)


def build_step(dataset, global_step, replicas=cifar10.ALONE):
  """Builds one step of training on all towers; see `cifar10_train`."""
  examples = FLAGS.batch_size * FLAGS.num_gpus
  # Whatever is not a tower's is on the CPU, in reach of all towers.
  with tf.device('/cpu:0'):
    images, labels = cifar10.distorted_inputs(dataset, examples)
    optimizer = cifar10.make_optimizer(
        global_step, examples * replicas.aggregated, dataset)
    tower_losses, tower_grads = [], []
    for i, device in enumerate(tower_devices(FLAGS.num_gpus)):
      mine = slice(i * FLAGS.batch_size, (i + 1) * FLAGS.batch_size)
      with tf.variable_scope(tf.get_variable_scope(), reuse=i > 0), \
          tf.device(device), \
          tf.name_scope('%s_%d' % (cifar10.TOWER_NAME, i)) as scope:
        loss = tower_loss(
            scope, images[mine], labels[mine], len(dataset.classes))
        tower_losses.append(tf.get_collection('losses', scope) + [loss])
        tower_grads.append(optimizer.compute_gradients(loss))
    losses = average_losses(tower_losses)
    total_loss = losses[-1]
    with tf.name_scope('train'):
      train_op = cifar10.apply_gradients(
          optimizer, average_gradients(tower_grads), global_step, losses,
          replicas)
  return train_op, total_loss


def tower_devices(num_towers):
  """Returns the device of each tower, and prints them."""
  gpus = tf.config.list_physical_devices('GPU')
  devices = ['/gpu:%d' % (i % len(gpus)) if gpus else '/cpu:0'
             for i in range(num_towers)]
  if len(gpus) < num_towers:
    print('There are %d GPUs for --num_gpus=%d: the towers share what there is.'
          % (len(gpus), num_towers))
  for i, device in enumerate(devices):
    print('%s_%d is on %s.' % (cifar10.TOWER_NAME, i, device))
  return devices


def tower_loss(scope, images, labels, num_classes=cifar10.NUM_CLASSES):
  """Builds the network and the loss of one tower.

  Args:
    scope: the tower's name scope, such as 'tower_0/'.
    images: float32 [batch, height, width, 3].
    labels: int32 [batch].
    num_classes: int.

  Returns:
    Scalar float32: the total loss over the tower's batch.
  """
  logits = cifar10.inference(images, num_classes)
  return cifar10.loss(logits, labels, scope)


def average_losses(tower_losses):
  """Averages each loss over all towers.

  Args:
    tower_losses: for each tower a list of scalars, the same losses in each.

  Returns:
    A list of scalars, named as the losses are without their tower.
  """
  return [_average(losses, cifar10.without_tower(losses[0].op.name))
          for losses in zip(*tower_losses)]


def average_gradients(tower_grads):
  """Averages each variable's gradient over all towers; they wait here.

  Args:
    tower_grads: for each tower a list of (gradient, variable) pairs, the same
      variables in each.

  Returns:
    A list of (gradient, variable) pairs.
  """
  average_grads = []
  for grads_and_vars in zip(*tower_grads):
    gradients, (variable, *_) = zip(*grads_and_vars)
    gradient = _average(gradients, variable.op.name + '/gradient')
    average_grads.append((gradient, variable))
  return average_grads


def _average(tensors, name):
  return tf.multiply(tf.add_n(tensors), 1 / len(tensors), name=name)


def main(argv=None):
  return train()


if __name__ == '__main__':
  cifar10.run(main)
