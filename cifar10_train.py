"""Train the CIFAR-10 network on one device.

    python cifar10_train.py         # CIFAR-10, 100,000 steps
    python cifar10_train.py --dataset=synthetic --train_dir=/tmp/synthetic_train

The second command needs no download; each data set needs its own --train_dir.

A run that ended, whatever ended it, continues from its last checkpoint in
--train_dir when it is started again. Ctrl-C, SIGTERM and SIGHUP save one first.
TF_CONFIG makes the process a task of a TensorFlow cluster, see README.md.
While it trains, cifar10_eval.py tells how well the network does, and
`tensorboard --logdir=/tmp/cifar10_train` shows what goes on inside.
"""
from datetime import datetime
import contextlib
import math
import os
import re
import select
import signal
import socket
import sys
import threading
import time

import cifar10
import cifar10_input
from cifar10_input import UserError, say, tf

FLAGS = tf.flags.FLAGS

cifar10.define_flags()
tf.flags.DEFINE_string(
    'train_dir', '/tmp/cifar10_train',
    'Where checkpoints and event files are written.')
cifar10.refuse_patterns('train_dir')
tf.flags.DEFINE_boolean(
    'overwrite', False, 'Start anew: remove the checkpoints and event files of '
    'an earlier run in --train_dir.')
tf.flags.DEFINE_enum(
    'recipe', 'original', list(cifar10.RECIPES), 'Sets flags that are not said'
    + ''.join('; %s: %s' % (recipe, ' '.join(
        '--%s=%s' % setting for setting in settings.items()))
              for recipe, settings in cifar10.RECIPES.items() if settings),
    module_name=cifar10.RECIPE_HEADING)
tf.flags.DEFINE_float(
    'learning_rate', cifar10.INITIAL_LEARNING_RATE, 'At the first step.',
    lower_bound=0.0, module_name=cifar10.RECIPE_HEADING)
tf.flags.DEFINE_enum(
    'learning_rate_schedule', cifar10.LEARNING_RATE_SCHEDULE,
    ['staircase', 'linear', 'cosine'],
    'How it falls: tenfold every 350 epochs, or to zero at --max_steps.',
    module_name=cifar10.RECIPE_HEADING)
tf.flags.DEFINE_float(
    'momentum', cifar10.MOMENTUM, "Nesterov's, of the gradients.",
    lower_bound=0.0, upper_bound=1.0, module_name=cifar10.RECIPE_HEADING)
tf.flags.DEFINE_float(
    'weight_decay', cifar10.WEIGHT_DECAY,
    'Factor of the L2 losses of local3 and local4.', lower_bound=0.0,
    module_name=cifar10.RECIPE_HEADING)
tf.flags.DEFINE_float(
    'moving_average_decay', cifar10.MOVING_AVERAGE_DECAY,
    'Of the averages of the variables, which are evaluated.', lower_bound=0.0,
    upper_bound=1.0, module_name=cifar10.RECIPE_HEADING)
tf.flags.DEFINE_float(
    'min_fraction_of_examples_in_queue',
    cifar10_input.MIN_FRACTION_OF_EXAMPLES_IN_QUEUE, 'How much of an epoch is '
    'in the shuffle queue when it is drawn from.', lower_bound=0.0,
    upper_bound=1.0)
tf.flags.DEFINE_integer(
    'max_steps', 100000, 'Steps to train for, those of earlier runs included.',
    lower_bound=1)
tf.flags.DEFINE_integer(
    'log_frequency', 10, 'Steps from one line on the console to the next.',
    lower_bound=1)
tf.flags.DEFINE_integer(
    'save_checkpoint_secs', 600, 'Seconds from one checkpoint to the next.',
    lower_bound=1)
tf.flags.DEFINE_integer(
    'max_to_keep', 5, 'How many of the latest checkpoints are kept; 0 keeps '
    'all.', lower_bound=0)
tf.flags.DEFINE_float(
    'keep_checkpoint_every_n_hours', 10000.0, 'Hours from one to the next of '
    'those checkpoints that are kept for ever.', lower_bound=0.0)
tf.flags.DEFINE_integer(
    'save_summary_steps', 100, 'Steps from one set of summaries to the next.',
    lower_bound=1)
tf.flags.DEFINE_integer(
    'seed', None, 'Draw the same initial weights in each run.', lower_bound=0,
    upper_bound=2 ** 31 - 1)
tf.flags.DEFINE_boolean(
    'deterministic', False, 'With --seed, do all else the same in each run, '
    'too: it ends with the same variables, byte for byte.')
tf.flags.register_multi_flags_validator(
    ['deterministic', 'seed'],
    lambda flags: flags['seed'] is not None or not flags['deterministic'],
    '--deterministic needs a --seed')
tf.flags.DEFINE_integer(
    'num_preprocess_threads', None, 'Threads that distort images; by default '
    'one for every four processors.', lower_bound=1, upper_bound=256)
tf.flags.DEFINE_boolean(
    'sync_replicas', True, 'In a cluster: average the gradients of all workers '
    'in each step. Else each worker does steps of its own.')
tf.flags.DEFINE_integer(
    'backup_workers', 0, 'In a cluster: gradients that a step does not wait '
    'for.', lower_bound=0)
tf.flags.DEFINE_integer(
    'cluster_timeout_secs', 600, 'In a cluster: how long to wait for a task '
    'that is not there.', lower_bound=1)
tf.flags.DEFINE_boolean(
    'log_device_placement', False, 'Show which device each operation is on.')


def train():
  """Trains on one device. Returns the exit code."""
  cifar10.adopt_recipe()
  return run_training(build_step, FLAGS.batch_size)


def build_step(dataset, global_step, replicas=cifar10.ALONE):
  """Builds one step of training on one device.

  Args:
    dataset: the `cifar10_input.Dataset` to learn from.
    global_step: int64 variable, the number of steps done.
    replicas: the `cifar10.Replicas` that do a step together.

  Returns:
    The operation that does the step, and its loss, a scalar float32.
  """
  # The input belongs on the CPU, so that a GPU is left to the network.
  with tf.device('/cpu:0'):
    images, labels = cifar10.distorted_inputs(dataset)
  logits = cifar10.inference(images, len(dataset.classes))
  loss = cifar10.loss(logits, labels)
  return cifar10.train(loss, global_step, dataset, replicas), loss


def run_training(build, examples):
  """Trains until --max_steps, or until something else ends it.

  Args:
    build: function that builds a step, as `build_step` does.
    examples: images in a step of this process, over all towers.

  Returns:
    The exit code: 0, or 128 and the number of the signal.

  Raises:
    UserError: --train_dir cannot be used, another process uses it, or it holds
      the checkpoint of another network; the loss is not a number any more; a
      file of the data set has changed; the last checkpoint was not written;
      another task of a cluster is not there.
  """
  task = cifar10.cluster_task()
  place = Cluster(*task) if task else OneMachine()
  return place.run(lambda: _train(place, build, examples))


def _train(place, build, examples):
  """Trains in a place, `OneMachine` or `Cluster`; see `run_training`."""
  with place.lock() as is_held, tf.Graph().as_default(), \
      tf.device(place.device):
    checkpoint = _checkpoint_to_continue()
    if checkpoint:
      cifar10.check_run(FLAGS.train_dir)
    if _already_trained(checkpoint):
      return 0
    dataset = cifar10.prepare_dataset()
    # Each worker draws for itself; the chief's are the initial weights.
    tf.set_random_seed(FLAGS.seed and FLAGS.seed + place.worker)
    if FLAGS.deterministic:
      tf.compat.v2.config.experimental.enable_op_determinism()
    global_step = tf.train.get_or_create_global_step()
    train_op, loss = build(dataset, global_step, place.replicas)
    with tf.control_dependencies([train_op]):
      steps_done = tf.identity(global_step.read_value())
    if checkpoint:
      cifar10.check_checkpoint(
          checkpoint, {v.op.name: v for v in tf.global_variables()})
    if place.is_chief:
      _tidy(checkpoint)
    saver = Saver()

    def check():
      if not is_held():
        raise UserError('--train_dir=%s was removed.' % FLAGS.train_dir)
      cifar10.check_files(dataset, dataset.train_files)
      place.check()

    logger = LoggerHook(loss, steps_done, examples * place.replicas.aggregated)
    stop = StopHook(check)
    place.wait()
    try:
      with _session(place, saver, [stop, logger, *place.hooks]) as session:
        while not session.should_stop():
          session.run(train_op)
    except tf.errors.OpError as error:
      check()  # If a file of the data set is the cause, this names it.
      if 'HistogramSummary' in str(error):  # It draws only finite numbers.
        raise UserError(_not_a_number('a gradient is not finite')) from error
      raise
    return _how_it_ended(place, logger, stop, saver)


def _session(place, saver, hooks):
  """Starts a session, which restores the checkpoint that `checkpoint` names."""
  config = tf.ConfigProto(
      allow_soft_placement=True, device_filters=place.device_filters,
      log_device_placement=FLAGS.log_device_placement)
  if place.target:  # To fuse bfloat16 operations fails in a cluster.
    rewriting = config.graph_options.rewrite_options
    rewriting.remapping = rewriting.OFF
  return tf.train.MonitoredTrainingSession(
      place.target, place.is_chief, FLAGS.train_dir,
      scaffold=tf.train.Scaffold(saver=saver),
      save_checkpoint_secs=FLAGS.save_checkpoint_secs,
      save_summaries_steps=FLAGS.save_summary_steps,
      log_step_count_steps=FLAGS.save_summary_steps,
      hooks=[tf.train.StopAtStepHook(last_step=FLAGS.max_steps)] + hooks,
      config=config)


def _checkpoint_to_continue():
  """Returns the checkpoint in --train_dir to go on from, or None."""
  if FLAGS.overwrite:
    return None
  checkpoint = cifar10.latest_checkpoint(FLAGS.train_dir)
  if checkpoint is None and cifar10.checkpoints(FLAGS.train_dir):
    raise UserError('no checkpoint in --train_dir=%s is whole: --overwrite '
                    'starts anew.' % FLAGS.train_dir)
  return checkpoint


def _already_trained(checkpoint):
  """Says where training starts. Returns whether nothing is left to do."""
  if checkpoint is None:
    return False
  step = tf.train.load_variable(checkpoint, tf.GraphKeys.GLOBAL_STEP)
  if step < FLAGS.max_steps:
    print('Continuing from %s.' % checkpoint, flush=True)
    return False
  print('%s is trained for %d steps already: %s--overwrite starts anew.' % (
      checkpoint, step, 'a larger --max_steps trains on, '
      if FLAGS.learning_rate_schedule == 'staircase' else ''))
  return True


def _tidy(checkpoint):
  """Makes --train_dir ready, when all else has turned out well.

  What a killed save left is removed, and with --overwrite all that this suite
  writes, but nothing else. The file `checkpoint` names the one to restore.
  """
  if FLAGS.overwrite:
    _remove(r'checkpoint|run\.json|graph\.pbtxt|events\.out\.tfevents\..*|'
            r'model\.ckpt-\d+\.(index|meta|data-\d+-of-\d+)')
  _remove_remains()
  cifar10.write_run(FLAGS.train_dir)
  if checkpoint:
    paths = cifar10.checkpoints(FLAGS.train_dir)
    names = [os.path.basename(path)
             for path in paths[:paths.index(checkpoint) + 1]]
    # The session restores what this file says, and no other. (For a relative
    # folder, TensorFlow would make a relative path of a name.)
    tf.train.update_checkpoint_state(
        os.path.abspath(FLAGS.train_dir), names[-1], names[-FLAGS.max_to_keep:])


def _remove_remains():
  """Removes files of checkpoints that were never finished."""
  whole = map(os.path.basename, cifar10.checkpoints(FLAGS.train_dir))
  _remove(r'(checkpoint|graph\.pbtxt)\.tmp[0-9a-f]{32}|'
          r'model\.ckpt-\d+\.(index|meta|data-\d+-of-\d+)'
          r'\.(tempstate\d+|tmp[0-9a-f]{32})|'
          r'model\.ckpt-(?!(%s)\.)\d+\.(meta|data-\d+-of-\d+)'
          % '|'.join(name.split('-')[1] for name in whole))


def _remove(pattern):
  for name in os.listdir(FLAGS.train_dir):
    path = os.path.join(FLAGS.train_dir, name)
    if re.fullmatch(pattern, name) and os.path.isfile(path):
      os.remove(path)


class Saver(tf.train.Saver):
  """Saves no checkpoint of numbers that are none, and outlives a full disk.

  `failure` is why the last checkpoint could not be written, or None.
  """

  failure = None

  def __init__(self):
    # Relative paths, so that train_dir may be moved.
    super().__init__(
        max_to_keep=FLAGS.max_to_keep, save_relative_paths=True,
        keep_checkpoint_every_n_hours=FLAGS.keep_checkpoint_every_n_hours)
    self._are_finite = tf.reduce_all([
        tf.reduce_all(tf.is_finite(variable))
        for variable in tf.global_variables() if variable.dtype.is_floating])

  def save(self, sess, *arguments, **options):
    if not sess.run(self._are_finite):
      raise UserError(_not_a_number('a variable is not finite'))
    try:
      checkpoint = super().save(sess, *arguments, **options)
      self.failure = None
      return checkpoint
    except (OSError, ValueError, tf.errors.OpError) as error:
      # (A ValueError if the folder is gone.)
      self.failure = cifar10.what_went_wrong(error)
      say('A checkpoint could not be written: %s' % self.failure, sys.stderr)
      with contextlib.suppress(OSError):
        _remove_remains()


def _not_a_number(what):
  return ('%s. The last checkpoint in %s is older: start again to try from '
          'there; if it comes back, look at the data, or compute in float32.'
          % (what, FLAGS.train_dir))


class LoggerHook(tf.train.SessionRunHook):
  """Prints loss and speed every --log_frequency steps.

  `step` is the number of steps done, by all workers of a cluster together.
  """

  def __init__(self, loss, steps_done, examples_per_step):
    self._fetches = [loss, steps_done]
    self._examples_per_step = examples_per_step

  def after_create_session(self, session, coord):
    self.step = self._line_step = session.run(tf.train.get_global_step())
    self._line_time = time.time()

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(self._fetches)

  def after_run(self, run_context, run_values):
    before, (loss_value, self.step) = self.step, run_values.results
    if not math.isfinite(loss_value):
      raise UserError(_not_a_number(
          'the loss is %s at step %d' % (loss_value, self.step - 1)))
    # Other workers may have done several steps meanwhile.
    if -before // FLAGS.log_frequency != -self.step // FLAGS.log_frequency:
      secs = (time.time() - self._line_time) / max(
          1, self.step - self._line_step)
      say('%s: step %d, loss = %.2f (%.1f examples/sec; %.3f sec/batch)' % (
          datetime.now(), self.step - 1, loss_value,
          self._examples_per_step / secs, secs))
      self._line_step, self._line_time = self.step, time.time()

  def end(self, session):
    self.step = session.run(tf.train.get_global_step())


class StopHook(tf.train.SessionRunHook):
  """Ends the session after the step in which something came up.

  `signum` is the signal that came, or None; `error` is what `check()`, called
  once a second, raised. `disk_was_full` does not end it: that may pass, but
  TensorFlow says nothing of the summaries that it loses meanwhile.
  """

  signum = error = None
  disk_was_full = False

  def __init__(self, check):
    self._check = check
    self._next_check = 0

  def begin(self):
    cifar10.handle_signals(lambda signum: setattr(self, 'signum', signum))

  def after_run(self, run_context, run_values):
    if time.time() >= self._next_check:
      self._next_check = time.time() + 1
      try:
        self._check()
      except UserError as error:
        self.error = error
      if not self.error and not self.disk_was_full and _is_disk_full():
        self.disk_was_full = True
        say('The disk of --train_dir=%s is full.' % FLAGS.train_dir, sys.stderr)
    if self.signum or self.error:
      run_context.request_stop()


def _is_disk_full():
  disk = os.statvfs(FLAGS.train_dir)
  free = disk.f_bfree if os.geteuid() == 0 else disk.f_bavail
  return disk.f_blocks > 0 and free == 0  # Some file systems count nothing.


def _how_it_ended(place, logger, stop, saver):
  """Returns the exit code, or raises what the user must know."""
  if stop.error:
    raise stop.error
  if saver.failure:
    raise UserError('the last checkpoint could not be written: %s. Those '
                    'before it are as they were; make room, and start again.'
                    % saver.failure)
  if stop.disk_was_full:
    raise UserError('the checkpoint of step %d is whole, but summaries may be '
                    'lost: the disk of --train_dir=%s was full.'
                    % (logger.step, FLAGS.train_dir))
  if stop.signum and logger.step < FLAGS.max_steps:
    say('Stopped by %s%s: the same command continues.' % (
        stop.signum.name, ' with a checkpoint' if place.is_chief else ''))
    return 128 + stop.signum
  if logger.step < FLAGS.max_steps:
    place.check()
    raise UserError('the input ended at step %d: has a file of the data set '
                    'changed?' % logger.step)
  return 0


# Where it is trained: on one machine, or by the tasks of a TensorFlow cluster.


class OneMachine:
  """All of it in this process.

  Attributes:
    worker: int, which of all workers this is; the chief is number 0.
    replicas: the `cifar10.Replicas` that do a step together.
    target: str, what a session connects to.
    device: where operations go, for `tf.device`.
    device_filters: list of the devices that a session sees, all if empty.
    hooks: list of hooks that a session must have.
  """

  worker = 0
  replicas = cifar10.ALONE
  target = ''
  device = None
  device_filters = ()
  hooks = ()

  @property
  def is_chief(self):
    return self.worker == 0

  def lock(self):
    """Locks --train_dir if it is ours; see `cifar10_input.locked`."""
    if self.is_chief:
      return cifar10_input.locked(FLAGS.train_dir, 'train_dir')
    return contextlib.nullcontext(lambda: True)

  def run(self, train):
    """Calls a function that trains. Returns the exit code, as that does."""
    return train()

  def wait(self):
    """Waits until a session can begin."""

  def check(self):
    """Raises a UserError if something outside of this process is amiss."""


class Cluster(OneMachine):
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
    if job == 'evaluator':
      raise UserError('TF_CONFIG says that this is the evaluator, which is '
                      'cifar10_eval.py.')
    self._addresses = {'%s %d' % (name, i): address
                       for name, addresses in jobs.items()
                       for i, address in enumerate(addresses)}
    self._servers = [task for task in self._addresses if task[:2] == 'ps']
    self._workers = sorted(set(self._addresses) - set(self._servers),
                           key=lambda task: (task[0] == 'w', len(task), task))
    self._task = '%s %d' % (job, index)
    self.worker = (self._workers + [self._task]).index(self._task)
    if FLAGS.backup_workers >= len(self._workers):
      raise UserError('--backup_workers=%d is all of the %d workers.'
                      % (FLAGS.backup_workers, len(self._workers)))
    if FLAGS.sync_replicas:
      self.replicas = cifar10.Replicas(
          len(self._workers) - FLAGS.backup_workers, len(self._workers))
    spec, mine = tf.train.ClusterSpec(jobs), '/job:%s/task:%d' % (job, index)
    self.device_filters = ['/job:ps', mine]
    self.device = tf.train.replica_device_setter(
        worker_device=mine, cluster=spec, ps_strategy=_by_size(len(jobs['ps'])))
    self._server = self._start_server(spec, job, index)
    self.target = self._server.target
    self._hook, = self.hooks = [ReplicaHook(self.is_chief)]
    self._missing = {}  # Tasks that are not there, and since when.
    self._error = None
    self._ended = False

  def _start_server(self, spec, job, index):
    try:
      with socket.socket() as port:  # TensorFlow would not say which it is.
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind(('', int(self._addresses[self._task].rpartition(':')[2])))
      return tf.train.Server(spec, job, index)
    except (OSError, tf.errors.OpError) as error:
      raise UserError('TF_CONFIG: %s cannot listen: %s.' % (
          self._name(self._task), cifar10.what_went_wrong(error))) from error

  def _name(self, task):
    return '%s at %s' % (task, self._addresses[task])

  def run(self, train):
    self._signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    threading.Thread(target=self._watch, daemon=True).start()
    if self._task in self._servers:
      return self._serve()
    code = train()
    self._ended = True
    if code == 0:
      self._say_done()
    return code

  def wait(self):
    while not all(self._is_there(server) for server in self._servers):
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
    if self._error:
      raise self._error

  def _session(self):
    return tf.Session(self.target, config=tf.ConfigProto(
        device_filters=self.device_filters))

  def _is_there(self, task):
    return cifar10.is_listening(self._addresses[task])

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
    with tf.device('/job:%s/task:%s' % tuple(server.split())):
      return tf.FIFOQueue(len(self._workers), tf.int32, [], shared_name='done')

  # What the thread does.

  def _watch(self):
    code, deadline = 1, math.inf
    while not self._ended:
      if select.select([self._signals], [], [], 1)[0]:
        code = 128 + os.read(self._signals, 1)[0]
      if (self._error or code > 1) and deadline == math.inf:
        deadline = time.time() + 15
        self._hook.wake_all()  # The main thread may be waiting for others.
      if time.time() > deadline:
        cifar10.fail(code, self._error or 'stopped by a signal.')
      self._look_around()
      if self._hook.idle_secs() > 10 and self.is_chief and not self._missing:
        self._hook.wake_all()  # A worker that was killed had the last token.

  def _look_around(self):
    needed = self._needed()
    self._missing = {task: since for task, since in self._missing.items()
                     if task in needed and not self._is_there(task)}
    for task in needed:
      if task not in self._missing and not self._is_there(task):
        self._missing[task] = time.time()
        say('Waiting for %s.' % self._name(task))
    for task, since in self._missing.items():
      secs = time.time() - since
      if task in self._servers and self._hook.session and secs > 3:
        cifar10.fail(1, '%s is gone, and the variables with it: start all '
                     'tasks again.' % self._name(task))
      if secs > FLAGS.cluster_timeout_secs and not self._error:
        self._error = UserError(
            '%s did not come in --cluster_timeout_secs=%d.'
            % (self._name(task), FLAGS.cluster_timeout_secs))

  def _needed(self):
    """Returns the tasks without which this one cannot go on."""
    if self._task in self._servers:
      return self._workers[:1]
    if self._hook.idle_secs() < 3:
      return self._servers
    if not self.is_chief:
      return self._servers + self._workers[:1]
    return self._servers + self._workers[1:] * FLAGS.sync_replicas


class ReplicaHook(tf.train.SessionRunHook):
  """Lets replicas do their steps together, if they are synchronous.

  A replica that has computed a gradient waits for a token, which is there when
  enough gradients are, and tells it the step to compute the next one for.
  Gradients for earlier steps are dropped; so a token too many does no harm.
  """

  def __init__(self, is_chief):
    self._is_chief = is_chief
    self.session = self._optimizer = None
    self._last_time = time.time()

  def idle_secs(self):
    """Returns the time since the last step of this replica."""
    return time.time() - self._last_time

  def begin(self):
    self._global_step = tf.train.get_global_step()
    for self._optimizer in tf.get_collection(cifar10.SYNC_REPLICAS):
      self._tokens = self._optimizer.get_init_tokens_op()
      update, = self._optimizer.get_chief_queue_runner().enqueue_ops
      with tf.control_dependencies([update]):
        self._update = tf.identity(self._global_step.read_value())

  def after_create_session(self, session, coord):
    if self.session:  # TensorFlow would go on with a session of new variables.
      raise UserError('a parameter server was lost, and the variables with it: '
                      'start all tasks again.')
    self.session = session
    if session.run(self._global_step) >= FLAGS.max_steps:
      coord.request_stop()  # All is done: another step would wait for ever.
    if self._optimizer:
      session.run(self._optimizer.chief_init_op if self._is_chief
                  else self._optimizer.local_step_init_op)
      if self._is_chief:
        threading.Thread(target=self._update_repeatedly, daemon=True).start()

  def _update_repeatedly(self):
    # The optimizer's queue runner would close the queue of tokens at the end,
    # which a chief that is started again could not open.
    with contextlib.suppress(tf.errors.OpError, RuntimeError):
      while self.session.run(self._update) < FLAGS.max_steps:
        pass

  def after_run(self, run_context, run_values):
    self._last_time = time.time()

  def end(self, session):
    if self._is_chief:
      self.wake_all()

  def wake_all(self):
    """Gives each replica a token, so that none waits for one."""
    self._last_time = time.time()
    if self.session and self._optimizer:
      with contextlib.suppress(tf.errors.OpError, RuntimeError):
        self.session.run(self._tokens)


def _by_size(num_servers):
  """Returns a function that places a variable on the emptiest server."""
  bytes_on = [0] * num_servers

  def place(operation):
    server = bytes_on.index(min(bytes_on))
    shape = tf.TensorShape(operation.get_attr('shape'))
    bytes_on[server] += (shape.num_elements() or 1) * 4
    return server

  return place


def main(argv=None):
  return train()


if __name__ == '__main__':
  cifar10.run(main)
