"""What to expect of a cluster: a model of its speed.

    python tests/benchmarks/scaling.py      # less than a minute

In a synchronous step each worker reads all variables, computes, and sends all
gradients. With W workers, the fullest parameter server moves W times its share
of the bytes through its link, once in each direction, and spends some time of
its processors on each worker:

    secs = compute + 2 * max(W * share, 1) * bytes * 8 / bits_per_sec
           + round_trips * latency + W * share * server_secs

`compute` is a step in one process, which is measured here. `server_secs` is how
much longer a step takes in a cluster of one worker on one machine, where a byte
costs no more than its copies: give what you have measured as --server_secs.
Prints tables; writes results/scaling.json and a picture, scaling.png.
"""
import argparse
import json
import os
import statistics
import tempfile

import train_speed

WORKERS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
SERVERS = [1, 2, 4, 16, 64]
GIGABITS = [1, 10, 100]
ROUND_TRIPS = 4  # Token, variables, gradients, update.
LATENCY_SECS = 1e-4  # Of the network, there and back.
SERVER_SECS = 0.023  # On 2 cores of an Intel Xeon.


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--server_secs', type=float, default=SERVER_SECS)
  args = parser.parse_args()
  results = {'machine': train_speed.machine(), 'bytes': count_bytes(),
             'shares': {n: share(n) for n in SERVERS},
             'compute_secs': measure_compute(args.rounds),
             'server_secs': args.server_secs}
  path = os.path.join(train_speed.HERE, 'results', 'scaling')
  with open(path + '.json', 'w') as f:
    json.dump(results, f, indent=1)
  print_tables(results)
  draw(results, path + '.png')


def measure_compute(rounds):
  """Returns the seconds of a step in one process."""
  with tempfile.TemporaryDirectory() as folder:
    train_speed.write_records(folder)
    return statistics.median(
        train_speed.run_worker(
            train_speed.__file__, suite='ours', dtype='bfloat16', input_=True,
            data_dir=folder)['ms'] for _ in range(rounds)) / 1e3


# The model.


def count_bytes():
  """Returns how many bytes of variables a worker reads in a step."""
  import cifar10
  with cifar10.tf.Graph().as_default():
    cifar10.FLAGS(['scaling'])
    cifar10.inference(cifar10.tf.zeros([1, 24, 24, 3]))
    return 4 * sum(v.shape.num_elements()
                   for v in cifar10.tf.trainable_variables())


def share(servers):
  """Returns which part of the bytes lies on the fullest parameter server."""
  import cifar10
  tf = cifar10.tf
  # Variables go round the servers in the order in which they are made.
  with tf.Graph().as_default(), tf.device(
      tf.train.replica_device_setter(servers)):
    tf.train.get_or_create_global_step()
    cifar10.inference(tf.zeros([1, 24, 24, 3]))
    sizes = {}
    for variable in tf.trainable_variables():
      sizes[variable.device] = (
          sizes.get(variable.device, 0) + variable.shape.num_elements())
  return max(sizes.values()) / sum(sizes.values())


def predict(results, workers, share, bits_per_sec, up_bytes=None):
  """Returns the seconds of a synchronous step.

  Args:
    results: dict of measurements, see `main`.
    workers: int, the chief included.
    share: part of the bytes on the fullest parameter server.
    bits_per_sec: of each link, in each direction.
    up_bytes: bytes of a worker's gradients, if not as many as of variables.
  """
  down, up = results['bytes'], up_bytes or results['bytes']
  return (results['compute_secs']
          + max(workers * share, 1) * (down + up) * 8 / bits_per_sec
          + ROUND_TRIPS * LATENCY_SECS
          + workers * share * results['server_secs'])


# What it comes to.


def print_tables(results):
  print(f'\n{json.dumps(results["machine"])}\n'
        f'{results["bytes"] / 1e6:.2f} MB of variables; compute '
        f'{results["compute_secs"] * 1e3:.1f} ms, a server works '
        f'{results["server_secs"] * 1e3:.1f} ms for each worker')
  for gigabits in GIGABITS:
    columns = ''.join(f'{servers:8} ps' for servers in SERVERS)
    print(f'\nsteps/sec, {gigabits} Gbit/s; a step learns from 128 images for '
          f'each worker\n{"workers":>8}{columns}')
    for workers in WORKERS:
      columns = ''.join(
          f'{1 / predict(results, workers, part, gigabits * 1e9):11.2f}'
          for part in results['shares'].values())
      print(f'{workers:8}{columns}')
  print('\nGradients as bfloat16, with one server: a step takes')
  for gigabits in GIGABITS:
    for workers in (1, 10, 100):
      full, half = (predict(results, workers, 1, gigabits * 1e9, up_bytes)
                    for up_bytes in (None, results['bytes'] / 2))
      print(f'{gigabits:4} Gbit/s, {workers:4} workers: {half / full:.2f} as '
            'long')


def draw(results, path):
  import matplotlib
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  figure, axes = plt.subplots(1, len(GIGABITS), figsize=(11, 3.6), sharey=True)
  for ax, gigabits in zip(axes, GIGABITS):
    for servers, part in results['shares'].items():
      ax.loglog(WORKERS, [
          workers * 128 / predict(results, workers, part, gigabits * 1e9)
          for workers in WORKERS], label=f'{servers} ps')
    ax.loglog(WORKERS, [workers * 128 / results['compute_secs']
                        for workers in WORKERS], 'k:', label='no network')
    ax.set_title(f'{gigabits} Gbit/s')
    ax.set_xlabel('workers')
    ax.spines[['top', 'right']].set_visible(False)
  axes[0].set_ylabel('images/sec, predicted')
  axes[0].legend(frameon=False, fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=110)


if __name__ == '__main__':
  main()
