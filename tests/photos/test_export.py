"""Test the export: onnxruntime, without PyTorch, says of photos what the classifier says."""
import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from helpers import recipe, says, write_images
from PIL import Image

from grdd_fastai.models.create import create_backbone
from grdd_fastai.photos.classifier import UNKNOWN, FewShotClassifier
from grdd_fastai.photos.export import linear_form

pytest.importorskip('onnxruntime', reason='needs the extra onnx')
pytest.importorskip('onnxscript', reason='needs the extra onnx')


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "few/ with three classes of six photos, and new/ with wide, tall, small, turned and grey ones"
    root = tmp_path_factory.mktemp('photos')
    for i,c in enumerate(('red', 'green', 'blue')): write_images(root/'few'/c, [f'{k}.png' for k in range(6)], 40, i, i/3)
    write_images(root/'new', [f'{k}.png' for k in range(6)], 48, 9, 0.)
    image = Image.open(root/'new'/'0.png')
    image.resize((99, 37)).save(root/'new'/'wide.png')
    image.resize((31, 83)).save(root/'new'/'tall.png')
    image.convert('L').save(root/'new'/'grey.png')
    levels = np.asarray(image.convert('L'))
    Image.fromarray(levels.astype(np.uint16)*250).save(root/'new'/'grey16.png')
    Image.fromarray(levels.astype(np.float32)/255).save(root/'new'/'grey32.tif')
    image.convert('CMYK').save(root/'new'/'cmyk.jpg')
    exif = Image.Exif()
    exif[274] = 6
    image.resize((60, 40)).save(root/'new'/'turned.jpg', exif=exif)
    return root

def program(folder):
    spec = importlib.util.spec_from_file_location('predict_onnx', folder/'predict_onnx.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def agree(few, folder, files):
    found,table = program(few.export_onnx(folder)).predict(files),few.predict_table(files)
    assert [name for name,_ in found] == table['class'].tolist()
    assert np.allclose([p for _,p in found], table.probability, atol=1e-4)
    return table

@pytest.mark.parametrize('classifier', ['simpleshot_l2n', 'lda', 'ridge', 'logistic', 'cosine', 'prototype', 'prototype_cosine'])
def test_the_linear_form_of_a_classifier(photos, classifier):
    few = FewShotClassifier.from_folder(photos/'few', classifier=classifier)
    weight,bias,normalize = linear_form(few)
    h = few.embed(photos/'new')
    logits = (torch.nn.functional.normalize(h, dim=1) if normalize else h) @ weight.T + bias
    difference = logits - torch.from_numpy(few.logits(photos/'new').to_numpy())
    assert (difference - difference.mean(1, keepdim=True)).abs().max() < 1e-3*logits.abs().max()
    assert normalize == (classifier != 'prototype')

@pytest.mark.parametrize('classifier', ['simpleshot_l2n', 'prototype'])
def test_what_onnxruntime_says(photos, tmp_path, classifier):
    few = FewShotClassifier.from_folder(photos/'few', classifier=classifier, unknown=.1)
    assert UNKNOWN in set(agree(few, tmp_path/'a', sorted((photos/'new').iterdir()))['class'])

def network(name):
    torch.manual_seed(0)
    if name == 'vit': return timm.create_model('test_vit2')
    net = create_backbone('resnet12' if name == 'resnet12' else 'convnet4', 0)
    if name == 'crop': net.pretrained_cfg = net.pretrained_cfg | dict(crop_pct=.8, interpolation='bilinear')
    if name == 'squash': net.pretrained_cfg = net.pretrained_cfg | dict(crop_pct=.9, crop_mode='squash')
    return net

@pytest.mark.parametrize('name', ['vit', 'resnet12', 'crop', 'squash'])
def test_other_networks_and_other_ways_to_cut_photos(photos, tmp_path, name):
    files = sorted((photos/'new').iterdir())
    table = agree(FewShotClassifier.from_folder(photos/'few', network(name), mirror=name == 'crop'), tmp_path/'a', files)
    assert UNKNOWN not in set(table['class'])

def test_the_program_needs_no_pytorch(photos, tmp_path):
    few = FewShotClassifier.from_folder(photos/'few')
    files = sorted((photos/'new').iterdir())[:3]
    folder = few.export_onnx(tmp_path/'a')
    assert sorted(f.name for f in folder.iterdir()) == ['classes.json', 'classifier.onnx', 'predict_onnx.py']
    bad = tmp_path/'bad.png'
    bad.write_bytes(b'no image')
    code = ("import sys; sys.modules['torch'] = sys.modules['timm'] = None; sys.argv[0] = sys.argv[1]; del sys.argv[1];"
            "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')")
    def run(*files): return subprocess.run([sys.executable, '-c', code, folder/'predict_onnx.py', *files], capture_output=True, text=True)
    done = run(*files)
    rows = [line.split('\t') for line in done.stdout.splitlines()]
    assert done.returncode == 0 and [name for _,name,_ in rows] == few.predict(files) and [f for f,*_ in rows] == list(map(str, files))
    some = run(files[0], bad, tmp_path, files[1])
    assert some.returncode == 1 and len(some.stdout.splitlines()) == 2 and some.stderr.count('cannot be read') == 2
    assert run().stderr.startswith('Classify photos with classifier.onnx')

def test_the_recipe_exports(photos, tmp_path):
    recipe('classify')(str(photos/'new'), support=str(photos/'few'), export=str(tmp_path/'a'))
    assert (tmp_path/'a'/'classifier.onnx').is_file()

def test_what_cannot_be_exported(photos, tmp_path, monkeypatch):
    def export(**kwargs): return FewShotClassifier.from_folder(photos/'few', **kwargs).export_onnx(tmp_path/'a')
    says(lambda: export(classifier='nearest_neighbour'), 'nearest_neighbour is not linear', 'simpleshot_l2n')
    says(lambda: export(classifier='tim_adm'), 'classifies photos together')
    says(lambda: FewShotClassifier().export_onnx(tmp_path/'a'), 'no classes yet')
    net = network('crop')
    net.pretrained_cfg = net.pretrained_cfg | dict(crop_mode='border')
    says(lambda: export(network=net), 'with a border')
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    says(export, 'onnxscript is not installed', "grdd-fastai[onnx]")
    assert not (tmp_path/'a').exists()
