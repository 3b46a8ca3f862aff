"""Makes picture files of all kinds, and shows how the suite reads each of them.

    python tests/pictures.py [FOLDER]

A line a file: how far, at most, the pixels are from what the file was made of
(lossy formats come within 20), or the fault that the suite tells.
"""
import os
import pathlib
import struct
import sys
import tempfile
import zlib

import numpy as np
import PIL.Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import cifar10_input

# A picture without symmetries, in colours and in grey.
Y, X = np.mgrid[:32, :32]
COLOURS = np.stack([X * 8, Y * 8, 128 + X * 2 - Y * 2], 2).astype(np.uint8)
GREY = (X * 5 + Y * 3).astype(np.uint8)
GREYS = np.stack([GREY] * 3, 2)

# TIFF 6.0, page 36: the orientations in which the picture's columns are stored
# as rows, its last row (or column) first, its columns (or rows) backwards.
TRANSPOSED, LAST_FIRST, BACKWARDS = (5, 6, 7, 8), (3, 4, 6, 7), (2, 3, 7, 8)

# What is told of the broken ones. Pillow's words differ between its versions.
FAULTS = {
    'archive.png': 'cannot identify', 'text.jpg': 'cannot identify',
    'empty.png': 'cannot identify', 'huge.png': 'decompression bomb',
    'cut.jpg': '[Tt]runcated', 'cut.png': '[Tt]runcated',
    'header.png': '[Tt]runcated', 'wrong_crc.png': 'broken',
    'float32.tif': '32 bits a pixel', 'int32.tif': '32 bits a pixel',
    'folder.png': 'not a file', 'pipe.png': 'not a file',
    'link.png': 'no such file', 'secret.png': 'Permission denied'}


def make(folder):
  """Writes the files. Returns what each one shows, or None for a broken one."""
  shown = {}

  def save(name, image, pixels, **options):
    try:
      image.save(folder / name, **options)
      shown[name] = pixels
    except (ValueError, OSError):
      print('This Pillow does not write %s.' % name)

  colours, grey = map(PIL.Image.fromarray, (COLOURS, GREY))
  palette = colours.quantize(50)
  flat = np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)]
  lossless = {'lossless': True, 'exact': True}
  alpha = PIL.Image.fromarray(255 - GREY)
  for kind in 'png bmp tif ppm ico tga gif webp jp2 jpg avif'.split():
    save('colours.' + kind, palette if kind == 'gif' else colours,
         flat if kind == 'gif' else COLOURS,
         **(lossless if kind == 'webp' else {}))
  save('lossy.webp', colours, COLOURS)
  save('progressive.jpg', colours, COLOURS, progressive=True)
  save('cmyk.jpg', colours.convert('CMYK'), COLOURS, quality=95)
  save('cmyk.tif', colours.convert('CMYK'), COLOURS)
  for kind in 'png bmp pgm jpg tif gif'.split():
    save('grey.' + kind, grey, GREYS)
  for kind in 'png bmp gif tif'.split():
    save('palette.' + kind, palette, flat)
    save('1bit.' + kind, grey.point(lambda v: v > 99, '1'), 255 * (GREYS > 99))
  for kind in 'png webp tif'.split():
    save('alpha.' + kind, PIL.Image.merge('RGBA', [*colours.split(), alpha]),
         COLOURS, **(lossless if kind == 'webp' else {}))
  save('grey_alpha.png', PIL.Image.merge('LA', [grey, alpha]), GREYS)
  save('transparent.png', palette, flat, transparency=7)
  save('transparent.gif', palette, flat, transparency=7)
  for kind in 'png tif pgm'.split():
    save('16bit.' + kind, PIL.Image.fromarray(GREY * np.uint16(257)), GREYS)
  for dtype in 'int32', 'float32':  # Nobody knows which value is white.
    save(dtype + '.tif', PIL.Image.fromarray(GREY.astype(dtype)), None)
  for number in range(1, 9):
    stored = COLOURS.swapaxes(0, 1) if number in TRANSPOSED else COLOURS
    stored = stored[::-1 if number in LAST_FIRST else 1,
                    ::-1 if number in BACKWARDS else 1]
    exif = PIL.Image.Exif()
    exif[0x0112] = number
    save('orientation_%d.jpg' % number, PIL.Image.fromarray(stored), COLOURS,
         exif=exif, quality=95)

  whole = (folder / 'colours.png').read_bytes()
  header = b'IHDR' + struct.pack('>2I5B', 20000, 20000, 8, 2, 0, 0, 0)
  for name, content in {
      'cut.png': whole[:-50], 'header.png': whole[:20], 'empty.png': b'',
      'cut.jpg': (folder / 'colours.jpg').read_bytes()[:-200],
      'text.jpg': b'no picture', 'archive.png': b'PK\3\4' + bytes(99),
      'wrong_crc.png': whole[:60] + b'?' + whole[61:],
      'huge.png': whole[:12] + header + struct.pack(
          '>I', zlib.crc32(header)) + whole[33:]}.items():
    (folder / name).write_bytes(content)
  os.mkfifo(folder / 'pipe.png')
  (folder / 'link.png').symlink_to('nowhere')
  (folder / 'folder.png').mkdir()
  (folder / 'secret.png').write_bytes(whole)
  (folder / 'secret.png').chmod(0)
  return {path.name: shown.get(path.name) for path in sorted(folder.iterdir())}


def show(folder):
  folder.chmod(0o755)
  shown = make(folder)
  if os.geteuid() == 0:
    os.seteuid(65534)  # Root may read everything.
  for name, pixels in shown.items():
    try:
      read = np.moveaxis(cifar10_input.read_picture(folder / name), 0, 2)
      outcome = 'at most %d' % abs(read.astype(int) - pixels).max()
    except Exception as error:
      outcome = cifar10_input.what_went_wrong(error)
    print('%-18s %s' % (name, outcome))
  os.seteuid(os.getuid())


if __name__ == '__main__':
  if sys.argv[1:]:
    show(pathlib.Path(sys.argv[1]))
  else:
    with tempfile.TemporaryDirectory() as folder:
      show(pathlib.Path(folder))
