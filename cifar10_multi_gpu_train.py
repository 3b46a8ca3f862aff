"""Train the CIFAR-10 network on several GPUs at once, or on several machines.

    python cifar10_multi_gpu_train.py --num_gpus=2

Each GPU has a tower: a copy of the network with a batch of its own, of
--batch_size images. The variables are in the CPU's memory. In each step all
towers compute gradients of the same variables, which are averaged and applied
once: two towers of 64 images learn just as one batch of 128 does.

Where there are fewer GPUs than asked for, towers share them, and without any
they share the CPU: that saves no time, but everything can be tried out.

Started on several machines, each with its place in a `TF_CONFIG`, the script is
a TensorFlow cluster; README.md has an example.
"""
import contextlib
import functools
import math
import os
import re
import select
import signal
import socket
import threading
import time

import cifar10_input  # Before TensorFlow, whose start-up chatter it hides.
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_train
from cifar10_input import UserError, say, what_went_wrong

flags = tf.flags
FLAGS = flags.FLAGS


def train():
  """Trains on --num_gpus towers of each machine. Returns the exit code."""
  jobs, *task = cifar10_train.read_cluster()
  if jobs:
    check_cluster(jobs, *task)
    return Cluster(jobs, *task).run()
  return cifar10_train.run_training(
      build_step, FLAGS.batch_size * FLAGS.num_gpus)


# Towers.


def build_step(dataset, recipe, global_step,
               apply_gradients=cifar10.apply_gradients):
  """Builds one step of training on all towers; see `cifar10_train.build_step`.

  `apply_gradients` updates the variables, as `cifar10.apply_gradients` does.
  """
  # Whatever is not a tower's is on the CPU, in reach of all towers.
  with tf.device('/cpu:0'):
    images, labels = cifar10_train.distorted_inputs(
        dataset, FLAGS.batch_size * FLAGS.num_gpus)
    with tf.name_scope('train'):
      rate = cifar10.learning_rate(global_step, recipe)
      optimizer = cifar10.make_optimizer(rate, recipe)
    tower_losses, tower_grads = [], []
    for i, device in enumerate(tower_devices(FLAGS.num_gpus)):
      # The first tower makes the variables, the others take the same.
      with tf.variable_scope(tf.get_variable_scope(), reuse=i > 0), \
          tf.device(device), \
          tf.name_scope('%s_%d' % (cifar10.TOWER_NAME, i)) as scope:
        part = slice(i * FLAGS.batch_size, (i + 1) * FLAGS.batch_size)
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
  """Returns the device of each tower, and prints them."""
  gpus = tf.config.list_physical_devices('GPU')
  devices = ['/gpu:%d' % (i % len(gpus)) if gpus else '/cpu:0'
             for i in range(num_towers)]
  if len(gpus) < num_towers > 1:
    say('There are %d GPUs for --num_gpus=%d: the towers share what there is.'
        % (len(gpus), num_towers))
  for i, device in enumerate(devices):
    say('%s_%d is on %s.' % (cifar10.TOWER_NAME, i, device))
  return devices


def tower_loss(scope, images, labels, recipe=None):
  """Builds the network and the loss of one tower.

  Args:
    scope: the tower's name scope, such as 'tower_0/'.
    images: float32 [batch, height, width, 3].
    labels: int32 [batch].
    recipe: the `cifar10.Recipe`.

  Returns:
    Scalar float32: the total loss over the tower's batch.
  """
  return cifar10.loss(cifar10.inference(images, recipe), labels, scope, recipe)


def average_losses(tower_losses):
  """Averages each loss over all towers, which have a list of scalars each.

  Each average has the name of its losses, without their tower.
  """
  return [
      _average(losses, re.sub(
          '^%s_[0-9]+/' % cifar10.TOWER_NAME, '', losses[0].op.name))
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
    gradients = [gradient for gradient, _ in grads_and_vars]
    _, variable = grads_and_vars[0]  # The towers share it.
    gradient = _average(gradients, variable.op.name + '/gradient')
    average_grads.append((gradient, variable))
  return average_grads


def _average(tensors, name):
  total = tf.add_n(tensors, name=name + '/sum')
  return tf.multiply(total, 1 / len(tensors), name=name)


# Many machines: a TensorFlow cluster.

_TIMEOUT_SECS = 600  # How long to wait for a task that is not there.


def check_cluster(jobs, job, index):
  """Raises a UserError that says why no cluster can train with a TF_CONFIG."""
  for name, addresses in jobs.items():
    if name not in ('chief', 'master', 'worker', 'ps'):
      raise UserError('TF_CONFIG has a job in its cluster that is none of '
                      f'chief, master, worker, ps, evaluator: {name}.')
    for address in addresses:
      if not re.fullmatch(r'[^\s/]+:\d{1,5}', address) or int(
          address.rpartition(':')[2]) > 65535:
        raise UserError(
            'TF_CONFIG has an address that is not HOST:PORT: %s.' % address)
  chiefs = len(jobs.get('chief', [])) + len(jobs.get('master', []))
  if chiefs != 1:
    raise UserError(
        'TF_CONFIG has %d tasks chief or master, not one.' % chiefs)
  if not jobs.get('ps'):
    raise UserError('TF_CONFIG has no ps in its cluster.')
  if job not in jobs:
    raise UserError('TF_CONFIG has the task type %s, which is not in its '
                    'cluster: %s.' % (job, ', '.join(jobs)))
  if not 0 <= index < len(jobs[job]):
    raise UserError('TF_CONFIG has the task index %d, but its cluster only %d '
                    'of %s.' % (index, len(jobs[job]), job))


class Cluster(cifar10_train.Task):
  """One task of a cluster, and what it knows of the others.

  Parameter servers (ps) hold the variables. The chief and the workers compute,
  each on batches of its own; the chief also initializes, saves and summarizes.
  The workers' graphs differ in the names of devices only. A thread watches
  whether those tasks are there without which this one cannot go on.

  Args:
    jobs: dict from each job to the addresses of its tasks.
    job, index: which of the tasks this process is.
  """

  def __init__(self, jobs, job, index):
    self._jobs, self._task = jobs, (job, index)
    self._servers = [('ps', i) for i in range(len(jobs['ps']))]
    chief = 'chief' if jobs.get('chief') else 'master'
    self._workers = [(chief, 0)] + [
        ('worker', i) for i in range(len(jobs.get('worker', [])))]
    spec = tf.train.ClusterSpec(jobs)
    device = '/job:%s/task:%d' % self._task
    self._server = self._start_server(spec)
    self._hook = ReplicaHook(self)
    super().__init__(
        # A ps is no worker, and so not the chief.
        worker=self._workers.index(self._task) if job != 'ps' else -1,
        num_workers=len(self._workers) if FLAGS.sync_replicas else 1,
        target=self._server.target,
        device=tf.train.replica_device_setter(
            worker_device=device, cluster=spec),
        hooks=(self._hook,),
        config=tf.ConfigProto(device_filters=['/job:ps', device]))
    # To fuse bfloat16 operations fails in a cluster.
    rewriting = self.config.graph_options.rewrite_options
    rewriting.remapping = rewriting.OFF
    self.error = None  # What the thread has found.
    self._missing = {}  # Tasks that are not there, and since when.
    self._ended = False

  def _start_server(self, spec):
    try:
      with socket.socket() as port:  # TensorFlow would not say which it is.
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind(('', int(self._address(self._task).rpartition(':')[2])))
      return tf.train.Server(spec, *self._task)
    except (OSError, tf.errors.OpError) as error:
      raise UserError('TF_CONFIG: %s cannot listen: %s.' % (
          self._name(self._task), what_went_wrong(error))) from error

  def _address(self, task):
    job, index = task
    return self._jobs[job][index]

  def _name(self, task):
    return '%s %d at %s' % (*task, self._address(task))

  def run(self):
    """Does what this task is there for. Returns the exit code."""
    self._signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    threading.Thread(target=self._watch, daemon=True).start()
    if self._task in self._servers:
      return self._serve()
    code = cifar10_train.run_training(
        functools.partial(build_step, apply_gradients=self.apply_gradients),
        FLAGS.batch_size * FLAGS.num_gpus, self)
    self._ended = True
    if code == 0:
      self._say_done()
    return code

  def apply_gradients(self, optimizer, gradients, global_step, recipe):
    """As `cifar10.apply_gradients`; together with the other workers."""
    if not FLAGS.sync_replicas:
      # The averages need not travel to a worker and back.
      with tf.device(global_step.device):
        return cifar10.apply_gradients(
            optimizer, gradients, global_step, recipe)
    self._hook.optimizer = tf.train.SyncReplicasOptimizer(
        optimizer, self.num_workers, self.num_workers,
        variable_averages=cifar10.variable_averages(global_step, recipe),
        variables_to_average=tf.trainable_variables())
    return self._hook.optimizer.apply_gradients(gradients, global_step)

  def wait(self):
    """Waits until a session can begin."""
    while not all(map(self._is_there, self._servers)):
      self.check()
      time.sleep(0.2)
    if self.is_chief:
      return
    uninitialized = tf.report_uninitialized_variables(tf.global_variables())
    with self._session() as session:  # TensorFlow would look every 30 s.
      while session.run(uninitialized).size:
        self.check()
        time.sleep(0.2)

  def check(self):
    """Raises what the thread has found."""
    if self.error:
      raise self.error

  def _session(self):
    return tf.Session(self.target, config=self.config)

  def _is_there(self, task):
    host, _, port = self._address(task).rpartition(':')
    with contextlib.suppress(OSError):
      socket.create_connection((host.strip('[]'), int(port)), 2).close()
      return True
    return False

  # What a parameter server does, until all workers have told it that they are
  # done. (TensorFlow's own `Server.join` never returns.)

  def _serve(self):
    say('%s serves variables.' % self._name(self._task))
    done, deadline = set(), math.inf
    with tf.Graph().as_default(), self._session() as session:
      queue = self._done_queue(self._task)
      arrivals = queue.dequeue_many(queue.size())
      while len(done) < len(self._workers) and time.time() < deadline:
        self.check()
        done.update(session.run(arrivals))
        if 0 in done:  # A worker that was killed will not come any more.
          deadline = min(deadline, time.time() + 5)
        time.sleep(0.1)
    return 0

  def _say_done(self):
    for server in filter(self._is_there, self._servers):
      with contextlib.suppress(tf.errors.OpError), tf.Graph().as_default(), \
          self._session() as session:
        session.run(self._done_queue(server).enqueue(self.worker),
                    options=tf.RunOptions(timeout_in_ms=5000))

  def _done_queue(self, server):
    with tf.device('/job:%s/task:%d' % server):
      return tf.FIFOQueue(len(self._workers), tf.int32, [], shared_name='done')

  # What the thread does.

  def _watch(self):
    code, deadline = 1, math.inf
    while not self._ended:
      if select.select([self._signals], [], [], 1)[0]:
        code = 128 + os.read(self._signals, 1)[0]
      if (self.error or code > 1) and deadline == math.inf:
        deadline = time.time() + 15
        self._hook.wake_all()  # The main thread may be waiting for others.
      if time.time() > deadline:
        cifar10_train.fail(code, self.error or 'stopped by a signal.')
      self._look_around()
      if self._hook.idle_secs() > 10 and self.is_chief and not self._missing:
        self._hook.wake_all()  # A worker that was killed had the last token.

  def _look_around(self):
    """Notes which tasks are missing, and says so."""
    waited_for = self._waited_for()
    self._missing = {task: since for task, since in self._missing.items()
                     if task in waited_for and not self._is_there(task)}
    for task in waited_for:
      if task not in self._missing and not self._is_there(task):
        self._missing[task] = time.time()
        say('Waiting for %s.' % self._name(task))
    for task, since in self._missing.items():
      secs = time.time() - since
      if task in self._servers and self._hook.session and secs > 3:
        cifar10_train.fail(1, '%s is gone, and the variables with it: start '
                           'all tasks again.' % self._name(task))
      if secs > _TIMEOUT_SECS and not self.error:
        self.error = UserError('%s did not come in %d seconds.'
                               % (self._name(task), _TIMEOUT_SECS))

  def _waited_for(self):
    """Returns the tasks without which this one cannot go on."""
    if self._task in self._servers:
      return self._workers[:1]
    if self._hook.idle_secs() < 3:
      return self._servers
    if not self.is_chief:
      return self._servers + self._workers[:1]
    return self._servers + (self._workers[1:] if FLAGS.sync_replicas else [])


class ReplicaHook(tf.train.SessionRunHook):
  """Lets replicas do their steps together, if they are synchronous.

  After computing a gradient, a replica waits for a token, which comes when
  there are enough gradients, and carries the step to compute next. Stale
  gradients are dropped, so an extra token does no harm.
  """

  def __init__(self, cluster):
    self._cluster = cluster
    self.session = self.optimizer = None
    self._last_time = time.time()

  def idle_secs(self):
    """Returns the time since the last step of this replica."""
    return time.time() - self._last_time

  def begin(self):
    self._global_step = tf.train.get_global_step()
    if self.optimizer:
      self._tokens = self.optimizer.get_init_tokens_op()
      update, = self.optimizer.get_chief_queue_runner().enqueue_ops
      with tf.control_dependencies([update]):
        self._update = tf.identity(self._global_step.read_value())
    self._cluster.wait()

  def after_create_session(self, session, coord):
    if self.session:  # TensorFlow would go on with a session of new variables.
      raise UserError('a parameter server was lost, and the variables with it: '
                      'start all tasks again.')
    self.session = session
    if session.run(self._global_step) >= FLAGS.max_steps:
      coord.request_stop()  # All is done: another step would wait for ever.
    if self.optimizer:
      is_chief = self._cluster.is_chief
      session.run(self.optimizer.chief_init_op if is_chief
                  else self.optimizer.local_step_init_op)
      if is_chief:
        threading.Thread(target=self._update_repeatedly, daemon=True).start()

  def _update_repeatedly(self):
    # The optimizer's queue runner would close the queue of tokens at the end,
    # which a chief that is started again could not open.
    with contextlib.suppress(tf.errors.OpError, RuntimeError):
      while self.session.run(self._update) < FLAGS.max_steps:
        pass

  def after_run(self, run_context, run_values):
    self._last_time = time.time()
    if self._cluster.error:
      run_context.request_stop()

  def end(self, session):
    if self._cluster.is_chief:
      self.wake_all()
    self._cluster.check()

  def wake_all(self):
    """Gives each replica a token, so that none waits for one."""
    self._last_time = time.time()
    if self.session and self.optimizer:
      with contextlib.suppress(tf.errors.OpError, RuntimeError):
        self.session.run(self._tokens)


def define_flags():
  """Defines the flags of training on several devices."""
  cifar10_train.define_flags()
  flags.DEFINE_integer(
      'num_gpus', 1, 'How many towers, each on a GPU of its own if there is '
      'one.', lower_bound=1, upper_bound=256)
  flags.DEFINE_boolean(
      'sync_replicas', True, 'In a cluster: average the gradients of all '
      'workers in each step. Otherwise each worker does steps of its own.')


def main(argv=None):
  return train()


if __name__ == '__main__':
  cifar10_train.run_script(main, define_flags)
