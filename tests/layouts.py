"""One set of images written in every layout in which people hold it: a function for each, in a dict."""
import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pandas as pd
from PIL import Image

from grdd_fastai.data.class_lists import SPLITS, class_list

N,PX = 3,12 # images of a class and their side
CLASSES = {s:mine.label.tolist() for s,mine in class_list('mini_imagenet').groupby('split')}
rng = np.random.default_rng(0)
PIXELS = {c:rng.integers(0, 256, (N, PX, PX, 3), dtype=np.uint8) for s in SPLITS for c in CLASSES[s]}
LAYOUTS = {}


def layout(f):
    LAYOUTS[f.__name__] = f
    return f

def encoded(im, kind='png'):
    buf = io.BytesIO()
    Image.fromarray(im).save(buf, kind)
    return buf.getvalue()

def write(path, im, kind='png'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(im, kind))

def shuffled(split):
    "The classes of a split in an order of their own, their images one after the other and the class code of each image"
    classes = CLASSES[split].copy()
    np.random.default_rng(len(split)).shuffle(classes)
    return classes,np.concatenate([PIXELS[c] for c in classes]),np.repeat(np.arange(len(classes)), N)

def dump(o, path, protocol=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(o, protocol=protocol))


# ---- files in folders -------------------------------------------------------------------------------------------------

@layout
def split_csvs(root):
    "In an order of rows of their own, as LibFewShot has them"
    for s in SPLITS:
        rows = [(f'{c}{i:08d}.png', c) for c in CLASSES[s] for i in range(N)]
        for f,c in rows: write(root/'images'/f, PIXELS[c][int(f[9:17])])
        pd.DataFrame(rows, columns=['filename', 'label']).sample(frac=1, random_state=1).to_csv(root/f'{s}.csv', index=False)
    return root

@layout
def easyfsl_csvs(root):
    for s in SPLITS:
        rows = [(c, f'{c}_{13*i}.png') for c in shuffled(s)[0] for i in range(N)]
        for c,f in rows: write(root/c/f, PIXELS[c][int(f[10:-4])//13])
        pd.DataFrame(rows, columns=['class_name', 'image_name']).to_csv(root/f'{s}.csv', index=False)
    return root

@layout
def easyfsl_jsons(root):
    for s in SPLITS:
        classes = shuffled(s)[0]
        for c in classes:
            for i in range(N): write(root/'images'/c/f'{N - i}.bmp', PIXELS[c][i], 'bmp')
        (root/f'{s}.json').write_text(json.dumps(dict(class_names=classes, class_roots=[f'./data/mini/images/{c}' for c in classes])))
    return root

@layout
def split_folders(root):
    for s in SPLITS:
        for c in CLASSES[s]:
            for i in range(N): write(root/s/c/f'{c}_{7*i}.png', PIXELS[c][i])
    return root

@layout
def imagenet_tree(root):
    "Class folders alone; the list of miniImageNet splits them"
    for c in PIXELS:
        for i in range(N): write(root/c/f'{c}_{3*i + 1}.png', PIXELS[c][i])
    return root

@layout
def ravi_lists_beside_imagenet(root):
    "Ravi and Larochelle's names are positions in a class's files by number; mmfewshot keeps them beside whole class folders"
    imagenet_tree(root/'images')
    for c in PIXELS: write(root/'images'/c/f'{c}_100.png', PIXELS[c][0] ^ 1) # an image that is not listed
    for s in SPLITS:
        rows = [(f'{c}{i + 1:08d}.jpg', c) for c in CLASSES[s] for i in range(N)]
        pd.DataFrame(rows, columns=['filename', 'label']).to_csv(root/f'{s}.csv', index=False)
    return root

@layout
def zipped_tree(root):
    with zipfile.ZipFile(root.with_suffix('.zip'), 'w') as z:
        for c in PIXELS:
            for i in range(N): z.writestr(f'mini/{c}/{9 - i}.png', encoded(PIXELS[c][i]))
    return root.with_suffix('.zip')

def tar_of(path, members, mode='w'):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name,content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path

@layout
def packed_tar(root):
    return tar_of(root.with_suffix('.tgz'), {f'mini/{c}/{i}.png':encoded(PIXELS[c][i]) for c in PIXELS for i in range(N)}, 'w:gz')

@layout
def a_tar_for_each_class(root):
    for c in PIXELS: tar_of(root/f'{c}.tar', {f'{c}_{i}.png':encoded(PIXELS[c][i]) for i in range(N)})
    return root

@layout
def a_tar_of_tars(root):
    a_tar_for_each_class(root)
    return tar_of(root.with_suffix('.tar'), {f.name:f.read_bytes() for f in sorted(root.iterdir())})


# ---- arrays -----------------------------------------------------------------------------------------------------------

@layout
def category_split_pickles(root):
    "Those of Gidaris and Komodakis, with other images of the base classes beside them"
    for s in SPLITS:
        classes,images,y = shuffled(s)
        about = dict(data=images, labels=y.tolist(), catname2label={c:i for i,c in enumerate(classes)})
        dump(about, root/f'miniImageNet_category_split_{dict(train="train_phase_train").get(s, s)}.pickle')
    for s in ('val', 'test'): dump(dict(data=images[:5], labels=[0]*5), root/f'miniImageNet_category_split_train_phase_{s}.pickle')
    return root

@layout
def cache_pickles(root):
    "Those of Ren et al.; with names in bytes, as Python 3 reads those that Python 2 wrote"
    for s in SPLITS:
        classes,images,_ = shuffled(s)
        rows = {c.encode():list(range(i*N, (i + 1)*N)) for i,c in enumerate(classes)}
        dump({b'image_data':images, b'class_dict':rows}, root/f'mini-imagenet-cache-{dict(val="validation").get(s, s)}.pkl', 4)
    return root

@layout
def pickles_without_names(root):
    "As CIFAR_FS_train.pickle: numbers in place of names"
    start = 0
    for s in SPLITS:
        classes = sorted(CLASSES[s])
        y = np.repeat(np.arange(len(classes)), N) + start
        dump(dict(data=np.concatenate([PIXELS[c] for c in classes]), labels=y.tolist()), root/f'MINI_{s}.pickle')
        start += len(classes)
    return root

@layout
def encoded_pickles(root):
    "Those of tieredImageNet: files as cv2.imencode gives them, and labels apart"
    for s in SPLITS:
        classes,images,y = shuffled(s)
        dump([np.frombuffer(encoded(im), np.uint8)[:, None] for im in images], root/f'{s}_images_png.pkl')
        dump(dict(label_specific=y.astype(np.int32), label_general=y.astype(np.int32)*0, label_specific_str=classes,
                  label_general_str={0:'thing'}), root/f'{s}_labels.pkl')
    return root

@layout
def npz_with_labels_apart(root):
    for s in SPLITS:
        classes,images,y = shuffled(s)
        root.mkdir(exist_ok=True)
        np.savez_compressed(root/f'{s}_images.npz', images=images)
        dump(dict(labels=[classes[i] for i in y]), root/f'{s}_labels.pkl')
    return root

@layout
def one_npz(root):
    "Of all splits, with the channels first"
    arrays = {}
    for s in SPLITS:
        classes,images,y = shuffled(s)
        arrays |= {f'{s}_images':images.transpose(0, 3, 1, 2), f'{s}_labels':np.array(classes)[y]}
    np.savez(root.with_suffix('.npz'), **arrays)
    return root.with_suffix('.npz')

@layout
def zipped_pickles(root):
    category_split_pickles(root)
    with zipfile.ZipFile(root.with_suffix('.zip'), 'w', zipfile.ZIP_DEFLATED) as z:
        for f in sorted(root.iterdir()): z.write(f, f'mini/{f.name}')
    return root.with_suffix('.zip')

@layout
def pickles_in_a_tar(root):
    cache_pickles(root)
    return tar_of(root.with_suffix('.tar.gz'), {f'mini/{f.name}':f.read_bytes() for f in sorted(root.iterdir())}, 'w:gz')
