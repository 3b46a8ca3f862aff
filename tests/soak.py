"""Kills one training again and again, and compares it with one left alone.

    python tests/soak.py --data_dir=/tmp/cifar10_data       # ten minutes or so
    python tests/soak.py --data_dir=/tmp/cifar10_data --cluster --kills=50 \
        --steps=4000 -- --dataset=synthetic --batch_size=8      # most of an hour

Checkpoints are a second apart, so that some kills come in the middle of one.
After each kill the next start must go on from the newest whole checkpoint, and
in the end there is no file that the suite does not know.

With --cluster it trains on a chief, a worker and a parameter server: many times
in a row, with a chief that is slowed down, and with one task that is stopped
when the others must end. Then comes the long training, in which each time one
of them, or all, is killed, stopped for a while, or asked to end. Whatever ended
by that is started again, and no step may be lost that is behind the last
checkpoint.
"""
import argparse
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cifar10_train

KNOWN = re.compile(
    r'\.train_dir\.lock|run\.json|checkpoint|graph\.pbtxt|'
    r'events\.out\.tfevents\..*|'
    r'model\.ckpt-\d+\.(index|meta|data-00000-of-00001)')


def start(script, *flags):
  return subprocess.Popen(
      [sys.executable, str(ROOT / script), *flags], text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def newest_step(train_dir):
  checkpoint = cifar10_train.latest_checkpoint(str(train_dir))
  return int(checkpoint.split('-')[-1]) if checkpoint else None


def train(args, train_dir, kills, chance):
  shutil.rmtree(train_dir, ignore_errors=True)
  flags = ['--data_dir=' + args.data_dir, '--train_dir=%s' % train_dir,
           '--max_steps=%d' % args.steps, '--save_checkpoint_secs=1',
           '--log_frequency=1'] + args.flags
  for i in range(kills + 1):
    before = newest_step(train_dir)
    process = start('cifar10_train.py', *flags)
    if i < kills:
      time.sleep(args.first + chance.uniform(0, args.span))
      process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    continued = re.search(r'Continuing from .*-(\d+)\.\n', output)
    steps = [int(step) for step in re.findall(r': step (\d+),', output)]
    remains = [name for name in os.listdir(train_dir)
               if not KNOWN.fullmatch(name)]
    print('start %d: newest %s, continued %s, steps %s to %s, %d remains' % (
        i, before, continued and continued[1], steps[:1], steps[-1:],
        len(remains)), flush=True)
    assert process.returncode == (-signal.SIGKILL if i < kills else 0), output
    assert before is None or not continued or int(continued[1]) == before
    assert not steps or steps[0] == (before or 0)
  assert not remains, remains
  assert newest_step(train_dir) == args.steps
  return evaluate(train_dir)


def evaluate(train_dir):
  output = start('cifar10_eval.py', '--checkpoint_dir=%s' % train_dir,
                 '--eval_dir=%s_eval' % train_dir).communicate()[0]
  return float(re.search(r'precision @ 1 = (\S+)', output)[1])


# A cluster. A fault has a signal, and tasks that it comes to. What then ends,
# or must end, is started again.

CHIEF, WORKER, SERVER = TASKS = ('chief', 'worker', 'ps')
FAULTS = [
    ('kill worker', signal.SIGKILL, [WORKER], [WORKER]),
    ('kill chief', signal.SIGKILL, [CHIEF], [CHIEF]),
    ('end worker', signal.SIGTERM, [WORKER], [WORKER]),
    ('end chief', signal.SIGTERM, [CHIEF], [CHIEF]),
    ('kill server', signal.SIGKILL, [SERVER], TASKS),
    ('end all', signal.SIGTERM, TASKS, TASKS),
    ('interrupt all', signal.SIGINT, TASKS, TASKS),
    ('stop worker', signal.SIGSTOP, [WORKER], []),
    ('stop chief', signal.SIGSTOP, [CHIEF], []),
    ('stop server', signal.SIGSTOP, [SERVER], [])]


class Cluster:
  """The processes of a cluster, and what they print."""

  def __init__(self, folder, flags):
    self.train_dir, self.flags, self.processes = folder / 'run', flags, {}
    self.folder = folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sockets = [socket.socket() for _ in TASKS]
    for each in sockets:
      each.bind(('127.0.0.1', 0))
    self.jobs = {job: ['127.0.0.1:%d' % each.getsockname()[1]]
                 for job, each in zip(TASKS, sockets)}
    for each in sockets:
      each.close()

  def start(self, *jobs):
    for job in jobs:
      config = {'cluster': self.jobs, 'task': {'type': job, 'index': 0}}
      with open(self.folder / job, 'w') as output:
        self.processes[job] = subprocess.Popen(
            [sys.executable, str(ROOT / 'cifar10_multi_gpu_train.py'),
             '--train_dir=%s' % self.train_dir, *self.flags],
            env={**os.environ, 'TF_CONFIG': json.dumps(config)},
            stdout=output, stderr=subprocess.STDOUT)

  def steps(self, job=CHIEF):
    return [int(step) for step in re.findall(
        r': step (\d+),', (self.folder / job).read_text())]

  def codes(self, jobs=TASKS, secs=60):
    """Returns the exit codes of tasks, which have some time to end."""
    try:
      return {job: self.processes[job].wait(secs) for job in jobs}
    except subprocess.TimeoutExpired:
      self.fail('does not end')

  def go_on(self, secs=300):
    """Waits until the chief has done three more steps, or all are done."""
    first, deadline = len(self.steps()), time.time() + secs
    while len(self.steps()) < first + 3:
      if self.processes[CHIEF].poll() == 0:
        return
      if time.time() > deadline or self.processes[CHIEF].poll() is not None:
        self.fail('does not go on')
      time.sleep(0.1)

  def fail(self, problem):
    for job in TASKS:
      print('%s: %s' % (self.processes[job].poll(),
                        (self.folder / job).read_text()[-1000:]))
    sys.exit('The cluster %s.' % problem)


def train_on_cluster(args, folder, faults, chance):
  cluster = Cluster(folder, [
      '--data_dir=' + args.data_dir, '--max_steps=%d' % args.steps,
      '--save_checkpoint_secs=1', '--log_frequency=1', *args.flags])
  cluster.start(*TASKS)
  for i in range(faults):
    cluster.go_on()
    time.sleep(chance.uniform(0, 3))
    name, signum, jobs, ending = chance.choice(FAULTS)
    before = newest_step(cluster.train_dir)
    if cluster.processes[CHIEF].poll() == 0:
      print('done before fault %d' % i)
      break
    for job in chance.sample(jobs, len(jobs)):
      cluster.processes[job].send_signal(signum)
    secs = chance.uniform(0, 20)
    if signum == signal.SIGSTOP:
      time.sleep(secs)
      cluster.processes[jobs[0]].send_signal(signal.SIGCONT)
    codes = cluster.codes(ending)
    saved, steps = newest_step(cluster.train_dir), cluster.steps()
    print('fault %d: %s%s, codes %s, checkpoint %s, then %s, step %s' % (
        i, name, ' for %.0f s' % secs if signum == signal.SIGSTOP else '',
        list(codes.values()), before, saved, steps[-1:]), flush=True)
    # A step that was done, but not printed, may have been saved, too.
    if signum in (signal.SIGTERM, signal.SIGINT) and CHIEF in jobs and steps:
      assert saved in (steps[-1] + 1, steps[-1] + 2), (saved, steps[-1])
    assert saved >= (before or 0)
    cluster.start(*ending)
    if CHIEF in ending:
      cluster.go_on()
      assert cluster.steps()[0] == saved, (cluster.steps()[0], saved)
  assert set(cluster.codes(secs=3600).values()) == {0}, cluster.codes()
  assert newest_step(cluster.train_dir) == args.steps
  cluster.start(WORKER)
  assert cluster.codes([WORKER]) == {WORKER: 0}  # It comes too late.
  return evaluate(cluster.train_dir)


def stop_one_and_end_the_others(args, folder):
  """A signal must end any task, even if another does not answer."""
  for stopped in TASKS:
    cluster = Cluster(folder, ['--data_dir=' + args.data_dir, *args.flags,
                               '--log_frequency=1'])
    cluster.start(*TASKS)
    cluster.go_on()
    cluster.processes[stopped].send_signal(signal.SIGSTOP)
    others = [job for job in TASKS if job != stopped]
    for job in others:
      cluster.processes[job].send_signal(signal.SIGTERM)
    codes = cluster.codes(others, secs=20)
    print('%s stopped, the others end with %s' % (stopped, codes), flush=True)
    assert set(codes.values()) == {143}
    cluster.processes[stopped].kill()
    cluster.processes[stopped].wait()


def end_again_and_again(args, folder, times):
  """Starts and ends must not depend on luck."""
  for i in range(times):
    cluster = Cluster(folder, ['--data_dir=' + args.data_dir, *args.flags,
                               '--max_steps=10'])
    cluster.start(*TASKS)
    if set(cluster.codes(secs=300).values()) != {0}:
      cluster.fail('failed')
    assert newest_step(cluster.train_dir) == 10
  print('%d starts and ends' % times, flush=True)


def train_with_a_slow_chief(args, folder, mode):
  """A chief that has a twentieth of its time must see the end, too."""
  cluster = Cluster(folder, ['--data_dir=' + args.data_dir, *args.flags,
                             '--log_frequency=1', '--max_steps=100', mode])
  cluster.start(*TASKS)
  cluster.go_on()
  chief = cluster.processes[CHIEF]
  while chief.poll() is None:
    for signum, secs in (signal.SIGSTOP, 0.95), (signal.SIGCONT, 0.05):
      chief.send_signal(signum)
      time.sleep(secs)
  codes = cluster.codes()
  print('chief slowed down, %s: ended with %s, steps of the chief %d' % (
      mode, codes, len(cluster.steps())), flush=True)
  assert set(codes.values()) == {0}
  # Of asynchronous steps, one may be under way when the last one is done.
  assert newest_step(cluster.train_dir) in (100, 101)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data_dir', required=True)
  parser.add_argument('--work_dir', default='/tmp/cifar10_soak')
  parser.add_argument('--steps', type=int, default=3000)
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=1)
  parser.add_argument('--first', type=float, default=4, metavar='SECS',
                      help='in which a start is left alone')
  parser.add_argument('--span', type=float, default=8, metavar='SECS',
                      help='after those, in which it is killed')
  parser.add_argument('--cluster', action='store_true')
  parser.add_argument('flags', nargs='*', help='of the trainer')
  args = parser.parse_args()
  # A script's `&` ignores SIGINT, also in what runs below it.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  chance = random.Random(args.seed)
  if args.cluster:
    folder = pathlib.Path(args.work_dir)
    end_again_and_again(args, folder / 'short', 30)
    for mode in '--sync_replicas', '--nosync_replicas':
      train_with_a_slow_chief(args, folder / 'slow', mode)
    stop_one_and_end_the_others(args, folder / 'stopped')
  for name, kills in [('left_alone', 0), ('killed', args.kills)]:
    precision = (train_on_cluster if args.cluster else train)(
        args, pathlib.Path(args.work_dir) / name, kills, chance)
    print('%s: precision %.3f after %d steps and %d kills' % (
        name, precision, args.steps, kills), flush=True)


if __name__ == '__main__':
  main()
