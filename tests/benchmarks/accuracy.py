"""How precise a recipe is, after how long, over several seeds.

    python tests/benchmarks/accuracy.py --data_dir=/tmp/cifar10_data --seeds=3 \
        --name=fast -- --recipe=fast --use_bfloat16

What follows -- are flags of cifar10_train.py. Each seed is trained and its
checkpoints are evaluated; before and after, the plain formulation is timed. The
row with that --name is written to results/accuracy.json; then all rows so far
are printed, and drawn as precision against time, accuracy.png. Interrupted, it
goes on where it was when it is started again: it keeps what is finished in
--work_dir. --ablation is for variants, which are compared with each other only,
in results/ablation.json; it does not time the plain formulation.

The time of a run is its number of steps times the median ms a step, from the
speeds in its event files, which cover input and summaries; the plain
formulation is timed without summaries. plain_curve.json is a run of it that was
made before this benchmark was written.
"""
import argparse
import contextlib
import dataclasses
import glob
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile

import parity
import train_speed

RESULTS = os.path.join(train_speed.HERE, 'results')
POINTS = 12  # About so many checkpoints of the first seed make its curve.
PLAIN_STEPS = 100000
PLAIN_ROUNDS = 3


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data_dir', required=True)
  parser.add_argument('--work_dir', default='/tmp/cifar10_accuracy')
  parser.add_argument('--name', required=True, help='of the row')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--ablation', action='store_true')
  parser.add_argument('flags', nargs='*', help='of cifar10_train.py')
  args = parser.parse_args()
  if args.seeds < 1:
    parser.error('--seeds must be at least 1')
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  path = os.path.join(
      RESULTS, 'ablation.json' if args.ablation else 'accuracy.json')
  settings = args.settings = settings_of(args.flags)
  row = read(path).get(args.name, {'settings': settings, 'runs': {}})
  if row['settings'] != settings:
    sys.exit(f'{args.name} in {path} was measured with {row["settings"]}, not '
             f'{settings}: give this another --name.')
  write(path, args.name, row)
  for seed in map(str, range(1, args.seeds + 1)):
    if seed not in row['runs']:
      row['runs'][seed] = measure(args, seed)
      write(path, args.name, row)
  rows = read(path)
  print_table(rows)
  if not args.ablation:
    draw(rows, os.path.join(RESULTS, 'accuracy.png'))


def settings_of(flags):
  """Returns what flags, and the recipe that they name, change."""
  import cifar10
  import cifar10_input
  import cifar10_train
  cifar10_train.define_flags()
  cifar10.FLAGS([cifar10_train.__file__, *flags])
  recipe = dataclasses.asdict(cifar10_train.flags_recipe(
      cifar10_input.find_dataset(cifar10.FLAGS.dataset)))
  names = {flag.split('=')[0].lstrip('-') for flag in flags}
  original = dataclasses.asdict(cifar10.Recipe())
  for other in cifar10.RECIPES.values():
    names.update(name for name, value in dataclasses.asdict(other).items()
                 if value != original[name])
  return {name: recipe[name] if name in recipe else cifar10.FLAGS[name].value
          for name in sorted(names)}


def read(path):
  if not os.path.exists(path):
    return {}
  with open(path) as f:
    return json.load(f)


def write(path, name, row):
  """Writes one row beside the others."""
  precisions = [run['precision'] for run in row['runs'].values()]
  row['mean'] = statistics.mean(precisions) if precisions else None
  row['std'] = statistics.stdev(precisions) if precisions[1:] else None
  with open(path + '.new', 'w') as f:
    json.dump({**read(path), name: row}, f, indent=1)
  os.replace(path + '.new', path)


# One run.


def measure(args, seed):
  """Trains with one seed, and returns what there is to know of it."""
  kind = 'ablation' if args.ablation else 'accuracy'
  name = re.sub(r'\W+', '_', args.name)
  train_dir = os.path.join(args.work_dir, f'{kind}_{name}_{seed}')
  if args.ablation:
    train(args, train_dir, seed)
    return describe(args, train_dir)
  plain = time_plain(args)
  train(args, train_dir, seed)
  plain_ms = train_speed.median(plain + time_plain(args), 'ms')
  run = describe(args, train_dir)
  return {
      **run,
      'plain_ms': plain_ms,
      'ratio': run['seconds'] / (PLAIN_STEPS * plain_ms / 1e3),
      'curve': [(step, evaluate(args, train_dir, step))
                for step in (points(train_dir) if seed == '1' else [])],
  }


def describe(args, train_dir):
  """Returns figures of a finished run, without the plain formulation's."""
  last = steps_in(train_dir)[-1]
  ms = step_ms(train_dir)
  recipe = read(os.path.join(train_dir, 'run.json'))['recipe']
  return {
      'precision': evaluate(args, train_dir, last),
      'ten_views': evaluate(args, train_dir, last, '--multiview'),
      'ms': ms,
      'seconds': last * ms / 1e3,
      'steps': last,
      'examples': last * recipe['batch_size'],
      'machine': train_speed.machine(),
  }


def steps_in(train_dir):
  """Returns the steps of the checkpoints in a folder, the first one first."""
  return sorted(int(re.search(r'-(\d+)\.index', path)[1])
                for path in glob.glob(train_dir + '/model.ckpt-*.index'))


def points(train_dir):
  """Returns some of those steps, for a curve, the last one among them."""
  steps = steps_in(train_dir)[1:]
  return steps[::-max(1, round(len(steps) / POINTS))][::-1]


def train(args, train_dir, seed):
  """Trains to the end, or until we end."""
  run = read(os.path.join(train_dir, 'run.json'))
  earlier = {'dataset': run['dataset'], **run['recipe']} if run else {}
  for name, value in args.settings.items():
    if earlier.get(name, value) != value:
      sys.exit(f'{train_dir} is left of a run with --{name}={earlier[name]}, '
               f'not {value}: remove it.')
  process = subprocess.Popen(
      [sys.executable, os.path.join(train_speed.SCRIPTS, 'cifar10_train.py'),
       '--train_dir=' + train_dir, '--seed=' + seed, '--max_to_keep=0',
       '--data_dir=' + args.data_dir, '--log_frequency=1000',
       '--save_checkpoint_secs=120', *args.flags])
  try:
    code = process.wait()
  except BaseException:
    process.terminate()  # It saves a checkpoint then.
    process.wait()
    raise
  if code:
    sys.exit(f'cifar10_train.py ended with exit code {code}.')


def time_plain(args):
  return [train_speed.run_worker(
      suite='plain', dtype='float32', input_=True, data_dir=args.data_dir)
          for _ in range(PLAIN_ROUNDS)]


def step_ms(train_dir):
  """Returns the median of how long steps took."""
  import cifar10_input  # Before TensorFlow: it hides the start-up messages.
  import tensorflow.compat.v1 as tf
  ms = []
  for path in glob.glob(train_dir + '/events.out.tfevents.*'):
    # What a kill cut off ends with half a record.
    with contextlib.suppress(tf.errors.DataLossError):
      for event in tf.train.summary_iterator(path):
        ms += [1e3 * value.simple_value for value in event.summary.value
               if value.tag == 'speed/sec per batch']
  return statistics.median(ms)


def evaluate(args, train_dir, step, *flags):
  """Returns precision @ 1 of the checkpoint of a step."""
  with tempfile.TemporaryDirectory() as folder:
    for path in glob.glob(f'{train_dir}/model.ckpt-{step}.*'):
      shutil.copy(path, folder)
    shutil.copy(os.path.join(train_dir, 'run.json'), folder)
    return parity.evaluate(folder, args.data_dir, *flags)


# All rows.


def print_table(rows):
  print(f'\n{"":32} {"seeds":>5} {"mean":>7} {"+-":>7} {"10 views":>9} '
        f'{"steps":>8} {"minutes":>8} {"ratio":>6}')
  for name, row in rows.items():
    runs = list(row['runs'].values())
    if runs:
      deviation = f'{row["std"]:.4f}' if row['std'] is not None else ''
      ten_views = statistics.mean(run['ten_views'] for run in runs)
      minutes = train_speed.median(runs, 'seconds') / 60
      ratio = (f'{train_speed.median(runs, "ratio"):.3f}'
               if 'ratio' in runs[0] else '')
      print(f'{name:32} {len(runs):5} {row["mean"]:7.4f} {deviation:>7} '
            f'{ten_views:9.4f} {runs[0]["steps"]:8} {minutes:8.1f} '
            f'{ratio:>6}')


def draw(rows, path):
  import matplotlib
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  shown = {name: run for name, row in rows.items()
           for run in row['runs'].values() if run['curve']}
  plain = read(os.path.join(RESULTS, 'plain_curve.json'))
  plain['ms'] = plain['plain_ms'] = 1
  figure, axes = plt.subplots(figsize=(8, 4))
  for name, run in {'plain': plain, **shown}.items():
    steps, precisions = zip(*run['curve'])
    axes.plot([step * run['ms'] / (PLAIN_STEPS * run['plain_ms'])
               for step in steps], precisions,
              marker='o', markersize=3, label=name)
  ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
  axes.set_xscale('log')
  axes.set_xticks(ticks, ticks)
  axes.set_ylim(bottom=0.7)
  axes.set_xlabel('time, as a share of 100,000 steps of plain')
  axes.set_ylabel('precision @ 1, one view')
  axes.legend(frameon=False, loc='lower right')
  axes.grid(alpha=0.3)
  axes.spines[['top', 'right']].set_visible(False)
  figure.tight_layout()
  figure.savefig(path, dpi=110)


if __name__ == '__main__':
  main()
