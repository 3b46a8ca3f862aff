"""Kills one training again and again, and compares it with one left alone.

    python tests/soak.py --data_dir=/tmp/cifar10_data       # ten minutes or so

Checkpoints are a second apart, so that some kills come in the middle of one.
After each kill the next start must go on from the newest whole checkpoint, and
in the end there is no file that the suite does not know.
"""
import argparse
import os
import pathlib
import random
import re
import shutil
import signal
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
  output = start('cifar10_eval.py', '--checkpoint_dir=%s' % train_dir,
                 '--eval_dir=%s_eval' % train_dir).communicate()[0]
  return float(re.search(r'precision @ 1 = (\S+)', output)[1])


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
  parser.add_argument('flags', nargs='*', help='of cifar10_train.py')
  args = parser.parse_args()
  chance = random.Random(args.seed)
  for name, kills in [('left_alone', 0), ('killed', args.kills)]:
    precision = train(args, pathlib.Path(args.work_dir) / name, kills, chance)
    print('%s: precision %.3f after %d steps and %d kills' % (
        name, precision, args.steps, kills), flush=True)


if __name__ == '__main__':
  main()
