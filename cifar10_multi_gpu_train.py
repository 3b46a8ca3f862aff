"""Train the CIFAR-10 network on several GPUs at once, or on several machines.

    python cifar10_multi_gpu_train.py --num_gpus=2

Each GPU has a tower: a copy of the network with its own batch of --batch_size
images. The variables are in the CPU's memory. In each step all towers compute
gradients of the same variables, which are averaged and applied once: two towers
of 64 images learn just as one batch of 128 does. With fewer GPUs than towers,
towers share them, or the CPU, so that you can try it everywhere.

Started on several machines, each with its place in a `TF_CONFIG`, the script is
a TensorFlow cluster; README.md has an example.
"""
import concurrent.futures
import json
import os
import signal
import sys
import threading
import time

import cifar10_input  # Before TensorFlow: it hides the start-up messages.
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_train
from cifar10_input import UserError

FLAGS = tf.flags.FLAGS


def train():
  """Trains on --num_gpus towers, here or in each task of a cluster."""
  task = read_cluster()
  if task:
    task.run()  # Ends the process.
  with cifar10_train.locked(FLAGS.train_dir) as train_dir:
    cifar10_train.run_training(train_dir, build_step, FLAGS.num_gpus)


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
    gpus = len(tf.config.list_physical_devices('GPU'))
    devices = [f'/gpu:{i % gpus}' if gpus else '/cpu:0'  # They may share one.
               for i in range(FLAGS.num_gpus)]
    cifar10_input.say(f'The towers are on {", ".join(devices)}.')
    tower_losses, tower_grads = [], []
    for i, device in enumerate(devices):
      # The first tower makes the variables; `reuse` gives them to the others.
      with tf.variable_scope(tf.get_variable_scope(), reuse=i > 0), \
          tf.device(device), \
          tf.name_scope(f'{cifar10.TOWER_NAME}_{i}') as scope:
        part = slice(i * recipe.batch_size, (i + 1) * recipe.batch_size)
        loss = tower_loss(scope, images[part], labels[part], recipe)
        tower_losses.append(tf.get_collection('losses', scope) + [loss])
        tower_grads.append(optimizer.compute_gradients(loss))
    losses = [_average(each, each[0].op.name.partition('/')[2])
              for each in zip(*tower_losses)]  # Named as without a tower.
    with tf.name_scope('train/'):
      gradients = average_gradients(tower_grads)
      update_op = apply_gradients(optimizer, gradients, global_step, recipe)
      train_op = tf.group(
          update_op, cifar10.observe(losses, gradients, rate), name='step')
  return train_op, losses[-1]


def tower_loss(scope, images, labels, recipe=None):
  """Returns the total loss of the tower with that name scope; see `loss`."""
  return cifar10.loss(cifar10.inference(images, recipe), labels, scope, recipe)


def average_gradients(tower_grads):
  """Averages each variable's gradient over all towers, once all have it.

  Takes a list of (gradient, variable) pairs for each tower, of the same
  variables. Returns one such list.
  """
  average_grads = []
  for grads_and_vars in zip(*tower_grads):
    gradients = [gradient for gradient, _ in grads_and_vars]
    _, variable = grads_and_vars[0]  # The towers share it.
    average_grads.append((
        None if all(gradient is None for gradient in gradients) else
        _average(gradients, variable.op.name + '/gradient'), variable))
  return average_grads


def _average(tensors, name):
  total = tf.add_n(tensors, name=name + '/sum')
  return tf.multiply(total, 1 / len(tensors), name=name)


# Many machines: a TensorFlow cluster.


def read_cluster():
  """Returns this task of the cluster in TF_CONFIG, or None without a ps."""
  try:
    config = json.loads(os.environ.get('TF_CONFIG') or '{}')
    if 'ps' not in config.get('cluster', {}):
      return None
    return Task(config['cluster'], config['task']['type'],
                int(config['task']['index']))
  except Exception as error:  # JSON can have any shape.
    raise UserError(f'TF_CONFIG cannot be used: {error!r}') from error


class Task(tf.train.SessionRunHook):
  """One task of a cluster.

  Parameter servers (ps) hold the variables. The chief and the workers compute,
  each on its own batches; the chief also initializes, saves and summarizes. If
  a task dies, start all again: they continue from the last checkpoint.
  """

  def __init__(self, jobs, job, index):
    self._jobs, self._job, self._index = jobs, job, index
    self._name = f'{job} {index} at {jobs[job][index]}'
    self._servers = [f'/job:ps/task:{i}' for i in range(len(jobs['ps']))]
    self._device = f'/job:{job}/task:{index}'
    self._worker = index + 1 if job == 'worker' else 0
    self._num_workers = len(jobs['chief'] + jobs.get('worker', []))
    # A session waits for all tasks that it can see, even for those that have
    # left: so it sees the servers only, and a server sees itself.
    self._config = tf.ConfigProto(
        device_filters=[self._device] + ['/job:ps'] * (job != 'ps'))
    # TensorFlow cannot fuse bfloat16 operations in a cluster.
    rewriting = self._config.graph_options.rewrite_options
    rewriting.remapping = rewriting.OFF
    self._give_tokens, self._meet = None, []
    self._train_dir = cifar10_train.full_path(FLAGS.train_dir)

  def run(self):
    """Does what the task is for, and ends the process."""
    act = {'ps': self._serve, 'chief': self._lead}.get(self._job, self._work)
    for signum in signal.SIGINT, signal.SIGTERM:  # A worker saves nothing.
      signal.signal(signum, signal.SIG_DFL)
    try:
      self._server = tf.train.Server(self._jobs, self._job, self._index)
      code = act()
    except SystemExit as end:
      code = end.code
    except (UserError, OSError, tf.errors.OpError) as error:
      code = 1
      print(f'{self._name}: {cifar10_train.first_line(error)}', file=sys.stderr)
    os._exit(code or 0)  # A running server blocks a normal exit.

  def _session(self, graph=None):
    return tf.Session(self._server.target, graph=graph, config=self._config)

  def _queue(self, name, server=0):
    """Returns a queue on a server. All tasks share it by its name."""
    with tf.device(self._servers[server]):
      return tf.FIFOQueue(100, [tf.int32], [[]], shared_name=name)

  def _serve(self):
    """Serves variables until the chief has ended.

    After a signal, the chief needs them to save once more: 15 seconds at most.
    """
    with cifar10_train.collecting_signals() as signals, tf.Graph().as_default():
      num_ends = self._queue('end', self._index).size()
      session, deadline = self._session(), float('inf')
      while not session.run(num_ends) and time.monotonic() < deadline:
        if signals:
          deadline = min(deadline, time.monotonic() + 15)
        time.sleep(0.2)
    return 128 + signals[0] if signals else 0

  def _lead(self):
    """Trains as the chief, in a thread; this thread looks for signals.

    A step may wait inside TensorFlow, where Python's handlers do not run.
    """
    # Hide that TensorFlow's summing thread fails when the session closes.
    threading.excepthook = lambda error: None
    self._wait_for_servers()  # Until then, a signal just ends the chief, too.
    with cifar10_train.locked(self._train_dir), \
        cifar10_train.collecting_signals() as signals:
      pool = concurrent.futures.ThreadPoolExecutor(3)
      training = pool.submit(self._train, signals)
      while not training.done() and not signals:
        concurrent.futures.wait([training], 0.2)
      if self._give_tokens and not training.done():
        # The step may wait for the token of a worker that has ended.
        session = self._session(self._give_tokens.graph)
        pool.submit(session.run, self._give_tokens)
      concurrent.futures.wait([training], 10)
      with tf.Graph().as_default():
        if not signals and not training.exception():
          # Workers still need the servers to see that the last step is done.
          done = self._queue('done').dequeue_many(self._num_workers - 1)
          concurrent.futures.wait([pool.submit(self._session().run, done)], 30)
        ends = [self._queue('end', i).enqueue(0)
                for i in range(len(self._servers))]
        concurrent.futures.wait([pool.submit(self._session().run, ends)], 5)
      return training.result() if training.done() else 128 + signals[0]

  def _work(self):
    self._train()
    with tf.Graph().as_default():
      self._session().run(self._queue('done').enqueue(0))

  def _wait_for_servers(self):
    """Waits until each server reaches all others.

    If a session failed at its start, TensorFlow would make another one, but the
    queue of tokens, which is on a server, would stay closed.
    """
    with tf.Graph().as_default():
      sizes = [self._queue('end', i).size() for i in range(len(self._servers))]
      sums = []
      for server in self._servers:
        with tf.device(server):
          sums.append(tf.add_n(sizes))
      while True:
        try:
          return self._session().run(sums)
        except tf.errors.OpError:
          time.sleep(0.5)

  def _train(self, signals=()):
    """Trains as the chief, or as a worker; a signal ends a worker at once."""
    self._hooks = [self]
    num_workers = self._num_workers if FLAGS.sync_replicas else 1
    device = tf.train.replica_device_setter(  # Variables go to the servers.
        worker_device=self._device, cluster=self._jobs)
    cifar10_train.run_training(
        self._train_dir, self._build_step, FLAGS.num_gpus * num_workers,
        signals, self._server.target, self._worker, device, self._hooks,
        self._config)

  def _build_step(self, dataset, recipe, global_step):
    """Builds a step; a worker first waits until the chief has a session.

    Before, variables have no values; TensorFlow looks again after 30 seconds.
    """
    others = self._num_workers - 1
    if self._worker == 0:
      self._meet = [self._queue('here').dequeue_many(others),
                    self._queue('begin').enqueue_many([[0] * others])]
    else:
      with tf.Graph().as_default(), self._session() as session:
        session.run(self._queue('here').enqueue(0))
        session.run(self._queue('begin').dequeue())
      cifar10_train.check_run(self._train_dir, dataset, recipe, exactly=True)
    if FLAGS.sync_replicas:
      return build_step(dataset, recipe, global_step, self._num_workers,
                        self._apply_together)
    return build_step(dataset, recipe, global_step)

  def after_create_session(self, session, coord):
    for operation in self._meet:
      session.run(operation)

  def _apply_together(self, optimizer, gradients, global_step, recipe):
    """Updates by a mean of gradients; then tokens let the workers go on."""
    optimizer = tf.train.SyncReplicasOptimizer(
        optimizer, self._num_workers, self._num_workers,
        cifar10.MovingAverages(recipe, global_step), tf.trainable_variables())
    update_op = optimizer.apply_gradients(gradients, global_step)
    self._hooks.append(optimizer.make_session_run_hook(self._worker == 0))
    self._give_tokens = optimizer.get_init_tokens_op(self._num_workers)
    return update_op


def define_flags():
  """Defines the flags of training on several devices."""
  cifar10_train.define_flags()
  if 'num_gpus' in FLAGS:
    return
  tf.flags.adopt_module_key_flags(cifar10_train)  # So that --help shows them.
  tf.flags.DEFINE_integer('num_gpus', 1, 'Number of towers, one on each GPU '
                          'if there are enough.', 1, 256)
  tf.flags.DEFINE_boolean(
      'sync_replicas', True, 'In a cluster: average the gradients of all '
      'workers in each step. Otherwise, each worker does its own steps.')


def main(argv=None):
  cifar10_train.parse_flags(argv, define_flags)
  train()


if __name__ == '__main__':
  cifar10_train.run_script(main, define_flags)
