"""Whether ours learns as the plain formulation does, in float32 and bfloat16.

    python tests/benchmarks/parity.py --data_dir=/tmp/cifar10_data

Trains every variant with every seed on CIFAR-10, evaluates the checkpoints with
cifar10_eval.py, prints the precisions, and writes results/parity.json and a
picture of the losses, parity.png. With --resume it keeps what it has measured.
"""
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

import train_speed

VARIANTS = [('plain', 'float32'), ('ours', 'float32'), ('ours', 'bfloat16')]
COLOURS = ['#5c6b73', '#e07a1f', '#2a6fdb']
STEPS_PER_POINT = 50  # Of the curves: the mean loss of so many steps.


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data_dir', required=True)
  parser.add_argument('--work_dir', default='/tmp/cifar10_parity')
  parser.add_argument('--steps', type=int, default=3000)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--resume', action='store_true')
  parser.add_argument('--worker', help='JSON; used by the benchmark itself')
  args = parser.parse_args()
  if args.worker:
    train(args.data_dir, args.steps, **json.loads(args.worker))
    return
  path = os.path.join(train_speed.HERE, 'results', 'parity.json')
  results = {'machine': train_speed.machine(), 'steps': args.steps, 'runs': {}}
  if os.path.exists(path):
    with open(path) as f:
      earlier = json.load(f)
    if args.resume and earlier['steps'] == args.steps:
      results = earlier
  for seed in range(1, args.seeds + 1):
    for suite, dtype in VARIANTS:
      run = f'{suite} {dtype}, seed {seed}'
      if run not in results['runs']:
        results['runs'][run] = measure(args, run, suite, dtype, seed)
        with open(path, 'w') as f:
          json.dump(results, f)
      print(f'{run:24} precision {results["runs"][run]["precision"]:.4f}',
            flush=True)
  for suite, dtype in VARIANTS:
    precisions = precisions_of(results, suite, dtype)
    deviation = statistics.stdev(precisions) if precisions[1:] else 0
    print(f'{f"{suite} {dtype}":24} mean {statistics.mean(precisions):.4f} '
          f'+- {deviation:.4f}')
  draw(results, os.path.join(train_speed.HERE, 'results', 'parity.png'))


def measure(args, run, suite, dtype, seed):
  train_dir = os.path.join(args.work_dir, re.sub(r'\W+', '_', run))
  shutil.rmtree(train_dir, ignore_errors=True)
  worker = json.dumps(
      {'suite': suite, 'dtype': dtype, 'seed': seed, 'train_dir': train_dir})
  subprocess.run(
      [sys.executable, os.path.abspath(__file__), '--data_dir', args.data_dir,
       '--steps', str(args.steps), '--worker', worker], check=True)
  with open(os.path.join(train_dir, 'losses.json')) as f:
    return {'precision': evaluate(train_dir, args.data_dir),
            'losses': json.load(f)}


def evaluate(train_dir, data_dir, *flags):
  """Returns precision @ 1 of the latest checkpoint in a folder."""
  with tempfile.TemporaryDirectory() as eval_dir:
    output = subprocess.run(
        [sys.executable, os.path.join(train_speed.SCRIPTS, 'cifar10_eval.py'),
         '--run_once', '--data_dir=' + data_dir, '--eval_dir=' + eval_dir,
         '--checkpoint_dir=' + train_dir, *flags],
        check=True, stdout=subprocess.PIPE, universal_newlines=True).stdout
  correct, total = re.search(r'(\d+)/(\d+) correct', output).groups()
  return int(correct) / int(total)


def train(data_dir, steps, suite, dtype, seed, train_dir):
  """Trains a variant, and writes the mean loss of every few steps."""
  import cifar10_input  # Before TensorFlow: it hides the start-up messages.
  import tensorflow.compat.v1 as tf
  build = (train_speed.build_plain if suite == 'plain'
           else train_speed.build_ours)
  losses = []
  with tf.Graph().as_default():
    tf.set_random_seed(seed)
    train_op, loss = build(
        tf, suite, dtype, None, data_dir, batch_size=128, towers=1)
    with tf.train.MonitoredTrainingSession(
        checkpoint_dir=train_dir, save_summaries_steps=None,
        hooks=[tf.train.StopAtStepHook(last_step=steps)]) as session:
      while not session.should_stop():
        losses.append(float(session.run([train_op, loss])[1]))
  with open(os.path.join(train_dir, 'losses.json'), 'w') as f:
    json.dump([statistics.mean(losses[i:i + STEPS_PER_POINT])
               for i in range(0, len(losses), STEPS_PER_POINT)], f)


def precisions_of(results, suite, dtype):
  return [run['precision'] for name, run in results['runs'].items()
          if name.startswith(f'{suite} {dtype},')]


def draw(results, path):
  import matplotlib
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  figure, axes = plt.subplots(figsize=(8, 4))
  for (suite, dtype), colour in zip(VARIANTS, COLOURS):
    precision = statistics.mean(precisions_of(results, suite, dtype))
    label = f'{suite} {dtype}: precision {precision:.3f}'
    for name, run in results['runs'].items():
      if name.startswith(f'{suite} {dtype},'):
        steps = [STEPS_PER_POINT * i for i in range(1, len(run['losses']) + 1)]
        axes.plot(steps, run['losses'], color=colour, alpha=0.7, label=label)
        label = None
  axes.set_xlabel('step')
  axes.set_ylabel('total loss')
  axes.legend(frameon=False)
  axes.spines[['top', 'right']].set_visible(False)
  figure.tight_layout()
  figure.savefig(path, dpi=110)


if __name__ == '__main__':
  main()
