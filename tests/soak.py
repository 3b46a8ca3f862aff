"""Kills one training again and again, and compares it with one left alone.

    python tests/soak.py --data_dir=/tmp/cifar10_data    # ten minutes or so
    python tests/soak.py --data_dir=/tmp/cifar10_data --steps=1000 --kills=5 \
        -- --dataset=synthetic --batch_size=16

Checkpoints are a second apart, so that some kills come in the middle of one.
After each kill the next start must continue from the newest whole checkpoint.
"""
import argparse
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


def start(script, *flags):
  return subprocess.Popen(
      [sys.executable, str(ROOT / script), *flags], text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def newest_step(train_dir):
  checkpoint = cifar10_train.latest_checkpoint(str(train_dir))
  return int(checkpoint.split('-')[-1]) if checkpoint else 0


def train(args, train_dir, kills, chance):
  """Trains, killed so many times. Returns the precision in the end."""
  shutil.rmtree(train_dir, ignore_errors=True)
  flags = [f'--data_dir={args.data_dir}', f'--train_dir={train_dir}',
           f'--max_steps={args.steps}', '--save_checkpoint_secs=1',
           '--log_frequency=1', *args.flags]
  for i in range(kills + 1):
    before = newest_step(train_dir)
    process = start('cifar10_train.py', *flags)
    if i < kills:
      time.sleep(args.first + chance.uniform(0, args.span))
      process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    continued = re.search(r'^Continuing from .*-(\d+)\.$', output, re.M)
    steps = [int(step) for step in re.findall(r': step (\d+),', output)]
    print(f'start {i}: the newest checkpoint is of step {before}, the steps '
          f'are {steps[:1]} to {steps[-1:]}, exit code {process.returncode}',
          flush=True)
    # It may have been killed before it printed anything.
    assert not continued or int(continued[1]) == before, output
    assert not steps or steps[0] == before, output
    if process.returncode == 0:
      break
    assert process.returncode == -signal.SIGKILL, output
  assert newest_step(train_dir) == args.steps
  return evaluate(train_dir)


def evaluate(train_dir):
  output = start('cifar10_eval.py', '--run_once',
                 f'--checkpoint_dir={train_dir}').communicate()[0]
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
  parser.add_argument('flags', nargs='*', help='of the trainer')
  args = parser.parse_args()
  chance = random.Random(args.seed)
  for name, kills in ('left_alone', 0), ('killed', args.kills):
    precision = train(args, pathlib.Path(args.work_dir) / name, kills, chance)
    print(f'{name}: precision {precision:.3f} after {args.steps} steps and '
          f'{kills} kills', flush=True)


if __name__ == '__main__':
  main()
