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
import concurrent.futures
import json
import os
import re
import signal
import socket
import time
import traceback

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
    cifar10_input.speaker = '%s %d: ' % tuple(task)
    cluster = SyncCluster if FLAGS.sync_replicas else Cluster
    return cluster(jobs, *task).run()
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
    images, labels = cifar10_train.training_batches(
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
  averages = []
  for losses in zip(*tower_losses):
    _, _, name = losses[0].op.name.partition('/')
    averages.append(_average(losses, name))
  return averages


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
    average_grads.append((
        _average(gradients, variable.op.name + '/gradient'), variable))
  return average_grads


def _average(tensors, name):
  total = tf.add_n(tensors, name=name + '/sum')
  return tf.multiply(total, 1 / len(tensors), name=name)


# Many machines: a TensorFlow cluster.

TIMEOUT_SECS = 600  # For so long a task may be silent.
_MISSED_SECS = 8    # After so long, others say that they wait for it.


def check_cluster(jobs, job, index):
  """Raises a UserError that says why no cluster can train with a TF_CONFIG."""
  def check(condition, problem):
    if not condition:
      raise UserError('TF_CONFIG has ' + problem)

  seen = set()
  for name, tasks in jobs.items():
    check(name in ('chief', 'master', 'worker', 'ps'), 'a job in its cluster '
          f'that is none of chief, master, worker, ps, evaluator: {name}.')
    # A dict such as {"0": ADDRESS} is a list by now, unless it has gaps.
    check(isinstance(tasks, list) or not tasks,
          f'gaps in the numbers of {name}: {sorted(tasks)}.')
    for address in tasks:
      port = re.fullmatch(r'[^\s/]+:(\d{1,5})', address)
      check(port and 0 < int(port[1]) < 65536,
            f'an address that is not HOST:PORT: {address}.')
      check(address not in seen, f'two tasks at {address}.')
      seen.add(address)
  chiefs = len(jobs.get('chief', [])) + len(jobs.get('master', []))
  check(chiefs == 1, f'{chiefs} tasks chief or master, not one.')
  check(jobs.get('ps'), 'no ps in its cluster.')
  check(job in jobs, f'the task type {job}, which is not in its cluster: '
        f'{", ".join(jobs)}.')
  check(0 <= index < len(jobs[job]), f'the task index {index}, but its cluster '
        f'only {len(jobs[job])} of {job}.')


class ServerLost(UserError):
  """A parameter server that once answered is gone."""


class Cluster(cifar10_train.Task, tf.train.SessionRunHook):
  """One task of a cluster, in which each worker does steps of its own.

  Parameter servers (ps) hold the variables. The chief and the workers compute,
  each on batches of its own; the chief also initializes, saves and summarizes.
  The workers' graphs differ in the names of devices only.

  No operation waits for another task. Instead, each task leaves its status on
  every parameter server, a new one each second, and reads those of the others:
  a task that writes is alive. The chief's status says what run this is, and
  after the last checkpoint how it ended. A ps writes to itself only.

  Training, and the exchange with each server, have threads of their own, which
  may hang, and raise what goes wrong. The main thread never hangs: it looks
  around each second, and it alone ends the process.

  Args:
    jobs: dict from each job to the addresses of its tasks.
    job, index: which of the tasks this process is.
  """

  def __init__(self, jobs, job, index):
    task, servers = (job, index), [('ps', i) for i in range(len(jobs['ps']))]
    self._workers = [(name, i) for name in ('chief', 'master', 'worker')
                     for i in range(len(jobs.get(name, [])))]
    self.names = {(name, i): f'{name} {i} at {address}' for name in jobs
                  for i, address in enumerate(jobs[name])}
    self._servers = [task] if job == 'ps' else servers
    self._awaited = self._workers if FLAGS.sync_replicas else self._workers[:1]
    # In seconds, of each task that this one cannot do without.
    self._silence = dict.fromkeys(self._servers + self._awaited, 0)
    self._answered = set()  # Of the servers.
    self.status = {}       # A dict that JSON can carry: what this task says.
    self._statuses = {}    # Those of live tasks, by the workers' numbers.
    self._first_statuses = None  # Those that were there before: of a dead task?
    self._run = {}         # What this task takes the run for.
    self._cluster_size = ', '.join(
        f'{len(jobs[name])} {name}' for name in sorted(jobs))
    self._device = '/job:%s/task:%d' % task
    self._server = _start_server(jobs, task, self.names[task])
    super().__init__(
        # A ps is no worker, and so not the chief.
        worker=-1 if job == 'ps' else self._workers.index(task),
        num_workers=len(self._awaited),
        target=self._server.target,
        device=tf.train.replica_device_setter(
            worker_device=self._device, cluster=jobs),
        hooks=(self,),
        config=tf.ConfigProto(device_filters=['/job:ps', self._device]))
    # To fuse bfloat16 operations fails in a cluster.
    rewriting = self.config.graph_options.rewrite_options
    rewriting.remapping = rewriting.OFF
    self._pool = concurrent.futures.ThreadPoolExecutor(1 + len(self._servers))
    self._exchanges = [self._pool.submit(self._exchange, server)
                       for server in self._servers]

  # How the process goes on and ends: the main thread.

  def run(self):
    """Does what this task is there for. Returns the exit code."""
    if self.worker < 0:
      say(f'{self.names[self._servers[0]]} serves variables.')
      training = concurrent.futures.Future()  # It is never done.
    else:
      training = self._pool.submit(
          cifar10_train.run_training, self.build_step,
          FLAGS.batch_size * FLAGS.num_gpus, self)
    try:
      with cifar10_train.handling_signals(self.signals.append):
        code, message = self._watch(training)
    except ServerLost as error:
      code, message = 1, str(error)
      if self.worker > 0 and max(
          cifar10_train.checkpoints(FLAGS.train_dir), default=0
      ) >= FLAGS.max_steps:  # It was stopped while the others ended.
        code, message = 0, None
    except Exception as error:  # Whatever it is, the other tasks must end, too.
      if not isinstance(error, (UserError, OSError, tf.errors.OpError)):
        traceback.print_exc()
      code, message = 1, what_went_wrong(error)
      if 'run' in self.status:  # A chief that still trains saves what it has.
        self.signals.append(signal.SIGTERM)
        concurrent.futures.wait([training], 10)
    if self.is_chief:
      self._tell_end(code, message)
    elif self.worker < 0:
      time.sleep(3)  # The workers read how the run ended.
    if message:
      cifar10_train.fail(code, message)
    return code

  def _watch(self, training):
    """Looks around each second. Returns exit code and last line at the end."""
    # Looks, of a second each: with what follows them, 20 seconds at most.
    patience = 13
    while True:
      concurrent.futures.wait(
          [training, *self._exchanges], 1, concurrent.futures.FIRST_COMPLETED)
      chief = self.status if self.is_chief else self._statuses.get(0, {})
      end = chief.get('end')
      if self.signals:
        end = 128 + self.signals[0], f'stopped by {self.signals[0].name}.'
      if end:
        patience -= 1
        may_save = 'run' in chief and (
            self._silence[self._workers[0]] < _MISSED_SECS)
        # Workers have nothing to lose. The chief's last save needs the servers.
        if self.worker > 0 or not may_save or not patience:
          return end
      if training.done():
        return training.result(), None
      for each in self._exchanges:
        if each.done():
          each.result()  # It raises what went wrong.
      self.may_compute()
      for server in self._servers:
        self._count_silence(server)

  def _tell_end(self, code, message):
    """Tells the others how the chief's run ended."""
    # After a signal it did not: a chief that was stopped is started again.
    self.status = {'end': None if code > 1 else [
        code, message and f'the chief: {message}']}
    # After a start in vain, the servers may be starting still.
    concurrent.futures.wait(self._exchanges, timeout=4 if code > 1 else 15)

  # What the tasks tell each other: a thread for each server.

  def _exchange(self, server):
    """Writes to a parameter server and reads, in a thread: it may hang."""
    config = tf.ConfigProto(
        device_filters=['/job:%s/task:%d' % server, self._device],
        operation_timeout_in_ms=5000)
    with tf.Graph().as_default():
      session = tf.Session(self.target, config=config)  # To close it may hang.
      table = Table('statuses', tf.string, server)
      text = tf.placeholder(tf.string, [])
      write = table.put(self.worker, text)
      failures = 0  # In a row.
      while True:
        status = self.status
        try:
          session.run(
              write, {text: json.dumps({**status, 'time': time.time()})})
          texts = table.read(session)
        except tf.errors.DeadlineExceededError:
          continue  # It may be stopped, and go on. Five seconds have passed.
        except tf.errors.OpError:
          failures += 1
          if failures > 2 and server in self._answered:
            raise ServerLost(f'{self.names[server]} is gone, and the variables '
                             'with it: start all tasks again.')
        else:
          failures = self._silence[server] = 0
          self._answered.add(server)
          if server == self._servers[0]:
            self._take_in({i: json.loads(text) for i, text in texts.items()})
          if 'end' in status:
            return
        time.sleep(1)

  def _take_in(self, statuses):
    """Takes in what is on the first server: who writes there is not silent."""
    if self._first_statuses is None:
      self._first_statuses = statuses
    statuses = {
        i: status for i, status in statuses.items()
        if 'run' not in status or status != self._first_statuses.get(i)}
    for i, task in enumerate(self._awaited):
      if statuses.get(i) == self._statuses.get(i):
        self._count_silence(task)
      else:
        self._silence[task] = 0
    self._statuses = statuses

  def _count_silence(self, task):
    """Counts a second of silence, and raises a UserError if it was the last."""
    # A clock would go on when this process is stopped.
    self._silence[task] += 1
    if self._silence[task] == _MISSED_SECS:
      say(f'Waiting for {self.names[task]}.')
    if self._silence[task] > TIMEOUT_SECS:
      raise UserError(f'{self.names[task]} has not answered for '
                      f'{TIMEOUT_SECS} seconds.')

  # How this task trains: a thread of its own.

  def build_step(self, dataset, recipe, global_step):
    """Builds one step of this task; see `cifar10_train.build_step`."""
    names = [*cifar10_train.SHAPING_FLAGS, 'num_gpus', 'sync_replicas']
    self._run = {
        **{'--' + name: FLAGS[name].value for name in names},
        # A folder may be elsewhere on another machine.
        '--dataset': os.path.basename(dataset.name),
        'classes': ', '.join(dataset.classes),
        'the cluster in TF_CONFIG': self._cluster_size}
    return build_step(dataset, recipe, global_step, self.apply_gradients)

  def apply_gradients(self, optimizer, gradients, global_step, recipe):
    """As `cifar10.apply_gradients`."""
    # The averages need not travel to a worker and back.
    with tf.device(global_step.device):
      return cifar10.apply_gradients(optimizer, gradients, global_step, recipe)

  def may_compute(self):
    """Returns whether this task can compute now.

    Raises:
      UserError: if the chief's flags are not those of this task.
    """
    run = self._statuses.get(0, {}).get('run', {})
    for name, value in run.items():
      own = self._run.get(name, value)  # Its data may not be there yet.
      if value != own:
        raise UserError(f'{name} is {own} here, but {value} at '
                        f'{self.names[self._workers[0]]}: start all tasks '
                        'with the same flags.')
    return len(self._answered) == len(self._servers) and (
        self.is_chief or bool(run))

  def begin(self):
    while not self.may_compute():
      time.sleep(0.1)

  def after_create_session(self, session, coord):
    if not self.is_chief:
      # If no step is left, the chief says so, or comes back and repeats some.
      while session.run(tf.train.get_global_step()) >= FLAGS.max_steps:
        time.sleep(0.1)
    elif not self.status:
      self.status = {'run': self._run}
    else:
      # A connection broke, and TensorFlow has made a session anew. A worker
      # goes on with it, but a chief's begins with the values of the first one.
      raise UserError('the connection to a parameter server was lost: start '
                      'all tasks again.')


def _start_server(jobs, task, name):
  try:
    with socket.socket() as port:  # TensorFlow would not say which it is.
      port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      port.bind(('', int(name.rpartition(':')[2])))
    return tf.train.Server(jobs, *task)
  except (OSError, tf.errors.OpError) as error:
    raise UserError(f'TF_CONFIG: {name} cannot listen: '
                    f'{what_went_wrong(error)}.') from error


class Table:
  """A dict from numbers on a parameter server, which all tasks share.

  Nobody needs to initialize it, and it lasts as long as its server.
  """

  def __init__(self, name, dtype, server=('ps', 0)):
    with tf.device('/job:%s/task:%d' % server):
      self._handle = tf.raw_ops.MutableHashTableV2(
          shared_name=name, key_dtype=tf.int64, value_dtype=dtype)
      self._items = tf.raw_ops.LookupTableExportV2(
          table_handle=self._handle, Tkeys=tf.int64, Tvalues=dtype)

  def put(self, key, value):
    """Returns an operation that puts in a scalar."""
    with tf.device(self._handle.device):
      return tf.raw_ops.LookupTableInsertV2(
          table_handle=self._handle, keys=[tf.constant(key, tf.int64)],
          values=[value])

  def read(self, session):
    """Returns what is there now, as a dict."""
    return dict(zip(*session.run(self._items)))


class SyncCluster(Cluster):
  """One task of a cluster, in which all workers do each step together.

  The chief draws a ticket for each step, a number that no other step has. For
  the ticket, each worker leaves its gradients in variables of its own, then the
  ticket in a table. When the chief finds it there from all, it updates the
  network by their average. A task that waits reads the table again and again.
  So nothing that a killed task leaves behind can be taken for a part of another
  step, or hold one up.
  """

  def apply_gradients(self, optimizer, gradients, global_step, recipe):
    averages, own = [], []
    for gradient, variable in gradients:
      with tf.device(variable.device):
        left = [_gradient_variable(i, variable)
                for i in range(self.num_workers)]
        averages += average_gradients([[(each, variable)] for each in left])
      own.append(left[self.worker].assign(gradient))
    self._update = super().apply_gradients(
        optimizer, averages, global_step, recipe)
    self._table = Table('tickets', tf.int64)
    self._ticket = tf.placeholder(tf.int64, [])
    self._draw = self._table.put(-1, self._ticket)
    # Until the ticket is in the table, nobody updates.
    self._step = global_step.read_value()
    with tf.control_dependencies([self._step, *own]):
      return self._table.put(self.worker, self._ticket)

  def steps_done(self, train_op, global_step):
    return self._step + 1

  def is_last(self, steps_done):
    # A chief that is started again may repeat steps, and then needs the others.
    return self.is_chief and super().is_last(steps_done)

  def before_run(self, run_context):
    if self.is_chief:
      self._number = time.time_ns()
      run_context.session.run(self._draw, {self._ticket: self._number})
    else:
      for tickets in self._readings(run_context.session):
        if -1 in tickets and tickets[-1] != tickets.get(self.worker):
          break
      self._number = tickets[-1]
    return tf.train.SessionRunArgs(None, {self._ticket: self._number})

  def after_run(self, run_context, run_values):
    for tickets in self._readings(run_context.session):
      if not self.is_chief and tickets.get(-1) != self._number:
        return  # There is a next step. After the last, the chief ends all.
      if self.is_chief and all(tickets.get(worker) == self._number
                               for worker in range(self.num_workers)):
        run_context.session.run(self._update)
        return

  def _readings(self, session):
    """Yields what is in the table, again and again.

    Raises:
      OutOfRangeError: at a signal. As at the end of an input, the session
        closes, and the chief's saves.
    """
    start = time.monotonic()
    while not self.signals:
      yield self._table.read(session)
      # Often enough to lose little, and no oftener: others compute meanwhile.
      time.sleep(min(0.2, max(0.005, 0.05 * (time.monotonic() - start))))
    raise tf.errors.OutOfRangeError(None, None, 'a signal has ended the run.')


def _gradient_variable(worker, variable):
  """Returns a variable for a worker's gradients of a variable."""
  return tf.get_variable(
      f'{variable.op.name}/gradient_{worker}', variable.shape,
      initializer=tf.zeros_initializer(), trainable=False,
      collections=['gradients'])  # These are nothing to save.


def define_flags():
  """Defines the flags of training on several devices."""
  cifar10_train.define_flags()
  flags.DEFINE(
      cifar10_train.count_parser(1, 256), 'num_gpus', 1,
      'How many towers, each on a GPU of its own if there is one.')
  flags.DEFINE_boolean(
      'sync_replicas', True, 'In a cluster: average the gradients of all '
      'workers in each step. Otherwise each worker does steps of its own.')


def main(argv=None):
  return train()


if __name__ == '__main__':
  cifar10_train.run_script(main, define_flags)
